"""Shards and token data: what is written can be read by anyone, and nothing damaged is read in silence."""

import gc
import io
import json
import os
import sys
import tarfile
import tracemalloc  # noqa: F401 - pytest imports it while it handles an unraisable error, which can fail

import numpy as np
import pytest
import webdataset as wds

from nano4m_cli.data import shards
from nano4m_cli.data.loader import SampleOrder, TokenData
from nano4m_cli.data.shards import (
    Shard,
    Split,
    check_aligned,
    index_path,
    shard_name,
    verify_shard,
    write_shard,
)
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import AlignmentError, DataError, ShardError, TokenError, UnknownNameError
from nano4m_cli.spec import TokenSpec


def samples(n: int, start: int = 0):
    for i in range(start, start + n):
        yield f"k{i:03d}", {"a.txt": f"text {i}".encode(), "b.bin": bytes([i]) * (3 + 700 * (i % 2))}


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / shard_name(0)
    assert write_shard(path, samples(5)) == 5
    return path


# -- writing ------------------------------------------------------------------------------------------------------


def test_plain_webdataset_reads_our_shards(tar):
    write_shard(tar.with_name(shard_name(1)), samples(4, 5))
    urls = [str(tar), str(tar.with_name(shard_name(1)))]
    got = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in got] == [f"k{i:03d}" for i in range(9)]
    for s, (_, members) in zip(got, samples(9), strict=True):
        assert {k: v for k, v in s.items() if not k.startswith("__")} == members


def test_random_access_equals_what_was_written(tar):
    shard = Shard(tar)
    assert len(shard) == 5 and shard.keys == [k for k, _ in samples(5)]
    for i, (_, members) in reversed(list(enumerate(samples(5)))):
        for name, data in members.items():
            assert shard.read(i, name) == data
    with pytest.raises(ShardError, match="has no 'c.txt' \\(it has a.txt, b.bin\\)"):
        shard.read(0, "c.txt")


def test_rebuilding_gives_the_same_bytes(tar, tmp_path):
    again = tmp_path / "elsewhere" / shard_name(7)
    write_shard(again, ((k, dict(reversed(m.items()))) for k, m in samples(5)))
    assert again.read_bytes() == tar.read_bytes()
    assert index_path(again).read_bytes() == index_path(tar).read_bytes()
    with tarfile.open(tar) as t:
        assert {(m.mtime, m.uid, m.mode & 0o111) for m in t} <= {(0, m.uid, 0) for m in t}


@pytest.mark.parametrize(
    "bad, said",
    [
        ([("a.b", {"x": b""})], "key 'a.b' may only hold"),
        ([("a/b", {"x": b""})], "key 'a/b' may only hold"),
        ([("", {"x": b""})], "key '' may only hold"),
        ([("caf\xe9", {"x": b""})], "may only hold"),
        pytest.param(
            [("a\n", {"x": b""})],
            "may only hold"),
        ([("a", {"x": b""}), ("b", {"x": b""}), ("a", {"x": b""})], "key 'a' stands twice"),
        ([("a", {"x": b""}), ("b", {"x": b"", "y": b""})], "sample 'b' has members \\['x', 'y'\\]"),
        ([("a", {"x.pkl": b""})], "'x.pkl' is a pickle"),
        ([("a", {"pickle": b""})], "'pickle' is a pickle"),
        ([("a", {"x.pth": b""})], "'x.pth' is a pickle"),
    ],
)
def test_bad_samples_are_refused_and_leave_nothing(tmp_path, bad, said):
    folder = tmp_path / "split"
    with pytest.raises(ShardError, match=said) as caught:
        write_shard(folder / shard_name(0), iter(bad))
    assert str(folder / shard_name(0)) in caught.value.message
    assert list(folder.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, OSError])
def test_an_end_in_the_middle_leaves_nothing(tmp_path, error):
    def cut():
        yield from samples(3)
        raise error("stop")

    with pytest.raises((error, DataError)):
        write_shard(tmp_path / "split" / shard_name(0), cut())
    assert list((tmp_path / "split").iterdir()) == []


