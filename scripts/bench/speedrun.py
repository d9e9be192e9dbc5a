"""Tokens and seconds that recipes need to a fixed validation loss on `scenes`.

    python scripts/bench/speedrun.py [--recipes NAME ...] [--steps 256] [--seeds 3] [--rates R ...] [--target LOSS]
                                    [--keep FILE] [--json] [--quick]

A recipe is a base and options, "course+muon+rope" (OPTIONS below). `course` is the demo's data and size with AdamW, GELU,
LayerNorm, sincos, any-to-any masks of alpha 1 and equal loss weights, at the best of `--rates` by its own loss here; what stands
with muon keeps the demo's rates, which were chosen before. `demo` is cfgs/demo.yaml.

All are asked the same fixed questions of the val split, whatever they were trained on. Half of the loss is any-to-any, masks of
alpha 1: what `course` trains on. The other half is a whole modality from another whole one, all pairs alike: what models are used
for. Each half is the mean over modalities of nats per token. One half alone would choose the winner among masks; both are printed.

A run is planned for so many steps and its schedule ends there; what it has on the way does not count. `course` gets `--steps` (of
the demo's batch: a smaller batch makes more steps of as many samples), and the target is the worst loss of its seeds there (or
`--target`). Another recipe gets half of the steps, then again half as long as it reaches the target, or all of them; tokens to the
target are read between the two runs around it, on a line over the logarithm of tokens. Tokens are all that encoder and decoder read
(registers aside); seconds are of the CPU, all threads, in training steps alone. Ratios are of runs of one seed: geometric mean with
the 95 % interval of t over seeds. The best recipe is chosen by the same seeds that measure it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _figures import document
from _reference import ROOT

from nano4m_cli.config import load_yaml
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.model.batch import pack
from nano4m_cli.train.config import load_run_config
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

DEMO = ROOT / "cfgs" / "demo.yaml"
ANY = {"type": "dirichlet", "alpha": 1.0, "input": [4, 40], "target": [4, 24]}
ONE = {"type": "directed", "known": 0.0}
COURSE = [f"masking.components={json.dumps([ANY])}", "loss_weights={}", "model.qk_norm=false", "train.optimizer=adamw",
          "train.ema=0"]
OPTIONS = {
    "muon": ["train.optimizer=muon"], "ema": ["train.ema=0.99"], "wsd": ["train.schedule=wsd"],
    "swiglu": ["model.mlp=swiglu"], "rmsnorm": ["model.norm=rmsnorm"], "qk_norm": ["model.qk_norm=true"],
    "rope": ["model.positions=rope"], "fourier": ["model.positions=fourier"], "learned": ["model.positions=learned"],
    "zero": ["model.init=zero"], "gpt2": ["model.init=gpt2"], "xavier": ["model.init=xavier"],
    "batch32": ["train.batch=32"], "hot": ["train.muon_lr=0.024"],
    "masks": [f"masking.components={json.dumps(load_yaml(DEMO)['masking']['components'])}"],
}  # fmt: skip
RECIPES = ["course+muon", "course+muon+ema", "course+muon+swiglu", "course+muon+rmsnorm", "course+muon+qk_norm",
           "course+muon+rope", "demo"]  # fmt: skip
RATES = [2e-3, 4e-3, 8e-3, 1.6e-2]
SMALLEST = 1 / 16  # of the steps: shorter runs are not tried
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # two-sided, by degrees of freedom


@dataclass(frozen=True)
class Run:
    """What a planned run cost, and its losses: of both halves, and of each."""

    tokens: int
    seconds: float
    loss: float
    any: float
    one: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="AdamW's, searched for the course recipe")
    parser.add_argument("--target", type=float)
    parser.add_argument("--keep", type=Path, help="JSON lines of finished runs: written, and read instead of running again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two recipes, two seeds, 32 steps")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.recipes, args.steps, args.seeds, args.rates = ["course+muon", "demo"], 32, 2, args.rates[-2:]
    race = Race(Workspace.at(), args.steps, args.keep)
    rate = race.best_rate(args.rates)
    target = args.target or max(race.run("course", seed, 1.0, rate).loss for seed in range(args.seeds))
    end = "; the best rate is at an end of --rates" if rate in (min(args.rates), max(args.rates)) and len(args.rates) > 1 else ""
    print(f"course at lr {rate:g}; target {target:.4f} nats{end}", file=sys.stderr, flush=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for name in ["course", *args.recipes]:
        lr = rate if name.startswith("course") and "muon" not in name else None
        found[name] = [reach(lambda f, n=name, s=seed, r=lr: race.run(n, s, f, r), target, 1.0 if name == "course" else 0.5)
                       for seed in range(args.seeds)]
    report(found, target, args.json)


class Race:
    """Trains recipes, each planned run once; `keep` is a file that outlives the process."""

    def __init__(self, workspace: Workspace, steps: int, keep: Path | None = None):
        self.workspace, self.steps, self.keep = workspace, steps, keep
        self.runs: dict[tuple, Run] = {}
        for line in keep.read_text().splitlines() if keep and keep.exists() else []:
            key, run = json.loads(line)
            self.runs[tuple(key)] = Run(**run)

    def best_rate(self, rates: Sequence[float]) -> float:
        """Return the rate at which the course recipe ends lowest (seed 0)."""
        return min(rates, key=lambda rate: self.run("course", 0, 1.0, rate).loss)

    def run(self, recipe: str, seed: int, share: float, rate: float | None) -> Run:
        """Return the run planned for a share of the steps."""
        steps = max(2, round(self.steps * share))
        key = (recipe, seed, steps, rate)
        if key not in self.runs:
            done = self.runs[key] = self._train(recipe, seed, steps, rate)
            what = f"{recipe:24} seed {seed} steps {steps:4} {'' if rate is None else f'lr {rate:g} '}"
            print(f"{what}tokens {done.tokens:8} seconds {done.seconds:6.1f} loss {done.loss:.4f} (any {done.any:.4f}, "
                  f"one {done.one:.4f})", file=sys.stderr, flush=True)
            if self.keep:
                with open(self.keep, "a") as file:
                    file.write(json.dumps([key, asdict(done)]) + "\n")
        return self.runs[key]

    def _train(self, recipe: str, seed: int, steps: int, rate: float | None) -> Run:
        chosen = [*settings(recipe), f"seed={seed}", "name=speedrun", *([] if rate is None else [f"train.lr={rate}"])]
        steps = steps * load_run_config(DEMO, []).train.batch // load_run_config(DEMO, chosen).train.batch
        config = load_run_config(DEMO, [*chosen, f"train.steps={steps}", f"train.warmup={min(50, steps // 8)}"])
        trainer = Trainer(prepare(config, self.workspace).task, config.train, seed, None)
        tokens, seconds = 0, 0.0
        for step in range(steps):
            begin = time.process_time()
            parts = trainer.task.batch(step)
            trainer._one_step(parts)
            seconds += time.process_time() - begin
            tokens += sum(len(p.packed.dec_ids) + int((p.packed.enc_col >= 0).sum()) for p in parts)
        halves = questions(trainer)
        return Run(tokens, seconds, statistics.mean(halves), *halves)


def settings(recipe: str) -> list[str]:
    """Return the overrides of the demo's config that a name like "course+muon" stands for."""
    base, *options = recipe.split("+")
    unknown = [o for o in options if o not in OPTIONS] + ([] if base in ("course", "demo") else [base])
    if unknown:
        sys.exit(f"unknown recipe '{recipe}': {', '.join(unknown)}; course or demo, then any of {', '.join(OPTIONS)}")
    return [*(COURSE if base == "course" else []), *(s for o in options for s in OPTIONS[o])]


