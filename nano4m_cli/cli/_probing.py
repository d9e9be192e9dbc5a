"""What `eval` and `probe` share: run probes of one kind on a run, print their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano4m_cli.cli._options import DeviceName, pick_device
from nano4m_cli.cli._show import Show

HEAD = ("metric", "value", "95% interval", "n", "chance", "majority", "ceiling", "reference", "trained")


def list_probes(show: Show, kind: str) -> None:
    from nano4m_cli.probes._evaluate import listing

    probes = listing(kind)
    show.table(["probe", "what it measures"], list(probes.items()))
    show.document({"probes": probes})


def run_probes(
    show: Show, kind: str, root: Path | None, run: str | None, probes: list[str], split: str | None,
    limit: int | None, device: DeviceName,
) -> None:
    from nano4m_cli.data.workspace import Workspace

    workspace = Workspace.at(root)
    show.say(f"run: {workspace.run(run)}")
    from nano4m_cli.probes._evaluate import evaluate

    with show.work() as work:
        done = evaluate(workspace, run, probes, split, limit, kind=kind, progress=work.progress, device=pick_device(device))
    for result in done.results:
        show.line(f"{result.probe}: {result.title}")
        show.table(HEAD, [_row(m) for m in result.metrics])
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


def _row(metric: Any) -> list[Any]:
    interval = None if metric.ci95 is None else "{:.4g} .. {:.4g}".format(*metric.ci95)
    known = (metric.chance, metric.majority, metric.ceiling, metric.reference, metric.in_distribution)
    return [metric.name, metric.value, interval, metric.n, *known]
