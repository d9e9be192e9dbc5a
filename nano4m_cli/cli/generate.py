"""`nano4m generate`: a run and a condition to media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nano4m_cli.cli._options import Device, Json, Quiet, Root, by_one_process, names, pick_device, share
from nano4m_cli.cli._show import Show
from nano4m_cli.errors import UsageError


def command(
    given: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="M=VALUE", help="Text or file (repeatable); M alone: as in --sample."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--to", metavar="M[,M]", help="What to generate, one after the other.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="M:PART", help="Use only this part of M; with --to M make the rest.")
    ] = None,
    away: Annotated[
        list[str] | None, typer.Option("--not", metavar="M=VALUE", help="A condition to move away from (repeatable).")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", metavar="M=W", help="Guidance by this condition alone (repeatable).")
    ] = None,
    sample: Annotated[str | None, typer.Option("--sample", metavar="KEY", help="Conditions as in this sample.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML: a request, maybe step by step.")] = None,
    requests: Annotated[Path | None, typer.Option("--requests", metavar="FILE", help="JSONL: a request a line.")] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Only the I-th of N shares of --requests, from 0.")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Open a page on this machine to try the run by hand (needs gradio).")] = False,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, metavar="N", help="Of --ui (default: 7860 on).")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Default: the newest run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where files go.")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, metavar="N", help="How many (default: 1).")] = None,
    best_of: Annotated[
        int | None, typer.Option("--best-of", min=1, metavar="N", help="Draw N candidates of each sample and keep the best.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", metavar="R", help="What is best: likelihood (default), cycle or judge.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, metavar="N", help="Samples at a time, of --requests.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Same seed, same media.")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", metavar="S", help="auto, roar, maskgit, ar, onepass or mean.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Model calls per modality.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="S", help="linear, cosine, or shares of slots per step (1,2,4).")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option("--temperature", metavar="T", help="Of grids and codes (0: greedy); a number or ramp.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option("--noise", metavar="T", help="Of maskgit's confidence (default: the temperature).")
    ] = None,
    text_temperature: Annotated[float | None, typer.Option("--text-temperature", metavar="T", help="Of text.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="The K likeliest ids only.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="P", help="The ids that hold share P only.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", metavar="P", help="Ids no less likely than P of the likeliest.")] = None,
    repetition: Annotated[
        float | None, typer.Option("--repetition", metavar="R", help="Penalty on ids a text holds already (1: none).")
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option("--guidance", metavar="S", help="Pull of conditions (1: plain; default: 2.5 if trained for); or a ramp."),
    ] = None,
    refresh: Annotated[
        int | None,
        typer.Option("--refresh", min=0, metavar="R", help="Read earlier slots anew every R steps only: faster (default: always)."),
    ] = None,
    draft: Annotated[
        int | None,
        typer.Option("--draft", min=1, metavar="K", help="Draft K ids of text and sound at a time, then check: fewer model calls."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="P", help="fp32, or bf16: quicker where hardware multiplies it.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Generate modalities from others with a trained run.

    \b
    nano4m generate --from caption="a large red metal sphere" --to rgb,audio
    nano4m generate --from rgb=photo.png --to caption -n 4
    nano4m generate --sample test-000000007 --from depth --to rgb
    nano4m generate --from rgb=photo.png --keep rgb:left-half --to rgb
    nano4m generate --from caption="a red cube" --not caption="a blue cube" --to rgb
    nano4m generate --requests requests.jsonl --out made
    nano4m generate --requests requests.jsonl --out made --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
    nano4m generate --ui

    PART: left-half, right-half, top-half, bottom-half, centre, border; 0.5 (the first half); 0-0.5s (sound, video); or a
    picture whose white is kept. Several of one M: what stands in all of them. A ramp: 1..0.2 evenly over the steps, 1..0.2^2
    as a power. Filters: temperature first, then top-k, top-p, min-p.

    RANK: likelihood, of what was made given the conditions; cycle, of the conditions given what was made; judge, an
    independent classifier's, of what the conditions name. The first candidate is what is made without --best-of.

    A request (a recipe, a line of --requests) has the keys from, keep, not, sample, to or chain, n, and these options; chain
    is a list of steps, each with to, given (what it sees), keep and its own options; a line may have an id.

    --json: {run, out, files: [path], texts: [{modality, text}], notices: [text], ids_per_call: {modality: number},
    best_of: {rank, scores, chosen}}; with --requests {run, out, manifest, made: [id], kept: [id], failed: [{line, id, error,
    hint}], samples, seconds, samples_per_s}.
    """
    show = Show(as_json, quiet)
    by_one_process("nano4m generate runs", "without torchrun; --requests FILE --shard I/N gives each of N jobs a share")
    options = {
        "scheme": scheme, "steps": steps, "schedule": schedule, "temperature": temperature, "noise": noise,
        "text_temperature": text_temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition": repetition,
        "guidance": guidance, "refresh": refresh, "draft": draft, "precision": precision, "seed": seed, "n": n,
        "best_of": best_of, "rank": rank, "weights": read_weights(weight or []),
    }
    options = {k: v for k, v in options.items() if v not in (None, {})}
    asked: dict[str, Any] = {
        "from": read_conditions(given or [], sample is not None), "not": read_conditions(away or [], False, "--not"),
        "keep": list(keep or []), "to": names(targets), "sample": sample,
    }
    asked = {k: v for k, v in asked.items() if v}
    if port is not None and not ui:
        raise UsageError("--port goes with --ui")
    if ui:
        for name, value in (("--recipe", recipe), ("--requests", requests), ("--out", out), ("--json", as_json), *(
                (f"--{k.replace('_', '-')}", v) for k, v in {**asked, **options}.items())):
            if value:
                raise UsageError("--ui asks on its page what is to be made", f"leave out {name}")
        _page(show, root, run, device, port)
        return
    if requests is not None:
        if recipe or asked:
            raise UsageError("--requests says itself what is asked", f"leave out --{'recipe' if recipe else next(iter(asked))}")
        _bulk(show, root, run, requests, out, options, device, batch, share(shard))
        return
    for name, value in (("--batch", batch), ("--shard", shard)):
        if value is not None:
            raise UsageError(f"{name} goes with --requests")
    if recipe is None and "to" not in asked:
        raise UsageError("generate needs --to", "for example --to rgb")
    from nano4m_cli.config import build, load_yaml
    from nano4m_cli.data.workspace import Workspace

    workspace = Workspace.at(root)
    show.say(f"run: {workspace.run(run)}")
    from nano4m_cli.generate.command import Request, generate_files

    data = load_yaml(recipe) if recipe else {}
    request = build(Request, {**data, **asked, **options}, str(recipe) if recipe else "generate")
    more = {"judges": _judges()} if {**data, **options}.get("rank") == "judge" else {}
    report = generate_files(workspace, run, request, out, pick_device(device), **more)
    for notice in report.notices:
        show.say(f"notice: {notice}")
    for modality, text in report.texts:
        show.line(f"{modality}: {text}")
    for modality, rate in report.ids_per_call.items() if draft else ():
        show.say(f"{modality}: {rate:.3g} ids per model call")
    for file in report.files:
        show.line(str(file))
    texts = [{"modality": modality, "text": text} for modality, text in report.texts]
    show.document({
        "run": report.run, "out": report.out, "files": report.files, "texts": texts, "notices": report.notices,
        "ids_per_call": report.ids_per_call, **({} if report.best is None else {"best_of": report.best}),
    })


