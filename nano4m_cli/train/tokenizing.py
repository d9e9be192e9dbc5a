"""Raw shards to token shards: fit tokenizers that are missing, encode shard by shard, check what is there."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from nano4m_cli.config import apply_overrides, build, dump_yaml
from nano4m_cli.data._atomic import atomic_file, atomic_folder, write_json
from nano4m_cli.data.fetch import Progress, ignore_interrupts, usable_cores
from nano4m_cli.data.shards import (
    Shard,
    Split,
    index_path,
    npy,
    read_index,
    shard_paths,
    write_shard,
)
from nano4m_cli.data.sources._base import DatasetInfo
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.errors import ConfigError, DataError, ShardError, UnknownNameError, did_you_mean
from nano4m_cli.modalities._base import Modality
from nano4m_cli.registry import MODALITIES, TOKENIZERS
from nano4m_cli.rng import generator, permutation, torch_seed
from nano4m_cli.spec import TokenSpec, read_spec
from nano4m_cli.tokenizers._base import GradientTokenizer, Tokenizer, open_tokenizer, save_tokenizer
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TokenizerRunConfig, TrainConfig
from nano4m_cli.train.loop import StepRecord, Trainer
from nano4m_cli.train.tasks import TokenizerTask

BATCH, BATCH_BYTES = 250, 1 << 28  # raw values held at once, at most: long sounds are large
WHOLE = (0, 1)  # the only one of one job


def choose_modalities(dataset: DatasetFolder, wanted: Sequence[str], brought: bool = False) -> list[str]:
    """Return the modalities to tokenize: those named, else all that the data set has; brought tokens only if asked for."""
    info = dataset.info()
    have = info.modalities
    for name in wanted:
        if name not in have:
            if name not in MODALITIES:
                raise UnknownNameError.of("modality", name, MODALITIES.names())
            raise DataError(f"data set '{dataset.name}' has no {name}", did_you_mean(name, have))
        if not brought:
            refuse_brought(dataset, info, name)
    return list(dict.fromkeys(wanted)) or [m for m in have if brought or m not in info.brought]


def refuse_brought(dataset: DatasetFolder, info: DatasetInfo, modality: str) -> None:
    """Raise a DataError where the tokens of a modality were brought by its source: nothing raw is there to make them of."""
    if modality in info.brought:
        raise DataError(
            f"the {modality} tokens of '{dataset.name}' came with 'nano4m fetch {info.source}'; there is no raw {modality} to "
            "tokenize again",
            "train on them as they are",
        )


def make_tokenizer(dataset: DatasetFolder, modality: str, name: str | None, options: dict[str, Any]) -> Tokenizer:
    """Return an unfitted tokenizer: the modality's default, with the data set's hints, then the given options."""
    info = dataset.info()
    refuse_brought(dataset, info, modality)
    kind = MODALITIES.get(modality)
    hints = {**kind.tokenizer_config, **info.tokenizers.get(modality, {})}
    usual = hints.pop("name", kind.tokenizer)
    chosen = name or usual
    cls = TOKENIZERS.get(chosen)
    merged = {**(hints if chosen == usual else {}), **options}  # hints are for the tokenizer they were written for
    return cls(modality, build(cls.Options, merged, f"tokenizer '{chosen}'"), info.sizes.get(modality, {}))


def read_raw(dataset: DatasetFolder, split: str, modality: str, index: Sequence[int]) -> list[Any]:
    """Return raw values of samples by position in the split."""
    shards, kind = Split(dataset.raw(split)), MODALITIES.get(modality)
    out = []
    for i in index:
        shard, j = shards.locate(int(i))
        out.append(kind.from_bytes(shard.read(j, kind.ext), f"{shard.path}, '{shard.keys[j]}', {kind.ext}"))
    return out


def fit_tokenizer(
    dataset: DatasetFolder, tokenizer: Tokenizer, seed: int = 0, train: TrainConfig | None = None,
    callback: Callable[[StepRecord], None] | None = None, run: Path | None = None, resume: bool = False, split: str = "train",
) -> None:
    """Fit a tokenizer on the train split and save it below the data set's tokenizers/."""
    n = len(Split(dataset.raw(split)))
    some = permutation(n, seed, "fit")[: getattr(tokenizer.options, "fit_samples", n)]
    torch.manual_seed(torch_seed(seed, "tokenizer"))
    tokenizer.fit(read_raw(dataset, split, tokenizer.modality, np.sort(some)))
    if isinstance(tokenizer, GradientTokenizer):
        config = train or build(TrainConfig, default_training(tokenizer), "tokenizer training")
        task = TokenizerTask(tokenizer, seed, config.batch)
        trainer = Trainer(task, config, seed, run, {"task": "tokenizer"}, callback=callback)
        if resume and run is not None and checkpoint.checkpoints(run):
            trainer.resume()
        trainer.fit()
        tokenizer.module.eval()
    with atomic_folder(dataset.tokenizer(tokenizer.modality)) as folder:
        save_tokenizer(tokenizer, folder)


