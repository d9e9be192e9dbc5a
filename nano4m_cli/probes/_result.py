"""A probe's result: figures with interval, baselines and ceiling, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from nano4m_cli.config import Config
from nano4m_cli.rng import generator

RESAMPLES = 1000


class Metric(Config):
    """One figure.

    name: "source->target/metric" (sources joined by "+") or "modality/metric".
    n: samples. ci95: bootstrap over samples. chance: a uniform guess. majority: always the commonest answer (of the
    train split). ceiling: what the source determines at all, where the data set knows it. reference: the same
    figure for the best that could be expected (the tokenizer's own round trip, the judge on real data).
    setting: where one figure is measured under several, which (a report then lays them out side by side).
    per_sample: (values (n,), weights (n,)) that the figure is the weighted mean of, in the split's order: kept beside the
        results, so that runs can be compared sample by sample.
    """

    name: str
    value: float | None
    n: int
    ci95: tuple[float, float] | None = None
    chance: float | None = None
    majority: float | None = None
    ceiling: float | None = None
    reference: float | None = None
    higher_is_better: bool = True
    unit: str = ""
    in_distribution: bool | None = None
    setting: dict[str, str | int | float] | None = None
    per_sample: Any = Field(None, exclude=True, repr=False)

    @field_validator("value", "chance", "majority", "ceiling", "reference")
    @classmethod
    def _finite(cls, v):
        return None if v is None or not math.isfinite(v) else round(float(v), 6)

    @field_validator("ci95")
    @classmethod
    def _interval(cls, v):
        return None if v is None or not all(map(math.isfinite, v)) else (round(v[0], 6), round(v[1], 6))


class Plot(Config):
    """What a page draws or lays out beside the figures.

    kind: "matrix" is a heat map of values[row][column]; "curve" draws each row as a line over the columns, which are then
        numbers; "table" is laid out as it is.
    values: (rows, columns), None where nothing was measured; text in tables only. low, high: 95 % intervals of a curve.
    x, y: what the axes are, with units. diagonal: of a curve, whether y = x is drawn (what a calibrated model would give).
    """

    name: str
    title: str
    kind: Literal["matrix", "curve", "table"]
    rows: list[str]
    columns: list[str | float]
    values: list[list[str | float | None]]
    low: list[list[float | None]] | None = None
    high: list[list[float | None]] | None = None
    x: str = ""
    y: str = ""
    diagonal: bool = False

    @field_validator("values", "low", "high", mode="before")
    @classmethod
    def _rounded(cls, v):
        keep = lambda x: None if not math.isfinite(x) else round(float(x), 6)  # noqa: E731
        return v if v is None else [[x if x is None or isinstance(x, str) else keep(x) for x in row] for row in v]

    @model_validator(mode="after")
    def _shape(self) -> Plot:
        for part in (self.values, self.low, self.high):
            assert part is None or [len(r) for r in part] == [len(self.columns)] * len(self.rows), (self.name, len(self.rows))
        assert self.kind == "table" or not any(isinstance(x, str) for row in self.values for x in row), self.name
        assert self.kind != "curve" or not any(isinstance(c, str) for c in self.columns), self.name
        return self


@dataclass(frozen=True)
class Findings:
    """What a probe measured: figures, remarks that a reader needs, and what is drawn beside them."""

    metrics: list[Metric]
    notes: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


class Direction(Config):
    """Whether training posed a question, and how often (share of samples)."""

    value: bool
    frequency: float


class Result(Config):
    """What `runs/<run>/eval/<probe>.json` holds."""

    probe: str
    version: int
    title: str
    split: str
    seed: int
    run: str
    checkpoint: str
    data: str
    commit: str | None
    metrics: list[Metric]
    in_distribution: dict[str, Direction] = {}
    notes: list[str] = []
    plots: list[Plot] = []
    settings: dict[str, str | int | float | None] = {}


@lru_cache(maxsize=8)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Return (RESAMPLES, n): how often each of n samples is drawn in each bootstrap resample (read only; kept, since most
    figures of an evaluation are of the same samples)."""
    drawn = generator(seed, "bootstrap", n).multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES).astype(np.float64)
    drawn.setflags(write=False)
    return drawn


def ratio_interval(top_N: np.ndarray, bottom_N: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return (sum top / sum bottom, its 95 % bootstrap interval over samples).

    Samples are drawn whole, so several objects or pixels of one sample are not taken as independent.
    """
    top, bottom = np.asarray(top_N, dtype=np.float64), np.asarray(bottom_N, dtype=np.float64)
    weight = resamples(len(top), seed)
    below = weight @ bottom
    draws = (weight @ top)[below > 0] / below[below > 0]
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (math.nan, math.nan)
    return float(top.sum() / bottom.sum()) if bottom.sum() else math.nan, (float(low), float(high))


def mean_metric(name: str, values_N: Sequence[float], weights_N: Sequence[float] | None = None, **more) -> Metric:
    """Return the (weighted) mean of per-sample values as a Metric with its interval."""
    values = np.asarray(values_N, dtype=np.float64)
    weights = np.ones_like(values) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    value, interval = ratio_interval(values * weights, weights)
    return Metric(name=name, value=value, n=int((weights > 0).sum()), ci95=interval, per_sample=(values, weights), **more)
