"""Surface normals of the picture by DSINE (Bae and Davison 2024); for a camera that sees 60 degrees across.

The checkpoint is dsine.pt, as its authors publish it. The network was made for larger pictures than are usual here: smaller
ones are enlarged for it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from nano4m_cli.data import _models
from nano4m_cli.data.labels import _base

FIELD = math.radians(60.0)  # across the longer side of the picture, as its authors take it for unknown cameras
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
EDGE = 32  # sides are padded with black to multiples of this
# Its normals point away from the camera, in axes (right, down, ahead); ours towards it, in axes (right, up, back).
AXES = np.array([-1.0, 1.0, 1.0], np.float32)


class Label(_models.Model, _base.Label):
    class Options(_models.Model.Options):
        """side: pixels that the shorter side has at least."""

        weights: str = "camenduru/DSINE"
        side: int = Field(480, ge=32)

    needs, makes = ("rgb",), "normal"
    files = ("dsine.pt",)

    def open(self, found: dict[str, Path]) -> Any:
        import torch

        from nano4m_cli.data.labels._dsine import DSINE

        try:
            state = torch.load(found["dsine.pt"], map_location="cpu", weights_only=True)["model"]
            with torch.device("meta"):
                net = DSINE()
            net.load_state_dict(state, strict=True, assign=True)
        except Exception as err:  # torch's, pickle's, or of what is no mapping
            raise self.wrong(" ".join(str(err).split())[:300] or type(err).__name__) from err
        return net.float().eval()

    def make(self, raw: dict) -> np.ndarray:
        import torch
        from torch.nn.functional import interpolate

        h, w = raw["rgb"].shape[:2]
        picture = raw["rgb"]
        if min(h, w) < self.options.side:
            scale = self.options.side / min(h, w)
            larger = (round(w * scale), round(h * scale))
            picture = np.asarray(Image.fromarray(picture).resize(larger, Image.Resampling.BICUBIC))
        height, width = picture.shape[:2]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in (-height % EDGE, -width % EDGE))
        padded = np.pad(picture.astype(np.float32) / 255, ((top, bottom), (left, right), (0, 0)))
        with _models.steadily():
            given = torch.from_numpy((padded - MEAN) / DEVIATION).permute(2, 0, 1)[None]
            focal = max(height, width) / 2 / math.tan(FIELD / 2)
            normal = self.model(given, focal, (left + width / 2, top + height / 2))
            normal = normal[:, :, top : top + height, left : left + width]
            normal = interpolate(normal, (h, w), mode="nearest-exact")[0].permute(1, 2, 0).numpy()
        if not np.isfinite(normal).all():
            raise self.wrong("they give normals that are no numbers")
        return normal * AXES