def default_training(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the training settings a tokenizer is fitted with unless a config says otherwise."""
    usual = round(tokenizer.train["steps"] * tokenizer.effort)
    steps = getattr(tokenizer.options, "fit_steps", None) or usual
    return {"log_every": 100, "val_every": steps, "checkpoint_every": steps, **tokenizer.train, "steps": steps}


def make_fresh(dataset: DatasetFolder, modality: str, overrides: Sequence[str]) -> Tokenizer:
    """Return an unfitted tokenizer as "option=value" overrides (and "name=...") want it."""
    options = apply_overrides({}, overrides)
    return make_tokenizer(dataset, modality, options.pop("name", None), options)


def tokenizer_for(dataset: DatasetFolder, modality: str, overrides: Sequence[str], callback=None) -> Tokenizer:
    """Return the data set's tokenizer of a modality, fitting it where there is none yet.

    Overrides are "option=value" of the tokenizer (and "name=..."); where a fitted one was made with others, a
    ConfigError says so, since its tokens may be in use.
    """
    folder = dataset.tokenizer(modality)
    fresh = make_fresh(dataset, modality, overrides)
    if (folder / "tokenizer.json").is_file():
        there = open_tokenizer(folder)
        if overrides and (there.name, there.options) != (fresh.name, fresh.options):
            raise ConfigError(
                f"{modality} of '{dataset.name}' has a tokenizer already, with other options",
                f"delete {folder} and {dataset.tokens(modality)} to fit a new one",
            )
        return there
    if fresh.fitted:
        fit_tokenizer(dataset, fresh, callback=callback)
    else:
        with atomic_folder(folder) as aside:
            save_tokenizer(fresh, aside)
    return open_tokenizer(folder)


def fit_missing(
    dataset: DatasetFolder, overrides: Mapping[str, Sequence[str]], workers: int | None = None,
    progress: Progress | None = None, part: tuple[int, int] = WHOLE,
) -> list[str]:
    """Fit the tokenizers that the modalities in `overrides` lack and encode with them, side by side; return which.

    One process and thread for each modality: on a CPU several small fits at once end sooner than one after the other,
    and the result does not depend on the number of cores. What comes ready-made is set up first: weights that are missing
    are told of before anything is fitted. Where several jobs tokenize one data set, the first of them fits and the others
    wait; with a `part` nothing is encoded here, so that they do not wait for that too.
    """
    progress = progress or (lambda what, done, total: None)
    folder = dataset.path.parent / ".cache"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{dataset.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("wait for another process that fits tokenizers", 0, 1)
        lock.acquire()
    try:
        return _fit_missing(dataset, overrides, workers, progress, part == WHOLE)
    finally:
        lock.release()


def _fit_missing(
    dataset: DatasetFolder, overrides: Mapping[str, Sequence[str]], workers: int | None, progress: Progress, encode: bool
) -> list[str]:
    todo = []
    for m in overrides:
        if (dataset.tokenizer(m) / "tokenizer.json").is_file():
            continue
        if make_fresh(dataset, m, overrides[m]).fitted:
            todo.append(m)
        else:
            tokenizer_for(dataset, m, overrides[m])  # ready-made; `tokenize` encodes with it, by all workers
    if not todo:
        return []
    todo.sort(key=lambda m: MODALITIES.get(m).kind != "audio")  # sound takes longest to read: it starts first
    context = multiprocessing.get_context("spawn")
    processes = min(workers or usable_cores(), len(todo))
    with context.Manager() as manager, ProcessPoolExecutor(processes, context, _start_worker) as pool:
        queue = manager.Queue()
        pending = {pool.submit(_fit_one, dataset, m, list(overrides[m]), queue, encode) for m in todo}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5)
                while not queue.empty():
                    progress(*queue.get())
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return todo


def _fit_one(dataset: DatasetFolder, modality: str, overrides: list[str], queue: Any, encode: bool) -> None:
    def tell(record: StepRecord) -> None:
        if record.kind == "train":
            queue.put((f"fit {modality}", record.step, record.steps))

    tokenizer_for(dataset, modality, overrides, tell)
    if encode:
        tokenize(dataset, modality, overrides, 1, lambda what, done, total: queue.put((what, done, total)))


@dataclass(frozen=True)
class TokenizeReport:
    """What tokenizing a modality did: shards made now and kept, samples in all, and the spec."""

    modality: str
    spec: TokenSpec
    made: int
    kept: int
    samples: int


def tokenize(
    dataset: DatasetFolder, modality: str, overrides: Sequence[str] = (), workers: int | None = None,
    progress: Progress | None = None, callback: Callable[[StepRecord], None] | None = None, part: tuple[int, int] = WHOLE,
) -> TokenizeReport:
    """Make the token shards of a modality for every split; whole shards made by the same tokenizer are kept.

    Args:
        part: (i, n): the i-th of n jobs that share the shards out, counted from 0. Bytes do not depend on it.
    """
    progress = progress or (lambda what, done, total: None)
    tokenizer = tokenizer_for(dataset, modality, overrides, callback)
    spec, path = tokenizer.spec(), dataset.spec_path(modality)
    if path.is_file():
        before = read_spec(path)
        if before.same_ids_as(spec) or before.variants != spec.variants:
            raise DataError(
                f"{path} was written by another tokenizer: {before.same_ids_as(spec) or 'its options differ'}",
                f"delete {dataset.tokens(modality)} to tokenize again",
            )
    write_json(path, spec.model_dump(mode="json"))
    jobs, kept, samples, number = [], 0, 0, 0
    for split, count in dataset.info().splits.items():
        if not count:
            continue
        raws = shard_paths(dataset.raw(split))
        if not raws:
            raise ShardError(f"no raw shards in {dataset.raw(split)}", "run 'nano4m fetch' again")
        for raw in raws:
            number += 1
            if (number - 1) % part[1] != part[0]:
                continue
            target = dataset.tokens(modality, split) / raw.name
            n = len(read_index(raw).keys)
            samples += n
            if _fits(target, raw):
                kept += n
            else:
                jobs.append((raw, target, n))
    progress(modality, kept, samples)
    done = kept
    for n in _run_jobs(dataset.tokenizer(modality), modality, jobs, workers or usable_cores()):
        done += n
        progress(modality, done, samples)
    return TokenizeReport(modality, spec, done - kept, kept, samples)


def _fits(target: Path, raw: Path) -> bool:
    if not target.is_file() or not index_path(target).is_file():
        return False
    try:
        return read_index(target).keys == read_index(raw).keys
    except ShardError:
        return False


def _encode_shard(folder: Path, modality: str, raw: Path, target: Path) -> None:
    """Encode one shard; only the train split is varied, others repeat the one variant there is."""
    tokenizer, kind, shard = open_tokenizer(folder), MODALITIES.get(modality), Shard(raw)
    spec = tokenizer.spec()

    def samples():
        size = _batch(shard, kind)
        for start in range(0, len(shard), size):
            index = range(start, min(start + size, len(shard)))
            where = [f"{raw}, '{shard.keys[i]}', {kind.ext}" for i in index]
            values = [kind.from_bytes(shard.read(i, kind.ext), w) for i, w in zip(index, where, strict=True)]
            rows = [tokenizer.encode(values, where)]
            for k in range(1, spec.variants):
                draw = (generator(0, f"vary/{modality}/{shard.keys[i]}", k) for i in index)
                varied = [kind.vary(v, g) for v, g in zip(values, draw, strict=True)] if raw.parent.name == "train" else None
                rows.append(rows[0] if varied is None else tokenizer.encode(varied, where))
            for i, w, *ids in zip(index, where, *rows, strict=True):
                row = ids[0] if spec.kind == "sequence" else np.stack(ids)  # (variants, slots)
                spec.check_ids(row, w)
                yield shard.keys[i], {f"{modality}.npy": npy(row.astype(spec.dtype))}

    write_shard(target, samples())


def _batch(shard: Shard, kind: Modality) -> int:
    """Return how many raw values are encoded at once: fewer than BATCH where they are large, as the first one tells."""
    if not len(shard):
        return BATCH
    first = kind.from_bytes(shard.read(0, kind.ext), f"{shard.path}, '{shard.keys[0]}', {kind.ext}")
    return int(np.clip(BATCH_BYTES // max(getattr(first, "nbytes", 1), 1), 1, BATCH))


def _start_worker() -> None:
    """Start a worker process: one thread, and Ctrl-C left to the parent."""
    ignore_interrupts()
    torch.set_num_threads(1)


def _run_jobs(folder: Path, modality: str, jobs: list[tuple[Path, Path, int]], workers: int):
    """Yield the sample count of each shard as it is done. Bytes do not depend on the number of workers."""
    threads = torch.get_num_threads()
    if workers <= 1 or len(jobs) < 4:
        try:
            torch.set_num_threads(1)  # as the workers do: products of other shapes may round differently
            for raw, target, n in jobs:
                _encode_shard(folder, modality, raw, target)
                yield n
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_encode_shard, folder, modality, raw, target): n for raw, target, n in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fit_from_config(config: TokenizerRunConfig, dataset: DatasetFolder, run: Path, resume: bool, callback) -> Tokenizer:
    """Fit the tokenizer of a training config; one that is there is not replaced."""
    choice = config.tokenizer
    folder = dataset.tokenizer(choice.modality)
    if (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} holds a tokenizer already", f"delete it and {dataset.tokens(choice.modality)} first")
    tokenizer = make_tokenizer(dataset, choice.modality, choice.name, choice.options)
    if not tokenizer.fitted:
        raise ConfigError(
            f"tokenizer '{tokenizer.name}' comes as it is: nothing of it is trained",
            f"nano4m tokenize --modality {choice.modality} {choice.modality}.name={tokenizer.name}",
        )
    run.mkdir(parents=True, exist_ok=True)
    with atomic_file(run / "config.yaml") as file:
        file.write(dump_yaml(config).encode())
    fit_tokenizer(dataset, tokenizer, config.seed, config.train, callback, run, resume, config.data.train)
    return tokenizer


