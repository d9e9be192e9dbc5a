"""Source `manifest`: lists of videos, a server that gives some of them, and files that are there already."""

import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from test_folder import everything, number, video

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import FetchError
from nano4m_cli.registry import MODALITIES

DATA = Path(os.environ.get("NANO4M_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def run(space: Path, *options: str):
    """Fetch; return (info, failures by name, samples by split: {key: (labels, raw)})."""
    workspace = Workspace(space)
    report = fetch(open_source("manifest", [*options, "wait=0"], workspace), workspace, 1)
    out = {}
    for split, count in report.info.splits.items():
        out[split] = {}
        shards = Split(report.dataset.raw(split)) if count else None
        for i in range(count):
            shard, j = shards.locate(i)
            raw = {m: MODALITIES.get(m).from_bytes(shard.read(j, MODALITIES.get(m).ext), "x") for m in report.info.modalities}
            out[split][shard.keys[j]] = (json.loads(shard.read(j, "labels.json")), raw)
    return report.info, {Path(f.file).name: f.reason for f in report.failures}, out


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Videos a to d of four seconds, each frame telling its number, with sound."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate("abcd"):
        video(folder / f"{name}.mp4", 4.0, size=(48, 48 + 16 * i), sound=("aac", 4.0))
    return folder


@pytest.fixture
def server(clips, tmp_path, monkeypatch):
    """A server of the clips, by file name and by page; returns (address, paths asked for)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    www = tmp_path / "www"
    shutil.copytree(clips, www)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list = []

        def translate_path(self, path):
            parts = urlsplit(path)
            self.asked.append(path)
            return str(www / f"{parse_qs(parts.query)['v'][0]}.mp4") if parts.path == "/watch" else super().translate_path(path)

        def log_message(self, *args):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(www)))
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    Quiet.asked.clear()
    yield f"http://127.0.0.1:{made.server_port}", Quiet.asked
    made.shutdown()
    made.server_close()


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_what_the_server_has_arrives_and_the_rest_is_told(server, tmp_path):
    url, asked = server
    listed = write(tmp_path / "list.csv", "id,start,end,kind,split", "a,1,3,dog bark,train", "b,0,2,cat,test", "gone,0,2,cat,train",
                   "c,2,3,dog bark,val", "a b,0,1,cat,train", "d,x,1,cat,train")
    options = [f"csv={listed}", f"url={url}/{{id}}.mp4", "label=kind", "caption=a {kind}", "seconds=1", "size=16"]
    info, failures, samples = run(tmp_path, *options)
    assert info.name == "list" and info.source == "manifest" and info.modalities == ["rgb", "audio", "caption"]
    assert info.splits == {"train": 2, "val": 1, "test": 2}
    assert "404" in failures["gone"] and len(failures) == 3
    assert {v for k, v in failures.items() if k != "gone"} == {"is no id of a video", "start 'x' is no time in seconds"}
    shown = {(labels["item"], labels["start"]): number(raw["rgb"]) for labels, raw in everything(samples)}
    assert shown == {("a@1", 1.0): 15, ("a@1", 2.0): 4, ("b@0", 0.0): 5, ("b@0", 1.0): 15, ("c@2", 2.0): 4}  # 25 is 4 of 21
    assert {raw["caption"] for _, raw in everything(samples)} == {"a dog bark", "a cat"}
    place = tmp_path / "data" / ".cache" / "manifest" / "list"
    assert sorted(p.name for p in place.glob("*.mp4")) == ["a.mp4", "b.mp4", "c.mp4"]
    before = len(asked)
    again, failures, _ = run(tmp_path, *options)
    assert again == info and len(asked) == before and "404" in failures["gone"], "nothing is asked for twice"
    run(tmp_path, *options, "download=true")
    assert len(asked) == before + 1 and asked[-1] == "/gone.mp4", "unless one says so"


def test_pages_are_left_to_yt_dlp(server, tmp_path):
    pytest.importorskip("yt_dlp")
    url, asked = server
    listed = write(tmp_path / "list.csv", "id,start,end", "a,1,2", "nowhere,0,1", "b,0,1")
    info, failures, samples = run(tmp_path, f"csv={listed}", f"url={url}/watch?v={{id}}", "seconds=1", "size=16", "jobs=1")
    assert {labels["item"]: number(raw["rgb"]) for labels, raw in everything(samples)} == {"a@1": 15, "b@0": 5}
    assert set(failures) == {"nowhere"} and "404" in failures["nowhere"]
    place = tmp_path / "data" / ".cache" / "manifest" / "list"
    assert sorted(p.name for p in place.iterdir()) == ["a.mp4", "b.mp4", "failed.json"]


def test_without_yt_dlp_it_is_named(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yt_dlp", None)
    listed = write(tmp_path / "list.csv", "id", "zzz")
    with pytest.raises(FetchError, match="none of the 1 videos .* yt-dlp is not installed: pip install 'nano4m.video.'"):
        run(tmp_path, f"csv={listed}")


def test_files_that_are_there_are_used_cut_or_whole(clips, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(clips / "a.mp4", there / "a_000030.mp4")  # cut from second 30 on
    shutil.copy(clips / "b.mp4", there / "b.mp4")
    listed = write(tmp_path / "vgg.csv", 'a,30,"dog, barking",train', 'b,2,cat,test', "c,5,cat,train")
    info, failures, samples = run(tmp_path, f"csv={listed}", "preset=vggsound", f"path={there}", "download=false", "seconds=2",
                                  "size=16", "length=2")
    starts = {labels["item"]: labels["start"] for labels, _ in everything(samples)}
    assert set(starts) == {"a@30", "b@2"} and starts["b@2"] == 2.0 and starts["a@30"] in (0.0, 2.0)
    assert failures == {"c": "is not there, and was not to be downloaded"}
    assert {raw["caption"] for _, raw in everything(samples)} == {"dog, barking", "cat"}
    assert info.attributes["label"].values == ["cat", "dog, barking"]


def test_classes_splits_and_limits_choose_rows(clips, tmp_path):
    lines = ["# a comment, as AudioSet has it", "id,kind,split"] + [f"{c},{k},train" for c, k in zip("abcd", "xyxy", strict=True)]
    listed = write(tmp_path / "list.csv", *lines)
    base = [f"csv={listed}", f"path={clips}", "download=false", "label=kind", "seconds=4", "size=16", "caption={kind}"]
    cases = ((["classes=[x]"], "ac"), (["limit=3"], "abc"), (["classes=[y]", "limit=1"], "b"), (["splits=[train]"], "abcd"))
    for options, wanted in cases:
        _, failures, samples = run(tmp_path / "-".join(options), *base, *options)
        assert not failures and {labels["item"] for labels, _ in everything(samples)} == {f"{c}@0" for c in wanted}
    with pytest.raises(FetchError, match="no class 'z'"):
        run(tmp_path, *base, "classes=[z]")


def test_the_videos_of_vggsound_in_both_splits_are_caught(clips, tmp_path):
    listed = DATA / "meta_vggsound" / "vggsound_full.csv"
    if not listed.is_file():
        pytest.skip("no ../shared/data (or NANO4M_TEST_DATA)")
    lines = [line.split(",")[0] for line in listed.read_text().splitlines()]
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(clips / "a.mp4", there / f"{lines[0]}.mp4")
    info, failures, samples = run(tmp_path, f"csv={listed}", "preset=vggsound", f"path={there}", "download=false", "length=1",
                                  "seconds=1", "limit=1", "size=16")
    twice = {name for name, reason in failures.items() if "stands in split test as well" in reason}
    assert len(twice) == 6 and info.splits["test"] == 1 and len(everything(samples)) == 1


@pytest.mark.parametrize("lines, options, said", [
    (["name", "a"], [], "has no column 'id'"),
    (["id,start", "a"], [], "line 2: 1 fields, 2 columns"),
    (["id", "a"], ["split=fold"], "has no column 'fold'"),
    ([], [], "is empty"),
])
def test_a_list_that_is_none_is_refused(tmp_path, lines, options, said):
    listed = write(tmp_path / "list.csv", *lines)
    with pytest.raises(FetchError, match=said):
        run(tmp_path, f"csv={listed}", *options)
