"""Samples per second of one core from files to raw shards: `nano4m fetch folder` on videos, sounds and pictures made here.

    python scripts/bench/fetch.py [--json] [--quick]

Every file is read twice: looked through before anything is written, then cut and written; the table says which share of the
time looking takes. Seconds are those of this process (all its threads), so that what others do on the machine does not count.
Videos: 10 s of 320 x 240 at 25 frames/s, H.264 and AAC, two clips each. Sounds: 10 s of 44.1 kHz stereo, half of them MP3
and half FLAC, two clips each. Pictures: 640 x 480 JPEG. Samples: 5 s of sound at 24 kHz, pictures of 64 x 64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
from _figures import document, figure
from PIL import Image

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.sources._folder_clips import inspect
from nano4m_cli.data.workspace import Workspace

SECONDS, SHAPE, FPS, RATE = 10, (240, 320), 25, 44_100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="fewer files and rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if args.quick else 7
    files = {"video": 3, "sound": 6, "picture": 40} if args.quick else {"video": 10, "sound": 24, "picture": 300}
    seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in files}  # (samples per second, share of looking)
    with tempfile.TemporaryDirectory() as folder:
        for kind, count in files.items():
            (Path(folder) / kind).mkdir()
            for i in range(count):
                MAKE[kind](Path(folder) / kind, i)
        for turn in range(rounds + 1):  # the first warms up; kinds take turns, so that all see the same machine
            for kind in files:
                measured = one(Path(folder) / kind, Path(folder) / f"space-{kind}-{turn}")
                if turn:
                    seen[kind].append(measured)
    figures = []
    for kind, rows in seen.items():
        named = (("samples_per_s_per_core", "samples/s", 0), ("look_share", "of the time", 1))
        for name, unit, column in named:
            figures.append(figure(f"{kind}_{name}", [row[column] for row in rows], unit))
    if args.json:
        document("fetch", figures)
        return
    print(f"{'files':8} {'samples/s/core':>14} {'spread':>15}   looking first")
    for kind, rows in seen.items():
        rate = sorted(row[0] for row in rows)
        share = statistics.median(row[1] for row in rows)
        print(f"{kind:8} {statistics.median(rate):14.1f} {rate[0]:7.1f}-{rate[-1]:<7.1f}   {share:.0%}")


def one(folder: Path, space: Path) -> tuple[float, float]:
    """Return samples per second of processor time, and the share of it that looking through the files took."""
    workspace = Workspace(space)
    source = open_source("folder", [f"path={folder}", "seconds=5", "size=64"], workspace)
    start = time.process_time()
    looks = [inspect(item, source.options) for item in source._found[0]]  # as `prepare` does, in this process
    looked = time.process_time()
    assert not any(look["problem"] for look in looks), looks
    write_json(source._record, looks)
    made = fetch(source, workspace, workers=1).made
    total = time.process_time() - start
    return made / total, (looked - start) / total


def wave(i: int) -> np.ndarray:
    """Return float32 (samples, 2): a gliding tone over noise."""
    rng, t = np.random.default_rng(i), np.arange(SECONDS * RATE) / RATE
    mono = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * t * (1 + 0.05 * t)) + 0.02 * rng.normal(size=len(t))
    return np.stack([mono, 0.8 * mono], 1).astype(np.float32)


def picture(i: int, step: float, shape: tuple[int, int]) -> np.ndarray:
    """Return uint8 (H, W, 3): waves of colour that move with `step`, with some grain."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    waves = [np.sin(x / (17 + 3 * c) + y / (29 - 2 * c) + step + i) for c in range(3)]
    grain = np.random.default_rng(i).normal(0, 6, (*shape, 3))
    return np.clip(np.stack(waves, -1) * 90 + 128 + grain, 0, 255).astype(np.uint8)


def make_picture(folder: Path, i: int) -> None:
    Image.fromarray(picture(i, 0.0, (480, 640))).save(folder / f"{i:04d}.jpg", quality=90)


def make_sound(folder: Path, i: int) -> None:
    soundfile.write(folder / f"{i:04d}{'.mp3' if i % 2 else '.flac'}", wave(i), RATE)


def make_video(folder: Path, i: int) -> None:
    import av

    with av.open(str(folder / f"{i:04d}.mp4"), "w") as box:
        stream, tone = box.add_stream("libx264", rate=FPS), box.add_stream("aac", rate=RATE, layout="stereo")
        (stream.height, stream.width), stream.pix_fmt = SHAPE, "yuv420p"
        for n in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(picture(i, 0.2 * n, SHAPE), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, FPS)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
        sound = wave(i).T
        for at in range(0, sound.shape[1], 1024):
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, at : at + 1024]), format="fltp", layout="stereo")
            block.sample_rate, block.pts, block.time_base = RATE, at, Fraction(1, RATE)
            box.mux(tone.encode(block))
        box.mux(tone.encode())


MAKE = {"video": make_video, "sound": make_sound, "picture": make_picture}

if __name__ == "__main__":
    sys.exit(main())
