"""What training would cost past these machines, and what would be lost: a model on paper, and two simulations.

    python scripts/bench/constants.py --json > constants.json; python scripts/bench/ddp.py --json > ddp.json
    python scripts/bench/scaling.py [--constants constants.json] [--check ddp.json ...] [--json] [--quick]

Tables of docs/SCALING.md. `Plan` has the constants: those of GPUs, network and disk are stated; those of our own code (bytes of a
checkpoint, hashing, making batches, starting) are of `constants.py`, by default as docs/RESULTS.md has them.

1. Cost: FLOPs of a step (forward x 3) and the update of the weights, time on so many GPUs, bytes of a ring all-reduce against the
   part of the step it can hide behind, tokens and bytes per second that the loader must bring and the processes that takes, size of
   a checkpoint and the time to write and to read it.
2. Check: the same arithmetic with all constants of this machine, for two processes on it, against what ddp.py measured.
3. Shards: `StreamOrder`, the one that training uses, over 10 million samples in shards of unequal size and 1,024 workers: samples
   per worker (balance), in two workers (overlap), in none (omission), over an epoch; and how many workers fetch a shard.
4. Failures: steps lost against the checkpoint interval, by simulation of failures at random moments, beside Young's and Daly's
   formulas for the best interval.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _figures import document, figure

from nano4m_cli.data.stream_order import StreamOrder


@dataclass(frozen=True)
class Plan:
    """What the arithmetic rests on."""

    # Stated: what a site has.
    peak: float = 790e12  # bf16 FLOP/s of one GPU in a large matrix product (an H200)
    share: float = 0.40  # of it that a training step reaches
    link: float = 400e9 / 8 * 0.8  # bytes/s between nodes, per node: 400 Gbit/s at 80 %
    node_link: float = 300e9  # bytes/s between GPUs of a node, in a ring
    per_node: int = 8  # GPUs
    memory_rate: float = 4e12  # bytes/s of a GPU's memory, of which an update moves some 30 a parameter
    disk: float = 2e9  # bytes/s to the shared file system, of the whole job
    mtbf: float = 30 * 86400.0  # seconds between failures of one node
    hidden: float = 2 / 3  # share of a step behind which gradients can travel: the backward pass
    # Measured: what our code does with it (constants.py).
    bytes_per_parameter: float = 12.0
    hash: float = 1.6e9  # bytes/s of sha256, a process
    load: float = 1.12e9  # bytes/s of reading, hashing, filling in, a process
    batches: float = 13_400.0  # samples/s that one loader process makes ready
    start: float = 2.0  # seconds to the first step, beside reading a checkpoint

    @property
    def update(self) -> float:
        """Seconds a parameter of clipping and optimizer."""
        return 30 / self.memory_rate


SHOWN, ASKED = 256, 256  # tokens per sample, input and target
VOCABULARY = 50_304  # of a target's own modality, at most
ID_BYTES = 2  # of a token on disk
TOKENS_PER_SAMPLE_ON_DISK = 1200  # all modalities of a sample are read, of which some are shown or asked
SIZES = {"100 M": (8, 512), "300 M": (14, 768), "1 B": (20, 1280), "3 B": (26, 1920)}  # layers of encoder and of decoder, width
GPUS = (1, 8, 64, 256)
SAMPLES_PER_GPU = 64  # of a step


def parameters(layers: int, width: int) -> float:
    """Return parameters of an encoder-decoder: 12 d^2 per encoder and 16 d^2 per decoder layer, and two tables of tokens."""
    return layers * (12 + 16) * width**2 + 2 * VOCABULARY * width


def forward_flops(layers: int, width: int, n: int = SHOWN, m: int = ASKED) -> float:
    """Return forward FLOPs of a sample of n input and m target tokens."""
    encoder = layers * (24 * width**2 * n + 4 * width * n**2)
    decoder = layers * (28 * width**2 * m + 4 * width**2 * n + 4 * width * m**2 + 4 * width * m * n)
    return encoder + 2 * width**2 * n + decoder + 2 * width * VOCABULARY * m


def together(alone: float, count: float, ranks: int, link: float, hidden: float, latency: float = 0.0) -> float:
    """Return seconds of a step of several ranks that takes one of them `alone`: gradients of `count` fp32 parameters go round a
    ring, 2 (N - 1) / N of them through its slowest link, and what does not hide behind the backward pass comes on top."""
    reduce = 0.0 if ranks == 1 else latency + 2 * (ranks - 1) / ranks * 4 * count / link
    return alone + max(0.0, reduce - hidden * alone)


def cost(layers: int, width: int, gpus: int, plan: Plan = Plan()) -> dict[str, float]:
    """Return seconds of a step, and what it needs of loader, memory and disk."""
    count = parameters(layers, width)
    alone = 3 * forward_flops(layers, width) * SAMPLES_PER_GPU / (plan.peak * plan.share) + plan.update * count
    step = together(alone, count, gpus, plan.node_link if gpus <= plan.per_node else plan.link, plan.hidden)
    samples, state, saved = SAMPLES_PER_GPU * gpus / step, 4 * 4 * count, plan.bytes_per_parameter * count
    return {
        "parameters": count, "step_s": step, "efficiency": alone / step, "samples_per_s": samples,
        "loader_MB_per_s": samples * TOKENS_PER_SAMPLE_ON_DISK * ID_BYTES / 1e6, "loaders_per_GPU": samples / gpus / plan.batches,
        "state_GB": state / 1e9, "state_GB_fsdp": state / gpus / 1e9, "checkpoint_GB": saved / 1e9,
        "save_s": saved / plan.disk + saved / plan.hash, "save_s_fsdp": saved / plan.disk + saved / gpus / plan.hash,
        # Going on: every rank reads all of a checkpoint that is whole (each node once, from the disk), or its own rows of shards.
        "restart_s": plan.start + max(saved / plan.load, saved * math.ceil(gpus / plan.per_node) / plan.disk),
        "restart_s_fsdp": plan.start + max(saved / gpus / plan.load, saved / plan.disk),
    }


def checks(constants: dict[str, float], files: list[Path]) -> list[list]:
    """Return for each document of ddp.py what two processes keep of their speed: by the arithmetic, with all gradients hidden that
    can be and with none, and as measured (median, lowest, highest)."""
    rows = []
    for file in files:
        found = {f["name"]: f for f in json.loads(file.read_text())["figures"]}
        value = {k: f["value"] for k, f in found.items()}
        alone, count = value["seconds_side_by_side"], value["parameters"]
        told = [alone / together(alone, count, 2, constants["reduce_bytes_per_s"], h, constants["reduce_s"]) for h in (2 / 3, 0.0)]
        share = next(v for k, v in constants.items() if k.startswith("share_w"))  # of whole steps, at ddp.py's width
        by_flops = value["flops"] / (share * constants["gemm_flops"])
        kept = found["kept"]
        rows.append([file.stem, count / 1e6, by_flops, value["seconds_one"], *told, kept["value"], kept["low"], kept["high"]])
    return rows


def assignment(samples: int, workers: int, seed: int = 0) -> dict[str, float]:
    """Return balance, overlap and omission of one epoch of a stream over so many workers."""
    rng = np.random.default_rng(seed)
    mean = max(1, samples // (workers * 8))
    sizes = rng.integers(max(1, mean // 2), mean + mean // 2 + 1, size=workers * 8)
    sizes[-1] += max(0, samples - int(sizes.sum()))
    while int(sizes.sum()) > samples:  # to the sample
        sizes[int(np.argmax(sizes))] -= min(int(sizes.sum()) - samples, int(sizes.max()) - 1)
    order = StreamOrder(sizes, seed, workers, workers)
    seen = np.zeros(samples, dtype=np.int32)
    taken, shards = np.zeros(workers, dtype=np.int64), np.zeros(len(sizes), dtype=np.int64)
    for worker in range(workers):
        start, end = int(order.bounds[worker]), int(order.bounds[worker + 1])
        found = order.at(np.arange(end - start) * workers + worker)
        seen[found] += 1
        taken[worker] = len(found)
        shards[np.unique(np.searchsorted(order.first, found, side="right") - 1)] += 1
    return {
        "samples": float(samples), "workers": float(workers), "shards": float(len(sizes)), "fewest": float(taken.min()),
        "most": float(taken.max()), "in_two_workers": float((seen > 1).sum()), "in_none": float((seen == 0).sum()),
        "fetched_per_shard": float(shards.mean()),
    }


def lost_share(interval: float, save: float, restart: float, mtbf: float, rounds: int, seed: int = 0) -> float:
    """Return the share of time that is not progress, by simulation: saving, work since the last checkpoint, starting again."""
    rng = np.random.default_rng(seed)
    useful = spent = 0.0
    for gap in rng.exponential(mtbf, rounds):  # from a start to the failure
        whole = int(max(gap - restart, 0.0) // (interval + save))
        useful += whole * interval
        spent += gap
    return 1 - useful / spent


def young(save: float, mtbf: float) -> float:
    """Return the best seconds between checkpoints (Young 1974)."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """Return the best seconds between checkpoints to higher order (Daly 2006), for save < 2 mtbf."""
    x = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save if save < 2 * mtbf else mtbf


def table(head: list[str], rows: list[list]) -> None:
    shown = lambda c: str(c) if not isinstance(c, float) else f"{c:,.0f}" if c >= 100 else f"{c:.3g}"  # noqa: E731
    text = [[shown(c) for c in row] for row in rows]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in text:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constants", type=Path, metavar="FILE", help="what constants.py --json wrote")
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="FILE", help="what ddp.py --json wrote, same machine")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    samples, workers, rounds = (100_000, 64, 2_000) if args.quick else (10_000_000, 1024, 20_000)
    plan, measured = Plan(), {}
    if args.check and not args.constants:
        parser.error("--check needs the same machine's --constants")
    if args.constants:
        measured = {f["name"]: f["value"] for f in json.loads(args.constants.read_text())["figures"]}
        plan = replace(plan, bytes_per_parameter=measured["bytes_per_parameter"], hash=measured["hash_bytes_per_s"],
                       load=measured["load_bytes_per_s"], batches=measured["batch_samples_per_s"], start=measured["start_s"])
    figures, rows = [], []
    for name, (layers, width) in SIZES.items():
        for gpus in GPUS:
            c = cost(layers, width, gpus, plan)
            kinds = ("samples_per_s", "loader_MB_per_s", "loaders_per_GPU", "state_GB", "state_GB_fsdp", "checkpoint_GB", "save_s",
                     "save_s_fsdp", "restart_s", "restart_s_fsdp")
            rows.append([name, f"d{layers}-{layers}w{width}", c["parameters"] / 1e6, gpus, c["step_s"], f"{c['efficiency']:.0%}",
                         *(c[k] for k in kinds)])
            figures.append(figure(f"efficiency_{name.replace(' ', '')}_{gpus}", [c["efficiency"]], "of compute alone"))
    spread = assignment(samples, workers)
    figures += [figure(k, [v], "count") for k, v in spread.items()]
    losses = []
    for size, gpus in (("100 M", 8), ("1 B", 64), ("3 B", 256)):
        c = cost(*SIZES[size], gpus, plan)
        mtbf, save = plan.mtbf / max(1, gpus // plan.per_node), c["save_s_fsdp"]
        best = daly(save, mtbf)
        found = {f: lost_share(f * best, save, c["restart_s_fsdp"], mtbf, rounds) for f in (0.1, 0.3, 1.0, 3.0, 10.0)}
        shares = (f"{v:.2%}" for v in found.values())
        losses.append([size, gpus, mtbf / 3600, save, c["restart_s_fsdp"], young(save, mtbf) / 60, best / 60, *shares])
        figures.append(figure(f"lost_share_{gpus}", [found[1.0]], "of time, at Daly's interval"))
    if args.json:
        document("scaling", figures)
        return
    table(["size", "layers, width", "M parameters", "GPUs", "s/step", "efficiency", "samples/s", "loader MB/s", "loaders a GPU",
           "state GB", "state GB, FSDP", "checkpoint GB", "s to save", "s, sharded", "s to start again",
           "s, sharded"], rows)
    if args.check:
        heads = ["run", "M parameters", "s/step by FLOPs", "measured", "kept, all hidden", "none hidden", "measured",
                 "lowest", "highest"]
        table(heads, checks(measured, args.check))
    table(list(spread), [[int(v) if v == int(v) else v for v in spread.values()]])
    table(["size", "GPUs", "h between failures", "s to save", "s to start again", "Young, min", "Daly, min", "lost at 0.1x", "0.3x",
           "1x", "3x", "10x"], losses)


if __name__ == "__main__":
    main()
