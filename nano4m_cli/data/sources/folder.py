"""Your own media: videos, sounds and pictures in a folder, with captions and labels beside them or in a csv."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nano4m_cli import rng
from nano4m_cli.config import Config
from nano4m_cli.data._atomic import write_json
from nano4m_cli.data._settings import PLACE, made
from nano4m_cli.data.filters._base import dropped_by
from nano4m_cli.data.media import SLACK
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources._base import Attribute, DatasetInfo, Failure, Sample, ShardPlan, Transcript
from nano4m_cli.data.sources._folder_clips import inspect, labels_for, read_clips
from nano4m_cli.data.sources._folder_items import ROLE, Item, by_csv, by_stem, captioned, key_of
from nano4m_cli.data.sources._folder_near import without_repeats
from nano4m_cli.errors import FetchError, did_you_mean
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.modalities.video import PIXELS
from nano4m_cli.registry import FILTERS, LABELS, MODALITIES, Registry

ORDER = ("rgb", "depth", "normal", "audio", "video", "caption")
SPLITS = ("train", "val", "test")


class Source(_base.Source):
    """Videos are cut into clips of one length, with key frames and their sound; every file is read once before anything is
    written, so that what is broken is known and listed, and the rest arrives."""

    class Options(Config):
        """What to fetch.

        Attributes:
            path: the folder. Files of one path but for the suffix belong together: x.mp4, x.depth.png, x.txt, x.json.
            csv: a table instead (path relative to the folder or absolute): columns file, path, video, audio, rgb, image,
                depth, normal, edges name files, start and end the part that is meant, in seconds; text=, label=, split=,
                group= name columns. test_values and val_values say which values of the split column are which (the others
                are train). columns: their names, for a table whose first line does not hold them.
            name: of the data set; the folder's name by default.
            modalities: which to take; by default those that at least half of the items have.
            seconds: length of clips and sounds; what is shorter is padded with silence.
            every: seconds from the start of one clip to the next; null: `seconds`.
            size: pictures are cropped to their central square and resized to so many pixels.
            video, fps: whether modality video is kept, `fps` frames a second of each clip; its last frame stands where it is
                shorter than `seconds`.
            frames, pick: key frames of each clip, "even" in time or after a "scene" change; each is a sample of its own.
            transcripts: captions are what is said in the sound, word for word, and not what describes it: evaluations of speech
                need that. What lasts longer than `seconds` is then left out, since its caption is that of the whole.
            caption: caption of items without one, made from labels: "a sound of {class}".
            label: the label that evaluations ask for, as an attribute.
            val, test: shares of these splits where no split is given; items of one group, or of the same bytes, stay together.
            derive: pseudo-labels, made on exactly the pixels that are kept, where an item has none of its own: edges, depth,
                dsine (normals), caption (of rgb), normal (of depth).
            filter: names of filters (black, clip, clipping, frozen, panns, silence, silero); thresholds: others than their
                usual ones. What they leave out is listed with its scores in left_out.json, labels.json has those of the rest.
            distinct: leave out clips whose rgb, audio, or both if both are given, nearly equal those of an earlier clip: the same
                after re-encoding, rescaling or another volume (left_out.json tells which clip they repeat).
            settings: of filters and of what is derived, given as NAME.KEY=VALUE: panns.weights=DIR panns.reject=[Speech].
            broken: "report" ends with exit 1 after all the rest was made, "skip" with exit 0.
        """

        path: str
        csv: str | None = None
        columns: list[str] = []
        name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        modalities: list[str] = []
        seconds: float = Field(5.0, gt=0, le=600)
        every: float | None = Field(None, gt=0)
        size: int = Field(64, ge=8, le=4096)
        video: bool = False
        fps: float = Field(8.0, gt=0, le=120)
        frames: int = Field(1, ge=1, le=64)
        pick: Literal["even", "scene"] = "even"
        transcripts: bool = False
        caption: str | None = None
        text: str | None = None
        label: str | None = None
        split: str | None = None
        group: str | None = None
        test_values: list[str] = ["test"]
        val_values: list[str] = ["val"]
        val: float = Field(0.05, ge=0, lt=1)
        test: float = Field(0.05, ge=0, lt=1)
        derive: list[str] = []
        filter: list[str] = []
        thresholds: dict[str, float] = {}
        distinct: list[Literal["rgb", "audio"]] = []
        settings: dict[str, dict[str, Any]] = {}
        broken: Literal["report", "skip"] = "report"
        shard_size: int = Field(1000, ge=1)

        @model_validator(mode="before")
        @classmethod
        def _sections(cls, given: Any) -> Any:
            if not isinstance(given, dict):
                return given
            usual = lambda k, v: k in cls.model_fields and list(v.values()) == [None]  # noqa: E731 - caption={class}
            found = {k: v for k, v in given.items()
                     if (k in FILTERS or k in LABELS) and isinstance(v, dict) and not usual(k, v)}
            rest = {k: v for k, v in given.items() if k not in found}
            return {**rest, "settings": {**given.get("settings", {}), **found}} if found else given

        @property
        def moving(self) -> int:
            """Frames of each video that is kept; 0: none is."""
            return max(round(self.seconds * self.fps), 1) if self.video else 0

        @model_validator(mode="after")
        def _of_video(self) -> Self:
            if self.moving * self.size**2 > PIXELS:
                raise ValueError(f"videos of {self.moving} frames of size {self.size} are too large: lower fps, seconds, size")
            return self

        @field_validator("filter", "derive")
        @classmethod
        def _known(cls, value: list[str], info: ValidationInfo) -> list[str]:
            family = FILTERS if info.field_name == "filter" else LABELS
            for name in value:
                if name not in family:
                    raise ValueError(f"no {family.kind} '{name}'; {did_you_mean(name, family.names())}")
            return sorted(set(value))

        @field_validator("settings")
        @classmethod
        def _of_members(cls, value: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
            """Check the settings of what is asked for, and complete them."""
            asked = {n: family for family, key in ((FILTERS, "filter"), (LABELS, "derive")) for n in info.data.get(key, ())}
            if other := [n for n in value if n not in asked]:
                raise ValueError(f"settings of '{other[0]}', which is not among the filters and pseudo-labels asked for")
            full = {n: made(family, n, value).options.model_dump(mode="json") for n, family in asked.items()}
            return {n: s for n, s in full.items() if s}

        @model_validator(mode="after")
        def _spoken(self) -> Self:
            if self.transcripts and any(LABELS.get(name).makes == "caption" for name in self.derive):
                raise ValueError("captions are to be transcripts and are made from pictures: leave out one of the two")
            return self

        @model_validator(mode="after")
        def _of_filters(self) -> Self:
            for name in self.thresholds:
                if name not in self.filter:
                    raise ValueError(f"a threshold of '{name}', which is not among the filters asked for")
            made_by: dict[str, str] = {}
            for name in self.derive:
                other = made_by.setdefault(LABELS.get(name).makes, name)
                if other != name:
                    raise ValueError(f"'{other}' and '{name}' both make {LABELS.get(name).makes}")
            return self

        @field_validator("caption", mode="before")
        @classmethod
        def _template(cls, value: Any) -> Any:
            if isinstance(value, dict) and list(value.values()) == [None]:
                return "{" + str(next(iter(value))) + "}"  # caption={class} alone reads as a YAML mapping
            return value

        @field_validator("test_values", "val_values", mode="before")
        @classmethod
        def _texts(cls, value: Any) -> list[str]:
            return [str(v) for v in (value if isinstance(value, list) else [value])]

    version = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "cache": self.cache}  # workers need no inventory: a plan holds all of it

    # -- what is there --------------------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> tuple[list[Item], list[Failure]]:
        o, folder = self.options, Path(self.options.path).expanduser()
        if not folder.is_dir():
            raise FetchError(f"no folder '{o.path}'", "give path=DIR of a folder with your media")
        table = o.csv and next((p for p in (folder / o.csv, Path(o.csv)) if p.is_file()), None)
        if o.csv and table is None:
            raise FetchError(f"no table '{o.csv}' (nor in {folder})")
        items, failures = by_csv(folder, table, o) if table else by_stem(folder)
        if not items and not failures:
            raise FetchError(f"'{o.path}' holds no video, sound or picture", f"read are {', '.join(sorted(ROLE))}")
        return captioned(items, o.caption), failures

    @cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """The sha256 of each file that a filter or pseudo-label reads; one that cannot be had is a WeightsError."""
        members = [made(*m, self.options.settings) for m in self._members()]
        return {n: h for (_, n), one in zip(self._members(), members, strict=True) if (h := one.hashes())}

    def _members(self) -> list[tuple[Registry, str]]:
        return [(FILTERS, n) for n in self.options.filter] + [(LABELS, n) for n in self.options.derive]

    @property
    def meant(self) -> dict[str, dict[str, Any]]:
        """The settings that decide what is made: all but the place of weights."""
        return {n: left for n, s in self.options.settings.items() if (left := {k: v for k, v in s.items() if k != PLACE})}

    @cached_property
    def _record(self) -> Path:
        """Where the inspection of exactly these files and options is kept."""
        items, _ = self._found
        stats = [(i.start, i.end, f, (s := Path(f).stat()).st_size, s.st_mtime_ns) for i in items for f in i.files.values()]
        asked = self.options.model_dump(include={"seconds", "every", "size", "frames", "pick", "filter"})
        asked |= self.options.model_dump(include={"video", "fps"}) if self.options.video else {}
        asked |= {"distinct": self.options.distinct} if self.options.distinct else {}
        asked |= {f: (self.meant.get(f), self.weights.get(f)) for f in self.options.filter}
        if any(FILTERS.get(f).reads_caption for f in self.options.filter):
            asked["captions"] = [i.caption for i in items]
        return self.cache / f"{hashlib.sha256(repr((self.version, stats, asked)).encode()).hexdigest()[:24]}.json"

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        (items, _), _ = self._found, self.weights  # those that are missing are told of before any work
        if self._record.is_file():
            return
        from nano4m_cli.data.fetch import ignore_interrupts, usable_cores

        seen: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(usable_cores(), max(len(items), 1)), context, ignore_interrupts) as pool:
            try:
                for one in pool.map(inspect, items, [self.options] * len(items), chunksize=4):
                    seen.append(one)
                    progress("files read", len(seen), len(items))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        write_json(self._record, seen)

    @cached_property
    def _usable(self) -> tuple[list[tuple[Item, dict[str, Any]]], list[str], list[Failure]]:
        """Return the items to use with their inspection, in a fixed order, the modalities, and what failed."""
        o = self.options
        items, failures = self._found[0], list(self._found[1])
        seen = json.loads(self._record.read_text())
        good: list[tuple[Item, dict[str, Any]]] = []
        for item, look in zip(items, seen, strict=True):
            if look["problem"]:
                failures.append(Failure(look["file"], look["problem"]))
            if look["clips"] and (clips := [c for c in look["clips"] if not self._dropped_by(c)]):
                good.append((item, {**look, "clips": clips}))
        for m in o.modalities:
            MODALITIES.get(m)
        count = Counter(m for item, look in good for m in _has(item, look, o.derive))
        usual = [m for m in dict.fromkeys([*ORDER, *sorted(count)]) if count[m] * 2 >= len(good) and count[m]]
        chosen = list(o.modalities) or usual
        kept: dict[tuple, tuple[Item, dict[str, Any]]] = {}
        groups: dict[str, Item] = {}
        # Where the table itself puts the same thing into two splits, the later split keeps it: tests stay whole.
        for item, look in sorted(good, key=lambda g: (-SPLITS.index(g[0].split or "train"), g[0].id)):
            lacks = [m for m in chosen if m not in _has(item, look, o.derive)]
            group, same = item.group or look["sha256"], (look["sha256"], item.start, item.end)
            if lacks:
                reason = f"has no {' and no '.join(lacks)}, which other items have"
            elif same in kept:
                reason = f"has the same content as {kept[same][1]['file']}"
            elif group in groups and groups[group].split != item.split:
                reason = f"group '{group}' stands in split {groups[group].split} as well (a {item.split} item)"
            elif o.label and o.label not in item.labels:
                reason = f"has no label '{o.label}'"
            elif o.transcripts and (lasts := (item.end or look["sound"]) - item.start) > o.seconds + SLACK:
                reason = f"lasts {lasts:.2f} s, and its transcript is of more than seconds={o.seconds:g}"
            else:
                kept[same], groups[group] = (item, look), item
                continue
            failures.append(Failure(look["file"], reason))
        if not kept:
            listed = "; ".join(f"{f.file}: {f.reason}" for f in failures[:5])
            raise FetchError(f"none of the {len(items)} items in '{o.path}' can be used: {listed}")
        apart, self._repeated = without_repeats(list(kept.values()), o.distinct)
        return sorted(apart, key=lambda g: g[0].id), chosen, failures

    def _dropped_by(self, clip: dict[str, Any]) -> list[str]:
        return dropped_by(clip["scores"], self.options.thresholds, self.options.settings)

    def left_out(self) -> list[dict[str, Any]]:
        looks = json.loads(self._record.read_text()) if self.options.filter else []
        filtered = [{"file": look["file"], "start": c["start"], "scores": c["scores"], "by": by}
                    for look in looks for c in look["clips"] if (by := self._dropped_by(c))]
        return filtered + (self._repeated if self.options.distinct and self._usable else [])

    def failures(self) -> list[Failure]:
        return self._usable[2]

    @property
    def tolerant(self) -> bool:
        return self.options.broken == "skip"

    # -- the data set ---------------------------------------------------------------------------------------------

    @cached_property
    def _splits(self) -> dict[str, list[tuple[Item, dict[str, Any]]]]:
        """Return the items of each split; without given splits, groups in the order of their hash are dealt out."""
        o, out = self.options, {s: [] for s in SPLITS}
        group = lambda g: hashlib.sha256((g[0].group or g[1]["sha256"]).encode()).hexdigest()  # noqa: E731
        groups = sorted({group(g) for g in self._usable[0] if g[0].split is None})
        given = {g[0].split for g in self._usable[0]}  # what items name is not dealt out as well
        shares = (0 if "test" in given else o.test, 0 if "val" in given else o.val)
        n_test, n_val = (max(round(len(groups) * share), 1) if share and len(groups) > 2 else 0 for share in shares)
        place = {g: "test" if i < n_test else "val" if i < n_test + n_val else "train" for i, g in enumerate(groups)}
        for one in self._usable[0]:
            out[one[0].split or place[group(one)]].append(one)
        return out

    def info(self) -> DatasetInfo:
        o, (usable, chosen, failures) = self.options, self._usable
        told = [(i.start, i.end, i.caption, sorted(i.labels.items()), i.split, i.group) for i, _ in usable]
        content = repr([(look["sha256"], *t) for (_, look), t in zip(usable, told, strict=True)])
        picture = {"size": [o.size, o.size]}
        sizes = {m: {"seconds": o.seconds, "rate": RATE} if m == "audio" else picture for m in chosen if m != "caption"}
        if "video" in chosen:
            sizes["video"] = {**picture, "frames": o.moving, "fps": o.fps}
        unsaid = {"path", "name", "broken", "settings"} | (set() if o.distinct else {"distinct"})
        unsaid |= (set() if o.video else {"video", "fps"}) | (set() if o.transcripts else {"transcripts"})
        silent = sum("video" in i.files and not look["sound"] for i, look in usable)
        videos = sum("video" in i.files for i, _ in usable)
        notes = [f"{len(usable)} items of {Path(o.path).name}"]
        notes += self._derived_notes()
        if silent:
            notes.append(f"{silent} of {videos} videos have no sound: " + ("they were left out" if "audio" in chosen else
                         "there is no audio in this data set"))
        notes += [note for _, look in usable for note in look["notes"]][:20]
        if dropped := self.left_out():
            by = Counter(f for one in dropped for f in one["by"])
            notes.append(f"{len(dropped)} clips were left out (" + ", ".join(f"{f} {n}" for f, n in sorted(by.items())) + ")")
        if o.filter:
            at = {f: o.thresholds.get(f, FILTERS.get(f).threshold) for f in o.filter}
            notes.append("Filters decided at " + ", ".join(f"{f} {t:g} ({FILTERS.get(f).unit})" for f, t in at.items()))
        if failures:
            notes.append(f"{len(failures)} files could not be used: see failures.json")
        attributes = self._attributes(chosen)
        return DatasetInfo(
            name=o.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(o.path).expanduser().resolve().name).strip("-.") or "folder",
            source="folder", options=o.model_dump(mode="json", exclude=unsaid)
            | {"content": hashlib.sha256(content.encode()).hexdigest()[:16]}
            | {k: v for k, v in (("settings", self.meant), ("weights_sha256", self.weights)) if v},
            version=self.version, modalities=chosen,
            splits={s: sum(self._count(look) for _, look in items) for s, items in self._splits.items()},
            sizes=sizes, attributes=attributes, determined={m: list(attributes) for m in chosen},
            transcripts={"caption": Transcript()} if o.transcripts and {"audio", "caption"} <= set(chosen) else {},
            notes=". ".join(notes) + ".",
        )

    def _derived_notes(self) -> list[str]:
        """Return which modalities are no measurements, of how many items, and what their labels say of them."""
        o, (usable, chosen, _) = self.options, self._usable
        labels = {LABELS.get(n).makes: n for n in o.derive}
        count = Counter(m for item, look in usable for m in labels if m in chosen and m not in _own(item, look))
        notes = []
        for part in dict.fromkeys(count[m] for m in sorted(count)):
            some = "" if part == len(usable) else f" for {part} of the items"
            names = [m for m in sorted(count) if count[m] == part]
            notes.append(f"{' and '.join(names)} were computed from other modalities, not measured{some}")
        return notes + [note for m in sorted(count) if (note := made(LABELS, labels[m], o.settings).note())]

    def _attributes(self, chosen: list[str]) -> dict[str, Attribute]:
        """Return the asked label as an attribute: worded as in the captions, or by whole captions where each value has one."""
        label = self.options.label
        if label is None or "caption" not in chosen or not all(item.caption for item, _ in self._usable[0]):
            return {}  # captions that are yet to be made may say anything
        said: dict[str, set[str]] = {}
        for item, _ in self._usable[0]:
            said.setdefault(item.labels[label], set()).add(item.caption)
        surfaces = {v: [v.lower()] for v in said}
        if not all(worded(v.lower(), c) for v, captions in said.items() for c in captions):
            if any(len(captions) > 1 for captions in said.values()):
                return {}
            surfaces = {v: list(captions) for v, captions in said.items()}
        return {label: Attribute(values=sorted(said), surfaces=dict(sorted(surfaces.items())))}

    @staticmethod
    def _count(look: dict[str, Any]) -> int:
        return sum(max(len(clip["frames"]), 1) for clip in look["clips"])

    def plan(self) -> list[ShardPlan]:
        plans, (_, chosen, _) = [], self._usable
        attributes = self._attributes(chosen)
        for split, members in self._splits.items():
            order = rng.permutation(len(members), 0, f"folder/order/{split}")
            rows = [(*members[i], number) for i in order for number in range(len(members[i][1]["clips"]))]
            per_shard = max(1, self.options.shard_size // self.options.frames)
            for index, start in enumerate(range(0, len(rows), per_shard)):
                some = rows[start : start + per_shard]
                clips = tuple((item, look["sha256"], tuple((n, look["clips"][n]) for _, _, n in part))
                              for (item, look), part in _runs(some))
                count = sum(max(len(clip["frames"]), 1) for _, _, part in clips for _, clip in part)
                plans.append(ShardPlan(split, index, (clips, tuple(chosen), attributes), count))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        for item, sha256, numbered in plan.items[0]:
            numbers, clips = zip(*numbered, strict=True)
            for c, f, raw in read_clips(item, clips, self.options, self.options.derive):
                key = f"{key_of(item)}-{sha256[:8]}-{numbers[c]:05d}-{f:02d}"
                labels = {"clip": numbers[c], "frame": f, **clips[c], "sha256": sha256}
                yield Sample(key, _members(item, raw, labels, *plan.items[1:]))


def _has(item: Item, look: dict[str, Any], derive: Sequence[str]) -> set[str]:
    """Return the modalities that an inspected item offers, with those that are made."""
    own = _own(item, look)
    return own | {LABELS.get(n).makes for n in labels_for(own, derive)}


def _own(item: Item, look: dict[str, Any]) -> set[str]:
    """Return the modalities that an inspected item holds."""
    pictures = {"rgb"} if "video" in item.files and look["video"] else set()
    pictures |= {m for m in item.files if m in MODALITIES and MODALITIES.get(m).kind == "image"}
    pictures |= {"video"} if look.get("moving") else set()
    return pictures | ({"audio"} if look["sound"] else set()) | ({"caption"} if item.caption else set())


def worded(words: str, caption: str) -> tuple[int, int] | None:
    """Return where words stand in a caption, as whole words, or None."""
    found = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption)
    return found.span() if found else None


def _runs(rows: list[tuple[Item, dict, int]]) -> Iterator[tuple[tuple[Item, dict], list[tuple[Item, dict, int]]]]:
    """Yield (item, look) with the rows of it that follow one another."""
    for _, run in itertools.groupby(rows, key=lambda row: id(row[0])):
        part = list(run)
        yield part[0][:2], part


def _members(
    item: Item, raw: dict[str, Any], labels: dict[str, Any], chosen: Sequence[str], attributes: dict[str, Attribute]
) -> dict[str, bytes]:
    """Return the members of a sample."""
    members = {MODALITIES.get(m).ext: MODALITIES.get(m).to_bytes(raw[m]) for m in chosen}
    labels = {"item": item.id, "files": {r: Path(p).name for r, p in item.files.items()}, "labels": item.labels, **labels,
              "objects": [], "fields": []}
    for name, attribute in attributes.items():
        value = item.labels[name]
        span = worded(attribute.surfaces[value][0], item.caption)
        labels["objects"] = [{name: value}]
        labels["fields"] = [{"attribute": name, "object": 0, "span": list(span), "wording": 0}]
    return members | {"labels.json": json.dumps(labels, ensure_ascii=False).encode()}
