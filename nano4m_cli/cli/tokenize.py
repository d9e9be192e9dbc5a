"""`nano4m tokenize`: raw shards to token shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nano4m_cli.cli._app import stopped
from nano4m_cli.cli._options import DryRun, Json, Quiet, Root, Workers, by_one_process, names, share
from nano4m_cli.cli._show import Show
from nano4m_cli.errors import DataError, UsageError, did_you_mean


def command(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[M.]OPTION=VALUE", help="Of the tokenizers; name= is which one.")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option("--modality", "-m", metavar="M", help="Which one (repeatable; default: all).")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", metavar="NAME", help="Default: the newest.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Examine raw and token shards; tokenize nothing.")] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Only the I-th of N shares of the shards, from 0.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Only write tokens/manifest.json, for training from an address (data.url).")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the tokenizers.")] = False,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Make token shards of a data set. A tokenizer that is missing is fitted on the train split.

    \b
    nano4m tokenize
    nano4m tokenize --modality audio
    nano4m tokenize --modality rgb --modality depth rgb.name=fsq_image
    nano4m tokenize --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT   (an array from 0; the first job fits)

    --json: {dataset, modalities: {M: {tokenizer, kind, shape, vocab_size, fitted, made, kept, samples, figures,
    sheet, split, n}}}; with --dry-run {dataset, modalities: {M: {tokenizer, fitted, options, samples}}}; with --check
    {dataset, samples: {SPLIT: {M: n}}, fresh: {M: share}, codes: {M: {used, perplexity: [of each codebook]}}, alignment:
    {SPLIT: {PAIR: {dx, dy, n, own}}}, sheet, findings: [{check, severity, modality, split, shard, n, keys, what, hint}]};
    with --publish {dataset, manifest}; with --list {tokenizers: {NAME: summary}}.
    """
    show = Show(as_json, quiet)
    by_one_process("nano4m tokenize runs", "without torchrun; --shard I/N gives each of N jobs a share of the shards")
    if list_:
        from nano4m_cli.registry import TOKENIZERS

        tokenizers = {name: TOKENIZERS.summary(name) for name in TOKENIZERS.names()}
        show.table(["tokenizer", "what it is"], list(tokenizers.items()))
        show.document({"tokenizers": tokenizers})
        return
    part = share(shard)
    from nano4m_cli.data.workspace import Workspace

    folder = Workspace.at(root).dataset(dataset)
    show.say(f"data set: {folder.name} ({folder.path})")
    if publish:
        from nano4m_cli.data import stream

        manifest = stream.publish(folder, names(modality) or folder.tokenised())
        show.line(f"{manifest}: serve {folder.path} anywhere, and train with data.url=ADDRESS")
        show.document({"dataset": folder.name, "manifest": manifest})
        return
    from nano4m_cli.train import tokenizing

    chosen = tokenizing.choose_modalities(folder, names(modality), brought=check)
    if not (check or modality) and (brought := folder.info().brought):
        show.say(f"left as they are: {', '.join(brought)} (their tokens came with fetch)")
    options = by_modality(settings or [], chosen)
    if check:
        chosen = chosen if modality else [m for m in chosen if m in folder.tokenised()]
        _check(show, folder, chosen, workers)
        return
    if dry_run:
        plans = {m: _plan(folder, m, options[m]) for m in chosen}
        show.table(
            ["modality", "tokenizer", "fitted", "samples"],
            [[m, p["tokenizer"], p["fitted"], p["samples"]] for m, p in plans.items()],
        )
        show.document({"dataset": folder.name, "modalities": plans, "dry_run": True})
        return
    from nano4m_cli.probes._roundtrip import report as round_trip
    from nano4m_cli.train.loop import Stopped

    done: dict[str, Any] = {}
    with show.work() as work:
        fitted = tokenizing.fit_missing(folder, options, workers, work.progress, part)
    for name in chosen:
        try:
            with show.work() as work:
                made = tokenizing.tokenize(folder, name, options[name], workers, work.progress, work.record, part)
        except Stopped as err:
            raise stopped(err, False) from err
        # One job of several tells of the round trip: all have the same tokenizer.
        spec, trip = made.spec, round_trip(folder, name) if part[0] == 0 else {"figures": {}, "sheet": None}
        done[name] = {
            "tokenizer": spec.tokenizer.name, "kind": spec.kind, "shape": spec.shape, "vocab_size": spec.vocab_size,
            "fitted": name in fitted, "made": made.made, "kept": made.kept, "samples": made.samples, **trip,
        }
        shape = "x".join(map(str, spec.shape))
        show.line(
            f"{name}: {made.made} samples made, {made.kept} kept; {spec.kind} {shape} of {spec.vocab_size} by "
            f"{spec.tokenizer.name}{' (fitted now)' if name in fitted else ''}"
        )
        if trip["figures"]:
            show.line("  round trip: " + "  ".join(f"{k} {v:.4g}" for k, v in trip["figures"].items()))
        if trip["sheet"]:
            show.line(f"  contact sheet: {trip['sheet']}")
    show.document({"dataset": folder.name, "modalities": done})


