"""What training would cost past these machines, and what would be lost: a model on paper, and two simulations.

    python scripts/bench/scaling.py [--json] [--quick]

Tables of docs/SCALING.md. Nothing is measured here: the constants below are stated, and a reader who has others sets them.

1. Cost: FLOPs of a step (forward x 3), time on so many GPUs from the peak and an assumed utilisation, bytes of a ring all-reduce
   against the part of the step it can hide behind, tokens and bytes per second that the loader must bring, size of a checkpoint
   and the time to write it.
2. Shards: `StreamOrder`, the one that training uses, over 10 million samples in shards of unequal size and 1,024 workers: samples
   per worker (balance), in two workers (overlap), in none (omission), over an epoch; and how many workers fetch a shard.
3. Failures: steps lost against the checkpoint interval, by simulation of failures at random moments, beside Young's and Daly's
   formulas for the best interval.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from _figures import document, figure

from nano4m_cli.data.stream_order import StreamOrder

# -- constants, stated ------------------------------------------------------------------------------------------------
PEAK = 790e12  # bf16 FLOP/s of one GPU in a large matrix product (an H200, measured)
UTILISATION = 0.40  # share of it that a training step reaches
LINK = 400e9 / 8 * 0.8  # bytes/s between nodes, per node: 400 Gbit/s at 80 %
NODE_LINK = 300e9  # bytes/s between GPUs of a node, in a ring
PER_NODE = 8  # GPUs
GPU_MEMORY = 141e9  # bytes
DISK = 2e9  # bytes/s to the shared file system, of the whole job
SHOWN, ASKED = 256, 256  # tokens per sample, input and target
VOCABULARY = 50_304  # of a target's own modality, at most
ID_BYTES = 2  # of a token on disk
TOKENS_PER_SAMPLE_ON_DISK = 1200  # all modalities of a sample are read, of which some are shown or asked
SIZES = {"100 M": (8, 512), "300 M": (14, 768), "1 B": (20, 1280), "3 B": (26, 1920)}  # layers of encoder and of decoder, width
GPUS = (1, 8, 64, 256)
SAMPLES_PER_GPU = 64  # of a step
MTBF = 30 * 86400.0  # seconds between failures of one node


def parameters(layers: int, width: int) -> float:
    """Return parameters of an encoder-decoder: 12 d^2 per encoder and 16 d^2 per decoder layer, and two tables of tokens."""
    return layers * (12 + 16) * width**2 + 2 * VOCABULARY * width


def forward_flops(layers: int, width: int, n: int = SHOWN, m: int = ASKED) -> float:
    """Return forward FLOPs of a sample of n input and m target tokens."""
    encoder = layers * (24 * width**2 * n + 4 * width * n**2)
    decoder = layers * (28 * width**2 * m + 4 * width**2 * n + 4 * width * m**2 + 4 * width * m * n)
    return encoder + 2 * width**2 * n + decoder + 2 * width * VOCABULARY * m


def cost(layers: int, width: int, gpus: int) -> dict[str, float]:
    """Return seconds of a step and its parts, and what it needs of loader, memory and disk."""
    count = parameters(layers, width)
    compute = 3 * forward_flops(layers, width) * SAMPLES_PER_GPU / (PEAK * UTILISATION)
    # A ring over N sends 2 (N - 1) / N of the gradients (fp32) through its slowest link.
    link = NODE_LINK if gpus <= PER_NODE else LINK
    reduce = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * 4 * count / link
    hidden = min(reduce, compute * 2 / 3)  # behind the backward pass, two thirds of the step
    step = compute + reduce - hidden
    samples = SAMPLES_PER_GPU * gpus / step
    state = 4 * count * 4  # weights, gradients, two moments, fp32
    saved = 3 * 4 * count  # weights and two moments
    return {
        "parameters": count, "step_s": step, "efficiency": compute / step, "samples_per_s": samples,
        "loader_MB_per_s": samples * TOKENS_PER_SAMPLE_ON_DISK * ID_BYTES / 1e6, "state_GB": state / 1e9,
        "state_GB_fsdp": state / gpus / 1e9, "checkpoint_GB": saved / 1e9, "save_s": saved / DISK,
        "exaflop_per_million_samples": 3 * forward_flops(layers, width) * 1e6 / 1e18,
    }


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
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    samples, workers, rounds = (100_000, 64, 2_000) if args.quick else (10_000_000, 1024, 20_000)
    figures, rows = [], []
    for name, (layers, width) in SIZES.items():
        for gpus in GPUS:
            c = cost(layers, width, gpus)
            kinds = ("samples_per_s", "loader_MB_per_s", "state_GB", "state_GB_fsdp", "checkpoint_GB", "save_s")
            rows.append([name, f"d{layers}-{layers}w{width}", c["parameters"] / 1e6, gpus, c["step_s"], f"{c['efficiency']:.0%}",
                         *(c[k] for k in kinds)])
            figures.append(figure(f"efficiency_{name.replace(' ', '')}_{gpus}", [c["efficiency"]], "of compute alone"))
    spread = assignment(samples, workers)
    figures += [figure(k, [v], "count") for k, v in spread.items()]
    losses = []
    for gpus, save in ((8, 5.0), (64, 10.0), (256, 20.0)):
        mtbf = MTBF / max(1, gpus // PER_NODE)
        best = daly(save, mtbf)
        found = {f: lost_share(f * best, save, 180.0, mtbf, rounds) for f in (0.1, 0.3, 1.0, 3.0, 10.0)}
        losses.append([gpus, mtbf / 3600, save, young(save, mtbf) / 60, best / 60, *(f"{v:.2%}" for v in found.values())])
        figures.append(figure(f"lost_share_{gpus}", [found[1.0]], "of time, at Daly's interval"))
    if args.json:
        document("scaling", figures)
        return
    table(["size", "layers, width", "M parameters", "GPUs", "s/step", "efficiency", "samples/s", "loader MB/s", "state GB",
           "state GB, FSDP", "checkpoint GB", "s to save"], rows)
    table(list(spread), [[int(v) if v == int(v) else v for v in spread.values()]])
    table(["GPUs", "h between failures", "s to save", "Young, min", "Daly, min", "lost at 0.1x", "0.3x", "1x", "3x", "10x"], losses)


if __name__ == "__main__":
    main()
