"""Reading orders of codec codes: (T frames, Q codebooks) <-> one dimension, and back exactly.

An order is a permutation of the slots t * Q + q of a `codes` spec; ids are not changed by it. The names are those of
Copet et al. 2023 (MusicGen, arXiv:2306.05284, section 2.2) for what they call flattening and delay.

    interleaved      frame by frame, within a frame by codebook: the order in which slots are stored
    delay            step s holds codebook q of frame s - q, within a step by codebook
    codebook_major   all frames of codebook 0, then all of codebook 1, ...
"""

from __future__ import annotations

import numpy as np

from nano4m_cli.errors import TokenError

PATTERNS = ("interleaved", "delay", "codebook_major")


def order(pattern: str, frames: int, codebooks: int) -> np.ndarray:
    """Return int64 (T * Q,): the slot that is read at each place of the pattern."""
    assert pattern in PATTERNS, (pattern, PATTERNS)
    t, q = np.indices((frames, codebooks)).reshape(2, -1)
    if pattern == "interleaved":
        return np.arange(frames * codebooks)
    return np.lexsort((q, t + q) if pattern == "delay" else (t, q))  # by the last key first


def flatten(codes_TQ: np.ndarray, pattern: str, offset: int = 0) -> np.ndarray:
    """Return the ids (T * Q,) in reading order; `offset` is added once more for each codebook, as one table needs it."""
    codes = codes_TQ + offset * np.arange(codes_TQ.shape[1])
    return codes.reshape(-1)[order(pattern, *codes_TQ.shape)]


def unflatten(ids: np.ndarray, codebooks: int, pattern: str, offset: int = 0) -> np.ndarray:
    """Return the codes int64 (T, Q) that `flatten` made `ids` of; ids that fill no whole number of frames are a TokenError."""
    frames, rest = divmod(len(ids), codebooks)
    if rest:
        raise TokenError(f"{len(ids)} ids are no whole number of frames of {codebooks} codebooks")
    codes = np.empty(len(ids), dtype=np.int64)
    codes[order(pattern, frames, codebooks)] = ids
    return codes.reshape(frames, codebooks) - offset * np.arange(codebooks)
