"""ESC-50: 2,000 environmental sounds of five seconds in 50 classes (Piczak 2015), or its ten-class part ESC-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from nano4m_cli.data._atomic import atomic_folder
from nano4m_cli.data.download import download, extract
from nano4m_cli.data.sources import folder
from nano4m_cli.data.sources._base import DatasetInfo, Failure
from nano4m_cli.data.sources._folder_items import Item, by_csv, captioned
from nano4m_cli.errors import FetchError

URL = "https://github.com/karolpiczak/ESC-50/archive/refs/heads/master.zip"
LICENCE = "ESC-50 (Piczak 2015, doi:10.1145/2733373.2806390), CC-BY-NC-3.0; ESC-10 is CC-BY-3.0. No recording crosses folds."


class Source(folder.Source):
    """Fold 5 is the test split and fold 4 the val split, unless said otherwise; the caption names the class."""

    class Options(folder.Source.Options):
        """What to fetch; the other options are those of `folder`.

        Attributes:
            path: folder with audio/ and meta/esc50.csv; without it the repository is downloaded (600 MB).
            esc10: only the ten classes of ESC-10.
        """

        path: str = ""
        esc10: bool = False
        label: str | None = "category"
        split: str | None = "fold"
        group: str | None = "src_file"
        caption: str | None = "the sound of {category}"
        test_values: list[str] = ["5"]
        val_values: list[str] = ["4"]

    version = 1
    url: ClassVar[str] = URL

    @property
    def place(self) -> Path:
        if self.options.path:
            return Path(self.options.path).expanduser()
        found = sorted(self.cache.glob("files/*/meta/esc50.csv"))
        return found[0].parents[1] if found else self.cache / "files"

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        if not self.options.path and not (self.place / "meta").is_dir():
            archive = download(self.url, self.cache / "esc50.zip", progress=lambda done, total: progress("download", done, total),
                               hint="download it yourself and give path=DIR of the unpacked repository")
            with atomic_folder(self.cache / "files") as aside:
                extract(archive, aside)
        super().prepare(progress)

    @cached_property
    def _found(self) -> tuple[list[Item], list[Failure]]:
        table = self.place / "meta" / "esc50.csv"
        if not table.is_file():
            raise FetchError(f"'{self.place}' has no meta/esc50.csv", "give path=DIR of the unpacked ESC-50 repository")
        items, failures = by_csv(self.place / "audio", table, self.options)
        named = [replace(i, labels={**i.labels, "category": i.labels["category"].replace("_", " ")}) for i in items]
        wanted = [i for i in named if not self.options.esc10 or i.labels["esc10"] == "True"]
        return captioned(wanted, self.options.caption), failures

    def info(self) -> DatasetInfo:
        made, name = super().info(), "esc10" if self.options.esc10 else "esc50"
        return made.model_copy(update={"name": self.options.name or name, "source": "esc50", "notes": f"{LICENCE} {made.notes}"})
