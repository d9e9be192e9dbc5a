"""Numbers that change over the steps of a schedule, and how many slots each step fills. Pure functions.

A ramp is a number, or "A..B": from A at the first step evenly to B at the last; "A..B^P": A + (B - A) t^P, where t goes
evenly from 0 to 1 (P > 1: late, P < 1: early). A schedule of a single step has A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

_NUMBER = r"([+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)"
_RAMP = re.compile(rf"{_NUMBER}\.\.{_NUMBER}(?:\^{_NUMBER})?")


def ramp_parts(ramp: float | str) -> tuple[float, float, float]:
    """Return (first, last, power) of a ramp; a ValueError says how one is written."""
    if not isinstance(ramp, str):
        return float(ramp), float(ramp), 1.0
    match = _RAMP.fullmatch(ramp.replace(" ", ""))
    try:
        return (float(match[1]), float(match[2]), float(match[3] or 1)) if match else (float(ramp), float(ramp), 1.0)
    except ValueError:
        raise ValueError("write a number, A..B, or A..B^POWER (1..0.2, 1..0.2^2)") from None


def ramp_at(ramp: float | str, step: Any, steps: Any) -> Any:
    """Return the value at `step` (from 0) of `steps`; numpy arrays of them broadcast, a number stays a float."""
    first, last, power = ramp_parts(ramp)
    if first == last:
        return first
    t = np.asarray(step) / np.maximum(np.asarray(steps) - 1, 1)
    return first + (last - first) * np.clip(t, 0, 1) ** power


def Ramp(low: float, high: float = math.inf) -> Any:
    """Return the type of a config field that holds a ramp inside [low, high], or None."""

    def check(value: Any) -> float | str | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, float | int | str):
            raise ValueError("write a number, A..B, or A..B^POWER (1..0.2, 1..0.2^2)")
        first, last, power = ramp_parts(value)
        if not all(low <= x <= high and math.isfinite(x) for x in (first, last)):
            raise ValueError(f"lies outside {low:g}..{high:g}" if high < math.inf else f"must be {low:g} or more, and finite")
        if not 0 < power < math.inf:
            raise ValueError("the power of a ramp is positive")
        return value.replace(" ", "") if isinstance(value, str) and ".." in value else first

    return Annotated[float | str | None, BeforeValidator(check)]


def _shares(value: Any) -> Any:
    """Return a schedule's name, or its numbers as a tuple ("1,2,4" and lists alike)."""
    if isinstance(value, str) and value in ("linear", "cosine"):
        return value
    items = value.split(",") if isinstance(value, str) else value
    try:
        shares = tuple(float(x) for x in items)
    except (TypeError, ValueError):
        raise ValueError("write linear, cosine, or the share of slots of each step (1,2,4)") from None
    if not shares or not all(0 <= s < math.inf for s in shares) or not 0 < sum(shares) < math.inf:
        raise ValueError("shares of steps are 0 or more, and one is more than 0")
    return shares


Shares = Annotated[str | tuple[float, ...], BeforeValidator(_shares)]


def counts(slots: int, steps: int, schedule: str | Sequence[float] = "linear") -> list[int]:
    """Return how many slots each step fills: at most `steps` positive numbers that sum to `slots`.

    linear: as even as possible. cosine (MaskGIT, Chang et al. 2022): few at first, more later. Numbers: one step each, in
    proportion to them (counts and shares alike; `steps` does not matter); steps that round to nothing are left out.
    """
    if not isinstance(schedule, str):
        edges = [round(slots * float(e)) for e in np.cumsum(schedule) / np.sum(schedule)]
    elif schedule == "cosine":
        steps = max(1, min(steps, slots))
        left = [max(round(slots * np.cos(np.pi / 2 * (i + 1) / steps)), 0) for i in range(steps)]
        edges = [slots - n for n in [*left[:-1], 0]]
    else:
        steps = max(1, min(steps, slots))
        edges = [round(slots * (i + 1) / steps) for i in range(steps)]
    return [n for n in (b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)) if n > 0]
