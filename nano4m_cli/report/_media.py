"""Gallery rows as pages show them, within a budget of bytes: pictures and sounds lie in the page itself, or beside it."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from nano4m_cli.report._read import Gallery, Item, Row

SIDES = ("condition", "output", "truth")
TYPES = {
    "image": {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"},
    "audio": {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".mp3": "audio/mpeg"},
}
SMALL = 96  # pictures up to this side are enlarged by a whole factor, pixels kept sharp
SIDE = 160  # ... to this many CSS pixels or a little more


@dataclass(frozen=True)
class Picture:
    src: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Shown:
    """An item of the gallery. problem: what is wrong with its file (then nothing else is set)."""

    modality: str
    kind: str
    text: str = ""
    picture: Picture | None = None
    sound: str = ""
    problem: str = ""


@dataclass
class ShownRow:
    key: str
    rule: str = ""
    figure: str = ""
    condition: list[Shown] = field(default_factory=list)
    output: list[Shown] = field(default_factory=list)
    truth: list[Shown] = field(default_factory=list)

    @property
    def given(self) -> str:
        return " + ".join(dict.fromkeys(i.modality for i in self.condition)) or "nothing"


@dataclass
class ShownGallery:
    """groups: rows by title, in the order given. rules: how rows were chosen. dropped: rows left out for size. weight: bytes
    that the media take."""

    groups: dict[str, list[ShownRow]] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    weight: int = 0

    @property
    def sources(self) -> list[str]:
        """What conditions are made of, in the order of the rows."""
        return list(dict.fromkeys(r.given for rows in self.groups.values() for r in rows))

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(i.modality for rows in self.groups.values() for r in rows for i in r.output))

    @property
    def chosen(self) -> list[str]:
        return list(dict.fromkeys(r.rule for rows in self.groups.values() for r in rows if r.rule))


class Store(Protocol):
    """Where media go: `put` takes a file's bytes and type and returns (its address for the page, the bytes that this costs)."""

    def put(self, data: bytes, mime: str, suffix: str) -> tuple[str, int]: ...


class Inline:
    """Media in the page itself, as data URIs."""

    def put(self, data: bytes, mime: str, suffix: str) -> tuple[str, int]:
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        return uri, len(uri)


class Beside:
    """Media as files named by their content, so that the same picture is there once. files: what was put, by path."""

    def __init__(self, prefix: str, folder: str = "media"):
        self.prefix, self.folder = prefix, folder
        self.files: dict[str, bytes] = {}

    def put(self, data: bytes, mime: str, suffix: str) -> tuple[str, int]:
        name = f"{self.folder}/{hashlib.sha256(data).hexdigest()[:20]}{suffix}"
        cost = 0 if name in self.files else len(data)
        self.files[name] = data
        return self.prefix + name, cost


def show(gallery: Gallery, folder: Path, budget: int, store: Store | None = None) -> ShownGallery:
    """Return the rows whose media fit into `budget` bytes. Where they do not all fit, every direction keeps its first rows of
    each rule, so that none of them, and not the worst samples alone, is lost."""
    out, left, store = ShownGallery(rules=list(gallery.rules)), budget, store or Inline()
    seen: Counter[tuple[str, str]] = Counter()
    ranks = []
    for i, row in enumerate(gallery.rows):
        ranks.append((seen[row.title, row.rule], i))
        seen[row.title, row.rule] += 1
    found: dict[int, ShownRow] = {}
    for _, i in sorted(ranks):
        shown, left = _row(gallery.rows[i], folder, left, store)
        if left < 0:
            break
        found[i], out.weight = shown, budget - left
    for i in sorted(found):
        out.groups.setdefault(gallery.rows[i].title or "Samples", []).append(found[i])
    out.rows, out.dropped = len(found), len(gallery.rows) - len(found)
    return out


def _row(row: Row, folder: Path, left: int, store: Store) -> tuple[ShownRow, int]:
    shown = ShownRow(row.key, row.rule, row.figure)
    for side in SIDES:
        for item in getattr(row, side):
            if left < 0:
                break
            one, cost = _item(item, folder, store)
            getattr(shown, side).append(one)
            left -= cost
    return shown, left


def _item(item: Item, folder: Path, store: Store) -> tuple[Shown, int]:
    if item.kind == "text":
        return Shown(item.modality, "text", text=item.text), len(item.text)
    try:
        if item.kind == "image":
            picture, cost = _picture(item.file, folder, store)
            return Shown(item.modality, "image", picture=picture), cost
        picture, cost = _picture(item.picture, folder, store) if item.picture else (None, 0)
        sound, more = store.put(*_read(item.file, folder, "audio"))
        return Shown(item.modality, "audio", picture=picture, sound=sound), cost + more
    except (OSError, ValueError, Image.DecompressionBombError) as err:
        problem = (err.strerror if isinstance(err, OSError) else None) or str(err)
        return Shown(item.modality, item.kind, problem=problem.replace(str(folder), "")), 0


def _read(name: str | None, folder: Path, kind: str) -> tuple[bytes, str, str]:
    """Return (bytes, type, suffix) of a file beside gallery.json; one elsewhere, or of another type, is a ValueError."""
    if not name:
        raise ValueError("no file is named")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside the gallery")
    suffix = path.suffix.lower()
    if suffix not in TYPES[kind]:
        raise ValueError(f"{name} is none of {', '.join(TYPES[kind])}")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    return path.read_bytes(), TYPES[kind][suffix], suffix


def _picture(name: str | None, folder: Path, store: Store) -> tuple[Picture, int]:
    data, mime, suffix = _read(name, folder, "image")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except OSError as err:
        raise ValueError(f"{name} is no picture") from err
    src, cost = store.put(data, mime, suffix)
    small = max(width, height) <= SMALL
    factor = -(-SIDE // max(width, height)) if small else min(1.0, 2 * SIDE / max(width, height))
    return Picture(src, max(1, round(width * factor)), max(1, round(height * factor)), small), cost
