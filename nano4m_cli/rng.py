"""Stateless randomness: every draw is a function of (seed, stream, counters), never of process state.

Uniform numbers come from a counter-based hash (SplitMix64's finaliser, Steele et al. 2014, applied to a
chain of counters), so that whole batches are drawn in a few numpy operations and any sub-batch, rank or
worker gets the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the mixed words, in the array that was given: callers own it."""
    shifted = np.empty_like(x)  # one, as fresh memory costs more than the arithmetic
    x ^= np.right_shift(x, np.uint64(30), out=shifted)
    x *= _M1
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= _M2
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


@lru_cache(maxsize=4096)
def _start(seed: int, stream: str) -> np.uint64:
    word = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")
    return _mix(np.uint64(word) + _GOLDEN)


def bits(seed: int, stream: str, *counters) -> np.ndarray:
    """Return uint64 hashes of the broadcast counters (non-negative integers or integer arrays)."""
    with np.errstate(over="ignore"):
        state = _start(seed, stream)
        for counter in counters:
            state = _mix(state ^ _mix(np.asarray(counter).astype(np.uint64) + _GOLDEN))
            state += _GOLDEN
            state = _mix(state)
    return state


def marks(seed: int, stream: str, counter_B: np.ndarray, n: int) -> np.ndarray:
    """Return uint32 (B, n), hashes of (counter, place): what to sort by for a random choice among n places.

    Two from each word and one mixing a word, since the counter's state and the places' constants are mixed already: a
    quarter of what `bits` costs, and numbers of 32 bits sort quicker than any others.
    """
    with np.errstate(over="ignore"):
        word = bits(seed, stream, counter_B)[:, None] ^ _places(-(-n // 2))
        return _mix(word).view(np.uint32)[:, :n]


@lru_cache(maxsize=64)
def _places(n: int) -> np.ndarray:
    return _mix(np.arange(n).astype(np.uint64) + _GOLDEN)


def uniform(seed: int, stream: str, *counters) -> np.ndarray:
    """Return float64 in the open interval (0, 1), one per broadcast counter tuple."""
    word = bits(seed, stream, *counters)
    word >>= np.uint64(11)
    u = word.astype(np.float64)
    u += 0.5
    u *= 2.0**-53
    return np.minimum(u, 1.0 - 2.0**-53)  # the largest hash would round to 1


def normal(seed: int, stream: str, *counters) -> np.ndarray:
    """Return standard normals by the Box-Muller transform."""
    u = uniform(seed, stream + "/r", *counters)
    v = uniform(seed, stream + "/a", *counters)
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)


def log_gamma_variates(alpha: np.ndarray, seed: int, stream: str, *counters) -> np.ndarray:
    """Return logs of Gamma(alpha, 1) variates; logs, because small alphas underflow.

    Of alpha = 1 (the default of masks) by inversion; else Marsaglia and Tsang (2000) with its boost for alpha < 1, the
    first of 24 proposals that is accepted.
    """
    if np.ndim(alpha) == 0 and alpha == 1:
        return np.log(-np.log(uniform(seed, stream, *counters)))
    shape = np.broadcast_shapes(np.shape(alpha), *(np.shape(c) for c in counters))
    alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), shape)
    small = alpha < 1.0
    d = np.where(small, alpha + 1.0, alpha) - 1.0 / 3.0
    c = 1.0 / np.sqrt(9.0 * d)
    for first in range(0, 24, 4):  # one in twenty proposals is refused: the first four are nearly always enough
        rounds = np.arange(first, first + 4).reshape(-1, *([1] * len(shape)))
        x = normal(seed, stream + "/x", *counters, rounds)
        v = (1.0 + c * x) ** 3
        logv = np.log(np.maximum(v, 1e-300))
        accept = (v > 0) & (np.log(uniform(seed, stream + "/u", *counters, rounds)) < 0.5 * x**2 + d - d * v + d * logv)
        found = np.broadcast_to(logv, (4, *shape))
        found = np.take_along_axis(found, np.argmax(accept, axis=0)[None], 0)[0]
        now = accept.any(0)
        if first == 0:
            kept, done = found, now  # of one that is never accepted, the first
        else:
            kept, done = np.where(now & ~done, found, kept), done | now
        if done.all():
            break
    value = np.log(d) + kept
    if not small.any():
        return value
    boost = np.log(uniform(seed, stream + "/boost", *counters)) / np.where(small, alpha, 1.0)
    return value + np.where(small, boost, 0.0)


def generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """Return a numpy generator (Philox) for draws that do not vectorise, keyed the same way."""
    words = bits(seed, stream, *counters, np.arange(2))
    return np.random.Generator(np.random.Philox(key=words))


def permutation(n: int, seed: int, stream: str, *counters: int) -> np.ndarray:
    """Return a permutation of range(n) as int64."""
    return np.argsort(bits(seed, stream, *counters, np.arange(n)), kind="stable")


def torch_seed(seed: int, stream: str, *counters: int) -> int:
    """Return a 63-bit seed for a torch.Generator."""
    return int(bits(seed, stream, *counters) >> np.uint64(1))
