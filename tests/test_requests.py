"""Requests in bulk: mixed batches, going on after a kill, what the manifest says, and bad requests among good ones."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_cli import ENV, run
from workspace_factory import media, one_thread, tiny  # noqa: F401

from nano4m_cli.errors import DataError, UsageError
from nano4m_cli.generate import requests
from nano4m_cli.generate.command import Studio
from nano4m_cli.generate.requests import generate_requests, read_requests

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def good(photo):
    """Requests of different conditions, targets, seeds and options."""
    return [
        {"id": "cube", "from": {"caption": "a red cube"}, "to": "rgb", "temperature": 1},
        {"id": "ball", "from": {"caption": "a large blue metal sphere"}, "to": "rgb", "temperature": 1, "seed": 5, "n": 3},
        {"id": "half", "from": {"rgb": str(photo)}, "keep": "rgb:left-half", "to": "rgb", "temperature": 1},
        {"id": "away", "from": {"caption": "a cone"}, "not": {"caption": "a cube"}, "to": "rgb", "temperature": 1},
        {"id": "words", "from": {"rgb": str(photo)}, "to": ["caption"]},
        {"id": "chain", "from": {"caption": "a cone"}, "chain": [{"to": "depth", "steps": 2}, {"to": "rgb", "given": "depth"}]},
    ]


def write(path, lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def bulk(space, path, out, **more):
    return generate_requests(space, "demo", path, out, {}, **more)


def ids_in(folder):
    return {p.relative_to(folder): np.load(p).tolist() for p in sorted(folder.rglob("*.ids.npy"))}


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_requests_together_are_what_each_is_alone(media, tmp_path, good):  # noqa: F811
    together = bulk(media, write(tmp_path / "r.jsonl", good), tmp_path / "all")
    assert sorted(together.made) == sorted(r["id"] for r in good) and not together.failed
    assert together.samples == 8 and together.samples_per_s > 0
    bulk(media, tmp_path / "r.jsonl", tmp_path / "pairs", batch=2)
    for r in good:
        bulk(media, write(tmp_path / f"{r['id']}.jsonl", [r]), tmp_path / "one")
    assert ids_in(tmp_path / "all") == ids_in(tmp_path / "one") == ids_in(tmp_path / "pairs")
    assert len(ids_in(tmp_path / "all")) == 9
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.png")) for f in ("all", "one", "pairs")]
    assert files[0] == files[1] == files[2] and len(files[0]) == 15  # 7 pictures, a depth with its view, 6 sheets
    assert all((tmp_path / "all" / f).read_bytes() == (tmp_path / "one" / f).read_bytes() for f in files[0])


def test_a_request_equals_the_command_of_the_same_words(media, tmp_path, good):  # noqa: F811
    bulk(media, write(tmp_path / "r.jsonl", good), tmp_path / "all")
    result = run("generate", "--from", "caption=a large blue metal sphere", "--to", "rgb", "--temperature", 1, "--seed", 5, "-n", 3,
                 "--root", media.root, "--out", tmp_path / "one", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for name in (f"{i:03d}-rgb.ids.npy" for i in range(3)):
        assert np.array_equal(np.load(tmp_path / "one" / name), np.load(tmp_path / "all" / "ball" / name))


def test_batches_mix_requests(media, tmp_path, good, monkeypatch):  # noqa: F811
    sizes, real = [], Studio.make

    def spy(self, ready, batch):
        sizes.append([r.request.n for r in ready])
        return real(self, ready, batch)

    monkeypatch.setattr(Studio, "make", spy)
    bulk(media, write(tmp_path / "r.jsonl", good), tmp_path / "out", batch=4)
    assert sum(map(sum, sizes)) == 8 and all(sum(s) <= 4 for s in sizes) and len(sizes) <= 4


def test_the_manifest_says_what_was_made(media, tmp_path, good):  # noqa: F811
    bulk(media, write(tmp_path / "r.jsonl", good), tmp_path / "out")
    said = manifest(tmp_path / "out")
    assert [m["id"] for m in said] == [r["id"] for r in good] and [m["line"] for m in said] == [1, 2, 3, 4, 5, 6]
    for m in said:
        assert all((tmp_path / "out" / m["id"] / f).is_file() for f in m["files"])
    assert said[1]["samples"] == 3 and said[1]["seed"] == 5
    assert said[4]["texts"][0]["modality"] == "caption"


def test_what_is_finished_is_not_made_again(media, tmp_path, good, photo, monkeypatch):  # noqa: F811
    path, out = write(tmp_path / "r.jsonl", good), tmp_path / "out"
    bulk(media, path, out)
    when = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    with monkeypatch.context() as m:
        m.setattr(Studio, "make", lambda *a: pytest.fail("made again"))
        again = bulk(media, path, out)
    assert len(again.kept) == 6 and again.samples_per_s is None and len(manifest(out)) == 6
    assert when == {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    good[0]["seed"] = 9  # another question
    (out / "words" / "caption.txt").unlink()  # a file that is gone
    shutil.rmtree(out / "away")
    changed = bulk(media, write(path, good), out)
    assert sorted(changed.made) == ["away", "cube", "words"] and sorted(changed.kept) == ["ball", "chain", "half"]


def test_another_picture_in_the_same_file_is_another_request(media, tmp_path, photo):  # noqa: F811
    mine = tmp_path / "p.png"
    shutil.copy(photo, mine)
    path = write(tmp_path / "r.jsonl", [{"id": "a", "from": {"rgb": str(mine)}, "to": "caption"}])
    assert bulk(media, path, tmp_path / "out").made == ["a"]
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(mine)
    assert bulk(media, path, tmp_path / "out").made == ["a"]
    assert bulk(media, path, tmp_path / "out").kept == ["a"]


KILLED = """
import os, signal, sys
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.generate import requests
from nano4m_cli.generate.command import Studio
real, done = Studio.write, []
def write(self, made, out):
    report = real(self, made, out)
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return report
Studio.write = write
from pathlib import Path
requests.generate_requests(Workspace(Path(sys.argv[1])), "demo", Path(sys.argv[2]), Path(sys.argv[3]), {}, batch=1)
"""


def test_killed_and_run_again(media, tmp_path, good):  # noqa: F811
    path, out = write(tmp_path / "r.jsonl", good), tmp_path / "out"
    env = {**os.environ, **ENV, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, media.root, path, out], env=env)
    assert killed.returncode == -signal.SIGKILL
    whole = [p for p in out.iterdir() if not p.name.startswith(".")]
    assert len(whole) == 2 and len([p for p in out.iterdir() if p.name.startswith(".")]) == 1
    again = bulk(media, path, out)
    assert len(again.kept) == 2 and len(again.made) == 4
    assert sorted(p.name for p in out.iterdir()) == sorted([*(r["id"] for r in good), "manifest.jsonl"])
    bulk(media, path, tmp_path / "fresh")
    assert ids_in(out) == ids_in(tmp_path / "fresh")


def test_bad_requests_are_listed_and_the_others_made(media, tmp_path, good):  # noqa: F811
    lines = [
        good[0],
        "{not json",
        "",
        [1],
        {"id": "cube", "from": {"caption": "a"}, "to": "rgb"},
        {"id": "../up", "from": {"caption": "a"}, "to": "rgb"},
        {"id": "typo", "from": {"captoin": "a"}, "to": "rgb"},
        {"id": "file", "from": {"rgb": "nowhere.png"}, "to": "caption"},
        {"id": "keys", "form": {"caption": "a"}, "to": "rgb"},
        {"id": "cold", "from": {"caption": "a"}, "to": "rgb", "guidance": -2},
        {"id": "none", "from": {"caption": "  "}, "to": "rgb"},
        {"from": {"caption": "a red cube"}, "to": "rgb"},
        '{"id": "twice", "to": "rgb", "from": {"caption": "a", "caption": "b"}}',
    ]
    path, out = write(tmp_path / "r.jsonl", lines), tmp_path / "out"
    result = run("generate", "--requests", path, "--out", out, "--root", media.root, "--steps", 2, "--device", "cpu", "--json")
    assert result.exit_code == 1 and "Traceback" not in result.output
    data = json.loads(result.stdout)
    assert sorted(data["made"]) == ["000012", "cube"] and data["samples"] == 2 and data["samples_per_s"] > 0
    reasons = {2: "no JSON", 4: "no JSON object", 5: "id 'cube' stands on line 1 already", 6: "names no folder",
               7: "has no modality 'captoin'", 8: "no rgb file 'nowhere.png'", 9: "unknown key 'form'",
               10: "guidance: lies outside 0..100", 11: "the caption is empty",
               13: "key 'caption' stands twice"}
    assert [f["line"] for f in data["failed"]] == list(reasons)
    for bad in data["failed"]:
        assert reasons[bad["line"]] in bad["error"]
        assert f"error: line {bad['line']} (" in result.stderr
    assert [m["line"] for m in manifest(out) if "error" in m] == list(reasons) and len(manifest(out)) == 12
    assert "2 made" in result.stderr and "samples/s" in result.stderr and "10 failed" in result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["000012", "cube", "manifest.jsonl"]


def test_a_request_that_fails_while_it_is_made_stops_no_other(media, tmp_path, good, monkeypatch):  # noqa: F811
    real = requests.Studio.make

    def make(self, ready, batch):
        if any(r.request.seed == 5 for r in ready):
            raise UsageError("it cannot be made")
        return real(self, ready, batch)

    monkeypatch.setattr(requests.Studio, "make", make)
    report = bulk(media, write(tmp_path / "r.jsonl", good), tmp_path / "out")
    assert [f["id"] for f in report.failed] == ["ball"] and len(report.made) == 5


def test_options_of_the_command_hold_where_a_request_says_nothing(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"to": "rgb"}, {"to": "rgb", "steps": 4}])
    first, second = (line.request for line in read_requests(path, {"steps": 2, "temperature": "1..0"}))
    assert (first.steps, second.steps, first.temperature) == (2, 4, "1..0")


@pytest.mark.parametrize("content, error", [("", UsageError), ("\n\n", UsageError), (None, DataError)])
def test_files_without_requests(tmp_path, content, error):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error):
        read_requests(path, {})


def test_jobs_that_share_a_file_out_make_what_one_makes(media, tmp_path, good):  # noqa: F811
    path = write(tmp_path / "r.jsonl", [*good, {"id": "bad", "from": {"caption": "x"}, "to": "smell"}])
    bulk(media, path, tmp_path / "one")
    for i in (2, 0, 1):
        left = tmp_path / "all" / f".{good[0]['id']}.99999.part"  # another job is at it, or was
        left.mkdir(parents=True, exist_ok=True)
        report = bulk(media, path, tmp_path / "all", part=(i, 3))
        assert sorted(report.made) == sorted(line["id"] for line in good[i::3])
        assert [f["id"] for f in report.failed] == (["bad"] if i == 0 else [])
        assert left.exists() == (i != 0)
    assert ids_in(tmp_path / "all") == ids_in(tmp_path / "one")
    assert manifest(tmp_path / "all") == manifest(tmp_path / "one") and len(manifest(tmp_path / "all")) == 7
    kept = bulk(media, path, tmp_path / "all", part=(1, 3))
    assert not kept.made and len(kept.kept) == 2
    result = run("generate", "--requests", path, "--out", tmp_path / "x", "--shard", "3/3", "--root", media.root)
    assert result.exit_code == 2 and "--shard 3/3 is not of the form I/N" in result.stderr
    result = run("generate", "--to", "rgb", "--shard", "0/3", "--root", media.root)
    assert result.exit_code == 2 and "--shard goes with --requests" in result.stderr
