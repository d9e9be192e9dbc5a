"""Scenes per second of one core: the `scenes` source with pictures, sound and encoding.

python scripts/bench/scenes.py [--json] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from _figures import document, figure

from nano4m_cli.data.sources.scenes import Source, encode, raw_scene

# (figure, size, supersample); the first is the demo's data set
SETUPS = [
    ("scenes_per_s_per_core", 32, 2),
    ("scenes_per_s_per_core_64", 64, 1),
    ("scenes_per_s_per_core_64_smooth", 64, 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    args = parser.parse_args()
    rounds, scenes = (3, 60) if args.quick else (9, 300)
    options = {name: Source.Options(size=size, supersample=factor) for name, size, factor in SETUPS}
    rates: dict[str, list[float]] = {name: [] for name in options}
    sizes: dict[str, dict[str, float]] = {name: {} for name in options}
    for turn in range(rounds + 1):  # the first warms up; setups take turns, so that all see the same machine
        for name, o in options.items():
            start = time.process_time()  # of this process: what others do on the machine is not the source's
            made = [encode(f"train-{i}", raw_scene(o, "train", i)) for i in range(turn * scenes, (turn + 1) * scenes)]
            if turn:
                rates[name].append(scenes / (time.process_time() - start))
            for member in made[0].members:
                sizes[name][member] = statistics.mean(len(s.members[member]) for s in made)
    figures = [figure(n, r, "scenes/s") for n, r in rates.items()]
    if args.json:
        document("scenes", figures)
        return
    print(f"{'size':>4} {'supersample':>11} {'scenes/s/core':>13} {'spread':>13}   mean bytes")
    for (name, size, factor), f in zip(SETUPS, figures, strict=True):
        parts = " ".join(f"{m.split('.')[0]} {b:.0f}" for m, b in sizes[name].items())
        print(f"{size:>4} {factor:>11} {f['value']:>13.0f} {f['low']:>6.0f}-{f['high']:<6.0f}   {parts}")


if __name__ == "__main__":
    sys.exit(main())
