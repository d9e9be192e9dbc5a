"""Time of a training step over the number of groups that attention pads rows in (1: all rows to the longest).

    python scripts/bench/attention.py [CONFIG] [KEY=VALUE ...] [--steps 40]

On the same batches, taking turns; the median of the rounds.
"""

import argparse
import statistics
import time

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.model import attention
from nano4m_cli.train.config import load_run_config
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

CHOICES = (1, 2, 3, 4, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="cfgs/demo.yaml")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    config = load_run_config(args.config, args.settings)
    task = prepare(config, Workspace.at()).task
    trainer = Trainer(task, config.train, config.seed, None)
    spent: dict[int, list[float]] = {n: [] for n in CHOICES}
    for step in range(args.steps):
        parts = task.batch(step)
        for n in CHOICES:
            attention.GROUPS = n
            begin = time.perf_counter()
            trainer._one_step(parts)
            if step >= 4:
                spent[n].append(time.perf_counter() - begin)
    base = statistics.median(spent[1])
    for n in CHOICES:
        quartiles = statistics.quantiles(spent[n], n=4)
        print(f"groups {n}: {statistics.median(spent[n]) * 1e3:6.1f} ms ({quartiles[0] * 1e3:.1f} .. {quartiles[2] * 1e3:.1f}), "
              f"{base / statistics.median(spent[n]):.2f}x")


if __name__ == "__main__":
    main()
