"""Speculative decoding: several slots are drafted in one pass in which none sees another, then checked from left to right.

After Leviathan et al. 2023 (arXiv:2211.17192): a drafted id of probability q is kept with probability min(1, p / q), where p is what
the model says once the ids before it stand; at the first that is not kept an id is drawn from (p - q)+ instead, and the rest of the
draft is dropped. So ids are distributed as without a draft, whatever the draft. Here the model drafts for itself.

Draws are functions of (seed, request, slot), as everywhere: a slot that is drafted again has the same number, on which nothing that
was kept depends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.generate.choose import draw
from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.state import State, there
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM
from nano4m_cli.model.memory import Memory

LogP = Callable[..., Tensor]


def settle(logp_NV: Tensor, logq_NV: Tensor, ids_N: np.ndarray, accept_N: np.ndarray, again_N: np.ndarray):
    """Return (which drafted ids are kept (N,) bool, the ids that stand in their place otherwise (N,)).

    Args:
        logp_NV, logq_NV: what the model and the draft say. ids_N: drafted, of q.
        accept_N, again_N: numbers in (0, 1) that decide.
    """
    p, q = logp_NV.double().exp(), logq_NV.double().exp()
    at = torch.from_numpy(ids_N).to(p.device)[:, None]
    keep = torch.from_numpy(accept_N).to(p.device) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)  # equal to rounding
    return keep.cpu().numpy(), draw(rest.log(), again_N)[0].cpu().numpy()


class _Draft:
    """Which of a request's slots to fill are drafted and checked next, requests side by side; the book-keeping of both kinds.

    slots_BL: each request's slots to fill, in their order; total_B: how many. done_B: how many are filled.
    """

    def __init__(self, state: State, target: str, columns: slice, slots_BL: np.ndarray, total_B: np.ndarray, o: GenerateOptions):
        self.state, self.target, self.first, self.o = state, target, columns.start, o
        self.slots_BL, self.total_B, self.done_B = slots_BL, total_B, np.zeros(len(total_B), dtype=np.int64)

    def ahead(self, rows: np.ndarray, more: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, number) of the next `more` slots of each request, as far as there are."""
        n = np.minimum(more, self.total_B[rows] - self.done_B[rows])
        row = np.repeat(rows, n)
        number = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n) + self.done_B[row]
        return row, number

    def u(self, what: str, row: np.ndarray, number: np.ndarray) -> np.ndarray:
        return self.state.uniform(self.o.seed, f"{what}/{self.target}", row, self.slots_BL[row, number])

    def put(self, row: np.ndarray, number: np.ndarray, ids: np.ndarray) -> None:
        self.state.ids_BC[row, self.first + self.slots_BL[row, number]] = ids

    def round(self, rows: np.ndarray, drafted: LogP, checked: LogP, eos: int | None = None) -> None:
        """Fill one slot or more of each request.

        Args:
            drafted, checked: log-probabilities (N, V) of slots (row, number); checked, when the drafted ids are in place.
            eos: where a text ends.
        """
        row, number = self.ahead(rows, self.o.draft)
        logq = drafted(row, number)
        ids = draw(logq, self.u("draw", row, number))[0].cpu().numpy()
        self.put(row, number, ids)
        row2, number2 = self.ahead(rows, self.o.draft + 1)  # and one that follows the draft
        logp = checked(row2, number2)
        extra = draw(logp, self.u("draw", row2, number2))[0].cpu().numpy()
        place, place2 = number - self.done_B[row], number2 - self.done_B[row2]  # in the draft
        at, at2 = np.searchsorted(rows, row), np.searchsorted(rows, row2)
        both = np.zeros((len(rows), self.o.draft + 1), dtype=np.int64)
        both[at2, place2] = np.arange(len(row2))
        second = both[at, place]
        keep, instead = settle(
            logp[torch.from_numpy(second).to(logp.device)], logq, ids, self.u("accept", row, number), self.u("again", row, number)
        )
        drafted_n, checked_n = np.bincount(at, minlength=len(rows)), np.bincount(at2, minlength=len(rows))
        new, other = np.zeros(both.shape, dtype=np.int64), np.zeros(both.shape, dtype=np.int64)
        new[at, place], other[at2, place2] = ids, extra
        other[at, place] = instead
        bad = np.ones(both.shape, dtype=bool)  # what follows the draft counts as not kept
        bad[at, place] = ~keep
        kept = np.minimum(bad.argmax(1), drafted_n)
        new[np.arange(len(rows)), kept] = other[np.arange(len(rows)), kept]
        n = np.minimum(kept + 1, checked_n)
        if eos is not None:
            ends = (new == eos) & (np.arange(new.shape[1]) < n[:, None])
            n = np.where(ends.any(1), ends.argmax(1) + 1, n)
            self.total_B[rows] = np.where(ends.any(1), self.done_B[rows] + n, self.total_B[rows])
        mine, offset = np.nonzero(np.arange(new.shape[1]) < n[:, None])
        self.put(rows[mine], self.done_B[rows[mine]] + offset, new[mine, offset])
        self.done_B[rows] += n


