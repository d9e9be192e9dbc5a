"""`nano4m probe`: a run's frozen features to what is in them."""

from __future__ import annotations

from typing import Annotated

import typer

from nano4m_cli.cli._options import Device, Json, Quiet, Root, by_one_process, names
from nano4m_cli.cli._probing import list_probes, run_probes
from nano4m_cli.cli._show import Show


def command(
    probes: Annotated[list[str] | None, typer.Argument(metavar="PROBE|P.KEY=VALUE", help="See --list.")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Default: the newest run.")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Default: test.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most N samples.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the probes.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Measure what a run's frozen features hold (default: every probe of features).

    \b
    nano4m probe linear
    nano4m probe attentive attentive.steps=400
    nano4m probe --list
    torchrun --nproc_per_node=4 -m -- nano4m_cli probe

    --json: as of eval.
    """
    show = Show(as_json, quiet)
    if list_:
        by_one_process("lists are made")
        list_probes(show, "probe")
    else:
        settings = [p for p in probes or [] if "=" in p]
        run_probes(show, "probe", root, run, names([p for p in probes or [] if "=" not in p]), split, limit, device, settings)
