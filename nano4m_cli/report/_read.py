"""What a report is made from: the files of a run folder, each of which may be missing or broken."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict

from nano4m_cli.config import Config, build, load_yaml
from nano4m_cli.errors import DataError, Nano4MError
from nano4m_cli.train.checkpoint import checkpoints
from nano4m_cli.train.run import metrics

T = TypeVar("T")
COMPARED = "compare"  # what files that compare runs are named by


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


class Plot(_Loose):
    """What is drawn beside the figures; kind: matrix (a heat map), curve (a line per row over numbers), table."""

    name: str
    title: str = ""
    kind: Literal["matrix", "curve", "table"]
    rows: list[str]
    columns: list[str | float]
    values: list[list[str | float | None]]
    low: list[list[float | None]] | None = None
    high: list[list[float | None]] | None = None
    x: str = ""
    y: str = ""
    diagonal: bool = False


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
    plots: list[Plot] = []
    settings: dict[str, Any] = {}
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
    """rule: why this sample is shown. figure: what the rule goes by, as text."""

    key: str = ""
    title: str = ""
    rule: str = ""
    figure: str = ""
    condition: list[Item] = []
    output: list[Item] = []
    truth: list[Item] = []


class Gallery(_Loose):
    """rules: how the rows were chosen, in sentences."""

    rows: list[Row] = []
    rules: list[str] = []


class Data(_Loose):
    """What the data set says of itself (raw/dataset.json)."""

    name: str
    source: str = ""
    version: int | str | None = None
    options: dict[str, Any] = {}
    modalities: list[str] = []
    brought: list[str] = []
    splits: dict[str, int] = {}
    judge: int = 0
    sizes: dict[str, dict[str, Any]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    max_objects: int = 1
    determined: dict[str, list[str]] = {}
    ceilings: dict[str, dict[str, float | None]] = {}
    pairing: str = ""
    notes: str = ""


class Difference(_Loose):
    """One figure of two runs over the same samples; verdict: the run that is better after correction, if they can be told apart."""

    probe: str = ""
    name: str
    unit: str = ""
    base: float | None = None
    other: float | None = None
    difference: float | None = None
    ci95: tuple[float | None, float | None] | None = None
    p_holm: float | None = None
    verdict: str | None = None


class Against(_Loose):
    run: str
    figures: list[Difference] = []


class Named(_Loose):
    run: str


class Paired(_Loose):
    """What `runs/compare-.../compare.json` holds: runs against the first of them."""

    base: str
    split: str = ""
    samples: int | None = None
    runs: list[Named]
    pairs: list[Against] = []
    notes: list[str] = []


def read_comparisons(runs: Path, names: Sequence[str]) -> list[tuple[Path, Paired]]:
    """Return the comparisons in a folder of runs that are among the named ones only; what cannot be read is none."""
    found = []
    for path in sorted(runs.glob(f"{COMPARED}-*/{COMPARED}.json")):
        try:
            one = build(Paired, _json(path), str(path))
        except (Nano4MError, OSError, ValueError, RecursionError):
            continue
        if {r.run for r in one.runs} <= set(names):
            found.append((path, one))
    return found


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
    data: Data | None = None
    data_sha256: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> str | None:
        """The data set's name, as far as config or results tell it."""
        found = self.setting("data", "dataset") or next((r.data for r in self.results if r.data), None)
        return None if found is None else str(found)

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


def read_run(folder: Path, data: Path | None = None) -> Inputs:
    """Read everything a report shows; only a missing run folder is an error.

    Args:
        data: the folder of all data sets, where what the run's own says of itself is wanted.
    """
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
            name = path.relative_to(folder) if path.is_relative_to(folder) else path.name
            out.problems.append(f"{name} cannot be read: {err}".replace(str(folder) + "/", ""))
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
    if data is not None and out.dataset and Path(out.dataset).name == out.dataset:
        path = data / out.dataset / "raw" / "dataset.json"
        out.data = attempt(path, lambda p: build(Data, _json(p), f"dataset.json of {out.dataset}"))
        out.data_sha256 = None if out.data is None else hashlib.sha256(path.read_bytes()).hexdigest()
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
