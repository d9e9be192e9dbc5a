"""Class labels to one id each: the distinct labels of the train split, sorted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.config import Config
from nano4m_cli.errors import MediaError, WeightsError, did_you_mean
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer as Base
from nano4m_cli.tokenizers._base import check_ids

MOST = 4096  # more distinct labels are no classes


class Tokenizer(Base):
    name = "classes"

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        self.sha256 = ""
        self.classes: list[str] = []

    def fit(self, raws: Iterable[str]) -> None:
        self.classes = sorted(set(raws))
        if len(self.classes) > MOST:
            raise MediaError(
                f"the {self.modality}s of the train split have {len(self.classes)} distinct values, at most {MOST} are classes",
                f"take a text tokenizer: {self.modality}.name=bpe",
            )

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="grid", shape=(1, 1), vocab_size=len(self.classes), tokenizer=self.ref(self.sha256),
        )

    def adapt(self, raw: str) -> tuple[str, str | None]:
        return raw, None

    def encode(self, raws: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        number, out = {c: i for i, c in enumerate(self.classes)}, []
        for i, raw in enumerate(raws):
            if raw not in number:
                raise MediaError(
                    f"{where[i] if where else f'label {i}'}: '{raw}' is none of the {len(number)} classes of the train split",
                    did_you_mean(raw, self.classes),
                )
            out.append(np.array([number[raw]], dtype=np.int64))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        spec = self.spec()
        return [self.classes[int(check_ids(np.asarray(i), (1, 1), spec, "decode")[0, 0])] for i in ids]

    def save(self, folder: Path) -> None:
        (folder / "classes.json").write_text(json.dumps(self.classes) + "\n")

    def load(self, folder: Path) -> None:
        path = folder / "classes.json"
        try:
            self.classes = json.loads(path.read_text())
            if not self.classes or not all(isinstance(c, str) for c in self.classes):
                raise ValueError("it lists no classes")
        except (OSError, ValueError, TypeError) as err:
            raise WeightsError(f"{path} cannot be used: {err}", "delete the folder and tokenize again") from err
