"""Print a run's key figures as a Markdown table: `python scripts/results_table.py runs/demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

WANTED = ("_acc", "_acc_novel", "absrel", "absrel_ratio", "absrel_likeliest_ratio", "angle", "angle_ratio",
          "angle_likeliest_ratio", "/r1", "/r5", "psnr", "equal")


def main(run: Path) -> None:
    rows = []
    for path in sorted((run / "eval").glob("*.json")):
        result = json.loads(path.read_text())
        if result["probe"] in ("linear", "loss"):
            continue
        rows += [(result["probe"], m) for m in result["metrics"] if m["name"].endswith(WANTED)]
    show = lambda v: "-" if v is None else f"{v:.3f}"  # noqa: E731
    print("| probe | figure | value | 95 % interval | n | chance | ceiling | reference |\n|---|---|---|---|---|---|---|---|")
    for probe, m in rows:
        ci = "-" if m["ci95"] is None else f"{m['ci95'][0]:.3f} .. {m['ci95'][1]:.3f}"
        print(f"| {probe} | `{m['name']}` | {show(m['value'])} | {ci} | {m['n']} | {show(m['chance'])} | "
              f"{show(m['ceiling'])} | {show(m['reference'])} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
