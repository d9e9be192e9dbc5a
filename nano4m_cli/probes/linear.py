"""Linear readout of labels from frozen features, per layer and source modality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.probes._features import Features, Layer, Question
from nano4m_cli.probes._readout import Answered, Readout

KIND = "probe"
RIDGE = 1.0
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


class Probe(Readout):
    version = 2  # 1: one penalty, the mean accuracy of every layer, no baselines
    how = "readout: ridge regression to one-hot answers on standardised means of tokens"

    def read(self, features: Features, source: str, untrained: bool) -> list[dict[str, Answered]]:
        return [read_linear(layer, features.questions) for layer in features.means(source, untrained)]

    def read_bag(self, features: Features, source: str) -> dict[str, Answered]:
        return read_linear(features.bag(source), features.questions)


def read_linear(layer: Layer, questions: Sequence[Question]) -> dict[str, Answered]:
    """Return each question's answers by the ridge classifier whose penalty is best on the samples that settle it (of equal ones
    the largest)."""
    out = {}
    for rows, group in alike(questions):
        x = [layer["fit"][rows], layer["choose"], layer["score"]]
        y = [np.eye(len(q.values))[q.answers["fit"][rows]] for q in group]
        cut = np.cumsum([0] + [t.shape[1] for t in y])
        by_penalty = ridge_path(x[0], np.concatenate(y, 1), x[1:], PENALTIES)
        for q, a, z in zip(group, cut[:-1], cut[1:], strict=True):
            guesses = [[s[:, a:z].argmax(1) for s in scores] for scores in by_penalty]
            chosen = [accuracy(q, choose) for choose, _ in guesses]
            best = len(chosen) - 1 - int(np.argmax(chosen[::-1]))
            out[q.name] = Answered(chosen[best], guesses[best][1])
    return out


def accuracy(q: Question, guess: np.ndarray, part: str = "choose") -> float:
    """Return the accuracy of guesses for the first samples of a part, where the question arises."""
    truth = q.answers[part][: len(guess)]
    return float((guess == truth)[truth >= 0].mean()) if (truth >= 0).any() else 0.0


def alike(questions: Sequence[Question]):
    """Yield (fitted samples (n,), the questions that arise in just these)."""
    groups: dict[bytes, list[Question]] = {}
    for q in questions:
        groups.setdefault((q.answers["fit"] >= 0).tobytes(), []).append(q)
    for group in groups.values():
        yield np.flatnonzero(group[0].answers["fit"] >= 0), group


def ridge_path(
    x: np.ndarray, target_NC: np.ndarray, others: Sequence[np.ndarray], penalties: Sequence[float]
) -> list[list[np.ndarray]]:
    """Return per penalty the scores (n, C) of `others` by a ridge regression of standardised x on targets.

    By the normal equations of features, or of samples where those are fewer.
    """
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-6
    x, *others = ((a - mean) / std for a in (x, *others))
    offset = target_NC.mean(0)
    wide = x.shape[1] > len(x)
    gram, out = x @ x.T if wide else x.T @ x, []
    for penalty in penalties:
        inside = gram + penalty * np.eye(len(gram))
        weight = x.T @ np.linalg.solve(inside, target_NC - offset) if wide else np.linalg.solve(inside, x.T @ (target_NC - offset))
        out.append([z @ weight + offset for z in others])
    return out


def ridge_classifier(x: np.ndarray, y: np.ndarray, z: np.ndarray, classes: int, penalty: float = RIDGE) -> np.ndarray:
    """Return the guessed class (len(z),) of a ridge regression to one-hot targets on standardised features."""
    return ridge_path(x, np.eye(classes)[y], [z], [penalty])[0][0].argmax(1)
