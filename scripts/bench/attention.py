"""Time of a training step over how attention pads its rows, and over who computes its gradient.

    python scripts/bench/attention.py [CONFIG] [KEY=VALUE ...] [--steps 40]

"groups N": rows are sorted into N groups, each padded to its longest (1: all rows to the longest). "autograd": as groups 3,
but with the gradient left to autograd. On the same batches, taking turns; the median of the rounds, with its quartiles.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from torch import Tensor

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.model import attention
from nano4m_cli.train.config import load_run_config
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

OWN = attention._Padded


def differentiated(q: Tensor, k: Tensor, v: Tensor, mask: attention.Mask, heads: int) -> Tensor:
    """What `attention._Padded` computes, written so that autograd can differentiate it."""
    at_q, at_k = mask.place("q", heads), mask.place("k", heads)
    q = q.new_zeros(mask.parts("q")[-1][1] * heads, q.shape[1]).index_copy(0, at_q, q)
    k, v = (x.new_zeros(mask.parts("k")[-1][1] * heads, x.shape[1]).index_copy(0, at_k, x) for x in (k, v))
    out = []
    for bias, (q_,), (k_, v_) in attention._groups(mask, heads, [q], [k, v]):
        score = torch.baddbmm(bias, q_, attention._pick(k_, mask).transpose(1, 2), alpha=q.shape[1] ** -0.5)
        out.append(torch.bmm(torch.softmax(score, -1), attention._pick(v_, mask)).flatten(0, 1))
    return torch.cat(out).index_select(0, at_q)


CHOICES = {**{f"groups {n}": (n, OWN) for n in (1, 2, 3, 4, 6)},
           "autograd": (attention.GROUPS, SimpleNamespace(apply=differentiated))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="cfgs/demo.yaml")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    config = load_run_config(args.config, args.settings)
    task = prepare(config, Workspace.at()).task
    trainer = Trainer(task, config.train, config.seed, None)
    spent: dict[str, list[float]] = {name: [] for name in CHOICES}
    for step in range(args.steps):
        parts = task.batch(step)
        for name, (attention.GROUPS, attention._Padded) in CHOICES.items():
            begin = time.perf_counter()
            trainer._one_step(parts)
            if step >= 4:
                spent[name].append(time.perf_counter() - begin)
    base = statistics.median(spent["groups 1"])
    for name, times in spent.items():
        quartiles = statistics.quantiles(times, n=4)
        print(f"{name:9} {statistics.median(times) * 1e3:6.1f} ms ({quartiles[0] * 1e3:.1f} .. {quartiles[2] * 1e3:.1f}), "
              f"{base / statistics.median(times):.2f}x")


if __name__ == "__main__":
    main()
