"""`nano4m generate`: a run and a condition to media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nano4m_cli.cli._options import Device, Json, Quiet, Root, names, pick_device
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
    sample: Annotated[str | None, typer.Option("--sample", metavar="KEY", help="Conditions as in this sample.")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Default: the newest run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where files go.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, metavar="N", help="How many.")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Same seed, same media.")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", metavar="S", help="auto, roar, maskgit, ar, onepass or mean.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Model calls per modality.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Of grids and codes (0: greedy).")
    ] = None,
    text_temperature: Annotated[float | None, typer.Option("--text-temperature", metavar="T", help="Of text.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="The K likeliest ids only.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="P", help="The ids that hold share P only.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="S", help="Pull of conditions (1: plain; default: 2.5 if trained for).")
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

    --json: {run, out, files: [path], texts: [{modality, text}], notices: [text]}.
    """
    show = Show(as_json, quiet)
    wanted = names(targets)
    if not wanted:
        raise UsageError("generate needs --to", "for example --to rgb")
    conditions = read_conditions(given or [], sample is not None)
    asked = {
        "scheme": scheme, "steps": steps, "temperature": temperature, "text_temperature": text_temperature,
        "top_k": top_k, "top_p": top_p, "guidance": guidance, "seed": seed,
    }
    from nano4m_cli.config import build
    from nano4m_cli.data.workspace import Workspace

    workspace = Workspace.at(root)
    show.say(f"run: {workspace.run(run)}")
    from nano4m_cli.generate.command import GenerateOptions, generate_files

    options = build(GenerateOptions, {k: v for k, v in asked.items() if v is not None}, "generate")
    report = generate_files(workspace, run, conditions, sample, wanted, options, out, n, pick_device(device))
    for notice in report.notices:
        show.say(f"notice: {notice}")
    for modality, text in report.texts:
        show.line(f"{modality}: {text}")
    for file in report.files:
        show.line(str(file))
    texts = [{"modality": modality, "text": text} for modality, text in report.texts]
    show.document({
        "run": report.run, "out": report.out, "files": report.files, "texts": texts, "notices": report.notices,
    })


def read_conditions(given: Sequence[str], from_sample: bool) -> dict[str, str | None]:
    """Return {modality: value} of "modality=value" items; with --sample the value may be left out (None)."""
    out: dict[str, str | None] = {}
    for item in given:
        modality, eq, value = item.partition("=")
        if not modality or not (eq or from_sample):
            raise UsageError(f"--from '{item}' is not of the form M=VALUE", 'for example --from caption="a red cube"')
        if modality in out:
            raise UsageError(f"--from gives '{modality}' twice", "give each modality once")
        out[modality] = value if eq else None
    return out
