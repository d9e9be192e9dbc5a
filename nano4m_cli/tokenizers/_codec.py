"""What the pretrained audio codecs share: sound of fixed length to residual codes (T frames, Q codebooks), and back.

Preprocessing (one place: `Codec.inside`): mono 24 kHz, cut or padded with silence to the data set's `seconds`, then
resampled where the codec's rate is another. One sound is encoded at a time: batches gain nothing on a CPU (measured
for EnCodec, one thread), memory stays that of a minute of sound, and ids cannot depend on a sound's neighbours.
Legend: N samples, T frames, Q codebooks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._pretrained import Pretrained, WeightsOptions, from_transformers
from nano4m_cli.tokenizers._sound import RATE, adapted, check_sounds, fixed

PIECE, CONTEXT = 60.0, 10.0  # seconds encoded at once, and of what is around them


class BookOptions(WeightsOptions):
    """weights: a folder with config.json and model.safetensors, else a hub id. codebooks: the first so many."""

    codebooks: int = 8


class Codec(Pretrained):
    """A codec of `codebooks` codebooks with `vocab` entries, one frame per `hop` samples at `rate` Hz.

    Subclasses set `model_class` and `model_type` (of transformers) and give the hop of the model that is loaded, those of
    the other numbers that are not as its config and `BookOptions` say, and its two directions.
    """

    model_class: ClassVar[str]
    model_type: ClassVar[str]

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        self.samples = round(size["seconds"] * RATE)

    @property
    @abstractmethod
    def hop(self) -> int: ...

    @property
    def rate(self) -> int:
        return self.model.config.sampling_rate

    @property
    def codebooks(self) -> int:
        return self.options.codebooks

    @property
    def vocab(self) -> int:
        return self.model.config.codebook_size

    @abstractmethod
    def to_codes(self, wave_N: Tensor) -> Tensor:
        """Return codes (Q, T) of a sound at `rate`."""

    @abstractmethod
    def to_wave(self, codes_QT: Tensor) -> Tensor:
        """Return a sound at `rate`, about T * hop samples long."""

    @property
    def frames(self) -> int:
        return math.ceil(math.ceil(self.samples * self.rate / RATE) / self.hop)

    def inside(self, raw: np.ndarray) -> Tensor:
        """Return the sound as the codec takes it: of the fixed length, at its own rate."""
        return resample(torch.from_numpy(fixed(raw, self.samples)), RATE, self.rate)

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        return fixed(raw, self.samples)

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, self.samples, self.modality)

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="codes", shape=(self.frames, self.codebooks), vocab_size=self.vocab,
            tokenizer=self.ref(self.weights_sha256),
            preprocess={"rate": RATE, "samples": self.samples, "codec_rate": self.rate, "hop": self.hop},
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        check_sounds(raws, where)
        out = []
        with torch.inference_mode():
            for raw in raws:
                codes_QT = self._in_pieces(self.inside(raw), self.to_codes, 1, self.hop)
                assert codes_QT.shape == (self.codebooks, self.frames), (codes_QT.shape, self.codebooks, self.frames)
                out.append(codes_QT.T.reshape(-1).numpy())
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec = self.spec()
        out = []
        with torch.inference_mode():
            for row in ids:
                codes_TQ = check_ids(np.asarray(row), spec.shape, spec, "decode")
                wave = self._in_pieces(torch.from_numpy(codes_TQ.T.copy()), self.to_wave, self.hop, 1)
                wave = resample(wave, self.rate, RATE)
                out.append(fixed(wave.clamp(-1, 1).numpy(), self.samples))
        return out

    def _in_pieces(self, given: Tensor, convert: Callable[[Tensor], Tensor], made: int, taken: int) -> Tensor:
        """Return `convert(given)`; along the last axis `taken` of it give `made` of the result (samples or frames).

        What lasts over PIECE seconds goes in pieces, each with CONTEXT seconds of its neighbours around it: memory stays that of
        a piece. Codecs that look no further give the same as in one go, others nearly.
        """
        frames = [round(seconds * self.rate / self.hop) for seconds in (PIECE, CONTEXT)]
        total = math.ceil(given.shape[-1] / taken)
        if total <= frames[0]:
            return convert(given)
        parts = []
        for start in range(0, total, frames[0]):
            first, end = max(0, start - frames[1]), start + frames[0]
            part = convert(given[..., first * taken : (end + frames[1]) * taken])
            parts.append(part[..., (start - first) * made : (end - first) * made])
        return torch.cat(parts, -1)

    def limited(self, asked: int, there: int, least: int = 1) -> int:
        """Return the number of codebooks asked for, which the model must have."""
        if not least <= asked <= there:
            raise ConfigError(f"{self.modality}.codebooks={asked}: {self.options.weights} has {least} to {there} codebooks")
        return asked

    def from_transformers(self, found: dict[str, Path]) -> nn.Module:
        """Return the transformers model of a folder with config.json and model.safetensors, whole and in fp32."""
        return from_transformers(found, self.model_class, self.model_type, self.wrong)


def resample(wave_N: Tensor, rate: int, target: int) -> Tensor:
    """Return the sound at `target` Hz: ceil(N * target / rate) samples (torchaudio's windowed sinc)."""
    if rate == target:
        return wave_N
    ensure_torchaudio()
    import torchaudio.functional

    return torchaudio.functional.resample(wave_N, rate, target)
