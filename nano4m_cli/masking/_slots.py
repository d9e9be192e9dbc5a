"""Which slots of a modality, given how many are shown and asked: random, span, block, prefix."""

from __future__ import annotations

from typing import Literal

import numpy as np

from nano4m_cli.masking._base import Key
from nano4m_cli.rng import marks, uniform
from nano4m_cli.spec import TokenSpec

_LAST = np.uint32(0xFFFFFFFF)
Pattern = Literal["random", "span", "block", "prefix"]


def choose_slots(
    pattern: Pattern, spec: TokenSpec, length_B: np.ndarray, shown_B: np.ndarray, asked_B: np.ndarray, key: Key
) -> tuple[np.ndarray, np.ndarray]:
    """Return bool (shown_BL, asked_BL): disjoint, with exactly the given counts, within each sample's length.

    random  a uniform choice.
    span    asked: one contiguous run in reading order, starting on a whole frame where codebooks are several; shown:
            the slots nearest to it on both sides (continuation, both directions, infill).
    block   asked: the slots nearest to a random centre (a filled block); shown: a uniform choice of the others.
    prefix  shown: the first slots; asked: those that follow.
    """
    slots = spec.slots
    slot = np.arange(slots)
    inside = slot < length_B[:, None]
    n_in, n_out = shown_B[:, None], asked_B[:, None]
    if pattern == "prefix":
        return slot < n_in, (slot >= n_in) & (slot < n_in + n_out)
    if pattern == "random":
        mark = marks(key.seed, key.stream + "/slot", key.counter_B, slots)
        return _split(mark if inside.all() else np.where(inside, mark, _LAST), n_in, n_out)
    noise = uniform(key.seed, key.stream + "/slot", key.counter_B[:, None], slot)
    u = uniform(key.seed, key.stream + "/at", key.counter_B)
    if pattern == "span":
        q = spec.codebooks
        starts = (length_B - asked_B) // q + 1  # whole-frame starts that leave room for the run
        first = (np.floor(u * starts) * q).astype(np.int64)[:, None]
        asked = (slot >= first) & (slot < first + n_out)
        distance = np.maximum(first - slot, slot - (first + n_out - 1)) + 0.5 * noise
    else:
        v = uniform(key.seed, key.stream + "/at2", key.counter_B)
        w = uniform(key.seed, key.stream + "/at3", key.counter_B)
        centre = np.stack([u, v, w], 1) * (spec.positions().max(0) + 1) - 0.5
        apart = np.abs(spec.positions()[None] - centre[:, None]).max(-1)
        asked = _rank(np.where(inside, apart + 1e-6 * noise, np.inf)) < n_out
        distance = noise
    shown = _rank(np.where(inside & ~asked, distance, np.inf)) < n_in
    return shown, asked


def _split(score_BL: np.ndarray, n_in: np.ndarray, n_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the n_in lowest entries of each row, and the n_out that follow; (B, 1) numbers, bool (B, L) both."""
    # Sorting values is many times quicker than sorting places: entries are compared with the last one taken.
    ordered, row, n = np.sort(score_BL, axis=1), np.arange(len(score_BL))[:, None], np.concatenate([n_in, n_in + n_out], 1)
    last = np.where(n > 0, ordered[row, n - 1], 0)
    first, upto = score_BL <= last[:, :1], score_BL <= last[:, 1:]
    if (np.count_nonzero(first), np.count_nonzero(upto)) == tuple(n.sum(0)):
        return first, upto & ~first
    rank = _rank(score_BL)  # equal entries: the earlier one comes first
    return rank < n_in, (rank >= n_in) & (rank < n_in + n_out)


def _rank(score_BL: np.ndarray) -> np.ndarray:
    """Return each entry's place in its row's ascending order."""
    rank = np.empty(score_BL.shape, dtype=np.int64)
    order = np.argsort(score_BL, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.arange(score_BL.shape[1])[None], axis=1)
    return rank
