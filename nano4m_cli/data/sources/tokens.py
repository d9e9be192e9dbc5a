"""Tokens that other projects made (course nano4M, nano4M-Audio, SAGA, apple 4M), brought in id for id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from nano4m_cli import rng
from nano4m_cli.config import Config
from nano4m_cli.data.shards import npy
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources import _tokens_files as files
from nano4m_cli.data.sources._base import DatasetInfo, Sample, ShardPlan
from nano4m_cli.data.sources._tokens_files import Place
from nano4m_cli.data.sources._tokens_found import Found, check_keys, find, numbers
from nano4m_cli.data.sources._tokens_layouts import CROPS, Part, described, to_slots
from nano4m_cli.errors import AlignmentError, DataError, FetchError
from nano4m_cli.spec import TokenSpec

SEED = 0  # of the order of samples, which is part of the data set


class Row(NamedTuple):
    """One stem: its key, and its places in the order of a batch's folders."""

    stem: str
    key: str
    places: tuple[Place, ...]


class Batch(NamedTuple):
    """What a shard is made of: per stem the places of ids, then of captions and crops where there are any."""

    parts: tuple[Part, ...]
    captions: bool
    crops: bool
    rows: bool  # each row of a file is a sample of its own
    stems: tuple[Row, ...]


class Source(_base.Source):
    """Folders are listed and compared first; every file is checked as it is read, and any that does not fit is an error."""

    class Options(Config):
        """What to fetch.

        Attributes:
            path: the folder that holds train/, val/ and test/ (layout 4m: or the modalities themselves).
            layout: whose folder it is; auto goes by the names in it.
            name: of the data set; the folder's name by default.
            modalities: which to take, by our names; all by default.
            rename: modality of a folder whose name does not tell it: rename.rgb_dvae_224=rgb.
            vocab: number of ids per modality (per codebook), where it is not the layout's: vocab.rgb=8192.
            shape: shape per modality, where it is not the layout's: shape.rgb=[14,14]; frames x codebooks for sound.
            rows: the K rows of a file are "variants" of one sample, another one each time it is seen, with the first of K
                captions; or "samples" with a caption each. auto: variants, unless captions differ within a file.
            keys: "split-stem" puts the split in front, for folders whose files are counted from 0 in each split.
            shard_size: samples per shard.
            limit: at most so many files per folder and split, for quick tests.
        """

        path: str
        layout: Literal["auto", "course", "nano4m-audio", "saga", "4m"] = "auto"
        name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        modalities: list[str] = []
        rename: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]] = {}
        vocab: dict[str, Annotated[int, Field(ge=1, lt=2**31)]] = {}
        shape: dict[str, list[Annotated[int, Field(ge=1)]]] = {}
        rows: Literal["auto", "variants", "samples"] = "auto"
        keys: Literal["stem", "split-stem"] = "stem"
        shard_size: int = Field(1000, ge=1)
        limit: int | None = Field(None, ge=1)

    version = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "cache": self.cache}  # workers need no listing: a plan holds its part of it

    @property
    def root(self) -> Path:
        return Path(self.options.path).expanduser()

    @cached_property
    def _found(self) -> Found:
        try:
            return find(self.root, self.options)
        except OSError as err:
            raise FetchError(f"cannot read {err.filename}: {err.strerror}", "look at the rights of the folder") from err

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        self.__dict__.pop("_found", None)
        progress("list files", 0, 1)
        check_keys(self._found, self.root, self._key)
        progress("list files", 1, 1)

    def _key(self, split: str, stem: str) -> str:
        key = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
        return f"{split}-{key}" if self.options.keys == "split-stem" else key

    def _chosen(self, split: str) -> list[str]:
        """Return the stems of a split in the order of the data set: a fixed shuffle, so that the first few are a fair sample."""
        stems = self._found.stems(split)
        return [stems[i] for i in rng.permutation(len(stems), SEED, f"tokens/order/{split}")[: self.options.limit]]

    def token_specs(self) -> list[TokenSpec]:
        one = {"variants": 1} if self._found.rows else {}
        return [p.spec.model_copy(update=one) for p in self._found.parts]

    def info(self) -> DatasetInfo:
        o, found = self.options, self._found
        brought = [p.spec.modality for p in found.parts]
        given = o.model_dump(mode="json", include={"keys", "shard_size", "limit"})
        # What was found stands for the folder: that may move, and a file that was damaged may be mended.
        folders = {p.spec.modality: f"{p.folder}, {p.spec.variants} rows of {described(p)}" for p in found.parts}
        texts = ({"caption": found.captions} if found.captions else {}) | ({CROPS: CROPS} if found.crops else {})
        taken = {
            "layout": found.layout.name, "rows": "samples" if found.rows else "variants", "files": found.digest(),
            "folders": folders | texts,
        }  # fmt: skip
        return DatasetInfo(
            name=o.name or re.sub(r"[^A-Za-z0-9_.-]", "_", self.root.resolve().name).lstrip("_.-") or "tokens",
            source="tokens",
            options=given | taken,
            version=self.version,
            modalities=brought + (["caption"] if found.captions else []),
            brought=brought,
            splits={split: len(self._chosen(split)) * self._times for split in found.places},
            notes=" ".join(found.notes),
        )

    @property
    def _times(self) -> int:
        """How many samples a stem is."""
        return self._found.variants if self._found.rows else 1

    def plan(self) -> list[ShardPlan]:
        found, plans = self._found, []
        size = max(1, self.options.shard_size // self._times)
        for split, folders in found.places.items():
            stems = self._chosen(split)
            for index, start in enumerate(range(0, len(stems), size)):
                rows = tuple(
                    Row(stem, self._key(split, stem), tuple(folders[f][stem] for f in found.folders))
                    for stem in stems[start : start + size]
                )
                batch = Batch(found.parts, found.captions is not None, found.crops, found.rows, rows)
                plans.append(ShardPlan(split, index, batch, len(rows) * self._times))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        batch: Batch = plan.items
        for row in batch.stems:
            ids, rest = {}, list(row.places)
            for part in batch.parts:
                place = rest.pop(0)
                slots = to_slots(files.read_array(place.read(), place.where), part, place.where)
                ids[f"{part.spec.modality}.npy"] = slots.astype(part.spec.dtype)
            captions = self._captions(rest.pop(0), batch) if batch.captions else []
            crops = _crops(rest.pop(0), batch) if batch.crops else None
            if not batch.rows:
                yield _sample(row.key, ids, row.stem, captions, crops)
                continue
            for i, number in enumerate(numbers(batch.parts[0].spec.variants)):
                own = captions[i : i + 1] if len(captions) > 1 else captions
                one = {name: a[i : i + 1] for name, a in ids.items()}
                yield _sample(f"{row.key}-{number}", one, row.stem, own, None if crops is None else crops[i : i + 1], i)

    def _captions(self, place: Place, batch: Batch) -> list[str]:
        texts, k = files.read_texts(place.read(), place.suffix, place.where), batch.parts[0].spec.variants
        if k > 1 and len(texts) not in (1, k):
            raise AlignmentError(f"{place.where} has {len(texts)} captions, its ids have {k} rows", "one caption per row, or one")
        if k > 1 and len(set(texts)) > 1 and not batch.rows and self.options.rows == "auto":
            what = f"{place.where}: captions differ between rows, as in no file that was looked at first"
            raise DataError(what, "say rows=samples, or rows=variants to keep the first of each file")
        return texts


def _crops(place: Place, batch: Batch) -> np.ndarray:
    crops, k = files.read_array(place.read(), place.where, "uif"), batch.parts[0].spec.variants
    if crops.shape != (k, 5) or not np.isfinite(crops).all():
        raise AlignmentError(f"{place.where} is {crops.shape}, ({k}, 5) finite numbers expected", "one crop per row of ids")
    return crops


def _sample(
    key: str, ids: dict[str, np.ndarray], stem: str, captions: list[str], crops: np.ndarray | None, row: int | None = None
) -> Sample:
    """Return the sample of some rows of a stem; labels.json keeps what has no other place."""
    labels = {
        "objects": [], "fields": [], "stem": stem, **({"row": row} if row is not None else {}),
        **({"captions": captions} if captions else {}), **({CROPS: crops.tolist()} if crops is not None else {}),
    }  # fmt: skip
    text = {"caption.txt": captions[0].encode()} if captions else {}
    return Sample(key, {name: npy(a) for name, a in ids.items()} | text | {"labels.json": json.dumps(labels).encode()})
