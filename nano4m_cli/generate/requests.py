"""Requests in bulk: a JSONL file in, a folder per request and a manifest out; killed and run again, it goes on.

A request's folder appears whole or not at all, and holds request.json: what was asked (with the hashes of the files it
names and of the model) and what was made. One that holds the same question is not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from nano4m_cli.config import build
from nano4m_cli.data._atomic import atomic_file, atomic_folder, write_json
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import DataError, Nano4MError, UsageError
from nano4m_cli.generate.best import Judge
from nano4m_cli.generate.command import GenerateReport, Prepared, Request, Studio
from nano4m_cli.train.run import open_run

BATCH = 64
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass
class Line:
    """A line of a requests file: its number, id, and the request, or what is wrong with it."""

    number: int
    id: str
    request: Request | None = None
    error: Nano4MError | None = None
    asked: str = ""  # fingerprint of the request and all that it depends on
    entry: dict[str, Any] | None = None  # what the manifest says of it, once it is made


@dataclass
class BulkReport:
    """made and kept: ids made now, and those that were there; samples and seconds of those made now."""

    run: str
    out: Path
    manifest: Path
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0

    @property
    def samples_per_s(self) -> float | None:
        return self.samples / self.seconds if self.samples else None


def read_requests(path: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """Return the lines of a requests file that are not blank; a bad one holds its error.

    Args:
        defaults: options for requests that do not say them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"cannot read '{path}': {err}", "give a file with one JSON request a line") from err
    out: list[Line] = []
    taken: dict[str, int] = {}
    for number, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        line = Line(number, f"{number:06d}")
        out.append(line)
        try:
            data = _object(content)
            line.id = _identity(data.pop("id", line.id), taken)
            taken[line.id] = number
            line.request = build(Request, {**defaults, **data}, f"request '{line.id}'")
        except Nano4MError as err:
            line.error = err
    if not out:
        raise UsageError(f"'{path}' holds no requests", 'one a line: {"from": {"caption": "a red cube"}, "to": "rgb"}')
    return out


def _object(content: str) -> dict[str, Any]:
    try:
        data = json.loads(content, object_pairs_hook=_once)
    except ValueError as err:
        raise UsageError(f"no JSON: {err}") from err
    if not isinstance(data, dict):
        raise UsageError("no JSON object", 'write {"from": {...}, "to": "rgb"}')
    return data


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose keys stand once each."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [k for k, _ in pairs]
        raise UsageError(f"key '{next(k for k in keys if keys.count(k) > 1)}' stands twice", "remove one of the two")
    return out


def _identity(given: Any, taken: Mapping[str, int]) -> str:
    if not isinstance(given, str) or not _ID.fullmatch(given):
        raise UsageError(f"id {given!r} names no folder", "use letters, digits, '_', '-' and '.'")
    if given in taken:
        raise UsageError(f"id '{given}' stands on line {taken[given]} already", "give each request its own")
    return given


