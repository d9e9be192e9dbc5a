"""Diffusion that runs backwards without new noise: DDIM (Song et al. 2021, arXiv:2010.02502) as 4M's decoders use it.

At time t a picture x is sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t falling from nearly 1 to 0 (no signal is left at the
last time: Lin et al. 2024, arXiv:2305.08891). All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "squaredcos_cap_v2"]
Prediction = Literal["sample", "v_prediction"]


def signal(times: int, schedule: Schedule, zero_end: bool) -> Tensor:
    """Return a (times,), the share of signal in the variance at each time; with `zero_end` the last is 0."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, times, dtype=torch.float64)
    else:  # squared cosine (Nichol & Dhariwal 2021), each step losing .999 at most
        bar = torch.cos((torch.arange(times + 1, dtype=torch.float64) / times + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    root = (1 - beta).cumprod(0).sqrt()
    if zero_end:  # shifted so that it ends at 0, scaled so that it begins where it did
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).float()


def schedule_times(times: int, steps: int) -> list[int]:
    """Return the times that are visited, from the last one down, `times // steps` apart: `steps` of them, or a few more."""
    return list(range(times - 1, -1, -(times // steps)))


def ddim(
    noise: Tensor, predict: Callable[[Tensor, int], Tensor], a: Tensor, steps: int, prediction: Prediction, clip: bool
) -> Tensor:
    """Return the picture that `noise` becomes.

    Args:
        noise: standard normal. predict: (x, time) -> x_0 ("sample") or sqrt(a) noise - sqrt(1 - a) x_0 ("v_prediction").
        a: of `signal`. clip: whether x_0 is kept within [-1, 1].
    """
    x = noise
    for t in schedule_times(len(a), steps):
        before = t - len(a) // steps
        now, then = a[t], a[before] if before >= 0 else torch.ones(())
        out = predict(x, t)
        if prediction == "sample":
            clean, rest = out, (x - now.sqrt() * out) / (1 - now).sqrt()
        else:
            clean, rest = now.sqrt() * x - (1 - now).sqrt() * out, now.sqrt() * out + (1 - now).sqrt() * x
        if clip:
            clean = clean.clamp(-1, 1)
        x = then.sqrt() * clean + (1 - then).sqrt() * rest
    return x
