"""Sound to codes of Mimi (Defossez et al. 2024, arXiv:2410.00037): 12.5 frames/s, the first codebook semantic.

The published model, kyutai/mimi, has 32 codebooks of 2048; Moshi uses 8. It returns whole frames, which are trimmed.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from nano4m_cli.tokenizers._codec import BookOptions, Codec
from nano4m_cli.tokenizers._sound import RATE


class Tokenizer(Codec):
    class Options(BookOptions):
        weights: str = "kyutai/mimi"

    name, model_class, model_type = "mimi", "MimiModel", "mimi"

    def open(self, found: dict[str, Path]) -> nn.Module:
        model = self.from_transformers(found)
        c = model.config
        if (c.sampling_rate, c.audio_channels) != (RATE, 1):
            raise self.wrong(f"the model for mono of {RATE} Hz is needed")
        self.limited(self.options.codebooks, c.num_quantizers, c.num_semantic_quantizers)
        return model

    @property
    def hop(self) -> int:
        return round(self.rate / self.model.config.frame_rate)

    def to_codes(self, wave_N: Tensor) -> Tensor:
        return self.model.encode(wave_N[None, None], num_quantizers=self.codebooks).audio_codes[0]

    def to_wave(self, codes_QT: Tensor) -> Tensor:
        return self.model.decode(codes_QT[None]).audio_values[0, 0]
