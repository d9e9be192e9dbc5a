"""Gallery rows as the page shows them: pictures and sounds as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

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
    condition: list[Shown] = field(default_factory=list)
    output: list[Shown] = field(default_factory=list)
    truth: list[Shown] = field(default_factory=list)


@dataclass
class ShownGallery:
    """groups: rows by title, in the order given. dropped: rows left out for size."""

    groups: dict[str, list[ShownRow]] = field(default_factory=dict)
    rows: int = 0
    dropped: int = 0


def show(gallery: Gallery, folder: Path, budget: int) -> ShownGallery:
    """Return the rows whose media fit into `budget` bytes; the first that does not, and all after it, are dropped."""
    out, left = ShownGallery(), budget
    for row in gallery.rows:
        shown, left = _row(row, folder, left)
        if left < 0:
            break
        out.groups.setdefault(row.title or "Samples", []).append(shown)
        out.rows += 1
    out.dropped = len(gallery.rows) - out.rows
    return out


def _row(row: Row, folder: Path, left: int) -> tuple[ShownRow, int]:
    shown = ShownRow(row.key)
    for side in SIDES:
        for item in getattr(row, side):
            if left < 0:
                break
            one = _item(item, folder)
            getattr(shown, side).append(one)
            left -= len(one.text) + len(one.sound) + (len(one.picture.src) if one.picture else 0)
    return shown, left


def _item(item: Item, folder: Path) -> Shown:
    if item.kind == "text":
        return Shown(item.modality, "text", text=item.text)
    try:
        if item.kind == "image":
            return Shown(item.modality, "image", picture=_picture(item.file, folder))
        picture = _picture(item.picture, folder) if item.picture else None
        return Shown(item.modality, "audio", picture=picture, sound=_data_uri(item.file, folder, "audio"))
    except (OSError, ValueError, Image.DecompressionBombError) as err:
        problem = (err.strerror if isinstance(err, OSError) else None) or str(err)
        return Shown(item.modality, item.kind, problem=problem.replace(str(folder), ""))


def _data_uri(name: str | None, folder: Path, kind: str) -> str:
    """Return a file beside gallery.json as a data URI; one elsewhere, or of another type, is a ValueError."""
    if not name:
        raise ValueError("no file is named")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside the gallery")
    mime = TYPES[kind].get(path.suffix.lower())
    if mime is None:
        raise ValueError(f"{name} is none of {', '.join(TYPES[kind])}")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _picture(name: str | None, folder: Path) -> Picture:
    src = _data_uri(name, folder, "image")
    try:
        with Image.open(folder / str(name)) as image:
            width, height = image.size
    except OSError as err:
        raise ValueError(f"{name} is no picture") from err
    small = max(width, height) <= SMALL
    factor = -(-SIDE // max(width, height)) if small else min(1.0, 2 * SIDE / max(width, height))
    return Picture(src, max(1, round(width * factor)), max(1, round(height * factor)), small)
