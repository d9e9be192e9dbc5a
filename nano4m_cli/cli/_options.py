"""Options that commands share, and how their values are read."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from nano4m_cli.errors import Nano4MError, UsageError

Root = Annotated[
    Path | None,
    typer.Option("--root", envvar="NANO4M_ROOT", metavar="DIR", help="The workspace (default: the current folder)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices, only errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="Processes (default: all cores).")]
DeviceName = Literal["auto", "cpu", "cuda"]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, where not the default.")]


def names(values: Iterable[str] | None) -> list[str]:
    """Return the names in options that may be repeated and may hold several with commas, each once."""
    return list(dict.fromkeys(n.strip() for v in values or () for n in v.split(",") if n.strip()))


def share(text: str | None) -> tuple[int, int]:
    """Return (i, n) of "i/n", (0, 1) of nothing."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UsageError(f"--shard {text} is not of the form I/N with I from 0 to N - 1", "for example --shard 0/4")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def said_once(first: bool) -> Iterator[None]:
    """Let the first process alone say what is wrong with the command line, which all of them read."""
    try:
        yield
    except Nano4MError as err:
        err.said = not first
        raise


def by_one_process(what: str, hint: str = "start it without torchrun") -> None:
    """Refuse several processes, as torchrun starts them, where each would do all of the work; the first says so."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from nano4m_cli import dist

    here = dist.place()
    with said_once(here.first):
        if here.ranks > 1:
            raise UsageError(f"{what} by one process, this is one of {here.ranks}", hint)


def pick_device(name: DeviceName) -> str:
    """Return the device to compute on; auto is CUDA where there is any."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("--device cuda: there is no CUDA device here", "use --device cpu, or leave it out")
    return "cuda" if there and name != "cpu" else "cpu"
