"""The mixture of components that a config lists, and what it really shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import field_validator

from nano4m_cli.config import Config, build
from nano4m_cli.errors import ConfigError, did_you_mean
from nano4m_cli.masking._base import Component, Key
from nano4m_cli.masking._slots import Pattern, choose_slots
from nano4m_cli.registry import COMPONENTS
from nano4m_cli.rng import uniform
from nano4m_cli.spec import Layout

IN_DISTRIBUTION = 1e-3  # a direction that fewer samples pose than this is called out of distribution


class MaskingConfig(Config):
    """components: each {type: NAME, weight: w, ...its options}; drawn per sample. slots: pattern per modality
    (default: random for grids and codes; text is always prefix)."""

    components: list[dict[str, Any]] = [{"type": "dirichlet"}]
    slots: dict[str, Pattern] = {}

    @field_validator("components")
    @classmethod
    def _components(cls, v):
        if not v:
            raise ValueError("at least one masking component is needed")
        return v


@dataclass(frozen=True)
class MaskReport:
    """What the masking showed in a simulation (see `Mixture.simulate`)."""

    samples: int
    used: float
    encoder_tokens: float
    decoder_tokens: float
    visible: dict[str, float]
    asked: dict[str, float]
    single_source: float
    full_source: float
    directions: dict[str, float] = field(default_factory=dict)  # "a+b->c": share of samples


class Mixture:
    """Draws a mask for every sample of a batch: component, counts, slots."""

    def __init__(self, config: MaskingConfig, layout: Layout):
        self.layout = layout
        self.components: list[Component] = []
        weights = []
        for i, item in enumerate(config.components):
            rest = dict(item)
            name = rest.pop("type", None)
            where = f"masking.components.{i}"
            if not isinstance(name, str):
                raise ConfigError(f"{where}: 'type' is missing", f"one of {', '.join(COMPONENTS.names())}")
            cls = COMPONENTS.get(name)
            options = build(cls.Options, rest, where)
            if options.weight < 0:
                raise ConfigError(f"{where}: weight is negative")
            self.components.append(cls(options, layout.names))
            weights.append(options.weight)
        if sum(weights) <= 0:
            raise ConfigError("masking.components: all weights are zero")
        self.cumulative = np.cumsum(weights) / sum(weights)
        for name in config.slots:
            if name not in layout.names:
                raise ConfigError(f"masking.slots: modality '{name}' is not in this run", did_you_mean(name, layout.names))
        self.patterns: list[Pattern] = []
        text = {c.text for c in self.components}
        if len(text) > 1:
            raise ConfigError("masking.components: some predict text left to right and others in any order; they do not mix")
        (text,) = text
        for spec in layout.specs:
            given = config.slots.get(spec.modality, text if spec.kind == "sequence" else "random")
            if spec.kind == "sequence" and text == "prefix" != given:
                raise ConfigError(f"masking.slots.{spec.modality}: text is predicted left to right, only 'prefix' fits")
            self.patterns.append(given)

    def draw(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Return bool (shown_BC, asked_BC) over the layout's columns; disjoint, something asked in every sample.

        Args:
            length_BM: slots that each sample has of each modality (0: missing).
        """
        pick = np.searchsorted(self.cumulative, uniform(key.seed, key.stream + "/component", key.counter_B), side="right")
        shown = np.zeros(length_BM.shape, dtype=np.int64)
        asked = np.zeros(length_BM.shape, dtype=np.int64)
        for i, component in enumerate(self.components):
            rows = np.flatnonzero(pick == i)
            if len(rows):
                shown[rows], asked[rows] = component.counts(length_BM[rows], key.rows(rows).sub(str(i)))
        parts = [
            choose_slots(p, s, length_BM[:, m], shown[:, m], asked[:, m], key.sub(s.modality))
            for m, (p, s) in enumerate(zip(self.patterns, self.layout.specs, strict=True))
        ]
        return np.concatenate([a for a, _ in parts], 1), np.concatenate([b for _, b in parts], 1)

    def simulate(self, length_BM: np.ndarray, seed: int, samples: int = 8192) -> MaskReport:
        """Return what masks drawn for `samples` samples (lengths repeated as needed) show.

        A direction "sources->target" is counted when exactly the sources are shown, whole (part of the target may be
        shown too), and the target is asked; "->target" when no other modality is shown.
        """
        length = length_BM[np.arange(samples) % len(length_BM)]
        shown_BC, asked_BC = self.draw(length, Key(seed, "mask", np.arange(samples)))
        starts = self.layout.start[:-1]
        shown, asked = (np.add.reduceat(x.astype(np.int64), starts, axis=1) for x in (shown_BC, asked_BC))
        names = self.layout.names
        full, some = (shown == length) & (length > 0), shown > 0
        directions: dict[str, float] = {}
        for t, target in enumerate(names):
            others = np.arange(len(names)) != t
            clean = (asked[:, t] > 0) & (some == full)[:, others].all(1)
            patterns, counts = np.unique(full[clean][:, others], axis=0, return_counts=True)
            rest = [n for n in names if n != target]
            for pattern, count in zip(patterns, counts, strict=True):
                name = "+".join(n for n, on in zip(rest, pattern, strict=True) if on) + "->" + target
                directions[name] = float(count) / samples
        there = np.maximum(length.sum(0), 1)
        return MaskReport(
            samples, float((shown.sum() + asked.sum()) / length.sum()), float(shown.sum(1).mean()),
            float(asked.sum(1).mean()), dict(zip(names, (shown.sum(0) / there).tolist(), strict=True)),
            dict(zip(names, (asked.sum(0) / there).tolist(), strict=True)),
            float(((some & (asked == 0)).sum(1) == 1).mean()), float((full & (asked == 0)).any(1).mean()),
            dict(sorted(directions.items(), key=lambda kv: -kv[1])),
        )


def direction(sources: list[str], target: str, names: list[str]) -> str:
    """Return the direction's name "a+b->c", sources in the run's order."""
    return "+".join(n for n in names if n in sources) + "->" + target
