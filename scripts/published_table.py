"""Print the published table of nano4M-Audio row by row beside a run's own figures: `python scripts/published_table.py runs/demo`.

The published figures are of other data (VGGSound clips, 14 x 14 image tokens, two codebooks of EnCodec) and of a larger model; a
row says what keeps it from being compared. Ours come from eval/*.json; what is missing says which probe makes it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """A published figure: value in `unit`, baseline told beside it. ours: probe and patterns of names, the first that is there.

    pick: of several that fit, "best" is one row, "each" a row for each.
    """

    what: str
    published: float | None
    unit: str
    probe: str
    ours: tuple[str, ...]
    baseline: str = ""
    pick: Literal["best", "each"] = "each"
    remark: str = ""


PER_TOKEN = "per token of other tokenizers: only the distance from a uniform guess compares"
ROWS = [
    *(Row(f"held-out cross-entropy, {m}", ce, "nats", "loss", (f"{m}/ce",), remark=PER_TOKEN)
      for m, ce in (("rgb", 9.14), ("audio", 5.28), ("depth", 5.11), ("normal", 3.45))),
    Row("audio to class, top-1", 10.4, "%", "class", ("audio->caption/*_top1", "audio->label/*_top1", "audio->caption/*_acc"),
        "majority 18.4 %", remark="theirs: many classes of sounds"),
    Row("best retrieval, R@5 among 200", 4.5, "%", "retrieval", ("*->*/r5", "*->*/class_r5"), "chance 2.5 %", "best",
        "the best of many directions: chance is of one"),
    Row("retrieval audio to rgb, R@5 among 200", None, "%", "retrieval", ("audio->rgb/r5", "audio->rgb/class_r5"), "chance 2.5 %",
        remark="published: the best of all directions only"),
    Row("audio to rgb, recognised", 0.0, "%", "crossmodal", ("audio->rgb/recognised", "audio->rgb/*_acc"),
        remark="by a judge of this data set: all that sound tells of an object"),
    Row("rgb to depth, token accuracy", 11.1, "%", "crossmodal", ("rgb->depth/token_acc",), remark="tokens of other tokenizers"),
    Row("rgb to normal, token accuracy", 18.0, "%", "crossmodal", ("rgb->normal/token_acc",), remark="tokens of other tokenizers"),
    Row("memorisation: loss gap between test and train", None, "nats", "memorization", ("*/ce_gap",),
        remark="the published figure is not known to us"),
    Row("memorisation: exact copies of train samples", None, "%", "memorization", ("*->*/exact_copies",),
        remark="the published figure is not known to us"),
    Row("tokenizer of rgb, PSNR", 19.1, "dB", "tokenizer", ("rgb/psnr",), remark="other pictures"),
    Row("tokenizer of rgb, SSIM", None, "", "tokenizer", ("rgb/ssim",), remark="the published figure is not known to us"),
]


def main(run: Path) -> list[dict[str, Any]]:
    """Return the rows: {what, published, unit, baseline, ours, ci95, n, chance, majority, ceiling, name, data, remark}."""
    results = {}
    for path in sorted((run / "eval").glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text())
        except ValueError as err:
            sys.exit(f"error: {path} is not valid JSON: {err}\nhint: nano4m eval --run {run.name} --probe {path.stem}")
    if not results:
        sys.exit(f"error: no results in {run / 'eval'}\nhint: nano4m eval --run {run.name}")
    rows = []
    for row in ROWS:
        found = fitting(results.get(row.probe, {}).get("metrics", []), row)
        more = {"what": row.what, "published": row.published, "unit": row.unit, "baseline": row.baseline, "remark": row.remark}
        times = partial(_times, 100.0 if row.unit == "%" else 1.0)
        for metric in found or [None]:
            if metric is None:
                missing = f"nano4m eval --run {run.name} --probe {row.probe}" if row.probe not in results else "not of this run"
                rows.append({**more, "ours": None, "name": None, "missing": missing})
                continue
            rows.append({
                **more, "ours": times(metric["value"]), "ci95": metric["ci95"] and [times(v) for v in metric["ci95"]],
                "n": metric["n"], "name": metric["name"], "data": f"{results[row.probe]['data']}, {results[row.probe]['split']}",
                **{k: times(metric[k]) for k in ("chance", "majority", "ceiling")},
            })
    return rows


def _times(scale: float, value: float | None) -> float | None:
    return None if value is None else round(value * scale, 6)


def fitting(metrics: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    """Return the metrics of the first pattern that any fits, those that are there."""
    for pattern in row.ours:
        found = [m for m in metrics if fnmatch.fnmatchcase(m["name"], pattern) and m["value"] is not None]
        if found:
            largest = max(m["n"] for m in found)  # of galleries: a hit among 50 is no hit among 200
            return [max((m for m in found if m["n"] == largest), key=lambda m: m["value"])] if row.pick == "best" else found
    return []


def markdown(rows: list[dict[str, Any]]) -> str:
    show = lambda v, unit="": "-" if v is None else f"{v:.3g}{' ' + unit if unit else ''}"  # noqa: E731
    lines = ["| figure | nano4M-Audio, published | this run | 95 % interval | n | chance | majority | ceiling | ours is | remark |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        told = show(r["published"], r["unit"]) + (f" ({r['baseline']})" if r["baseline"] else "")
        ci = r.get("ci95")
        lines.append(" | ".join([
            f"| {r['what']}", told, show(r["ours"], r["unit"]), f"{ci[0]:.3g} .. {ci[1]:.3g}" if ci else "-",
            str(r["n"]) if r["name"] else "-",
            *(show(r.get(k)) for k in ("chance", "majority", "ceiling")),
            f"`{r['name']}` ({r['data']})" if r["name"] else r["missing"], f"{r['remark'] or '-'} |",
        ]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a Markdown table")
    args = parser.parse_args()
    table = main(args.run)
    print(json.dumps({"run": str(args.run), "rows": table}, indent=2) if args.json else markdown(table))
