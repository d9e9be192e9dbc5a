"""The `tokens` source: folders of other projects come in id for id, and what does not fit together is an error that names it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_cli import run as cli
from workspace_factory import config, one_thread  # noqa: F401 - a fixture

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shards import Shard, Split, index_path, shard_name, write_shard
from nano4m_cli.data.sources._tokens_layouts import LAYOUTS, recognise
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import AlignmentError, ConfigError, DataError, FetchError, Nano4MError, TokenError
from nano4m_cli.registry import SOURCES
from nano4m_cli.spec import read_spec
from nano4m_cli.train.doctor import examine
from nano4m_cli.train.tokenizing import choose_modalities, make_tokenizer, tokenize

COUNTS = {"train": 7, "val": 2, "test": 3}


def take(folder, root, *options, workers=1):
    workspace = Workspace(root)
    return fetch(open_source("tokens", [f"path={folder}", "name=toks", *options], workspace), workspace, workers)


def stems(split, count):
    return [f"{split}_{i:03d}" for i in range(count)]


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def put_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def assert_ids(dataset, split, modality, wanted):
    """Assert that TokenData gives `wanted[key]`, a plain list of rows of ids, for every sample and variant."""
    data = TokenData(dataset, split, [modality])
    assert sorted(data.key(i) for i in range(len(data))) == sorted(wanted)
    for i in range(len(data)):
        rows = wanted[data.key(i)]
        assert data.layout.specs[0].variants == len(rows)
        for k, row in enumerate(rows):
            ids, length = data.read(np.array([i]), np.array([k]))
            assert ids[0].tolist() == row and length.tolist() == [[len(row)]]


def labels(dataset, split):
    raw = Split(dataset.raw(split))
    return {key: json.loads(raw.read(i, "labels.json")) for i, key in enumerate(raw.keys)}


def captions(dataset, split):
    raw = Split(dataset.raw(split))
    return {key: raw.read(i, "caption.txt").decode() for i, key in enumerate(raw.keys)}


# -- the layouts ------------------------------------------------------------------------------------------------------


def write_course(folder, k=3, side=4, counts=COUNTS, pictures=("rgb", "depth"), differ=False):
    """A course folder of small pictures; the caption of a file is one text K times, or K texts."""
    for s, (split, count) in enumerate(counts.items()):
        for i, stem in enumerate(stems(split, count)):
            for m, name in enumerate(pictures):
                draw = np.random.default_rng([s, i, m])
                put(folder / split / f"tok_{name}@{side * side}" / f"{stem}.npy", draw.integers(0, 64000, (k, side * side)))
            texts = [f"a caption of {stem}" + (f" row {r}" if differ else "") for r in range(k)]
            put_text(folder / split / "scene_desc" / f"{stem}.json", json.dumps(texts))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A course folder to read; `broken` gives a test one to damage."""
    return write_course(tmp_path_factory.mktemp("course") / "toks")


@pytest.fixture
def broken(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "broken"))


def source_rows(folder, split, name, count):
    return {stem: np.load(folder / split / name / f"{stem}.npy").tolist() for stem in stems(split, count)}


def test_course(tmp_path):
    """Real names and shapes, recognised; 64000 ids do not fit a signed 16-bit number and come through."""
    folder = write_course(tmp_path / "clevr", k=2, side=16, counts={"train": 3, "val": 2}, pictures=("rgb", "depth", "normal"))
    put(folder / "train" / "tok_rgb@256" / "train_000.npy", np.array([[0, 63999] * 128, [63999, 0] * 128], dtype=np.uint16))
    report = take(folder, tmp_path)
    info = report.info
    assert info.options["layout"] == "course" and "course (recognised)" in info.notes
    assert info.modalities == ["rgb", "depth", "normal", "caption"] and info.brought == ["rgb", "depth", "normal"]
    assert info.splits == {"train": 3, "val": 2} and (report.made, report.kept) == (5, 0)
    for name in info.brought:
        spec = read_spec(report.dataset.spec_path(name))
        assert (spec.kind, spec.shape, spec.vocab_size, spec.variants) == ("grid", (16, 16), 64000, 2)
        assert spec.levels == (8, 8, 8, 5, 5, 5) and spec.tokenizer.name == "cosmos"
        for split, count in info.splits.items():
            assert_ids(report.dataset, split, name, source_rows(folder, split, f"tok_{name}@256", count))
    assert captions(report.dataset, "val") == {s: f"a caption of {s}" for s in stems("val", 2)}
    assert labels(report.dataset, "val")["val_001"] == {
        "objects": [], "fields": [], "stem": "val_001", "captions": ["a caption of val_001"] * 2,
    }
    assert sum(examine(report.dataset, info.brought).samples["train"].values()) == 9


def test_rows_that_have_captions_of_their_own_become_samples(tmp_path):
    """A caption of the first crop would be wrong for the others."""
    folder = write_course(tmp_path / "clevr", k=11, differ=True)
    report = take(folder, tmp_path, "layout=course", "shard_size=25")
    assert report.info.splits == {"train": 77, "val": 22, "test": 33} and report.info.options["rows"] == "samples"
    assert [len(s) for s in Split(report.dataset.raw("train")).shards] == [22, 22, 22, 11]
    for name in ("rgb", "depth"):
        rows = source_rows(folder, "test", f"tok_{name}@16", 3)
        assert_ids(report.dataset, "test", name, {f"{s}-{r:02d}": [rows[s][r]] for s in rows for r in range(11)})
    texts = captions(report.dataset, "test")
    assert texts["test_002-10"] == "a caption of test_002 row 10" and len(texts) == 33
    assert labels(report.dataset, "test")["test_002-10"]["row"] == 10
    kept = take(folder, tmp_path / "b", "layout=course", "rows=variants")
    assert kept.info.splits == COUNTS and captions(kept.dataset, "test")["test_002"] == "a caption of test_002 row 0"
    assert labels(kept.dataset, "test")["test_002"]["captions"][10] == "a caption of test_002 row 10"


