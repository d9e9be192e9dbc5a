"""4M's DiVAE as a torch module whose tensors have the published names: ViT, codebook on the sphere, diffusion U-Net.

Mizrahi et al. 2023 (arXiv:2312.06647), weights EPFL-VILAB/4M_tokenizers_*: a ViT with a tanh MLP at its end (ViT-VQGAN,
arXiv:2110.04627) gives 32 numbers per patch, whose code is the nearest in angle; the decoder is the U-Net of Dhariwal &
Nichol (2021) on 4 x 4 patches of the noisy picture, with the codes' entries beside them. Widths are read from the tensors.
Legend: B pictures, C channels, T tokens, D width; h, w the grid of codes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.tokenizers._divae_noise import Prediction, Schedule, ddim, signal

HEAD = 64  # channels per attention head, in ViTs of every size
MULTS, BLOCKS, ATTENDING = (1, 2, 2, 2), 3, (2, 3)  # of the U-Net: widths of its levels, blocks in each, levels with attention
DECODER_PATCH = 4
FINEST = DECODER_PATCH * 2 ** (len(MULTS) - 1)  # sides that it halves evenly are multiples of this
# What training leaves in the codebook: whether and how often entries were used. No id and no picture depends on it.
IGNORED = {f"quantize._codebook.{name}" for name in ("initted", "cluster_size", "embed_avg")}


class Published(Config):
    """What a published config says, as far as ids and pictures depend on it; the rest of it is about training.

    What is left out has the default of the published class; what no published DiVAE has is refused.
    """

    model_config = ConfigDict(extra="ignore")

    image_size: int = Field(224, ge=1)
    image_size_enc: int | None = None
    n_channels: Literal[1, 3] = 3
    n_labels: None = None
    enc_type: Literal["vit_s_enc", "vit_b_enc", "vit_l_enc"] = "vit_b_enc"
    patch_proj: Literal[True] = True
    post_mlp: bool = False
    patch_size: int = Field(16, ge=1)
    quant_type: Literal["lucid"] = "lucid"
    codebook_size: int = Field(16384, ge=2)
    num_codebooks: Literal[1] = 1
    latent_dim: int = Field(32, ge=1)
    norm_codes: Literal[True] = True
    dec_type: Literal["unet_patched"] = "unet_patched"
    num_train_timesteps: int = Field(1000, ge=2)
    beta_schedule: Schedule = "squaredcos_cap_v2"
    prediction_type: Prediction = "v_prediction"
    clip_sample: bool = False
    thresholding: bool = True  # dynamic, but with a greatest value of 1: it clips
    zero_terminal_snr: bool = True


# -- encoder ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)  # (B, heads, T, HEAD) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, act: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(B, C, H, W) -> (B, D, h, w); positions are those of the size trained on, interpolated (bicubic) to the grid."""

    def __init__(self, channels: int, patch: int, size: int, width: int, depth: int, post_mlp: bool):
        super().__init__()
        side = size // patch
        self.pos_emb = nn.Parameter(torch.empty(1, width, side, side))
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        if post_mlp:
            self.norm_mlp, self.post_mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        grid = x.shape[2:]
        x = x + F.interpolate(self.pos_emb, grid, mode="bicubic", align_corners=False)
        x = self.blocks(x.flatten(2).transpose(1, 2))
        if hasattr(self, "post_mlp"):
            x = x + self.post_mlp(self.norm_mlp(x))
        return x.transpose(1, 2).unflatten(2, grid)


# -- decoder ----------------------------------------------------------------------------------------------------------


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width)


def conv3(inside: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, stride, padding=1)


class Residual(nn.Module):
    """Two convolutions with the time's vector (B, time) added between."""

    def __init__(self, inside: int, out: int, time: int):
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(inside), nn.SiLU(), conv3(inside, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out))
        self.out_layers = nn.Sequential(group_norm(out), nn.SiLU(), nn.Identity(), conv3(out, out))  # 2: dropout in training
        self.skip_connection = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + self.emb_layers(time)[..., None, None])


