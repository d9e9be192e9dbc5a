"""What the tokenizers fitted on pictures share: sizes, forms, and each form as numbers near [0, 1].

What a picture is, its raw form tells (`FORMS`), never its modality's name. Preprocessing (one place: `_to_unit`, undone by
`_from_unit`): 8-bit values are divided by 255; metres become log metres scaled to [0, 1] between the nearest and farthest
of the train split; vectors are kept as (x, y, z), decoded ones are brought back to unit length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError
from nano4m_cli.tokenizers._base import GradientTokenizer
from nano4m_cli.tokenizers._picture import adapted, check_picture, form_of

# form: (channels, how it is scaled); uint8 (H, W, 3), uint8 (H, W), float (H, W, 3), float (H, W)
FORMS = {
    "colour": (3, "x / 255"), "grey": (1, "x / 255"), "vectors": (3, "unit xyz"), "metres": (1, "log metres to [0, 1]"),
}
BEFORE = {"depth": "metres", "normal": "vectors"}  # forms of tokenizers saved before the form was: by modality, else colour


class FittedPicture(GradientTokenizer):
    """A grid of codes, each of `options.<cell>` pixels each way; its module also holds the form and the depths' range."""

    cell: ClassVar[str]

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if "size" not in size:
            raise ConfigError(f"{self.name} serves pictures, and the data set gives no size of '{modality}'")
        self.height, self.width = size["size"]
        p = getattr(options, self.cell)
        if self.height % p or self.width % p:
            raise ConfigError(
                f"{modality}: pictures of {self.height} x {self.width} do not divide into patches of {p}",
                f"choose {modality}.{self.cell} as a divisor of both",
            )
        self.grid = (self.height // p, self.width // p)
        self.sha256 = ""

    @abstractmethod
    def new_module(self, channels: int) -> nn.Module:
        """Return the untrained module for pictures of so many channels."""

    def _to_unit(self, raw: np.ndarray) -> np.ndarray:
        """Return float32 (H, W, C) of a raw picture."""
        if self.form == "metres":
            low, high = self.range
            raw = (np.log(np.maximum(raw, 1e-3)) - low) / (high - low)
        unit = raw.astype(np.float32) / (255.0 if raw.dtype == np.uint8 else 1.0)
        return unit.reshape(*unit.shape[:2], -1)

    def _from_unit(self, x: np.ndarray) -> np.ndarray:
        """Return the raw picture of float32 (H, W, C)."""
        if self.form in ("colour", "grey"):
            out = np.clip(np.rint(x * 255.0), 0, 255).astype(np.uint8)
            return out if self.form == "colour" else out[..., 0]
        if self.form == "metres":
            low, high = self.range
            return np.exp(np.clip(x[..., 0], 0, 1) * (high - low) + low).astype(np.float32)
        return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)).astype(np.float32)

    def _check(self, raw: np.ndarray, where: str) -> None:
        hint = "fetch with the size that the tokenizer was fitted on, or fit a new one"
        check_picture(raw, (self.height, self.width), self.form, self.modality, where, hint)

    def _units(self, raws: Sequence[np.ndarray], where: Sequence[str] | None) -> list[np.ndarray]:
        """Return float32 (H, W, C) of raw pictures after checking each."""
        for i, raw in enumerate(raws):
            self._check(raw, where[i] if where else f"picture {i}")
        return [self._to_unit(r) for r in raws]

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, (self.height, self.width), self.modality)

    @property
    def preprocess(self) -> dict[str, Any]:
        return {"size": [self.height, self.width], "scale": FORMS[self.form][1]}

    @property
    def range(self) -> tuple[float, float]:
        """Log of the nearest and farthest depth."""
        return float(self.module.low), float(self.module.high)

    def _set_up(self, raws: Sequence[np.ndarray]) -> None:
        """Make the module for the form and the range of raw pictures, all of which must fit."""
        self._make(form_of(raws[0]))
        for raw in raws:
            self._check(raw, "the train split")
        if self.form == "metres":
            stacked = np.stack(raws)
            self.module.low.fill_(float(np.log(stacked[stacked > 0].min())))
            self.module.high.fill_(float(np.log(stacked.max())) + 1e-6)

    def _make(self, form: str) -> None:
        self.form, self.module = form, self.new_module(FORMS[form][0])
        self.module.register_buffer("form", torch.tensor(list(FORMS).index(form)))
        self.module.register_buffer("low", torch.zeros(()))
        self.module.register_buffer("high", torch.ones(()))

    def build(self, state: dict[str, Tensor]) -> None:
        names = list(FORMS)
        number = state.setdefault("form", torch.tensor(names.index(BEFORE.get(self.modality, "colour"))))
        self._make(names[int(number)])
