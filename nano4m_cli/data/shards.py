"""Shards: plain WebDataset tars, written atomically, with an index beside them for random access.

A shard is `shard-000000.tar` plus `shard-000000.idx.json`, which maps each member name ("rgb.png") to the offset and
size of its bytes for every key. Members are not compressed, so tar + index is a random-access file. The index is
derived: where it is missing or older than the tar it is made again by scanning; a tar that ends before its
end-of-archive marker was cut.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import webdataset as wds

from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.errors import AlignmentError, ShardError

KEY = re.compile(r"^[A-Za-z0-9_-]+$")
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")
INDEX_FORMAT = 1
BLOCK = tarfile.BLOCKSIZE


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def index_path(path: Path) -> Path:
    return path.with_suffix(".idx.json")


def shard_paths(folder: Path, lost: bool = False) -> list[Path]:
    """Return the shards of a split in order; a gap in their numbers is a ShardError.

    Args:
        lost: whether those count whose index alone is there.
    """
    paths = sorted(folder.glob("shard-*.tar"))
    if lost:
        indices = (p.with_name(p.name.removesuffix(".idx.json") + ".tar") for p in folder.glob("shard-*.idx.json"))
        paths = sorted({*paths, *indices})
    for i, path in enumerate(paths):
        if path.name != shard_name(i):
            raise ShardError(f"{folder}: {shard_name(i)} is missing (next is {path.name})", "run fetch/tokenize again")
    return paths


def npy(ids: np.ndarray) -> bytes:
    """Return an array of numbers as npy bytes."""
    assert not ids.dtype.hasobject, ids.dtype
    return _npy_header(ids.dtype, ids.shape) + ids.tobytes()


@lru_cache(maxsize=256)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.zeros(shape, dtype), version=(1, 0), allow_pickle=False)
    return out.getvalue()[: -int(np.prod(shape)) * dtype.itemsize or None]


def write_shard(path: Path, samples: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {member: bytes}) samples as one shard; return their number.

    The bytes depend on the samples only (no times, owners or file names inside). Keys must be letters, digits, '_' or
    '-' (a dot would split silently) and stand once; every sample has the same members.
    """
    keys: dict[str, None] = {}
    members: list[str] | None = None
    rows: list[list[tuple[int, int]]] | None = []  # per sample (offset, size) of its members; None: to be read from the tar
    with atomic_file(path) as file, contextlib.ExitStack() as stack:
        writer = stack.enter_context(contextlib.closing(wds.TarWriter(file, mtime=0, encoder=False)))
        for key, sample in samples:
            if not KEY.fullmatch(key):
                raise ShardError(f"{path}: key '{key}' may only hold letters, digits, '_' and '-'")
            if key in keys:
                raise ShardError(f"{path}: key '{key}' stands twice")
            names = sorted(sample)
            if members is not None and names != members:
                raise ShardError(f"{path}: sample '{key}' has members {names}, earlier ones {members}")
            for name in names:
                if name.rsplit(".")[-1] in PICKLES:
                    raise ShardError(f"{path}: member '{name}' is a pickle; pickles are neither written nor read")
            members, at, row = names, writer.tarstream.offset, []
            keys[key] = None
            writer.write({"__key__": key, **sample})
            for size in (len(sample[name]) for name in names):
                row.append((at + BLOCK, size))
                at += BLOCK - (-size // BLOCK) * BLOCK  # a header, and the content up to a whole block
            if at != writer.tarstream.offset:
                rows = None  # a name was too long for one header
            if rows is not None:
                rows.append(row)
    if rows is None or members is None:
        index = _scan(path)
    else:
        table = np.array(rows, dtype=np.int64)  # (samples, members, 2)
        columns = {name: table[:, i] for i, name in enumerate(members)}
        index = ShardIndex(list(keys), {n: c[:, 0] for n, c in columns.items()}, {n: c[:, 1] for n, c in columns.items()},
                           path.stat().st_size)
    _write_index(path, index)
    return len(keys)


@dataclass
class ShardIndex:
    """keys, and per member name int64 arrays of offset and size, aligned with keys."""

    keys: list[str]
    offset: dict[str, np.ndarray] = field(default_factory=dict)
    size: dict[str, np.ndarray] = field(default_factory=dict)
    tar_bytes: int = 0


def _scan(path: Path) -> ShardIndex:
    """Return the index of a tar by reading its headers; a cut or foreign tar is a ShardError."""
    keys: list[str] = []
    rows: dict[str, list[tuple[int, int]]] = {}
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg():
                    raise ShardError(f"{path}: member '{info.name}' is not a plain file")
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError("unexpected end of data")
                key, _, name = info.name.partition(".")
                if not KEY.fullmatch(key) or not name:
                    raise ShardError(f"{path}: member '{info.name}' is not KEY.NAME")
                if not keys or keys[-1] != key:
                    keys.append(key)
                rows.setdefault(name, []).append((info.offset_data, info.size))
            # tarfile takes a damaged header for the end: the end is where two blocks of zeros stand.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("a member's header is damaged, or the end is missing")
    except tarfile.TarError as err:
        hint = f"delete {path.name} and run the command that wrote it again"
        raise ShardError(f"{path} is cut short or damaged: {err}", hint) from err
    if len(set(keys)) != len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ShardError(f"{path}: key '{twice}' stands twice")
    for name, pairs in rows.items():
        if len(pairs) != len(keys):
            raise ShardError(f"{path}: member '{name}' is there for {len(pairs)} of {len(keys)} samples")
    table = {name: np.asarray(pairs, dtype=np.int64) for name, pairs in rows.items()}
    return ShardIndex(keys, {n: t[:, 0] for n, t in table.items()}, {n: t[:, 1] for n, t in table.items()}, total)


def _write_index(path: Path, index: ShardIndex) -> None:
    doc = {
        "format": INDEX_FORMAT,
        "tar_bytes": index.tar_bytes,
        "keys": index.keys,
        "members": {n: {"offset": index.offset[n].tolist(), "size": index.size[n].tolist()} for n in index.offset},
    }
    with atomic_file(index_path(path)) as file:
        file.write(json.dumps(doc, separators=(",", ":")).encode())


def read_index(path: Path) -> ShardIndex:
    """Return a shard's index from the file beside it, or by scanning where that is missing or stale."""
    if not path.is_file():
        raise ShardError(f"no shard {path}", "run the command that writes it again")
    total = path.stat().st_size
    beside = index_path(path)
    if beside.is_file() and beside.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        index = read_beside(path)
        if index is not None and index.tar_bytes == total:
            return index
    return _scan(path)


def read_beside(path: Path) -> ShardIndex | None:
    """Return what the file beside a shard says; None where it is damaged or missing (the tar is the truth)."""
    try:
        doc = json.loads(index_path(path).read_text())
        if doc["format"] != INDEX_FORMAT:
            return None
        columns = doc["members"]
        return ShardIndex(
            doc["keys"],
            {n: np.asarray(c["offset"], dtype=np.int64) for n, c in columns.items()},
            {n: np.asarray(c["size"], dtype=np.int64) for n, c in columns.items()},
            doc["tar_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Shard:
    """Random access to one shard through a memory map.

    Args:
        lost_too: whether a shard that cannot be read is told by `lost` (why it cannot) instead of an error; its keys are then those
            of the index beside it.
    """

    def __init__(self, path: Path, lost_too: bool = False):
        self.path = path
        self.lost: str | None = None
        try:
            self.index = read_index(path)
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.index.tar_bytes else b""
        except (ShardError, OSError) as err:
            index = read_beside(path) if lost_too else None
            if index is None:
                raise
            self.index, self.map, self.lost = index, b"", str(getattr(err, "message", err))

    def check(self) -> None:
        """Raise ShardError where the file is no longer what was opened: a map of a file that was cut short kills who reads it."""
        if self.lost is not None:
            raise ShardError(self.lost, "run the command that writes it again")
        try:
            size = os.stat(self.path).st_size
        except OSError as err:
            raise ShardError(f"{self.path} is gone: {err.strerror}", "run the command that writes it again") from err
        if size != self.index.tar_bytes:
            was = self.index.tar_bytes
            raise ShardError(f"{self.path} has {size} bytes, {was} when it was opened", "run the command that writes it again")

    @property
    def keys(self) -> list[str]:
        return self.index.keys

    def __len__(self) -> int:
        return len(self.index.keys)

    def read(self, i: int, member: str) -> bytes:
        """Return the bytes of a member of sample `i`."""
        if member not in self.index.offset:
            raise ShardError(f"{self.path} has no '{member}' (it has {', '.join(sorted(self.index.offset))})")
        start, size = int(self.index.offset[member][i]), int(self.index.size[member][i])
        return self.map[start : start + size]


class Split:
    """All shards of one split folder as one sequence; position i is the i-th sample in shard order."""

    def __init__(self, folder: Path, lost_too: bool = False):
        self.folder = folder
        paths = shard_paths(folder, lost_too)
        if not paths:
            raise ShardError(f"no shards in {folder}")
        self.shards = [Shard(p, lost_too) for p in paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def keys(self) -> list[str]:
        return [k for s in self.shards for k in s.keys]

    def locate(self, i: int) -> tuple[Shard, int]:
        """Return (shard, position inside it) of sample `i`."""
        s = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.shards[s], int(i - self.starts[s])

    def read(self, i: int, member: str) -> bytes:
        shard, j = self.locate(i)
        return shard.read(j, member)


def check_aligned(splits: dict[str, Split]) -> None:
    """Raise AlignmentError, naming shard and key, unless all splits hold the same keys in the same shards and order."""
    names = list(splits)
    first = splits[names[0]]
    for name in names[1:]:
        other = splits[name]
        if len(first.shards) != len(other.shards):
            raise AlignmentError(
                f"{names[0]} has {len(first.shards)} shards in {first.folder}, {name} has {len(other.shards)} in {other.folder}",
                f"run 'nano4m tokenize --modality {name}' again",
            )
        for a, b in zip(first.shards, other.shards, strict=True):
            if a.keys != b.keys:
                at = next((i for i, (x, y) in enumerate(zip(a.keys, b.keys, strict=False)) if x != y), None)
                place = (
                    f"sample {at} is '{a.keys[at]}' there and '{b.keys[at]}' here"
                    if at is not None
                    else f"{len(a)} samples there and {len(b)} here"
                )
                raise AlignmentError(
                    f"{b.path} ({name}) does not fit {a.path} ({names[0]}): {place}",
                    f"delete {b.path.parent} and run 'nano4m tokenize --modality {name}' again",
                )


def verify_shard(path: Path) -> int:
    """Scan a whole tar (not its index) and compare with the index; return the number of samples."""
    scanned, indexed = _scan(path), read_index(path)
    if scanned.keys != indexed.keys or any(
        not np.array_equal(scanned.offset[n], indexed.offset.get(n)) for n in scanned.offset
    ):
        raise ShardError(f"{index_path(path)} does not describe {path}", f"delete {index_path(path).name}")
    return len(scanned.keys)
