"""What the incremental mode costs in quality and saves in time: judged accuracy of generated media over `refresh`, run by run.

    python scripts/bench/incremental.py [RUN ...] [--split val] [--limit 200] [--steps 12] [--probe loss --probe class ...]

"exact" reads everything anew at every step with a bidirectional encoder, and nothing with a block-causal one (trained with
model.encoder=block_causal); "-" never reads anything anew; a number R does at every R-th step. The last lines draft captions and
sound of pictures: ids per model call, and how often the caption names what the labels name, in any place. --probe: of several
runs, what the probes say of each, side by side (a bidirectional run and one trained with model.encoder=block_causal).
"""

import argparse
import time

import numpy as np

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.generate.sampler import GenerateOptions
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._judges import open_judge
from nano4m_cli.registry import PROBES
from nano4m_cli.train.run import open_run

NEVER = 10**6
REFRESH = (None, 2, 4, NEVER)
DRAFT = (None, 1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=[None], metavar="RUN")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--probe", action="append", default=[], metavar="P", help="compare what these probes say of the runs")
    args = parser.parse_args()
    quiet = lambda *_: None  # noqa: E731
    contexts = [Context(open_run(Workspace.at(), name), args.split, args.limit, 0, quiet) for name in args.runs]
    for context in contexts:
        encoder = getattr(context.model.config, "encoder", "-")
        print(f"run {context.run.name} ({encoder}), split {context.split}, {context.n} samples, {args.steps} steps", flush=True)
        judge = open_judge(context.dataset, "rgb", quiet)
        for source in ("caption", "audio"):
            for refresh in REFRESH if encoder == "bidirectional" else (None, 4, 2, 1):
                options = GenerateOptions(steps=args.steps, refresh=refresh)
                begin = time.process_time()
                context.generate([source], ["rgb"], options)
                spent = (time.process_time() - begin) / context.n * 1e3
                right = judge.correct(context.decoded([source], ["rgb"], "rgb", options), context.labels)
                figures = "  ".join(f"{a} {r.sum() / n.sum():.3f}" for a, (r, n) in right.items())
                said = "-" if refresh == NEVER else refresh or "exact"
                print(f"{source:8} -> rgb  refresh {said:<5} {spent:6.1f} ms a sample (processor)  {figures}", flush=True)
        for draft in DRAFT:
            options = GenerateOptions(draft=draft)
            begin = time.process_time()
            state = context.generate(["rgb"], ["caption"], options)
            spent = (time.process_time() - begin) / context.n * 1e3
            texts = state.decode(context.layout, "caption", context.tokenizer("caption"))
            figures = "  ".join(f"{a} {_named(context, texts, a):.3f}" for a in context.attributes)
            ids, calls = state.work["caption"].sum(0)
            rate = f"{ids / calls:.2f} ids a call  {spent:6.1f} ms a sample"
            print(f"rgb -> caption  draft {draft or '-'}  {rate}  {figures}", flush=True)
        for draft in DRAFT:
            begin = time.process_time()
            state = context.generate(["rgb"], ["audio"], GenerateOptions(scheme="ar", draft=draft))
            spent = (time.process_time() - begin) / context.n * 1e3
            ids, calls = state.work["audio"].sum(0)
            print(f"rgb -> audio  draft {draft or '-'}  {ids / calls:.2f} ids a call  {spent:6.1f} ms a sample", flush=True)
    for probe in args.probe:
        _compare(contexts, probe)


def _compare(contexts: list[Context], probe: str) -> None:
    """Print the figures of a probe, runs side by side, with their intervals."""
    told = [{m.name: m for m in PROBES.get(probe)().measure(c)[0]} for c in contexts]
    print(f"{probe:40}" + "".join(f"{c.run.name:>28}" for c in contexts))
    for name in told[0]:
        cells = []
        for metrics in told:
            m = metrics.get(name)
            said = "-" if m is None or m.value is None else f"{m.value:.3f}"
            cells.append(said if m is None or m.ci95 is None else f"{said} ({m.ci95[0]:.3f} .. {m.ci95[1]:.3f})")
        print(f"{name:40}" + "".join(f"{c:>28}" for c in cells), flush=True)


def _named(context: Context, texts: list[str], attribute: str) -> float:
    """Return the share of texts that hold every object's value of an attribute as a word."""
    values = context.values(attribute)
    return float(np.mean([all(str(v) in text.split() for v in vs) for vs, text in zip(values, texts, strict=True)]))


if __name__ == "__main__":
    main()
