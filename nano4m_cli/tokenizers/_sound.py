"""What the tokenizers of sound share: mono float32 at 24 kHz, brought to a fixed number of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.errors import MediaError

RATE = 24_000


def fixed(raw: np.ndarray, samples: int) -> np.ndarray:
    """Return the sound cut or padded with silence to `samples`."""
    return np.pad(raw[:samples], (0, max(0, samples - len(raw)))).astype(np.float32)


def adapted(raw: np.ndarray, samples: int, modality: str) -> tuple[np.ndarray, str | None]:
    """Return the sound as `fixed` does, and what was done to it (None: nothing)."""
    if len(raw) == samples:
        return raw, None
    how = "cut" if len(raw) > samples else "padded with silence"
    return fixed(raw, samples), f"{modality} of {len(raw) / RATE:.2f} s was {how} to {samples / RATE:.2f} s"


def check_sounds(raws: Sequence[np.ndarray], where: Sequence[str] | None) -> None:
    """Raise MediaError, with its place, for the first sound that is empty, not mono or not finite."""
    for i, raw in enumerate(raws):
        if raw.ndim != 1 or not len(raw) or not np.isfinite(raw).all():
            raise MediaError(f"{where[i] if where else f'sound {i}'}: empty, not mono, or not finite")
