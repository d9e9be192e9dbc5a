"""What a second process brings: two replicas of one thread each against one, at the same batch per process.

    python scripts/bench/ddp.py [--processes 2] [--size d4-4w256] [--batch 16] [--rounds 5] [--steps 4] [--json] [--quick]

The reference configuration (`_reference.py`) at another size, fp32, over gloo. In each round rank 0 trains alone while the others
wait; then each trains alone at the same time, which is all that the machine gives; then they train together. The figures are
samples/s of all processes over so many times those of the one: `efficiency` of training together, `machine_share` of each on its
own, and their quotient `kept`, what sending and waiting leaves. `longest_of_8` is what the fullest of eight ranks has to do over
the mean, in tokens, as samples are dealt; `longest_of_8_in_order` as they come.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _figures import figure, show
from _ranks import launch
from _reference import make_tokens, reference_config, useful_flops

from nano4m_cli import dist
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.masking._base import Key
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare
from nano4m_cli.train.tasks import deal

PHASES = ("one", "side_by_side", "together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", default="d4-4w256")
    parser.add_argument("--batch", type=int, default=16, help="samples per process and step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each kind in a round")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps of a small model")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.rounds, args.steps = "d1-1w64", 4, 2, 2
    if args.worker:
        work(args, Path(args.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_tokens(Path(folder), 512)
        rounds, about = launch(args.processes, "--worker", Path(folder) / "rounds.json")
        dealt, in_order = loads(Workspace(Path(folder)), 8, args.batch)
    n = args.processes
    share = lambda what: [r["one"] / r[what] for r in rounds]  # noqa: E731 (as many samples per process: time tells)
    figures = [
        figure("efficiency", share("together"), "of one process"), figure("machine_share", share("side_by_side"), "of one process"),
        figure("kept", [r["side_by_side"] / r["together"] for r in rounds], "of side by side"),
        figure("samples_per_s_one", [args.batch * args.steps / r["one"] for r in rounds], "samples/s"),
        figure(f"samples_per_s_{n}", [n * args.batch * args.steps / r["together"] for r in rounds], "samples/s"),
        *(figure(f"seconds_{kind}", [r[kind] / args.steps for r in rounds], "s/step") for kind in PHASES),
        figure("parameters", [about["parameters"]], ""), figure("flops", about["flops"], "FLOP/step of a process, by formula"),
        figure("longest_of_8", dealt, "of the mean"), figure("longest_of_8_in_order", in_order, "of the mean"),
    ]
    show("ddp", figures, args.json)


def loads(workspace: Workspace, ranks: int, batch: int, steps: int = 50) -> tuple[list[float], list[float]]:
    """Return the tokens of the fullest rank over the mean of each step, as samples are dealt and as they come."""
    config = reference_config([f"train.batch={batch * ranks}", "model.size=d1-1w64"])
    task, out = prepare(config, workspace).task, ([], [])
    for step in range(steps):
        counter = np.arange(step * batch * ranks, (step + 1) * batch * ranks)
        shown, asked = task.mixture.draw(task.train.lengths(task.order.at(counter)), Key(config.seed, "mask", counter))
        tokens = shown.sum(1) + asked.sum(1)
        for kept, parts in zip(out, (deal(tokens, ranks), np.array_split(np.arange(len(tokens)), ranks)), strict=True):
            sums = [tokens[p].sum() for p in parts]
            kept.append(float(max(sums) / np.mean(sums)))
    return out


def work(args: argparse.Namespace, file: Path) -> None:
    folder = file.parent
    torch.set_num_threads(1)
    with dist.joined("cpu", 5.0):
        ranks, real = dist.ranks(), (dist.rank, dist.ranks)

        def pretend(alone: bool) -> None:
            """Let the loop believe that this process is the only one, or let it know."""
            dist.rank, dist.ranks = (lambda: 0, lambda: 1) if alone else real

        trainers = {}
        for name, count in (("alone", 1), ("together", ranks)):
            pretend(count == 1)
            config = reference_config([f"train.batch={args.batch * count}", f"model.size={args.size}"])
            trainers[name] = Trainer(prepare(config, Workspace(folder)).task, config.train, config.seed, None)
        pretend(False)
        rounds = []
        for turn in range(args.rounds + 1):
            seconds = {}
            for phase in PHASES:
                trainer = trainers["together" if phase == "together" else "alone"]
                dist.barrier()
                begin = time.perf_counter()
                if phase != "one" or dist.rank() == 0:
                    pretend(phase != "together")
                    for step in range(turn * args.steps, (turn + 1) * args.steps):
                        trainer._one_step(trainer.task.batch(step))
                spent = time.perf_counter() - begin
                pretend(False)
                seconds[phase] = max(dist.gathered(spent))
            if turn:
                rounds.append(seconds)
        if dist.rank() == 0:
            m, layout = trainers["alone"].model.config, trainers["alone"].task.layout
            packed = [p.packed for step in range(20) for p in trainers["alone"].task.batch(step)]
            about = {"parameters": sum(p.numel() for p in trainers["alone"].model.parameters()),
                     "flops": [3 * useful_flops(layout, p, m.width, m.encoder_layers, m.decoder_layers) for p in packed]}
            file.write_text(json.dumps((rounds, about)))


if __name__ == "__main__":
    main()
