"""Texts of many documents (stories, articles, rows of a table) as samples of running text, read once and in bounded memory.

Which split a document belongs to is decided by its words: the same words never stand in two splits, nor twice in a held-out
one. Files that are held out come first, and what stands in them is left out of the others.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources._base import DatasetInfo, Failure, Sample, ShardPlan
from nano4m_cli.data.sources._hub_unpack import batches, open_parquet
from nano4m_cli.errors import DataError, FetchError, did_you_mean
from nano4m_cli.modalities.text import MODALITY as TEXT

SPLITS = ("train", "val", "test")
BLOCK = 1 << 20
LONGEST = 64 << 20  # bytes of one line or document: a file that never ends is not read into memory
COLUMNS = 5  # of the index: offset, bytes, file, document, first character


class Part(NamedTuple):
    """A file of documents, and the shares of them that are held out: (1, 0) where all are val, (0, 0) where none is."""

    name: str
    path: Path
    val: float
    test: float


class Documents(_base.Source):
    """Documents are copied to one file per split in the cache, from which shards are made in any order."""

    class Options(Config):
        chars: int = Field(256, ge=0)
        limit: int | None = Field(None, ge=1)
        shard_size: int = Field(1000, ge=1)

    column: str | None = None  # of tables
    separator: str | None = None  # of documents in .txt files
    max_bytes: float = float("inf")  # of text; a small file may hold much, where it is compressed
    cut_ends: bool = False  # whether files begin and end within a document, which is left out

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "cache": self.cache}  # workers need no more: a plan says where texts lie

    @abstractmethod
    def parts(self) -> list[Part]:
        """Return the files to read (after `prepare` had them fetched)."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return name, source, options and notes of the data set."""

    @cached_property
    def _folder(self) -> Path:
        """Where what exactly these files and options give is kept."""
        stats = [(*p[:1], *p[2:], (s := p.path.stat()).st_size, s.st_mtime_ns) for p in self.parts()]
        asked = (self.options.chars, self.options.limit, self.column, self.separator)
        return self.cache / f"texts-{hashlib.sha256(repr((self.version, stats, asked)).encode()).hexdigest()[:24]}"

    @cached_property
    def _record(self) -> dict[str, Any]:
        return json.loads((self._folder / "record.json").read_text())

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        for name in ("_folder", "_record"):
            self.__dict__.pop(name, None)
        if not (self._folder / "record.json").is_file():
            with atomic_folder(self._folder) as aside:
                write_json(aside / "record.json", self._copy(aside, progress))
        told, parts = self._record["documents"], self.parts()
        for split, share in (("train", 1), ("val", sum(p.val for p in parts)), ("test", sum(p.test for p in parts))):
            if share and not told[split]:
                raise FetchError(f"{', '.join(p.name for p in parts[:3])}: {sum(told.values())} documents, none for {split}",
                                 "take more, or val=0 test=0" if split != "train" else "look at text= and separator=")

    def _copy(self, folder: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Write the passages of each split to "<split>.txt" with an index; return what the data set needs to know of them."""
        o, parts = self.options, self.parts()
        held: set[bytes] = set()
        documents, passages = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        digest, failures, repeated = hashlib.sha256(), [], 0
        with contextlib.ExitStack() as stack:
            out = {s: stack.enter_context(open(folder / f"{s}.txt", "wb")) for s in SPLITS}
            index = {s: stack.enter_context(open(folder / f"{s}.index", "wb")) for s in SPLITS}
            for number in sorted(range(len(parts)), key=lambda i: (-parts[i].val - parts[i].test, -parts[i].test, i)):
                part, seen, bad = parts[number], 0, []
                try:
                    for place, text in read(part.path, part.name, self.column, self.separator, o.chars, self.cut_ends, bad):
                        words = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
                        split = deal(words, part.val, part.test)
                        repeated += words in held
                        seen += 1
                        if seen % 20_000 == 0:
                            progress(f"documents of {part.name}", seen, 0)
                        if words in held:
                            continue
                        if split != "train":
                            held.add(words)
                        if o.limit is not None and documents[split] >= o.limit:
                            if all(documents[s] >= o.limit for s, share in _shares(part) if share):
                                break
                            continue
                        documents[split] += 1
                        for start in range(0, len(text), o.chars or len(text)):
                            data = text[start : start + (o.chars or len(text))].encode()
                            array("q", (out[split].tell(), len(data), number, place, start)).tofile(index[split])
                            out[split].write(data)
                            digest.update(b"%d %s" % (len(data), split.encode()) + data)
                            passages[split] += 1
                        if out["train"].tell() + out["val"].tell() + out["test"].tell() > self.max_bytes:
                            much = f"holds more than {self.max_bytes / 1e9:g} GB of text"
                            raise FetchError(much, "raise max_gb, or give limit=N")
                except DataError as err:
                    failures.append((part.name, err.message))
                except FetchError as err:
                    raise FetchError(f"{part.name}: {err.message}", err.hint) from err
                if bad:
                    failures.append((part.name, f"{len(bad)} of its documents could not be read, the first: {bad[0]}"))
                progress(f"documents of {part.name}", max(seen, 1), max(seen, 1))
        return {"documents": documents, "passages": passages, "repeated": repeated, "sha256": digest.hexdigest(),
                "names": [p.name for p in parts], "failures": failures}

    def failures(self) -> list[Failure]:
        return [Failure(*f) for f in self._record["failures"]]

    def info(self) -> DatasetInfo:
        o, told, about = self.options, self._record, self.about()
        notes = [about.pop("notes"), f"{sum(told['documents'].values())} documents"
                 + (f", cut every {o.chars} characters" if o.chars else ", whole")]
        if told["repeated"]:
            notes.append(f"{told['repeated']} were left out, as their words stand in val or test already")
        limits = {"tokenizers": {"text": {"max_length": o.chars + 1}}} if o.chars else {}
        given = o.model_dump(mode="json", include=set(Documents.Options.model_fields))
        options = given | about.pop("options") | {"sha256": told["sha256"]}
        return DatasetInfo(
            **(limits | about), options=options, version=self.version, modalities=["text"], splits=told["passages"],
            notes=". ".join(filter(None, notes)) + ".",
        )

    def plan(self) -> list[ShardPlan]:
        """Return the shards; `items` is (folder in the cache, first passage, end)."""
        size, plans = self.options.shard_size, []
        for split, total in self._record["passages"].items():
            for index, first in enumerate(range(0, total, size)):
                end = min(first + size, total)
                plans.append(ShardPlan(split, index, (str(self._folder), first, end), end - first))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        folder, first, end = Path(plan.items[0]), *plan.items[1:]
        names = json.loads((folder / "record.json").read_text())["names"]
        rows = np.fromfile(folder / f"{plan.split}.index", np.int64, (end - first) * COLUMNS, offset=first * COLUMNS * 8)
        with open(folder / f"{plan.split}.txt", "rb") as file:
            for index, (offset, size, part, place, start) in enumerate(rows.reshape(-1, COLUMNS).tolist(), first):
                file.seek(offset)
                text = file.read(size).decode()
                labels = {"objects": [], "fields": [], "file": names[part], "document": place, "start": start}
                members = {TEXT.ext: TEXT.to_bytes(text), "labels.json": json.dumps(labels).encode()}
                yield Sample(f"{plan.split}-{index:08d}", members)


def deal(digest: bytes, val: float, test: float) -> str:
    """Return the split of a document: where its digest, as a number in [0, 1), falls among the shares."""
    at = int.from_bytes(digest[:6], "big") / 2**48
    return "test" if at < test else "val" if at < val + test else "train"


def _shares(part: Part) -> tuple[tuple[str, float], ...]:
    return ("train", 1 - part.val - part.test), ("val", part.val), ("test", part.test)


# -- files ------------------------------------------------------------------------------------------------------------


def read(
    path: Path, name: str, column: str | None, separator: str | None, chars: int, cut_ends: bool, bad: list[str]
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the documents of a .txt, .jsonl, .csv (also .gz) or .parquet file; blank ones are passed over.

    Args:
        column: of tables; "text" by default.
        separator: of documents in .txt files; without one a file is read as blocks of whole passages.
        bad: gets what is wrong with single documents. What is wrong with the file is a DataError.
    """
    low = name.lower().removesuffix(".gz")
    try:
        if low.endswith(".parquet"):
            found = _rows(path, column)
        else:
            with (gzip.open if name.lower().endswith(".gz") else open)(path, "rb") as file:
                texts = _lines(file, column) if low.endswith(".jsonl") else _csv(file, column) if low.endswith(".csv") else (
                    _pieces(file, separator.encode(), cut_ends) if separator else _blocks(file, chars))
                yield from _whole(texts, bad)
            return
        yield from _whole(found, bad)
    except (gzip.BadGzipFile, EOFError, csv.Error) as err:
        raise DataError(f"is damaged: {err}") from err
    except UnicodeDecodeError as err:
        raise DataError(f"is not UTF-8 text: {err.reason}") from err


def _whole(texts: Iterator[tuple[Any, str]], bad: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the texts that can be stored; `texts` gives (value, where)."""
    for number, (value, where) in enumerate(texts):
        if isinstance(value, bytes):
            try:
                value = value.decode().strip()
            except UnicodeDecodeError as err:
                bad.append(f"{where} is not UTF-8 text: {err.reason}")
                continue
        if value is not None and not isinstance(value, str):
            wrong = value.args[0] if isinstance(value, ValueError) else f"is {type(value).__name__}, no text"
            bad.append(f"{where} {wrong}")
        elif value and not value.isspace():
            try:
                value.encode()
            except UnicodeEncodeError:
                bad.append(f"{where} holds half a character")
                continue
            yield number, value


def _pieces(file: Any, separator: bytes, cut_ends: bool) -> Iterator[tuple[bytes, str]]:
    """Yield what stands between separators; with `cut_ends` neither what is before the first nor what is after the last."""
    rest, number = b"", 0
    while block := file.read(BLOCK):
        *pieces, rest = (rest + block).split(separator)
        for piece in pieces:
            if number or not cut_ends:
                yield piece, f"document {number}"
            number += 1
        if len(rest) > LONGEST:
            raise DataError(f"has more than {LONGEST:,} bytes without '{separator.decode()}'")
    if not cut_ends:
        yield rest, f"document {number}"


def _blocks(file: Any, chars: int) -> Iterator[tuple[str, str]]:
    size = max(BLOCK // chars, 1) * chars if chars else LONGEST
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    number = 0
    while block := text.read(size):
        yield block, f"block {number}"
        number += 1


def _lines(file: Any, column: str | None) -> Iterator[tuple[Any, str]]:
    checked, number = False, 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise DataError(f"line {number} has more than {LONGEST:,} bytes")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            yield ValueError(f"is no JSON: {err}"), f"line {number}"
            continue
        if isinstance(row, dict):
            name = column or "text"
            if name not in row and not checked:
                raise _no_column(column, list(row))
            row = row.get(name)
        checked = True
        yield row, f"line {number}"


def _csv(file: Any, column: str | None) -> Iterator[tuple[Any, str]]:
    table = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    name = column or "text"
    if name not in (table.fieldnames or ()):
        raise _no_column(column, list(table.fieldnames or ()))
    for row in table:
        yield row[name], f"line {table.line_num}"


def _rows(path: Path, column: str | None) -> Iterator[tuple[Any, str]]:
    file, name, number = open_parquet(path), column or "text", 0
    if name not in file.schema_arrow.names:
        raise _no_column(column, file.schema_arrow.names)
    for rows in batches(file, [name]):
        for row in rows:
            yield row[name], f"row {number}"
            number += 1


def _no_column(column: str | None, known: list[str]) -> FetchError:
    if column:
        return FetchError(f"no column '{column}'", did_you_mean(column, known))
    return FetchError(f"no column 'text' (there are {', '.join(known[:20])})", "say which holds the text: text=COLUMN")
