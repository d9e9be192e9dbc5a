"""Speculative decoding: one pass checks the slots drafted before, from left to right, and drafts those that follow.

An id drafted with probability q is kept with probability min(1, p / q), where p is what the model says once the ids before it
stand; at the first that is not kept an id is drawn from (p - q)+ instead (Leviathan et al. 2023, arXiv:2211.17192). So ids are
distributed as without drafts, whatever the drafts are. The model drafts for itself: what a pass says of a slot behind the first
doubtful one, given drafted ids or (where there are none yet) without them, is the next draft's q (as in Teng et al. 2024,
arXiv:2410.01699). So every pass fills at least one slot.

Draws are functions of (seed, request, slot), as everywhere. A slot that is drafted again has the same number: what is said of it
depends on slots before it alone, so its number is independent of that.
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
    """The book-keeping of both kinds of targets, requests side by side.

    slots_BL: each request's slots to fill, in their order; total_B: how many; done_B: how many are filled; have_B: how many of
    those that follow are drafted.
    """

    def __init__(self, state: State, target: str, columns: slice, slots_BL: np.ndarray, total_B: np.ndarray, o: GenerateOptions):
        self.state, self.target, self.first, self.o = state, target, columns.start, o
        self.slots_BL, self.total_B = slots_BL, total_B
        self.done_B, self.have_B = np.zeros((2, len(total_B)), dtype=np.int64)
        self.key, self.logq = np.zeros(0, dtype=np.int64), torch.zeros(0)  # of the last pass: which slots, what it said

    def u(self, what: str, row: np.ndarray, number: np.ndarray) -> np.ndarray:
        return self.state.uniform(self.o.seed, f"{what}/{self.target}", row, self.slots_BL[row, number])

    def put(self, row: np.ndarray, number: np.ndarray, ids: np.ndarray) -> None:
        self.state.ids_BC[row, self.first + self.slots_BL[row, number]] = ids

    def told(self, row: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Return how many slots before a slot are filled or drafted."""
        return np.minimum(number, (self.done_B + self.have_B)[row])

    def turn(self, rows: np.ndarray, ask: Callable[[np.ndarray, np.ndarray], Tensor], eos: int | None = None) -> None:
        """Fill one slot or more of each request.

        Args:
            ask: log-probabilities (N, V) of slots (row, number), given what is `told`. eos: what ends a text.
        """
        n = np.minimum(self.o.draft + 1, self.total_B[rows] - self.done_B[rows])
        at = np.repeat(np.arange(len(rows)), n)
        row, place = rows[at], np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        number = self.done_B[row] + place
        logp = ask(row, number)
        new = np.zeros((len(rows), self.o.draft + 1), dtype=np.int64)
        new[at, place] = fresh = draw(logp, self.u("draw", row, number))[0].cpu().numpy()
        bad = np.ones(new.shape, dtype=bool)  # what is not drafted counts as not kept
        key, mine = row * (self.slots_BL.shape[1] + 1) + number, np.flatnonzero(place < self.have_B[row])
        if len(mine):
            r, i, on = row[mine], number[mine], logp.device
            before = torch.from_numpy(np.searchsorted(self.key, key[mine])).to(on)
            ids = self.state.ids_BC[r, self.first + self.slots_BL[r, i]]
            keep, instead = settle(
                logp[torch.from_numpy(mine).to(on)], self.logq[before], ids, self.u("accept", r, i), self.u("again", r, i)
            )
            bad[at[mine], place[mine]], new[at[mine], place[mine]] = ~keep, np.where(keep, ids, instead)
        filled = np.minimum(bad.argmax(1) + 1, n)  # the first that is not kept stands for it
        if eos is not None:
            ends = (new == eos) & (np.arange(new.shape[1]) < filled[:, None])
            filled = np.where(ends.any(1), ends.argmax(1) + 1, filled)
            self.total_B[rows] = np.where(ends.any(1), self.done_B[rows] + filled, self.total_B[rows])
        self.put(row, number, np.where(place < filled[at], new[at, place], fresh))
        self.done_B[rows] += filled
        self.have_B[rows] = n - filled
        self.key, self.logq = key, logp


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

    def ask(row: np.ndarray, number: np.ndarray) -> Tensor:
        slot, told = slots_BL[row, number], draft.told(row, number)
        asked = nothing.copy()
        asked[np.searchsorted(rows, row), columns.start + slot] = True
        packed = pack(layout, state.ids_BC[rows], nothing, asked)
        known = torch.from_numpy(told == number)  # the id before it
        written = memory.written_S
        h = memory.write(replace(packed, dec_prev=torch.where(known, packed.dec_prev, -1)).to(model.device))
        memory.written_S = written
        count(np.unique(row))
        holds = state.rows(row)
        holds.known_BC[:, columns] = np.arange(spec.slots) < (begin[row] + told)[:, None]
        out = choose(h, holds)
        last = torch.from_numpy(slot == spec.slots - 1).to(out.device)  # it can only end the text
        end = torch.full_like(out[:1], -torch.inf)
        end[:, spec.eos] = 0
        return torch.where(last[:, None], end, out)

    while len(alive := np.flatnonzero(draft.done_B < draft.total_B)):
        draft.turn(alive, ask, spec.eos)
        memory.written_S = torch.from_numpy(draft.done_B[rows]).to(model.device)
    return begin + draft.done_B


def fill_drafted(model: TokenModel, state: State, target: str, o: GenerateOptions, choose: Callable[..., Tensor],
                 count: Callable[[np.ndarray], None]) -> None:
    """Fill the unknown slots of a grid or codes target from left to right, in place.

    Args:
        choose: (states, the one slot asked of each (N, L), its number in its order (N,), how many the request has (N,), block of
            every slot (N, C) or None) to filtered log-probabilities (N, V). count: as above.
    """
    columns = model.layout.slice(target)
    unknown = ~state.known_BC[:, columns] & there(model.layout, state.ids_BC, state.known_BC)[:, columns]
    slots_BL = np.argsort(~unknown, axis=1, kind="stable")
    draft = _Draft(state, target, columns, slots_BL, unknown.sum(1), o)
    total = draft.total_B.copy()
    block_BC = None
    if model.in_blocks:  # each slot is a block of its own
        block_BC = np.zeros(state.known_BC.shape, dtype=np.int64)
        block_BC[:, columns] = np.where(unknown, np.cumsum(unknown, 1), 0)

    place = np.argsort(slots_BL, axis=1)  # of each slot among those to fill

    def ask(row: np.ndarray, number: np.ndarray) -> Tensor:
        part = state.rows(row)  # each slot sees other beginnings
        asked = np.zeros((len(row), unknown.shape[1]), dtype=bool)
        asked[np.arange(len(row)), slots_BL[row, number]] = True
        part.known_BC[:, columns] |= unknown[row] & (place[row] < draft.told(row, number)[:, None])
        count(np.unique(row))
        return choose(part, asked, number, total[row], None if block_BC is None else block_BC[row])

    while len(alive := np.flatnonzero(draft.done_B < draft.total_B)):
        draft.turn(alive, ask)
    state.known_BC[:, columns] |= unknown
