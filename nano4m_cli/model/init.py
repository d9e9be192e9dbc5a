"""How weights begin. Sizes named here are of the plain model; muP changes the head's only (`TokenModel._head`).

    scaled   what the layers do themselves: matrices N(0, 1 / inputs), those that write into the residual stream divided by
             the square root of how many do so (Radford et al. 2019); tokens N(0, 0.5^2).
    gpt2     all N(0, 0.02^2), residual ones divided as above (Radford et al. 2019, as nanoGPT reads it).
    xavier   matrices uniform by Glorot and Bengio 2010, queries, keys and values as matrices of their own; tables
             N(0, 0.02^2): what 4M does (Mizrahi et al. 2023).
    zero     scaled, and those that write into the residual stream are zero (Zhang et al. 2019, arXiv:1901.09321): every
             block begins as the identity.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from nano4m_cli.model.layers import TokenTable

Init = Literal["scaled", "gpt2", "xavier", "zero"]


@torch.no_grad()
def initialise(model: nn.Module, kind: Init) -> None:
    """Draw the parameters of a model of ours again from torch's generator; `scaled` leaves them as they were made."""
    if kind == "scaled":
        return
    residual: dict[str, int] = {}  # matrices that write into a residual stream, and how many do so into the same
    for stack, blocks in model.named_children():
        if isinstance(blocks, nn.ModuleList):
            own = [f"{stack}.{n}" for n, _ in blocks.named_parameters() if n.endswith((".out.weight", ".fc2.weight"))]
            residual |= dict.fromkeys(own, len(own))
    tables = {f"{name}.{p}": m for name, m in model.named_modules() if isinstance(m, TokenTable) for p in ("table", "level")}
    for name, p in model.named_parameters():
        if p.ndim < 2 or name == "position" or name.startswith("fourier."):
            continue  # gains; and positions begin as what they are
        if kind == "zero":
            if name in residual:
                p.zero_()
        elif name in tables:
            p.mul_(0.02 / tables[name].std)
        elif kind == "gpt2" or not name.endswith(".weight"):
            p.normal_(std=0.02 / math.sqrt(residual.get(name, 1)))
        else:
            for part in p.chunk(2 if name.endswith(".kv.weight") else 1):
                nn.init.xavier_uniform_(part)
