"""Checkpoints are data: safetensors and JSON in one folder, written aside, synced, renamed; hashes checked on load."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano4m_cli.data._atomic import atomic_folder
from nano4m_cli.errors import CheckpointError, DataError

FORMAT = 1


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first (half-written ones carry another name)."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file ("model", "ema", "optimizer", "critic"), and state.json."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep`; return its folder.

    A failure to write (a full disk) leaves earlier checkpoints untouched and is a CheckpointError.
    """
    path = step_folder(run, step)
    try:
        with atomic_folder(path) as aside:
            hashes = {}
            for name, part in tensors.items():
                file = aside / f"{name}.safetensors"
                try:
                    save_file({k: v.detach().contiguous().cpu() for k, v in part.items()}, file)
                except Exception as err:  # safetensors raises its own type when the disk is full
                    if isinstance(err, OSError):
                        raise
                    raise OSError(str(err)) from err
                hashes[file.name] = _sha256(file)
            doc = {"format": FORMAT, "step": step, "sha256": hashes, **state}
            (aside / "state.json").write_text(json.dumps(doc, indent=1))
    except DataError as err:
        last = [p.name for p in checkpoints(run)]
        raise CheckpointError(
            f"checkpoint at step {step} was not written: {err.message}",
            f"the last good one is {last[-1]}; free some space and go on with --resume" if last else err.hint,
        ) from err
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def load(path: Path, parts: Iterable[str] = ("model", "ema", "optimizer", "critic")) -> Checkpoint:
    """Read a checkpoint after checking every file's hash; a damaged one is a CheckpointError that offers the previous.

    Args:
        parts: which files to read; those the checkpoint does not have are left out.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, {FORMAT} expected")
        tensors = {}
        for name in parts:
            file = path / f"{name}.safetensors"
            if file.name not in state["sha256"]:
                continue
            if _sha256(file) != state["sha256"][file.name]:
                raise ValueError(f"{file.name} is not what was written (its sha256 differs)")
            tensors[name] = load_file(file)
    except (OSError, ValueError, KeyError, TypeError) as err:
        before = [p for p in checkpoints(path.parent.parent) if p.name < path.name]
        hint = (
            f"the previous one is {before[-1].name}: delete {path} to go on from there"
            if before
            else "there is no earlier one: train again"
        )
        raise CheckpointError(f"checkpoint {path} is damaged: {err}", hint) from err
    return Checkpoint(path, tensors, state)


def sweep(run: Path) -> None:
    """Remove what killed processes left half-written."""
    for part in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(part, ignore_errors=True)


def latest(run: Path) -> Path:
    """Return the newest checkpoint of a run; none is a CheckpointError."""
    found = checkpoints(run)
    if not found:
        raise CheckpointError(f"run {run} has no checkpoint", "train it first: nano4m train CONFIG")
    return found[-1]


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of a run."""
    return int(latest(run).name.removeprefix("step-"))


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
