"""Where a command's words go: stdout is data (lines and tables, or one JSON document), stderr is for people.

On a terminal progress is a bar; elsewhere it is one line per tenth, or per training record.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SPEED = ("samples_per_s", "lr", "grad_norm")  # figures of a training record that are no losses
SECONDS = 10.0  # between lines on a transfer whose size is not known


class Show:
    """The output of one command.

    Args:
        as_json: `line` and `table` print nothing, `document` prints.
        quiet: nothing goes to stderr (errors are not said here).
        mute: nothing at all is printed: another process of the run speaks.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, mute: bool = False):
        self.as_json, self.quiet, self.mute = as_json, quiet or mute, mute
        self._live: Any = None  # the rich display that owns the terminal just now

    def mute_others(self, first: bool) -> None:
        """Let the first process of several speak alone."""
        self.mute, self.quiet = self.mute or not first, self.quiet or not first

    # -- stderr ---------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def work(self) -> Iterator[_Silent]:
        """Give what the core reports to: `.progress(what, done, total)` and `.record(step_record)`."""
        if self.quiet:
            yield _Silent()
        elif not on_terminal():
            yield _Lines(self.say)
        else:
            with _bars() as self._live:
                try:
                    yield _Bars(self._live, self.say)
                finally:
                    self._live = None

    # -- stdout ---------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        if not (self.as_json or self.mute):
            print(text, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print aligned columns, numbers to the right; as wide as they are, so that a pipe gets every character."""
        if not (self.as_json or self.mute):
            print("\n".join(table_lines(head, rows)), flush=True)

    def document(self, data: dict[str, Any]) -> None:
        if self.as_json and not self.mute:
            print(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def on_terminal() -> bool:
    """Return whether stderr can show bars."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def plain(value: Any) -> Any:
    """Return a value as JSON has it: paths as text, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else plain(_unboxed(value))


def _unboxed(value: Any) -> Any:
    """Return a pydantic model's mapping, or the Python number in a numpy one."""
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value.item()


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(cell(v) for v in value)
    return str(value)


def table_lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table (an empty head is left out); columns that hold only numbers stand to the right."""
    text = [[cell(v) for v in row] for row in rows]
    width = [max([len(h), *(len(row[i]) for row in text)]) for i, h in enumerate(head)]
    right = [all(v is None or isinstance(v, int | float) for v in column) for column in zip(*rows, strict=True)]
    right = right or [False] * len(head)

    def laid(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, width, right, strict=True)).rstrip()

    return ([laid(head)] if any(head) else []) + [laid(row) for row in text]


# -- what the core reports to -----------------------------------------------------------------------------------------


class _Silent:
    def progress(self, what: str, done: int, total: int) -> None:
        """Take note that `done` of `total` are done (total 0: not known)."""

    def record(self, record: Any) -> None:
        """Take a step record of the training loop."""


class _Lines(_Silent):
    """One line whenever another tenth is done, and one per step record."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.eta = say, _Eta()
        self.began: dict[str, tuple[float, int]] = {}
        self.last: dict[str, float] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began, first = self.began.setdefault(what, (now, done))
        mark = 10 * done // total if total else (now - began) // SECONDS
        if mark <= self.last.get(what, 0):
            return
        self.last[what] = mark
        rate = (done - first) / (now - began) if now > began else 0.0
        parts = [f"{what} {done}" + (f"/{total}" if total else "")]
        if rate > 0:
            parts.append(f"{rate:.4g}/s")
            if total > done:
                parts.append(f"eta {clock((total - done) / rate)}")
        self.say("  ".join(parts))

    def record(self, record: Any) -> None:
        text = record_line(record, self.eta(record))
        if text:
            self.say(text)


class _Bars(_Silent):
    """One bar per thing that advances; drawn here and by no thread, since the loop may fork loader workers."""

    def __init__(self, bars: Any, say: Callable[[str], None]):
        self.bars, self.say = bars, say
        self.tasks: dict[str, Any] = {}
        self.drawn = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        self._advance(what, done, total or None)

    def record(self, record: Any) -> None:
        if record.kind == "train":
            self._advance("train", record.step, record.steps, _figures(record.figures), _speed(record.figures))
        elif record_line(record):
            self.say(record_line(record))

    def _advance(self, what: str, done: int, total: int | None, note: str = "", rate: str = "") -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, note=note, rate=rate)
        self.bars.update(self.tasks[what], completed=done, total=total, note=note, rate=rate)
        if time.monotonic() - self.drawn > 0.1 or done == total:
            self.drawn = time.monotonic()
            self.bars.refresh()


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.fields["rate"] or (f"{task.speed:.4g}/s" if task.speed else ""))

    def whole() -> Column:
        return Column(no_wrap=True, min_width=4)

    columns = (
        TextColumn("{task.description}", table_column=whole()), BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=whole()), Rate(table_column=whole()), TimeRemainingColumn(table_column=whole()),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    return Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False)


class _Eta:
    """Seconds left, from the time between training records (None at the first)."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None

    def __call__(self, record: Any) -> float | None:
        if record.kind != "train":
            return None
        now = time.monotonic()
        if self.first is None or record.step <= self.first[1]:
            self.first = (now, record.step)
            return None
        return (record.steps - record.step) * (now - self.first[0]) / (record.step - self.first[1])


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    s = int(round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"


def record_line(record: Any, eta: float | None = None) -> str:
    """Return the line for a step record; empty for "done"."""
    if record.kind == "done":
        return ""
    if record.kind in ("damaged", "stall", "late", "skipped"):
        return record.note
    if record.kind == "checkpoint":
        return f"checkpoint saved at step {record.step}"
    if not record.figures:
        return ""
    parts = [f"step {record.step}/{record.steps}", _figures(record.figures), _speed(record.figures)]
    parts = (["val"] if record.kind == "val" else []) + parts + ([f"eta {clock(eta)}"] if eta is not None else [])
    return "  ".join(p for p in parts if p)


def _figures(figures: dict[str, float]) -> str:
    """Return "loss 4.123  rgb 5.321": cross-entropies go by their modality's name."""
    return "  ".join(f"{k.removeprefix('ce_')} {v:.4g}" for k, v in figures.items() if k not in SPEED)


def _speed(figures: dict[str, float]) -> str:
    return f"{figures['samples_per_s']:.4g} samples/s" if "samples_per_s" in figures else ""
