"""A probe's result: figures with interval, baselines and ceiling, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import field_validator

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

    @field_validator("value", "chance", "majority", "ceiling", "reference")
    @classmethod
    def _finite(cls, v):
        return None if v is None or not math.isfinite(v) else round(float(v), 6)

    @field_validator("ci95")
    @classmethod
    def _interval(cls, v):
        return None if v is None or not all(map(math.isfinite, v)) else (round(v[0], 6), round(v[1], 6))


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
    settings: dict[str, str | int | float | None] = {}


def ratio_interval(top_N: np.ndarray, bottom_N: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return (sum top / sum bottom, its 95 % bootstrap interval over samples).

    Samples are drawn whole, so several objects or pixels of one sample are not taken as independent.
    """
    top, bottom = np.asarray(top_N, dtype=np.float64), np.asarray(bottom_N, dtype=np.float64)
    n = len(top)
    weight = generator(seed, "bootstrap", n).multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)
    below = weight @ bottom
    draws = (weight @ top)[below > 0] / below[below > 0]
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (math.nan, math.nan)
    return float(top.sum() / bottom.sum()) if bottom.sum() else math.nan, (float(low), float(high))


def mean_metric(name: str, values_N: Sequence[float], weights_N: Sequence[float] | None = None, **more) -> Metric:
    """Return the (weighted) mean of per-sample values as a Metric with its interval."""
    values = np.asarray(values_N, dtype=np.float64)
    weights = np.ones_like(values) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    value, interval = ratio_interval(values * weights, weights)
    return Metric(name=name, value=value, n=int((weights > 0).sum()), ci95=interval, **more)
