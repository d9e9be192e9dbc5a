"""Checkpoints are data: safetensors and JSON in one folder, written aside, synced, renamed; hashes checked on load.

Weights lie whole in <part>.safetensors ("model", "ema", "optimizer", "critic"); or, where processes share a model out, as
pieces of rows in <part>/rank-00000-of-00002.safetensors, with every tensor's shape and pieces in state.json. Both are read
the same way, whole or some rows of a tensor, by any number of processes. A part's folder is also what
torch.distributed.checkpoint reads by its HuggingFaceStorageReader (the offsets stand in each file's header). It does not write
them here: its own format has a pickle for metadata, and its safetensors writer keeps no hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nano4m_cli.data._atomic import atomic_folder, sync_folder
from nano4m_cli.errors import CheckpointError, DamagedError, DataError

FORMAT = 1
PARTS = ("model", "ema", "optimizer", "critic")


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first (half-written ones carry another name)."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def latest(run: Path) -> Path:
    """Return the newest checkpoint of a run; none is a CheckpointError."""
    found = checkpoints(run)
    if not found:
        raise CheckpointError(f"run {run} has no checkpoint", "train it first: nano4m train CONFIG")
    return found[-1]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those of every `every` steps (0: none), and the best by validation loss."""

    last: int
    every: int = 0
    best: bool = False

    def stays(self, steps: list[int], loss: dict[int, float]) -> set[int]:
        """Return the steps that stay of those there are, oldest first, given the validation losses that are known."""
        out = set(steps[-self.last :])
        if self.every:
            out |= {s for s in steps if s % self.every == 0}
        if self.best and loss:
            out.add(min(sorted(loss), key=lambda s: loss[s]))
        return out


def prune(run: Path, keep: Retention) -> None:
    """Remove the checkpoints that need not stay."""
    found = {step_of(p): p for p in checkpoints(run)}
    loss = {}
    if keep.best:
        for step, path in found.items():
            value = json.loads((path / "state.json").read_text()).get("val_loss")
            if value is not None:
                loss[step] = value
    stay = keep.stays(list(found), loss)
    for step, path in found.items():
        if step not in stay:
            # First its name goes: one that is half removed when the process is killed must not look like a checkpoint.
            gone = path.with_name(f".{path.name}.old")
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
            shutil.rmtree(gone)


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int | Retention) -> Path:
    """Write a checkpoint atomically, then remove those that need not stay; return its folder.

    A failure to write (a full disk) leaves earlier checkpoints untouched and is a CheckpointError.
    """
    path = step_folder(run, step)
    try:
        with atomic_folder(path) as aside:
            hashes = {}
            for name, part in tensors.items():
                file = aside / f"{name}.safetensors"
                hashes[file.name] = write_tensors(file, part)
            write_state(aside, step, hashes, state)
    except DataError as err:
        raise not_written(run, step, err) from err
    prune(run, Retention(keep) if isinstance(keep, int) else keep)
    return path


def write_tensors(file: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> str:
    """Write tensors, and `about` in the file's header; return the file's sha256."""
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, file, about)
    except Exception as err:  # safetensors raises its own type when the disk is full
        if isinstance(err, OSError):
            raise
        raise OSError(str(err)) from err
    return _sha256(file)


def write_state(folder: Path, step: int, hashes: dict[str, str], state: dict[str, Any]) -> None:
    doc = {"format": FORMAT, "step": step, "sha256": hashes, **state}
    (folder / "state.json").write_text(json.dumps(doc, indent=1))


def not_written(run: Path, step: int, err: DataError) -> CheckpointError:
    last = [p.name for p in checkpoints(run)]
    return CheckpointError(
        f"checkpoint at step {step} was not written: {err.message}",
        f"the last good one is {last[-1]}; free some space and go on with --resume" if last else err.hint,
    )


