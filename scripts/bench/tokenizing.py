"""Samples per second of one core from raw shards to token shards, and which share of it the tokenizer takes.

    python scripts/bench/tokenizing.py [DATASET] [--samples 500] [--rounds 5] [--json]

Reading is a shard's bytes to raw values, encoding is the tokenizer alone, writing is ids to a shard on disk; the modalities take
turns. Medians over the rounds, with the lowest and highest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nano4m_cli.data.shards import npy, write_shard
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.tokenizers._base import open_tokenizer
from nano4m_cli.train.tokenizing import BATCH, read_raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = Workspace.at().dataset(args.dataset)
    made = [m for m in dataset.tokenised() if (dataset.tokenizer(m) / "tokenizer.json").is_file()]
    tokenizers = {m: open_tokenizer(dataset.tokenizer(m)) for m in made}
    total = dataset.info().splits["train"]
    seen: dict[str, list[tuple[float, float, float]]] = {m: [] for m in made}
    for turn in range(args.rounds + 1):  # the first warms up
        for m, tokenizer in tokenizers.items():
            times = one(dataset, m, tokenizer, [(turn * args.samples + i) % total for i in range(args.samples)])
            if turn:
                seen[m].append(times)
    figures = []
    for m, rows in seen.items():
        rates, shares = [args.samples / sum(r) for r in rows], [r[1] / sum(r) for r in rows]
        for name, unit, values in (("samples_per_s_per_core", "samples/s", rates), ("encode_share", "of the time", shares)):
            figures.append({"name": f"{m}_{name}", "value": statistics.median(values), "unit": unit, "low": min(values),
                            "high": max(values)})
    if args.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        print(json.dumps({"bench": "tokenizing", "machine": machine, "commit": commit, "figures": figures}))
        return
    print(f"{dataset.name}, one core\n{'modality':10} {'tokenizer':10} {'samples/s':>9} {'spread':>13}   read  encode  write")
    for m, rows in seen.items():
        rate = sorted(args.samples / sum(r) for r in rows)
        read, encode, write = (statistics.median(r[i] / sum(r) for r in rows) for i in range(3))
        print(f"{m:10} {tokenizers[m].name:10} {statistics.median(rate):9.0f} {rate[0]:6.0f}-{rate[-1]:<6.0f}   "
              f"{read:4.0%}   {encode:4.0%}  {write:4.0%}")


def one(dataset, modality: str, tokenizer, index: list[int]) -> tuple[float, float, float]:
    """Return the seconds that reading, encoding and writing of samples took."""
    a = time.perf_counter()
    raws = read_raw(dataset, "train", modality, index)
    b = time.perf_counter()
    ids = [i for at in range(0, len(raws), BATCH) for i in tokenizer.encode(raws[at : at + BATCH])]
    c = time.perf_counter()
    dtype = tokenizer.spec().dtype
    with tempfile.TemporaryDirectory() as folder:
        rows = ((f"s-{n:06d}", {f"{modality}.npy": npy(np.asarray(row).astype(dtype))}) for n, row in enumerate(ids))
        write_shard(Path(folder) / "shard-000000.tar", rows)
        d = time.perf_counter()
    return b - a, c - b, d - c


if __name__ == "__main__":
    main()
