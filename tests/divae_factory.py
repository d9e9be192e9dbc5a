"""Small weights of 4M's picture tokenizers in the published format: every tensor by its published name, narrow widths.

The names are written out by hand, as apple/ml-4m's modules give them, and not taken from the code under test. What random
encoders send to the codebook is nearly the same for all patches, so it is centred: codes differ from patch to patch.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from nano4m_cli.tokenizers._divae_model import Published, with_tensors

CHANNELS = {"rgb": 3, "depth": 1, "normal": 3, "edges": 1}
D, DEPTH, LATENT, ENTRIES, PATCH, SIDE, U = 128, 2, 32, 64, 16, 4, 32  # U: the U-Net's width
# The U-Net's stages by index: what each is made of, and its widths.
DOWN = {0: "conv", **dict.fromkeys((1, 2, 3, 5, 6, 7), "r"), **dict.fromkeys((4, 8, 12), "d"),
        **dict.fromkeys((9, 10, 11, 13, 14, 15), "ra")}
UP = {**dict.fromkeys((0, 1, 2, 4, 5, 6), "ra"), 3: "rau", 7: "rau", **dict.fromkeys((8, 9, 10, 12, 13, 14, 15), "r"), 11: "ru"}


@functools.cache
def place() -> Path:
    folder = tempfile.mkdtemp(prefix="nano4m-divae-")
    atexit.register(shutil.rmtree, folder, True)
    return Path(folder)


def config(channels: int, **changes) -> dict:
    """Return a config as it is published, with some of what it says of training."""
    return {
        "image_size": PATCH * SIDE, "image_size_enc": None, "n_channels": channels, "n_labels": None, "enc_type": "vit_b_enc",
        "patch_proj": True, "post_mlp": True, "patch_size": PATCH, "quant_type": "lucid", "codebook_size": ENTRIES,
        "num_codebooks": 1, "latent_dim": LATENT, "norm_codes": True, "norm_latents": False, "sync_codebook": False,
        "ema_decay": 0.99, "threshold_ema_dead_code": 0.25, "code_replacement_policy": "batch_random", "undo_std": False,
        "dec_type": "unet_patched", "num_train_timesteps": 1000, "cls_free_guidance_dropout": 0.0, "masked_cfg": False,
        "scheduler": "ddpm", "beta_schedule": "linear", "prediction_type": "sample", "clip_sample": False,
        "thresholding": True, "zero_terminal_snr": True, **changes,
    }


def header(config: dict) -> dict[str, str]:
    """Return the config as the header of a safetensors file holds it: text."""
    return {k: str(v) for k, v in config.items()}


def names(channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name."""
    out: dict[str, tuple[int, ...]] = {}

    def both(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def residual(name, a, b):
        both(f"{name}.in_layers.0", a)
        both(f"{name}.in_layers.2", b, a, 3, 3)
        both(f"{name}.emb_layers.1", b, 4 * U)
        both(f"{name}.out_layers.0", b)
        both(f"{name}.out_layers.3", b, b, 3, 3)
        if a != b:
            both(f"{name}.skip_connection", b, a, 1, 1)

    def attention(name, a):
        both(f"{name}.norm", a)
        both(f"{name}.qkv", 3 * a, a, 1)
        both(f"{name}.proj_out", a, a, 1)

    out["encoder.pos_emb"] = (1, D, SIDE, SIDE)
    both("encoder.proj", D, channels, PATCH, PATCH)
    for i in range(DEPTH):
        for name, *shape in [("norm1", D), ("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("norm2", D), ("mlp.fc1", 4 * D, D),
                             ("mlp.fc2", D, 4 * D)]:
            both(f"encoder.blocks.{i}.{name}", *shape)
    both("encoder.norm_mlp", D)
    both("encoder.post_mlp.fc1", 4 * D, D)
    both("encoder.post_mlp.fc2", D, 4 * D)
    both("quant_proj", LATENT, D, 1, 1)
    out |= {"quantize._codebook.initted": (1,), "quantize._codebook.cluster_size": (ENTRIES,),
            "quantize._codebook.embed": (ENTRIES, LATENT)}
    both("decoder.time_embed.0", 4 * U, U)
    both("decoder.time_embed.2", 4 * U, 4 * U)
    both("decoder.input_blocks.0.0", U, channels * 16 + LATENT, 3, 3)
    now, kept = U, [U]
    for i, kind in sorted(DOWN.items()):
        name, wide = f"decoder.input_blocks.{i}", U if i < 5 else 2 * U
        if kind[0] == "r":
            residual(f"{name}.0", now, wide)
            now = wide
        if kind == "ra":
            attention(f"{name}.1", now)
        if kind == "d":
            both(f"{name}.0.op", now, now, 3, 3)
        if i:
            kept.append(now)
    residual("decoder.middle_block.0", now, now)
    attention("decoder.middle_block.1", now)
    residual("decoder.middle_block.2", now, now)
    for i, kind in sorted(UP.items()):
        name, wide = f"decoder.output_blocks.{i}", 2 * U if i < 12 else U
        residual(f"{name}.0", now + kept.pop(), wide)
        now = wide
        if "a" in kind:
            attention(f"{name}.1", now)
        if "u" in kind:
            both(f"{name}.{len(kind) - 1}.conv", now, now, 3, 3)
    both("decoder.out.0", U)
    both("decoder.out.2", channels * 16, U, 3, 3)
    return out


@functools.cache
def state(channels: int) -> dict[str, torch.Tensor]:
    """Return random tensors by name, of a size that keeps signals of order 1."""
    g, out = torch.Generator().manual_seed(channels), {}
    for name, shape in names(channels).items():
        values = torch.randn(shape, generator=g)
        if name.endswith("bias"):
            out[name] = 0.1 * values
        elif len(shape) == 1:  # norms
            out[name] = 1 + 0.1 * values
        else:
            out[name] = values / max(1, values[0].numel()) ** 0.5
    out["encoder.pos_emb"] = 0.3 * torch.randn(1, D, SIDE, SIDE, generator=g)
    entries = torch.randn(ENTRIES, LATENT, generator=g)
    lengths = 0.8 + 0.4 * torch.rand(ENTRIES, 1, generator=g)  # as a moving average leaves them: not 1
    out["quantize._codebook.embed"] = entries / entries.norm(dim=1, keepdim=True) * lengths
    out["quantize._codebook.initted"] = torch.ones(1)
    model = with_tensors(Published(**config(channels)), out)
    with torch.no_grad():
        seen = model.quant_proj(model.encoder(torch.rand(8, channels, 64, 64, generator=g) * 2 - 1))
        out["quant_proj.bias"] = out["quant_proj.bias"] - seen.mean((0, 2, 3))
    return out


def write(folder: Path, tensors: dict, settings: dict | None, said: dict[str, str] | None = None) -> str:
    """Write a folder as the hub has it; `settings` into config.json, `said` into the header of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", said or {"format": "pt"})
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@functools.cache
def divae_small(modality: str) -> str:
    """Return the folder of a small tokenizer of a modality's pictures."""
    channels = CHANNELS[modality]
    return write(place() / modality, state(channels), config(channels))