def _check(show: Show, folder: Any, chosen: Sequence[str], workers: int | None) -> None:
    """Show all findings; what is broken is a DataError."""
    from nano4m_cli.train.doctor import examine

    with show.work() as work:
        report = examine(folder, chosen, workers, work.progress)
    show.table(["split", *chosen], [[split, *per.values()] for split, per in report.samples.items()])
    for name, part in report.fresh.items():
        show.line(f"{name}: {part:.1%} of the ids are what encoding anew gives")
    for name, use in report.codes.items():
        used, spread = (sum(use[k]) / len(use[k]) for k in ("used", "perplexity"))
        of = f" (mean of {len(use['used'])} codebooks)" if len(use["used"]) > 1 else ""
        show.line(f"{name}: {used:.1%} of the codes are used, perplexity {spread:.4g}{of}")
    if pairs := dict.fromkeys(pair for found in report.alignment.values() for pair in found):
        rows = [[pair, *(round((f["dx"] ** 2 + f["dy"] ** 2) ** 0.5, 1) if (f := per.get(pair)) else None
                         for per in report.alignment.values())] for pair in pairs]
        show.table(["pixels apart", *report.alignment], rows)
    if report.sheet:
        show.line(f"contact sheet: {report.sheet}")
    if report.findings:
        head = ["severity", "check", "modality", "split", "shard", "samples", "what", "such as"]
        show.table(head, [[f.severity, f.check, f.modality, f.split or None, f.shard or None, f.n or None, f.what,
                           " ".join(f.keys[:2]) or None] for f in report.findings])
    show.document({"dataset": folder.name, "samples": report.samples, "fresh": report.fresh, "codes": report.codes,
                   "alignment": report.alignment, "sheet": report.sheet, "findings": [f._asdict() for f in report.findings]})
    if broken := report.errors:
        what = "1 thing is wrong" if len(broken) == 1 else f"{len(broken)} things are wrong"
        raise DataError(f"{folder.name}: {what}: {broken[0].modality}: {broken[0].what}", broken[0].hint or None)
    notices = len(report.findings)
    show.line(f"{folder.name}: raw and token shards are whole and aligned" + f" (notices: {notices})" * bool(notices))


def by_modality(items: Sequence[str], chosen: Sequence[str]) -> dict[str, list[str]]:
    """Sort "modality.option=value" by modality; the modality may be left out where only one is chosen."""
    out: dict[str, list[str]] = {m: [] for m in chosen}
    for item in items:
        key, eq, _ = item.partition("=")
        if not eq:
            raise UsageError(f"'{item}' is not of the form option=value", f"did you mean '--modality {item}'?")
        first, dot, _ = key.partition(".")
        if dot and first in out:
            out[first].append(item[len(first) + 1 :])
        elif len(chosen) == 1:
            out[chosen[0]].append(item)
        elif not chosen:
            raise UsageError(f"'{item}' is for no modality: nothing is to be tokenized here")
        else:
            hint = did_you_mean(first, chosen) if dot else f"write {chosen[0]}.{item}, or choose one with --modality"
            raise UsageError(f"'{item}' does not say which modality it is for", hint)
    return out


def _plan(folder: Any, modality: str, items: Sequence[str]) -> dict[str, Any]:
    from nano4m_cli.train.tokenizing import make_fresh

    tokenizer = make_fresh(folder, modality, items)
    return {
        "tokenizer": tokenizer.name,
        "fitted": not tokenizer.fitted or (folder.tokenizer(modality) / "tokenizer.json").is_file(),
        "options": tokenizer.options,
        "samples": sum(folder.info().splits.values()),
    }
