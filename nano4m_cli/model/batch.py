"""The packed batch: samples of different length side by side, never padded.

Names: T tokens in all, S samples (or segments), C columns of the layout, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.spec import Layout


@dataclass(frozen=True)
class Ragged:
    """Where the rows of a packed (T, ...) tensor go in a padded (S, L, ...) one: used inside attention only.

    lengths: (S,) tokens per row. place: (T,) row * L + offset. width: L, the longest row.
    """

    lengths: Tensor
    place: Tensor
    width: int

    @classmethod
    def of(cls, lengths_S: np.ndarray) -> Ragged:
        lengths = np.asarray(lengths_S, dtype=np.int64)
        width = max(int(lengths.max(initial=0)), 1)
        start = np.cumsum(lengths) - lengths
        place = np.repeat(np.arange(len(lengths)) * width - start, lengths)
        place += np.arange(len(place))
        return cls(torch.from_numpy(lengths), torch.from_numpy(place), width)

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    def each(self, do: Callable[[Tensor], Tensor]) -> Ragged:
        return replace(self, lengths=do(self.lengths), place=do(self.place))

    def to(self, device) -> Ragged:
        return self.each(sender(device))


def sender(device) -> Callable[[Tensor], Tensor]:
    """Return what brings a tensor of the host to a device: to CUDA without waiting, which pinned memory allows."""
    return lambda x: x.to(device, non_blocking=torch.device(device).type == "cuda" and x.is_pinned())


@dataclass(frozen=True)
class Packed:
    """A batch. Encoder: ids and columns of what is shown, per sample. Decoder: the same of what is asked.

    enc_ids, enc_col: (Te,); registers have column -1. enc: rows are samples.
    dec_ids, dec_col: (Td,) the answers and their columns; dec_prev: (Td,) for text the id before it (-1: none yet, and
    for other kinds). dec: rows are decoder samples; dec_self: rows are (sample, modality) runs of them, the extent of
    decoder self-attention; dec_causal: (rows of dec_self,) whether a run is text.
    dec_context: (rows of dec,) encoder row that each decoder sample looks at; None: the same row.
    enc_block: (Te,) block of each encoder token, for a block-causal encoder: it sees no later one (None: one block).
    group_index: per vocabulary group, positions in Td that it answers (None: nothing asked).
    """

    enc_ids: Tensor
    enc_col: Tensor
    enc: Ragged
    dec_ids: Tensor
    dec_col: Tensor
    dec_prev: Tensor
    dec: Ragged
    dec_self: Ragged
    dec_causal: Tensor
    group_index: tuple[Tensor | None, ...]
    dec_context: Tensor | None = None
    enc_block: Tensor | None = None

    def each(self, do: Callable[[Tensor], Tensor]) -> Packed:
        """Return the batch with something done to all of its tensors."""
        def move(value):
            if isinstance(value, tuple):
                return tuple(move(v) for v in value)
            return value if value is None else value.each(do) if isinstance(value, Ragged) else do(value)

        return Packed(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def to(self, device) -> Packed:
        return self.each(sender(device))

    @property
    def samples(self) -> int:
        return self.enc.rows


def pack(
    layout: Layout,
    ids_BC: np.ndarray,
    shown_BC: np.ndarray,
    asked_BC: np.ndarray,
    registers: int = 0,
    answers: tuple[np.ndarray, np.ndarray] | None = None,
    block_BC: np.ndarray | None = None,
) -> Packed:
    """Return the packed batch of dense (samples, columns) arrays.

    Args:
        ids_BC: integer ids; values outside `shown` and `asked` are never read, except a text's id before an asked one.
        shown_BC, asked_BC: bool.
        registers: learned tokens put before each sample's encoder input, so that it is never empty.
        answers: (ids_AC, context_A) where the decoder's samples are not the encoder's: `asked_BC` then has A rows,
            decoder row a answers for encoder row context_A[a].
        block_BC: block of each shown slot, from 0 (registers are of block 0); None: all are one.
    """
    b, m = len(ids_BC), len(layout.specs)
    place, row, col = _chosen(shown_BC)
    at = np.arange(len(row)) + (row + 1) * registers
    enc_ids, enc_col = np.zeros(len(row) + b * registers, dtype=np.int64), np.full(len(row) + b * registers, -1)
    enc_ids[at], enc_col[at] = ids_BC.reshape(-1)[place], col
    lengths = np.bincount(row, minlength=b) + registers
    block = None
    if block_BC is not None:
        block = np.zeros(len(enc_ids), dtype=np.int64)
        block[at] = block_BC.reshape(-1)[place]

    dec_source, context = (ids_BC, None) if answers is None else answers
    place, arow, acol = _chosen(asked_BC)
    dec_flat = dec_source.reshape(-1)
    follows = layout.sequence_C.copy()  # columns with an id before them
    follows[layout.start[:-1]] = False
    prev, text = np.full(len(place), -1), np.flatnonzero(follows[acol])
    prev[text] = dec_flat[place[text] - 1]
    per_modality = np.bincount(arow * m + layout.modality_C[acol], minlength=len(asked_BC) * m).reshape(-1, m)  # (A, M)
    run_row, run_m = np.nonzero(per_modality)
    group_T = layout.group_C.astype(np.int16)[acol]
    order = np.argsort(group_T, kind="stable")  # of 16 bits: a radix sort
    edges = np.searchsorted(group_T[order], np.arange(len(layout.groups) + 1))
    as_tensor = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))  # noqa: E731
    return Packed(
        enc_ids=as_tensor(enc_ids), enc_col=as_tensor(enc_col), enc=Ragged.of(lengths),
        dec_ids=as_tensor(dec_flat[place]), dec_col=as_tensor(acol), dec_prev=as_tensor(prev),
        dec=Ragged.of(per_modality.sum(1)), dec_self=Ragged.of(per_modality[run_row, run_m]),
        dec_causal=torch.from_numpy(np.array([s.kind == "sequence" for s in layout.specs])[run_m]),
        group_index=tuple(
            as_tensor(order[a:z]) if z > a else None for a, z in zip(edges[:-1], edges[1:], strict=True)
        ),
        dec_context=None if context is None else as_tensor(context),
        enc_block=None if block is None else as_tensor(block),
    )


def _chosen(x_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where entries are true: place in the flat array, row, column (several times quicker than np.nonzero of it)."""
    place = np.flatnonzero(x_BC)
    row = place // x_BC.shape[1]
    return place, row, place - row * x_BC.shape[1]


