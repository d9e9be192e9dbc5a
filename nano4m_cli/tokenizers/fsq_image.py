"""Pictures (RGB, depth, normals, edges) to a grid of codes: patch autoencoder with finite scalar quantisation.

Preprocessing is that of every fitted picture tokenizer (_fitted_picture.py). Every code of a finite scalar quantiser is in
reach of the encoder from the start: it needs no commitment, no entropy term and no revival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._fitted_picture import FittedPicture
from nano4m_cli.tokenizers._patch_ae import PatchAutoencoder, PatchOptions, Patchwise


class Tokenizer(Patchwise, FittedPicture):
    class Options(PatchOptions):
        """patch: pixels per code, each way; the others are those of `PatchOptions`."""

        patch: int = 8
        fit_samples: int = 12_000

    name, cell = "fsq_image", "patch"
    train = {"steps": 450, "batch": 64, "lr": 3e-2, "optimizer": "muon", "muon_lr": 0.04, "warmup": 40}

    def _patches(self, x: np.ndarray) -> np.ndarray:
        """(N, H, W, C) -> (N, h, w, p * p * C)."""
        n, (h, w), p = len(x), self.grid, self.options.patch
        return x.reshape(n, h, p, w, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)

    def _pixels(self, patches: np.ndarray) -> np.ndarray:
        """(N, h, w, p * p * C) -> (N, H, W, C)."""
        n, (h, w), p = len(patches), self.grid, self.options.patch
        return patches.reshape(n, h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(n, h * p, w * p, -1)

    # -- ids ------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=int(np.prod(o.levels)), levels=o.levels,
            tokenizer=self.ref(self.sha256), preprocess=self.preprocess,
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        x = self._patches(np.stack(self._units(raws, where)))
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

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        raws = list(raws)
        self._set_up(raws)
        self.data = torch.from_numpy(self._patches(np.stack([self._to_unit(r) for r in raws])))
        self.module.centre(self.data)

    def new_module(self, channels: int) -> PatchAutoencoder:
        o = self.options
        return PatchAutoencoder(self.grid, o.patch**2 * channels, o.levels, o.width, o.depth, o.encoder_mixing)

    @property
    def effort(self) -> float:
        return 2.0 if self.form == "colour" else 1.0
