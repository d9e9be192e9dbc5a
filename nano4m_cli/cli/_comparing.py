"""`nano4m eval --compare`: show what sets runs apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano4m_cli.cli._show import Show

HEAD = ("probe", "metric", "{base}", "{run}", "difference", "95% interval", "d", "p", "p (Holm)", "better")


def compare_runs(show: Show, root: Path | None, runs: list[str], probes: list[str]) -> None:
    """Compare runs with the first; print what differs first."""
    from nano4m_cli.data.workspace import Workspace
    from nano4m_cli.probes._compare import LEVEL, compare

    made, path = compare(Workspace.at(root), runs, probes)
    show.line(f"data {made.data}, split {made.split}, {made.samples} samples")
    keys = list(dict.fromkeys(k for r in made.runs for k in r.settings))
    show.table(["run", "seed", "checkpoint", "samples seen", "parameters", *keys],
               [[r.run, r.seed, r.checkpoint, r.samples_seen, r.parameters, *(r.settings.get(k) for k in keys)] for r in made.runs])
    for pair in made.pairs:
        better = [sum(f.verdict == name for f in pair.figures) for name in (pair.run, made.base)]
        if pair.run == made.base:
            better = [0, 0]
        tests, neither = sum(f.p is not None for f in pair.figures), sum(f.differs and f.verdict is None for f in pair.figures)
        show.line("")
        said = f"of {tests} figures {better[0]} better and {better[1]} worse, {neither} differ otherwise (p < {LEVEL:g}, corrected)"
        show.line(f"{pair.run} against {made.base}: {said}")
        head = [h.format(base=made.base, run=pair.run) for h in HEAD]
        show.table(head, [_row(f) for f in sorted(pair.figures, key=lambda f: (f.p_holm is None, f.p_holm or 0.0, f.p or 0.0))])
        for what, reason in pair.left_out.items():
            show.say(f"notice: {what} left out: {reason}")
    if made.spreads:
        show.line("")
        show.line("over seeds: mean (standard deviation, runs)")
        show.table(["probe", "metric", *(" + ".join(g) for g in made.groups)], [
            [s.probe, s.name, *(_spread(*x) for x in zip(s.mean, s.std, s.runs, strict=True))] for s in made.spreads])
    for note in made.notes:
        show.say(f"notice: {note}")
    show.line(str(path))
    show.document({"file": path, **made.model_dump(mode="json")})


def _row(f: Any) -> list[Any]:
    interval = None if f.ci95 is None else "{:.4g} .. {:.4g}".format(*f.ci95)
    return [f.probe, f.name, f.base, f.other, f.difference, interval, f.effect, f.p, f.p_holm, f.verdict]


def _spread(mean: float | None, std: float | None, runs: int) -> str:
    return "-" if mean is None else f"{mean:.4g} ({'-' if std is None else f'{std:.2g}'}, {runs})"
