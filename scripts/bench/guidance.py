"""Judged accuracy of generated pictures and sound over the scale of classifier-free guidance.

    python scripts/bench/guidance.py [RUN] [--split val] [--limit 400]

Settings are chosen on val; the test split is for the figures that are reported. Guidance 1 is plain sampling.
"""

import argparse

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._judges import open_judge
from nano4m_cli.train.run import open_run

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=400)
    args = parser.parse_args()
    quiet = lambda *_: None  # noqa: E731
    context = Context(open_run(Workspace.at(), args.run), args.split, args.limit, 0, quiet)
    print(f"run {context.run.name}, split {context.split}, {context.n} samples; share of objects named as the labels do")
    for target, limit in (("rgb", args.limit), ("audio", 200)):
        judge = open_judge(context.dataset, target, quiet)
        for source in ("caption", "audio", "rgb"):
            if source == target or source not in context.names:
                continue
            for scale in SCALES:
                made = context.decoded([source], [target], target, GenerateOptions(guidance=scale), limit=limit)
                right = judge.correct(made, context.labels[: len(made)])
                figures = "  ".join(f"{a} {r.sum() / n.sum():.3f}" for a, (r, n) in right.items())
                print(f"{source:8} -> {target:6} guidance {scale:<4g} {figures}", flush=True)


if __name__ == "__main__":
    main()
