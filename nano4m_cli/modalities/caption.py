"""Captions: one line of text (str)."""

from __future__ import annotations

from pathlib import Path

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import read_bytes


class Caption(Modality):
    name, ext, kind, suffix = "caption", "caption.txt", "text", ".txt"
    tokenizer = "bpe"

    def from_bytes(self, data: bytes, where: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as err:
            raise MediaError(f"{where} is not UTF-8 text: {err}") from err

    def to_bytes(self, raw: str) -> bytes:
        return raw.encode("utf-8")

    def read_file(self, path: Path) -> str:
        return self.from_text(self.from_bytes(read_bytes(path), f"'{path}'"))

    def from_text(self, text: str) -> str:
        if not text.strip():
            raise MediaError("the caption is empty", 'give some words, e.g. --from caption="a large red metal sphere"')
        return " ".join(text.split())

    def show(self, raw: str) -> str:
        return raw


MODALITY = Caption()
