"""Pictures and videos to grids of codes of NVIDIA's Cosmos tokenizers (2025, arXiv:2501.03575): DI8x8 to DV8x16x16.

They are published as TorchScript, encoder.jit and decoder.jit: programs, which are run to be used. So they are never
fetched, only read from a folder here, and only where `trust_torchscript` says so; their sha256 is checked before they run.
Preprocessing: x / 127.5 - 1. A code is a number of 6 digits (finite scalar quantisation, 64,000 in all). A video of T frames
has 1 + (T - 1) / f of them in time: the first frame stands alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, MediaError, WeightsError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._local import Local
from nano4m_cli.tokenizers._picture import adapted, adapted_video, check_picture
from nano4m_cli.tokenizers._pretrained import WeightsOptions, first_line

LEVELS = (8, 8, 8, 5, 5, 5)
PROBE = (9, 64, 64)  # of the input that tells how much a model shortens each side: all published factors divide it (8 + 1, 64)


class Tokenizer(Local):
    class Options(WeightsOptions):
        """weights: a folder with encoder.jit and decoder.jit. trust_torchscript: run these programs."""

        weights: str = ""
        trust_torchscript: bool = False

    name = "cosmos"
    roles = {"decoder": ("decoder.jit",), "encoder": ("encoder.jit",)}  # the encoder's hash is the one that tells what ids mean
    published = "a discrete Cosmos tokenizer (https://huggingface.co/nvidia/Cosmos-0.1-Tokenizer-DI16x16, say)"

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if "size" not in size:
            raise ConfigError(f"cosmos serves pictures and videos, and the data set gives no size of '{modality}'")
        frames = [size["frames"]] if "frames" in size else []
        self.lattice = (*frames, *size["size"])  # (H, W) or (T, H, W), of pixels

    # -- the programs ---------------------------------------------------------------------------------------------

    def give(self, place: str) -> str:
        return super().give(place) + ("" if self.kept else f" {self.modality}.trust_torchscript=true")

    def find(self) -> dict[str, Path]:
        found = super().find()
        if not self.options.trust_torchscript:
            raise WeightsError(
                f"'cosmos' is not loaded: {found['encoder']} is TorchScript, a program that would be run here with your "
                "rights, and nothing downloaded is run unasked",
                f"if you trust where it comes from, give {self.modality}.trust_torchscript=true",
            )
        return found

    def save(self, folder: Path) -> None:
        self.check_place(folder)
        super().save(folder)

    def load(self, folder: Path) -> None:
        self.check_place(folder)
        super().load(folder)

    def check_place(self, folder: Path) -> None:
        """Raise WeightsError for programs in the data set of `folder`: it may have been copied, with its trust in them."""
        if folder.resolve().parents[1] in Path(self.options.weights).resolve().parents:
            raise WeightsError(
                f"{self.options.weights} lies in the data set: programs that come with one are not run",
                f"if you trust them, move them elsewhere and {self.give('their folder')}",
            )

    def open(self, found: dict[str, Path]) -> dict[str, torch.jit.ScriptModule]:
        assert self.hashes  # taken before anything runs
        out = {}
        for role, path in found.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # there is no other reader of what is published
                    out[role] = torch.jit.load(str(path), map_location="cpu").eval()
            except (RuntimeError, ValueError, OSError) as err:
                raise self.wrong(f"{path.name} is no TorchScript: {first_line(err)}") from err
        return out

    def run(self, role: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the (first) output of a program for one value, of this shape (0: any size); else the weights are wrong."""
        program = self.model[role]
        try:
            with torch.inference_mode():
                out = program(x[None])
        except RuntimeError as err:
            last = str(err).strip().splitlines()[-1]
            raise self.wrong(f"{role}.jit fails on {self.modality}, {tuple(x.shape)}: {last}") from err
        out = out if isinstance(out, Tensor) else out[0]
        if out.ndim != len(shape) + 1 or any(n and n != m for n, m in zip((1, *shape), out.shape, strict=True)):
            raise self.wrong(f"{role}.jit makes {tuple(out.shape)} of {tuple(x.shape)}: no discrete model for {self.modality}")
        if not torch.isfinite(out).all():
            raise self.wrong(f"{role}.jit makes numbers that are not finite")
        return out[0]

    def indices(self, x: Tensor) -> np.ndarray:
        """Return the codes of one picture (3, H, W) or video (3, T, H, W)."""
        weights = next((p.dtype for p in self.model["encoder"].parameters() if p.is_floating_point()), torch.bfloat16)
        ids = self.run("encoder", x.to(weights), (0,) * (x.ndim - 1))
        if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= math.prod(LEVELS):
            raise self.wrong(f"encoder.jit makes no codes below {math.prod(LEVELS)}: a continuous model (CI, CV)?")
        return ids.numpy().astype(np.int64)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The number of codes each way, from how the encoder shortens a small black input; an even division is checked."""
        video = len(self.lattice) == 3
        small = PROBE if video else PROBE[1:]
        out = self.indices(torch.full((3, *small), -1.0)).shape
        first = (1, 0, 0) if video else (0, 0)  # the first frame has a code of its own
        factors = [(n - f) // max(m - f, 1) for n, m, f in zip(small, out, first, strict=True)]
        for n, k, f in zip(self.lattice, factors, first, strict=True):
            if n < 1 or (n - f) % k:
                what = f"{' x '.join(map(str, self.lattice))} ({'frames x ' if video else ''}height x width)"
                form = f"multiples of {factors[-1]} pixels" + (f" and 1 + multiples of {factors[0]} frames" if video else "")
                raise ConfigError(f"{self.modality} of {what} does not divide into this model's codes", f"fetch it in {form}")
        return tuple((n - f) // k + f for n, k, f in zip(self.lattice, factors, first, strict=True))

    # -- ids ------------------------------------------------------------------------------------------------------

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=math.prod(LEVELS), levels=LEVELS,
            tokenizer=self.ref(self.weights_sha256),
            preprocess={**{k: self.size[k] for k in ("frames", "size", "fps") if k in self.size}, "scale": "x / 127.5 - 1"},
        )

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        if len(self.lattice) == 2:
            return adapted(raw, self.lattice, self.modality)
        return adapted_video(raw, self.lattice, self.modality)

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        grid, out = self.grid, []
        for i, raw in enumerate(raws):
            place = where[i] if where else f"value {i}"
            if raw.shape[:-3] != self.lattice[:-2]:
                wanted = " x ".join(map(str, (*self.lattice, 3)))
                shape = " x ".join(map(str, raw.shape))
                raise MediaError(f"{place}: {self.modality} is of {shape}, this tokenizer takes {wanted}")
            picture = raw[0] if raw.ndim == 4 else raw
            check_picture(picture, self.lattice[-2:], "colour", self.modality, place, "fetch with the size of these tokens")
            ids = self.indices(torch.tensor(raw).movedim(-1, 0) / 127.5 - 1)
            assert ids.shape == grid, (ids.shape, grid)
            out.append(ids.reshape(-1))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, out = self.spec(), []
        for row in ids:
            codes = check_ids(np.asarray(row), self.grid, spec, "decode")
            x = self.run("decoder", torch.from_numpy(codes).int(), (3, *self.lattice)).float()
            out.append(((x.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().movedim(0, -1).contiguous().numpy())
        return out

    def decode_values(self, values_BSD: np.ndarray) -> list[np.ndarray]:
        """Return what the nearest codes stand for: the program takes nothing between them."""
        half = np.array(LEVELS) // 2
        digits = np.clip(np.rint(values_BSD * half) + half, 0, np.array(LEVELS) - 1).astype(np.int64)
        return self.decode(list(digits @ np.cumprod([1, *LEVELS[:-1]])))
