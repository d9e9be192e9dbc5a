"""Sequences of digits: recordings of one speaker one after the other, as many pictures side by side, one caption.

Recordings stand in the split that the pairs put them in, whole, with a pause drawn anew before every one but the first;
those longer than LONGEST are left out, so that every sequence fits the data set's seconds and nothing is cut. Pictures
of the test split are MNIST's t10k, those of the val split the pairs' own, and training has all others of the train file.

Whole sequences are held out: a fifth of all words of `length` digits is asked in the test split only. They are an
orthogonal array: every digit at every place, and every combination at all places but one, is as frequent in training as
in the test, so that the test asks for known parts in new compositions. The judge split (for judges only) shows them with
recordings and pictures of the training split.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from nano4m_cli import rng
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.data.sources._base import Transcript
from nano4m_cli.data.sources._digits_pairs import ACCENTS, SEED, SPEAKERS, WORDS, Pair
from nano4m_cli.errors import DataError, MediaError
from nano4m_cli.modalities.audio import MODALITY as AUDIO
from nano4m_cli.modalities.audio import RATE

COUNTS = {"train": 6000, "val": 300, "test": 600}
JUDGE = "judge"
SECONDS = 0.8  # per digit: room for LONGEST and the longest pause, for any length
LONGEST = 0.7  # seconds; 3.6 % of the recordings are longer
PAUSE = (0.03, 0.12)  # seconds, uniform
HELD_OUT = (0, 1)  # of 10 residues: a fifth of all sequences


class Line(NamedTuple):
    """One sample to be: `clips` in fsdd/recordings, `images` in MNIST's `part`; `pauses` in samples, one less than digits."""

    key: str
    split: str
    speaker: str
    accent: str
    digits: tuple[int, ...]
    clips: tuple[str, ...]
    part: str
    images: tuple[int, ...]
    pauses: tuple[int, ...]


def is_held_out(digits: Sequence[int]) -> bool:
    """Return whether only the test split (and judge) has this sequence: the sum of its shuffled digits, modulo ten."""
    return sum(_shuffled(10, "held-out", place)[d] for place, d in enumerate(digits)) % 10 in HELD_OUT


def draw(folder: Path, pairs: Sequence[Pair], labels: dict[str, np.ndarray], split: str, count: int, length: int) -> list[Line]:
    """Return the samples of a split; speakers take turns, sequences, recordings and pictures are used equally often.

    Args:
        folder: of the recordings.
        pairs: single digits of all splits, which say what stands in which split.
        labels: digits of MNIST's "train" and "t10k".
    """
    held = split in ("test", JUDGE)
    words = [w for w in product(range(10), repeat=length) if is_held_out(w) == held]
    clips = _clips(folder, pairs, "train" if split == JUDGE else split)
    part, pictures = _pictures(pairs, labels, split)
    speakers, used, lines = sorted({s for s, _ in clips}), Counter(), []

    def take(what: str, cards: Sequence[Any]) -> Any:
        if not cards:
            raise DataError(f"split '{split}' has no {what}, and sequences need one", "add some, or choose another split")
        turn, at = divmod(used[what], len(cards))
        used[what] += 1
        return cards[_shuffled(len(cards), f"{split}/{what}", turn)[at]]

    for i in range(count if speakers else 0):
        speaker, word = speakers[i % len(speakers)], take("sequence", words)
        wavs = tuple(take(f"recording of digit {d} by {speaker} within {LONGEST} s", clips[speaker, d]) for d in word)
        images = tuple(take(f"picture of digit {d}", pictures[d]) for d in word)
        u = rng.uniform(SEED, f"digits/lines/{split}/pause", i, np.arange(length - 1))
        pauses = tuple(int(p) for p in np.rint((PAUSE[0] + u * (PAUSE[1] - PAUSE[0])) * RATE))
        key = f"{split}-{i:06d}_{''.join(map(str, word))}_{speaker}"
        lines.append(Line(key, split, speaker, SPEAKERS[speaker], word, wavs, part, images, pauses))
    return lines


def caption_of(digits: Sequence[int], accent: str) -> str:
    return f"the digits {' '.join(WORDS[d] for d in digits)}, spoken by a man with {ACCENTS[accent]} accent"


