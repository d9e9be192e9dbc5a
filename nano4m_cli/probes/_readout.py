"""What the readouts of frozen features report: accuracy by layer, and what training added to it.

A readout of good features and a readout of any features look alike: random layers keep what they are given, and counting ids
alone may answer. So two baselines go the same way: the same model before any training, and the bag of ids.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nano4m_cli.probes._base import Probe
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._features import Features, Question
from nano4m_cli.probes._result import Findings, Plot, mean_metric, ratio_interval

HOW = {"run": 1.0, "untrained": 1.0, "bag": 0.2}  # what is read, and about what it costs


class Answered(NamedTuple):
    """One question read out of one layer: accuracy on the samples that settle settings, and the guess (N,) for each scored one."""

    chosen: float
    guess: np.ndarray


class Readout(Probe):
    """A probe of features; subclasses fit, and say how."""

    how: str

    @abstractmethod
    def read(self, features: Features, source: str, untrained: bool) -> list[dict[str, Answered]]:
        """Return per layer, for each question, what is read of `source`."""

    @abstractmethod
    def read_bag(self, features: Features, source: str) -> dict[str, Answered]:
        """Return, for each question, what is read of the bag of ids of `source`."""

    def missing(self, context: Context) -> str | None:
        return Features.of(context).missing()

    def measure(self, context: Context) -> Findings:
        features, metrics, rows = Features.of(context), [], []
        told: dict[str, dict[str, list]] = {q.name: {} for q in features.questions}
        asked = [(source, how) for source in context.names for how in HOW]
        costs = [HOW[how] * float(context.columns(source).sum()) for source, how in asked]
        found = context.spread(self.name, asked, lambda item: self._read(features, *item), costs)
        answers = dict(zip(asked, found, strict=True))
        for source in context.names:
            own, before, bag = (answers[source, how] for how in HOW)
            for q in features.questions:
                a, layer = _best([layer[q.name] for layer in own])
                b, _ = _best([layer[q.name] for layer in before])
                right, there = _right(q, a)
                base = b if b.chosen >= bag[q.name].chosen else bag[q.name]
                known = dict(chance=1 / len(q.values), majority=_share(q), ceiling=q.ceiling.get(source))
                metrics.append(mean_metric(f"{source}/{q.name}_acc", right, there, **known))
                metrics.append(mean_metric(f"{source}/{q.name}_gain", right - _right(q, base)[0], there, chance=0.0))
                scores = [_mean(q, x) for x in (bag[q.name], b, a)]
                rows.append((f"{source}: {q.name}", [known["chance"], known["majority"], *scores, layer, metrics[-1].value,
                                                     known["ceiling"]]))
                told[q.name][source] = [layer[q.name] for layer in own]
                told[q.name][f"{source}, untrained"] = [layer[q.name] for layer in before]
        plots = [_curve(q, told[q.name]) for q in features.questions]
        columns = ["chance", "majority", "bag of ids", "untrained", "this run", "its layer", "gain", "ceiling"]
        plots.append(Plot(name="baselines", title="Accuracy beside what needs no training", kind="table", x="", y="",
                          rows=[r for r, _ in rows], columns=columns, values=[v for _, v in rows]))
        return Findings(metrics, self._notes(features), plots)

    def _read(self, features: Features, source: str, how: str) -> list[dict[str, Answered]] | dict[str, Answered]:
        return self.read_bag(features, source) if how == "bag" else self.read(features, source, how == "untrained")

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def _notes(self, features: Features) -> list[str]:
        n = len(features.parts["fit"])
        c = features.context
        return [
            f"{self.how}; fitted on {n} samples of split '{c.run.config.data.train}'; layer and settings chosen on "
            f"{features.chosen_on}, for the untrained model and the bag of ids as well",
            "features: hidden states of one modality shown whole, layer 0 what the first block reads; attributes are those of the "
            "first object" + (", position tells which third of the fitted samples its middle falls into, from the left"
                              if any(q.name == "position" for q in features.questions) else ""),
            "gain: accuracy beyond the better (on the samples that settle settings) of the untrained model and the bag of ids, "
            "sample by sample; majority: the commonest answer of the fitted samples",
            *([f"{features.left_out} samples were left out that share a source with scored ones"] if features.left_out else []),
            *(["a stack that reads left to right has read the last id at the slot after it, and that of the last modality never"]
              if not c.model.encodes and not c.model.wholly else []),
        ]


def _best(layers: Sequence[Answered]) -> tuple[Answered, int]:
    """Return the layer with the best accuracy on the samples that settle settings (of equal ones the first), and its number."""
    at = int(np.argmax([a.chosen for a in layers]))
    return layers[at], at


def _right(q: Question, a: Answered) -> tuple[np.ndarray, np.ndarray]:
    truth = q.answers["score"][: len(a.guess)]
    return (a.guess == truth).astype(float), (truth >= 0).astype(float)


def _mean(q: Question, a: Answered) -> float:
    right, there = _right(q, a)
    return float((right * there).sum() / there.sum()) if there.sum() else float("nan")


def _share(q: Question) -> float:
    """Return how often the commonest answer is right of the scored samples."""
    y = q.answers["score"]
    return float((y[y >= 0] == q.majority).mean()) if (y >= 0).any() else float("nan")


def _curve(q: Question, told: dict[str, list[Answered]]) -> Plot:
    deepest = max(len(layers) for layers in told.values())
    values, low, high = [], [], []
    for layers in told.values():
        found = [ratio_interval(r * t, t) for r, t in (_right(q, a) for a in layers)]
        values.append([v for v, _ in found])
        low.append([i[0] for _, i in found])
        high.append([i[1] for _, i in found])
    return Plot(name=q.name, title=f"{q.name}: accuracy by layer", kind="curve", rows=list(told), columns=list(range(deepest)),
                values=values, low=low, high=high, x="layer", y="accuracy")
