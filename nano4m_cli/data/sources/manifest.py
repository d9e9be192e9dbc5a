"""Lists of videos by id or address, as VGGSound and AudioSet publish them: downloaded politely, then cut as `folder` does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.download import download
from nano4m_cli.data.sources import folder
from nano4m_cli.data.sources._base import DatasetInfo, Failure
from nano4m_cli.data.sources._folder_items import ROLE, Item, captioned, read_table, seconds_of, split_of
from nano4m_cli.errors import DataError, FetchError, did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    "vggsound": {"columns": ["id", "start", "label", "split"], "length": 10.0, "label": "label", "caption": "{label}"},
    "audioset": {"columns": ["id", "start", "end", "labels"]},
}
ID = r"[A-Za-z0-9_-]{1,80}"
YOUTUBE = "https://www.youtube.com/watch?v={id}"


class Row(NamedTuple):
    """A row of the list: the part of a video that is meant, and where it stood."""

    id: str
    start: float
    end: float | None
    split: str | None
    labels: dict[str, str]


class Source(folder.Source):
    """Media that are in `path` already are used as they are: ID.mp4 whole, or ID_000030.mp4 cut (from second 30 on)."""

    class Options(folder.Source.Options):
        """What to fetch; the other options are those of `folder`.

        Attributes:
            csv: the list, with columns id, and perhaps start, end, split and labels.
            preset: whose list it is, where its first line does not name the columns: vggsound, audioset.
            path: where media are, or are downloaded to; the cache by default.
            url: address of a row, by its columns: "https://host/{id}.mp4"; other than media files need yt-dlp.
            length: seconds of a part without an end.
            classes: only rows with one of these labels (`label=` says in which column). splits: only rows of these.
            limit: rows per split at most, in the order of the list.
            download: whether what is missing is downloaded; null: tried, but not again what failed before.
            jobs, wait: downloads at once, and seconds that each waits after one.
            max_mb: larger files are refused.
        """

        path: str = ""
        csv: str
        preset: Literal["vggsound", "audioset"] | None = None
        url: str = YOUTUBE
        length: float | None = Field(None, gt=0)
        classes: list[str] = []
        splits: list[str] = []
        limit: int | None = Field(None, ge=1)
        download: bool | None = None
        jobs: int = Field(4, ge=1, le=32)
        wait: float = Field(0.5, ge=0)
        max_mb: float = Field(500, gt=0)

        @model_validator(mode="before")
        @classmethod
        def _preset(cls, given: Any) -> Any:
            usual = PRESETS.get(given.get("preset"), {}) if isinstance(given, dict) else {}
            return {**usual, **given} if usual else given

    version = 1

    @property
    def place(self) -> Path:
        return Path(self.options.path).expanduser() if self.options.path else self.cache / Path(self.options.csv).stem

    # -- the list -------------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> tuple[list[Row], list[Failure]]:
        """Return the rows that are wanted, and those that cannot be: no id, no time, a video of two splits."""
        o, table = self.options, Path(self.options.csv).expanduser()
        columns, lines = read_table(table, o.columns)
        for option, column in (("id", "id"), ("label", o.label), ("split", o.split), ("text", o.text)):
            if column is not None and column not in columns:
                raise FetchError(f"'{table}' has no column '{column}' ({option})", did_you_mean(column, columns))
        split = o.split or ("split" if "split" in columns else None)
        known = {row[o.label] for _, row in lines} if o.label else set()
        for name in o.classes:
            if name not in known:
                raise FetchError(f"'{table}' has no class '{name}'", did_you_mean(name, known))
        rows: list[Row] = []
        failures: list[Failure] = []
        homes: dict[str, set[str | None]] = {}
        for number, row in lines:
            try:
                if not re.fullmatch(ID, row["id"]):
                    raise DataError("is no id of a video")
                start, end = seconds_of(row, "start", 0.0), seconds_of(row, "end", None)
                home = split_of(row[split], o) if split else None
                labels = {c: v for c, v in row.items() if c not in ("id", "start", "end", split) and v}
                rows.append(Row(row["id"], start, end or (start + o.length if o.length else None), home, labels))
                homes.setdefault(row["id"], set()).add(home)
            except DataError as err:
                failures.append(Failure(f"{table.name}, line {number}: '{row['id']}'", err.message))
        wanted: list[Row] = []
        count: dict[str | None, int] = {}
        for row in rows:
            others = homes[row.id] - {row.split}
            if (o.classes and row.labels.get(o.label) not in o.classes) or (o.splits and row.split not in o.splits):
                continue
            if others and folder.SPLITS.index(row.split) < max(folder.SPLITS.index(s) for s in others):
                failures.append(Failure(row.id, f"stands in split {' and '.join(sorted(others))} as well (a {row.split} row)"))
                continue
            count[row.split] = count.get(row.split, 0) + 1
            if o.limit is None or count[row.split] <= o.limit:
                wanted.append(row)
        return wanted, failures

    @cached_property
    def _found(self) -> tuple[list[Item], list[Failure]]:
        rows, failures = self._rows
        there, reasons = self._there, self._reasons
        items, failed = [], list(failures)
        for row in rows:
            name, cut = f"{row.id}@{row.start:g}", there.get(f"{row.id}_{round(row.start):06d}")
            path = cut or there.get(row.id)
            if path is None:
                failed.append(Failure(row.id, reasons.get(row.id, "is not there, and was not to be downloaded")))
                continue
            window = {} if cut else {"start": row.start, "end": row.end}
            caption = row.labels.get(self.options.text or "caption")
            items.append(Item(name, {ROLE[path.suffix.lower()]: str(path)}, caption, row.labels, row.split, row.id, **window))
        if not items:
            listed = "; ".join(f"{f.file} {f.reason}" for f in failed[:3])
            raise FetchError(f"none of the {len(rows)} videos of '{self.options.csv}' can be had: {listed}")
        return captioned(items, self.options.caption), failed

    @property
    def _there(self) -> dict[str, Path]:
        """Return the media in the folder by name without suffix."""
        found = self.place.iterdir() if self.place.is_dir() else []
        return {p.stem: p for p in sorted(found) if ROLE.get(p.suffix.lower()) in ("video", "audio") and not p.name.startswith(".")}

    # -- downloads ------------------------------------------------------------------------------------------------

    @property
    def _reasons(self) -> dict[str, str]:
        """Return why videos could not be had, by id, as it was written down."""
        path = self.place / "failed.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        _ = self.weights  # what is missing is told of before anything is downloaded
        rows, _ = self._rows
        there, reasons = self._there, self._reasons
        missing = {r.id: r for r in rows if r.id not in there and f"{r.id}_{round(r.start):06d}" not in there}
        if self.options.download is None:
            missing = {i: r for i, r in missing.items() if i not in reasons}
        if self.options.download is not False and missing:
            self.place.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(self.options.jobs) as pool:
                try:
                    for done, (video, reason) in enumerate(pool.map(self._get, missing.values()), 1):
                        reasons.pop(video, None)
                        if reason:
                            reasons[video] = reason
                        if reason or done == len(missing):
                            write_json(self.place / "failed.json", reasons)
                        progress("downloads", done, len(missing))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        super().prepare(progress)

    def _get(self, row: Row) -> tuple[str, str]:
        """Download the video of a row; return (its id, why it could not be had or "")."""
        o = self.options
        fields = {"id": row.id, **row.labels}
        url = re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), o.url)
        suffix = Path(urlsplit(url).path).suffix.lower()
        try:
            if ROLE.get(suffix) in ("video", "audio"):
                download(url, self.place / f"{row.id}{suffix}", retries=2, max_bytes=round(o.max_mb * 1e6))
            else:
                by_yt_dlp(url, self.place, row.id, o.max_mb)
        except FetchError as err:
            return row.id, err.message
        finally:
            time.sleep(o.wait)
        return row.id, ""

    def info(self) -> DatasetInfo:
        made = super().info()
        options = {k: v for k, v in made.options.items() if k not in ("download", "jobs", "wait", "max_mb", "csv")}
        name = self.options.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.options.csv).stem).strip("-.")
        notes = made.notes.replace(f"of {Path(self.options.path).name}", f"of {Path(self.options.csv).name}", 1)
        return made.model_copy(update={"name": name, "source": "manifest", "options": options, "notes": notes})


def by_yt_dlp(url: str, place: Path, name: str, max_mb: float) -> None:
    """Download a video from a page by yt-dlp, whole and in one file of modest size; what fails is a FetchError.

    The file gets its name when it is whole.
    """
    try:
        import yt_dlp
    except ImportError as err:
        raise FetchError("yt-dlp is not installed: pip install 'nano4m[video]'") from err

    class Silent:
        def debug(self, _: str) -> None: ...
        warning = error = info = debug

    aside = place / f".{name}"
    options = {
        "outtmpl": f"{aside}.%(ext)s", "format": "best[height<=480]/best", "noplaylist": True, "retries": 2, "quiet": True,
        "noprogress": True, "logger": Silent(), "max_filesize": round(max_mb * 1e6), "cachedir": False, "overwrites": True,
        "socket_timeout": 30, "allowed_extractors": ["default"], "enable_file_urls": False,
    }
    try:
        with yt_dlp.YoutubeDL(options) as box:
            box.download([url])
    except yt_dlp.utils.YoutubeDLError as err:
        said = re.sub(r"\x1b\[[0-9;]*m", "", str(err)).removeprefix("ERROR: ").splitlines()
        raise FetchError(said[0] if said else type(err).__name__) from err
    made = [p for p in place.glob(f".{name}.*") if p.suffix.lower() in ROLE]
    if not made:
        raise FetchError(f"yt-dlp gave no file (larger than {max_mb:g} MB, or no kind of media that is read here)")
    made[0].rename(place / f"{name}{made[0].suffix}")
