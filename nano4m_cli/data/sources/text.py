"""Running text from your own UTF-8 files, cut into passages: a data set for language models.

Every file is split by position: its first part is train, then come val and test (by default 90, 5 and 5 % of its
characters), so no character stands in two splits. A split's part is cut every `chars` characters from its start, wherever
that falls in a word; the last passage is what is left. Hence the passages of a split in order (files sorted by path) are
its text again. Nothing is changed: newlines, case and white space stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from nano4m_cli.config import Config
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources._base import DatasetInfo, Sample, ShardPlan
from nano4m_cli.errors import FetchError, MediaError
from nano4m_cli.modalities.text import MODALITY as TEXT

SPLITS = ("train", "val", "test")
HINT = "give path=FILE, or path=FOLDER with .txt files"


class Document(NamedTuple):
    """A file as it is split: its name below the path given, and its number of characters."""

    name: str
    length: int


class Source(_base.Source):
    """Passages of the files; a file is read whole."""

    class Options(Config):
        """What to cut, and how.

        Attributes:
            path: a text file, or a folder whose .txt files (at any depth) are taken.
            chars: characters per passage.
            val, test: shares of each file's characters; the rest, in front, is train.
            name: of the data set; the file's name without its suffix, or the folder's.
            shard_size: passages per shard.
        """

        path: str
        chars: int = Field(256, ge=1)
        val: float = Field(0.05, ge=0, lt=1)
        test: float = Field(0.05, ge=0, lt=1)
        name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        shard_size: int = Field(1000, ge=1)

        @model_validator(mode="after")
        def _leaves_train(self):
            if self.val + self.test >= 1:
                raise ValueError(f"val ({self.val}) and test ({self.test}) leave nothing to train on")
            return self

    @property
    def path(self) -> Path:
        return Path(self.options.path).expanduser()

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        for split, share in (("train", 1.0), ("val", self.options.val), ("test", self.options.test)):
            if share and not self._passages(split):
                raise FetchError(
                    f"'{self.path}' is too short: {sum(d.length for d in self._documents()[0])} characters, none for {split}",
                    f"give more text, or {split}=0" if split != "train" else "give more text",
                )

    def _documents(self) -> tuple[tuple[Document, ...], str]:
        """Return the files and the digest of their names and content."""
        found = _files(self.path)
        return _scan(tuple(found.items()), tuple(_stamp(p) for p in found.values()))

    def _passages(self, split: str) -> list[tuple[str, int, int, int]]:
        """Return per file (name, start, end, number of passages) of its part in a split; files without any are left out."""
        parts = []
        for document in self._documents()[0]:
            start, end = bounds(document.length, self.options.val, self.options.test)[split]
            if end > start:
                parts.append((document.name, start, end, -(-(end - start) // self.options.chars)))
        return parts

    def info(self) -> DatasetInfo:
        o, (documents, digest) = self.options, self._documents()
        files = f"{len(documents)} files" if len(documents) > 1 else documents[0].name
        return DatasetInfo(
            name=o.name or default_name(self.path),
            source="text",
            options=o.model_dump(mode="json", exclude={"path", "name"}) | {"files": len(documents), "sha256": digest},
            version=self.version,
            modalities=["text"],
            splits={split: sum(n for *_, n in self._passages(split)) for split in SPLITS},
            tokenizers={"text": {"max_length": o.chars + 1}},
            notes=f"{files}, {sum(d.length for d in documents)} characters in all; each file split by position, cut every "
            f"{o.chars} characters.",
        )

    def plan(self) -> list[ShardPlan]:
        """Return the shards; `items` is (first passage, end) within the split."""
        size, plans = self.options.shard_size, []
        for split, total in self.info().splits.items():
            for index, first in enumerate(range(0, total, size)):
                end = min(first + size, total)
                plans.append(ShardPlan(split, index, (first, end), end - first))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        (first, last), chars, at, found = plan.items, self.options.chars, 0, _files(self.path)
        for name, start, end, n in self._passages(plan.split):
            mine = range(max(first, at), min(last, at + n))
            text = read(found[name]) if mine else ""
            for index in mine:
                a = start + (index - at) * chars
                b = min(a + chars, end)
                labels = {"objects": [], "fields": [], "file": name, "start": a, "end": b}
                members = {TEXT.ext: TEXT.to_bytes(text[a:b]), "labels.json": json.dumps(labels).encode()}
                yield Sample(f"{plan.split}-{index:08d}", members)
            at += n


def bounds(length: int, val: float, test: float) -> dict[str, tuple[int, int]]:
    """Return per split the (start, end) of its characters in a file of that length."""
    a, b = round(length * (1 - val - test)), round(length * (1 - test))
    return {"train": (0, a), "val": (a, b), "test": (b, length)}


def default_name(path: Path) -> str:
    """Return a data set's name made from the file's or folder's."""
    path = path.resolve()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name if path.is_dir() else path.stem).strip("-_.") or "text"


def read(path: Path) -> str:
    """Return a file's text; an empty or binary file and one that is not UTF-8 is a MediaError that says where."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise FetchError(f"cannot read '{path}': {err.strerror}", HINT) from err
    if not data:
        raise MediaError(f"'{path}' is empty (0 bytes)", "take it out, or put some text in")
    if (zero := data.find(0)) >= 0:
        raise MediaError(f"'{path}' is binary, not text: byte {zero} is zero", "give UTF-8 text (UTF-16 has to be converted)")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise MediaError(
            f"'{path}' is not UTF-8 text: byte {err.start} is 0x{data[err.start]:02x} ({err.reason})",
            "convert it, e.g. with iconv -f latin1 -t utf-8",
        ) from err


def _files(path: Path) -> dict[str, Path]:
    """Return the text files by name below `path`, sorted."""
    if not path.exists():
        raise FetchError(f"no file or folder '{path}'", HINT)
    if not path.is_dir():
        return {path.name: path}
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*.txt") if p.is_file()}
    if not found:
        raise FetchError(f"'{path}' holds no .txt file", HINT)
    return dict(sorted(found.items()))


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4)
def _scan(files: tuple[tuple[str, Path], ...], stamps: tuple[tuple[int, int], ...]) -> tuple[tuple[Document, ...], str]:
    """Return the documents and the sha256 of their names and content. `stamps` tells changed files apart."""
    documents, digest = [], hashlib.sha256()
    for name, path in files:
        text = read(path)
        documents.append(Document(name, len(text)))
        digest.update(f"{name}\0".encode() + hashlib.sha256(text.encode()).digest())
    return tuple(documents), digest.hexdigest()
