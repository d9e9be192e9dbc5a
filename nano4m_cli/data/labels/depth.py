"""Depth of the picture by Depth Anything V2 (Yang et al. 2024), or of any checkpoint of its form.

A metric checkpoint gives metres (files hold up to 65.5). A relative one gives inverse depth up to a scale and a shift of its
own in each picture: it is written as if the nearest pixel were at 1 m and the farthest at 10 m, which keeps exactly what is
known. Models that standardise depth per picture, as 4M does, see little of the choice; metres, and normals made from them, are
not to be believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nano4m_cli.data import _models
from nano4m_cli.data.labels import _base

NEAR, FAR = 1.0, 10.0  # metres that stand for the greatest and the least inverse depth of a picture
LEAST = 0.001  # metres; 0 would mean "unknown"


class Label(_models.Model, _base.Label):
    class Options(_models.Model.Options):
        weights: str = "depth-anything/Depth-Anything-V2-Small-hf"

    needs = ("rgb",)
    model_class, model_type = "DepthAnythingForDepthEstimation", "depth_anything"

    def open(self, found: dict[str, Path]) -> tuple[Any, Any]:
        return super().open(found), self.processor("DPTImageProcessorPil", found)

    def make(self, raw: dict) -> np.ndarray:
        from torch.nn.functional import interpolate

        net, processor = self.model
        with _models.steadily():
            given = processor(images=Image.fromarray(raw["rgb"]), return_tensors="pt")
            seen = net(**given).predicted_depth
            depth = interpolate(seen[:, None], raw["rgb"].shape[:2], mode="bicubic", align_corners=False)[0, 0].numpy()
        if not np.isfinite(depth).all():
            raise self.wrong("they give depth that is no number")
        return np.maximum(depth, LEAST) if net.config.depth_estimation_type == "metric" else from_relative(depth)

    def note(self) -> str:
        kind = json.loads(self.found["config.json"].read_text()).get("depth_estimation_type", "relative")
        if kind == "metric":
            return "depth is estimated metres"
        put = f"{NEAR:g} m, the farthest at {FAR:g} m"
        return f"depth is relative, not metric: the nearest pixel of each picture is put at {put}"


def from_relative(inverse: np.ndarray) -> np.ndarray:
    """Return float32 metres of inverse depth known up to scale and shift: the greatest is at NEAR, the least at FAR."""
    low, high = float(inverse.min()), float(inverse.max())
    t = (inverse.astype(np.float64) - low) / (high - low) if high > low else np.zeros_like(inverse, dtype=np.float64)
    return (1 / (1 / FAR + t * (1 / NEAR - 1 / FAR))).astype(np.float32)
