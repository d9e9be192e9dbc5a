"""Requests under way: what is known of each, what each of its stages shows, and the questions that guidance asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.rng import uniform
from nano4m_cli.spec import Layout
from nano4m_cli.tokenizers._base import Tokenizer


@dataclass
class State:
    """Ids (B, C) and which of them are known (B, C); request_B numbers the requests for the draws.

    values: per modality filled by scheme "mean", the expected code values (B, slots, levels), NaN in rows that were sampled.
    seed_B: each request's seed (None: that of the options). away_ids_BC, away_BC: what guidance moves away from, beside
    the target's own slots (None: nothing). work: per modality filled (B, 2): how many ids, in how many model calls.
    """

    ids_BC: np.ndarray
    known_BC: np.ndarray
    request_B: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    seed_B: np.ndarray | None = None
    away_ids_BC: np.ndarray | None = None
    away_BC: np.ndarray | None = None
    work: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, index: np.ndarray) -> State:
        values = {t: v[index] for t, v in self.values.items()}
        more = [None if x is None else x[index] for x in (self.seed_B, self.away_ids_BC, self.away_BC)]
        work = {t: w[index] for t, w in self.work.items()}
        return State(self.ids_BC[index], self.known_BC[index], self.request_B[index], values, *more, work)

    @staticmethod
    def joined(parts: Sequence[State]) -> State:
        """Return one state of several that were filled alike, without what they began from (seeds, what is moved away from)."""
        cat = lambda of: np.concatenate([of(p) for p in parts])  # noqa: E731
        values, work = ({t: cat(lambda p: getattr(p, name)[t]) for t in getattr(parts[0], name)} for name in ("values", "work"))  # noqa: B023
        return State(cat(lambda p: p.ids_BC), cat(lambda p: p.known_BC), cat(lambda p: p.request_B), values, work=work)

    def uniform(self, seed: int, stream: str, row: np.ndarray, *counters: Any) -> np.ndarray:
        """Return numbers in (0, 1) of (the row's seed, stream, the row's request, counters), of their broadcast shape."""
        request = self.request_B[row]
        if self.seed_B is None:
            return uniform(seed, stream, request, *counters)
        seeds, request, *counters = np.broadcast_arrays(self.seed_B[row], request, *counters)
        out = np.zeros(seeds.shape)
        for one in np.unique(seeds):
            here = seeds == one
            out[here] = uniform(int(one), stream, request[here], *(c[here] for c in counters))
        return out

    def decode(self, layout: Layout, target: str, tokenizer: Tokenizer, batch: int = 128) -> list[Any]:
        """Return the raw values of a filled modality."""
        columns, out = layout.slice(target), [None] * len(self.ids_BC)
        mean = np.isfinite(self.values[target]).all((1, 2)) if target in self.values else np.zeros(len(out), dtype=bool)
        for some in (np.flatnonzero(mean), np.flatnonzero(~mean)):
            for start in range(0, len(some), batch):
                rows = some[start : start + batch]
                if mean[rows[0]]:
                    made = tokenizer.decode_values(self.values[target][rows])
                else:
                    made = tokenizer.decode([self.ids_BC[r, columns][self.known_BC[r, columns]] for r in rows])
                for row, raw in zip(rows, made, strict=True):
                    out[row] = raw
        return out


@dataclass(frozen=True)
class Stage:
    """One modality of a request's chain. hidden_C: slots (bool) that it does not see; those of the target are made anew."""

    target: str
    options: GenerateOptions
    hidden_C: np.ndarray | None = None


def there(layout: Layout, ids_BC: np.ndarray, known_BC: np.ndarray) -> np.ndarray:
    """Return bool (B, C): slots that exist; a text whose end is known has none after it."""
    out = np.ones(known_BC.shape, dtype=bool)
    for spec in layout.specs:
        if spec.kind == "sequence":
            columns = layout.slice(spec.modality)
            ended = (ids_BC[:, columns] == spec.eos) & known_BC[:, columns]
            out[:, columns] = np.cumsum(ended, 1) - ended == 0
    return out


@dataclass(frozen=True)
class View:
    """What a model is shown of every request when the target is asked for, the weight of its answer, and which view it is."""

    ids_BC: np.ndarray
    shown_BC: np.ndarray
    there_BC: np.ndarray
    weight: float | str = 1.0
    name: str = ""


def views(layout: Layout, state: State, columns: slice, o: GenerateOptions) -> list[View]:
    """Return what is shown: everything; under guidance first what is moved away from, then each condition with its weight."""
    exists = there(layout, state.ids_BC, state.known_BC)
    if not o.guided:
        return [View(state.ids_BC, state.known_BC, exists)]
    own_C = np.zeros(layout.columns, dtype=bool)
    own_C[columns] = True
    base = View(state.ids_BC, state.known_BC & own_C, exists)
    if state.away_BC is not None:
        away = state.away_BC & ~own_C
        has = (np.add.reduceat(away, layout.start[:-1], axis=1) > 0)[:, layout.modality_C]
        ids = np.where(away, state.away_ids_BC, state.ids_BC)
        base = View(ids, base.shown_BC | away, np.where(has, away, exists))
    out, rest_C = [base], ~own_C
    for name, weight in o.weights:
        mine = np.zeros(layout.columns, dtype=bool)
        mine[layout.slice(name)] = True
        rest_C &= ~mine
        if weight and (state.known_BC & mine & ~own_C).any():
            out.append(View(state.ids_BC, state.known_BC & (own_C | mine), exists, weight, name))
    if not o.weights or (state.known_BC & rest_C).any():
        scale = 1.0 if o.guidance is None else o.guidance
        out.append(View(state.ids_BC, state.known_BC & (own_C | rest_C), exists, scale, "*"))
    return out
