"""What the checks of the doctor share: findings, the report, and the opened shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nano4m_cli.data.shards import Shard
from nano4m_cli.data.workspace import DatasetFolder
from nano4m_cli.spec import TokenSpec

EXAMPLES = 5  # keys named in a finding


class Finding(NamedTuple):
    """What is wrong: severity "error" or "notice", where, with how many samples (of which a few keys), and what to do."""

    check: str
    severity: str
    modality: str
    split: str
    shard: str
    n: int
    keys: list[str]
    what: str
    hint: str


@dataclass
class Report:
    """Findings, and what was measured: samples per split and modality, the share of ids that encoding anew gives, use of
    each codebook, alignment of pictures, and the contact sheet."""

    samples: dict[str, dict[str, int]] = field(default_factory=dict)
    fresh: dict[str, float] = field(default_factory=dict)
    codes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    alignment: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    sheet: Path | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]


@dataclass
class Opened:
    """The readable shards of a data set by (what, split), what being "raw" or a modality, and its specs."""

    dataset: DatasetFolder
    modalities: list[str]
    splits: dict[str, int]
    brought: list[str]
    shards: dict[tuple[str, str], dict[str, Shard]] = field(default_factory=dict)
    specs: dict[str, TokenSpec] = field(default_factory=dict)

    def again(self, what: str) -> str:
        """Return what to do about shards that are wrong."""
        if what == "raw" or what in self.brought:
            return f"delete {self.dataset.path} and fetch it again" if what == "raw" else "look at the files it was fetched from"
        return f"delete {self.dataset.tokens(what)} and run 'nano4m tokenize --modality {what}'"

    def keys(self, what: str, split: str) -> dict[str, tuple[Shard, int]]:
        """Return where each sample is, in order."""
        return {k: (s, i) for s in self.shards.get((what, split), {}).values() for i, k in enumerate(s.keys)}


def finding(
    check: str, modality: str, split: str = "", shard: str = "", n: int | None = None, *, keys: Sequence[str] = (), what: str,
    hint: str = "", severity: str = "error",
) -> Finding:
    return Finding(check, severity, modality, split, shard, len(keys) if n is None else n, list(keys[:EXAMPLES]), what, hint)
