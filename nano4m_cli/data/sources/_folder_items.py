"""What a folder of media holds: items, each a few files that belong together, with caption, labels and split."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nano4m_cli.data.sources._base import Failure
from nano4m_cli.errors import DataError, FetchError, did_you_mean
from nano4m_cli.registry import MODALITIES

SUFFIXES = {
    "video": {".mp4", ".mkv", ".webm", ".mpg", ".mpeg", ".mov", ".avi", ".m4v"},
    "audio": {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aiff"},
    "rgb": {".png", ".jpg", ".jpeg", ".webp", ".bmp"},
    "text": {".txt", ".json"},
}
ROLE = {suffix: role for role, suffixes in SUFFIXES.items() for suffix in suffixes}
FILE_COLUMNS = ("file", "path", "filename", "file_name", "video", "audio", "rgb", "image", "depth", "normal", "edges")
TEXT_COLUMNS = ("caption", "text", "transcript")


@dataclass(frozen=True)
class Item:
    """Files by role ("video", "audio" or an image modality), and what is said of them. Picklable.

    group: items of one group go to one split (None: its content is its group). start, end: seconds of the part of the
    files that is meant (end None: to their end).
    """

    id: str
    files: dict[str, str] = field(default_factory=dict)
    caption: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    group: str | None = None
    start: float = 0.0
    end: float | None = None


def by_stem(folder: Path) -> tuple[list[Item], list[Failure]]:
    """Return the items of a folder: files of one path but for the suffix belong together (x.mp4, x.depth.png, x.txt)."""
    items: dict[str, Item] = {}
    failures: list[Failure] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        suffix = path.suffix.lower()
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or suffix not in ROLE:
            continue
        role, stem = ROLE[suffix], name[: -len(suffix)]
        inner = Path(stem).suffix[1:]  # x.depth.png
        if role == "rgb" and inner in MODALITIES and MODALITIES.get(inner).kind == "image":
            role, stem = inner, stem[: -len(inner) - 1]
        item = items.setdefault(stem, Item(stem))
        try:
            items[stem] = _with_text(item, path) if role == "text" else _with_file(item, role, path)
        except DataError as err:
            failures.append(Failure(name, err.message))
    return [i for i in items.values() if i.files], failures


def _with_file(item: Item, role: str, path: Path) -> Item:
    if role in item.files:
        raise DataError(f"a second {role} of '{item.id}', beside {Path(item.files[role]).name}")
    return replace(item, files={**item.files, role: str(path)})


def _with_text(item: Item, path: Path) -> Item:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"is not readable UTF-8 text: {err}") from err
    if path.suffix.lower() == ".txt":
        return replace(item, caption=" ".join(text.split()) or None)
    try:
        doc = json.loads(text)
    except ValueError as err:
        raise DataError(f"is no JSON: {err}") from err
    if not isinstance(doc, dict):
        raise DataError("is no JSON object")
    said = next((str(doc[c]) for c in TEXT_COLUMNS if doc.get(c)), item.caption)
    labels = {k: str(v) for k, v in doc.items() if k not in TEXT_COLUMNS and isinstance(v, (str, int, float, bool))}
    return replace(item, caption=said and " ".join(said.split()), labels={**item.labels, **labels})


def read_table(table: Path, columns: Sequence[str] = ()) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns of a csv and its rows with their line numbers; without `columns` its first line names them.

    Lines that begin with '#' are comments, as AudioSet's lists have them.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            lines = [(n, row) for n, row in enumerate(csv.reader(file, skipinitialspace=True), 1) if row and row[0][:1] != "#"]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise FetchError(f"cannot read the table '{table}': {err}") from err
    if not columns:
        if not lines:
            raise FetchError(f"the table '{table}' is empty")
        columns, lines = lines[0][1], lines[1:]
    for number, row in lines:
        if len(row) != len(columns):
            raise FetchError(f"'{table}', line {number}: {len(row)} fields, {len(columns)} columns ({', '.join(columns)})")
    return list(columns), [(n, dict(zip(columns, (c.strip() for c in row), strict=True))) for n, row in lines]


def seconds_of(row: dict[str, str], column: str, usual: float | None) -> float | None:
    """Return the seconds in a column, `usual` where there is none; what is no time is a DataError."""
    text = row.get(column, "")
    if not text:
        return usual
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise DataError(f"{column} '{text}' is no time in seconds")
    return value


def by_csv(folder: Path, table: Path, options: Any) -> tuple[list[Item], list[Failure]]:
    """Return an item per row: columns of files (relative to the folder or to the csv), of a caption, and labels.

    Args:
        options: of the source: `columns`; `text`, `label`, `split`, `group` name columns.
    """
    columns, rows = read_table(table, options.columns)
    files = [c for c in columns if c in FILE_COLUMNS]
    if not files:
        raise FetchError(f"'{table}' has no column of files (it has {', '.join(columns)})", f"call one {' or '.join(FILE_COLUMNS)}")
    for option in ("text", "label", "split", "group"):
        wanted = getattr(options, option)
        if wanted is not None and wanted not in columns:
            raise FetchError(f"'{table}' has no column '{wanted}' ({option}=)", did_you_mean(wanted, columns))
    text = options.text or next((c for c in TEXT_COLUMNS if c in columns), None)
    split = options.split or ("split" if "split" in columns else None)
    items: dict[str, Item] = {}
    failures: list[Failure] = []
    for number, row in rows:
        given = {c: row[c] for c in files if row[c]}
        where = next(iter(given.values()), f"line {number} of {table.name}")
        try:
            start, end = seconds_of(row, "start", 0.0), seconds_of(row, "end", None)
            if end is not None and end <= start:
                raise DataError(f"ends at {end:g} s, before it starts ({start:g} s)")
            item = Item(
                _stem(where) + (f"@{start:g}" if row.get("start") else ""),
                caption=" ".join(row[text].split()) or None if text else None,
                labels={c: row[c] for c in columns if c not in (*files, text, "start", "end") and row[c]},
                split=split_of(row[split], options) if split else None, group=row[options.group] if options.group else None,
                start=start, end=end,
            )
            for column, name in given.items():
                path = next((p for p in (folder / name, table.parent / name) if p.is_file()), None)
                if path is None:
                    raise DataError("there is no such file")
                role = column if column in ("depth", "normal", "edges") else ROLE.get(path.suffix.lower())
                if role in (None, "text"):
                    raise DataError(f"'{path.suffix}' is no kind of media that is read here")
                item = _with_file(item, role, path)
            if not item.files:
                raise DataError("names no file")
            if item.id in items:
                raise DataError("stands twice in the table")
            items[item.id] = item
        except DataError as err:
            failures.append(Failure(where, err.message))
    return list(items.values()), failures


def _stem(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix else name


def split_of(value: str, options: Any) -> str:
    """Return the split that a table's value stands for."""
    value = value.strip()
    if value in options.test_values:
        return "test"
    if value in options.val_values:
        return "val"
    usual = {"valid": "val", "validation": "val", "dev": "val", "eval": "test", "testing": "test", "training": "train"}
    return usual.get(value.lower(), value.lower() if value.lower() in ("val", "test") else "train")


def captioned(items: Sequence[Item], template: str | None) -> list[Item]:
    """Return the items with captions made from their labels ("a sound of {class}") where they have none of their own."""
    if template is None:
        return list(items)
    names = re.findall(r"\{([^{}]*)\}", template)
    known = sorted({label for item in items for label in item.labels})
    for name in names:
        if name not in known:
            raise FetchError(f"the caption asks for '{{{name}}}', which no item has", did_you_mean(name, known))
    fill = lambda labels: re.sub(r"\{([^{}]*)\}", lambda m: labels[m[1]].lower(), template)  # noqa: E731
    return [i if i.caption or any(n not in i.labels for n in names) else replace(i, caption=fill(i.labels)) for i in items]


def key_of(item: Item) -> str:
    """Return a shard key that begins with the item's id: letters, digits, '_' and '-' only."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", item.id).strip("-")[-80:] or "item"
