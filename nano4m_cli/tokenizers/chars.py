"""Text to ids of true length: one id for each character, newlines and case kept; the characters of the train split.

Id 0 ends a text (EOS); id 1 is every character that the train split does not have and decodes to U+FFFD; the train
split's characters follow, sorted by code point. There is no PAD.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.errors import MediaError, WeightsError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer as Base

EOS, UNKNOWN, FIRST = 0, 1, 2
REPLACEMENT = "\ufffd"


class Tokenizer(Base):
    class Options(Config):
        """max_length: most ids of a text, EOS included; 0 = twice the longest seen."""

        max_length: int = Field(0, ge=0)

    name = "chars"

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        self.sha256 = ""
        self.longest = options.max_length

    def _set(self, characters: str) -> None:
        self.characters = characters
        self.id_of = {c: FIRST + i for i, c in enumerate(characters)}

    def fit(self, raws: Iterable[str]) -> None:
        texts = list(raws)
        if not any(texts):
            raise MediaError(f"every {self.modality} of the train split is empty: nothing to fit a vocabulary on")
        self._set("".join(sorted(set().union(*texts))))
        if not self.options.max_length:
            self.longest = 2 * (max(map(len, texts)) + 1)

    def comparable(self, raw: str) -> str:
        return "".join(c if c in self.id_of else REPLACEMENT for c in raw)

    def adapt(self, raw: str) -> tuple[str, str | None]:
        strange = "".join(sorted(set(raw) - set(self.id_of)))
        return raw, f"{self.modality}: {strange!r} never stood in the train split and is read as unknown" if strange else None

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="sequence", shape=(self.longest,), vocab_size=FIRST + len(self.characters), eos=EOS,
            tokenizer=self.ref(self.sha256),
        )

    def encode(self, raws: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        out = []
        for i, raw in enumerate(raws):
            if len(raw) + 1 > self.longest:
                raise MediaError(
                    f"{where[i] if where else f'text {i}'}: {self.modality} has {len(raw) + 1} tokens, at most {self.longest} fit",
                    f"shorten it, or tokenize with {self.modality}.max_length={len(raw) + 1}",
                )
            out.append(np.array([*(self.id_of.get(c, UNKNOWN) for c in raw), EOS], dtype=np.int64))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        spec, table, out = self.spec(), ["", REPLACEMENT, *self.characters], []
        for row in map(np.asarray, ids):
            spec.check_ids(row, "decode")
            stop = np.flatnonzero(row == EOS)
            out.append("".join(table[i] for i in (row[: stop[0]] if len(stop) else row).tolist()))
        return out

    def save(self, folder: Path) -> None:
        (folder / "chars.json").write_text(json.dumps({"characters": self.characters, "longest": self.longest}) + "\n")

    def load(self, folder: Path) -> None:
        try:
            doc = json.loads((folder / "chars.json").read_text())
            self._set("".join(doc["characters"]))
            self.longest = int(doc["longest"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise WeightsError(f"{folder} holds no usable vocabulary: {err}", "delete the folder and tokenize again") from err
