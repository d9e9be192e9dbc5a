"""The app: commands imported on demand, and the one place where errors become lines on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from nano4m_cli import __version__
from nano4m_cli.errors import Nano4MError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from nano4m_cli.train.loop import Stopped

COMMANDS = ("fetch", "tokenize", "train", "generate", "eval", "probe")  # each is cli/NAME.py with a `command`
SETTINGS = {"help_option_names": ["-h", "--help"]}
PLAIN = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
# What a user's disk does to us; any other OSError is a bug and keeps its traceback.
DISK = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG,
        errno.ENOTDIR, errno.EEXIST)


def complain(message: str, hint: str | None = None) -> None:
    typer.echo(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """Say what a user must read and exit with its code; bugs pass, with their traceback."""
    try:
        yield
    except Nano4MError as err:
        if not err.said:
            complain(err.message, err.hint)
        raise typer.Exit(err.exit_code) from err
    except typer.TyperException as err:
        complain(*_of_command_line(err))
        raise typer.Exit(err.exit_code) from err
    except KeyboardInterrupt as err:
        complain("interrupted")
        raise typer.Exit(130) from err
    except OSError as err:
        if err.errno not in DISK:
            raise
        complain(f"{err.filename or 'disk'}: {err.strerror}")
        raise typer.Exit(1) from err


def _of_command_line(err: typer.TyperException) -> tuple[str, str | None]:
    """Return message and hint for what typer found wrong with the command line."""
    context = getattr(err, "ctx", None)
    help_hint = f"see '{context.command_path} --help'" if context else None
    name = getattr(err, "option_name", None)
    if name is None or not hasattr(err, "possibilities"):
        text = err.format_message().strip().removesuffix(".")
        return text[:1].lower() + text[1:], help_hint
    if context and context.parent is None:
        return f"unknown option '{name}' before the command", "options stand after it: nano4m COMMAND [OPTIONS]"
    if "." in name:
        return f"unknown option '{name}'", f"settings are written without dashes: {name.lstrip('-')}=VALUE"
    known = [o for p in context.command.get_params(context) for o in p.opts if o.startswith("--")] if context else []
    near = did_you_mean(name, known)
    return f"unknown option '{name}'", near if near.startswith("did") else help_hint


class Group(TyperGroup):
    """Imports cli/NAME.py when NAME is asked for, so that no command pays for another."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str):
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            one = typer.Typer(**PLAIN)
            function = importlib.import_module(f"nano4m_cli.cli.{cmd_name}").command
            one.command(cmd_name, context_settings=SETTINGS)(function)
            self.commands[cmd_name] = typer.main.get_command(one)
        if cmd_name not in COMMANDS and not ctx.resilient_parsing and not cmd_name.startswith("-"):
            raise UnknownNameError.of("command", cmd_name, COMMANDS)
        return self.commands.get(cmd_name)

    def get_help_option(self, ctx: typer.Context):
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # of None typer asks pydantic what it is: 70 ms for every --help
        return option

    def parse_args(self, ctx: typer.Context, args: list[str]) -> Sequence[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        with boundary():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context):
        with boundary():
            return super().invoke(ctx)


app = typer.Typer(name="nano4m", cls=Group, context_settings=SETTINGS, **PLAIN)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nano4m {__version__}")
        raise typer.Exit


@app.callback()
def nano4m(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train small any-to-any multimodal models, from raw media to an evaluated model:
    fetch -> tokenize -> train -> generate -> eval -> probe.

    stdout is data, stderr is for people. Exit codes: 0 done, 1 the work failed, 2 usage, 75 stopped by a signal
    (go on with --resume), 130 interrupted.
    """


STOPPED = 75  # the shell's EX_TEMPFAIL: not done, to be gone on with


def stopped(err: Stopped, saved: bool) -> typer.Exit:
    """Say where training stopped on a signal, and return the exit to raise.

    After SIGTERM or SIGUSR1 a saved run is in order (its scheduler starts it again), yet not done: a code of its own.
    """
    rest = "checkpoint saved; go on with --resume" if saved else "nothing saved"
    if err.speaks:
        typer.echo(f"stopped at step {err.step}, {rest}", err=True)
    return typer.Exit(130 if err.signum == signal.SIGINT else STOPPED if saved else 1)