def test_an_end_in_the_middle_prints_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: said.append(str(info.exc_value)))

    def cut():
        yield from samples(2)
        raise RuntimeError

    try:
        write_shard(tmp_path / shard_name(0), cut())
    except RuntimeError:
        pass
    gc.collect()
    assert said == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_end_in_the_middle_keeps_the_old_shard(tar):
    before = tar.read_bytes()

    def cut():
        yield from samples(2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tar, cut())
    assert tar.read_bytes() == before and verify_shard(tar) == 5
    assert sorted(p.name for p in tar.parent.iterdir()) == [index_path(tar).name, tar.name]


# -- damage -------------------------------------------------------------------------------------------------------


def content_end(path) -> int:
    """Return where the end-of-archive marker of a tar begins."""
    with tarfile.open(path) as t:
        last = t.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize("touch", ["new time", "kept time"])
def test_a_cut_shard_is_an_error_wherever_it_is_cut(tar, touch):
    whole, stat, end = tar.read_bytes(), tar.stat(), content_end(tar)
    cuts = sorted(
        {0, 1, 100, 511, end - 1, end, end + 1, end + 511, end + 512, end + 1023}
        | set(range(512, end, 512))
        | set(range(300, end, 700))
    )
    for at in cuts:
        tar.write_bytes(whole[:at])
        if touch == "kept time":
            os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(ShardError, match=tar.name) as caught:
            Shard(tar)
        assert caught.value.hint, at
        with pytest.raises(ShardError, match=tar.name):
            verify_shard(tar)


def test_padding_after_the_end_marker_does_not_matter(tar):
    end = content_end(tar)
    whole = tar.read_bytes()
    assert not any(whole[end:])
    for size in (end + 1024, len(whole) + 512):
        tar.write_bytes(whole[:end].ljust(size, b"\0"))
        assert Shard(tar).keys == [k for k, _ in samples(5)]


def test_a_damaged_header_in_the_middle_is_an_error(tar):
    whole = bytearray(tar.read_bytes())
    with tarfile.open(tar) as t:
        headers = [m.offset for m in t.getmembers()]
    silent = []
    for at in headers:
        data = bytearray(whole)
        data[at + 150] ^= 0xFF  # inside the checksum
        tar.write_bytes(bytes(data))
        try:
            silent.append((at, len(Shard(tar))))
        except ShardError as err:
            assert tar.name in err.message
    assert silent == []


def foreign(path, members):
    with tarfile.open(path, "w") as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.SYMTYPE
                info.linkname = "/etc/passwd"
                t.addfile(info)
            else:
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "members, said",
    [
        ([("a.x", b"1"), ("b.x", b"2"), ("a.x", b"3")], "key 'a' stands twice"),
        ([("a.x", b"1"), ("a.y", b"1"), ("b.x", b"2")], "member 'y' is there for 1 of 2 samples"),
        ([("noext", b"1")], "member 'noext' is not KEY.NAME"),
        ([("sub/a.x", b"1")], "is not KEY.NAME"),
        ([("a.x", None)], "is not a plain file"),
    ],
)
def test_foreign_tars_that_are_no_shards(tmp_path, members, said):
    path = tmp_path / shard_name(0)
    foreign(path, members)
    with pytest.raises(ShardError, match=said) as caught:
        Shard(path)
    assert path.name in caught.value.message


def test_foreign_tars_that_are_shards_can_be_read(tmp_path):
    path = tmp_path / shard_name(0)
    foreign(path, [("a.x", b"1"), ("a.y", b"22"), ("b.x", b"3"), ("b.y", b"")])
    shard = Shard(path)
    assert shard.keys == ["a", "b"] and [shard.read(i, m) for i in (0, 1) for m in ("x", "y")] == [
        b"1",
        b"22",
        b"3",
        b"",
    ]


@pytest.mark.parametrize("data", [b"not a tar", b"\x1f\x8b" + bytes(600), bytes(100)])
def test_what_is_no_tar_is_an_error(tmp_path, data):
    path = tmp_path / shard_name(0)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=path.name):
        Shard(path)
    with pytest.raises(ShardError, match="no shard"):
        Shard(tmp_path / shard_name(1))


# -- the index ----------------------------------------------------------------------------------------------------


def test_the_index_is_read_where_it_is_good(tar, monkeypatch):
    monkeypatch.setattr(shards, "_scan", lambda path: pytest.fail("the tar was scanned"))
    assert Shard(tar).keys[-1] == "k004"


