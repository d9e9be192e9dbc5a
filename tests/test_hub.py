"""Source `hub` on a hub of our own and on archives: media, WebDataset shards, parquet, texts; hostile and broken ones."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hub_server import Hub, use
from PIL import Image
from test_folder import everything

from nano4m_cli.data.download import download
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources._documents import _pieces, deal
from nano4m_cli.data.sources.hub import split_in
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import FetchError, Nano4MError
from nano4m_cli.registry import MODALITIES


def png(value: int, side: int = 32) -> bytes:
    image = np.random.default_rng(value).integers(0, 255, (side, side, 3), dtype=np.uint8)
    image[:] = image // 8 + value
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def wav(hertz: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, 0.2 * np.sin(2 * np.pi * hertz * np.arange(24_000) / 24_000), 24_000, format="WAV")
    return out.getvalue()


def tar(members: dict[str, bytes], mode: str = "w", links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as box:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            box.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            box.addfile(info)
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box:
        for name, data in members.items():
            box.writestr(name, data)
    return out.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Here:
        """One process is enough: spawning many is tested with `folder`."""

        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def map(self, function, *columns, chunksize):
            return map(function, *columns)

        def shutdown(self, **options):
            pass

    served = Hub({})
    monkeypatch.setattr("nano4m_cli.data.sources.folder.ProcessPoolExecutor", Here)
    use(served, monkeypatch, tmp_path / "hf")
    yield served
    served.close()


def run(space: Path, *options: str):
    """Fetch; return (info, failures by file, samples by split: {key: (labels, raw)})."""
    workspace = Workspace(space)
    source = open_source("hub", list(options), workspace)
    report = fetch(source, workspace, 1)
    again = pickle.loads(pickle.dumps(source))  # as workers get it
    plan = source.plan()[0]
    assert [s.key for s in again.samples(pickle.loads(pickle.dumps(plan)))] == [s.key for s in source.samples(plan)]
    out = {}
    for split, count in report.info.splits.items():
        shards = Split(report.dataset.raw(split)) if count else ()
        out[split] = {}
        for i in range(len(shards)):
            shard, j = shards.locate(i)
            raw = {m: MODALITIES.get(m).from_bytes(shard.read(j, MODALITIES.get(m).ext), "x") for m in report.info.modalities}
            out[split][shard.keys[j]] = (json.loads(shard.read(j, "labels.json")), raw)
    return report.info, {f.file: f.reason for f in report.failures}, out


def items(samples: dict) -> dict[str, set[str]]:
    return {split: {labels["item"] for labels, _ in found.values()} for split, found in samples.items()}


def texts(samples: dict) -> dict[str, list[str]]:
    return {split: [raw["text"] for _, (_, raw) in sorted(found.items())] for split, found in samples.items()}


# -- repositories of media --------------------------------------------------------------------------------------------


def pictures(n: int, folder: str, start: int) -> dict[str, bytes]:
    """An image folder as `datasets` reads it: pictures, and metadata.jsonl beside them."""
    some = range(start, start + n)
    lines = [{"file_name": f"{i}.png", "text": f"picture {i} of k{i % 2}", "kind": f"k{i % 2}", "box": [1, 2]} for i in some]
    files = {f"{folder}/{i}.png": png(i) for i in some}
    return files | {f"{folder}/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode()}


def test_an_image_folder_keeps_its_splits_and_captions_at_one_commit(hub, tmp_path):
    hub.repos["me/pics"] = {
        **pictures(6, "data/train", 0), **pictures(2, "data/test", 20), "README.md": b"# pics", "load.py": b"raise SystemExit",
        "weights.pkl": b"cos\nsystem\n", ".gitattributes": b"*.png filter=lfs", "data/test/extra.png": png(3),  # as in train
    }  # fmt: skip
    info, failures, samples = run(tmp_path, "id=me/pics", "size=16", "val=0.3", "label=kind")
    assert (info.name, info.source, info.modalities) == ("pics", "hub", ["rgb", "caption"])
    assert info.splits == {"train": 4, "val": 2, "test": 2}, "test as published, val from train"
    assert items(samples)["test"] == {"data/test/20", "data/test/21"}
    assert {raw["caption"] for _, raw in samples["test"].values()} == {"picture 20 of k0", "picture 21 of k1"}
    assert info.attributes["kind"].values == ["k0", "k1"]
    assert info.options["commit"] == hub.commit and f"me/pics at commit {hub.commit}" in info.notes
    assert "licence: mit" in info.notes and "not read: .pkl, .py" in info.notes
    assert all(n.endswith((".png", ".jsonl")) for n, _ in hub.downloads()), "scripts and pickles are not even fetched"
    assert list(failures.values()) == ["has no caption, which other items have"]
    hub.commit, before = "f" * 40, len(hub.asked)
    assert run(tmp_path, "id=me/pics", "size=16", "val=0.3", "label=kind")[0] == info and len(hub.asked) == before, "pinned"


def test_the_same_picture_is_in_one_split_only(hub, tmp_path):
    made = {"train": (1, 2, 3), "validation": (4, 2), "test": (5, 3)}
    hub.repos["me/twice"] = {f"{s}/{i}.png": png(v) for s, some in made.items() for i, v in enumerate(some)}
    info, failures, samples = run(tmp_path, "id=me/twice", "size=16")
    assert info.splits == {"train": 1, "val": 2, "test": 2} and len(failures) == 2
    assert all("has the same content as" in reason for reason in failures.values())
    hashes = [labels["sha256"] for labels, _ in everything(samples)]
    assert len(set(hashes)) == len(hashes)


def test_webdataset_shards_and_zips_are_unpacked(hub, tmp_path):
    shard = lambda a, b: tar({k: v for i in range(a, b) for k, v in {  # noqa: E731
        f"{i:04d}.png": png(i), f"{i:04d}.wav": wav(200 + 20 * i), f"{i:04d}.cls": str(i % 2).encode(),
        f"{i:04d}.json": json.dumps({"prompt": f"thing {i}"}).encode(), f"{i:04d}.pyd": b"\x80\x04."}.items()})
    more = {"30.png": png(30), "31.png": png(31), "__MACOSX/._30.png": b"", "30.txt": b"zip", "30.wav": wav(900)}
    hub.repos["me/wds"] = {"set-train-0000.tar": shard(0, 3), "set-train-0001.tar": shard(3, 6),
                           "set-test-0000.tar": shard(6, 7), "more/x.zip": zipped(more), "more/x.json": b"{}"}
    info, failures, samples = run(tmp_path, "id=me/wds", "size=16", "seconds=1", "text=prompt", "val=0",
                                  "modalities=[rgb,audio,caption]")
    assert info.splits == {"train": 7, "val": 0, "test": 1}
    assert items(samples)["test"] == {"set-test-0000/0006"}
    assert {raw["caption"] for _, raw in everything(samples)} == {"zip", *(f"thing {i}" for i in range(7))}
    assert [Path(f).name for f in failures] == ["31.png"] and "more/x/30" in items(samples)["train"]
    told = {labels["item"][-4:]: labels["labels"].get("cls") for labels, _ in everything(samples)}
    assert {k: v for k, v in told.items() if v} == {f"{i:04d}": str(i % 2) for i in range(7)}


@pytest.mark.parametrize("name, data, reason", [
    ("up.tar", tar({"../../evil.png": png(1)}), r"'../../evil.png', a name that leads out"),
    ("root.tar", tar({"/tmp/evil.png": png(1)}), r"'/tmp/evil.png', a name that leads out"),
    ("up.zip", zipped({"a/../../evil.png": png(1)}), "a name that leads out"),
    ("link.tar.gz", tar({"ok.png": png(1)}, "w:gz", {"evil.png": "/etc/passwd"}), r"'evil.png', a link or device"),
    ("bomb.zip", zipped({"bomb.wav": bytes(3_000_000)}), r"unpacks to more than .* \(at 'bomb.wav'\)"),
    ("cut.tar.gz", tar({"a.png": png(1)}, "w:gz")[:1000], "is damaged"),
    ("text.zip", b"no archive at all", "is damaged or no archive"),
    ("empty.tar", tar({"run.py": b"raise SystemExit"}), "holds nothing that is read here"),
])  # fmt: skip
def test_a_hostile_archive_is_refused_and_the_rest_goes_on(hub, tmp_path, name, data, reason):
    hub.repos["me/bad"] = {name: data} | {f"good/{i}.png": png(i) for i in range(4)}
    info, failures, samples = run(tmp_path / "space", "id=me/bad", "size=16", "max_gb=0.001")
    assert list(failures) == [name] and re.search(reason, failures[name]), failures
    assert sum(info.splits.values()) == 4
    assert not [p for p in tmp_path.rglob("*evil*")] and not Path("/tmp/evil.png").exists()
    outside = [p for p in tmp_path.iterdir() if p.name not in ("space", "hf")]
    assert not outside and not [p for p in (tmp_path / "space/data/.cache/hub").rglob("*.part")]


def test_a_table_may_not_name_files_of_this_machine(hub, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    hub.repos["me/spy"] = {f"{i}.png": png(i) for i in range(3)} | {
        "metadata.csv": "\n".join(("file_name,text", "0.png,zero", "1.png,one", "2.png,two", f"{secret},mine",
                                   "../../../../../../secret.png,too")).encode()}
    info, failures, samples = run(tmp_path / "space", "id=me/spy", "size=16")
    assert sum(info.splits.values()) == 3 and {raw["caption"] for _, raw in everything(samples)} == {"zero", "one", "two"}
    assert "lies outside of the data set" in failures.values() and len(failures) == 2


def test_names_that_lead_out_of_the_repository_are_refused(hub, tmp_path):
    hub.repos["me/names"] = {"../../evil.png": png(1)}
    with pytest.raises(FetchError, match="'../../evil.png', a name that leads out"):
        run(tmp_path, "id=me/names")


# -- downloads --------------------------------------------------------------------------------------------------------


def test_an_interrupted_download_is_resumed_and_checked(hub, tmp_path):
    body = tar({f"{i}.wav": wav(200 + 30 * i) for i in range(5)})
    hub.repos["me/big"] = {"sounds.tar": body, "a.txt": b"x"}
    hub.breaks["sounds.tar"] = 100_000
    info, failures, _ = run(tmp_path, "id=me/big", "seconds=1")
    assert not failures and sum(info.splits.values()) == 5
    assert [r for n, r in hub.downloads() if n == "sounds.tar"] == [None, "bytes=100000-"]


def test_a_process_that_was_killed_goes_on_from_its_part(hub, tmp_path, monkeypatch):
    hub.repos["me/big"] = {"sounds.tar": tar({f"{i}.wav": wav(200 + 30 * i) for i in range(5)})}
    hub.breaks["sounds.tar"] = 70_000
    with monkeypatch.context() as once:
        once.setattr("nano4m_cli.data.sources._hub_snapshot.download", functools.partial(download, retries=0))
        with pytest.raises(FetchError, match="cannot download .*sounds.tar"):
            run(tmp_path, "id=me/big", "seconds=1")
    assert sum(run(tmp_path, "id=me/big", "seconds=1")[0].splits.values()) == 5
    assert hub.downloads()[-1] == ("sounds.tar", "bytes=70000-")


def test_files_that_are_refused_or_other_than_listed_are_told_and_tried_again(hub, tmp_path):
    hub.repos["me/some"] = {f"{i}.png": png(i) for i in range(5)} | {"big.png": png(7, 64), "1.png": png(1, 8)}
    hub.refused["0.png"], hub.changed["1.png"] = 404, b"x" * len(png(1, 8))
    hub.changed["big.png"] = bytes(len(hub.repos["me/some"]["big.png"]))
    info, failures, _ = run(tmp_path, "id=me/some", "size=16")
    assert set(failures) == {"0.png", "1.png", "big.png"} and "HTTP 404" in failures["0.png"]
    assert "is not the file that the hub lists" in failures["1.png"] and "sha256" in failures["big.png"]
    assert sum(info.splits.values()) == 3
    hub.refused.clear()
    hub.changed.clear()
    info, failures, _ = run(tmp_path, "id=me/some", "size=16", "name=mended")
    assert not failures and sum(info.splits.values()) == 6


def test_what_cannot_be_had_is_said(hub, tmp_path):
    hub.repos["me/gated"] = {"0.png": png(0)}
    hub.gated.add("me/gated")
    hub.repos["me/odd"] = {"a.bin": b"x", "b.safetensors": b"x", "c.png": png(1)}
    cases = {
        ("id=me/none",): "no data set repository 'me/none' .* or it is private",
        ("id=me/gated",): "its files are refused.*HTTP 403",
        ("id=me/odd", "revision=v9"): "has no revision 'v9'",
        ("id=me/odd", "files='*.jpg'"): "has no file '[*].jpg'",
        ("id=me/odd", "files=x/*.jpg"): "'me/odd' has no file 'x/[*].jpg'",
        ("id=me/odd", "files=b.safetensors"): "holds no file that is read here among those chosen",
        ("id=me/odd", "max_gb=0.000000001"): "more than max_gb",
        ("id=../../etc",): "is no id of a data set repository",
        (): "a source is needed, and one only",
        ("id=me/odd", "path=x.zip"): "a source is needed, and one only",
        ("path=no.zip",): "no file 'no.zip'",
        (f"path={tmp_path}",): "is a folder",
        ("id=me/odd", "chars=5"): "holds media, for which chars means nothing",
    }
    for options, message in cases.items():
        with pytest.raises(Nano4MError, match=f"(?s){message}"):
            run(tmp_path / "space", *options)


def test_without_a_network_it_fails_at_once_or_takes_what_the_hubs_cache_holds(hub, tmp_path, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        use(f"http://127.0.0.1:{nobody.getsockname()[1]}", monkeypatch, tmp_path / "hf")
        start = time.monotonic()
        with pytest.raises(FetchError, match="cannot be reached") as caught:
            run(tmp_path, "id=me/pics", "size=16")
        assert time.monotonic() - start < 20 and "hf download --repo-type dataset me/pics" in caught.value.hint
        home = tmp_path / "hf" / "datasets--me--pics"
        snapshot = home / "snapshots" / hub.commit
        (snapshot / "train").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs/main").write_text(hub.commit)
        for i in range(4):
            (snapshot / f"train/{i}.png").write_bytes(png(i))
        info, failures, _ = run(tmp_path, "id=me/pics", "size=16")
        assert not failures and sum(info.splits.values()) == 4 and info.options["commit"] == hub.commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE forbids to ask"):
        run(tmp_path, "id=me/other")


def test_the_command_reads_the_environment(hub, tmp_path):
    hub.repos["me/play"] = {"input.txt": b"To be, or not to be. " * 200}
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    call = [sys.executable, "-m", "nano4m_cli", "fetch", "hub", "id=me/play", "--json", "--workers", "1",
            "--root", str(tmp_path / "space")]
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    assert doc["dataset"] == "play" and doc["made"] == 17 and hub.token == "Bearer hf_secret"
    assert "hf_secret" not in done.stdout + done.stderr
    assert not [p for p in (tmp_path / "space").rglob("*.json") if "hf_secret" in p.read_text()]


# -- archives by address and path -------------------------------------------------------------------------------------


def test_an_archive_by_path_or_address(hub, tmp_path):
    data = zipped({f"set/{i}.png": png(i) for i in range(4)} | {"set/list.csv": "".join(
        ["file,kind\n", *(f"{i}.png,k{i % 2}\n" for i in range(4))]).encode()})
    (tmp_path / "my set.zip").write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    options = ["size=16", "csv=set/list.csv", "caption=a {kind}", f"sha256={sha}"]
    info, failures, samples = run(tmp_path, f"path={tmp_path / 'my set.zip'}", *options)
    assert (info.name, sum(info.splits.values()), failures) == ("my-set", 4, {}) and info.options["file_sha256"] == sha
    assert {raw["caption"] for _, raw in everything(samples)} == {"a k0", "a k1"}
    with pytest.raises(FetchError, match="is not the expected file"):
        run(tmp_path, f"path={tmp_path / 'my set.zip'}", "sha256=" + "f" * 64)
    hub.repos["me/set"] = {"pics.zip": data}
    url = f"{hub.url}/cdn/me/set/pics.zip"
    made, _, _ = run(tmp_path, f"url={url}", *options)
    assert made.name == "pics" and url in made.notes and made.options["content"] == info.options["content"]
    with pytest.raises(FetchError, match="HTTP 404|cannot download"):
        run(tmp_path, f"url={hub.url}/datasets/me/set/resolve/x/no.zip")


# -- texts ------------------------------------------------------------------------------------------------------------


def test_rows_of_texts_keep_published_splits_and_repeat_in_none(hub, tmp_path):
    jsonl = lambda rows: "\n".join(json.dumps({"story": r, "n": 1}) for r in rows).encode() + b"\n"  # noqa: E731
    train = [f"story {i} " + "word " * (i % 7) for i in range(60)]
    hub.repos["me/tales"] = {
        "data/train-00000.jsonl": jsonl(train[:40]) + b"{broken\n" + jsonl([5, "", " \n", "half \ud83d"]),
        "data/train-00001.jsonl.gz": gzip.compress(jsonl([*train[40:], "told  in\ttest"])),
        "data/test.csv": ("n,story\n" + "".join(f'{i},"held\nout {i}"\n' for i in range(5)) + "9,told in test\n").encode(),
        "LICENSE.txt": b"not a text of the set",
    }  # fmt: skip
    info, failures, samples = run(tmp_path, "id=me/tales", "text=story", "chars=20", "val=0.2", "shard_size=10")
    assert info.modalities == ["text"] and info.source == "hub" and info.tokenizers == {"text": {"max_length": 21}}
    got = texts(samples)
    assert sorted(got["test"]) == sorted([*(f"held\nout {i}" for i in range(5)), "told in test"])
    documents = {}
    for split, found in samples.items():
        for labels, raw in found.values():
            documents.setdefault((split, labels["file"], labels["document"]), []).append((labels["start"], raw["text"]))
    whole = [(key[0], "".join(t for _, t in sorted(parts))) for key, parts in documents.items()]
    assert sorted(t for s, t in whole if s != "test") == sorted(train)
    assert {s for s, _ in whole} == {"train", "val", "test"} and "1 were left out, as their words" in info.notes
    reason = failures["data/train-00000.jsonl"]
    assert reason.startswith("3 of its documents could not be read, the first: line 41 is no JSON"), failures
    assert len(failures) == 1
    again, _, _ = run(tmp_path, "id=me/tales", "text=story", "chars=20", "val=0.2", "shard_size=10")
    assert again == info
    with pytest.raises(FetchError, match="no column 'text' .there are .*story") as caught:
        run(tmp_path, "id=me/tales", "name=b")
    assert "text=COLUMN" in caught.value.hint
    with pytest.raises(FetchError, match="data/test.csv: no column 'stori'"):
        run(tmp_path, "id=me/tales", "text=stori", "name=b")
    with pytest.raises(FetchError, match="holds texts, for which seconds, size means nothing"):
        run(tmp_path, "id=me/tales", "text=story", "size=16", "seconds=1", "name=b")


def test_plain_text_is_split_by_position_and_separated_text_by_its_words(hub, tmp_path):
    play = "".join(f"ROMEO {i}: it is the east.\n" for i in range(100))
    hub.repos["me/play"] = {"input.txt": play.encode()}
    info, _, samples = run(tmp_path, "id=me/play", "chars=50")
    got = texts(samples)
    assert "".join(got["train"] + got["val"] + got["test"]) == play and info.source == "hub"
    info, _, samples = run(tmp_path, "id=me/play", "separator=.", "chars=0", "name=lines", "limit=30", "val=0.2", "test=0.2")
    got = texts(samples)
    assert len(got["train"]) == 30 and 5 < len(got["val"]) <= 30 and got["train"][0].startswith("ROMEO")
    lines = [t for some in got.values() for t in some]
    assert len(set(lines)) == len(lines) and all(f"{t}." in play for t in lines) and "tokenizers" not in info.options
    hub.repos["me/wiki"] = {f"wiki.{s}.txt": f" = {s} = \n text of {s}".encode() for s in ("train", "valid", "test")}
    _, _, samples = run(tmp_path, "id=me/wiki", "chars=8")
    assert {s: "".join(t) for s, t in texts(samples).items()} == {
        {"valid": "val"}.get(s, s): f" = {s} = \n text of {s}" for s in ("train", "valid", "test")}


def test_a_file_that_unpacks_to_more_than_allowed_is_refused(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": f"{i}" + " a" * 5000}).encode() + b"\n" for i in range(300))))
    with pytest.raises(FetchError, match="holds more than 0.001 GB"):
        run(tmp_path, f"path={path}", "max_gb=0.001")


def test_pieces_between_separators_in_blocks_of_any_size():
    class Slow(io.BytesIO):
        def __init__(self, data, step):
            super().__init__(data)
            self.step = step

        def read(self, _):
            return super().read(self.step)

    data = b"frag<|e|>one<|e|>\ntwo\n<|e|><|e|>last"
    for step in range(1, len(data) + 1):
        assert [p for p, _ in _pieces(Slow(data, step), b"<|e|>", True)] == [b"one", b"\ntwo\n", b""]
        assert [p for p, _ in _pieces(Slow(data, step), b"<|e|>", False)] == data.split(b"<|e|>")


def test_splits_by_words_and_by_names():
    digests = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(4000)]
    share = {s: sum(deal(d, 0.1, 0.2) == s for d in digests) / 4000 for s in ("train", "val", "test")}
    assert abs(share["test"] - 0.2) < 0.03 and abs(share["val"] - 0.1) < 0.03
    assert {deal(d, 0.5, 0.5) for d in digests} == {"val", "test"} and {deal(d, 0, 0) for d in digests} == {"train"}
    told = {"train/x": "train", "data/validation-00000-of-00001": "validation", "set-test-0001": "test", "train2017": "train",
            "contest/devices": None, "a/b": None, "TinyStories-valid.txt": "valid", "evaluation": "evaluation", "latest": None}
    assert {name: split_in(Path(name)) for name in told} == told


# -- parquet ----------------------------------------------------------------------------------------------------------


def test_without_pyarrow_it_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    hub.repos["me/table"] = {"train.parquet": b"PAR1"}
    with pytest.raises(FetchError, match="parquet files need pyarrow") as caught:
        run(tmp_path, "id=me/table")
    assert caught.value.hint == "pip install 'nano4m[parquet]'"


def parquet(rows: list[dict], schema=None, features: dict | None = None) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    table = pa.Table.from_pylist(rows, schema)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def test_media_in_parquet_columns(hub, tmp_path):
    def row(i: int) -> dict:
        media = {"image": (png(i), "../../x.py"), "audio": (wav(200 + 20 * i), None)}
        return {c: {"bytes": data, "path": path} for c, (data, path) in media.items()} | {
            "label": i % 2, "words": f"thing {i}", "scores": [1.0]}

    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    hub.repos["me/table"] = {"data/train-00000-of-00001.parquet": parquet([row(i) for i in range(66)], features=features),
                             "data/test-00000-of-00001.parquet": parquet([row(66), row(67)], features=features),
                             "bad.parquet": b"PAR1 no"}
    options = ["size=16", "seconds=1", "caption=a {label}", "label=label", "val=0.1"]
    info, failures, samples = run(tmp_path, "id=me/table", *options)
    assert info.splits == {"train": 59, "val": 7, "test": 2} and info.modalities == ["rgb", "audio", "caption"]
    assert info.attributes["label"].values == ["cat", "dog"] and list(failures) == ["bad.parquet"]
    assert "is damaged or no parquet file" in failures["bad.parquet"]
    for labels, raw in everything(samples):
        i = int(labels["labels"]["words"].split()[1])
        assert raw["caption"] == ("a cat" if i % 2 == 0 else "a dog")
        heard = np.argmax(np.abs(np.fft.rfft(raw["audio"])))
        assert abs(heard - (200 + 20 * i)) <= 1 and abs(float(np.median(raw["rgb"])) - i - 16) < 12


def test_texts_in_parquet(hub, tmp_path):
    hub.repos["me/words"] = {"train.parquet": parquet([{"text": f"story {i}"} for i in range(90)])}
    info, failures, samples = run(tmp_path, "id=me/words", "chars=0", "val=0.2", "test=0.2")
    assert not failures and sum(info.splits.values()) == 90 and info.modalities == ["text"]
    assert {t for some in texts(samples).values() for t in some} == {f"story {i}" for i in range(90)}
