"""The contract of a probe. A probe file also states KIND = "eval" or "probe"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from nano4m_cli.config import Config
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings


class Probe(ABC):
    """Measures one thing, by itself or as one of several processes that share the work out (`Context.answers`, `Context.spread`).

    A change of what a figure means raises `version`. costly: it runs only where it is named. alone: why one process alone can
    measure it ("": several can).
    """

    class Options(Config):
        pass

    version: ClassVar[int] = 1
    costly: ClassVar[bool] = False
    alone: ClassVar[str] = ""

    def __init__(self, options: Config | None = None):
        self.options = options or self.Options()

    def missing(self, context: Context) -> str | None:
        """Return what run or data set lack for this probe, or None."""
        return None

    @abstractmethod
    def measure(self, context: Context) -> Findings:
        """Return figures, notes and plots."""