def _page(show: Show, root, run, device, port: int | None) -> None:
    from nano4m_cli.data.workspace import Workspace
    from nano4m_cli.generate.ui import load_gradio, serve
    from nano4m_cli.train.run import open_run

    workspace = Workspace.at(root)
    show.say(f"run: {workspace.run(run)}")
    load_gradio()  # before the run is read
    serve(open_run(workspace, run, pick_device(device)), _judges(), port, lambda url: show.line(f"{url} (Ctrl-C ends it)"))


def _judges():
    """Return what gives the judge of a data set's modality: it belongs to evaluation, which generation does not know."""
    from nano4m_cli.probes._judges import judge_of

    return judge_of


def _bulk(show: Show, root, run, requests: Path, out: Path | None, options: dict[str, Any], device, batch: int | None,
          part: tuple[int, int]) -> None:
    """Make the requests of a file; exit 1 where one could not be made."""
    from nano4m_cli.data.workspace import Workspace
    from nano4m_cli.generate.requests import BATCH, generate_requests

    workspace = Workspace.at(root)
    path = workspace.run(run)
    show.say(f"run: {path}")
    folder = out or workspace.root / "generated" / f"{path.name}-{requests.stem}"
    with show.work() as work:
        report = generate_requests(
            workspace, run, requests, folder, options, pick_device(device), batch or BATCH, work.progress, _judges(), part
        )
    for bad in report.failed:
        hint = f"; {bad['hint']}" if bad["hint"] else ""
        typer.echo(f"error: line {bad['line']} ({bad['id']}): {bad['error']}{hint}", err=True)
    rate = "" if report.samples_per_s is None else f", {report.samples_per_s:.3g} samples/s"
    show.say(f"{len(report.made)} made{rate}; {len(report.kept)} were there; {len(report.failed)} failed")
    show.line(str(report.manifest))
    show.document({
        "run": report.run, "out": report.out, "manifest": report.manifest, "made": report.made, "kept": report.kept,
        "failed": report.failed, "samples": report.samples, "seconds": report.seconds, "samples_per_s": report.samples_per_s,
    })
    if report.failed:
        raise typer.Exit(1)


def read_weights(given: Sequence[str]) -> dict[str, str]:
    """Return {modality: weight} of "modality=weight" items."""
    out: dict[str, str] = {}
    for item in given:
        modality, _, value = item.partition("=")
        if not modality or not value:
            raise UsageError(f"--weight '{item}' is not of the form M=W", "for example --weight caption=3")
        if modality in out:
            raise UsageError(f"--weight gives '{modality}' twice", "give each modality once")
        out[modality] = value
    return out


def read_conditions(given: Sequence[str], from_sample: bool, option: str = "--from") -> dict[str, str | None]:
    """Return {modality: value} of "modality=value" items; with --sample the value may be left out (None)."""
    out: dict[str, str | None] = {}
    for item in given:
        modality, eq, value = item.partition("=")
        if not modality or not (eq or from_sample):
            raise UsageError(f"{option} '{item}' is not of the form M=VALUE", f'for example {option} caption="a red cube"')
        if modality in out:
            raise UsageError(f"{option} gives '{modality}' twice", "give each modality once")
        out[modality] = value if eq else None
    return out
