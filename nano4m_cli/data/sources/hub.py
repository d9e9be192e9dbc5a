"""Data sets of the Hugging Face hub, or any archive by address or path: media, WebDataset shards, parquet, texts."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.download import digest, download
from nano4m_cli.data.sources import _base, folder, text
from nano4m_cli.data.sources._base import DatasetInfo, Failure, Sample, ShardPlan
from nano4m_cli.data.sources._documents import Documents, Part
from nano4m_cli.data.sources._folder_items import Item, by_csv, by_stem, captioned, split_of
from nano4m_cli.data.sources._hub_snapshot import choose, get, look_up
from nano4m_cli.data.sources._hub_unpack import TEXTS, is_media, readable, unpack
from nano4m_cli.errors import FetchError, did_you_mean

SPLIT_NAME = re.compile(r"(?:^|[^a-z])(train|training|test|testing|val|valid|validation|dev|eval|evaluation)(?![a-z])")
OF_TEXT = {"chars", "separator", "limit"}
OF_BOTH = {"path", "id", "url", "revision", "files", "sha256", "max_gb", "name", "text", "val", "test", "shard_size", "broken"}


class Source(_base.Source):
    """A snapshot is pinned when it is first looked at; what it holds then goes the way of `folder` or of `text`.

    Splits that the names of folders and files tell (train/, validation-00000.tar) are kept; of val and test what is missing
    is dealt out from the rest. No script and no pickle is read.
    """

    class Options(folder.Source.Options):
        """What to fetch; the other options are those of `folder`. Give one of id, url and path.

        Attributes:
            id: OWNER/NAME of a data set repository on the hub (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are heeded).
            revision: branch, tag or commit; a branch stays at the commit that it had when it was first looked at.
            files: patterns of the files to take, e.g. ["data/train-0000*", "*.csv"]; all that can be read by default.
            url, path: address or path of a zip or tar of media instead, or of a table of texts.
            sha256: what the file at `url` or `path` must have.
            max_gb: larger downloads are refused, and archives that unpack to more.
            text: the column of captions; where there are no media, that of the texts ("text" by default).
            chars: characters per passage of a text; 0: whole documents.
            separator: what stands between the documents of a .txt file, e.g. "<|endoftext|>".
            limit: documents per split at most.
        """

        path: str = ""
        id: str | None = None
        url: str | None = None
        revision: str = "main"
        files: list[str] = []
        sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
        max_gb: float = Field(50, gt=0)
        chars: int = Field(256, ge=0)
        separator: str | None = Field(None, min_length=1)
        limit: int | None = Field(None, ge=1)

        @field_validator("files", mode="before")
        @classmethod
        def _one(cls, value: Any) -> Any:
            return [value] if isinstance(value, str) else value

    version = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "cache": self.cache}

    @property
    def tolerant(self) -> bool:
        return self.options.broken == "skip"

    # -- what is there --------------------------------------------------------------------------------------------

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        o = self.options
        if sum(map(bool, (o.id, o.url, o.path))) != 1:
            raise FetchError("a source is needed, and one only", "give id=OWNER/NAME, url=https://... or path=FILE")
        self.__dict__.pop("inner", None)
        doc = _read(self._record)
        if not doc or doc["retry"] or not _whole(Path(doc["view"])):
            doc = self._from_hub(progress) if o.id else self._from_file(progress)
            write_json(self._record, doc)
        self.inner.prepare(progress)

    @property
    def _record(self) -> Path:
        """Where is written down what these options gave: folder, kind, commit, failures."""
        decide = {"id", "url", "path", "revision", "files", "sha256", "csv", "separator"}
        asked = self.options.model_dump(mode="json", include=decide)
        if self.options.path:
            stat = self._file.stat()
            asked["stat"] = stat.st_mtime_ns, stat.st_size
        return self.cache / f"made-{hashlib.sha256(json.dumps([self.version, asked]).encode()).hexdigest()[:24]}.json"

    @property
    def _file(self) -> Path:
        path = Path(self.options.path).expanduser()
        if path.is_dir():
            other = "for media: nano4m fetch folder path=DIR; for text: nano4m fetch text path=DIR"
            raise FetchError(f"'{path}' is a folder", other)
        if not path.is_file():
            raise FetchError(f"no file '{path}'")
        return path

    def _from_hub(self, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        o = self.options
        snapshot = look_up(o.id, o.revision, self.cache)
        chosen = choose(snapshot, o.files, lambda n: readable(n) or n == o.csv)
        paths, failures = get(snapshot, chosen, o.max_gb * 1e9, progress)
        key = hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]
        left = sorted({Path(f.name).suffix for f in snapshot.files if not readable(f.name)} - {"", ".md", ".gitattributes"})
        notes = [f"{o.id} at commit {snapshot.commit} of the Hugging Face hub"]
        notes += [f"licence: {snapshot.licence}"] if snapshot.licence else []
        notes += [f"not read: {', '.join(left)}"] if left else []
        what = {"id": o.id, "commit": snapshot.commit, "files": o.files}
        return self._unpacked(paths, snapshot.place / f"view-{key}", failures, progress, o.id.split("/")[-1], what, notes)

    def _from_file(self, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        o = self.options
        if o.url:
            name = Path(unquote(urlsplit(o.url).path)).name or "archive"
            place = self.cache / "urls" / hashlib.sha256(o.url.encode()).hexdigest()[:16] / name
            path = download(o.url, place, o.sha256, lambda done, total: progress("bytes", done, total),
                            max_bytes=int(o.max_gb * 1e9), hint="fetch again, or download it yourself and give path=FILE")
        else:
            path = self._file
        found = digest(path)
        if o.sha256 and found != o.sha256:
            raise FetchError(f"{path} is not the expected file: sha256 {found}, expected {o.sha256}")
        view = self.cache / f"view-{found[:24]}"
        name = re.sub(r"\.(zip|tgz|parquet|tar(\.\w+)?|(csv|txt|jsonl)(\.gz)?)$", "", path.name, flags=re.I)
        what = {"file_sha256": found}
        return self._unpacked({path.name: path}, view, [], progress, name, what, [o.url or path.name], flat=True)

    def _unpacked(
        self, paths: dict[str, Path], view: Path, failures: list[Failure], progress: Callable[[str, int, int], None], name: str,
        what: dict[str, Any], notes: list[str], flat: bool = False,
    ) -> dict[str, Any]:
        """Return the record of what was made of some files; it says of what kind it is: "media", "text" or "documents"."""
        retry = bool(failures)
        failures = failures + unpack(paths, view, self.options.max_gb * 1e9, progress, flat)
        there = [p for p in sorted(view.rglob("*")) if p.is_file()]
        texts = [p for p in there if p.name.lower().endswith(TEXTS)]
        running = all(p.suffix == ".txt" and not split_in(p.relative_to(view)) for p in texts) and not self.options.separator
        kind = "media" if self.options.csv or any(map(is_media, there)) else "text" if running else "documents"
        if kind != "media" and not texts:
            listed = "; ".join(f"{f.file}: {f.reason}" for f in failures[:5])
            raise FetchError(f"nothing of '{name}' can be used" + (f": {listed}" if listed else ""))
        return {"view": str(view), "kind": kind, "name": name, "what": what, "notes": notes, "retry": retry,
                "failures": [f._asdict() for f in failures]}

    @cached_property
    def inner(self) -> _base.Source:
        """The source that goes on from the folder that was made."""
        o, doc = self.options, _read(self._record)
        media, view = doc["kind"] == "media", Path(doc["view"])
        wrong = sorted((o.model_fields_set & OF_TEXT) if media else o.model_fields_set - OF_TEXT - OF_BOTH)
        if doc["kind"] == "text":
            wrong = sorted(o.model_fields_set - {"chars"} - (OF_BOTH - {"text"}))
        if wrong:
            kind = "media" if media else "texts"
            raise FetchError(f"'{doc['name']}' holds {kind}, for which {', '.join(wrong)} means nothing")
        if media:
            asked = o.model_fields_set | {"settings"}
            given = {k: getattr(o, k) for k in Media.Options.model_fields if k in asked} | {"path": str(view)}
            return Media(Media.Options(**given), self.cache)
        name = o.name or text.default_name(Path(doc["name"] + ".x"))
        if doc["kind"] == "text":
            given = {"chars": o.chars, "val": o.val, "test": o.test, "name": name, "shard_size": o.shard_size}
            return text.Source(text.Source.Options(path=str(view), **given), self.cache)
        given = {k: getattr(o, k) for k in Texts.Options.model_fields if hasattr(o, k)}
        return Texts(Texts.Options(**given), self.cache, view, name, o)

    # -- the data set ---------------------------------------------------------------------------------------------

    def failures(self) -> list[Failure]:
        return [Failure(**f) for f in _read(self._record)["failures"]] + self.inner.failures()

    def left_out(self) -> list[dict[str, Any]]:
        return self.inner.left_out()

    def info(self) -> DatasetInfo:
        doc, made = _read(self._record), self.inner.info()
        notes = made.notes.replace(f" of {Path(doc['view']).name}", f" of {doc['name']}", 1)
        return made.model_copy(update={
            "name": self.options.name or text.default_name(Path(doc["name"] + ".x")), "source": "hub", "version": self.version,
            "options": made.options | doc["what"], "notes": ". ".join([*doc["notes"], notes]),
        })  # fmt: skip

    def plan(self) -> list[ShardPlan]:
        return self.inner.plan()

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        return self.inner.samples(plan)


class Media(folder.Source):
    """A folder as repositories lay it out: tables named metadata.csv beside media, and splits told by names."""

    @cached_property
    def _found(self) -> tuple[list[Item], list[Failure]]:
        o, view = self.options, Path(self.options.path)
        if o.csv:
            items, failures = super()._found
            return _kept(items, failures, view if (view / o.csv).is_file() else None)
        items, failures = [], []
        for table in sorted(view.rglob("metadata.csv")):
            found, failed = _kept(*by_csv(table.parent, table, o), view)
            inside = table.parent.relative_to(view).as_posix().removeprefix(".")
            items += [replace(i, id=f"{inside}/{i.id}".lstrip("/")) for i in found]
            failures += [f._replace(file=f"{inside}/{f.file}".lstrip("/")) for f in failed]
        named = {str(Path(p).resolve()) for i in items for p in i.files.values()}
        rest, failed = by_stem(view)
        items += [i for i in rest if not named & {str(Path(p).resolve()) for p in i.files.values()}]
        said = lambda i: " ".join(i.labels.get(o.text or "", "").split()) or None  # noqa: E731
        items = [replace(i, caption=i.caption or said(i)) for i in items]
        if o.text and not any(i.caption for i in items):
            raise FetchError(f"no item has '{o.text}' (text=)", did_you_mean(o.text, {c for i in items for c in i.labels}))
        split = [i.split or ((told := split_in(Path(i.id).parent)) and split_of(told, o)) or None for i in items]
        if not {"val", "test"} <= set(split):  # what is missing is dealt out from what is no other split's
            split = [s if s in ("val", "test") else None for s in split]
        return captioned([replace(i, split=s) for i, s in zip(items, split, strict=True)], o.caption), failures + failed


def _kept(items: list[Item], failures: list[Failure], view: Path | None) -> tuple[list[Item], list[Failure]]:
    """Return the items whose files lie in the folder: a table from elsewhere may not name files of this machine."""
    home = view and os.path.abspath(view) + os.sep
    out = {i.id for i in items if home and not all(os.path.abspath(p).startswith(home) for p in i.files.values())}
    return [i for i in items if i.id not in out], failures + [Failure(i, "lies outside of the data set") for i in sorted(out)]


class Texts(Documents):
    """The tables of texts in a folder."""

    class Options(Documents.Options):
        val: float = Field(0.05, ge=0, lt=1)
        test: float = Field(0.05, ge=0, lt=1)

    def __init__(self, options: Options, cache: Path, view: Path, name: str, asked: Source.Options):
        super().__init__(options, cache)
        self.view, self.name, self.max_bytes = view, name, asked.max_gb * 1e9
        self.column, self.separator = asked.text, asked.separator

    def parts(self) -> list[Part]:
        o, found = self.options, [p for p in sorted(self.view.rglob("*")) if p.is_file() and p.name.lower().endswith(TEXTS)]
        told = {p: split_of(name, _Usual) if (name := split_in(p.relative_to(self.view))) else None for p in found}
        given = set(told.values())
        rest = (0.0 if "val" in given else o.val, 0.0 if "test" in given else o.test)
        shares = {"val": (1.0, 0.0), "test": (0.0, 1.0)}
        return [Part(p.relative_to(self.view).as_posix(), p, *shares.get(told[p], rest)) for p in found]

    def about(self) -> dict[str, Any]:
        told = {"val": self.options.val, "test": self.options.test, "text": self.column, "separator": self.separator}
        return {"name": self.name, "source": "hub", "options": told, "notes": ""}


class _Usual:
    test_values, val_values = ("test",), ("val",)


def split_in(name: Path) -> str | None:
    """Return the split that the names of a path tell ("train2017", "data/validation-00000-of-00001"): the outermost."""
    found = next((m for part in name.parts if (m := SPLIT_NAME.search(part.lower()))), None)
    return found[1] if found else None


def _whole(view: Path) -> bool:
    """Return whether a folder is there, and what its links point to (the hub's cache may have been tidied)."""
    return view.is_dir() and all(p.exists() for p in view.rglob("*"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
