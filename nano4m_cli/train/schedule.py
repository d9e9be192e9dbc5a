"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from nano4m_cli.train.config import TrainConfig


def lr_factor(step: int, c: TrainConfig) -> float:
    """Return the share of the peak learning rate used at `step` (0-based)."""
    if step < c.warmup:
        return (step + 1) / (c.warmup + 1)
    if c.schedule == "constant":
        return 1.0
    if c.schedule == "wsd":
        begin = c.steps * (1 - c.decay)
        if step < begin:
            return 1.0
        return 1.0 + (c.min_lr - 1.0) * (step - begin) / max(c.steps - begin, 1)
    t = (step - c.warmup) / max(c.steps - c.warmup, 1)
    return c.min_lr + (1 - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
