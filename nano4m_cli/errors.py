"""The exception tree. Users see `Nano4MError`s as message + hint; anything else is a bug and keeps its traceback.

    Nano4MError                exit 1
      UsageError               exit 2   what was typed
        ConfigError              a config file or an override
        UnknownNameError         a name that no registry holds, with the nearest known one
      DataError                  data on disk or given by the user
        ShardError               a tar, its index or a member
        AlignmentError           shards of one data set that do not fit each other
        MediaError               a picture, sound or text that cannot be used
        TokenError               ids outside their vocabulary, or of the wrong shape
      FetchError                 a download or a source that failed
      WeightsError               weights that are missing or do not fit
      CheckpointError            a checkpoint that is missing or of another run
        DamagedError               one whose files are not what was written
      TrainingError              training cannot go on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Nano4MError(Exception):
    """An error for users: what is wrong with which thing, and what to do about it.

    said: another process of the run says it. known: all processes of the run raise it.
    """

    exit_code = 1
    said = known = False

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self):  # crosses process pools with its hint
        return (type(self), (self.message, self.hint))


class UsageError(Nano4MError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class UnknownNameError(UsageError):
    """A name that is not known; the hint gives the nearest one, or all of them."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        return cls(f"unknown {kind} '{name}'", did_you_mean(name, known))


class DataError(Nano4MError):
    pass


class ShardError(DataError):
    pass


class AlignmentError(DataError):
    pass


class MediaError(DataError):
    pass


class TokenError(DataError):
    pass


class FetchError(Nano4MError):
    pass


class WeightsError(Nano4MError):
    pass


class CheckpointError(Nano4MError):
    pass


class DamagedError(CheckpointError):
    pass


class TrainingError(Nano4MError):
    pass


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    if near:
        return f"did you mean '{near[0]}'?"
    return "known: " + (", ".join(known) if known else "(none)")
