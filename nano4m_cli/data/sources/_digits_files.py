"""Files behind the `digits` source: what a folder must hold, the public release, and reading pictures and sounds."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import soundfile

from nano4m_cli.data._atomic import atomic_folder
from nano4m_cli.data.download import digest, download, extract
from nano4m_cli.errors import DataError, FetchError, MediaError
from nano4m_cli.modalities import audio

RECORDINGS = "fsdd/recordings"
IMAGES = {"train": "mnist_idx/train-images-idx3-ubyte.gz", "t10k": "mnist_idx/t10k-images-idx3-ubyte.gz"}
LABELS = {"train": "mnist_idx/train-labels-idx1-ubyte.gz", "t10k": "mnist_idx/t10k-labels-idx1-ubyte.gz"}
WAV = re.compile(r"^([0-9])_([a-z]+)_(\d+)\.wav$")
LAYOUT = f"give mirror=DIR with {RECORDINGS}/*.wav (Free Spoken Digit Dataset) and mnist_idx/*-ubyte.gz (MNIST)"
MOST_BYTES = 256 << 20
PEAK = 0.97


@dataclass(frozen=True)
class Release:
    """Where the data is public, and digests of its content (archives are packed anew now and then, content is not).

    Attributes:
        mnist_url: folder with the four idx.gz; `mnist_sha256` digests of the unpacked files.
        fsdd_url: a .tar.gz that holds recordings/*.wav; `fsdd_sha256` is `recordings_digest` of them.
    """

    mnist_url: str
    mnist_sha256: dict[str, str]
    fsdd_url: str
    fsdd_sha256: str


RELEASE = Release(
    mnist_url="https://raw.githubusercontent.com/fgnt/mnist/master",
    mnist_sha256={
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    fsdd_url="https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/"
    "26eb9aaf76e81b692f806f9140c2d2777410d7a1",
    fsdd_sha256="dbd573d7cafe79c4b49f65718115e1304e24e067fa39eff18a660dc6cb9c360f",
)


def fetch_mnist(release: Release, folder: Path, progress: Callable[[str, int, int], None]) -> None:
    """Download what `folder` lacks of MNIST, laid out as a mirror; anything that differs is a FetchError."""
    for name, expected in release.mnist_sha256.items():
        path = folder / "mnist_idx" / name
        for again in (True, False):
            kept = path.is_file()
            download(
                f"{release.mnist_url}/{name}", path, hint=LAYOUT, max_bytes=MOST_BYTES,
                progress=lambda done, total, name=name: progress(f"download {name}", done, total),
            )  # fmt: skip
            if _content_digest(path) == expected:
                break
            path.unlink()
            if not (kept and again):
                raise FetchError(f"{release.mnist_url}/{name} is not MNIST as it was published", LAYOUT)


def fetch_release(release: Release, folder: Path, progress: Callable[[str, int, int], None]) -> None:
    """Download what `folder` lacks of the release, laid out as a mirror; anything that differs is a FetchError."""
    fetch_mnist(release, folder, progress)
    recordings = folder / RECORDINGS
    if recordings.is_dir():
        return
    archive = folder / "fsdd.tar.gz"
    download(
        release.fsdd_url, archive, hint=LAYOUT, max_bytes=MOST_BYTES,
        progress=lambda done, total: progress("download fsdd.tar.gz", done, total),
    )  # fmt: skip
    try:
        with atomic_folder(recordings) as aside:
            extract(archive, aside, _recording, max_bytes=MOST_BYTES, max_files=10_000)
            if recordings_digest(aside) != release.fsdd_sha256:
                raise FetchError(f"the recordings in {release.fsdd_url} are not those that were published", LAYOUT)
    finally:
        archive.unlink(missing_ok=True)


def is_release(release: Release, folder: Path) -> bool:
    """Return whether the files of a mirror are those of the release."""
    same = (_content_digest(folder / "mnist_idx" / name) == sha for name, sha in release.mnist_sha256.items())
    return recordings_digest(folder / RECORDINGS) == release.fsdd_sha256 and all(same)


def _recording(member: str) -> str | None:
    """Return the file name of `TOP/recordings/NAME.wav`, else None."""
    path = PurePosixPath(member)
    return path.name if len(path.parts) == 3 and path.parts[1] == "recordings" and WAV.match(path.name) else None


def recordings_digest(folder: Path) -> str:
    """Return sha256 over the lines "name sha256-of-file" of all recordings, sorted by name."""
    lines = (f"{name} {digest(folder / name)}\n" for name in wav_names(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def wav_names(folder: Path) -> list[str]:
    """Return the names of the recordings in a folder, sorted as text."""
    return sorted(name for name in os.listdir(folder) if WAV.match(name)) if folder.is_dir() else []


def check_mnist(folder: Path) -> None:
    """Raise a FetchError that names what a folder lacks of MNIST, or how its files do not fit together."""
    if not folder.is_dir():
        raise FetchError(f"no folder '{folder}'", LAYOUT)
    if lacking := [name for name in (*IMAGES.values(), *LABELS.values()) if not (folder / name).is_file()]:
        raise FetchError(f"'{folder}' lacks {', '.join(lacking)}", LAYOUT)
    for part in LABELS:
        n_labels, n_images = len(labels(folder, part)), len(images(folder, part))
        if n_labels != n_images:
            raise FetchError(f"MNIST's {part} files hold {n_images} pictures but {n_labels} labels", LAYOUT)


def check_mirror(folder: Path, clips: Iterable[str] = ()) -> None:
    """Raise a FetchError that names what a folder lacks of MNIST, of any recordings, and of the named clips."""
    if not folder.is_dir():
        raise FetchError(f"no folder '{folder}'", LAYOUT)
    lacking = [name for name in (*IMAGES.values(), *LABELS.values()) if not (folder / name).is_file()]
    there = set(wav_names(folder / RECORDINGS))
    lacking += [f"{RECORDINGS}/{name}" for name in sorted(set(clips) - there)] if there else [f"{RECORDINGS}/*.wav"]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise FetchError(f"'{folder}' lacks {', '.join(lacking[:3])}{more}", LAYOUT)


# -- MNIST ------------------------------------------------------------------------------------------------------------


def labels(folder: Path, part: str) -> np.ndarray:
    """Return uint8 (n,), the digits of MNIST's "train" or "t10k"."""
    return _idx(*_stamp(folder / LABELS[part]), 1)


def images(folder: Path, part: str) -> np.ndarray:
    """Return uint8 (n, 28, 28), white on black."""
    return _idx(*_stamp(folder / IMAGES[part]), 3)


def _stamp(path: Path) -> tuple[Path, int]:
    try:
        return path, path.stat().st_mtime_ns
    except OSError as err:
        raise FetchError(f"cannot read {path}: {err.strerror}", LAYOUT) from err


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as err:
        raise DataError(f"{path} is cut or no gzip file: {err}", "copy or fetch it again") from err


def _content_digest(path: Path) -> str:
    try:
        return hashlib.sha256(_unpacked(path)).hexdigest()
    except DataError:
        return ""


@lru_cache(maxsize=6)
def _idx(path: Path, stamp: int, axes: int) -> np.ndarray:
    """Return the uint8 array in an idx file (big-endian: 0, 0, type 8, axes, then each length, then the values)."""
    data = _unpacked(path)
    head = 4 + 4 * axes
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < head:
        raise DataError(f"{path} is no idx file of bytes with {axes} axes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    if len(data) - head != np.prod(shape, dtype=np.int64) or shape[1:] != (28, 28)[: axes - 1]:
        raise DataError(f"{path} holds {len(data) - head} bytes of pixels or labels, its head says {shape}")
    array = np.frombuffer(data, np.uint8, offset=head).reshape(shape)
    if axes == 1 and array.size and array.max() > 9:
        raise DataError(f"{path} holds the label {array.max()}; MNIST has digits 0 to 9")
    return array


# -- recordings -------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """A recording as it is stored: FLAC at 24 kHz, its length, and the gain that brought it to its level."""

    flac: bytes
    seconds: float
    gain_db: float


@lru_cache(maxsize=4096)
def clip(path: Path, level_db: float | None) -> Clip:
    """Return a recording, whole, at 24 kHz, scaled to an RMS of `level_db` dBFS (None: as recorded).

    The gain is less where peaks would pass 0.97. Kept per process: a training clip is paired with eight pictures.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise FetchError(f"cannot read {path}: {err.strerror}", LAYOUT) from err
    if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise MediaError(f"{path} is cut: {len(data)} bytes are there", "copy or fetch it again")
    try:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as err:
        raise MediaError(f"{path} is no readable sound: {err}", "copy or fetch it again") from err
    with _one_thread():
        wave = audio.canonical(wave, rate, str(path))
    gain = 1.0 if level_db is None else gain_to(wave, level_db)
    db = round(20 * float(np.log10(gain)), 2)
    return Clip(audio.MODALITY.to_bytes(wave * np.float32(gain)), round(len(wave) / audio.RATE, 4), db)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Resample on one thread: on a shared machine, threads that wait for each other cost 20 times more."""
    import torch  # late: planning needs none

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gain_to(wave: np.ndarray, level_db: float) -> float:
    """Return the factor that brings a sound's RMS to `level_db` dBFS without a peak over 0.97; 1 for silence."""
    rms, peak = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))), float(np.abs(wave).max())
    return min(10 ** (level_db / 20) / rms, PEAK / peak) if peak > 0 else 1.0
