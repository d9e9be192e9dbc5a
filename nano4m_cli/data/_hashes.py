"""Which pictures and sounds nearly equal an earlier one: the same after re-encoding, rescaling, or another volume.

A picture is described by its 8 x 8 mean colours, a sound by 16 mel bands at 12 times, each free of its own level and
contrast, so that the root mean square of a difference is sqrt(2 (1 - correlation)). Pairs to compare are found by hashing
(steps along random lines, Datar et al. 2004): time grows with the number of clips, not with its square.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from nano4m_cli.data.shards import Shard
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.registry import MODALITIES
from nano4m_cli.rng import bits, normal, uniform

CELLS, BANDS, TIMES = 8, 16, 12
SIZE = 192  # numbers in a description: CELLS * CELLS * 3, and BANDS * TIMES
UNIT = 32  # steps of a stored description per standard deviation
NEAR = {"rgb": 0.08, "audio": 0.12}  # greatest difference of what counts as the same, in standard deviations
TABLES, PLANES = 12, 8  # two that differ by NEAR meet in a table with .17, by half of it with .43
COMPARED, FEW = 32, 500  # clips of one bucket that the others are compared with, at most; where all pairs are compared


def describe(modality: str, raw: np.ndarray) -> np.ndarray:
    """Return uint8 (SIZE,) of a picture (uint8 (H, W, 3)) or of a sound (float32 (samples,) at 24 kHz)."""
    values, least = (_sound(raw), 1.0) if modality == "audio" else (_picture(raw), 8.0)
    scaled = (values - values.mean()) / max(float(values.std()), least)  # what is flat stays flat
    return np.clip(np.rint(128 + UNIT * scaled), 0, 255).astype(np.uint8).reshape(-1)


def _picture(raw: np.ndarray) -> np.ndarray:
    small = Image.fromarray(raw).resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small).astype(np.float32)


def _sound(raw: np.ndarray) -> np.ndarray:
    """Return decibels (TIMES, BANDS), no less than 50 under the loudest."""
    window = 1024
    wave = np.pad(raw, (0, -len(raw) % window if len(raw) >= TIMES * window else TIMES * window - len(raw)))
    power = np.abs(np.fft.rfft(wave.reshape(-1, window) * np.hanning(window).astype(np.float32))) ** 2 @ _mel(window)
    edges = np.linspace(0, len(power), TIMES + 1).astype(int)
    power = np.add.reduceat(power, edges[:-1], axis=0) / np.diff(edges)[:, None]
    return 10 * np.log10(np.maximum(power, max(float(power.max()) * 1e-5, 1e-6)))


@lru_cache(maxsize=4)
def _mel(window: int) -> np.ndarray:
    """Return (bins, BANDS) of triangles, even on the mel scale from 50 Hz to 8 kHz."""
    hz = np.linspace(0, RATE / 2, window // 2 + 1)
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    at = np.linspace(mel(50), mel(8000), BANDS + 2)
    rise = (mel(hz)[:, None] - at[:-2]) / np.diff(at)[:-1]
    return np.clip(np.minimum(rise, 2 - rise), 0, None)


def describe_shard(path: Path, modality: str) -> tuple[np.ndarray, list[bytes]]:
    """Return descriptions (N, SIZE) and digests of the raw members of a shard."""
    shard, kind = Shard(path), MODALITIES.get(modality)
    members = [shard.read(i, kind.ext) for i in range(len(shard))]
    raws = (kind.from_bytes(data, f"{path}, '{key}'") for key, data in zip(shard.keys, members, strict=True))
    return np.stack([describe(modality, raw) for raw in raws]), [digest(data) for data in members]


def digest(data: bytes) -> bytes:
    """Return what tells bytes apart."""
    return hashlib.blake2b(data, digest_size=16).digest()


def to_text(description: np.ndarray) -> str:
    return base64.b85encode(description.tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    return np.frombuffer(base64.b85decode(text), dtype=np.uint8)


def repeats(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return int64 (N,): for each clip the earlier one it nearly equals in every part (modality), -1 where there is none.

    What is pointed to is itself no repetition. Very few repetitions are missed (some in a crowd of clips that
    are much alike), none is invented.

    Args:
        parts: per modality descriptions uint8 (N, a multiple of SIZE).
    """
    # In units of the greatest allowed difference: two clips are the same where they are within 1 in every part.
    values = [(v.astype(np.float32) - 128) / (UNIT * NEAR[m] * v.shape[1] ** 0.5) for m, v in parts.items()]
    count = len(values[0])

    def near(i: int, others: np.ndarray) -> np.ndarray:
        return np.logical_and.reduce([((v[others] - v[i]) ** 2).sum(1) <= 1 for v in values])

    candidates: dict[int, set[int]] = {}
    for bucket in _buckets(values):
        for _ in range(COMPARED if count > FEW else count):
            if len(bucket) < 2:
                break
            first, bucket = int(bucket[0]), bucket[1:]
            same = near(first, bucket)
            for j in bucket[same].tolist():
                candidates.setdefault(j, set()).add(first)
            bucket = bucket[~same]
    of = np.full(count, -1, dtype=np.int64)
    for j in sorted(candidates):
        kept = sorted({int(of[i]) if of[i] >= 0 else i for i in candidates[j]})
        same = near(j, np.array(kept))
        if same.any():
            of[j] = kept[int(np.argmax(same))]
    return of


def _buckets(values: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the ascending positions of clips that fell into one bucket of one table, for two and more."""
    count, width = len(values[0]), sum(v.shape[1] for v in values)
    if count <= FEW:
        yield np.arange(count)
        return
    step = 4.0 * len(values) ** 0.5
    for table in range(TABLES):
        planes = normal(0, "hashes/planes", table, np.arange(width * PLANES)).reshape(width, PLANES).astype(np.float32)
        split = np.split(planes, np.cumsum([v.shape[1] for v in values])[:-1])
        at = sum(v @ p for v, p in zip(values, split, strict=True)) / step + uniform(0, "hashes/offset", table, np.arange(PLANES))
        mixed = np.floor(at).astype(np.int64).astype(np.uint64) * (bits(0, "hashes/mix", np.arange(PLANES)) | np.uint64(1))
        code = np.bitwise_xor.reduce(mixed, axis=1)
        order = np.argsort(code, kind="stable")
        edges = np.flatnonzero(np.diff(code[order], prepend=code[order[:1]] + np.uint64(1), append=code[order[-1:]] + np.uint64(1)))
        for start in np.flatnonzero(np.diff(edges) > 1):
            yield order[edges[start] : edges[start + 1]]