def test_captions_that_differ_late_are_not_dropped_in_silence(broken, tmp_path, monkeypatch):
    monkeypatch.setattr("nano4m_cli.data.sources._tokens_found.PEEK", 3)
    put_text(broken / "train" / "scene_desc" / "train_005.json", '["one", "two", "three"]')
    with pytest.raises(DataError, match="train_005.json: captions differ between rows") as caught:
        take(broken, tmp_path, "layout=course")
    assert caught.value.hint == "say rows=samples, or rows=variants to keep the first of each file"


def write_nano4m_audio(folder, offset=True, counts=COUNTS, k=2, slots=196, frames=256):
    """Returns the codes of each sample's sound as {stem: [codebook 1, codebook 2]}."""
    codes = {}
    for s, (split, count) in enumerate(counts.items()):
        for i, stem in enumerate(stems(split, count)):
            for m, (name, vocab) in enumerate({"rgb": 16384, "depth": 8192, "normal": 8192}.items()):
                draw = np.random.default_rng([s, i, m])
                put(folder / split / f"tok_{name}@{slots}" / f"{stem}.npy", draw.integers(0, vocab, (k, slots)).astype(np.int32))
            one, two = np.random.default_rng([s, i, 9]).integers(0, 1024, (2, frames)).tolist()
            one[:2], two[:2] = [0, 1023], [1023, 0]
            flat = []
            for a, b in zip(one, two, strict=True):
                flat += [a, b + 1024 * offset]
            put(folder / split / f"tok_audio@{2 * frames}" / f"{stem}.npy", np.array([flat] * k, dtype=np.int32))
            put_text(folder / split / "scene_desc" / f"{stem}.json", json.dumps(["cat meowing"] * k))
            codes[stem] = [one, two]
    put_text(folder / "splits.json", json.dumps({"seed": 42, "splits": {s: stems(s, n) for s, n in counts.items()}}))
    return codes


@pytest.mark.parametrize("offset", [True, False])
def test_nano4m_audio(tmp_path, offset):
    codes = write_nano4m_audio(tmp_path / "tokenized_v5", offset)
    report = take(tmp_path / "tokenized_v5", tmp_path)
    assert report.info.options["layout"] == "nano4m-audio" and report.info.modalities[-2:] == ["audio", "caption"]
    assert ("ids offset by codebook" in report.info.notes) == offset
    spec = read_spec(report.dataset.spec_path("audio"))
    assert (spec.kind, spec.shape, spec.vocab_size, spec.variants) == ("codes", (256, 2), 1024, 2)
    vocab = {m: read_spec(report.dataset.spec_path(m)).vocab_size for m in ("rgb", "depth", "normal")}
    assert vocab == {"rgb": 16384, "depth": 8192, "normal": 8192}
    for split, count in COUNTS.items():
        wanted = {}
        for stem in stems(split, count):
            slots = [0] * 512
            for q in range(2):
                for t in range(256):
                    slots[t * 2 + q] = codes[stem][q][t]
            wanted[stem] = [slots, slots]
        assert_ids(report.dataset, split, "audio", wanted)
        for name in ("rgb", "depth", "normal"):
            folder = tmp_path / "tokenized_v5"
            assert_ids(report.dataset, split, name, source_rows(folder, split, f"tok_{name}@196", count))


def test_nano4m_audio_codebooks_in_the_wrong_order(tmp_path):
    """One codebook after the other passes every check of range and length but that of places."""
    folder = tmp_path / "v5"
    codes = write_nano4m_audio(folder)
    one, two = codes["train_003"]
    flat = one + [b + 1024 for b in two]
    path = folder / "train" / "tok_audio@512" / "train_003.npy"
    put(path, np.array([flat, flat], dtype=np.int32))
    with pytest.raises(TokenError, match="train_003.npy: id 1023 stands at place 1, which is of codebook 1: 1024 to 2047"):
        take(folder, tmp_path)
    flat = [1024 + b for b in two] + one
    put(path, np.array([flat, flat], dtype=np.int32))
    with pytest.raises(TokenError, match="train_003.npy: id 2047 stands at place 0, which is of codebook 0: 0 to 1023"):
        take(folder, tmp_path)


