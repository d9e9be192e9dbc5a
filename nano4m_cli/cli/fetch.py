"""`nano4m fetch`: a source to raw shards."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from nano4m_cli.cli._options import Json, Quiet, Root, Settings, Workers, by_one_process
from nano4m_cli.cli._show import Show
from nano4m_cli.errors import FetchError, UsageError

SHOWN = 20  # failures printed; all of them are in failures.json


def command(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="See --list.")] = None,
    settings: Settings = None,
    list_: Annotated[bool, typer.Option("--list", help="List the sources, or the options of SOURCE.")] = False,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made (a source may download to its cache for that).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Make raw shards of a source, below data/<dataset>/raw. Shards that are there and whole are kept.

    \b
    nano4m fetch scenes
    nano4m fetch digits mirror=DIR
    nano4m fetch folder path=DIR
    nano4m fetch --list
    nano4m fetch folder --list

    --json: {dataset, path, source, options, modalities, splits: {SPLIT: {samples, shards}}, made, kept,
    failures: [{file, reason}]};
    with --list {sources: {NAME: summary}, filters: {NAME: summary},
    derived: {NAME: summary}}, for a SOURCE {source, options: {NAME: default}, help}.
    """
    from nano4m_cli.registry import FILTERS, LABELS, SOURCES

    show = Show(as_json, quiet)
    by_one_process("nano4m fetch runs", "without torchrun; --workers N uses as many processes")
    if list_ and source is not None:
        _options(show, SOURCES.get(source).Options, source, SOURCES.summary(source))
        return
    if list_:
        sources = {name: SOURCES.summary(name) for name in SOURCES.names()}
        filters = {name: FILTERS.summary(name) for name in FILTERS.names()}
        show.table(["source", "what it is"], list(sources.items()))
        labels = {name: LABELS.summary(name) for name in LABELS.names()}
        show.table(["filter", "what it leaves out"], list(filters.items()))
        show.table(["derived", "what is made"], list(labels.items()))
        show.document({"sources": sources, "filters": filters, "derived": labels})
        return
    if source is None:
        raise UsageError("fetch needs a source", f"one of {', '.join(SOURCES.names())} (see 'nano4m fetch --list')")
    from nano4m_cli.data.fetch import fetch, open_source
    from nano4m_cli.data.workspace import Workspace

    workspace = Workspace.at(root)
    opened = open_source(source, settings or [], workspace)
    with show.work() as work:
        if dry_run:
            opened.prepare(work.progress)
            info, made, kept = opened.info(), 0, 0
            path = workspace.root / "data" / info.name
        else:
            report = fetch(opened, workspace, workers, work.progress)
            info, made, kept, path = report.info, report.made, report.kept, report.dataset.path
    counts = info.splits | ({"judge": info.judge} if info.judge else {})
    shards: dict[str, int] = dict.fromkeys(counts, 0)
    for plan in opened.plan():
        shards[plan.split] += 1
    splits = {name: {"samples": n, "shards": shards[name]} for name, n in counts.items()}
    show.table(["split", "samples", "shards"], [[name, s["samples"], s["shards"]] for name, s in splits.items()])
    if dry_run:
        show.line(f"{info.name}: {sum(counts.values())} samples would be in {path / 'raw'}")
    else:
        show.line(f"{info.name}: {made} samples made, {kept} kept, in {path / 'raw'}")
    if info.notes:
        show.say(f"notice: {info.notes}")
    failures = opened.failures()
    if failures:
        show.table(["could not be used", "because"], [[f.file, f.reason] for f in failures[:SHOWN]])
        if len(failures) > SHOWN:
            show.line(f"and {len(failures) - SHOWN} more")
    show.document({
        "dataset": info.name, "path": path, "source": info.source, "options": info.options,
        "modalities": info.modalities, "splits": splits, "made": made, "kept": kept, "dry_run": dry_run,
        "failures": [f._asdict() for f in failures],
    })
    if failures and not opened.tolerant:
        raise FetchError(
            f"{len(failures)} files could not be used" + ("" if dry_run else f" (all of them: {path / 'raw' / 'failures.json'})"),
            "the others are there; mend these and fetch again, or accept it with broken=skip",
        )


def _options(show: Show, options: Any, name: str, summary: str) -> None:
    """Show the options of a source: what they mean, and their defaults."""
    fields = options.model_fields
    default = {k: None if f.is_required() else f.get_default(call_default_factory=True) for k, f in fields.items()}
    shown = lambda k: "(needed)" if fields[k].is_required() else "null" if default[k] is None else str(default[k])  # noqa: E731
    help_ = inspect.getdoc(options) or ""
    show.line(f"{name}: {summary}\n\n{help_}\n")
    show.table(["option", "default"], [[k, shown(k)] for k in fields])
    show.document({"source": name, "options": default, "help": help_})
