"""Time of a training step in fp32 and under bf16 autocast, over widths, on a CPU that multiplies bf16.

    python scripts/bench/precision.py [--widths 64 128 256 512] [--rounds 5] [--threads 2] [--json] [--quick]

Modalities and masks of the reference configuration (`_reference.py`), 2+2 layers, batch 16; both take turns on each batch.
`wN_bf16_speedup` is the median of the rounds' ratios, fp32 over bf16: `compute.BF16_WIDTH` is the width from which "auto" takes
bf16.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _figures import figure, show
from _reference import make_tokens, reference_config

from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

KINDS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two rounds of the narrowest")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.widths, args.rounds = args.widths[:1], 2
    with tempfile.TemporaryDirectory() as folder:
        show("precision", run(Path(folder), args.widths, args.rounds), args.json)


def run(folder: Path, widths: list[int], rounds: int) -> list[dict]:
    workspace, figures = make_tokens(folder, 512), []
    for width in widths:
        trainers, seconds = {}, {k: [] for k in KINDS}
        for kind in KINDS:
            config = reference_config([f"model.size=d2-2w{width}", f"train.precision={kind}"])
            trainers[kind] = Trainer(prepare(config, workspace).task, config.train, config.seed, None)
        for turn in range(rounds + 1):
            parts = trainers["fp32"].task.batch(turn)
            for kind, trainer in trainers.items():
                begin = time.perf_counter()
                trainer._one_step(parts)
                if turn:
                    seconds[kind].append(time.perf_counter() - begin)
        figures.append(figure(f"w{width}_bf16_speedup", [a / b for a, b in zip(*(seconds[k] for k in KINDS), strict=True)], "x"))
        figures += [figure(f"w{width}_{kind}", seconds[kind], "s") for kind in KINDS]
    return figures


if __name__ == "__main__":
    main()
