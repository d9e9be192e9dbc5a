"""What passes through a model's layers while it reads a batch, seen from outside: hidden states, and answers made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nano4m_cli.model.attention import Mask
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, merged


@dataclass
class Trace:
    """layers: hidden states (T, D), 0 what the first block is given and i what block i gives. mask: of the first self-attention."""

    layers: list[Tensor] = field(default_factory=list)
    mask: Mask | None = None


@contextmanager
def traced(blocks: nn.ModuleList) -> Iterator[Trace]:
    """Record what passes through a stack of blocks, for the one call of the model that is made inside."""
    trace = Trace()

    def begin(block: nn.Module, args: tuple) -> None:
        trace.layers.append(args[0])
        trace.mask = args[1]

    handles = [blocks[0].register_forward_pre_hook(begin)]
    handles += [b.register_forward_hook(lambda block, args, out: trace.layers.append(out)) for b in blocks]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def hidden_shown(model: TokenModel, batch: Packed) -> tuple[list[Tensor], Tensor]:
    """Return (per layer the hidden states (T, D) of what a batch shows, tokens per sample (B,)).

    Of an encoder: all its tokens, registers among them. Of one stack: the tokens of the samples' rows; where slots that are not
    known stand in them as masks, those of known slots only.
    """
    with traced(model.encoder if model.encodes else model.blocks) as trace, torch.inference_mode():
        if model.encodes:
            model.encode(batch)
        else:
            model.answers(batch)
    layers, lengths = trace.layers, trace.mask.q.lengths
    if model.wholly:
        m = merged(batch)
        layers, lengths = [x[m.shown] for x in layers], batch.enc.lengths
    return layers, lengths


def answers_by_layer(model: TokenModel, batch: Packed) -> list[Tensor]:
    """Return per layer of the decoder (or the stack) what the model would answer with (Td, D) if that layer were the last:
    hidden states through the final norm. The last one is `model.answers`."""
    with traced(model.decoder if model.encodes else model.blocks) as trace, torch.inference_mode():
        model.answers(batch)
        return [_final(model, batch)(x) for x in trace.layers]


def _final(model: TokenModel, batch: Packed) -> Callable[[Tensor], Tensor]:
    if model.encodes:
        return model.dec_norm
    asked = merged(batch).asked
    return lambda x: model.norm(x).index_select(0, asked)
