"""Run a source: plan its shards, make those that are missing, in parallel, resumable."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nano4m_cli.config import apply_overrides, build
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.shards import index_path, read_index, shard_name, shard_paths, write_shard
from nano4m_cli.data.sources._base import DatasetInfo, ShardPlan, Source
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import FetchError, ShardError
from nano4m_cli.registry import SOURCES

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FetchReport:
    """What a fetch did: the data set, and how many samples were made now and were there already."""

    dataset: DatasetFolder
    info: DatasetInfo
    made: int
    kept: int


def open_source(name: str, options: list[str], workspace: Workspace) -> Source:
    """Return the source of that name with "key=value" options checked."""
    cls = SOURCES.get(name)
    return cls(build(cls.Options, apply_overrides({}, options), f"source '{name}'"), workspace.cache / name)


def fetch(source: Source, workspace: Workspace, workers: int | None = None, progress: Progress | None = None) -> FetchReport:
    """Make the raw shards of a source below data/<name>/raw.

    Shards that are there and whole are kept; a data set of the same name made with other options is a FetchError.
    """
    progress = progress or (lambda what, done, total: None)
    source.prepare(progress)
    info = source.info()
    dataset = DatasetFolder(workspace.root / "data" / info.name)
    if dataset.info_path.is_file():
        before = dataset.info()
        if (before.source, before.options, before.version) != (info.source, info.options, info.version):
            changed = [k for k in info.options if before.options.get(k) != info.options[k]] or ["version"]
            raise FetchError(
                f"data set '{info.name}' is there already, made with other options ({', '.join(changed)} differ)",
                f"fetch under another name (name=...), or delete {dataset.path}",
            )
    write_json(dataset.info_path, info.model_dump(mode="json"))
    plans = source.plan()
    todo = [p for p in plans if not _is_whole(dataset.raw(p.split) / shard_name(p.index), p)]
    total, kept = sum(p.count for p in plans), sum(p.count for p in plans) - sum(p.count for p in todo)
    done = kept
    progress("samples", done, total)
    for plan_count in _run(source, dataset, todo, workers or usable_cores()):
        done += plan_count
        progress("samples", done, total)
    for split, count in info.splits.items():
        if count:
            shard_paths(dataset.raw(split))
    return FetchReport(dataset, info, done - kept, kept)


def usable_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process, which ends its workers and says so once; end with a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a worker without a parent would work on, unseen


def _is_whole(path: Path, plan: ShardPlan) -> bool:
    if not path.is_file() or not index_path(path).is_file():
        return False
    try:
        return len(read_index(path).keys) == plan.count
    except ShardError:
        return False


def _make(source: Source, folder: Path, plan: ShardPlan) -> int:
    n = write_shard(folder / shard_name(plan.index), ((s.key, s.members) for s in source.samples(plan)))
    if n != plan.count:
        raise FetchError(f"{folder / shard_name(plan.index)}: {n} samples came, {plan.count} were planned")
    return n


def _run(source: Source, dataset: DatasetFolder, todo: list[ShardPlan], workers: int):
    """Yield the sample count of each shard as it is done."""
    if workers <= 1 or len(todo) <= 1:
        for plan in todo:
            yield _make(source, dataset.raw(plan.split), plan)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=ignore_interrupts) as pool:
        futures = [pool.submit(_make, source, dataset.raw(p.split), p) for p in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