@pytest.mark.parametrize("flat", [False, True])
def test_saga(tmp_path, flat):
    """Shapes as its scripts write them, or flattened; no rows; its eval split is our val."""
    folder, books, rest = tmp_path / "tokens_16_05", {}, {}
    shapes = {"tok_rgb@256": (16, 16), "tok_depth@256": (1, 16, 16), "tok_video@256": (2, 32, 32), "tok_label": (1,)}
    for s, (split, count) in enumerate({"train": 4, "eval": 2, "test": 1}.items()):
        for i, stem in enumerate(stems(split, count)):
            draw = np.random.default_rng([s, i])
            for name, shape in shapes.items():
                array = draw.integers(0, 310 if name == "tok_label" else 64000, shape).astype(np.uint32)
                rest[name, stem] = array.reshape(-1).tolist()
                put(folder / split / name / f"{stem}.npy", array.reshape(-1) if flat else array)
            books[stem] = draw.integers(0, 2048, (32, 63)).tolist()
            array = np.array(books[stem], dtype=np.uint32)
            put(folder / split / "tok_audio@24_000" / f"{stem}.npy", array.reshape(-1) if flat else array)
            if flat:
                put_text(folder / split / "caption" / f"{stem}.txt", f"caf\xe9 {stem}\n")
            else:
                put_text(folder / split / "caption" / f"{stem}.json", json.dumps({"text": f"caf\xe9 {stem}"}))
    report = take(folder, tmp_path)
    assert report.info.options["layout"] == "saga" and report.info.splits == {"train": 4, "val": 2, "test": 1}
    assert report.info.modalities == ["rgb", "depth", "audio", "video", "label", "caption"]
    specs = {m: read_spec(report.dataset.spec_path(m)) for m in report.info.brought}
    assert {m: (s.kind, s.shape, s.vocab_size) for m, s in specs.items()} == {
        "rgb": ("grid", (16, 16), 64000), "depth": ("grid", (16, 16), 64000), "audio": ("codes", (63, 32), 2048),
        "video": ("grid", (2, 32, 32), 64000), "label": ("grid", (1, 1), 310),
    }
    for split, of, count in (("train", "train", 4), ("val", "eval", 2), ("test", "test", 1)):
        wanted = {}
        for stem in stems(of, count):
            wanted[stem] = [[books[stem][q][t] for t in range(63) for q in range(32)]]
        assert_ids(report.dataset, split, "audio", wanted)
        for name in shapes:
            m = name.removeprefix("tok_").removesuffix("@256")
            assert_ids(report.dataset, split, m, {s: [rest[name, s]] for s in stems(of, count)})
    assert captions(report.dataset, "val") == {s: f"caf\xe9 {s}" for s in stems("eval", 2)}