@torch.no_grad()
def questions(trainer: Trainer) -> list[float]:
    """Return the loss of both halves of the fixed questions: mean over modalities of nats per token."""
    task, out = trainer.task, []
    index = np.arange(min(400, len(task.val)))
    ids, length = task.val.read(index)
    trainer.model.eval()
    for name, component in (("any", ANY), ("one", ONE)):
        shown, asked = Mixture(MaskingConfig(components=[component]), task.layout).draw(length, Key(0, f"speedrun/{name}", index))
        total = count = 0
        with trainer.averaged():
            for rows in np.array_split(index, -(-len(index) // 100)):
                batch = pack(task.layout, ids[rows], shown[rows], asked[rows], task.model.config.registers)
                sums = task.model.modality_sums(batch)
                total, count = total + sums[0], count + sums[1]
        out.append(float((total / count)[count > 0].mean()))
    return out


def reach(run: Callable[[float], Run], target: float, share: float) -> tuple[float, float]:
    """Return (tokens, seconds) at which a recipe reaches the target; infinite where all of the steps do not.

    run: share of the steps -> Run. Shares are halved or doubled from `share` until two neighbours lie around the target.
    """
    here = run(share)
    while here.loss > target:
        if share >= 1:
            return math.inf, math.inf
        share *= 2
        here = run(share)
    while share > SMALLEST:
        share /= 2
        below = run(share)
        if below.loss > target:
            at = (below.loss - target) / (below.loss - here.loss)
            return below.tokens * (here.tokens / below.tokens) ** at, below.seconds * (here.seconds / below.seconds) ** at
        here = below
    return float(here.tokens), here.seconds


def ratio(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios with the ends of its 95 % interval (of t; 0 and infinity for one ratio)."""
    if not all(0 < v < math.inf for v in values):
        return 0.0, 0.0, 0.0
    logs = [math.log(v) for v in values]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = T95.get(len(logs) - 1, 2.0) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def report(found: dict[str, list[tuple[float, float]]], target: float, as_json: bool) -> None:
    rows = []
    for name, seeds in found.items():
        ratios = [ratio([c[i] / s[i] for c, s in zip(found["course"], seeds, strict=True)]) for i in range(2)]
        rows.append((name, [s[0] for s in seeds], [s[1] for s in seeds], *ratios))
    best = max(rows[1:], key=lambda row: row[3][0], default=rows[0])
    if as_json:
        figures = [{"name": "target", "value": target, "unit": "nats", "low": target, "high": target},
                   {"name": "tokens_ratio", "value": best[3][0], "unit": f"x ({best[0]})", "low": best[3][1], "high": best[3][2]}]
        for name, tokens, seconds, of_tokens, of_seconds in rows:
            for what, values, unit in (("tokens", tokens, "tokens"), ("seconds", seconds, "s")):
                if max(values) < math.inf:
                    figures.append({"name": f"{name}_{what}", "value": statistics.mean(values), "unit": unit,
                                    "low": min(values), "high": max(values)})
            for what, (value, low, high) in (("tokens", of_tokens), ("seconds", of_seconds)):
                if value:
                    figures.append({"name": f"{name}_{what}_ratio", "value": value, "unit": "x", "low": low, "high": high})
        document("speedrun", [{**f, "high": f["high"] if f["high"] < math.inf else None} for f in figures])
        return
    print(f"to {target:.4f} nats     {'tokens, mean':>14} {'seconds':>8}   course's tokens over its own   seconds")
    for name, tokens, seconds, of_tokens, of_seconds in rows:
        if not of_tokens[0]:
            print(f"{name:24} not reached by {sum(t == math.inf for t in tokens)} of {len(tokens)} seeds")
            continue
        cells = [f"{v:5.2f} [{low:.2f}, {high:.2f}]" for v, low, high in (of_tokens, of_seconds)]
        print(f"{name:24} {statistics.mean(tokens):14.0f} {statistics.mean(seconds):8.1f}   {cells[0]:29}   {cells[1]}")
    print(f"tokens_ratio {best[3][0]:.2f} ({best[0]})")


if __name__ == "__main__":
    main()
