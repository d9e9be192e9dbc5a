"""What a second process brings to an evaluation: seconds of each probe by one process of one thread, and by several.

    python scripts/bench/shared_eval.py --root WORKSPACE [--run NAME] [--kind eval|probe] [--probe P ...] [--processes 2]
                                        [--rounds 2] [--limit N] [--json] [--quick]

A trained run is evaluated again and again, in a copy of its folder: in each round by rank 0 alone while the others wait, then by
all of them together, over gloo. What both write must be the same, byte for byte. Probes that use what one before them generated
are told as they come in an evaluation. `speedup` is the seconds of one process over those of all; it ends at the number of
processes, and at what the machine gives them.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from _figures import figure, show
from _ranks import launch

from nano4m_cli import dist
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.probes._evaluate import evaluate, listing
from nano4m_cli.registry import PROBES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=os.environ.get("NANO4M_ROOT", "."))
    parser.add_argument("--run")
    parser.add_argument("--kind", choices=("eval", "probe"), default="eval")
    parser.add_argument("--probe", action="append", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="samples of the split, at most")
    parser.add_argument("--quick", action="store_true", help="one round of two probes on 40 samples")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.limit = 1, 40
        args.probe = args.probe or (["loss", "retrieval"] if args.kind == "eval" else ["linear", "lens"])
    if args.worker:
        work(args, Path(args.worker))
        return
    given = Workspace(args.root).run(args.run)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").symlink_to((Path(args.root) / "data").resolve())
        shutil.copytree(given, Path(folder) / "runs" / given.name, ignore=shutil.ignore_patterns("eval", "report"))
        rounds = launch(args.processes, "--worker", Path(folder) / "rounds.json")
    n, figures = args.processes, []
    for name in ("all", *(k for k in rounds[0]["one"] if k != "all")):
        one, several = ([r[how][name] for r in rounds] for how in ("one", "several"))
        figures += [figure(f"{name}_seconds_1", one, "s"), figure(f"{name}_seconds_{n}", several, "s"),
                    figure(f"{name}_speedup", [a / b for a, b in zip(one, several, strict=True)], "of one process")]
    show("shared_eval", figures, args.json)


def work(args: argparse.Namespace, file: Path) -> None:
    folder = file.parent
    torch.set_num_threads(1)
    workspace, rounds, seconds = Workspace(folder), [], {}
    results = workspace.run(None) / "eval"
    for name in args.probe or listing(args.kind):
        timed(name, seconds)

    def once() -> dict[str, float]:
        seconds.clear()
        began = time.perf_counter()
        evaluate(workspace, None, args.probe, None, args.limit, kind=args.kind)
        return {"all": time.perf_counter() - began, **seconds}

    with dist.joined("cpu", 30.0):
        ensure_torchaudio()
        import torchmetrics.functional.image  # noqa: F401 - once, before the first round

        evaluate(workspace, None, args.probe[:1] or ["loss" if args.kind == "eval" else "lens"], None, 20, kind=args.kind)
        for _ in range(args.rounds):
            spent = {}
            if dist.rank() == 0:
                with dist.alone():
                    spent["one"] = once()
                before = {p.name: p.read_bytes() for p in results.iterdir() if p.is_file()}
            dist.barrier()
            spent["several"] = once()
            if dist.rank() == 0:
                assert {p.name: p.read_bytes() for p in results.iterdir() if p.is_file()} == before
                rounds.append(spent)
                told = ", ".join(f"{how} {seconds['all']:.1f} s" for how, seconds in spent.items())
                print(f"round {len(rounds)}: {told}", file=sys.stderr, flush=True)
            dist.barrier()
        if dist.rank() == 0:
            file.write_text(json.dumps(rounds))


def timed(name: str, seconds: dict[str, float]) -> None:
    """Let a probe's measuring note the seconds that it takes."""
    probe = PROBES.get(name)
    measure = probe.measure

    def measured(self, context):
        began = time.perf_counter()
        found = measure(self, context)
        seconds[name] = time.perf_counter() - began
        return found

    probe.measure = measured


if __name__ == "__main__":
    main()
