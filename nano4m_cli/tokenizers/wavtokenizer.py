"""Sound to codes of WavTokenizer (Ji et al. 2024, arXiv:2408.16532): one codebook of 4096, 40 or 75 frames/s at 24 kHz.

The encoder is EnCodec's with other ratios and not causal, the decoder Vocos'. Files: the checkpoint of training as
published, read as tensors only, or a safetensors file of its `state_dict`; and its YAML.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from nano4m_cli.config import load_yaml
from nano4m_cli.errors import ConfigError
from nano4m_cli.tokenizers._codec import Codec
from nano4m_cli.tokenizers._local import Foreign, Local, making
from nano4m_cli.tokenizers._pretrained import WeightsOptions
from nano4m_cli.tokenizers._vocos import Backbone, Head

FILTERS = 32  # of the encoder's first layer; the published code has it, no config does


class Features(Foreign):
    num_quantizers: Literal[1]
    dowmsamples: list[int]  # so spelt
    vq_bins: int


class Trunk(Foreign):
    input_channels: int
    dim: int
    intermediate_dim: int
    num_layers: int
    adanorm_num_embeddings: int


class Spectrum(Foreign):
    dim: int
    n_fft: int
    hop_length: int
    padding: Literal["same"]


class FeaturesPart(Foreign):
    init_args: Features


class TrunkPart(Foreign):
    init_args: Trunk


class SpectrumPart(Foreign):
    init_args: Spectrum


class Parts(Foreign):
    sample_rate: int
    feature_extractor: FeaturesPart
    backbone: TrunkPart
    head: SpectrumPart


class Model(Foreign):
    init_args: Parts


class Training(Foreign):
    """What the YAML says of the model; the classes that it names are not looked at."""

    model: Model


class Tokenizer(Local, Codec):
    class Options(WeightsOptions):
        """weights: a folder with one YAML and one checkpoint."""

        weights: str = ""

    name = "wavtokenizer"
    roles = {"config": ("*.yaml",), "checkpoint": ("*.safetensors", "*.ckpt")}
    published = "https://huggingface.co/novateur/WavTokenizer (the .ckpt and the .yaml of one frame rate)"
    codebooks = 1
    # Discriminators and losses, EnCodec's own decoder, which was carried along untrained, and moving averages.
    unused = re.compile(
        r"(multiperioddisc|multiresddisc|dac|dacdiscriminator|disc_loss|gen_loss|feat_matching_loss|melspec_loss)\."
        r"|feature_extractor\.encodec\.decoder\.|.*\._codebook\.(inited|cluster_size|embed_avg)$"
    )

    def open(self, found: dict[str, Path]) -> nn.Module:
        path = found["config"]
        try:
            data = load_yaml(path)
        except ConfigError as err:
            raise self.wrong(err.message) from err
        parts = self.read(Training, data, path).model.init_args
        ratios, head = parts.feature_extractor.init_args.dowmsamples, parts.head.init_args
        if math.prod(ratios) != head.hop_length or parts.backbone.init_args.dim != head.dim:
            raise self.wrong(f"{path}: the head's hop_length and dim do not fit dowmsamples and the backbone's dim")
        model = self.fill(make(parts), self.tensors(found["checkpoint"]))
        model.config = parts
        return model

    @property
    def hop(self) -> int:
        return self.model.config.head.init_args.hop_length

    @property
    def rate(self) -> int:
        return self.model.config.sample_rate

    @property
    def vocab(self) -> int:
        return self.model.config.feature_extractor.init_args.vq_bins

    @property
    def vq(self) -> nn.Module:
        return self.model.feature_extractor.encodec.quantizer.vq

    def to_codes(self, wave_N: Tensor) -> Tensor:
        return self.vq.encode(self.model.feature_extractor.encodec.encoder(wave_N[None, None]))[:, 0]

    def to_wave(self, codes_QT: Tensor) -> Tensor:
        return self.model.head(self.model.backbone(self.vq.decode(codes_QT[:, None])))[0]


def make(c: Parts) -> nn.Module:
    """Return the model with random weights, its tensors under the published names."""
    features, trunk, head = c.feature_extractor.init_args, c.backbone.init_args, c.head.init_args
    model, codec = nn.Module(), nn.Module()
    with making():
        from encodec.modules import SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer

        codec.encoder = SEANetEncoder(dimension=trunk.input_channels, n_filters=FILTERS, ratios=features.dowmsamples)
        codec.quantizer = ResidualVectorQuantizer(dimension=trunk.input_channels, n_q=1, bins=features.vq_bins)
        model.backbone = Backbone(
            trunk.input_channels, trunk.dim, trunk.intermediate_dim, trunk.num_layers, trunk.adanorm_num_embeddings
        )
        model.head = Head(head.dim, head.n_fft, head.hop_length)
    model.feature_extractor = nn.Module()
    model.feature_extractor.encodec = codec
    return model
