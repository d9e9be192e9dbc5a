"""Which directions are generated and judged, how, and how many samples of each: the same for all probes, which share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.probes._context import Context

HEARD = 200  # samples judged by ear: phase reconstruction is the slow part
TRAIN = 1000  # samples of the train split that a mean is taken of
# Depth and normals follow from the picture almost surely: their most likely value at once beats sampling.
LIKELIEST = GenerateOptions(scheme="onepass", temperature=0.0, guidance=1.0)


def estimate(context: Context, target: str) -> GenerateOptions:
    """Return how a picture's depth or normals are best told: by the mean, where codes stand for numbers."""
    levels = context.layout.specs[context.names.index(target)].levels
    return GenerateOptions(scheme="mean", guidance=1.0) if levels else LIKELIEST


def heard(context: Context, target: str) -> int:
    """Return how many samples of the split are judged."""
    return min(HEARD, context.n) if target == "audio" else context.n


def plans(context: Context, target: str) -> list[list[str]]:
    """Return the sets of sources that a target is generated from: each alone, and caption and sound to a picture."""
    # Of sound, depth and normals say nothing that the picture does not.
    sources = [s for s in context.names if s != target and (target != "audio" or s not in ("depth", "normal"))]
    out = [[s] for s in sources if context.model.reads([s], target)]
    both = ["audio", "caption"]
    if target == "rgb" and set(both) <= set(sources) and context.model.reads(both, target):
        out.append(both)
    return out


def train_mean(context: Context, target: str, form: Callable[[list[Any]], Any] = np.stack, limit: int = TRAIN) -> np.ndarray:
    """Return the mean raw value, in the form asked for, of the first samples of the train split (normals: of unit length)."""
    values = form(Context(context.run, context.run.config.data.train, limit, 0, context.progress).raw(target))
    mean = np.mean(values, 0)
    if target == "normal":
        return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return np.rint(mean).astype(np.uint8) if values.dtype == np.uint8 else mean


def sampled_with(context: Context, *targets: str) -> list[str]:
    """Return a note per target: the options it was sampled with."""
    return [f"{t} was sampled with {', '.join(f'{k} {v}' for k, v in context.sampling([t]).model_dump().items())}"
            for t in targets if t in context.names]
