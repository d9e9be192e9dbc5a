"""Hours of sound and video: memory is that of a clip, of a minute, of a batch; never of the whole."""

import json
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from codec_factory import dac_small, encodec_small, mimi_small, waves

from nano4m_cli.config import build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.registry import TOKENIZERS
from nano4m_cli.tokenizers import _codec
from nano4m_cli.train import tokenizing

LOOK = """
import json, resource, sys
from nano4m_cli.data.sources._folder_clips import inspect
from nano4m_cli.data.sources._folder_items import Item
from nano4m_cli.data.sources.folder import Source

out = []
for role, path, every in zip(("audio", "audio", "video", "video"), sys.argv[1:], (20, 120, 20, 120)):
    look = inspect(Item("x", {role: path}), Source.Options(path=".", seconds=5, every=every, size=32))
    out.append((len(look["clips"]), look["problem"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
print(json.dumps(out))
"""


def tape(path, minutes):
    block = (np.sin(np.arange(240_000) / 30) * 3000).astype(np.int16)
    with soundfile.SoundFile(path, "w", 24_000, 1) as file:
        for _ in range(6 * minutes):
            file.write(block)
    return path


def film(path, minutes):
    """A frame every four seconds: an hour would be 177 MB of pictures."""
    with av.open(str(path), "w") as box:
        stream = box.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for i in range(15 * minutes):
            frame = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 40 + i % 160, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 4 * i, Fraction(1, 1)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


def test_an_hour_of_sound_or_video_takes_no_more_memory_than_ten_minutes(tmp_path):
    files = [tape(tmp_path / "short.flac", 10), tape(tmp_path / "long.flac", 60),
             film(tmp_path / "short.mp4", 10), film(tmp_path / "long.mp4", 60)]
    done = subprocess.run([sys.executable, "-c", LOOK, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    looks = json.loads(done.stdout)
    assert [n for n, _, _ in looks] == [30] * 4 and all(problem is None for _, problem, _ in looks)
    heard, listened, seen, watched = (peak for _, _, peak in looks)
    assert listened - heard < 20, "an hour of sound would be 346 MB"
    assert watched - seen < 40, "all its pictures would be 177 MB"


CODECS = {
    "encodec": (encodec_small, {"bandwidth": 6}), "mimi": (mimi_small, {"codebooks": 4}), "dac": (dac_small, {"codebooks": 3}),
}


@pytest.mark.parametrize("name", CODECS)
def test_long_sounds_are_encoded_in_pieces(name, monkeypatch):
    weights, options = CODECS[name]
    cls = TOKENIZERS.get(name)
    tokenizer = cls("audio", build(cls.Options, {"weights": str(weights()), **options}, name), {"seconds": 5.3})
    wave = waves(1, round(5.3 * 24_000))[0, 0].numpy()
    whole = tokenizer.encode([wave])[0]
    sound = tokenizer.decode([whole])[0]
    longest = []
    for direction in ("to_codes", "to_wave"):
        original = getattr(tokenizer, direction)
        monkeypatch.setattr(tokenizer, direction, lambda x, f=original: (longest.append(x.shape[-1]), f(x))[1])
    monkeypatch.setattr(_codec, "PIECE", 1.28)
    monkeypatch.setattr(_codec, "CONTEXT", 0.64)
    pieces = tokenizer.encode([wave])[0]
    assert len(longest) == 5 and max(longest) <= (1.28 + 2 * 0.64) * 24_000 + 1
    assert pieces.shape == whole.shape and (pieces == whole).mean() > (0.999 if name == "dac" else 0.97), (pieces == whole).mean()
    again = tokenizer.decode([whole])[0]
    assert again.shape == sound.shape and sound.std() > 0.01
    assert np.abs(again - sound).mean() < (1e-5 if name == "dac" else 0.03) * np.abs(sound).mean()


def test_large_values_are_encoded_a_few_at_once(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path)
    options = ["train=9", "val=2", "test=0", "test_novel=0", "judge=0", "size=16"]
    dataset = fetch(open_source("scenes", options, workspace), workspace, 1).dataset
    sizes, cls = [], TOKENIZERS.get("identity")
    original = cls.encode
    monkeypatch.setattr(cls, "encode", lambda self, raws, where=None: (sizes.append(len(raws)), original(self, raws, where))[1])
    made = {}
    for limit in (1 << 28, 4 * 16 * 16 * 3, 1):
        monkeypatch.setattr(tokenizing, "BATCH_BYTES", limit)
        tokenizing.tokenize(dataset, "rgb", ["name=identity"] if not made else [], workers=1)
        made[limit] = {p.relative_to(dataset.path): p.read_bytes() for p in dataset.tokens("rgb").rglob("*.tar")}
        for path in dataset.tokens("rgb").rglob("*.tar"):
            path.unlink()
    assert sizes == [9, 2] + [4, 4, 1, 2] + [1] * 11
    assert len({str(sorted(m.items())) for m in made.values()}) == 1


def test_pieces_of_a_sound_that_ends_with_a_piece(monkeypatch):
    cls = TOKENIZERS.get("encodec")
    tokenizer = cls("audio", build(cls.Options, {"weights": str(encodec_small())}, "encodec"), {"seconds": 2.56})
    monkeypatch.setattr(_codec, "PIECE", 1.28)
    assert tokenizer.encode([waves(1, 61_440)[0, 0].numpy()])[0].shape == (192 * 2,)