def npy_bytes(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_tar(path, members):
    """Write (name, bytes) members, or ready TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_4m(folder, split="train", count=7, shard=4, k=2):
    """WebDataset tars of one modality each, with crops, captions of dicts, a json that is none, and pictures."""
    ids = {}
    for start in range(0, count, shard):
        name, some = f"shard-{start // shard:05d}.tar", stems(split, count)[start : start + shard]
        for m, (modality, vocab) in enumerate({"tok_rgb@224": 16384, "tok_depth@224": 8192}.items()):
            for i, stem in enumerate(some):
                draw = np.random.default_rng([start, i, m])
                ids[modality, stem] = draw.integers(0, vocab, (k, 196)).astype(np.int16)
            first = [(_folder_member("./"), b"")] if m else []
            write_tar(folder / modality / name, first + [
                (("./" if m else "") + f"{s}.npy", npy_bytes(ids[modality, s])) for s in some
            ])  # fmt: skip
        crops = [(f"{s}.npy", npy_bytes(np.array([[0, 0, 224, 224, 0], [1, 2, 100, 100, 1]]))) for s in some]
        write_tar(folder / "crop_settings" / name, crops)
        told = [(f"{s}.json", json.dumps([{"caption": f"{s} one"}, {"caption": f"{s} two"}]).encode()) for s in some]
        write_tar(folder / "caption" / name, told)
        write_tar(folder / "det" / name, [(f"{s}.json", b'{"instances": []}') for s in some])
        write_tar(folder / "rgb" / name, [(f"{s}.jpg", b"jpg") for s in some])
    return ids


def _folder_member(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_apple_4m(tmp_path):
    ids = write_4m(tmp_path / "cc12m")
    report = take(tmp_path / "cc12m", tmp_path, "rows=variants")
    info = report.info
    assert info.options["layout"] == "4m" and info.splits == {"train": 7} and info.brought == ["rgb", "depth"]
    assert "Left out: det (.json)." in info.notes and "Left out: rgb" in info.notes
    assert "tok_rgb@224, 14x14 of 16384" in info.notes
    for name in ("rgb", "depth"):
        wanted = {s: ids[f"tok_{name}@224", s].tolist() for s in stems("train", 7)}
        assert_ids(report.dataset, "train", name, wanted)
    label = labels(report.dataset, "train")["train_006"]
    assert label["crop_settings"] == [[0, 0, 224, 224, 0], [1, 2, 100, 100, 1]]
    assert label["captions"] == ["train_006 one", "train_006 two"]
    rows = take(tmp_path / "cc12m", tmp_path / "b")  # captions differ within a file: by default each row is a sample
    assert rows.info.splits == {"train": 14}
    assert_ids(rows.dataset, "train", "rgb", {
        f"{s}-{r}": [ids["tok_rgb@224", s][r].tolist()] for s in stems("train", 7) for r in range(2)
    })  # fmt: skip
    label = labels(rows.dataset, "train")["train_006-1"]
    assert label["crop_settings"] == [[1, 2, 100, 100, 1]] and label["captions"] == ["train_006 two"]


def test_apple_4m_with_splits_and_names_of_its_own(tmp_path):
    """Its script writes split/task_suffix/class/file.npy; a superresolution folder needs a name of its own."""
    for split, count in {"train": 3, "val": 2}.items():
        for i, stem in enumerate(stems(split, count)):
            for folder, slots in (("rgb_dvae_BUa_224", 196), ("tok_rgb@448", 784), ("tok_dinov2_global", 16)):
                array = np.full((2, slots), i + slots, dtype=np.int16)
                put(tmp_path / "in" / split / folder / "n0144" / f"{stem}.npy", array)
    named = ["rename.rgb_dvae_BUa_224=rgb", "rename.tok_rgb@448=rgb_448"]
    report = take(tmp_path / "in", tmp_path, "layout=4m", "vocab.rgb=16384", *named)
    assert report.info.brought == ["rgb", "dinov2_global", "rgb_448"] and report.info.splits == {"train": 3, "val": 2}
    shapes = {m: read_spec(report.dataset.spec_path(m)).shape for m in report.info.brought}
    assert shapes == {"rgb": (14, 14), "rgb_448": (28, 28), "dinov2_global": (1, 16)}
    wanted = {f"n0144_{s}": [[i + 784] * 784] * 2 for i, s in enumerate(stems("val", 2))}
    assert_ids(report.dataset, "val", "rgb_448", wanted)
    assert labels(report.dataset, "val")["n0144_val_000"]["stem"] == "n0144/val_000"
    with pytest.raises(FetchError, match="would both be 'rgb'") as caught:
        take(tmp_path / "in", tmp_path, "layout=4m", "vocab.rgb=16384", named[0])
    assert caught.value.hint.startswith("say rename.tok_rgb@448=")


def test_layouts_are_told_apart_by_names():
    assert recognise({"tok_rgb@256", "scene_desc"}, False, "x").name == "course"
    assert recognise({"tok_rgb@256", "tok_audio@24_000"}, False, "x").name == "saga"
    assert recognise({"tok_rgb@196"}, False, "x").name == "nano4m-audio"
    assert recognise({"tok_rgb@256", "tok_audio@256"}, False, "x").name == "nano4m-audio"
    assert recognise({"anything"}, True, "x").name == "4m"
    assert recognise({"tok_depth@448"}, False, "x").name == "4m"
    with pytest.raises(FetchError, match="'x' is of no known layout: it has pictures, sounds") as caught:
        recognise({"pictures", "sounds"}, False, "x")
    for name, layout in LAYOUTS.items():
        assert f"{name}: {layout.sign}" in caught.value.hint
    with pytest.raises(FetchError, match="could be layout nano4m-audio or saga"):
        recognise({"tok_audio@512", "tok_label"}, False, "x")


# -- options ----------------------------------------------------------------------------------------------------------


def test_vocabularies_and_shapes_can_be_said(small, tmp_path):
    report = take(small, tmp_path, "layout=course", "vocab.rgb=65000", "shape.depth=[2,8]", "modalities=[rgb,depth]")
    rgb, depth = (read_spec(report.dataset.spec_path(m)) for m in ("rgb", "depth"))
    assert (rgb.vocab_size, rgb.levels, rgb.tokenizer.name) == (65000, (), "unknown"), "other ids are of another tokenizer"
    assert depth.shape == (2, 8) and depth.levels == (8, 8, 8, 5, 5, 5)
    assert report.info.modalities == ["rgb", "depth"]
    assert list(Shard(report.dataset.raw("val") / shard_name(0)).index.offset) == ["labels.json"]


def test_a_folder_that_no_layout_knows(broken, tmp_path):
    for split, count in COUNTS.items():
        for stem in stems(split, count):
            put(broken / split / "coords" / f"{stem}.npy", np.arange(39).reshape(3, 13) + np.zeros((3, 1, 1), int))
    with pytest.raises(FetchError, match="coords/train_000.npy: layout course knows no vocabulary of 'coords'") as caught:
        take(broken, tmp_path, "layout=course")
    assert caught.value.hint == "say vocab.coords=N, or leave it out: modalities=[...] names what to take"
    report = take(broken, tmp_path, "layout=course", "vocab.coords=8192")
    assert read_spec(report.dataset.spec_path("coords")).shape == (3, 13)
    assert_ids(report.dataset, "val", "coords", {s: [list(range(39))] * 3 for s in stems("val", 2)})


@pytest.mark.parametrize(
    "option, said",
    [
        ("vocab.rbg=5", "vocab names 'rbg', which .* does not have"),
        ("shape.caption_=[1]", "shape names 'caption_'"),
        ("modalities=[rgb,sound]", "modalities names 'sound'"),
        ("rename.tok_rbg@16=rgb", "rename names 'tok_rbg@16'"),
    ],
)
def test_options_that_name_nothing_are_errors(small, tmp_path, option, said):
    with pytest.raises(FetchError, match=said):
        take(small, tmp_path, "layout=course", option)


@pytest.mark.parametrize(
    "option", ["vocab.rgb=0", "shape.rgb=[0,4]", "shape.rgb=[16]", "rename.tok_rgb@16=../rgb", "layout=cours", "rows=some"]
)
def test_options_that_cannot_be(small, tmp_path, option):
    with pytest.raises(ConfigError):
        take(small, tmp_path, option, *([] if "layout" in option else ["layout=course"]))


def test_a_shape_that_is_not_that_of_the_files(small, tmp_path):
    with pytest.raises(AlignmentError, match="train_000.npy holds 16 ids, not 4x5"):
        take(small, tmp_path, "layout=course", "shape.rgb=[4,5]")


def test_the_first_few_are_a_fair_sample(tmp_path):
    """Stems often begin with their class or origin: the order of a data set is a fixed shuffle."""
    folder = write_course(tmp_path / "in", counts={"train": 40}, k=1)
    keys = Split(take(folder, tmp_path, "layout=course", "limit=10").dataset.raw("train")).keys
    assert len(keys) == 10 and keys != sorted(keys) and not set(keys) <= set(stems("train", 12))


def test_odd_names_become_keys(tmp_path):
    for split, names in {"train": ["a b", "x.5s", "-0SdAVK79lg_000030"], "val": ["c"]}.items():
        for name in names:
            put(tmp_path / "in" / split / "tok_rgb@16" / f"{name}.npy", np.zeros((1, 16), int))
    report = take(tmp_path / "in", tmp_path, "layout=course")
    assert sorted(Split(report.dataset.raw("train")).keys) == ["-0SdAVK79lg_000030", "a_b", "x_5s"]
    assert {k: v["stem"] for k, v in labels(report.dataset, "train").items()}["x_5s"] == "x.5s"
    put(tmp_path / "in" / "train" / "tok_rgb@16" / "a_b.npy", np.zeros((1, 16), int))
    with pytest.raises(AlignmentError, match="would both have the key 'a_b'"):
        take(tmp_path / "in", tmp_path / "b", "layout=course")


# -- alignment --------------------------------------------------------------------------------------------------------


def test_no_sample_is_in_two_splits(broken, tmp_path):
    for name in ("tok_rgb@16/train_002.npy", "tok_depth@16/train_002.npy", "scene_desc/train_002.json"):
        shutil.copy(broken / "train" / name, broken / "val" / name)
    with pytest.raises(AlignmentError, match="'train_002' is in two splits: train/tok_rgb@16/train_002 and val/") as caught:
        take(broken, tmp_path, "layout=course")
    assert "keys=split-stem" in caught.value.hint
    report = take(broken, tmp_path, "layout=course", "keys=split-stem")
    assert "val-train_002" in Split(report.dataset.raw("val")).keys


def test_folders_agree_with_splits_json(broken, tmp_path):
    put_text(broken / "splits.json", json.dumps({"train": stems("train", 6), "val": ["val_000", "train_006"]}))
    with pytest.raises(AlignmentError, match="'train_006' is in train, .*splits.json says val"):
        take(broken, tmp_path, "layout=course")
    put_text(broken / "splits.json", json.dumps({"splits": {"train": ["a"], "test": ["b", "a"]}}))
    with pytest.raises(FetchError, match="splits.json has 'a' in train and in test"):
        take(broken, tmp_path, "layout=course")
    put_text(broken / "splits.json", "[1")
    with pytest.raises(FetchError, match="splits.json is no list of splits"):
        take(broken, tmp_path, "layout=course")


def remove(name):
    return lambda folder: (folder / name).unlink()


def remove_folder(name):
    return lambda folder: shutil.rmtree(folder / name)


def second_val(folder):
    (folder / "eval").mkdir()


def dead_link(folder):
    (folder / "train" / "tok_rgb@16" / "train_004.npy").unlink()
    os.symlink("nowhere.npy", folder / "train" / "tok_rgb@16" / "train_004.npy")


def stray_tar(folder):
    write_tar(folder / "val" / "tok_rgb@16" / "old.tar", [("x.npy", b"")])


def mixed(folder):
    put_text(folder / "val" / "scene_desc" / "val_000.txt", "twice")


@pytest.mark.parametrize(
    "damage, error, said",
    [
        (remove("val/tok_depth@16/val_001.npy"), AlignmentError, "val/.*/val_001.json has no partner in tok_depth@16"),
        (remove("train/scene_desc/train_003.json"), AlignmentError, "train/.*/train_003.npy has no partner in scene_desc"),
        (remove_folder("test/tok_depth@16"), AlignmentError, "test_000.json has no partner in tok_depth@16 .and 2 more"),
        (second_val, FetchError, "would both be the val split"),
        (dead_link, FetchError, "train_004.npy is a link to nothing"),
        (mixed, FetchError, "'val_000' stands twice"),
        (stray_tar, FetchError, "tok_rgb@16 holds old.tar and .*val_000.npy"),
    ],
)
def test_folders_that_do_not_fit_each_other(broken, tmp_path, damage, error, said):
    damage(broken)
    with pytest.raises(error, match=said):
        take(broken, tmp_path, "layout=course")
    assert not (tmp_path / "data").exists(), "nothing is written before the folders are compared"


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FetchError, match="no folder"):
        take(tmp_path / "nowhere", tmp_path)
    (tmp_path / "train" / "tok_rgb@256").mkdir(parents=True)
    with pytest.raises(FetchError, match="holds no folder of ids"):
        take(tmp_path, tmp_path)
    with pytest.raises(FetchError, match="has no folder train, val or test; it has tok_rgb@256") as caught:
        take(tmp_path / "train", tmp_path)
    assert caught.value.hint == "give the folder that holds them"


# -- damaged files ----------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def rows(k=3, slots=16, dtype=np.int64, **ids):
    array = np.zeros((k, slots), dtype)
    for place, value in ids.items():
        array.reshape(-1)[int(place[2:])] = value
    return npy_bytes(array)


@pytest.mark.parametrize(
    "data, error, said",
    [
        (rows(slots=15), AlignmentError, "train_004.npy is 3x15, 16 ids .4x4. expected"),
        (rows(k=2), AlignmentError, "train_004.npy has 2 rows, other files have 3"),
        (npy_bytes(np.zeros(16, int)), AlignmentError, "train_004.npy has 1 rows, other files have 3"),
        (npy_bytes(np.zeros((3, 2, 8), int)), AlignmentError, "train_004.npy is 3x2x8, 16 ids"),
        (rows(dtype=np.float32), TokenError, "train_004.npy holds float32, not integers"),
        (rows(dtype=bool), TokenError, "train_004.npy holds bool, not integers"),
        (rows(id7=-1), TokenError, "train_004.npy: id -1 is negative"),
        (npy_bytes(np.full((3, 16), 40000, np.uint16).astype(np.int16)), TokenError, "id -25536 is negative"),
        (rows(id40=64000), TokenError, "train_004.npy: id 64000 of 'rgb' is outside its vocabulary of 64000"),
        (rows(dtype=np.uint64, id0=2**63 + 5), TokenError, f"id {2**63 + 5} of 'rgb' is outside"),
        (rows()[:-1], DataError, "train_004.npy is cut or damaged: 383 bytes after its head, 384 expected"),
        (rows() + b"x", DataError, "train_004.npy is cut or damaged: 385 bytes"),
        (rows()[:30], DataError, "train_004.npy is no npy file, or its head is damaged"),
        (b"", DataError, "train_004.npy is no npy file"),
        (b"PK\x03\x04 an archive", DataError, "train_004.npy is no npy file"),
        (rows().replace(b"(3, 16)", b"(3,-16)"), DataError, "train_004.npy"),
        (rows().replace(b"(3, 16)", b"(9**9)"), DataError, "train_004.npy"),
        (npy_bytes(np.zeros((3, 0), int)), DataError, "train_004.npy holds no ids"),
    ],
)
def test_a_damaged_array_is_named(broken, tmp_path, data, error, said):
    (broken / "train" / "tok_rgb@16" / "train_004.npy").write_bytes(data)
    with pytest.raises(error, match=said) as caught:
        take(broken, tmp_path, "layout=course")
    assert isinstance(caught.value, Nano4MError) and caught.value.hint or "holds no ids" in said
    assert Workspace(tmp_path).dataset().tokenised() == [], "nothing half-made is taken for tokens"


def test_the_first_array_is_checked_as_all_are(broken, tmp_path):
    path = broken / "train" / "tok_rgb@16" / "train_000.npy"
    path.write_bytes(rows(slots=15))
    with pytest.raises(AlignmentError, match="train_000.npy holds 15 ids, the name tok_rgb@16 promises 16") as caught:
        take(broken, tmp_path, "layout=course")
    assert caught.value.hint == "say shape.rgb=[H,W] if that is right"
    path.write_bytes(rows(k=2))
    with pytest.raises(AlignmentError, match="train_000.npy has 2 rows, .*tok_depth@16/train_000.npy has 3"):
        take(broken, tmp_path, "layout=course")


def test_arrays_of_any_order_are_read_as_numbers(broken, tmp_path):
    """Byte order and Fortran order are how a file is written, not what it says."""
    wanted = np.arange(48).reshape(3, 16)
    path = broken / "train" / "tok_rgb@16"
    (path / "train_001.npy").write_bytes(npy_bytes(np.asfortranarray(wanted)))
    (path / "train_002.npy").write_bytes(npy_bytes(wanted.astype(">i4")))
    report = take(broken, tmp_path, "layout=course")
    got = source_rows(broken, "train", "tok_rgb@16", 7)
    assert got["train_001"] == got["train_002"] == wanted.tolist()
    assert_ids(report.dataset, "train", "rgb", got)


def test_nothing_is_unpickled(broken, tmp_path):
    mark = tmp_path / "mark"
    path = broken / "train" / "tok_rgb@16" / "train_004.npy"
    np.save(path, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="train_004.npy holds Python objects .a pickle., which are never read"):
        take(broken, tmp_path, "layout=course")
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(DataError, match="train_004.npy is no npy file"):
        take(broken, tmp_path, "layout=course")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data, said",
    [
        (b'["a", "b"]', "val_001.json has 2 captions, its ids have 3 rows"),
        (b"[]", "val_001.json is an empty list"),
        (b'["a", "b", 3]', "val_001.json is no caption: 3 is not text"),
        (b'{"words": "a"}', "val_001.json is no caption: 'caption'"),
        (b'["a", "b"', "val_001.json is no caption"),
        (b'"\\ud800"', "val_001.json is not UTF-8"),
        ("caf\xe9".encode("latin1"), "val_001.json is not UTF-8"),
        (b"[" * 100_000, "val_001.json is no caption"),
    ],
)
def test_a_damaged_caption_is_named(broken, tmp_path, data, said):
    (broken / "val" / "scene_desc" / "val_001.json").write_bytes(data)
    with pytest.raises(DataError, match=said):
        take(broken, tmp_path, "layout=course")


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


def without_end(path):
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512))


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return lambda path: write_tar(path, [(info, b"")])


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut, "shard-00001.tar is cut short or damaged"),
        (without_end, "shard-00001.tar is cut short or damaged"),
        (lambda path: path.write_bytes(b""), "shard-00001.tar is cut short or damaged"),
        (lambda path: path.write_bytes(b"no tar at all" * 100), "shard-00001.tar is cut short or damaged"),
        (member("../../train_004.npy"), "shard-00001.tar: member '../../train_004.npy' points out of the archive"),
        (member("/etc/train_004.npy"), "shard-00001.tar: member '/etc/train_004.npy' points out of the archive"),
        (member("train_004.npy", tarfile.SYMTYPE, "/etc/passwd"), "shard-00001.tar: member 'train_004.npy' is not a plain file"),
        (lambda path: shutil.copy(path.with_name("shard-00000.tar"), path), "'train_000' stands twice in .*shard-00000.tar"),
    ],
)
def test_a_damaged_tar_is_named(tmp_path, damage, said):
    write_4m(tmp_path / "in")
    damage(tmp_path / "in" / "tok_depth@224" / "shard-00001.tar")
    with pytest.raises(Nano4MError, match=said):
        take(tmp_path / "in", tmp_path)


def test_crops_that_do_not_fit(tmp_path):
    write_4m(tmp_path / "in", count=2)
    path = tmp_path / "in" / "crop_settings" / "shard-00000.tar"
    write_tar(path, [(f"{s}.npy", npy_bytes(np.zeros((3, 5)))) for s in stems("train", 2)])
    with pytest.raises(AlignmentError, match=r"crop_settings/shard-00000.tar, 'train_00..npy' is \(3, 5\), \(2, 5\) finite"):
        take(tmp_path / "in", tmp_path)


# -- again ------------------------------------------------------------------------------------------------------------


def everything(dataset):
    return {str(p.relative_to(dataset.path)): p.read_bytes() for p in sorted(dataset.path.rglob("*")) if p.is_file()}


def stamps(dataset):
    return {p: p.stat().st_mtime_ns for p in dataset.path.rglob("shard-*")}


def test_fetching_again_keeps_everything_and_makes_what_is_half_made(small, tmp_path):
    options = ["layout=course", "shard_size=3"]
    report = take(small, tmp_path, *options)
    dataset = report.dataset
    before, when = everything(dataset), stamps(dataset)
    again = take(small, tmp_path, *options)
    assert (again.made, again.kept) == (0, 12) and everything(dataset) == before and stamps(dataset) == when
    one = shard_name(1)
    for damage in (
        lambda: (dataset.tokens("rgb", "train") / one).unlink(),
        lambda: (dataset.raw("train") / one).unlink(),
        lambda: index_path(dataset.tokens("depth", "train") / one).unlink(),
        lambda: (dataset.tokens("depth", "train") / one).write_bytes(b"\0" * 700),
        lambda: write_shard(dataset.tokens("rgb", "train") / one, iter([("x", {"rgb.npy": b""})] * 1)),
    ):
        damage()
        again = take(small, tmp_path, *options)
        assert (again.made, again.kept) == (3, 9) and everything(dataset) == before
    untouched = [p for p in when if p.parts[-2:] != ("train", p.name) or one[:12] not in p.name]
    assert untouched and all(stamps(dataset)[p] == when[p] for p in untouched)


def test_an_end_in_the_middle_leaves_nothing_that_is_taken_for_tokens(small, broken, tmp_path):
    options = ["layout=course", "shard_size=2"]
    whole = take(small, tmp_path / "b", *options).dataset
    path = broken / "train" / "tok_depth@16" / f"{Split(whole.raw('train')).keys[-1]}.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-30])
    with pytest.raises(DataError, match=f"{path.name} is cut or damaged"):
        take(broken, tmp_path, *options)
    dataset = Workspace(tmp_path).dataset()
    assert dataset.tokenised() == [] and len(list(dataset.tokens("rgb", "train").glob("*.tar"))) == 3, "some shards are there"
    path.write_bytes(good)
    mended = take(broken, tmp_path, *options)
    assert mended.kept == 6 and everything(dataset) == everything(whole), "as if it had not ended"
    (dataset.tokens("depth", "train") / shard_name(3)).unlink()
    path.write_bytes(good[:-30])
    with pytest.raises(DataError):
        take(broken, tmp_path, *options)
    assert dataset.tokenised() == [], "what was whole before is not taken for whole now"


def test_other_files_or_options_make_another_data_set(broken, tmp_path):
    take(broken, tmp_path, "layout=course")
    with pytest.raises(FetchError, match="made with other options .folders differ"):
        take(broken, tmp_path, "layout=course", "vocab.rgb=65000")
    with pytest.raises(FetchError, match="made with other options .folders differ"):
        take(broken, tmp_path, "layout=course", "modalities=[rgb,depth]")
    moved = broken.rename(tmp_path / "moved")
    assert take(moved, tmp_path, "layout=course").made == 0, "a folder may move"
    for name in ("tok_rgb@16/val_001.npy", "tok_depth@16/val_001.npy", "scene_desc/val_001.json"):
        (moved / "val" / name).rename(moved / "val" / name.replace("val_001", "val_009"))
    with pytest.raises(FetchError, match="made with other options .files differ"):
        take(moved, tmp_path, "layout=course")


def test_bytes_do_not_depend_on_workers(small, tmp_path):
    one = take(small, tmp_path / "one", "layout=course", "shard_size=4")
    two = take(small, tmp_path / "two", "layout=course", "shard_size=4", workers=2)
    assert everything(one.dataset) == everything(two.dataset)


def test_source_and_plan_cross_processes_without_the_listing(small, tmp_path):
    source = open_source("tokens", [f"path={small}", "layout=course"], Workspace(tmp_path))
    source.prepare(lambda what, done, total: None)
    plan = source.plan()[0]
    assert source.info().name == "toks"
    again, plan_again = pickle.loads(pickle.dumps((source, plan)))
    assert list(again.__dict__) == ["options", "cache"] and plan_again == plan
    assert list(again.samples(plan_again)) == list(source.samples(plan))
    assert "_found" not in again.__dict__ and plan.count == 7


# -- what follows -----------------------------------------------------------------------------------------------------


def test_tokenize_makes_what_is_raw_and_leaves_the_rest(small, tmp_path):
    dataset = take(small, tmp_path, "layout=course").dataset
    before = everything(dataset)
    assert choose_modalities(dataset, []) == ["caption"]
    for name in ("rgb", "depth"):
        with pytest.raises(DataError, match=f"the {name} tokens of 'toks' came with 'nano4m fetch tokens'"):
            choose_modalities(dataset, [name])
        with pytest.raises(DataError, match=f"there is no raw {name} to tokenize again"):
            make_tokenizer(dataset, name, None, {})
    tokenize(dataset, "caption", ["vocab=300"], workers=1)
    assert before.items() <= everything(dataset).items()
    result = cli("tokenize", "--check", "--json", "--root", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"]["train"] == {"rgb": 7, "depth": 7, "caption": 7}
    result = cli("tokenize", "--modality", "rgb", "--root", tmp_path)
    assert result.exit_code == 1 and "there is no raw rgb to tokenize again" in result.stderr


def test_check_reads_every_variant(small, tmp_path):
    dataset = take(small, tmp_path, "layout=course").dataset
    path = dataset.tokens("rgb", "val") / shard_name(0)
    shard = Shard(path)
    last = int(shard.index.offset["rgb.npy"][1] + shard.index.size["rgb.npy"][1])
    data = bytearray(path.read_bytes())
    data[last - 2 : last] = b"\xff\xff"  # the last id of the last variant
    path.write_bytes(data)
    (wrong,) = examine(dataset, ["rgb", "depth"]).errors
    assert (wrong.check, wrong.modality, wrong.split, wrong.keys) == ("range", "rgb", "val", [shard.keys[1]])
    assert "up to 65535" in wrong.what


def test_a_data_set_of_nothing_but_tokens(tmp_path):
    folder = write_course(tmp_path / "in", counts={"train": 4, "val": 2})
    dataset = take(folder, tmp_path, "layout=course", "modalities=[rgb,depth]").dataset
    result = cli("tokenize", "--root", tmp_path)
    assert result.exit_code == 0 and "left as they are: rgb, depth (their tokens came with fetch)" in result.stderr
    result = cli("tokenize", "caption.vocab=300", "--root", tmp_path)
    assert result.exit_code == 2 and "nothing is to be tokenized here" in result.stderr
    assert choose_modalities(dataset, [], brought=True) == ["rgb", "depth"]
    assert examine(dataset, ["rgb", "depth"]).samples == {"train": {"rgb": 4, "depth": 4}, "val": {"rgb": 2, "depth": 2}}


def test_training_and_evaluation(tmp_path, one_thread):  # noqa: F811 - a fixture
    """Two steps on what came in, and the probes that need no pictures."""
    from nano4m_cli.probes._evaluate import evaluate
    from nano4m_cli.train.run import prepare, start

    folder = tmp_path / "in"
    write_nano4m_audio(folder, counts={"train": 12, "val": 3, "test": 3}, slots=16, frames=8)
    dataset = take(folder, tmp_path, "modalities=[depth,audio,caption]").dataset
    tokenize(dataset, "caption", ["vocab=300"], workers=1)
    made = prepare(config(tmp_path, name="t", model__size="d1-1w32", train__steps=2, train__batch=4), Workspace(tmp_path))
    assert made.task.layout.names == ["depth", "audio", "caption"]
    figures = start(made, False, "cpu", lambda record: None)
    assert all(np.isfinite(v) for v in figures.values())
    report = evaluate(Workspace(tmp_path), "t", limit=3)
    assert {r.probe for r in report.results} >= {"loss", "retrieval", "tokenizer"} and report.report.is_file()
    (results := report.report.parent.parent / "eval" / "retrieval.json").unlink()  # as if that job had not run
    report.report.unlink()
    shown = evaluate(Workspace(tmp_path), "t", limit=3, only_report=True)
    assert not shown.results and not results.exists() and "audio/ce" in shown.report.read_text()
    result = cli("generate", "--from", "caption=a cat", "--to", "depth", "--root", tmp_path)
    assert result.exit_code == 1 and "the depth tokens of 'toks' came without their tokenizer" in result.stderr


def test_the_command(small, tmp_path):
    result = cli("fetch", "tokens", f"path={small}", "layout=course", "--root", tmp_path, "--json", "--workers", 1)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["dataset"] == "toks" and said["made"] == 12 and said["modalities"] == ["rgb", "depth", "caption"]
    assert "Tokens of layout course (as said)." in result.stderr
    assert "path" in SOURCES.get("tokens").Options.model_fields