@pytest.mark.parametrize("how", ["missing", "older", "other size", "no json", "other format", "no members"])
def test_a_missing_or_stale_index_is_made_again(tar, how):
    index, new = index_path(tar), [("n1", {"c.txt": b"new"}), ("n2", {"c.txt": b"newer"})]
    old, stat = index.read_bytes(), index.stat()
    if how in ("older", "other size"):
        write_shard(tar, iter(new))  # and put the old index back
        index.write_bytes(old)
        if how == "older":
            os.utime(index, ns=(1, 1))
            doc = json.loads(old)
            index.write_text(json.dumps({**doc, "tar_bytes": tar.stat().st_size}))
            os.utime(index, ns=(1, 1))
        elif tar.stat().st_size == json.loads(old)["tar_bytes"]:
            tar.write_bytes(tar.read_bytes() + bytes(10240))
            os.utime(index)
        assert Shard(tar).keys == ["n1", "n2"] and Shard(tar).read(1, "c.txt") == b"newer"
        return
    if how == "missing":
        index.unlink()
    else:
        doc = {
            "no json": "{",
            "other format": json.dumps({**json.loads(old), "format": 99}),
            "no members": json.dumps({"format": 1, "tar_bytes": tar.stat().st_size, "keys": []}),
        }
        index.write_text(doc[how])
        os.utime(index, ns=(stat.st_mtime_ns + 10**9,) * 2)
    assert Shard(tar).keys == [k for k, _ in samples(5)]


def test_verify_finds_an_index_of_another_tar(tar):
    assert verify_shard(tar) == 5
    doc = json.loads(index_path(tar).read_text())
    doc["members"]["a.txt"]["offset"][2] += 512
    index_path(tar).write_text(json.dumps(doc))
    with pytest.raises(ShardError, match="does not describe"):
        verify_shard(tar)


# -- splits -------------------------------------------------------------------------------------------------------


def test_a_split_is_one_sequence(tmp_path):
    for i, (start, n) in enumerate([(0, 3), (3, 1), (4, 4)]):
        write_shard(tmp_path / shard_name(i), samples(n, start))
    split = Split(tmp_path)
    assert len(split) == 8 and split.keys == [k for k, _ in samples(8)]
    for i, (key, members) in enumerate(samples(8)):
        shard, j = split.locate(i)
        assert shard.keys[j] == key and split.read(i, "a.txt") == members["a.txt"]


@pytest.mark.parametrize("there, missing", [([1], 0), ([0, 2], 1), ([0, 1, 3, 4], 2)])
def test_a_gap_in_the_numbers_is_an_error(tmp_path, there, missing):
    for i in there:
        write_shard(tmp_path / shard_name(i), samples(2, 2 * i))
    with pytest.raises(ShardError, match=f"{shard_name(missing)} is missing"):
        Split(tmp_path)


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(ShardError, match="no shards"):
        Split(tmp_path)


def make_split(folder, *keys):
    for i, names in enumerate(keys):
        write_shard(folder / shard_name(i), ((k, {"x": b"1"}) for k in names))
    return Split(folder)


def test_aligned_splits_pass(tmp_path):
    check_aligned({n: make_split(tmp_path / n, ["a", "b"], ["c"]) for n in ("rgb", "depth", "audio")})


@pytest.mark.parametrize(
    "other, said",
    [
        ([["a", "b"], ["c", "d"], ["e"]], None),
        ([["a", "b"]], "rgb has 2 shards .*depth has 1"),
        (
            [["a", "b"], ["c", "x"]],
            f"{shard_name(1)} \\(depth\\) does not fit .*{shard_name(1)} \\(rgb\\): sample 1 is 'd' there and 'x' here",
        ),
        ([["b", "a"], ["c", "d"]], f"{shard_name(0)}.*sample 0 is 'a' there and 'b' here"),
        ([["a", "b"], ["c"]], f"{shard_name(1)}.*2 samples there and 1 here"),
        ([["a", "b"], ["c", "d", "e"]], f"{shard_name(1)}.*2 samples there and 3 here"),
    ],
)
def test_misaligned_splits_name_shard_and_key(tmp_path, other, said):
    splits = {
        "rgb": make_split(tmp_path / "rgb", ["a", "b"], ["c", "d"]),
        "depth": make_split(tmp_path / "depth", *other),
    }
    with pytest.raises(AlignmentError, match=said or "2 shards .*3") as caught:
        check_aligned(splits)
    assert "nano4m tokenize --modality depth" in caught.value.hint


# -- tokens -------------------------------------------------------------------------------------------------------

