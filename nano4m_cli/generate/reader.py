"""How a 4M model is asked again and again while what it has read stays read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.state import State
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, pack
from nano4m_cli.model.fourm import FourM
from nano4m_cli.model.memory import Memory


class Reader:
    """Asks for slots of one modality step by step; reads only what became known since the step before.

    Args:
        refresh: everything is read anew, as one block, every so many steps (0: never).
        columns: of the modality that is filled.
    """

    def __init__(self, model: FourM, refresh: int, columns: slice):
        self.model, self.refresh, self.columns = model, refresh, columns
        self.memory: Memory | None = None
        self.held: list[tuple[str, int]] = []  # view and request of each sample of the memory
        self.read_BC = np.zeros((0, model.layout.columns), dtype=bool)

    @classmethod
    def of(cls, model: TokenModel, o: GenerateOptions, columns: slice) -> Reader | None:
        """Return a reader where something is to be kept, or None: the model is asked anew at every step."""
        able = isinstance(model, FourM) and (o.refresh or model.in_blocks)
        return cls(model, o.refresh or 0, columns) if able else None

    def turn(self, step: int, rows: np.ndarray) -> None:
        """Say which step comes, and the numbers of the requests that are asked next."""
        self.rows = rows
        if self.refresh and step % self.refresh == 0:
            self.memory = None

    def ask(
        self, names: Sequence[str], ids_BC: np.ndarray, shown_BC: np.ndarray, asked_BC: np.ndarray
    ) -> tuple[Packed, list[Tensor | None]]:
        """Return the packed question and its logits per vocabulary group.

        Args:
            names: of the views; the arrays hold the requests of one after those of the other.
        """
        m, wanted = self.model, [(name, int(row)) for name in names for row in self.rows]
        registers = 0
        if self.memory is None or not set(wanted) <= set(self.held):
            registers = m.config.registers
            room = (shown_BC.sum(1) + (~shown_BC[:, self.columns]).sum(1)).max() + registers
            self.memory, self.read_BC = Memory(m, len(wanted), int(room)), np.zeros_like(shown_BC)
        elif wanted != self.held:
            place = {key: i for i, key in enumerate(self.held)}
            rows = np.array([place[key] for key in wanted])
            self.memory.keep(rows)
            self.read_BC = self.read_BC[rows]
        self.held = wanted
        packed = pack(m.layout, ids_BC, shown_BC & ~self.read_BC, asked_BC, registers).to(m.device)
        self.memory.read(packed)
        self.read_BC = shown_BC.copy()
        return packed, m.logits(packed, self.memory.answer(packed))


class Writer:
    """Writes a text, of the requests `rows`, token by token: what is shown is read once, and so is what was written."""

    def __init__(self, model: FourM, state: State, target: str, rows: np.ndarray):
        self.model, self.state, self.rows = model, state, rows
        self.columns = model.layout.slice(target)
        part = state.rows(rows)
        registers = model.config.registers
        self.memory = Memory(
            model, len(rows), int(part.known_BC.sum(1).max(initial=0)) + registers, self.columns.stop - self.columns.start
        )
        if len(rows):
            nothing = np.zeros_like(part.known_BC)
            self.memory.read(pack(model.layout, part.ids_BC, part.known_BC, nothing, registers).to(model.device))

    def next(self, alive: np.ndarray, slot: np.ndarray) -> Tensor:
        """Return (len(alive), D): what says the token in `slot` of each of some requests, in their order in `rows`."""
        if len(alive) <= len(self.rows) / 2:
            self.memory.keep(np.searchsorted(self.rows, alive))
            self.rows = alive
        asked = np.zeros((len(self.rows), self.model.layout.columns), dtype=bool)
        asked[np.searchsorted(self.rows, alive), self.columns.start + slot] = True
        ids = self.state.ids_BC[self.rows]
        return self.memory.write(pack(self.model.layout, ids, np.zeros_like(asked), asked).to(self.model.device))


class Rewriter:
    """Writes a text with a model that keeps nothing: what is shown is read once, what was written again for each token."""

    def __init__(self, model: TokenModel, state: State, target: str, begin: np.ndarray):
        self.model, self.state, self.begin = model, state, begin
        self.columns, self.nothing = model.layout.slice(target), np.zeros_like(state.known_BC)
        shown = state.known_BC
        self.packed = pack(model.layout, state.ids_BC, shown, self.nothing, model.config.registers).to(model.device)
        self.encoded = model.encode(self.packed)

    def next(self, alive: np.ndarray, slot: np.ndarray) -> Tensor:
        """As `Writer.next`."""
        ids, number = self.state.ids_BC, np.arange(self.columns.stop - self.columns.start)
        asked = np.zeros_like(self.nothing[alive])
        asked[:, self.columns] = (number >= self.begin[alive, None]) & (number <= slot[:, None])
        dec = pack(self.model.layout, ids, self.nothing, asked, 0, answers=(ids[alive], alive)).to(self.model.device)
        shown = self.packed
        h = self.model.decode(replace(dec, enc_ids=shown.enc_ids, enc_col=shown.enc_col, enc=shown.enc), self.encoded)
        return h[torch.from_numpy(np.cumsum(asked.sum(1)) - 1)]
