"""Pictures to a grid of codes: convolutional autoencoder, learned codebook, optional critic (VQGAN).

Preprocessing is that of every fitted picture tokenizer (_fitted_picture.py), the network and its losses are in _vqgan.py. One
picture is encoded at a time: convolutions of other batch sizes may round otherwise, and ids do not depend on neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._adversary import Adversarial, AdversarialOptions, PatchCritic, Trial
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._fitted_picture import FittedPicture
from nano4m_cli.tokenizers._vq import dead_notice
from nano4m_cli.tokenizers._vqgan import VQGAN


class Tokenizer(FittedPicture, Adversarial):
    class Options(AdversarialOptions):
        """downsample: pixels per code, each way. codes, dim: of the codebook. width, depth: channels and blocks of the net.
        stem: pixels each way that the first layer takes at once (1: as in the paper, slower).
        emphasis: weight of what is far from the mean picture. structure: weight of differences between neighbours.
        commitment, entropy, revive, cosine: of the codebook (_vq.py). fit_samples, fit_steps: of fitting (None: the usual).
        adversarial, feature_matching, adversarial_start: the critic's weights, and the step it comes in (_adversary.py)."""

        downsample: Literal[4, 8, 16] = 16
        codes: int = Field(1024, ge=2)
        dim: int = Field(16, ge=1)
        width: int = Field(32, ge=8)
        depth: int = Field(1, ge=1)
        stem: Literal[1, 2, 4] = 4
        emphasis: float = Field(2.0, ge=0)
        structure: float = Field(0.3, ge=0)
        commitment: float = Field(0.25, ge=0)
        entropy: float = Field(0.0, ge=0)
        revive: int = Field(20, ge=0)
        cosine: bool = False
        fit_samples: int = 6_000
        fit_steps: int | None = None

    name, cell, chunk = "vqgan", "downsample", 64
    train = {"steps": 600, "batch": 32, "lr": 2e-3, "warmup": 50}

    # -- ids ------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=self.options.codes,
            tokenizer=self.ref(self.sha256), preprocess=self.preprocess,
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        with torch.inference_mode():
            units = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in self._units(raws, where))
            return [self.module.vq.encode(self.module.latent(x)).flatten().numpy() for x in units]

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, out = self.spec(), []
        with torch.inference_mode():
            for row in ids:
                codes = torch.from_numpy(check_ids(np.asarray(row), self.grid, spec, "decode"))
                made = self.module.picture(self.module.vq.decode(codes)[None])[0]
                out.append(self._from_unit(made.permute(1, 2, 0).numpy()))
        return out

    # -- fitting --------------------------------------------------------------------------------------------------

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        raws = list(raws)
        self._set_up(raws)
        half = [self._to_unit(r).astype(np.float16).transpose(2, 0, 1) for r in raws]  # finer than 8 bits, half the memory
        self.data = torch.from_numpy(np.stack(half))
        self.module.centre(self.data)
        self.make_critic()

    def new_module(self, channels: int) -> VQGAN:
        o = self.options
        quantiser = {"revive": o.revive, "cosine": o.cosine, "commitment": o.commitment, "entropy": o.entropy}
        size = (self.height, self.width)
        return VQGAN(channels, size, o.downsample, o.stem, o.width, o.depth, o.codes, o.dim, quantiser)

    def new_critic(self) -> PatchCritic:
        return PatchCritic(self.data.shape[1])

    @property
    def last(self) -> Tensor:
        return self.module.out.weight

    def trial(self, index: Tensor, step: int | None) -> Trial:
        o, m = self.options, self.module
        x = self.data[index].float()
        value, _, vq_loss = m.vq(m.latent(x))
        made = m.picture(value)
        reconstruction, mse = m.reconstruction(x, made, o.emphasis, o.structure)
        figures = {"mse": mse, "commitment": vq_loss}
        if step is not None:
            figures |= {k: torch.tensor(v) for k, v in m.vq.usage().items()}
        return Trial((x - m.mean) / m.scale, (made - m.mean) / m.scale, reconstruction, vq_loss, figures)

    def codes(self, index: Tensor) -> Tensor:
        return self.module.vq.encode(self.module.latent(self.data[index].float())).reshape(-1, 1)

    def notice(self) -> str | None:
        return dead_notice(self.modality, self.module.vq.usage())
