"""What a comparison of runs holds, and how the results of a run are read for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from nano4m_cli.config import Config, build, load_yaml
from nano4m_cli.errors import DataError
from nano4m_cli.probes._result import Metric, Result
from nano4m_cli.registry import PROBES
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import parse_run_config
from nano4m_cli.train.run import FREE

SAME = ("made", "keys")  # of what is written beside results, what must agree


class Figure(Config):
    """One figure of two runs. difference: other - base. p_holm: corrected for all figures of the comparison.

    differs: whether the runs are told apart, corrected. verdict: which of them is then better; None where neither is, as of
        gains by sources, or where nothing was tested (then ci95, effect and p are None).
    trained: whether training of (base, other) posed the question.
    """

    probe: str
    name: str
    unit: str = ""
    higher_is_better: bool = True
    n: int
    base: float
    other: float
    difference: float
    ci95: tuple[float, float] | None = None
    effect: float | None = None
    p: float | None = None
    p_holm: float | None = None
    differs: bool = False
    verdict: str | None = None
    trained: tuple[bool | None, bool | None] = (None, None)


class Pair(Config):
    """All figures of a run against the base; left_out: "probe: figure" (or "probe") and why."""

    run: str
    figures: list[Figure]
    left_out: dict[str, str] = {}


class About(Config):
    """What a run is: its checkpoint, samples seen in training, parameters, and its settings that differ among the runs."""

    run: str
    checkpoint: str
    samples_seen: int
    parameters: int
    seed: int
    settings: dict[str, Any] = {}


class Spread(Config):
    """A figure over the runs of each group: number of runs, mean, standard deviation (None of one run)."""

    probe: str
    name: str
    unit: str = ""
    runs: list[int]
    mean: list[float | None]
    std: list[float | None]


class Comparison(Config):
    """What `runs/compare-.../compare.json` holds. groups: runs that share all settings but the seed."""

    kind: str = "compare"
    version: int = 1
    data: str
    split: str
    samples: int
    base: str
    runs: list[About]
    pairs: list[Pair]
    groups: list[list[str]] = []
    spreads: list[Spread] = []
    notes: list[str] = []


@dataclass
class Found:
    """The results of one probe of one run, with the values per sample and what they are of."""

    result: Result
    about: dict[str, Any]
    values: dict[str, np.ndarray]

    def metrics(self) -> dict[str, Metric]:
        return {m.name: m for m in self.result.metrics if m.setting is None and m.value is not None}

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        both = (name, f"{name}/weight")
        return tuple(self.values[n] for n in both) if all(n in self.values for n in both) else None


def results(run: Path, probes: Sequence[str]) -> dict[str, Found]:
    """Return the run's results by probe."""
    folder = run / "eval"
    again = lambda *p: " ".join(["nano4m eval", "--run", run.name, *(f"--probe {x}" for x in p)])  # noqa: E731
    written = sorted(p.name.removesuffix(".samples.safetensors") for p in folder.glob("*.samples.safetensors"))
    have = [n for n in written if n in PROBES]
    for name in probes:
        if name not in have:
            raise DataError(f"run '{run.name}' has no results of probe '{name}' with values per sample", again(name))
    if not have:
        raise DataError(f"run '{run.name}' has no results to compare", again())
    out = {}
    for name in [n for n in have if not probes or n in probes]:
        path, beside = folder / f"{name}.json", folder / f"{name}.samples.safetensors"
        try:
            result = build(Result, json.loads(path.read_text()), str(path))
            with safe_open(beside, "np") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
            values = load(beside.read_bytes())
        except (OSError, ValueError, SafetensorError) as err:
            raise DataError(f"{path} or the values beside it cannot be read: {err}", again(name)) from err
        if not {"samples", "seed", "checkpoint", *SAME} <= set(about):
            raise DataError(f"{beside} does not say which samples it is of (an older version wrote it)", again(name))
        if about["checkpoint"] != result.checkpoint:
            raise DataError(f"{path} is of {result.checkpoint}, the values beside it of {about['checkpoint']}", again(name))
        out[name] = Found(result, about, values)
    return out


def about(paths: Sequence[Path]) -> list[About]:
    flat, found = [], []
    for path in paths:
        config = parse_run_config(load_yaml(path / "config.yaml"), str(path / "config.yaml"))
        newest = checkpoint.latest(path)
        step = checkpoint.load(newest, parts=()).state["step"]
        with safe_open(newest / "model.safetensors", "np") as file:
            count = sum(int(np.prod(file.get_slice(k).get_shape())) for k in file.keys())
        found.append((config, newest.name, step * config.train.batch, count))
        flat.append(_flat(config.model_dump(mode="json", exclude={"name", "seed"})))
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if len({json.dumps(f.get(k)) for f in flat}) > 1]
    return [
        About(run=path.name, checkpoint=name, samples_seen=seen, parameters=count, seed=config.seed,
              settings={k: f.get(k) for k in keys})
        for path, (config, name, seen, count), f in zip(paths, found, flat, strict=True)
    ]


def _flat(node: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return {"a.b.0.c": value} of settings that matter to what a run computes."""
    if isinstance(node, dict) and node:
        return {k: v for name, child in node.items() if not (path == ("train",) and name in FREE)
                for k, v in _flat(child, (*path, name)).items()}
    if isinstance(node, list) and any(isinstance(x, dict) for x in node):
        return {k: v for i, child in enumerate(node) for k, v in _flat(child, (*path, str(i))).items()}
    return {".".join(path): node}
