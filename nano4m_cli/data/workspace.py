"""Where things are: the workspace layout of DESIGN.md section 2, and the choice of a default data set or run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nano4m_cli.config import build
from nano4m_cli.data.sources._base import DatasetInfo
from nano4m_cli.errors import DataError, UnknownNameError


@dataclass(frozen=True)
class DatasetFolder:
    """Paths of one data set."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def info_path(self) -> Path:
        return self.path / "raw" / "dataset.json"

    def raw(self, split: str) -> Path:
        return self.path / "raw" / split

    def tokens(self, modality: str, split: str | None = None) -> Path:
        base = self.path / "tokens" / modality
        return base if split is None else base / split

    def spec_path(self, modality: str) -> Path:
        return self.tokens(modality) / "spec.json"

    def tokenizer(self, modality: str) -> Path:
        return self.path / "tokenizers" / modality

    def judge(self, name: str) -> Path:
        return self.path / "judges" / name

    def info(self) -> DatasetInfo:
        """Return dataset.json; missing or broken is a DataError that names the file."""
        try:
            data = json.loads(self.info_path.read_text())
        except FileNotFoundError as err:
            raise DataError(f"data set '{self.name}' has no raw/dataset.json", "run 'nano4m fetch' again") from err
        except ValueError as err:
            raise DataError(f"{self.info_path} is not valid JSON: {err}") from err
        return build(DatasetInfo, data, str(self.info_path))

    def tokenised(self) -> list[str]:
        """Return the modalities that have a spec.json."""
        return sorted(p.parent.name for p in (self.path / "tokens").glob("*/spec.json"))


@dataclass(frozen=True)
class Workspace:
    """A root folder with `data/` and `runs/`."""

    root: Path

    @classmethod
    def at(cls, root: str | os.PathLike | None = None) -> Workspace:
        """Return the workspace at `root`, else at NANO4M_ROOT, else in the current folder."""
        return cls(Path(root or os.environ.get("NANO4M_ROOT") or "."))

    @property
    def cache(self) -> Path:
        return self.root / "data" / ".cache"

    def datasets(self) -> list[DatasetFolder]:
        """Return all data sets, newest first."""
        found = [p.parent.parent for p in (self.root / "data").glob("*/raw/dataset.json")]
        return [DatasetFolder(p) for p in sorted(found, key=lambda p: -(p / "raw" / "dataset.json").stat().st_mtime_ns)]

    def dataset(self, name: str | None = None) -> DatasetFolder:
        """Return the data set of that name; without one the only one, else the newest."""
        known = self.datasets()
        if name is None:
            if not known:
                raise DataError(f"no data set in {self.root / 'data'}", "run 'nano4m fetch scenes' first")
            return known[0]
        for folder in known:
            if folder.name == name:
                return folder
        if not known:
            raise DataError(f"no data set '{name}' in {self.root / 'data'}", f"run 'nano4m fetch {name}' first")
        raise UnknownNameError.of("data set", name, [f.name for f in known])

    def runs(self) -> list[Path]:
        """Return all runs of models, newest first (fitting a tokenizer is a run as well, but none to evaluate)."""
        configs = (self.root / "runs").glob("*/config.yaml")
        found = [p.parent for p in configs if not p.read_text().startswith("task: tokenizer")]
        return sorted(found, key=lambda p: -(p / "config.yaml").stat().st_mtime_ns)

    def run(self, name: str | None = None) -> Path:
        """Return the run folder of that name (or path); without one the newest."""
        known = self.runs()
        if name is None:
            # A run that failed before its first checkpoint does not hide an older good one.
            known = [p for p in known if any((p / "checkpoints").glob("step-*"))] or known
            if not known:
                raise DataError(f"no run in {self.root / 'runs'}", "run 'nano4m train cfgs/demo.yaml' first")
            return known[0]
        if (Path(name) / "config.yaml").is_file():
            return Path(name)
        for path in known:
            if path.name == name:
                return path
        raise UnknownNameError.of("run", name, [p.name for p in known])
