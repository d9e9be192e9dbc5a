"""`nano4m eval`: a run and held-out data to results and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nano4m_cli.cli._comparing import compare_runs
from nano4m_cli.cli._options import Device, Json, Quiet, Root, by_one_process, names
from nano4m_cli.cli._probing import list_probes, run_probes
from nano4m_cli.cli._show import Show
from nano4m_cli.errors import UsageError


def command(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="P.KEY=VALUE", help="Options of a probe, where not the default; with --compare: the other runs."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", "-p", metavar="P", help="Which one (repeatable; default: all but the costly: decoding, transfer)."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="RUN", help="Default: the newest run (with --site, repeatable: all evaluated)."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Default: test.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most N samples.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run no probe: gallery and report of the results that are there, e.g. of several jobs.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="RUN ...", help="Compare evaluated runs, each with the first, sample by sample."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option("--site", metavar="DIR", help="Measure nothing; write pages of evaluated runs for any static host."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the probes.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Measure what a run can do, with intervals, chance and ceilings; write results and one HTML report.

    \b
    nano4m eval
    nano4m eval --probe retrieval --limit 200
    nano4m eval --report
    nano4m eval --probe decoding decoding.direction="caption->rgb"
    nano4m eval --compare demo other another
    nano4m eval --site site --run demo --run digits
    torchrun --nproc_per_node=4 -m -- nano4m_cli eval

    --json: {run, report, files, skipped: {PROBE: reason}, results: [{probe, title, metrics: [{name, value, n, ci95,
    chance, ...}], notes, ...}]}; with --list {probes: {NAME: summary}}; with --site {site, runs, files, bytes}; with --compare what
    compare.json holds: {file, base, runs, pairs: [{run, figures: [{name, base, other, difference, ci95, p_holm, ...}]}], ...}.
    """
    show = Show(as_json, quiet)
    if list_ or report or site is not None or compare is not None:
        by_one_process("lists, reports, comparisons and sites are made")
    if list_:
        list_probes(show, "eval")
    elif site is not None:
        given = {"--probe": probe, "--split": split, "--limit": limit, "--report": report, "--compare": compare}
        wrong = [name for name, value in {**given, "settings": settings}.items() if value]
        if wrong:
            hint = "evaluate first, then write the site"
            raise UsageError(f"--site measures nothing, so {', '.join(wrong)} cannot go with it", hint)
        _site(show, root, run or [], site)
    elif compare is not None:
        unused = [n for n, v in (("--run", run), ("--split", split), ("--limit", limit)) if v is not None]
        unused += ["--report"] * report + [s for s in settings or [] if "=" in s]
        if unused:
            raise UsageError(f"{unused[0]} does not go with --compare, which reads the results that are there",
                             "evaluate the runs first, then: nano4m eval --compare RUN_A RUN_B")
        compare_runs(show, root, names([*compare, *(settings or [])]), names(probe))
    elif len(run or []) > 1:
        raise UsageError("one run is evaluated at a time", "only --site takes several")
    else:
        if report and (probe or settings):
            raise UsageError("--report runs no probe", "leave --probe and settings out")
        run_probes(show, "eval", root, run[0] if run else None, names(probe), split, limit, device, settings or [], report)


def _site(show: Show, root: Path | None, runs: list[str], out: Path) -> None:
    from nano4m_cli.data.workspace import Workspace
    from nano4m_cli.report.site import build_site

    done = build_site(Workspace.at(root), runs, out)
    show.say(f"runs: {', '.join(done.runs)}")
    show.say(f"{len(done.files)} files, {done.size / 1e6:.1f} MB")
    show.line(str(out / "index.html"))
    show.document({"site": out, "runs": done.runs, "files": done.files, "bytes": done.size})
