"""A run: its folder, its config, and what belongs together in it. `prepare` to start or resume, `open_run` to use."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nano4m_cli import __version__, dist
from nano4m_cli.config import dump_yaml, load_yaml
from nano4m_cli.data._atomic import atomic_file, write_json
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shard_cache import ShardCache
from nano4m_cli.data.stream import cache_of, open_remote
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import CheckpointError, ConfigError, DamagedError, DataError
from nano4m_cli.masking._mixture import MaskReport, Mixture
from nano4m_cli.model.apple4m import Apple4M
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.course4m import Course4M
from nano4m_cli.model.fourm import FourM
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.rng import torch_seed
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import RunConfig, parse_run_config
from nano4m_cli.train.loop import StepRecord, Stopped, Trainer
from nano4m_cli.train.tasks import FourMTask

# Settings of a run that do not change what it computes; a resume may change them.
FREE = {
    "train": ("log_every", "checkpoint_every", "keep", "keep_every", "keep_best", "save_async", "workers", "parallel", "recompute",
              "timeout", "stall", "sinks", "log_keys"),
    "data": ("skip_broken", "url", "cache", "cache_gb", "wait"),
}
STOPPED = "stopped.json"  # lies in a run's folder from a stop by a signal until the run goes on
DRY_SAMPLES = 8192
MODELS: dict[str, type[TokenModel]] = {
    "fourm": FourM, "gpt": GPT, "maskgit": MaskGIT, "course4m": Course4M, "apple4m": Apple4M,
}  # fmt: skip


@dataclass
class Prepared:
    """A run ready to start: `summary` says what it is, `masks` what its masking shows, `warnings` what a user should mend."""

    config: RunConfig
    folder: Path
    dataset: DatasetFolder
    task: FourMTask
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def masks(self, samples: int = DRY_SAMPLES) -> MaskReport:
        report = self.task.mixture.simulate(self.task.train.lengths(slice(samples)), self.config.seed, samples)
        return replace(report, directions=self.task.model.posed(report.directions))


def prepare(config: RunConfig, workspace: Workspace) -> Prepared:
    """Open data and build the model of a config; nothing is written."""
    folder = workspace.root / "runs" / config.name
    chosen = config.data
    if checkpoint.checkpoints(folder) and (folder / "config.yaml").is_file():
        # What a run chose at its start stays chosen, whatever was fetched or tokenised since.
        before = parse_run_config(load_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
        chosen = chosen.model_copy(update={
            "dataset": chosen.dataset or before.data.dataset, "modalities": chosen.modalities or before.data.modalities,
        })
    dataset = open_remote(chosen.url, workspace, chosen.dataset) if chosen.url else workspace.dataset(chosen.dataset)
    cache = cache_of(dataset, chosen.cache, chosen.cache_gb, chosen.wait)
    modalities = chosen.modalities or _in_order(dataset)
    if not modalities:
        raise DataError(f"data set '{dataset.name}' has no tokens", "run 'nano4m tokenize' first")
    train = TokenData(dataset, config.data.train, modalities, config.data.skip_broken, cache)
    # A data set without the usual val split still trains; a split that was named must be there.
    has_val = config.data.val != "val" or dataset.tokens(modalities[0], "val").is_dir()
    val = TokenData(dataset, config.data.val, modalities, cache=cache) if has_val else None
    torch.manual_seed(torch_seed(config.seed, "init"))
    model = MODELS[config.task](config.model, train.layout)
    # The data set and modalities that were chosen are part of the run from here on.
    data = config.data.model_copy(update={"dataset": dataset.name, "modalities": list(modalities)})
    config = config.model_copy(update={"data": data})
    task = FourMTask(config, train, val, model, dist.rank(), dist.ranks())
    summary = {
        "run": config.name,
        "dataset": dataset.name,
        "train_samples": len(train),
        "val_samples": len(val) if val else 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.train.steps,
        "samples_per_step": config.train.batch,
        "epochs": round(config.train.steps * config.train.batch / len(train), 2),
        "modalities": {s.modality: f"{s.kind} {'x'.join(map(str, s.shape))} of {s.vocab_size}" for s in train.layout.specs},
    }
    return Prepared(config, folder, dataset, task, summary, _warnings(task, cache))


def _warnings(task: FourMTask, cache: ShardCache) -> list[str]:
    """Return what is not wrong but will hurt: of data that come from an address."""
    if not isinstance(task.order, StreamOrder):
        return []
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or task.ranks, task.ranks)
    small, minutes = task.train.cache_warning(task.order, cache.max_bytes, local / task.ranks), task.config.train.timeout
    late = (f"data.wait={cache.wait:g} is more than train.timeout={minutes:g} min: where one process waits for a shard, the others "
            "will give up before it can name it") if task.ranks > 1 and cache.wait > 60 * minutes else None
    return [w for w in (small, late) if w]


def _in_order(dataset: DatasetFolder) -> list[str]:
    """Return the tokenised modalities in the data set's own order."""
    have = dataset.tokenised()
    first = [m for m in dataset.info().modalities if m in have] if dataset.info_path.is_file() else []
    return first + [m for m in have if m not in first]