class Attending(nn.Module):
    """Residual attention over all places, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.proj_out = group_norm(width), nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).chunk(3, -1)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2)).view_as(x)


class Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = conv3(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in turn; those that want the time get it."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, time) if isinstance(layer, Residual) else layer(x)
        return x


class UNet(nn.Module):
    """Noisy pictures (B, C, H, W), a time and entries of codes (B, latent, h, w) -> prediction (B, C, H, W)."""

    def __init__(self, channels: int, latent: int, width: int):
        super().__init__()
        pixels, time, now, kept = channels * DECODER_PATCH**2, 4 * width, width, [width]
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([Stage(conv3(pixels + latent, width))])
        for level, mult in enumerate(MULTS):
            for _ in range(BLOCKS):
                self.input_blocks.append(self.stage(now, mult * width, level))
                now = mult * width
                kept.append(now)
            if level < len(MULTS) - 1:
                self.input_blocks.append(Stage(Down(now)))
                kept.append(now)
        self.middle_block = Stage(Residual(now, now, time), Attending(now), Residual(now, now, time))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(MULTS))):
            for i in range(BLOCKS + 1):
                self.output_blocks.append(self.stage(now + kept.pop(), mult * width, level))
                now = mult * width
                if level and i == BLOCKS:
                    self.output_blocks[-1].append(Up(now))
        self.out = nn.Sequential(group_norm(now), nn.SiLU(), conv3(now, pixels))

    def stage(self, inside: int, out: int, level: int) -> Stage:
        return Stage(Residual(inside, out, 4 * self.width), *[Attending(out)] * (level in ATTENDING))

    def forward(self, x: Tensor, t: int, entries: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, DECODER_PATCH)
        x = torch.cat([x, F.interpolate(entries, x.shape[2:], mode="nearest")], 1)
        half = self.width // 2
        angle = t * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()])[None])
        kept = []
        for stage in self.input_blocks:
            x = stage(x, time)
            kept.append(x)
        x = self.middle_block(x, time)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, kept.pop()], 1), time)
        return F.pixel_shuffle(self.out(x), DECODER_PATCH)


# -- both -------------------------------------------------------------------------------------------------------------


class DiVAE(nn.Module):
    """Pictures as the encoder takes them (B, C, H, W) to codes (B, h, w), and back from noise."""

    def __init__(self, config: Published, width: int, depth: int, decoder_width: int):
        super().__init__()
        c = self.config = config
        self.encoder = ViT(c.n_channels, c.patch_size, c.image_size_enc or c.image_size, width, depth, c.post_mlp)
        self.quant_proj = nn.Conv2d(width, c.latent_dim, 1)
        self.quantize = nn.Module()
        self.quantize._codebook = nn.Module()
        self.quantize._codebook.register_buffer("embed", torch.empty(c.codebook_size, c.latent_dim))
        self.decoder = UNet(c.n_channels, c.latent_dim, decoder_width)

    @property
    def codebook(self) -> Tensor:
        return self.quantize._codebook.embed

    def encode(self, x: Tensor) -> Tensor:
        z = F.normalize(self.quant_proj(self.encoder(x)).permute(0, 2, 3, 1), dim=-1)
        return (z @ F.normalize(self.codebook, dim=-1).T).argmax(-1)

    def decode(self, codes: Tensor, noise: Tensor, steps: int, clip: bool) -> Tensor:
        """Return what standard normal `noise` (B, C, H, W) becomes under the codes in `steps` steps of DDIM."""
        c = self.config
        entries = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)  # as they are stored, not brought to unit length
        a = signal(c.num_train_timesteps, c.beta_schedule, c.zero_terminal_snr)
        return ddim(noise, lambda x, t: self.decoder(x, t, entries), a, steps, c.prediction_type, clip)


def with_tensors(config: Published, state: dict[str, Tensor]) -> DiVAE:
    """Return the model of a published state dict, for inference; tensors are taken over, not copied.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape or not finite, by name.
    """
    state = {k: v.float() for k, v in state.items() if k not in IGNORED}
    needed = ("encoder.proj.weight", "encoder.blocks.0.norm1.weight", "decoder.input_blocks.0.0.weight")
    if missing := [k for k in needed if k not in state]:
        raise ValueError(f"tensors are missing: {', '.join(missing)}")
    width, decoder_width = len(state[needed[0]]), len(state[needed[2]])
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.blocks."))
    if width % HEAD or decoder_width % 32:
        raise ValueError(f"a ViT of width {width} and a U-Net of width {decoder_width}: multiples of {HEAD} and 32 are needed")
    with torch.device("meta"):  # shapes only
        model = DiVAE(config, width, depth, decoder_width)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    wrong = {
        "missing": [k for k in shapes if k not in state],
        "unknown": [k for k in state if k not in shapes],
        "of another shape": [f"{k} {tuple(v.shape)}, not {shapes[k]}" for k, v in state.items()
                             if k in shapes and tuple(v.shape) != shapes[k]],
        "not finite": [k for k, v in state.items() if not torch.isfinite(v).all()],
    }
    if any(wrong.values()):
        told = [f"{len(n)} tensors are {how} ({', '.join(sorted(n)[:4])}{', ...' * (len(n) > 4)})" for how, n in wrong.items() if n]
        raise ValueError("; ".join(told))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
