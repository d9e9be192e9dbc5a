"""What `eval` and `probe` share: run probes of one kind on a run, print their figures."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano4m_cli.cli._options import DeviceName, pick_device, said_once
from nano4m_cli.cli._show import Show

MINUTES = 30.0  # that processes wait for each other: more than the longest piece of work takes
HEAD = ("metric", "value", "95% interval", "n", "chance", "majority", "ceiling", "reference", "trained")


def list_probes(show: Show, kind: str) -> None:
    from nano4m_cli.probes._evaluate import listing

    probes = listing(kind)
    show.table(["probe", "what it measures"], list(probes.items()))
    show.document({"probes": probes})


def run_probes(
    show: Show, kind: str, root: Path | None, run: str | None, probes: list[str], split: str | None,
    limit: int | None, device: DeviceName, settings: Sequence[str] = (), report: bool = False,
) -> None:
    from nano4m_cli import dist
    from nano4m_cli.data.workspace import Workspace

    here = dist.place()
    if here.ranks > 1:  # a launcher may have them ignored, for workers that stop in order: here nothing is left half done
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    show.mute_others(here.first)
    with said_once(here.first):
        workspace, picked = Workspace.at(root), pick_device(device)
        path = workspace.run(run)
    beside = f" ({here.ranks} processes)" if here.ranks > 1 else ""
    show.say(f"run: {path}{beside}")
    from nano4m_cli.probes._evaluate import evaluate
    from nano4m_cli.report._tradeoffs import tables

    with dist.joined(picked, MINUTES, "start the evaluation again") as own, show.work() as work:
        done = evaluate(
            workspace, run, probes, split, limit, kind=kind, progress=work.progress, device=own, settings=settings,
            **({"only_report": True} if report else {}),
        )
    for result in done.results:
        show.line(f"{result.probe}: {result.title}")
        plain = [m for m in result.metrics if m.setting is None]
        if plain:
            show.table(HEAD, [_row(m) for m in plain])
        for table in tables(result.metrics):
            show.line(table.subject)
            show.table([*table.keys, *table.columns], [[*row.setting, *map(_cell, row.cells)] for row in table.rows])
        for note in result.notes:
            show.say(f"notice: {result.probe}: {note}")
        show.line("")
    for name, reason in done.skipped.items():
        show.say(f"notice: {name} left out: {reason}")
    for file in [*done.files, *([done.report] if done.report else [])]:
        show.line(str(file))
    show.document({
        "run": done.run, "report": done.report, "files": done.files, "skipped": done.skipped, "results": done.results,
    })


def _cell(metric: Any) -> str:
    if metric is None or metric.value is None:
        return "-"
    return f"{metric.value:.4g}" + ("" if metric.ci95 is None or metric.n < 2 else " ({:.4g} .. {:.4g})".format(*metric.ci95))


def _row(metric: Any) -> list[Any]:
    interval = None if metric.ci95 is None else "{:.4g} .. {:.4g}".format(*metric.ci95)
    known = (metric.chance, metric.majority, metric.ceiling, metric.reference, metric.in_distribution)
    return [metric.name, metric.value, interval, metric.n, *known]