def start(prepared: Prepared, resume: bool, device: str, callback: Callable[[StepRecord], None],
          set_aside: bool = False) -> dict[str, float]:
    """Train a prepared run to its end and return the last validation figures.

    Without `resume` a run folder that holds checkpoints is not touched; with it, config and tokens must be those the
    run was started with.

    Args:
        set_aside: rename a newest checkpoint that is damaged, say so, and go on from the one before, if there is one.

    Raises:
        Stopped: on a signal, after a checkpoint; stopped.json in the run's folder says so to whoever starts it again.
    """
    run, config = prepared.folder, prepared.config
    config_path = run / "config.yaml"

    def past_damage(read: Callable[[], Any]) -> Any:
        while True:
            try:
                return read()
            except DamagedError as err:
                if not set_aside:
                    raise
                _set_aside_newest(run, err, callback)

    def check() -> bool:
        with dist.together():
            return _check_folder(prepared, resume)

    exists = past_damage(check)
    with dist.together():
        if dist.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(run)
            with atomic_file(config_path) as file:
                file.write(dump_yaml(config).encode())
            if not exists:
                (run / "metrics.jsonl").unlink(missing_ok=True)
    header = {"version": __version__, "task": config.task, "created": round(time.time(), 1)}
    trainer = Trainer(prepared.task, config.train, config.seed, run, header, device, callback)
    if exists:
        past_damage(trainer.resume)
        if trainer.step >= config.train.steps:
            return trainer.validate()
    if dist.rank() == 0:
        (run / STOPPED).unlink(missing_ok=True)
    try:
        return trainer.fit()
    except Stopped as err:
        with dist.together():
            if dist.rank() == 0:
                note = {"step": err.step, "steps": config.train.steps, "signal": signal.Signals(err.signum).name,
                        "time": round(time.time(), 3)}
                write_json(run / STOPPED, note)
        raise


def _set_aside_newest(run: Path, err: DamagedError, callback: Callable[[StepRecord], None]) -> None:
    """Rename the newest checkpoint, which all ranks know to be damaged; raise `err` where there is none before."""
    with dist.together():
        if dist.rank():
            return
        points = checkpoint.checkpoints(run)
        try:
            # What another node said may be its own: a disk of the network that does not show it the files yet.
            if len(points) > 1:
                checkpoint.Reader(points[-1]).check()
        except DamagedError as mine:
            try:
                there = checkpoint.set_aside(points[-1])
            except OSError as why:
                raise CheckpointError(f"cannot rename {points[-1]}: {why.strerror}", err.hint) from why
            note = f"warning: {mine.message}; it is {there.name} now, and training goes on from {points[-2].name}"
            callback(StepRecord("damaged", checkpoint.step_of(points[-2]), 0, {}, note))
            return
        raise err


