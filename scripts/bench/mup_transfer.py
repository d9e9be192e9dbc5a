"""Which learning rate is best at which width, with muP and without: does the best rate of a narrow model serve a wide one?

    python scripts/bench/mup_transfer.py [--widths 32 64 128 256] [--base 32] [--rates R ...] [--steps 128] [--optimizer adamw]
                                         [--plot FILE.svg] [--json] [--quick]

Loss of training on made-up tokens (`_widths.py`), each sample seen at most once: mean over the last quarter of the steps and over
seeds, for every width and rate. The best rate is read off a parabola through the lowest point and its neighbours, over log rate and
loss; `drift` is the exponent with which it moves with the width (0: it transfers; plain AdamW: towards -1), lowest and highest over
seeds beside it. `transfer_loss` is what a width loses by taking the narrowest one's best rate instead of its own, in nats.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from _figures import figure, show
from _widths import KINDS, made_up, plot, slope, trainer

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import TrainingError

Losses = dict[tuple[int, float], float]  # (width, rate) -> nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--base", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**-n for n in range(10, 3, -1)])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: --rates are of both")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="two widths, four rates, 16 steps, one seed")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.rates, args.steps, args.seeds = [32, 64], args.rates[2:6], 16, 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        space = made_up(Path(folder))
        seeds = {kind: [measure(space, kind, args, seed) for seed in range(args.seeds)] for kind in KINDS}
    figures, tables = [], {}
    for kind in KINDS:
        tables[kind] = mean = {key: statistics.mean(s[key] for s in seeds[kind]) for key in seeds[kind][0]}
        drifts = [slope(args.widths, [best_rate(s, w) for w in args.widths]) for s in seeds[kind]]
        figures.append(figure(f"{kind}_drift", drifts, "exponent"))
        narrow = best_rate(mean, args.widths[0])
        nearest = min(args.rates, key=lambda r: abs(math.log(r / narrow)))
        for width in args.widths:
            figures.append(figure(f"{kind}_w{width}_best_rate", [best_rate(s, width) for s in seeds[kind]], "lr"))
            losses = {r: v for (w, r), v in mean.items() if w == width}
            figures.append(figure(f"{kind}_w{width}_transfer_loss", [losses[nearest] - min(losses.values())], "nats"))
            figures += [figure(f"{kind}_w{width}_lr{r:.3g}", [s[width, r] for s in seeds[kind]], "nats") for r in args.rates]
    if args.plot:
        panels = {kind: {f"width {w}": [(r, t[w, r]) for r in args.rates if math.isfinite(t[w, r])] for w in args.widths}
                  for kind, t in tables.items()}
        plot(args.plot, panels, "learning rate", "loss, nats", False)
    if args.json:
        show("mup_transfer", [f for f in figures if math.isfinite(f["high"])], True)
        return
    for kind, table in tables.items():
        print(f"{kind:12}" + "".join(f"{r:>9.2g}" for r in args.rates) + "   best rate")
        for width in args.widths:
            row = "".join(f"{table[width, r]:9.4f}" for r in args.rates)
            print(f"  width {width:4}{row}   {best_rate(table, width):.2g}")
    show("mup_transfer", [f for f in figures if "_lr" not in f["name"]], False)


def measure(workspace: Workspace, kind: str, args: argparse.Namespace, seed: int) -> Losses:
    """Return the loss of every width and rate (infinite where training was not finite)."""
    out = {}
    for width in args.widths:
        for rate in args.rates:
            t = trainer(workspace, kind, width, args.base, seed, [
                f"train.lr={rate}", f"train.muon_lr={rate}", f"train.optimizer={args.optimizer}", f"train.steps={args.steps}",
                f"train.warmup={args.steps // 8}", f"train.batch={args.batch}", "train.precision=fp32",
            ])  # fmt: skip
            try:
                losses = [t._one_step(t.task.batch(step))["loss"] for step in range(args.steps)]
                out[width, rate] = statistics.mean(losses[-max(1, args.steps // 4):])
            except TrainingError:
                out[width, rate] = math.inf
            print(f"{kind} width {width} seed {seed} lr {rate:g} loss {out[width, rate]:.4f}", file=sys.stderr, flush=True)
    return out


def best_rate(losses: Losses, width: int) -> float:
    """Return the rate at the lowest point of the parabola through the best measured one and its neighbours."""
    line = sorted((math.log(r), v) for (w, r), v in losses.items() if w == width)
    i = min(range(len(line)), key=lambda n: line[n][1])
    if not 0 < i < len(line) - 1 or not all(math.isfinite(v) for _, v in line[i - 1 : i + 2]):
        return math.exp(line[i][0])
    (a, fa), (b, fb), (c, fc) = line[i - 1 : i + 2]
    top = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    bottom = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    return math.exp(b - 0.5 * top / bottom) if bottom else math.exp(b)


if __name__ == "__main__":
    main()
