"""Loss over parameters and tokens: small models of several widths, trained on `scenes` for several lengths, and a law of them.

    python scripts/bench/scaling_law.py [--widths 32 64 128] [--steps 160 320 640 1280] [--seeds 1] [--keep FILE] [--json] [--quick]

Every run is the demo's recipe (cfgs/demo.yaml) planned for its own number of steps, its rates carried to other widths by muP
(model.mup_base). Loss is that of `speedrun.py`'s fixed questions of the val split, both halves. N counts the parameters of blocks
(tables and heads apart), D the tokens that encoder and decoder read.

Fitted is L = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556, approach 3) by least squares: exponents on a grid, the
rest linear and not negative. Intervals are of 95 %, by residuals of the fit drawn anew 200 times; with few runs of a narrow range
they are wide, and what they say of larger models is an extrapolation. How far to trust one: `ahead_WIDTH` is the loss that a fit
without the longest runs foretells for them, less what they had (low and high: over the same redrawn residuals).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from _figures import document
from speedrun import DEMO, questions

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.rng import generator
from nano4m_cli.train.config import load_run_config
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

BASE = 64
GRID = np.linspace(0.05, 1.5, 59)
DRAWS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[160, 320, 640, 1280])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="JSON lines of finished runs: written, and read instead of running again")
    parser.add_argument("--quick", action="store_true", help="two widths, three lengths of few steps: that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.widths, args.steps = [32, 64], [2, 4, 8]
    done = {}
    for line in args.keep.read_text().splitlines() if args.keep and args.keep.exists() else []:
        key, run = json.loads(line)
        done[tuple(key)] = run
    for seed in range(args.seeds):
        for width in args.widths:
            for steps in args.steps:
                key = (width, steps, seed)
                if key in done:
                    continue
                done[key] = run = train(width, steps, seed)
                print(f"width {width:4} steps {steps:5} seed {seed} N {run[0]:9} D {run[1]:9} loss {run[2]:.4f}",
                      file=sys.stderr, flush=True)
                if args.keep:
                    with open(args.keep, "a") as file:
                        file.write(json.dumps([key, run]) + "\n")
    chosen = [(w, s, seed) for w in args.widths for s in args.steps for seed in range(args.seeds)]
    n, d, loss = (np.array(column, dtype=np.float64) for column in zip(*(done[k] for k in chosen), strict=True))
    found = with_intervals(n, d, loss)
    if len(args.steps) > 3:
        found |= ahead(n, d, loss, args.widths)
    if args.json:
        document("scaling_law", [{"name": k, "value": v, "unit": "nats" if k in ("E", "residual") else "", "low": low, "high": high}
                                 for k, (v, low, high) in found.items()])
        return
    for name, (value, low, high) in found.items():
        print(f"{name:10} {value:10.4g} {low:10.4g} .. {high:.4g}")


def train(width: int, steps: int, seed: int) -> tuple[int, int, float]:
    """Return (parameters of blocks, tokens read, loss) of one planned run."""
    config = load_run_config(DEMO, [
        f"model.size=d4-2w{width}", f"model.mup_base={BASE}", f"seed={seed}", "name=scaling", f"train.steps={steps}",
        f"train.warmup={min(50, max(1, steps // 8))}",
    ])  # fmt: skip
    trainer = Trainer(prepare(config, Workspace.at()).task, config.train, seed, None)
    tokens = 0
    for step in range(steps):
        parts = trainer.task.batch(step)
        trainer._one_step(parts)
        tokens += sum(len(p.packed.dec_ids) + int((p.packed.enc_col >= 0).sum()) for p in parts)
    inner = sum(p.numel() for name, p in trainer.model.named_parameters() if name.split(".")[0] in ("encoder", "decoder"))
    return inner, tokens, float(np.mean(questions(trainer)))


class Law:
    """The law at given sizes and tokens, ready to be fitted to losses: one linear problem for every pair of exponents.

    Columns are scaled to the largest run, so that coefficients are of one size.
    """

    def __init__(self, n: np.ndarray, d: np.ndarray):
        self.n, self.d = n.max(), d.max()
        self.a_G, self.b_G = (x.ravel() for x in np.meshgrid(GRID, GRID))
        ones = np.ones((len(self.a_G), len(n)))
        self.x_GR3 = np.stack([ones, (n / self.n) ** -self.a_G[:, None], (d / self.d) ** -self.b_G[:, None]], -1)
        self.inverse_G3R = np.linalg.pinv(self.x_GR3)

    def fit(self, loss_R: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Return ({E, A, a, B, b}, the fitted losses (R,)) of least squares among coefficients that are not negative."""
        c_G3 = self.inverse_G3R @ loss_R
        told_GR = (self.x_GR3 @ c_G3[..., None])[..., 0]
        error_G = np.where((c_G3 >= 0).all(-1), ((told_GR - loss_R) ** 2).sum(-1), np.inf)
        g = int(error_G.argmin())
        if error_G[g] == np.inf:
            sys.exit("no exponents give coefficients that are not negative: more runs, or of a wider range")
        (e, a, b), p, q = c_G3[g], self.a_G[g], self.b_G[g]
        return {"E": float(e), "A": float(a * self.n**p), "a": float(p), "B": float(b * self.d**q), "b": float(q)}, told_GR[g]


def fits(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[dict[str, float], np.ndarray, list[dict[str, float]]]:
    """Return the fit, its residuals, and fits of losses whose residuals are drawn anew."""
    law = Law(n, d)
    own, told = law.fit(loss)
    left, draw = loss - told, generator(0, "scaling-law")
    return own, left, [law.fit(told + draw.choice(left, len(left)))[0] for _ in range(DRAWS)]


def ahead(n: np.ndarray, d: np.ndarray, loss: np.ndarray, widths: list[int]) -> dict[str, tuple[float, float, float]]:
    """Return what a fit without the longest runs foretells for each of them, less its loss: (value, low, high) of each width."""
    last = d > d.max() * 0.99
    own, _, again = fits(n[~last], d[~last], loss[~last])

    def off(f: dict[str, float], size: float) -> float:
        told = f["E"] + f["A"] / n ** f["a"] + f["B"] / d ** f["b"]
        return float(np.mean((told - loss)[last & (n == size)]))

    out = {}
    for width, size in zip(widths, dict.fromkeys(n.tolist()), strict=True):
        low, high = np.quantile([off(f, size) for f in again], [0.025, 0.975])
        out[f"ahead_{width}"] = off(own, size), float(low), float(high)
    return out


def with_intervals(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Return {name: (value, low, high)} of the fit, and its residual (root of the mean square)."""
    own, left, again = fits(n, d, loss)
    out = {k: (v, *map(float, np.quantile([f[k] for f in again], [0.025, 0.975]))) for k, v in own.items()}
    residual = float(np.sqrt((left**2).mean()))
    return {**out, "residual": (residual, residual, residual)}


if __name__ == "__main__":
    main()