def _check_folder(prepared: Prepared, resume: bool) -> bool:
    """Return whether the run has checkpoints; raise where it must not be gone on with as it is."""
    run, config = prepared.folder, prepared.config
    config_path = run / "config.yaml"
    exists = bool(checkpoint.checkpoints(run))
    if exists and not resume:
        same = not _differences(load_yaml(config_path), config) if config_path.is_file() else False
        raise CheckpointError(
            f"run '{config.name}' exists already ({checkpoint.latest(run).name} in {run})"
            + ("" if same else " and belongs to another config"),
            "go on with --resume, or start another with name=NEW" if same else f"start another with name=NEW, or delete {run}",
        )
    if exists:
        if not config_path.is_file():
            raise CheckpointError(f"{run} has checkpoints but no config.yaml")
        changed = _differences(load_yaml(config_path), config)
        if changed:
            raise ConfigError(
                f"run folder {run} belongs to another config; these differ: " + "; ".join(changed[:6]),
                "resume with the settings it was started with, or start another run with name=NEW",
            )
        specs = checkpoint.load(checkpoint.latest(run), parts=()).state["specs"]
        check_specs([TokenSpec.model_validate(s) for s in specs], prepared.task.layout.specs)
    return exists


def check_specs(then: list[TokenSpec], now: list[TokenSpec]) -> None:
    """Raise CheckpointError where the tokens on disk are not those of the checkpoint; it names the modality."""
    by_name = {s.modality: s for s in now}
    for spec in then:
        other = by_name.get(spec.modality)
        difference = "it is not there" if other is None else spec.same_ids_as(other)
        if difference:
            raise CheckpointError(
                f"the {spec.modality} tokens are not those this run was trained on: {difference}",
                "use the data set with the tokenizers of the run, or train again",
            )


def _differences(before: dict, config: RunConfig) -> list[str]:
    """Return "key: before -> now" for every setting that matters and differs."""
    old = parse_run_config(before, "config.yaml").model_dump(mode="json")
    new = config.model_dump(mode="json")

    def walk(a: Any, b: Any, path: tuple[str, ...]) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [d for k in {**a, **b} for d in walk(a.get(k), b.get(k), (*path, k))]
        if a == b or (len(path) == 2 and path[1] in FREE.get(path[0], ())):
            return []
        return [f"{'.'.join(path)}: {a} -> {b}"]

    return walk(old, new, ())


@dataclass
class OpenRun:
    """A trained run, ready to be used: model in eval mode with averaged weights where the run keeps them."""

    path: Path
    config: RunConfig
    model: TokenModel
    layout: Layout
    step: int
    dataset: DatasetFolder
    checkpoint: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.config.masking, self.layout)

    @cached_property
    def directions(self) -> dict[str, float]:
        """The share of training samples that posed each direction (those never posed are not there), by simulation."""
        lengths = TokenData(self.dataset, self.config.data.train, self.layout.names).lengths(slice(8192))
        return self.model.posed(self.mixture.simulate(lengths, self.config.seed, 16384).directions)


def open_run(workspace: Workspace, name: str | None = None, device: str = "cpu") -> OpenRun:
    """Load the newest checkpoint of a run (default: the newest run)."""
    path = workspace.run(name)
    config = parse_run_config(load_yaml(path / "config.yaml"), str(path / "config.yaml"))
    newest = checkpoint.latest(path)
    point = checkpoint.load(newest, parts=("model", "ema"))
    layout = Layout([TokenSpec.model_validate(s) for s in point.state["specs"]])
    model = MODELS[config.task](config.model, layout)
    state = point.tensors["model"]
    state.update(point.tensors.get("ema", {}))
    try:
        model.load_state_dict(state)
    except RuntimeError as err:
        raise CheckpointError(f"{newest} does not fit its own config: {err}") from err
    model.eval().requires_grad_(False).to(device)
    dataset = workspace.dataset(config.data.dataset)
    return OpenRun(path, config, model, layout, point.state["step"], dataset, newest)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl (a line cut by a kill is left out)."""
    out = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out
