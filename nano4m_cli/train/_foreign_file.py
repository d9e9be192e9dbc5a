"""Checkpoints of other projects as data: tensors and what the file says of itself, and an account of every tensor.

Only safetensors are read; a pickle is refused, whatever it is called. Settings in a file's head are text: they are taken
for literals (numbers, lists, words), and nothing they name is imported or made.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nano4m_cli.errors import WeightsError
from nano4m_cli.tokenizers._pretrained import file_hash, find

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SAVE = "save its tensors as safetensors where they can be trusted: safetensors.torch.save_file(state_dict, FILE)"


@dataclass(frozen=True)
class ForeignFile:
    """tensors by their own names; told: settings that stand in the file's head, or in config.json beside it."""

    path: Path
    tensors: dict[str, Tensor]
    told: dict[str, Any]
    sha256: str


def read(place: str) -> ForeignFile:
    """Return what is in a safetensors file, in a folder with one (and config.json), or in a repository of the hub.

    A file whose head says nothing is told of by the config.json beside it.
    """
    path, beside = Path(place).expanduser(), None
    if path.is_dir() and not (path / WEIGHTS).is_file() and len(alone := sorted(path.glob("*.safetensors"))) == 1:
        path, beside = alone[0], path / CONFIG
    elif not path.is_file():
        found = find("checkpoint", place, (WEIGHTS,), (CONFIG,), "give checkpoint=DIR")
        path, beside = found[WEIGHTS], found.get(CONFIG)
    tensors, head = _tensors(path)
    told = {k: literal(v) for k, v in head.items() if k != "format"}
    for name in [k for k, v in head.items() if v in tensors and k not in tensors]:
        tensors[name] = tensors[told.pop(name)]  # tensors that were one in the model are written once
    if beside is None and not told:
        beside = path.with_name(CONFIG)
    if beside is not None and beside.is_file():
        told = _config(beside)
    return ForeignFile(path, tensors, told, file_hash(path))


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as err:
        raise WeightsError(f"cannot read {path}: {err.strerror}") from err
    # A safetensors file begins with a length, which may be any bytes, and then JSON.
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in PICKLES):
        raise WeightsError(f"{path} is a pickle, which may run code when it is read; it is not read", SAVE)
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as err:  # safetensors raises its own type
        raise WeightsError(f"{path} is no whole safetensors file: {err}", "copy it again") from err
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: '{name}' holds numbers that are not finite", "copy it again, or take another checkpoint")
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}, head


def _config(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as err:
        raise WeightsError(f"{path} is damaged: {err}", "copy it again") from err
    return told


def literal(text: str) -> Any:
    """Return the number, truth, list or mapping that text spells, else the text."""
    for spelling in (ast.literal_eval, json.loads):
        try:
            return spelling(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return text


class Account:
    """Every tensor of a checkpoint: taken for one of ours, or left with a reason; what is neither is an error.

    names: what each tensor is called in the file, by the name it is asked for here.
    """

    def __init__(self, file: ForeignFile, names: dict[str, str] | None = None):
        self.file, self.names = file, names or {k: k for k in file.tensors}
        self.taken: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there."""
        if name not in self:
            raise WeightsError(f"{self.file.path} has no '{name}'", self._hint())
        return tuple(self.file.tensors[self.names[name]].shape)

    def take(self, name: str, ours: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor, which becomes `ours`; `close` tells of it where it is not there."""
        if name not in self:
            self._missing.append(name)
            return torch.zeros(shape)
        tensor = self.file.tensors[self.names[name]]
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"{self.file.path}: '{self.names[name]}' is {tuple(tensor.shape)}, {shape} expected")
        self.taken[self.names[name]] = ours
        return tensor

    def leave(self, name: str, why: str) -> None:
        if name in self and self.names[name] not in self.taken:
            self.left[self.names[name]] = why

    def close(self) -> None:
        """Raise WeightsError if tensors were missing, or if any was neither taken nor left."""
        if self._missing:
            raise WeightsError(f"{self.file.path} lacks {_some(self._missing)}", self._hint())
        unknown = [n for n in self.file.tensors if n not in self.taken and n not in self.left]
        if unknown:
            raise WeightsError(
                f"{self.file.path} holds tensors that this model has no place for: {_some(unknown)}",
                "it is of another architecture; what computes with them is not known here",
            )

    def _hint(self) -> str:
        return f"the file holds {_some(list(self.file.tensors))}"

    def summary(self) -> list[tuple[str, int, str]]:
        """Return (name with numbers as *, how many, what became of them)."""
        rows = [(k, f"used: {v}") for k, v in self.taken.items()] + [(k, f"left: {v}") for k, v in self.left.items()]
        counts = Counter((re.sub(r"\.\d+\.", ".*.", k), re.sub(r"\.\d+\.", ".*.", what)) for k, what in rows)
        return [(name, n, what) for (name, what), n in counts.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
