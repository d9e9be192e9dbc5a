"""The contract of a modality: its raw form in memory, in shards and in a user's files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.modalities._image import png_bytes


class Modality(ABC):
    """Raw values of one modality. Subclasses give the five conversions; nothing here knows of tokens.

    Class attributes:
        name: the file's name.
        ext: member name in raw shards, e.g. "rgb.png".
        kind: "image", "audio", "video" or "text": how a report shows it.
        tokenizer: registry name of the default tokenizer; `tokenizer_config` its default options.
        suffix: file suffix that `write_file` uses.
    """

    name: ClassVar[str]
    ext: ClassVar[str]
    kind: ClassVar[str]
    tokenizer: ClassVar[str]
    tokenizer_config: ClassVar[dict[str, Any]] = {}
    suffix: ClassVar[str]

    @abstractmethod
    def from_bytes(self, data: bytes, where: str) -> Any:
        """Return the raw value held in a shard member; anything unreadable is a MediaError that names `where`."""

    @abstractmethod
    def to_bytes(self, raw: Any) -> bytes:
        """Return the shard member for a raw value (the inverse of `from_bytes`, byte for byte reproducible)."""

    @abstractmethod
    def read_file(self, path: Path) -> Any:
        """Return the raw value in a user's file, brought to canonical form (mode, rate, channels)."""

    def from_text(self, text: str) -> Any:
        """Return the raw value for a command-line VALUE: a file's path, unless the modality is text itself."""
        path = Path(text)
        if not path.is_file():
            a = "an" if self.kind[0] in "aeiou" else "a"
            raise MediaError(f"no {self.name} file '{text}'", f"give the path of {a} {self.kind} file")
        if os.path.getsize(path) == 0:
            raise MediaError(f"'{text}' is empty (0 bytes)")
        return self.read_file(path)

    def vary(self, raw: Any, rng: np.random.Generator) -> Any:
        """Return another raw value that shows the same thing, for training on several variants of a sample."""
        raise ConfigError(f"{self.name} has no variants: nothing says how it may differ and mean the same", "leave out variants=")

    def conversion(self, path: Path) -> str | None:
        """Return what reading a user's file changes (mode, rate, channels), or None."""
        return None

    def write_file(self, raw: Any, path: Path) -> None:
        """Write a raw value for people, with this modality's suffix."""
        path.write_bytes(self.to_bytes(raw))

    def sized(self, size: dict[str, Any]) -> Modality:
        """Return this modality as a data set has it, where reading and writing files depends on that (a video's frame rate).

        Args:
            size: what dataset.json says of it.
        """
        return self

    @abstractmethod
    def show(self, raw: Any) -> Any:
        """Return a uint8 (H, W, 3) picture of an image, sound or video, or the str of a text."""

    def write_picture(self, raw: Any, stem: Path) -> Path:
        """Write what a browser shows of an image, sound or video to `stem` plus a suffix; return the file."""
        path = stem.with_name(stem.name + ".png")
        path.write_bytes(png_bytes(self.show(raw)))
        return path