def write_drafted(model: FourM, state: State, target: str, o: GenerateOptions, begin: np.ndarray, rows: np.ndarray,
                  choose: Callable[[Tensor, State], Tensor], count: Callable[[np.ndarray], None]) -> np.ndarray:
    """Write texts to their end in place; return the end of each (B,).

    Args:
        begin: how many slots of each text are known. rows: texts that do not end yet.
        choose: filtered log-probabilities of logits, given what each row holds. count: is told the requests of a model call.
    """
    layout, columns = model.layout, model.layout.slice(target)
    spec = layout.specs[layout.names.index(target)]
    slots_BL = np.minimum(begin[:, None] + np.arange(spec.slots), spec.slots - 1)
    draft = _Draft(state, target, columns, slots_BL, np.where(np.isin(np.arange(len(begin)), rows), spec.slots - begin, 0), o)
    part, registers = state.rows(rows), model.config.registers
    memory = Memory(model, len(rows), int(part.known_BC.sum(1).max(initial=0)) + registers, spec.slots)
    nothing = np.zeros_like(part.known_BC)
    if len(rows):
        memory.read(pack(layout, part.ids_BC, part.known_BC, nothing, registers).to(model.device))

    def logp(row: np.ndarray, number: np.ndarray, told: bool) -> Tensor:
        slot = slots_BL[row, number]
        asked = nothing.copy()
        asked[np.searchsorted(rows, row), columns.start + slot] = True
        packed = pack(layout, state.ids_BC[rows], nothing, asked)
        if not told:  # only the first of the draft knows the id before it
            packed = replace(packed, dec_prev=torch.where(torch.from_numpy(number == draft.done_B[row]), packed.dec_prev, -1))
        written = memory.written_S
        h = memory.write(packed.to(model.device))
        memory.written_S = written
        holds = state.rows(row)
        holds.known_BC[:, columns] = np.arange(spec.slots) < (slot if told else begin[row] + draft.done_B[row])[:, None]
        out = choose(h, holds)
        last = torch.from_numpy(slot == spec.slots - 1).to(out.device)  # it can only end the text
        end = torch.full_like(out[:1], -torch.inf)
        end[:, spec.eos] = 0
        count(np.unique(row))
        return torch.where(last[:, None], end, out)

    while len(alive := np.flatnonzero(draft.done_B < draft.total_B)):
        draft.round(alive, lambda r, n: logp(r, n, False), lambda r, n: logp(r, n, True), spec.eos)
        memory.written_S = torch.from_numpy(draft.done_B[rows]).to(model.device)
    return begin + draft.done_B


def fill_drafted(model: TokenModel, state: State, target: str, o: GenerateOptions, choose: Callable[..., Tensor],
                 count: Callable[[np.ndarray], None]) -> None:
    """Fill the unknown slots of a grid or codes target from left to right, in place.

    Args:
        choose: (requests, which of their slots are asked (N, L), number of each slot in its order (N,), how many the request has
            (N,), block of every slot (N, C) or None) to filtered log-probabilities (N, V), row by row. count: as above.
    """
    columns = model.layout.slice(target)
    unknown = ~state.known_BC[:, columns] & there(model.layout, state.ids_BC, state.known_BC)[:, columns]
    slots_BL = np.argsort(~unknown, axis=1, kind="stable")
    draft = _Draft(state, target, columns, slots_BL, unknown.sum(1), o)
    total = draft.total_B.copy()
    block_BC = None
    if isinstance(model, FourM) and model.config.encoder == "block_causal":  # each slot is a block of its own
        block_BC = np.zeros(state.known_BC.shape, dtype=np.int64)
        block_BC[:, columns] = np.where(unknown, np.cumsum(unknown, 1), 0)

    def logp(row: np.ndarray, number: np.ndarray, told: bool) -> Tensor:
        who, which = (np.arange(len(row)), row) if told else np.unique(row, return_inverse=True)[::-1]
        part = state.rows(which)
        asked = np.zeros((len(which), unknown.shape[1]), dtype=bool)
        asked[who, slots_BL[row, number]] = True
        known = draft.done_B[which] if not told else number
        place = np.argsort(slots_BL[which], axis=1)  # of each slot among those to fill
        part.known_BC[:, columns] |= unknown[which] & (place < known[:, None])
        count(np.unique(row))
        return choose(part, asked, number, total[row], None if block_BC is None else block_BC[which])

    while len(alive := np.flatnonzero(draft.done_B < draft.total_B)):
        draft.round(alive, lambda r, n: logp(r, n, False), lambda r, n: logp(r, n, True))
    state.known_BC[:, columns] |= unknown
