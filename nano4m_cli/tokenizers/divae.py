"""Pictures to a grid of codes of 4M's tokenizers (Mizrahi et al. 2023): a ViT, and a decoder that is a diffusion model.

Published for RGB, depth, normals and edges as EPFL-VILAB/4M_tokenizers_*, trained on 224 to 448 pixels (edges: 512).
Preprocessing (one place: `_to_model`, undone by `_from_model`), as these were trained: colour, edges and vectors lie in
[-1, 1]; depth is standardised picture by picture, so its ids hold neither scale nor shift. Depth comes back with a mean and
spread that are given (`metres`), which is what `comparable` does to a picture too: a round trip is judged by the rest.
Unknown depth is no special value to them: it counts as 0.

The decoder starts from noise that `seed` determines, the same for every picture; one picture at a time goes through the
model, so nothing depends on its neighbours. Decoding takes seconds a picture on a CPU: fewer `steps` take less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from nano4m_cli.config import Config, build, parse_yaml
from nano4m_cli.errors import ConfigError
from nano4m_cli.rng import torch_seed
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._divae_model import FINEST, DiVAE, Published, with_tensors
from nano4m_cli.tokenizers._picture import adapted, check_picture
from nano4m_cli.tokenizers._pretrained import Pretrained, WeightsOptions, first_line

# form of raw pictures: (channels, published weights, how they are scaled)
FORMS = {
    "colour": (3, "EPFL-VILAB/4M_tokenizers_rgb_16k_224-448", "x / 127.5 - 1"),
    "grey": (1, "EPFL-VILAB/4M_tokenizers_edge_8k_224-512", "x / 127.5 - 1"),
    "vectors": (3, "EPFL-VILAB/4M_tokenizers_normal_8k_224-448", "unit xyz"),
    "metres": (1, "EPFL-VILAB/4M_tokenizers_depth_8k_224-448", "standardised by mean and deviation of the middle 80 %"),
}
USUAL = {"depth": "metres", "normal": "vectors", "edges": "grey"}  # forms by modality, where no option says; else colour
DEPTH_UNIT = 1000.0 / 65535.0  # metres as 4M reads the 16-bit PNG that holds them in millimetres
TRUNCATED, SPREAD = 0.1, 1e-6  # 4M's truncated standardisation: share cut at either end, added to the variance
NEAREST = 0.001  # metres; 0 would mean unknown


class Tokenizer(Pretrained):
    class Options(WeightsOptions):
        """weights: a folder with model.safetensors (and config.json, else the config in its header), else a hub id.

        form: of the pictures. steps, seed: of decoding. metres: mean and standard deviation of depth when decoded.
        """

        weights: str = ""  # the published ones of the form
        form: Literal["colour", "grey", "vectors", "metres"] | None = None  # of the modality
        steps: int = Field(25, ge=1)
        seed: int = 0
        metres: tuple[float, float] = (4.0, 1.0)

        @field_validator("metres")
        @classmethod
        def _positive(cls, metres: tuple[float, float]) -> tuple[float, float]:
            if not (0 < min(metres) and max(metres) < math.inf):
                raise ValueError("a mean and a standard deviation above 0 are needed")
            return metres

    name = "divae"
    slow = True
    files, optional = ("model.safetensors",), ("config.json",)

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        form = options.form or USUAL.get(modality, "colour")
        options = options.model_copy(update={"form": form, "weights": options.weights or FORMS[form][1]})
        super().__init__(modality, options, size)
        if "size" not in size:
            raise ConfigError(f"divae serves pictures, and the data set gives no size of '{modality}'")
        self.pixels = (int(size["size"][0]), int(size["size"][1]))

    def open(self, found: dict[str, Path]) -> DiVAE:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        path, o = found["model.safetensors"], self.options
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            config = self._config(found, header)
            model = with_tensors(config, load_file(path))
        except SafetensorError as err:
            raise self.wrong(f"{path} cannot be read: {first_line(err)}") from err
        except ValueError as err:
            raise self.wrong(str(err)) from err
        if config.n_channels != FORMS[o.form][0]:
            raise self.wrong(
                f"made for pictures of {config.n_channels} channels, and {self.modality} ({o.form}) has {FORMS[o.form][0]}",
                f"the published ones are {FORMS[o.form][1]}",
            )
        if o.steps > config.num_train_timesteps:
            raise ConfigError(f"{self.modality}.steps={o.steps}: there are {config.num_train_timesteps} at most")
        multiple = math.lcm(config.patch_size, FINEST)
        if any(n % multiple or not n for n in self.pixels):
            raise ConfigError(
                f"{self.modality}: pictures of {self.pixels[0]} x {self.pixels[1]} do not suit {o.weights}: "
                f"sides must be multiples of {multiple} pixels",
                f"fetch with another size, for example {config.image_size}, the largest that it was trained on",
            )
        return model

    def _config(self, found: dict[str, Path], header: dict[str, str]) -> Published:
        """Return the config in config.json, else the one in the header of the weights, where all values are text."""
        path = found.get("config.json")
        try:
            if path is not None:
                data = json.loads(path.read_text())
            else:
                data = {k: parse_yaml(header[k], k) for k in Published.model_fields if k in header}
                if not data:
                    raise ValueError("no config.json, and no config in the header of model.safetensors")
            if not isinstance(data, dict):
                raise ValueError(f"{path} holds no mapping")
            data = {k: v for k, v in data.items() if v not in (None, "None")}  # said to be left out
            return build(Published, data, "its config")
        except (OSError, ValueError) as err:
            raise self.wrong(f"the config cannot be read: {err}") from err
        except ConfigError as err:
            raise self.wrong(err.message) from err

    # -- raw <-> model ------------------------------------------------------------------------------------------------

    def _to_model(self, raw: np.ndarray) -> Tensor:
        """Return a raw picture as the encoder takes it, float32 (1, C, H, W)."""
        x = torch.from_numpy(np.array(raw, np.float32)).reshape(*raw.shape[:2], -1).permute(2, 0, 1)[None]
        if self.options.form == "metres":
            return standardised(x * DEPTH_UNIT)
        return x if self.options.form == "vectors" else x / 255 * 2 - 1

    def _from_model(self, x_CHW: Tensor) -> np.ndarray:
        """Return the raw picture of what the decoder gives."""
        x, form = x_CHW.permute(1, 2, 0).numpy(), self.options.form
        if form == "metres":
            mean, deviation = self.options.metres
            return np.maximum(x[..., 0] * deviation + mean, NEAREST).astype(np.float32)
        if form == "vectors":
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            return np.where(length > 1e-6, x / np.maximum(length, 1e-6), np.array([0, 0, 1], np.float32)).astype(np.float32)
        out = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
        return out if form == "colour" else out[..., 0]

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        if self.options.form != "metres":
            return raw
        return np.where(raw > 0, self._from_model(self._to_model(raw)[0]), 0).astype(np.float32)  # unknown stays unknown

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, self.pixels, self.modality)

    # -- ids ----------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        c, o = self.model.config, self.options
        said = {"size": list(self.pixels), "patch": c.patch_size, "scale": FORMS[o.form][2], "trained_up_to": c.image_size}
        if o.form == "metres":
            said["decoded"] = f"given a mean of {o.metres[0]:g} m and a deviation of {o.metres[1]:g} m, not the picture's own"
        return TokenSpec(
            modality=self.modality, kind="grid", shape=tuple(n // c.patch_size for n in self.pixels),
            vocab_size=c.codebook_size, tokenizer=self.ref(self.weights_sha256), preprocess=said,
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        hint = "fetch with this size, or tokenize anew"
        for i, raw in enumerate(raws):
            check_picture(raw, self.pixels, self.options.form, self.modality, where[i] if where else f"picture {i}", hint)
        with torch.inference_mode():
            return [self.model.encode(self._to_model(raw)).flatten().numpy() for raw in raws]

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, model, o = self.spec(), self.model, self.options
        c = model.config
        g = torch.Generator().manual_seed(torch_seed(o.seed, "divae"))
        noise = torch.randn(1, c.n_channels, *self.pixels, generator=g)
        # Standardised depth goes beyond 1: the clipping that is right for the others would cut off what is near and far.
        clip = (c.thresholding or c.clip_sample) and o.form != "metres"
        out = []
        with torch.inference_mode():
            for row in ids:
                codes = torch.from_numpy(check_ids(np.asarray(row), spec.shape, spec, "decode"))[None]
                out.append(self._from_model(model.decode(codes, noise, o.steps, clip)[0]))
        return out


def standardised(x: Tensor) -> Tensor:
    """Return x less the mean, over the deviation, of its values without the lowest and highest tenth of them."""
    ordered = x.flatten().sort().values
    n = len(ordered)
    middle = ordered[int(TRUNCATED * n) : int((1 - TRUNCATED) * n)]
    return (x - middle.mean()) / torch.sqrt(middle.var() + SPREAD)
