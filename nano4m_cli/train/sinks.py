"""Where records of a run go besides metrics.jsonl, which stays the truth: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nano4m_cli.errors import ConfigError

Sink = Callable[[str, int, dict[str, Any]], None]  # kind, step, figures


def open_sinks(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Sink]:
    """Return what takes the records of a run; a package that is not installed is a ConfigError that says how to get it."""
    return [{"tensorboard": _tensorboard, "wandb": _wandb}[name](run, config) for name in names]


def scalars(kind: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield ("train/loss", value), ("speed/tokens_per_s/min", value) for every number of a record."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from scalars(f"{kind}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{kind}/{name}", float(value)


def _missing(package: str, err: ImportError) -> ConfigError:
    return ConfigError(f"train.sinks: {package} cannot be imported: {err}", f"pip install 'nano4m[{package}]'")


def _tensorboard(run: Path, config: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise _missing("tensorboard", err) from err
    writer = SummaryWriter(str(run / "tensorboard"))

    def write(kind: str, step: int, figures: dict[str, Any]) -> None:
        for name, value in scalars(kind, figures):
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(run: Path, config: dict[str, Any]) -> Sink:
    """Project, entity, key and mode come from wandb's own environment (WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE)."""
    try:
        import wandb
    except ImportError as err:
        raise _missing("wandb", err) from err
    session = wandb.init(name=run.name, id=run.name, resume="allow", dir=str(run), config=config)

    def write(kind: str, step: int, figures: dict[str, Any]) -> None:
        session.log({**dict(scalars(kind, figures)), "step": step})

    return write
