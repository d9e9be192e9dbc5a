"""Pictures (RGB, depth, normals, edges) to a grid of codes: patch autoencoder with finite scalar quantisation.

What a picture is, its raw form tells (`FORMS`), never its modality's name. Preprocessing (one place: `_to_unit`, undone by
`_from_unit`): 8-bit values are divided by 255; metres become log metres scaled to [0, 1] between the nearest and farthest
of the train split; vectors are kept as (x, y, z), decoded ones are brought back to unit length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import field_validator
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import GradientTokenizer, check_ids
from nano4m_cli.tokenizers._patch_ae import PatchAutoencoder

# form: (channels, how it is scaled); uint8 (H, W, 3), uint8 (H, W), float (H, W, 3), float (H, W)
FORMS = {
    "colour": (3, "x / 255"), "grey": (1, "x / 255"), "vectors": (3, "unit xyz"), "metres": (1, "log metres to [0, 1]"),
}
BEFORE = {"depth": "metres", "normal": "vectors"}  # forms of tokenizers saved before the form was: by modality, else colour


def form_of(raw: np.ndarray) -> str:
    """Return the form of a raw picture."""
    return ("grey", "colour")[raw.ndim - 2] if raw.dtype == np.uint8 else ("metres", "vectors")[raw.ndim - 2]


class Tokenizer(GradientTokenizer):
    class Options(Config):
        """patch: pixels per code, each way. levels: FSQ levels. width, depth: of encoder and of decoder.
        emphasis: weight of what is far from the mean picture. fit_samples, fit_steps: of fitting (None: the usual)."""

        patch: int = 8
        levels: tuple[int, ...] = (8, 8, 6, 5)
        width: int = 128
        depth: int = 2
        emphasis: float = 2.0
        encoder_mixing: bool = False
        fit_samples: int = 12_000
        fit_steps: int | None = None

        @field_validator("levels")
        @classmethod
        def _levels(cls, v):
            if not v or min(v) < 2:
                raise ValueError("every level must be at least 2")
            return v

    name = "fsq_image"
    train = {"steps": 450, "batch": 64, "lr": 3e-2, "optimizer": "muon", "muon_lr": 0.04, "warmup": 40}

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if "size" not in size:
            raise ConfigError(f"fsq_image serves pictures, and the data set gives no size of '{modality}'")
        self.height, self.width = size["size"]
        p = options.patch
        if self.height % p or self.width % p:
            raise ConfigError(
                f"{modality}: pictures of {self.height} x {self.width} do not divide into patches of {p}",
                f"choose {modality}.patch as a divisor of both",
            )
        self.grid = (self.height // p, self.width // p)
        self.sha256 = ""

    # -- raw <-> patches ------------------------------------------------------------------------------------------

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

    def _patches(self, x: np.ndarray) -> np.ndarray:
        """(N, H, W, C) -> (N, h, w, p * p * C)."""
        n, (h, w), p = len(x), self.grid, self.options.patch
        return x.reshape(n, h, p, w, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)

    def _pixels(self, patches: np.ndarray) -> np.ndarray:
        """(N, h, w, p * p * C) -> (N, H, W, C)."""
        n, (h, w), p = len(patches), self.grid, self.options.patch
        return patches.reshape(n, h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, h * p, w * p, -1)

    def _check(self, raw: np.ndarray, where: str) -> None:
        if raw.shape[:2] != (self.height, self.width):
            raise MediaError(
                f"{where}: {self.modality} is {raw.shape[1]} x {raw.shape[0]} pixels, "
                f"this tokenizer takes {self.width} x {self.height}",
                "fetch with the size that the tokenizer was fitted on, or fit a new one",
            )
        if form_of(raw) != self.form:
            raise MediaError(f"{where}: {self.modality} is a picture of {form_of(raw)}, this tokenizer takes {self.form}")

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        if raw.shape[:2] == (self.height, self.width):
            return raw, None
        h, w = raw.shape[:2]
        scale = min(h / self.height, w / self.width)
        ch, cw = round(self.height * scale), round(self.width * scale)
        top, left = (h - ch) // 2, (w - cw) // 2
        box = (left, top, left + cw, top + ch)
        size = (self.width, self.height)
        if raw.dtype == np.uint8:
            how = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
            out = np.asarray(Image.fromarray(raw).resize(size, how, box=box))
        else:  # depth and normals are never averaged across an edge
            rows = top + ((np.arange(self.height) + 0.5) * ch / self.height).astype(int)
            cols = left + ((np.arange(self.width) + 0.5) * cw / self.width).astype(int)
            out = raw[rows][:, cols]
        return out, f"{self.modality} of {w} x {h} was cropped to its centre and resized to {self.width} x {self.height}"

    # -- ids ------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=int(np.prod(o.levels)), levels=o.levels,
            tokenizer=self.ref(self.sha256),
            preprocess={"size": [self.height, self.width], "scale": FORMS[self.form][1]},
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        for i, raw in enumerate(raws):
            self._check(raw, where[i] if where else f"picture {i}")
        x = self._patches(np.stack([self._to_unit(r) for r in raws]))
        with torch.inference_mode():
            _, codes = self.module.encode(torch.from_numpy(x))
        return list(codes.reshape(len(raws), -1).numpy())

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec = self.spec()
        codes = np.stack([check_ids(np.asarray(i), self.grid, spec, "decode") for i in ids])
        return self.decode_values(self.module.fsq.decode(torch.from_numpy(codes)).flatten(1, 2).numpy())

    def decode_values(self, values_BSD: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            patches = self.module.decode_values(torch.from_numpy(values_BSD).unflatten(1, self.grid)).numpy()
        return [self._from_unit(x) for x in self._pixels(patches)]

    # -- fitting --------------------------------------------------------------------------------------------------

    @property
    def range(self) -> tuple[float, float]:
        """Log of the nearest and farthest depth."""
        return float(self.module.low), float(self.module.high)

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        raws = list(raws)
        self._make(form_of(raws[0]))
        for raw in raws:
            self._check(raw, "the train split")
        if self.form == "metres":
            stacked = np.stack(raws)
            self.module.low.fill_(float(np.log(stacked[stacked > 0].min())))
            self.module.high.fill_(float(np.log(stacked.max())) + 1e-6)
        self.data = torch.from_numpy(self._patches(np.stack([self._to_unit(r) for r in raws])))
        self.module.centre(self.data)

    def _make(self, form: str) -> None:
        o, self.form = self.options, form
        self.module = PatchAutoencoder(
            self.grid, o.patch**2 * FORMS[form][0], o.levels, o.width, o.depth, o.encoder_mixing
        )
        self.module.register_buffer("form", torch.tensor(list(FORMS).index(form)))
        self.module.register_buffer("low", torch.zeros(()))
        self.module.register_buffer("high", torch.ones(()))

    def build(self, state: dict[str, Tensor]) -> None:
        names = list(FORMS)
        number = state.setdefault("form", torch.tensor(names.index(BEFORE.get(self.modality, "colour"))))
        self._make(names[int(number)])

    @property
    def effort(self) -> float:
        return 2.0 if self.form == "colour" else 1.0

    def loss(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, mse = self.module.loss(self.data[index], self.options.emphasis)
        return loss, {"mse": mse}
