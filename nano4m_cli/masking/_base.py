"""The contract of a masking component, and integer budgets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nano4m_cli.config import Config


@dataclass(frozen=True)
class Key:
    """Where draws come from: seed, stream, and one counter per sample (B,). The same counters give the same mask."""

    seed: int
    stream: str
    counter_B: np.ndarray

    def sub(self, name: str) -> Key:
        return Key(self.seed, f"{self.stream}/{name}", self.counter_B)

    def rows(self, index: np.ndarray) -> Key:
        return Key(self.seed, self.stream, self.counter_B[index])


class Component(ABC):
    """Draws tasks: how many slots of each modality are shown and asked, for every sample of a batch at once."""

    class Options(Config):
        weight: float = 1.0

    text: ClassVar[str] = "prefix"  # the pattern of text: left to right, unless the model sees what follows as well

    def __init__(self, options: Config, names: list[str]):
        self.options, self.names = options, names

    @abstractmethod
    def counts(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 (shown_BM, asked_BM) with shown + asked <= length, and at least one slot asked per sample."""


def share(total_B: np.ndarray, weight_BM: np.ndarray, room_BM: np.ndarray) -> np.ndarray:
    """Return int64 (B, M) that sum to min(total, sum of room) per sample, near proportional to weight, within room.

    What exceeds a modality's room goes to the others in proportion to their weights; fractions go by largest
    remainder. Weights of modalities without room do not count; where all weights are zero, room is the weight.
    """
    room = room_BM.astype(np.int64)
    total = left = np.minimum(total_B, room.sum(1)).astype(np.int64)
    out = np.zeros_like(room)
    for _ in range(room.shape[1] + 1):  # every round fills at least one modality, or ends
        free = room - out
        w = np.where(free > 0, weight_BM, 0.0)
        none = w.sum(1) <= 0
        w = np.where(none[:, None], free, w)
        norm = w.sum(1, keepdims=True)
        ideal = left[:, None] * w / np.where(norm > 0, norm, 1.0)
        beyond = np.floor(ideal) > free
        if not beyond.any():
            break
        over = beyond.any(1, keepdims=True)  # per sample: a mask never depends on its neighbours
        out += np.where((ideal >= free) & over, free, 0)
        left = total - out.sum(1)
    base = np.minimum(np.floor(ideal + 1e-9), free).astype(np.int64)
    out += base
    left = total - out.sum(1)
    # Largest remainders get what is left, one each, as often as it takes (room may close a modality).
    remainder = ideal - base
    while (left > 0).any():
        order = np.argsort(np.argsort(-np.where(room > out, remainder, -np.inf), axis=1, kind="stable"), axis=1)
        out += (order < left[:, None]) & (room > out)
        left = total - out.sum(1)
    return out
