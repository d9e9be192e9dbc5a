"""What a report is made from: the files of a run folder, each of which may be missing or broken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict

from nano4m_cli.config import Config, build, load_yaml
from nano4m_cli.errors import DataError, Nano4MError
from nano4m_cli.train.checkpoint import checkpoints
from nano4m_cli.train.run import metrics

T = TypeVar("T")


class _Loose(Config):
    """A document that later versions may add to: keys that are not known are left out, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Metric(_Loose):
    """One figure; `name` reads "source+source->target/metric" or "modality/metric"."""

    name: str
    value: float | None = None
    n: int | None = None
    ci95: tuple[float | None, float | None] | None = None
    chance: float | None = None
    majority: float | None = None
    ceiling: float | None = None
    reference: float | None = None
    higher_is_better: bool = True
    unit: str = ""
    in_distribution: bool | None = None
    setting: dict[str, str | int | float] | None = None

    @property
    def subject(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def short(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def sources(self) -> tuple[str, ...]:
        """Source modalities; empty for "modality/metric"."""
        left, arrow, _ = self.subject.partition("->")
        return tuple(left.split("+")) if arrow else ()

    @property
    def target(self) -> str:
        return self.subject.rpartition("->")[2]


class Posed(_Loose):
    """Whether training posed a direction, and in what share of its samples."""

    value: bool | None = None
    frequency: float | None = None


class Result(_Loose):
    probe: str
    version: int | str | None = None
    title: str = ""
    split: str | None = None
    seed: int | None = None
    run: str | None = None
    checkpoint: str | None = None
    data: str | None = None
    commit: str | None = None
    metrics: list[Metric]
    in_distribution: dict[str, Posed] = {}
    notes: list[str] = []
    seconds: float | None = None

    def posed(self, metric: Metric) -> Posed:
        """Return what is known of the metric's direction; the metric's own flag comes first."""
        known = self.in_distribution.get(metric.subject, Posed())
        return known if metric.in_distribution is None else known.model_copy(update={"value": metric.in_distribution})


class Item(_Loose):
    modality: str
    kind: Literal["image", "audio", "text"]
    file: str | None = None
    picture: str | None = None
    text: str = ""


class Row(_Loose):
    key: str = ""
    title: str = ""
    condition: list[Item] = []
    output: list[Item] = []
    truth: list[Item] = []


class Gallery(_Loose):
    rows: list[Row] = []


@dataclass
class Inputs:
    """All that is known of a run. problems: one line for every file that is there and cannot be shown."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    results: list[Result] = field(default_factory=list)
    gallery: Gallery = Gallery()
    problems: list[str] = field(default_factory=list)

    def setting(self, *path: str) -> Any:
        """Return a value of the config, None where it is not there."""
        node: Any = self.config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        return node

    @property
    def specs(self) -> list[dict[str, Any]]:
        """Token specs of the checkpoint, in model order."""
        found = self.state.get("specs")
        return [s for s in found if isinstance(s, dict) and "modality" in s] if isinstance(found, list) else []

    @property
    def modalities(self) -> list[str]:
        wanted = self.setting("data", "modalities")
        names = wanted if isinstance(wanted, list) and wanted else [s["modality"] for s in self.specs]
        return [str(m) for m in names]


def read_run(folder: Path) -> Inputs:
    """Read everything a report shows; only a missing run folder is an error."""
    if not folder.is_dir():
        raise DataError(f"no run folder '{folder}'", "train it first: nano4m train CONFIG")
    out = Inputs(folder)

    def attempt(path: Path, read: Callable[[Path], T]) -> T | None:
        """Return read(path) where the file is there; what is wrong with it becomes a line of the page."""
        if not path.is_file():
            return None
        try:
            return read(path)
        except Nano4MError as err:
            out.problems.append(err.message.replace(str(folder) + "/", ""))
        except (OSError, ValueError, RecursionError) as err:
            out.problems.append(f"{path.relative_to(folder)} cannot be read: {err}".replace(str(folder) + "/", ""))
        return None

    out.config = attempt(folder / "config.yaml", load_yaml) or {}
    out.config_text = attempt(folder / "config.yaml", lambda p: p.read_text(errors="replace")) or ""
    found = attempt(folder / "metrics.jsonl", lambda p: metrics(p.parent)) or []
    out.records = [r for r in found if isinstance(r, dict)]
    for path in sorted((folder / "eval").glob("*.json")):
        result = attempt(path, lambda p: build(Result, _json(p), str(p)))
        if result is not None:
            out.results.append(result)
    out.gallery = attempt(folder / "eval/gallery/gallery.json", lambda p: build(Gallery, _json(p), str(p))) or Gallery()
    points = checkpoints(folder)
    if points:
        # The checkpoint that was evaluated says more than a newer one.
        judged = {r.checkpoint for r in out.results}
        point = max([p for p in points if p.name in judged] or points)
        out.checkpoint = point.name
        state = attempt(point / "state.json", _json)
        out.state = state if isinstance(state, dict) else {}
        out.parameters = attempt(point / "model.safetensors", _parameters) or _shared_parameters(out.state)
    return out


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _shared_parameters(state: dict[str, Any]) -> int | None:
    """Return how many values a model has that several processes saved in shards, from state.json."""
    try:
        return sum(math.prod(entry["shape"]) for entry in state["shards"]["model"].values())
    except (AttributeError, KeyError, TypeError):
        return None


def _parameters(path: Path) -> int:
    """Return how many values a safetensors file holds, from its header alone."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 100_000_000:
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(size))
    try:
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (AttributeError, KeyError, TypeError) as err:
        raise ValueError("it is no safetensors file") from err