SPECS = {
    "pic": TokenSpec(modality="pic", kind="grid", shape=(2, 3), vocab_size=50, variants=2),
    "snd": TokenSpec(modality="snd", kind="codes", shape=(4, 2), vocab_size=100_000),
    "txt": TokenSpec(modality="txt", kind="sequence", shape=(7,), vocab_size=30, eos=2),
}


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def token_samples(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        text = rng.integers(3, 30, int(rng.integers(1, 8)))
        text[-1] = 2
        out.append({"pic": rng.integers(0, 50, (2, 6)), "snd": rng.integers(0, 100_000, 8), "txt": text})
    return out


def write_tokens(root, rows: list[dict], cuts=(0, 3, 4, 9), split: str = "train", change=None) -> DatasetFolder:
    """Write token shards with the given shard borders; `change(modality, i, array)` may return other bytes."""
    dataset = DatasetFolder(root / "data" / "toy")
    for name, spec in SPECS.items():
        dataset.tokens(name).mkdir(parents=True, exist_ok=True)
        dataset.spec_path(name).write_text(json.dumps(spec.model_dump(mode="json")))
        for s, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):

            def rows_of(a=a, b=b, name=name, spec=spec):
                for i in range(a, b):
                    array = rows[i][name].astype(spec.dtype)
                    data = change(name, i, array) if change else None
                    yield f"k{i:03d}", {f"{name}.npy": npy(array) if data is None else data}

            write_shard(dataset.tokens(name, split) / shard_name(s), rows_of())
    return dataset


def test_token_data_reads_what_was_written(tmp_path):
    rows = token_samples(9)
    data = TokenData(write_tokens(tmp_path, rows), "train", ["snd", "txt", "pic"])
    assert len(data) == 9 and [data.key(i) for i in range(9)] == [f"k{i:03d}" for i in range(9)]
    assert data.layout.names == ["snd", "txt", "pic"] and data.layout.columns == 8 + 7 + 6
    assert SPECS["pic"].dtype == np.dtype("<u2") and SPECS["snd"].dtype == np.dtype("<u4")
    index = np.array([8, 0, 3, 3, 5, 2, 1, 7, 4, 6])
    ids, length = data.read(index)
    assert ids.dtype == np.int64 and ids.max() > 2**16, "ids need their four bytes"
    for i, row, size in zip(index, ids, length, strict=True):
        text = rows[i]["txt"]
        wanted = [*rows[i]["snd"], *text, *[0] * (7 - len(text)), *rows[i]["pic"][0]]
        assert row.tolist() == wanted and size.tolist() == [8, len(text), 6]
    assert np.array_equal(data.lengths(slice(None)), data.read(np.arange(9))[1])
    assert np.array_equal(data.lengths(np.arange(4)), data.read(np.arange(4))[1])
    assert data.read(np.zeros(0, dtype=np.int64))[0].shape == (0, 21)


def test_ids_beyond_the_end_of_a_text_are_zero_whatever_lies_there(tmp_path):
    """A long text beside short ones: what is read behind the short ones is the next member's header."""
    spec = TokenSpec(modality="long", kind="sequence", shape=(600,), vocab_size=65_000, eos=2)
    dataset = DatasetFolder(tmp_path / "data" / "toy")
    dataset.tokens("long").mkdir(parents=True)
    dataset.spec_path("long").write_text(json.dumps(spec.model_dump(mode="json")))
    texts = [np.full(n, 9, dtype="<u2") for n in (5, 600, 1, 300, 2)]
    write_shard(
        dataset.tokens("long", "train") / shard_name(0),
        ((f"k{i}", {"long.npy": npy(t)}) for i, t in enumerate(texts)),
    )
    ids, length = TokenData(dataset, "train", ["long"]).read(np.arange(5))
    assert length[:, 0].tolist() == [5, 600, 1, 300, 2]
    for row, text in zip(ids, texts, strict=True):
        assert row.tolist() == [9] * len(text) + [0] * (600 - len(text))


VARIANT = np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1])
INDEX = np.array([8, 0, 3, 3, 5, 2, 1, 7, 4, 6])


def test_variants_are_rows_of_one_array(tmp_path):
    rows = token_samples(9)
    data = TokenData(write_tokens(tmp_path, rows), "train", ["pic", "txt"])
    ids, _ = data.read(INDEX, VARIANT)
    for i, v, row in zip(INDEX, VARIANT, ids, strict=True):
        assert row[:6].tolist() == rows[i]["pic"][v].tolist()
        assert row[6 : 6 + len(rows[i]["txt"])].tolist() == rows[i]["txt"].tolist()


