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
from nano4m_cli.data.sources._base import DatasetInfo, Failure, ShardPlan, Source
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
    failures: list[Failure]


def open_source(name: str, options: list[str], workspace: Workspace) -> Source:
    """Return the source of that name with "key=value" options checked."""
    cls = SOURCES.get(name)
    return cls(build(cls.Options, apply_overrides({}, options), f"source '{name}'"), workspace.cache / name)


def fetch(source: Source, workspace: Workspace, workers: int | None = None, progress: Progress | None = None) -> FetchReport:
    """Make the raw shards of a source below data/<name>/raw, and token shards of what it brings as tokens.

    Shards that are there and whole are kept; a data set of the same name made with other options is a FetchError.
    A spec.json is written last: where it stands, the tokens are whole.
    """
    progress = progress or (lambda what, done, total: None)
    source.prepare(progress)
    info, specs = source.info(), source.token_specs()
    assert [s.modality for s in specs] == info.brought, (specs, info.brought)
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
    todo = [p for p in plans if not _is_whole(dataset, info.brought, p)]
    if todo:
        for name in info.brought:
            dataset.spec_path(name).unlink(missing_ok=True)
    total, kept = sum(p.count for p in plans), sum(p.count for p in plans) - sum(p.count for p in todo)
    done = kept
    progress("samples", done, total)
    for plan_count in _run(source, dataset, info.brought, todo, workers or usable_cores()):
        done += plan_count
        progress("samples", done, total)
    for split, count in info.splits.items():
        if count:
            shard_paths(dataset.raw(split))
    for spec in specs:
        write_json(dataset.spec_path(spec.modality), spec.model_dump(mode="json"))
    failures = source.failures()
    for name, listed in (("failures.json", [f._asdict() for f in failures]), ("left_out.json", source.left_out())):
        path = dataset.info_path.with_name(name)
        write_json(path, listed) if listed else path.unlink(missing_ok=True)
    return FetchReport(dataset, info, done - kept, kept, failures)


def usable_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process, which ends its workers and says so once; end with a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a worker without a parent would work on, unseen


def _targets(dataset: DatasetFolder, brought: list[str], plan: ShardPlan) -> tuple[Path, dict[str, Path]]:
    """Return the raw shard of a plan, and its token shard of each brought modality."""
    name = shard_name(plan.index)
    return dataset.raw(plan.split) / name, {m: dataset.tokens(m, plan.split) / name for m in brought}


def _is_whole(dataset: DatasetFolder, brought: list[str], plan: ShardPlan) -> bool:
    raw, tokens = _targets(dataset, brought, plan)
    if not all(path.is_file() and index_path(path).is_file() for path in (raw, *tokens.values())):
        return False
    try:
        keys = read_index(raw).keys
        return len(keys) == plan.count and all(read_index(path).keys == keys for path in tokens.values())
    except ShardError:
        return False


def _make(source: Source, dataset: DatasetFolder, brought: list[str], plan: ShardPlan) -> int:
    raw, tokens = _targets(dataset, brought, plan)
    samples = ((s.key, s.members) for s in source.samples(plan))
    if tokens:
        held = list(samples)  # tokens are small: one pass over the source serves all shards
        for modality, path in tokens.items():
            write_shard(path, ((key, {f"{modality}.npy": members[f"{modality}.npy"]}) for key, members in held))
        ids = {f"{modality}.npy" for modality in tokens}
        samples = ((key, {k: v for k, v in members.items() if k not in ids}) for key, members in held)
    n = write_shard(raw, samples)
    if n != plan.count:
        raise FetchError(f"{raw}: {n} samples came, {plan.count} were planned")
    return n


def _run(source: Source, dataset: DatasetFolder, brought: list[str], todo: list[ShardPlan], workers: int):
    """Yield the sample count of each shard as it is done."""
    if workers <= 1 or len(todo) <= 1:
        for plan in todo:
            yield _make(source, dataset, brought, plan)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=ignore_interrupts) as pool:
        futures = [pool.submit(_make, source, dataset, brought, p) for p in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
