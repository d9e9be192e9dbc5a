"""Sound to residual codes: a small waveform codec (as EnCodec) trained from scratch, optional critic.

Preprocessing (one place: `_waves`): mono 24 kHz, cut or padded with silence to `seconds`, then with silence to whole frames.
One sound is encoded at a time: ids do not depend on neighbours. The network is in _seanet.py, the quantiser in _vq.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError
from nano4m_cli.rng import bits
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._adversary import Adversarial, AdversarialOptions, SpectralCritic, Trial
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._seanet import Codec, SpectralLoss
from nano4m_cli.tokenizers._sound import RATE, adapted, check_sounds, fixed
from nano4m_cli.tokenizers._vq import dead_notice


class Tokenizer(Adversarial):
    class Options(AdversarialOptions):
        """strides: of the encoder, whose product is the samples per frame (320: 75 frames/s). codebooks, codes, dim: of the
        quantiser. width: channels after the first stride, doubled by each other. window: samples of a clip that a step
        trains on, cut at random (rounded up to whole frames). time: weight of the waveform's own error (the spectra's is 1).
        commitment, revive: of the quantiser (_vq.py). fit_samples, fit_steps: of fitting (None: the usual).
        adversarial, feature_matching, adversarial_start: the critic's weights, and the step it comes in (_adversary.py)."""

        strides: tuple[int, ...] = (8, 5, 4, 2)
        codebooks: int = Field(4, ge=1)
        codes: int = Field(512, ge=2)
        dim: int = Field(32, ge=2)
        width: int = Field(32, ge=2)
        window: int = Field(9_600, ge=1)
        time: float = Field(1.0, ge=0)
        commitment: float = Field(0.1, ge=0)
        revive: int = Field(20, ge=0)
        fit_samples: int = 2_000
        fit_steps: int | None = None

        @field_validator("strides")
        @classmethod
        def _strides(cls, v):
            if not v or min(v) < 2:
                raise ValueError("every stride must be at least 2")
            return v

    name, chunk = "rvq_wave", 64
    train = {"steps": 1000, "batch": 8, "lr": 2e-3, "warmup": 50}

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if "seconds" not in size:
            raise ConfigError(f"{self.name} serves sounds, and the data set gives no length of '{modality}'")
        self.samples, self.hop = round(size["seconds"] * RATE), math.prod(options.strides)
        self.frames = -(-self.samples // self.hop)
        self.sha256 = ""

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        return fixed(raw, self.samples)

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, self.samples, self.modality)

    def _waves(self, raws: Sequence[np.ndarray]) -> Tensor:
        """Return (B, frames * hop)."""
        return torch.from_numpy(np.stack([fixed(fixed(r, self.samples), self.frames * self.hop) for r in raws]))

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="codes", shape=(self.frames, o.codebooks), vocab_size=o.codes,
            tokenizer=self.ref(self.sha256), preprocess={"rate": RATE, "samples": self.samples, "hop": self.hop},
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        check_sounds(raws, where)
        with torch.inference_mode():
            return [self.module.vq.encode(self.module.latent(self._waves([r])))[0].flatten().numpy() for r in raws]

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, out = self.spec(), []
        with torch.inference_mode():
            for row in ids:
                codes = torch.from_numpy(check_ids(np.asarray(row), spec.shape, spec, "decode"))
                wave = self.module.wave(self.module.vq.decode(codes)[None])[0]
                out.append(wave[: self.samples].clamp(-1, 1).numpy())
        return out

    # -- fitting --------------------------------------------------------------------------------------------------

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        self._make()
        raws = list(raws)
        check_sounds(raws, ["the train split"] * len(raws))
        self.data = self._waves(raws)
        self.module.scale.copy_(self.data.square().mean().sqrt().clamp_min(1e-4))
        self.make_critic()

    def _make(self) -> None:
        o = self.options
        self.module = Codec(
            o.strides, o.width, o.dim, o.codebooks, o.codes, {"revive": o.revive, "commitment": o.commitment}
        )
        self.spectral = SpectralLoss()

    def build(self, state: dict[str, Tensor]) -> None:
        self._make()

    def new_critic(self) -> SpectralCritic:
        return SpectralCritic()

    @property
    def last(self) -> Tensor:
        return self.module.out.weight

    def _cut(self, index: Tensor, step: int) -> Tensor:
        """Return a window (B, samples) of each row, its beginning drawn by step and row."""
        length = min(-(-self.options.window // self.hop), self.frames) * self.hop
        room = np.uint64(self.frames * self.hop - length + 1)
        start = torch.from_numpy((bits(0, "window", step, index.numpy()) % room).astype(np.int64))
        return self.data[index[:, None], start[:, None] + torch.arange(length)]

    def trial(self, index: Tensor, step: int | None) -> Trial:
        m, x = self.module, self.data[index] if step is None else self._cut(index, step)
        value, _, vq_loss = m.vq(m.latent(x))
        made = m.wave(value)
        mel, error = self.spectral(made, x), (made - x) / m.scale
        figures = {"mel": mel, "mse": error.square().mean() * m.scale**2, "commitment": vq_loss}
        if step is not None:
            figures |= {k: torch.tensor(v) for k, v in m.vq.usage().items()}
        return Trial(x / m.scale, made / m.scale, mel + self.options.time * error.abs().mean(), vq_loss, figures)

    def codes(self, index: Tensor) -> Tensor:
        return self.module.vq.encode(self.module.latent(self.data[index])).flatten(0, 1)

    def notice(self) -> str | None:
        return dead_notice(self.modality, self.module.vq.usage())