def sweep(run: Path) -> None:
    """Remove what killed processes left half-written."""
    for part in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(part, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is none; return its new path. Nothing removes it."""
    there = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(there, ignore_errors=True)  # an older one of the same step
    os.replace(path, there)
    sync_folder(path.parent)
    return there


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by part, and state.json."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Reader:
    """A checkpoint to be read in parts or rows. Each file's hash is checked before anything of it is given.

    Whatever is wrong with a file is a DamagedError that offers the checkpoint before; a disk that does not give it, a
    CheckpointError.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, Any] = {}
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text())
            if self.state["format"] != FORMAT:
                raise ValueError(f"format {self.state['format']}, {FORMAT} expected")
            self.hashes: dict[str, str] = dict(self.state["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise self.damaged(err) from err

    def damaged(self, err: Exception) -> CheckpointError:
        before = [p for p in checkpoints(self.path.parent.parent) if p.name < self.path.name]
        hint = (
            f"the previous one is {before[-1].name}: delete {self.path} to go on from there"
            if before
            else "there is no earlier one: train again"
        )
        if isinstance(err, OSError) and not isinstance(err, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return CheckpointError(f"checkpoint {self.path} cannot be read: {err.strerror or err}", "is its disk there?")
        return DamagedError(f"checkpoint {self.path} is damaged: {err}", hint)

    @cached_property
    def _shared(self) -> dict[str, dict[str, Any]]:
        return self.state.get("shards", {})

    def check(self) -> None:
        """Read every file, and raise what is wrong with any."""
        try:
            for name in self.hashes:
                self._file(name)
        except (OSError, ValueError) as err:
            raise self.damaged(err) from err

    def has(self, part: str) -> bool:
        return f"{part}.safetensors" in self.hashes or part in self._shared

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a part, whole."""
        try:
            if part in self._shared:
                return {k: tuple(v["shape"]) for k, v in self._shared[part].items()}
            file = self._file(f"{part}.safetensors")
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise self.damaged(err) from err

    def rows(self, part: str, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Return rows [start, end) of a tensor (all of it without `end`), put together from whatever files hold them."""
        try:
            if part not in self._shared:
                return self._slice(f"{part}.safetensors", name, start, end)
            about = self._shared[part][name]
            out = []
            for file, first, count in about["pieces"]:
                if count is None:  # a tensor without rows
                    return self._slice(file, name, 0, None)
                a, z = max(start, first), min(first + count, about["shape"][0] if end is None else end)
                if a < z:
                    out.append(self._slice(file, name, a - first, z - first))
            n = (about["shape"][0] if end is None else end) - start
            if sum(len(t) for t in out) != n:
                raise ValueError(f"'{name}' is not whole")
            return torch.cat(out) if out else torch.empty(0, *about["shape"][1:])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise self.damaged(err) from err

    def part(self, part: str) -> dict[str, Tensor]:
        """Return all tensors of a part."""
        return {name: self.rows(part, name) for name in self.shapes(part)}

    def _slice(self, file: str, name: str, start: int, end: int | None) -> Tensor:
        opened = self._file(file)
        if end is None and start == 0:
            return opened.get_tensor(name)
        return opened.get_slice(name)[start:end]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            file = self.path / name
            if _sha256(file) != self.hashes[name]:
                raise ValueError(f"{name} is not what was written (its sha256 differs)")
            try:
                self._open[name] = safe_open(file, framework="pt")
            except Exception as err:  # safetensors raises its own type
                raise ValueError(f"{name}: {err}") from err
        return self._open[name]


def load(path: Path, parts: Iterable[str] = PARTS) -> Checkpoint:
    """Read a checkpoint after checking every file's hash; a damaged one is a CheckpointError that offers the previous.

    Args:
        parts: which to read; those the checkpoint does not have are left out.
    """
    reader = Reader(path)
    return Checkpoint(path, {name: reader.part(name) for name in parts if reader.has(name)}, reader.state)


# -- optimizers -------------------------------------------------------------------------------------------------------


def pack_optimizers(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return all optimizer state as named tensors ("0.3.exp_avg": optimizer, parameter, entry)."""
    out = {}
    for i, optimizer in enumerate(optimizers):
        for p, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                out[f"{i}.{p}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return out


def unpack_optimizers(optimizers: list[torch.optim.Optimizer], packed: dict[str, Tensor]) -> None:
    """Restore what `pack_optimizers` gave; optimizers must be built from the same config."""
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        state["state"] = {}
        for name, value in packed.items():
            o, p, key = name.split(".", 2)
            if int(o) == i:
                state["state"].setdefault(int(p), {})[key] = value.clone()
        optimizer.load_state_dict(state)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
