"""Contact sheets: rows of pictures and texts with headings, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nano4m_cli.data._atomic import atomic_file

CELL, GAP, HEAD = 128, 8, 20


def write_sheet(path: Path, headings: Sequence[str], rows: Sequence[Sequence[np.ndarray | str | None]], cell: int = CELL) -> Path:
    """Write rows of cells (uint8 (H, W, 3) pictures, texts, or None for empty) below one heading per column."""
    font = ImageFont.load_default(size=12)
    width = GAP + len(headings) * (cell + GAP)
    height = HEAD + GAP + len(rows) * (cell + GAP)
    page = Image.new("RGB", (width, height), (250, 250, 248))
    pen = ImageDraw.Draw(page)
    for c, heading in enumerate(headings):
        pen.text((GAP + c * (cell + GAP), 4), heading, fill=(40, 40, 40), font=font)
    for r, row in enumerate(rows):
        for c, item in enumerate(row):
            x, y = GAP + c * (cell + GAP), HEAD + GAP + r * (cell + GAP)
            if isinstance(item, str):
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(255, 255, 255), outline=(210, 210, 205))
                pen.multiline_text((x + 5, y + 5), _wrap(item, pen, font, cell - 10), fill=(20, 20, 20), font=font, spacing=3)
            elif item is not None:
                picture = Image.fromarray(item)
                scale = cell / max(picture.size)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                smooth = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
                page.paste(picture.resize(size, smooth), (x, y))
    with atomic_file(path) as file:
        page.save(file, format="PNG")
    return path


def _wrap(text: str, pen: ImageDraw.ImageDraw, font, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return "\n".join([*lines, line])
