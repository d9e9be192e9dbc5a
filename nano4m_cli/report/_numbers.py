"""Numbers as text. What is missing or not finite is "-" everywhere."""

from __future__ import annotations

import math
from typing import Any

MISSING = "-"


def finite(x: Any) -> float | None:
    """Return x as a float, or None where it is no finite number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return None
    try:
        value = float(x)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def figure(x: Any) -> str:
    """Return a measured number to about three digits: 0.953, 23.1, 1,240, 3.2e-05."""
    value = finite(x)
    if value is None:
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.001 or size >= 1e7:
        return f"{value:.1e}"
    digits = 3 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:,.{digits}f}"


def count(x: Any) -> str:
    """Return a whole number with its thousands apart."""
    value = finite(x)
    return MISSING if value is None else f"{round(value):,}"


def rounded(x: Any) -> str:
    """Return a large count in short: 1.24 M."""
    value = finite(x)
    if value is None:
        return MISSING
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: Any) -> str:
    """Return seconds in the unit a person would use."""
    value = finite(seconds)
    if value is None:
        return MISSING
    if value < 100:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def share(x: Any) -> str:
    """Return a share in percent, with the digits a small one needs."""
    value = finite(x)
    return MISSING if value is None else f"{100 * value:.2g} %" if abs(value) < 0.0995 else f"{100 * value:.0f} %"
