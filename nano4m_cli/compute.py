"""What the machine does well."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiplies_bf16(device: str) -> bool:
    """Return whether a kind of device ("cpu", "cuda") multiplies bf16 itself; where it does not, bf16 is many times
    slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


BF16_WIDTH = 512  # on a CPU products of narrower models are too small to make up for the casts (scripts/bench/precision.py)


def pays_bf16(device: str, width: int) -> bool:
    """Return whether bf16 autocast makes training of a model of this width quicker on a kind of device."""
    return multiplies_bf16(device) and (device != "cpu" or width >= BF16_WIDTH)