def test_a_modality_without_variants_beside_one_with(tmp_path):
    rows = token_samples(9)
    for row in rows:
        row["snd"] %= 100  # so that what is read in error is no id outside the vocabulary
    data = TokenData(write_tokens(tmp_path, rows), "train", ["snd", "pic"])
    ids, _ = data.read(INDEX, VARIANT)
    for i, v, row in zip(INDEX, VARIANT, ids, strict=True):
        assert row.tolist() == [*rows[i]["snd"], *rows[i]["pic"][v]]


def test_rows_do_not_depend_on_the_batch(tmp_path):
    data = TokenData(write_tokens(tmp_path, token_samples(9)), "train", list(SPECS))
    whole = data.read(np.arange(9))[0]
    for i in range(9):
        assert np.array_equal(data.read(np.array([i]))[0][0], whole[i])


@pytest.mark.parametrize("modality, bad", [("pic", 50), ("snd", 100_000), ("txt", 30), ("txt", 65535)])
def test_an_id_outside_the_vocabulary_names_modality_and_key(tmp_path, modality, bad):
    rows = token_samples(9)
    rows[5][modality].reshape(-1)[0] = bad
    data = TokenData(write_tokens(tmp_path, rows), "train", list(SPECS))
    data.read(np.array([0, 4, 6]))
    with pytest.raises(TokenError, match=f"sample 'k005': id {bad} of '{modality}'") as caught:
        data.read(np.array([4, 5, 6]))
    assert f"--modality {modality}" in caught.value.hint


def at(modality, i, make):
    return lambda m, j, array: make(array) if (m, j) == (modality, i) else None


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m, j, a: npy(a.astype("<u4")) if m == "pic" else None, "stored as <u4, <u2 expected"),
        (lambda m, j, a: npy(a.astype(">u2")) if m == "pic" else None, "stored as >u2, <u2 expected"),
        (lambda m, j, a: npy(np.asfortranarray(a)) if m == "pic" else None, "stored as <u2 in Fortran order, <u2 expected"),
        (at("pic", 1, lambda a: npy(a[:1])), "'k001' has 6 ids of pic, 12 expected"),
        (at("snd", 7, lambda a: npy(a[:-1])), "'k007' has 7 ids of snd, 8 expected"),
        (at("txt", 4, lambda a: npy(np.arange(8, dtype="<u2"))), "'k004' has 8 ids of txt, 1 to 7 allowed"),
        (at("txt", 4, lambda a: npy(np.zeros(0, "<u2"))), "'k004' has 0 ids of txt, 1 to 7 allowed"),
        (at("txt", 6, lambda a: b"PK\x03\x04 no npy"), "'txt.npy' of 'k006' is no npy file"),
        (at("txt", 6, lambda a: b""), "'txt.npy' of 'k006' is no npy file"),
    ],
)
def test_wrong_arrays_are_found_when_the_data_are_opened(tmp_path, change, said):
    with pytest.raises(ShardError, match=said) as caught:
        TokenData(write_tokens(tmp_path, token_samples(9), change=change), "train", list(SPECS))
    assert "shard-00000" in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            at("txt", 6, lambda a: npy(a[:3].astype("<u4"))),
            id="wider"),
        pytest.param(at("txt", 6, lambda a: npy(np.array([7.0, 2.0], "<f2"))), id="float"),
        pytest.param(at("txt", 6, lambda a: npy(a.astype(">u2"))), id="big-endian"),
    ],
)
def test_a_wrong_dtype_is_found_in_any_sample(tmp_path, change):
    """Not in a shard's first sample only."""
    with pytest.raises(DataError, match="k006"):
        TokenData(write_tokens(tmp_path, token_samples(9), change=change), "train", list(SPECS)).read(np.arange(9))


def test_a_damaged_npy_header_is_a_shard_error(tmp_path):
    change = at("txt", 0, lambda a: npy(a).replace(b"{'descr'", b"{{{{{{{{"))
    with pytest.raises(ShardError, match="k000|shard-000000"):
        TokenData(write_tokens(tmp_path, token_samples(9), change=change), "train", list(SPECS))


