"""Sound to codes of DAC (Kumar et al. 2023, arXiv:2306.06546): 50 to 86 frames/s at 16, 24 or 44.1 kHz.

Models: descript/dac_24khz (75 frames/s x 32 codebooks), dac_16khz (50 x 12), dac_44khz (86 x 9), all of 1024 entries.
Sound is resampled where the model's rate is not 24 kHz, and padded with silence to whole frames, as DAC does. Decoding
gives a few samples fewer (its odd strides drop some at the end): padded with silence.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nano4m_cli.tokenizers._codec import BookOptions, Codec


class Tokenizer(Codec):
    class Options(BookOptions):
        weights: str = "descript/dac_24khz"

    name, model_class, model_type = "dac", "DacModel", "dac"

    def open(self, found: dict[str, Path]) -> nn.Module:
        model = self.from_transformers(found)
        self.limited(self.options.codebooks, model.config.n_codebooks)
        return model

    @property
    def hop(self) -> int:
        return self.model.config.hop_length

    def to_codes(self, wave_N: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(wave_N, (0, -len(wave_N) % self.hop))
        return self.model.encode(whole[None, None], n_quantizers=self.codebooks).audio_codes[0]

    def to_wave(self, codes_QT: Tensor) -> Tensor:
        wave = self.model.decode(audio_codes=codes_QT[None]).audio_values[0]  # (N,): this model returns no channels
        return torch.nn.functional.pad(wave, (0, codes_QT.shape[1] * self.hop - len(wave)))
