"""Tokenizers whose weights are files here, under names that differ between releases: found by pattern, loaded strictly.

Checkpoints of others are read as tensors only. One that is more than a table of tensors (training programs pickle their
own objects into theirs) is refused, with the command that converts it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn

from nano4m_cli.config import Config, build
from nano4m_cli.errors import ConfigError, WeightsError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.tokenizers._pretrained import Pretrained, first_line

CONVERT = (
    "convert it where you trust it (reading it may run code: a container without network, say): python -c \"import torch; "
    "from safetensors.torch import save_file; s = torch.load('{path}', map_location='cpu', weights_only=False); "
    "save_file({{k: v.clone().contiguous() for k, v in s.get('state_dict', s).items() if torch.is_tensor(v)}}, '{to}')\""
)


class Foreign(Config):
    """The part that is needed of a config written by another program: its other keys are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


F = TypeVar("F", bound=Foreign)


class Local(Pretrained):
    """A tokenizer with `roles`: per file its patterns, of which the first that matches counts; the last file is the weights.

    published: where its files can be had. unused: names of tensors that only training needs.
    """

    roles: ClassVar[dict[str, tuple[str, ...]]]
    published: ClassVar[str]
    unused: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")

    def find(self) -> dict[str, Path]:
        folder = Path(self.options.weights).expanduser()
        names = " and ".join(" or ".join(patterns) for patterns in self.roles.values())
        hint = f"put {names} of {self.published} into a folder DIR and {self.give('DIR')}"
        if not self.options.weights:
            raise WeightsError(f"no weights of '{self.name}': they are read from a folder here, and none is given", hint)
        if not folder.is_dir():
            raise WeightsError(f"no weights of '{self.name}': '{folder}' is no folder here", hint)
        out = {}
        for role, patterns in self.roles.items():
            matches = next((m for p in patterns if (m := sorted(f for f in folder.glob(p) if f.is_file()))), [])
            if not matches:
                raise WeightsError(f"no weights of '{self.name}': {folder} holds no {' or '.join(patterns)}", hint)
            if len(matches) > 1:
                listed = ", ".join(m.name for m in matches)
                raise WeightsError(f"which {role} of '{self.name}'? {folder} holds {listed}", "leave one of each kind")
            out[role] = matches[0]
        return out

    def read(self, cls: type[F], data: Any, path: Path) -> F:
        """Return the needed part of a foreign config, checked."""
        try:
            return build(cls, data, str(path))
        except ConfigError as err:
            raise self.wrong(str(err)) from err

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors by name of a safetensors file, or of a pickled one that holds nothing else of weight."""
        to = path.with_suffix(".safetensors")
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as err:  # a pickle that is more than tensors, a damaged zip or file
            hint = "download it again" if path == to else f"download it again; or {CONVERT.format(path=path, to=to)}"
            raise self.wrong(f"{path.name} cannot be read as tensors only: {first_line(err)}", hint) from err
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise self.wrong(f"{path.name} holds no table of tensors")
        return state

    def fill(self, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """Return the model with these tensors: all that it has and, but for those of training, no others; all finite."""
        state = {k: v for k, v in state.items() if not self.unused.match(k)}
        wanted = {k: v.shape for k, v in model.state_dict().items() if not self.unused.match(k)}
        for what, names in {
            "are missing": wanted.keys() - state.keys(),
            "are not of this model": state.keys() - wanted.keys(),
            "have another shape than its config says": {k for k in wanted.keys() & state.keys() if state[k].shape != wanted[k]},
            "hold numbers that are not finite": {k for k, v in state.items() if not torch.isfinite(v).all()},
        }.items():
            if names:
                raise self.wrong(f"{len(names)} tensors {what}, e.g. {min(names)}")
        model.load_state_dict(state, strict=False)
        return model.eval()


@contextlib.contextmanager
def making() -> Iterator[None]:
    """Make a model of the `encodec` package's parts here: the random state stays, and what it says of weight_norm goes."""
    ensure_torchaudio()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
