"""Videos to a grid of codes (time, height, width): patch autoencoder over tubelets with finite scalar quantisation.

A code stands for `frames` x `patch` x `patch` pixels. Preprocessing: 8-bit values are divided by 255. A video of another
length is cut after its first frames, or stands still at its end; of another size, each frame is cropped and resized as
pictures are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._patch_ae import PatchAutoencoder, PatchOptions, Patchwise
from nano4m_cli.tokenizers._picture import adapted_video, told


class Tokenizer(Patchwise):
    class Options(PatchOptions):
        """frames, patch: per code, in time and in each direction of the picture; the others are those of `PatchOptions`."""

        frames: int = Field(4, ge=1)
        patch: int = Field(8, ge=1)
        fit_samples: int = 6_000

    name = "fsq_video"
    train = {"steps": 900, "batch": 64, "lr": 3e-2, "optimizer": "muon", "muon_lr": 0.04, "warmup": 40}

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if not {"size", "frames"} <= set(size):
            raise ConfigError(f"fsq_video serves videos, and the data set gives no size and frames of '{modality}'")
        self.extent = (size["frames"], *size["size"])  # (T, H, W)
        self.tubelet = (options.frames, options.patch, options.patch)
        if any(n % p for n, p in zip(self.extent, self.tubelet, strict=True)):
            raise ConfigError(
                f"{modality}: videos of {told(self.extent)} do not divide into tubelets of {told(self.tubelet)}",
                f"choose {modality}.frames as a divisor of the frames, {modality}.patch as one of height and width",
            )
        self.grid = tuple(n // p for n, p in zip(self.extent, self.tubelet, strict=True))
        self.sha256 = ""

    # -- raw <-> tubelets -----------------------------------------------------------------------------------------

    def _tubelets(self, raws: Sequence[np.ndarray]) -> Tensor:
        """Return float32 (N, t, h, w, values of a tubelet) of raw videos, in [0, 1]."""
        (t, h, w), (f, p, _) = self.grid, self.tubelet
        x = np.stack(raws).reshape(-1, t, f, h, p, w, p, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return torch.from_numpy(x.reshape(-1, t, h, w, f * p * p * 3).astype(np.float32) / 255.0)

    def _videos(self, tubelets: Tensor) -> list[np.ndarray]:
        """Return the raw videos of (N, t, h, w, values of a tubelet)."""
        (t, h, w), (f, p, _) = self.grid, self.tubelet
        x = (tubelets * 255.0).round().clamp(0, 255).byte().numpy().reshape(-1, t, h, w, f, p, p, 3)
        return list(x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *self.extent, 3))

    def _check(self, raw: np.ndarray, where: str) -> None:
        if raw.dtype != np.uint8 or raw.shape != (*self.extent, 3):
            raise MediaError(
                f"{where}: {self.modality} is {raw.dtype} of {told(raw.shape[:3])}, "
                f"this tokenizer takes uint8 of {told(self.extent)}",
                "fetch with the size and frames that the tokenizer was fitted on, or fit a new one",
            )

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted_video(raw, self.extent, self.modality)

    # -- ids ------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=math.prod(o.levels), levels=o.levels,
            tokenizer=self.ref(self.sha256),
            preprocess={"frames": self.extent[0], "size": list(self.extent[1:]), "fps": self.size.get("fps"), "scale": "x / 255"},
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        for i, raw in enumerate(raws):
            self._check(raw, where[i] if where else f"video {i}")
        with torch.inference_mode():
            _, codes = self.module.encode(self._tubelets(raws))
        return list(codes.flatten(1).numpy())

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec = self.spec()
        codes = np.stack([check_ids(np.asarray(i), (spec.slots,), spec, "decode") for i in ids])
        return self.decode_values(self.module.fsq.decode(torch.from_numpy(codes)).numpy())

    def decode_values(self, values_BSD: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return self._videos(self.module.decode_values(torch.from_numpy(values_BSD).unflatten(1, self.grid)))

    # -- fitting --------------------------------------------------------------------------------------------------

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        raws = list(raws)
        for raw in raws:
            self._check(raw, "the train split")
        self.build({})
        self.data = self._tubelets(raws)
        self.module.centre(self.data)

    def build(self, state: dict[str, Tensor]) -> None:
        o = self.options
        self.module = PatchAutoencoder(self.grid, math.prod(self.tubelet) * 3, o.levels, o.width, o.depth, o.encoder_mixing)