def transcript_of(length: int) -> Transcript:
    """Return where the captions, of one digit or several, hold the words said."""
    return Transcript(before="the digits " if length > 1 else "the digit ", after=", spoken by", attribute="digit")


def fields_of(digits: Sequence[int], accent: str) -> list[dict]:
    """Return where `caption_of` words each digit; the accent, worded once for all, is a field of the first."""
    fields, at = [], len("the digits ")
    for place, d in enumerate(digits):
        fields.append({"attribute": "digit", "object": place, "span": [at, at + len(WORDS[d])], "wording": 0})
        at += len(WORDS[d]) + 1
    at = caption_of(digits, accent).index(ACCENTS[accent])
    return [*fields, {"attribute": "accent", "object": 0, "span": [at, at + len(ACCENTS[accent])], "wording": 0}]


def strip(folder: Path, line: Line) -> np.ndarray:
    """Return uint8 (28, 28 * length): the pictures side by side."""
    return np.concatenate([files.images(folder, line.part)[i] for i in line.images], axis=1)


def sound(clips: Sequence[files.Clip], pauses: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Return (the recordings with silence between them, the sample at which each begins)."""
    parts, onsets, at = [], [], 0
    for clip, pause in zip(clips, (0, *pauses), strict=True):
        wave = AUDIO.from_bytes(clip.flac, "a recording")
        parts += [np.zeros(pause, np.float32), wave]
        onsets.append(at + pause)
        at += pause + len(wave)
    return np.concatenate(parts), onsets


def labels_of(line: Line, clips: Sequence[files.Clip], onsets: Sequence[int], seconds: float) -> dict:
    """Return the content of labels.json; `sources` names what each modality was made from, in order."""
    return {
        "objects": [{"digit": str(d), "accent": line.accent} for d in line.digits],
        "fields": fields_of(line.digits, line.accent),
        "digits": list(line.digits),
        "speaker": line.speaker,
        "accent": line.accent,
        "fsdd_files": [f"recordings/{clip}" for clip in line.clips],
        "mnist_file": line.part,
        "mnist_indices": list(line.images),
        "onsets": [round(o / RATE, 4) for o in onsets],
        "seconds": round(seconds, 4),
        "gains_db": [clip.gain_db for clip in clips],
        "sources": {
            "audio": [f"fsdd/{clip}" for clip in line.clips], "rgb": [f"mnist/{line.part}/{i}" for i in line.images],
        },
    }


def _clips(folder: Path, pairs: Sequence[Pair], split: str) -> dict[tuple[str, int], list[str]]:
    """Return the recordings of a split by (speaker, digit), sorted, without those that are too long."""
    short, out = _short(folder, folder.stat().st_mtime_ns), defaultdict(set)
    for pair in pairs:
        if pair.split == split and pair.clip in short:
            out[pair.speaker, pair.digit].add(pair.clip)
    return defaultdict(list, {k: sorted(v) for k, v in out.items()})


def _pictures(pairs: Sequence[Pair], labels: dict[str, np.ndarray], split: str) -> tuple[str, dict[int, list[int]]]:
    """Return (MNIST's file, its pictures that a split may use by digit)."""
    part, n = ("t10k", len(labels["t10k"])) if split == "test" else ("train", len(labels["train"]))
    val = np.zeros(n, dtype=bool)
    val[[p.image for p in pairs if p.split == "val" and p.part == part]] = True
    usable = val if split == "val" else ~val
    return part, {d: np.flatnonzero(usable & (labels[part] == d)).tolist() for d in range(10)}


@lru_cache(maxsize=4)
def _short(folder: Path, stamp: int) -> frozenset[str]:
    """Return the names of the recordings that are not longer than LONGEST."""
    out = []
    for name in files.wav_names(folder):
        try:
            info = soundfile.info(str(folder / name))
        except (soundfile.LibsndfileError, RuntimeError) as err:
            raise MediaError(f"{folder / name} is no readable sound: {err}", "copy or fetch it again") from err
        if info.frames <= LONGEST * info.samplerate:
            out.append(name)
    return frozenset(out)


@lru_cache(maxsize=4096)
def _shuffled(n: int, name: str, turn: int) -> tuple[int, ...]:
    return tuple(rng.permutation(n, SEED, f"digits/lines/{name}", turn).tolist())
