"""Coordinate check: how activations grow with the width, step by step, with muP and without.

    python scripts/bench/mup_coordcheck.py [--widths 64 128 256 512] [--base 64] [--steps 5] [--lr 0.01] [--optimizer adamw]
                                           [--plot FILE.svg] [--json] [--quick]

Mean |x| of every block's output and of the logits, on one batch after 0, 1, ... steps on others of made-up tokens (`_widths.py`),
each width from the same seeds; its exponent in the width is printed (median, lowest and highest over seeds). With muP none grows
(Yang et al. 2022, arXiv:2203.03466, appendix D.1); logits are smaller at the start the wider the model (exponent -1/2) and lose
that as they are trained. `change` is the exponent of mean |x - x at the start|, which nothing hides that was large to begin with.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from _figures import figure, show
from _widths import KINDS, made_up, plot, slope, trainer

from nano4m_cli.data.workspace import Workspace

Sizes = dict[tuple[str, int, str], dict[int, float]]  # (block, step, "size" or "change") -> by width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--base", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="widths 32 to 128, one seed")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.base, args.seeds, args.steps = [32, 64, 128], 32, 1, 3
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {kind: [measure(made_up(Path(folder)), kind, args.widths, args.base, seed, args.steps, args.lr, args.optimizer)
                        for seed in range(args.seeds)] for kind in KINDS}
    figures = slopes(sizes)
    if args.plot:
        last = {kind: {block: sorted(w.items()) for (block, step, what), w in sizes[kind][0].items()
                       if step == args.steps and what == "size"} for kind in KINDS}
        plot(args.plot, last, "width", f"mean |x| after {args.steps} steps", True)
    if not args.json:
        figures = [f for f in figures if f["name"].endswith(("_t0", f"_t{args.steps}"))]
    show("mup_coordcheck", figures, args.json)


def measure(workspace: Workspace, kind: str, widths: Sequence[int], base: int, seed: int, steps: int, lr: float,
            optimizer: str = "adamw") -> Sizes:
    """Return mean |x| and mean |x - x at the start| of every block, after every step, at every width."""
    out: Sizes = {}
    for width in widths:
        t = trainer(workspace, kind, width, base, seed, [
            f"train.lr={lr}", f"train.muon_lr={lr}", f"train.optimizer={optimizer}", "train.schedule=constant", "train.warmup=0",
            "train.batch=16", "train.precision=fp32",
        ])  # fmt: skip
        start: dict[str, torch.Tensor] = {}
        for step in range(steps + 1):
            if step:
                t._one_step(t.task.batch(step))
            for block, x in activations(t).items():
                start.setdefault(block, x)
                out.setdefault((block, step, "size"), {})[width] = float(x.abs().mean())
                if step:
                    out.setdefault((block, step, "change"), {})[width] = float((x - start[block]).abs().mean())
    return out


@torch.no_grad()
def activations(t) -> dict[str, torch.Tensor]:
    """Return the outputs of all blocks, and the logits, on the first batch."""
    out, model = {}, t.model
    blocks = {f"{name}.{i}": block for name in ("encoder", "decoder") for i, block in enumerate(getattr(model, name))}
    hooks = [block.register_forward_hook(lambda m, a, y, name=name: out.__setitem__(name, y)) for name, block in blocks.items()]
    logits = model(t.task.batch(0)[0].packed)
    for hook in hooks:
        hook.remove()
    return {**out, "logits": torch.cat([x.flatten() for x in logits if x is not None])}


def slopes(sizes: dict[str, list[Sizes]]) -> list[dict]:
    """Return a figure for each block, step and measure: the exponent of the width, over seeds."""
    out = []
    for kind, seeds in sizes.items():
        for key in seeds[0]:
            values = [slope(list(s[key]), list(s[key].values())) for s in seeds]
            assert all(map(math.isfinite, values)), key
            block, step, what = key
            out.append(figure(f"{kind}_{block}_{what}_t{step}", values, "exponent"))
    return out


if __name__ == "__main__":
    main()
