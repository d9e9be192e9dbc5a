"""Time of our training step against batch, width and depth, with the FLOPs that the formula gives beside it.

    python scripts/bench/step_cost.py [--rounds 5] [--threads 2] [--json] [--quick]

Modalities and masks of the reference configuration (`_reference.py`), fp32. One of batch, width and depth is changed at a time from
the middle one; all take turns. GFLOP are those of training (three times the forward's) on the samples of the step, so time follows
them where products dominate, and lies above them where a step is small. The time of a batch is its median, with lowest and highest.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _figures import figure, show
from _reference import make_tokens, reference_config, useful_flops

from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

MIDDLE = (16, 4, 256)  # batch, layers of encoder and of decoder, width
ROWS = [
    *((batch, *MIDDLE[1:]) for batch in (4, 8, 16, 32)),
    *((MIDDLE[0], MIDDLE[1], width) for width in (64, 128, 512)),
    *((MIDDLE[0], depth, MIDDLE[2]) for depth in (1, 2, 8)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two rounds of the small ones only")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [r for r in ROWS if r[0] <= 16 and r[1] <= 4 and r[2] <= 256] if args.quick else ROWS
    with tempfile.TemporaryDirectory() as folder:
        cost = run(Path(folder), rows, 2 if args.quick else args.rounds)
    if args.json:
        figures = [f for row, (tokens, work, seconds) in cost.items() for f in (
            figure(f"{name(row)}_step", seconds, "s"), figure(f"{name(row)}_work", work, "GFLOP"),
            figure(f"{name(row)}_tokens", tokens, "tokens"),
        )]
        show("step_cost", figures, True)
        return
    middle = cost[MIDDLE]
    heads = [f"{h:>7}" for h in ("GFLOP", "s", "lowest", "highest", "GFLOP/s")]
    print("batch layers width tokens", *heads, "  time and FLOPs over the middle's")
    for row, (tokens, work, seconds) in cost.items():
        s, w = statistics.median(seconds), statistics.median(work)
        print(f"{row[0]:5} {row[1]:>4}+{row[1]} {row[2]:5} {statistics.median(tokens):6.0f} {w:7.1f} {s:7.3f} {min(seconds):7.3f} "
              f"{max(seconds):7.3f} {w / s:7.1f}   {s / statistics.median(middle[2]):5.2f} {w / statistics.median(middle[1]):5.2f}")


def name(row: tuple[int, int, int]) -> str:
    return f"b{row[0]}_d{row[1]}w{row[2]}"


def run(folder: Path, rows: list[tuple[int, int, int]], rounds: int) -> dict[tuple, tuple[list, list, list]]:
    """Return for each row tokens, GFLOP and seconds of its steps, after one to warm up."""
    workspace, cost, trainers = make_tokens(folder, 512), {}, {}
    for row in rows:
        batch, depth, width = row
        config = reference_config([f"train.batch={batch}", f"model.size=d{depth}-{depth}w{width}"])
        trainers[row] = Trainer(prepare(config, workspace).task, config.train, config.seed, None)
        cost[row] = ([], [], [])
    for turn in range(rounds + 1):
        for row, trainer in trainers.items():
            parts = trainer.task.batch(turn)
            begin = time.perf_counter()
            trainer._one_step(parts)
            spent = time.perf_counter() - begin
            if turn:
                packed = parts[0].packed
                tokens = len(packed.dec_ids) + int((packed.enc_col >= 0).sum())
                work = 3 * useful_flops(trainer.task.layout, packed, row[2], row[1], row[1]) / 1e9
                for kept, value in zip(cost[row], (tokens, work, spent), strict=True):
                    kept.append(value)
    return cost


if __name__ == "__main__":
    main()