def test_names_that_are_not_there(tmp_path):
    dataset = write_tokens(tmp_path, token_samples(9))
    with pytest.raises(DataError, match="'toy' has no rgb tokens") as caught:
        TokenData(dataset, "train", ["pic", "rgb"])
    assert caught.value.hint == "run 'nano4m tokenize --modality rgb'"
    with pytest.raises((DataError, UnknownNameError), match="has no split 'trian' of pic tokens") as caught:
        TokenData(dataset, "trian", ["pic"])
    assert caught.value.hint == "did you mean 'train'?"
    (dataset.spec_path("snd")).write_text("{")
    with pytest.raises(DataError, match="spec.json is not valid JSON"):
        TokenData(dataset, "train", ["snd"])


def test_misaligned_tokens_are_refused(tmp_path):
    dataset = write_tokens(tmp_path, token_samples(9))
    path = dataset.tokens("snd", "train") / shard_name(0)
    keep = Shard(path)
    write_shard(
        path, ((f"q{k}" if i == 2 else k, {"snd.npy": keep.read(i, "snd.npy")}) for i, k in enumerate(keep.keys))
    )
    with pytest.raises(AlignmentError, match="sample 2 is 'k002' there and 'qk002' here"):
        TokenData(dataset, "train", ["pic", "snd"])


# -- order --------------------------------------------------------------------------------------------------------


def test_each_epoch_has_every_sample_once():
    order = SampleOrder(13, seed=3)
    epochs = [order.at(np.arange(13 * e, 13 * (e + 1))) for e in range(4)]
    assert all(sorted(e.tolist()) == list(range(13)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4, "epochs differ"
    assert not np.array_equal(epochs[0], SampleOrder(13, seed=4).at(np.arange(13)))


def test_the_order_does_not_depend_on_how_it_is_asked():
    whole = SampleOrder(13, seed=3).at(np.arange(60))
    jumps = SampleOrder(13, seed=3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        ask = rng.integers(0, 60, int(rng.integers(1, 20)))
        assert np.array_equal(jumps.at(ask), whole[ask])
    assert [int(SampleOrder(13, seed=3).at(np.array([i]))[0]) for i in range(60)] == whole.tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_step_exactly(ranks):
    """The counters of a step, split over ranks, give the samples of the whole step: nothing twice, nothing lost."""
    batch = 16
    for step in range(6):
        counters = np.arange(step * batch, (step + 1) * batch)
        whole = SampleOrder(50, 0).at(counters)
        parts = [SampleOrder(50, 0).at(c) for c in np.array_split(counters, ranks)]
        strided = [SampleOrder(50, 0).at(counters[r::ranks]) for r in range(ranks)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(np.stack(strided, 1).reshape(-1), whole)


@pytest.mark.parametrize("key", ["k{}", "k{}-" + "long-" * 22])
def test_the_index_written_beside_a_shard_is_that_of_a_scan(tmp_path, key):
    """Also where a name needs more than one header, and where members are empty or fill whole blocks."""
    path = tmp_path / "shard-000000.tar"
    sizes = [0, 1, 511, 512, 513, 5000]
    content = lambda size: {"a.bin": bytes(size), "b.txt": b"x" * (size // 2), "labels.json": b"{}"}  # noqa: E731
    rows = [(key.format(i), content(size)) for i, size in enumerate(sizes)]
    assert shards.write_shard(path, iter(rows)) == len(sizes)
    written, scanned = shards.read_index(path), shards._scan(path)
    assert written.keys == scanned.keys == [k for k, _ in rows] and written.tar_bytes == scanned.tar_bytes
    for name in ("a.bin", "b.txt", "labels.json"):
        assert np.array_equal(written.offset[name], scanned.offset[name]) and np.array_equal(written.size[name], scanned.size[name])
    shard = shards.Shard(path)
    assert all(shard.read(i, "a.bin") == bytes(size) for i, size in enumerate(sizes))
    shards.verify_shard(path)


@pytest.mark.parametrize("array", [np.arange(6, dtype="<u2").reshape(2, 3), np.zeros((1, 0), "<u4"),
                                   np.arange(6, dtype="<u2").reshape(2, 3).T])
def test_npy_bytes_are_numpys_own(array):
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    assert shards.npy(array) == out.getvalue()
    back = np.load(io.BytesIO(shards.npy(array)), allow_pickle=False)
    assert np.array_equal(back, array) and back.dtype == array.dtype