@dataclass(frozen=True)
class Merged:
    """Shown and asked tokens of each sample in one row, in the order of their columns: for models of one stack.

    ids, col: (T,). rows: Ragged over decoder samples. asked: (Td,) where each asked token stands. shown: (T,) bool.
    """

    ids: Tensor
    col: Tensor
    rows: Ragged
    asked: Tensor
    shown: Tensor


def merged(batch: Packed) -> Merged:
    """Return a batch (packed without registers) as one row per decoder sample; what a sample sees is repeated for each of
    several that look at it."""
    device = batch.dec_ids.device
    enc, dec = batch.enc.lengths.cpu().numpy(), batch.dec.lengths.cpu().numpy()
    look = np.arange(len(dec)) if batch.dec_context is None else batch.dec_context.cpu().numpy()
    n, first = enc[look], (np.cumsum(enc) - enc)[look]
    own = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
    seen = torch.from_numpy(np.repeat(first, n) + own).to(device)
    col = torch.cat([batch.enc_col[seen], batch.dec_col])
    row = np.concatenate([np.repeat(np.arange(len(dec)), n), np.repeat(np.arange(len(dec)), dec)])
    order = torch.argsort(torch.from_numpy(row).to(device) * (int(col.max()) + 1) + col)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
    return Merged(
        torch.cat([batch.enc_ids[seen], batch.dec_ids])[order], col[order], Ragged.of(n + dec).to(device),
        place[len(seen):], (order < len(seen)),
    )
