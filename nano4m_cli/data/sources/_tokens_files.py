"""Files behind the `tokens` source: where each sample's bytes are, and reading ids and texts without trusting them."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from nano4m_cli.errors import DataError, FetchError, MediaError, ShardError, TokenError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "eval": "val", "test": "test"}
SUFFIXES = (".npy", ".json", ".txt")


class Place(NamedTuple):
    """Where the bytes of one sample in one folder are; `member` is its name in a tar, "" for a file of its own."""

    path: str
    suffix: str
    size: int
    member: str = ""
    offset: int = 0

    @property
    def where(self) -> str:
        return f"{self.path}, '{self.member}'" if self.member else self.path

    def read(self) -> bytes:
        """Return the bytes; fewer than were listed are a FetchError."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as err:
            raise FetchError(f"cannot read {self.path}: {err.strerror}") from err
        if len(data) != self.size:
            raise FetchError(f"{self.where} changed while it was read: {len(data)} of {self.size} bytes are there", "fetch again")
        return data


def split_folders(root: Path) -> dict[str, Path]:
    """Return {"train": folder, ...} of the folders named as splits (`eval` is val), {} where there are none."""
    out: dict[str, Path] = {}
    for path in subfolders(root):
        split = SPLITS.get(path.name.lower())
        if split in out:
            raise FetchError(f"'{out[split]}' and '{path}' would both be the {split} split", "move one of them away")
        if split is not None:
            out[split] = path
    return {split: out[split] for split in ("train", "val", "test") if split in out}


def subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_folder(folder: Path) -> dict[str, Place]:
    """Return stem -> place of every .npy, .json and .txt below a folder, or in its tars; a stem that is there twice is an error."""
    out: dict[str, Place] = {}
    tars = sorted(folder.glob("*.tar"))
    loose = list(_in_folder(str(folder), ""))
    if tars and loose:
        raise FetchError(f"{folder} holds {tars[0].name} and {loose[0][1].path}", "keep either tars or files")
    for stem, place in (x for tar in tars for x in _in_tar(tar)) if tars else loose:
        if stem in out:
            raise FetchError(f"'{stem}' stands twice in {folder}: {out[stem].where} and {place.where}", "remove one of them")
        out[stem] = place
    return out


def _in_folder(folder: str, above: str) -> Iterator[tuple[str, Place]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            stem, suffix = os.path.splitext(entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _in_folder(entry.path, f"{above}{entry.name}/")
            elif suffix in SUFFIXES:
                if not entry.is_file():
                    raise FetchError(f"{entry.path} is a link to nothing", "copy the files it points to as well")
                yield above + stem, Place(entry.path, suffix, entry.stat().st_size)


def _in_tar(path: Path) -> Iterator[tuple[str, Place]]:
    """Yield the samples of a WebDataset shard from its headers: the stem ends at the first dot of a name."""
    try:
        total = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = PurePosixPath(info.name)
                if name.is_absolute() or ".." in name.parts:
                    raise ShardError(f"{path}: member '{info.name}' points out of the archive", "do not use this file")
                if info.isdir() or name.name.startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    raise ShardError(f"{path}: member '{info.name}' is not a plain file")
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError("unexpected end of data")
                first, _, rest = name.name.partition(".")
                suffix = "." + rest.rpartition(".")[2]
                if suffix in SUFFIXES:
                    stem = str(name.with_name(first))
                    yield stem, Place(str(path), suffix, info.size, str(name), info.offset_data)
            # tarfile takes a damaged header for the end: the end is where two blocks of zeros stand.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("a member's header is damaged, or the end is missing")
    except tarfile.TarError as err:
        raise ShardError(f"{path} is cut short or damaged: {err}", "copy it again from where it was made") from err
    except OSError as err:
        raise FetchError(f"cannot read {path}: {err.strerror}") from err


def read_array(data: bytes, where: str, kinds: str = "ui") -> np.ndarray:
    """Return the array in npy bytes, of integers unless `kinds` says otherwise; pickles are refused, cut files named."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as err:
        said = (str(err) or type(err).__name__).splitlines()[0]
        raise DataError(f"{where} is no npy file, or its head is damaged: {said}", "copy it again") from err
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects (a pickle), which are never read", "save it again as integers")
    if dtype.kind not in kinds:
        raise TokenError(f"{where} holds {dtype}, not integers", "folders that are no ids are left out by modalities=[...]")
    there, wanted = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if there != wanted:
        raise DataError(f"{where} is cut or damaged: {there} bytes after its head, {wanted} expected", "copy it again")
    if not wanted:
        raise DataError(f"{where} holds no ids: its shape is {shape}")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def read_texts(data: bytes, suffix: str, where: str) -> list[str]:
    """Return the captions in a file: .txt, or json of a text, of {"text" or "caption": text}, or of a list of these."""
    try:
        text = data.decode("utf-8")
        value = text.rstrip("\r\n") if suffix == ".txt" else json.loads(text)
        texts = [_text(v) for v in (value if isinstance(value, list) else [value])]
        "".join(texts).encode()  # json can spell halves of characters
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        what = "not UTF-8" if isinstance(err, UnicodeError) else f"no caption: {err}"
        hint = 'a caption is text, {"text": ...}, {"caption": ...} or a list of them'
        raise MediaError(f"{where} is {what}", hint) from err
    if not texts:
        raise MediaError(f"{where} is an empty list of captions")
    return texts


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = value["text"] if "text" in value else value["caption"]
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is not text")
    return value


def listed_splits(root: Path) -> dict[str, str]:
    """Return stem -> split of the splits.json beside the folders ({} without one); a stem in two of them is an error."""
    path, out = root / "splits.json", {}
    if not path.is_file():
        return {}
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
        lists = doc.get("splits", doc)
        for name, stems in lists.items():
            if (split := SPLITS.get(name.lower())) is None or not isinstance(stems, list):
                continue
            for stem in stems:
                if out.setdefault(str(stem), split) != split:
                    raise FetchError(f"{path} has '{stem}' in {out[str(stem)]} and in {split}", "a sample belongs to one split")
    except (ValueError, AttributeError, RecursionError) as err:
        raise FetchError(f"{path} is no list of splits: {err}", "mend it, or move it away to go by the folders alone") from err
    return out
