"""Source `esc50` on an archive in its published layout, served on this machine."""

import csv
import functools
import http.server
import threading
import zipfile

import numpy as np
import pytest
from test_folder import tone

from nano4m_cli.data.fetch import fetch
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources.esc50 import Source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import FetchError
from nano4m_cli.modalities.audio import MODALITY as AUDIO

CLASSES = {"dog": ("0", "True"), "crying_baby": ("20", "True"), "hen": ("6", "False")}


@pytest.fixture
def www(tmp_path, monkeypatch):
    """A server of the repository's archive; returns (source class that knows its address, paths asked for)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "www" / "ESC-50-master"
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rows = []
    for i, (name, (target, small)) in enumerate(c for c in CLASSES.items() for _ in range(5)):
        file = f"{1 + i % 5}-{1000 + i}-A-{target}.wav"
        tone(root / "audio" / file, 5.0, rate=44_100, hertz=200 + 30 * i)
        rows.append({"filename": file, "fold": 1 + i % 5, "target": target, "category": name, "esc10": small,
                     "src_file": 1000 + i, "take": "A"})
    with open(root / "meta" / "esc50.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with zipfile.ZipFile(tmp_path / "www" / "master.zip", "w") as box:
        for path in sorted(root.rglob("*.*")):
            box.write(path, path.relative_to(tmp_path / "www"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list = []

        def log_message(self, *args):
            self.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    class Here(Source):
        url = f"http://127.0.0.1:{server.server_port}/master.zip"

    Quiet.asked.clear()
    yield Here, Quiet.asked
    server.shutdown()
    server.server_close()


def test_the_archive_becomes_a_data_set_by_folds(www, tmp_path):
    cls, asked = www
    workspace = Workspace(tmp_path / "space")

    def make(**options):
        return fetch(cls(cls.Options(**options), workspace.cache / "esc50"), workspace, 1)

    report = make()
    assert (report.info.name, report.info.splits) == ("esc50", {"train": 9, "val": 3, "test": 3}) and not report.failures
    assert report.info.attributes["category"].values == ["crying baby", "dog", "hen"]
    test = Split(report.dataset.raw("test"))
    captions = sorted(test.shards[0].read(i, "caption.txt").decode() for i in range(3))
    assert captions == ["the sound of crying baby", "the sound of dog", "the sound of hen"]
    sounds = [AUDIO.from_bytes(test.shards[0].read(i, "audio.flac"), "x") for i in range(3)]
    assert {int(np.argmax(np.abs(np.fft.rfft(s)))) // 5 for s in sounds} == {320, 470, 620}, "the fifth of each class"
    small = make(esc10=True)
    assert (small.info.name, sum(small.info.splits.values())) == ("esc10", 10) and asked == ["/master.zip"]


def test_a_folder_that_is_no_esc50_is_refused(tmp_path):
    workspace = Workspace(tmp_path / "space")
    with pytest.raises(FetchError, match="has no meta/esc50.csv"):
        fetch(Source(Source.Options(path=str(tmp_path)), workspace.cache), workspace, 1)
