"""The tasks that generation visits: source modalities shown whole, one target modality asked.

Any part of the target may already be known (with probability `known`, a uniform share of it is shown), which is what
a sampler sees half-way. `drop` hides all sources (conditioning dropout, Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import numpy as np
from pydantic import field_validator

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, did_you_mean
from nano4m_cli.masking._base import Component as Base
from nano4m_cli.masking._base import Key
from nano4m_cli.rng import uniform


class Component(Base):
    class Options(Config):
        """source, target: weight of each modality (empty: equal). sources: probability of 1, 2, ... sources.
        known: probability that part of the target is shown, for all targets or per modality (those not named: 0.5).
        extra: modalities that are asked as well, whole, unless shown: always, or with a probability each. max_target: most
        slots asked of the target.
        """

        weight: float = 1.0
        source: dict[str, float] = {}
        target: dict[str, float] = {}
        sources: list[float] = [1.0]
        known: float | dict[str, float] = 0.5
        extra: list[str] | dict[str, float] = []
        drop: float = 0.0
        max_target: int = 256

        @field_validator("max_target")
        @classmethod
        def _asks(cls, v):
            if v < 1:
                raise ValueError("at least one slot must be asked")
            return v

        @field_validator("known", "drop", "extra")
        @classmethod
        def _probability(cls, v):
            if isinstance(v, list):
                return v
            if not all(0 <= p <= 1 for p in (v.values() if isinstance(v, dict) else [v])):
                raise ValueError("a probability lies between 0 and 1")
            return v

        @field_validator("source", "target")
        @classmethod
        def _weights(cls, v):
            if v and (min(v.values()) < 0 or sum(v.values()) <= 0):
                raise ValueError("weights are not negative, and one at least is positive")
            return v

        @field_validator("sources")
        @classmethod
        def _sources(cls, v):
            if not v or min(v) < 0 or sum(v) <= 0:
                raise ValueError("probabilities of 1, 2, ... sources: not negative, one at least positive")
            return v

    def __init__(self, options: Config, names: list[str]):
        super().__init__(options, names)
        known = options.known if isinstance(options.known, dict) else dict.fromkeys(names, options.known)
        for given in (*options.source, *options.target, *options.extra, *known):
            if given not in names:
                raise ConfigError(f"masking: modality '{given}' is not in this run", did_you_mean(given, names))
        self.source_M = np.array([options.source.get(n, 0.0) if options.source else 1.0 for n in names])
        self.target_M = np.array([options.target.get(n, 0.0) if options.target else 1.0 for n in names])
        extra = options.extra if isinstance(options.extra, dict) else dict.fromkeys(options.extra, 1.0)
        self.extra_M = np.array([extra.get(n, 0.0) for n in names])
        self.known_M = np.array([known.get(n, 0.5) for n in names])
        self.cumulative = np.cumsum(options.sources) / sum(options.sources)

    def counts(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        o, (b, m) = self.options, length_BM.shape
        there = length_BM > 0
        draw = lambda name, *more: uniform(key.seed, f"{key.stream}/{name}", key.counter_B, *more)  # noqa: E731
        axis = np.arange(m)
        column = key.counter_B[:, None], axis

        # The target first, by its weights; then sources among the rest, by theirs (Gumbel top-k, without replacement).
        gumbel = -np.log(-np.log(uniform(key.seed, key.stream + "/t", *column)))
        wanted = np.where(there, self.target_M, 0.0)
        wanted = np.where(wanted.sum(1, keepdims=True) > 0, wanted, there)  # a sample without any: one that it has
        target_B = np.argmax(_log(wanted) + gumbel, axis=1)
        is_target = axis == target_B[:, None]
        gumbel = -np.log(-np.log(uniform(key.seed, key.stream + "/s", *column)))
        can = there & ~is_target
        weight = np.where(can, self.source_M, 0.0)
        weight = np.where(weight.sum(1, keepdims=True) > 0, weight, can)  # where none is wanted: any that is there
        can = weight > 0
        score = np.where(can, _log(weight) + gumbel, -np.inf)
        n_sources = 1 + np.searchsorted(self.cumulative, draw("n"), side="right")
        rank = np.argsort(np.argsort(-score, axis=1), axis=1)
        is_source = can & (rank < n_sources[:, None]) & (draw("drop") >= o.drop)[:, None]

        length_t = length_BM[np.arange(b), target_B]
        part = np.floor(draw("part") * length_t).astype(np.int64)
        known = np.where(draw("known") < self.known_M[target_B], part, 0)
        shown = np.where(is_source, length_BM, 0) + np.where(is_target, known[:, None], 0)
        asked = np.where(is_target, np.minimum(length_t - known, o.max_target)[:, None], 0)
        also = uniform(key.seed, key.stream + "/extra", *column) < self.extra_M
        asked = np.where(also & ~is_source & ~is_target, length_BM, asked)
        return shown, asked


def _log(weight: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(weight)
