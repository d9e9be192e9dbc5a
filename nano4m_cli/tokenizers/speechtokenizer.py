"""Sound to codes of SpeechTokenizer (Zhang et al. 2023, arXiv:2308.16692): 50 frames/s, the first codebook semantic.

Trained on speech at 16 kHz; 8 codebooks of 1024 entries. Two models are published, with ELU and with snake activations;
their parts are those of EnCodec, not causal, with a recurrent layer in both directions in the encoder.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nano4m_cli.tokenizers._codec import BookOptions, Codec
from nano4m_cli.tokenizers._local import Foreign, Local, making


class Shape(Foreign):
    """What SpeechTokenizer's config.json says of the model (with it stands what training needed)."""

    sample_rate: int
    n_filters: int
    dimension: int
    strides: list[int]
    lstm_layers: int
    bidirectional: bool
    dilation_base: int
    residual_kernel_size: int
    n_residual_layers: int
    activation: Literal["ELU", "Snake"]
    codebook_size: int
    n_q: int


class Tokenizer(Local, Codec):
    class Options(BookOptions):
        """weights: a folder with config.json and the checkpoint. codebooks: the first so many."""

        weights: str = ""

    name = "speechtokenizer"
    roles = {"config": ("config.json",), "checkpoint": ("*.safetensors", "*.pt", "*.dev")}
    published = "https://huggingface.co/fnlp/SpeechTokenizer (config.json, SpeechTokenizer.pt)"
    # `transform` maps to the teacher's width; the rest are the codebooks' moving averages.
    unused = re.compile(r"transform\.|.*\._codebook\.(inited|cluster_size|embed_avg)$")

    def open(self, found: dict[str, Path]) -> nn.Module:
        path = found["config"]
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as err:
            raise self.wrong(f"{path} is damaged: {err}") from err
        shape = self.read(Shape, data, path)
        self.limited(self.options.codebooks, shape.n_q)
        model = self.fill(make(shape), self.tensors(found["checkpoint"]))
        model.config = shape
        return model

    @property
    def hop(self) -> int:
        return math.prod(self.model.config.strides)

    @property
    def rate(self) -> int:
        return self.model.config.sample_rate

    def to_codes(self, wave_N: Tensor) -> Tensor:
        return self.model.quantizer.vq.encode(self.model.encoder(wave_N[None, None]), n_q=self.codebooks)[:, 0]

    def to_wave(self, codes_QT: Tensor) -> Tensor:
        return self.model.decoder(self.model.quantizer.vq.decode(codes_QT[:, None]))[0, 0]


def make(c: Shape) -> nn.Module:
    """Return the model with random weights, its tensors under the published names."""
    model = nn.Module()
    with making():
        from encodec.modules import SConv1d, SEANetDecoder, SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer

        shared = {
            "n_filters": c.n_filters, "dimension": c.dimension, "ratios": c.strides, "lstm": c.lstm_layers,
            "dilation_base": c.dilation_base, "residual_kernel_size": c.residual_kernel_size,
            "n_residual_layers": c.n_residual_layers,
        }
        model.encoder, model.decoder = SEANetEncoder(**shared), SEANetDecoder(**shared)
        if c.bidirectional and c.lstm_layers:
            layers, width = model.encoder.model, c.n_filters * 2 ** len(c.strides)
            layers[-3] = BothWays(width, c.lstm_layers)
            layers[-1] = SConv1d(2 * width, c.dimension, 7, norm="weight_norm")
        model.quantizer = ResidualVectorQuantizer(dimension=c.dimension, n_q=c.n_q, bins=c.codebook_size)
    if c.activation == "Snake":
        for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
            for i in [i for i, layer in enumerate(layers) if isinstance(layer, nn.ELU)]:
                conv = next(m for m in layers[i + 1].modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d))
                layers[i] = Snake(conv.in_channels)
    return model


class BothWays(nn.Module):
    """A recurrent layer over time in both directions, with the input added to the output of each."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, bidirectional=True)

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_TBC = x_BCT.permute(2, 0, 1)
        return (self.lstm(x_TBC)[0] + torch.cat([x_TBC, x_TBC], -1)).permute(1, 2, 0)


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, with alpha per channel (Ziyin et al. 2020, arXiv:2006.08195)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x_BCT: Tensor) -> Tensor:
        return x_BCT + torch.sin(self.alpha * x_BCT) ** 2 / (self.alpha + 1e-9)
