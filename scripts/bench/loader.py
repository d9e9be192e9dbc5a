"""Samples per second of one process from token shards to batches, mapped and streamed, and how long training waits for them.

    python scripts/bench/loader.py [--samples 8192] [--rounds 7] [--json] [--quick]

Five modalities and masks of the reference configuration (`_reference.py`). Mapped is what training does: sample order, ids,
masks, packed batch, all in `task.batch`; with batches of 64 (cfgs/5mod.yaml), and of 16. Stream reads the same tars in order with
webdataset, five at a time, decodes each npy itself (never by `.decode()`, which unpickles), and then draws masks and packs as
mapped does. Rates are per second of processor time of one process with one thread, so that what others do on the machine counts
less. `stall_share` is the part of a training loop's time (batch 16, fp32, two threads, no loader processes) that it waits for
its batches.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from _figures import figure, show
from _reference import SPECS, make_tokens, reference_config

from nano4m_cli.data.shards import shard_paths
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.model.batch import pack
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

SMALL = "model.size=d1-1w64"  # where only batches are made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds, and a narrow model")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.rounds = 1024, 2
    with tempfile.TemporaryDirectory() as folder:
        show("loader", run(Path(folder), args.samples, args.rounds, [SMALL] if args.quick else []), args.json)


def run(folder: Path, samples: int, rounds: int, settings: list[str]) -> list[dict]:
    """Return the figures; the ways of reading take turns, the first turn warms up."""
    torch.set_num_threads(1)
    workspace = make_tokens(folder, samples)
    tasks = {b: prepare(reference_config([SMALL, f"train.batch={b}"]), workspace).task for b in (16, 64)}
    batches = samples // 64
    ways: dict[str, Callable[[int], int]] = {
        "mapped_samples_per_s": lambda turn: mapped(tasks[64], turn * batches, batches),
        "mapped_batch16_samples_per_s": lambda turn: mapped(tasks[16], turn * batches, batches),
        "stream_samples_per_s": lambda turn: streamed(workspace.dataset(), tasks[64].mixture, samples),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = time.process_time()
            made = way(turn)
            if turn:
                rates[name].append(made / (time.process_time() - begin))
    return [*(figure(name, values, "samples/s") for name, values in rates.items()),
            figure("stall_share", stalls(workspace, settings, min(rounds, 5)), "of the loop's time")]


def mapped(task, first: int, batches: int) -> int:
    """Make so many of training's batches; return their samples."""
    return sum(part.packed.samples for step in range(first, first + batches) for part in task.batch(step))


def streamed(dataset: DatasetFolder, mixture: Mixture, samples: int, size: int = 64) -> int:
    """Make batches of `size` from the tars as they come; return how many samples they had."""
    done, rows = 0, zip(*(stream(dataset, spec) for spec in SPECS), strict=True)
    layout = Layout(SPECS)
    ids, length = np.zeros((size, layout.columns), np.int64), np.zeros((size, len(SPECS)), np.int64)
    for i, row in enumerate(rows):
        key = row[0][0]
        for m, (other, found) in enumerate(row):
            assert other == key, (other, key)
            at = layout.start[m]
            ids[i % size, at : at + len(found)], length[i % size, m] = found, len(found)
        if i % size == size - 1:
            shown, asked = mixture.draw(length, Key(0, "mask", np.arange(i + 1 - size, i + 1)))
            done += pack(layout, ids, shown, asked, 1).samples
        if i + 1 == samples:
            break
    return done


def stream(dataset: DatasetFolder, spec: TokenSpec) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, ids) of a modality's samples, tar by tar."""
    paths, member = [str(p) for p in shard_paths(dataset.tokens(spec.modality, "train"))], f"{spec.modality}.npy"
    for sample in wds.WebDataset(paths, shardshuffle=False, nodesplitter=None, empty_check=False):
        yield sample["__key__"], from_npy(sample[member], spec.dtype)


def from_npy(data: bytes, dtype: np.dtype) -> np.ndarray:
    """Return the ids of an npy file of version 1 and known dtype, flat; its header is compared, never evaluated."""
    start = b"{'descr': '%s', 'fortran_order': False" % dtype.str.encode()
    assert data[:8] == b"\x93NUMPY\x01\x00" and data[10 : 10 + len(start)] == start, data[:128]
    return np.frombuffer(data, dtype, offset=10 + int.from_bytes(data[8:10], "little"))


def stalls(workspace: Workspace, settings: list[str], steps: int) -> list[float]:
    """Return for each step of a training loop the share of its time before its batch was there."""
    torch.set_num_threads(2)
    config = reference_config(settings)
    trainer = Trainer(prepare(config, workspace).task, config.train, config.seed, None)
    out, loader, begin = [], trainer._loader(), time.perf_counter()
    for _ in range(steps + 1):
        parts = next(loader)
        there = time.perf_counter()
        trainer._one_step(parts)
        end = time.perf_counter()
        out.append((there - begin) / (end - begin))
        begin = end
    return out[1:]


if __name__ == "__main__":
    main()
