"""Sound to codes of EnCodec 24 kHz mono (Defossez et al. 2022, arXiv:2210.13438): 75 frames/s, 2 to 32 codebooks.

Two readers of the same model, whose codes are equal: transformers (config.json and model.safetensors, published as
facebook/encodec_24khz) and the `encodec` package (its checkpoint file, read as tensors only).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from nano4m_cli.errors import WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.tokenizers._codec import Codec
from nano4m_cli.tokenizers._pretrained import WeightsOptions, file_hash, first_line
from nano4m_cli.tokenizers._sound import RATE

CODEBOOKS = {1.5: 2, 3.0: 4, 6.0: 8, 12.0: 16, 24.0: 32}  # by kbit/s, with 1024 entries each
CHECKPOINT = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"


class Tokenizer(Codec):
    class Options(WeightsOptions):
        """weights: a folder with config.json and model.safetensors, else a hub id; or the `encodec` package's file.

        bandwidth: kbit/s. backend: what reads the weights; auto: the package where they are a file, else transformers.
        """

        weights: str = "facebook/encodec_24khz"
        bandwidth: float = 1.5
        backend: Literal["auto", "transformers", "encodec"] = "auto"

        @field_validator("bandwidth")
        @classmethod
        def _known(cls, bandwidth: float) -> float:
            if bandwidth not in CODEBOOKS:
                raise ValueError(f"one of {', '.join(f'{b:g}' for b in CODEBOOKS)} kbit/s is needed")
            return bandwidth

    name, model_class, model_type = "encodec", "EncodecModel", "encodec"

    @property
    def packaged(self) -> bool:
        """Whether the `encodec` package reads the weights."""
        o = self.options
        return o.backend == "encodec" or (o.backend == "auto" and Path(o.weights).is_file())

    def find(self) -> dict[str, Path]:
        if not self.packaged:
            return super().find()
        path = Path(self.options.weights).expanduser()
        if not path.is_file():
            raise WeightsError(
                f"no weights of 'encodec': '{path}' is no file, and its package reads one, {CHECKPOINT.rsplit('/')[-1]}",
                f"download {CHECKPOINT} to FILE and {self.give('FILE')}",
            )
        return {"checkpoint": path}

    def open(self, found: dict[str, Path]) -> nn.Module:
        return self._open_package(found["checkpoint"]) if self.packaged else self._open_transformers(found)

    def _open_transformers(self, found: dict[str, Path]) -> nn.Module:
        model, bandwidth = self.from_transformers(found), self.options.bandwidth
        c = model.config
        if (c.sampling_rate, c.audio_channels, c.normalize, c.chunk_length_s) != (RATE, 1, False, None):
            raise self.wrong(f"the model for mono of {RATE} Hz in one piece is needed")
        if bandwidth not in c.target_bandwidths:
            known = ", ".join(f"{b:g}" for b in c.target_bandwidths)
            raise self.wrong(f"made for {known} kbit/s, not {bandwidth:g}", f"give {self.modality}.bandwidth={known}")
        return model

    def _open_package(self, path: Path) -> nn.Module:
        named = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)  # its files carry the beginning of their hash
        if named and not file_hash(path).startswith(named[1]):
            raise self.wrong(f"its name says that its sha256 begins with {named[1]}: it is damaged", f"download {CHECKPOINT}")
        ensure_torchaudio()
        import encodec

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package uses torch's older weight_norm
            model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as err:  # a pickle that is more than tensors, a damaged zip, other names or shapes
            raise self.wrong(f"not a table of this model's tensors: {first_line(err)}", f"download {CHECKPOINT}") from err
        model.set_target_bandwidth(self.options.bandwidth)
        return model.eval()

    @property
    def rate(self) -> int:
        return RATE

    @property
    def hop(self) -> int:
        return int(self.model.encoder.hop_length) if self.packaged else self.model.config.hop_length

    @property
    def codebooks(self) -> int:
        books = self.model.quantizer
        if self.packaged:
            return books.get_num_quantizers_for_bandwidth(self.model.frame_rate, self.options.bandwidth)
        return books.get_num_quantizers_for_bandwidth(self.options.bandwidth)

    @property
    def vocab(self) -> int:
        return self.model.quantizer.bins if self.packaged else self.model.config.codebook_size

    def to_codes(self, wave_N: Tensor) -> Tensor:
        if self.packaged:
            return self.model.encode(wave_N[None, None])[0][0][0]  # of one piece: its codes, of one sound
        return self.model.encode(wave_N[None, None], bandwidth=self.options.bandwidth).audio_codes[0, 0]

    def to_wave(self, codes_QT: Tensor) -> Tensor:
        if self.packaged:
            return self.model.decode([(codes_QT[None], None)])[0, 0]
        return self.model.decode(codes_QT[None, None], [None]).audio_values[0, 0]