def generate_requests(
    workspace: Workspace, run_name: str | None, path: Path, out: Path, defaults: Mapping[str, Any], device: str = "cpu",
    batch: int = BATCH, progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    judges: Callable[[DatasetFolder, str], Judge | None] | None = None, part: tuple[int, int] = (0, 1),
) -> BulkReport:
    """Make the requests of a file that are not made yet, `batch` samples at a time, and write the manifest.

    Those with the same targets and options stand together; conditions and seeds mix in every batch. Candidates of --best-of
    count as samples of a batch.

    Args:
        part: (i, n): the i-th of n jobs that share the lines out, counted from 0, and write to one folder. Each also puts what
            all have told so far together, so that the manifest of the last one that ends is whole.
    """
    lines = read_requests(path, defaults)[part[0] :: part[1]]
    studio = Studio(open_run(workspace, run_name, device), judges)
    report = BulkReport(studio.run.name, out, out / "manifest.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    mine = {line.id for line in lines}
    for left in (*out.glob(".*.part"), *out.glob(".*.old")):  # of a run that was killed
        if part[1] == 1 or left.name[1:].rsplit(".", 2)[0] in mine:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    model = _model_hash(studio)
    wanted = []
    for line in lines:
        if line.request is not None:
            line.asked = _fingerprint(line.request, model)
            line.entry = _finished(out / line.id, line.asked)
            (report.kept.append(line.id) if line.entry else wanted.append(line))
    wanted.sort(key=lambda line: json.dumps(_alike(line.request)))
    done, total = 0, sum(line.request.n for line in wanted)
    try:
        for some in _parts(wanted, batch):
            progress("generate", done, total)
            began = time.monotonic()
            for line, entry in _make(studio, some, out, batch):
                line.entry = entry
                report.made.append(line.id)
                report.samples += line.request.n
            report.seconds += time.monotonic() - began
            done += sum(line.request.n for line in some)
        progress("generate", done, total)
    finally:
        report.failed = [
            {"line": x.number, "id": x.id, "error": x.error.message, "hint": x.error.hint} for x in lines if x.error
        ]
        rows = [{"line": x.number, "id": x.id, **({"error": x.error.message} if x.error else x.entry)} for x in lines
                if x.error or x.entry]
        if part[1] == 1:
            _write_rows(report.manifest, rows)
        else:
            with FileLock(out / ".manifest.lock"):
                _write_rows(out / f".manifest-{part[0]}-of-{part[1]}.jsonl", rows)
                _merge(out, part[1], report.manifest)
    return report


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def _merge(out: Path, jobs: int, manifest: Path) -> None:
    """Write the manifest of what all jobs that share a file out have told, in the order of its lines."""
    rows = []
    for job in range(jobs):
        told = out / f".manifest-{job}-of-{jobs}.jsonl"
        rows += [json.loads(row) for row in told.read_text().splitlines()] if told.is_file() else []
    _write_rows(manifest, sorted(rows, key=lambda row: row["line"]))


def _make(studio: Studio, part: Sequence[Line], out: Path, batch: int) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Yield the lines that were made and what the manifest says of them; the others get their error."""
    ready: list[tuple[Line, Prepared]] = []
    for line in part:
        try:
            ready.append((line, studio.prepare(line.request)))
        except Nano4MError as err:
            line.error = err
    try:
        made = studio.make([prepared for _, prepared in ready], batch) if ready else []
    except Nano4MError as err:
        if len(ready) > 1:  # one that cannot be made stops no other
            for line, _ in ready:
                yield from _make(studio, [line], out, batch)
            return
        ready[0][0].error = err
        return
    for (line, _), one in zip(ready, made, strict=True):
        with atomic_folder(out / line.id) as folder:
            report = studio.write(one, folder)
            entry = _entry(report, line.request)
            write_json(folder / "request.json", {"asked": line.asked, "request": _alike(line.request, all_of_it=True), **entry})
        yield line, entry


def _entry(report: GenerateReport, request: Request) -> dict[str, Any]:
    ranked = {} if report.best is None else {"best_of": report.best}
    return {
        "files": [f.name for f in report.files], "samples": request.n, "seed": request.seed,
        "texts": [{"modality": m, "text": t} for m, t in report.texts], "notices": report.notices,
        "ids_per_call": report.ids_per_call, **ranked,
    }


def _finished(folder: Path, asked: str) -> dict[str, Any] | None:
    """Return what the manifest says of a request that was made already, or None."""
    try:
        data = json.loads((folder / "request.json").read_text())
        if data.pop("asked") == asked and all((folder / name).is_file() for name in data["files"]):
            return {k: v for k, v in data.items() if k != "request"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _alike(request: Request, all_of_it: bool = False) -> dict[str, Any]:
    """Return what two requests must have in common to go through every stage together (all_of_it: the whole request)."""
    return request.model_dump(
        mode="json", by_alias=True, exclude_unset=all_of_it,
        exclude=None if all_of_it else {"conditions", "away", "keep", "sample", "n", "seed", "best_of", "rank"},
    )


def _fingerprint(request: Request, model: str) -> str:
    """Return a hash of a request, of the files that it names, and of the model."""
    digest = hashlib.sha256(json.dumps([model, request.model_dump(mode="json", by_alias=True)], sort_keys=True).encode())
    regions = [r for _, r in (*request.keep, *(k for step in request.chain for k in step.keep))]
    for value in (*request.conditions.values(), *request.away.values(), *regions):
        digest.update(_content(value) if value else b"")
    return digest.hexdigest()


def _content(value: str) -> bytes:
    """Return the hash of the file that a value names, or nothing where it names none."""
    try:
        return hashlib.sha256(Path(value).read_bytes()).digest()
    except (OSError, ValueError):
        return b""


def _model_hash(studio: Studio) -> str:
    """Return a hash of the run's newest checkpoint."""
    digest = hashlib.sha256(studio.run.name.encode())
    for path in sorted(studio.run.checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _parts(lines: Sequence[Line], batch: int) -> Iterator[list[Line]]:
    """Yield runs of lines of at most `batch` samples (one with more is alone)."""
    part: list[Line] = []
    for line in lines:
        if part and sum(map(_drawn, part)) + _drawn(line) > batch:
            yield part
            part = []
        part.append(line)
    if part:
        yield part


def _drawn(line: Line) -> int:
    return line.request.n * line.request.best_of
