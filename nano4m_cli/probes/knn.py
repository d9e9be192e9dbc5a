"""Nearest-neighbour readout of labels from frozen features, per layer and source modality: nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.probes._features import Features, Layer, Question
from nano4m_cli.probes._readout import Answered, Readout
from nano4m_cli.probes.linear import accuracy, alike

KIND = "probe"
NEIGHBOURS = (1, 5, 20, 50)


class Probe(Readout):
    how = f"readout: vote of the {', '.join(map(str, NEIGHBOURS))} nearest (cosine of standardised means of tokens)"

    def read(self, features: Features, source: str, untrained: bool) -> list[dict[str, Answered]]:
        return [read_nearest(layer, features.questions) for layer in features.means(source, untrained)]

    def read_bag(self, features: Features, source: str) -> dict[str, Answered]:
        return read_nearest(features.bag(source), features.questions)


def read_nearest(layer: Layer, questions: Sequence[Question]) -> dict[str, Answered]:
    """Return each question's answers by the number of neighbours that is best on the samples that settle it (of equal ones the
    largest)."""
    out = {}
    for rows, group in alike(questions):
        mean, std = layer["fit"][rows].mean(0, dtype=np.float64), layer["fit"][rows].std(0, dtype=np.float64) + 1e-6
        x, choose, score = (_unit((z - mean) / std) for z in (layer["fit"][rows], layer["choose"], layer["score"]))
        near = {"choose": nearest(choose, x, max(NEIGHBOURS)), "score": nearest(score, x, max(NEIGHBOURS))}
        for q in group:
            guesses = {p: votes(q.answers["fit"][rows][order], len(q.values)) for p, order in near.items()}
            chosen = [accuracy(q, g) for g in guesses["choose"]]
            best = len(chosen) - 1 - int(np.argmax(chosen[::-1]))
            out[q.name] = Answered(chosen[best], guesses["score"][best])
    return out


def nearest(z: np.ndarray, x: np.ndarray, most: int) -> np.ndarray:
    """Return (len(z), k): the k rows of unit vectors x nearest to each of z, the nearest first (of equal ones the first)."""
    return np.argsort(-(z @ x.T), axis=1, kind="stable")[:, :most]


def votes(answer_NK: np.ndarray, classes: int, counts: Sequence[int] = NEIGHBOURS) -> list[np.ndarray]:
    """Return for each number of neighbours the commonest answer (N,) of the first so many; of equally common ones that of the
    nearest."""
    one_hot, out = np.eye(classes)[answer_NK], []
    for k in counts:
        vote = one_hot[:, :k].sum(1)
        first = np.where(one_hot[:, :k].any(1), one_hot[:, :k].argmax(1), k)
        out.append((vote - first / (k + 1)).argmax(1))
    return out


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
