"""MNIST: 70,000 handwritten digits with their labels (LeCun, Cortes, Burges), for models of pictures alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from nano4m_cli import rng
from nano4m_cli.config import Config
from nano4m_cli.data.sources import _base
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.data.sources._base import Attribute, DatasetInfo, Sample, ShardPlan
from nano4m_cli.modalities.label import MODALITY as LABEL
from nano4m_cli.modalities.rgb import MODALITY as RGB

NOTES = "MNIST (LeCun, Cortes, Burges); the mirror it comes from states no licence. The test split is its t10k file."


class Source(_base.Source):
    """Pictures 28 x 28 as published, in three equal channels."""

    class Options(Config):
        """What to fetch.

        Attributes:
            mirror: folder with mnist_idx/*.gz; without it they are downloaded.
            val: pictures of the train file that are kept for validation.
            name: of the data set.
            shard_size: samples per shard.
            limit: at most so many samples per split (of the shuffled order), for quick tests.
        """

        mirror: str | None = None
        val: int = Field(5000, ge=0, le=30_000)
        name: str = Field("mnist", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
        shard_size: int = Field(5000, ge=1)
        limit: int | None = Field(None, ge=1)

    version = 1
    release: ClassVar[files.Release] = files.RELEASE

    @property
    def folder(self) -> Path:
        return Path(self.options.mirror).expanduser() if self.options.mirror is not None else self.cache

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:
        if self.options.mirror is None:
            files.fetch_mnist(self.release, self.cache, progress)
        files.check_mnist(self.folder)

    def _chosen(self) -> dict[str, list[tuple[str, int]]]:
        """Return per split (part, place in it), shuffled by a fixed order."""
        count = {part: len(files.labels(self.folder, part)) for part in files.LABELS}
        order = {part: rng.permutation(n, 0, f"mnist/{part}").tolist() for part, n in count.items()}
        train = [("train", i) for i in order["train"]]
        val = min(self.options.val, len(train) - 1)
        out = {"train": train[val:], "val": train[:val], "test": [("t10k", i) for i in order["t10k"]]}
        return {split: items[: self.options.limit] for split, items in out.items()}

    def info(self) -> DatasetInfo:
        digits = [str(d) for d in range(10)]
        return DatasetInfo(
            name=self.options.name, source="mnist", version=self.version,
            options=self.options.model_dump(mode="json", exclude={"mirror", "name"}),
            modalities=["label", "rgb"],
            splits={split: len(items) for split, items in self._chosen().items()},
            sizes={"rgb": {"size": [28, 28]}},
            tokenizers={"rgb": {"name": "bits", "variants": 8}},
            judge_steps={"rgb": 320},
            attributes={"digit": Attribute(values=digits, surfaces={d: [d] for d in digits})},
            determined={"rgb": ["digit"], "label": ["digit"]},
            pairing="class", notes=NOTES,
        )

    def plan(self) -> list[ShardPlan]:
        size, plans = self.options.shard_size, []
        for split, items in self._chosen().items():
            for index, start in enumerate(range(0, len(items), size)):
                some = tuple(items[start : start + size])
                plans.append(ShardPlan(split, index, some, len(some)))
        return plans

    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        for part, i in plan.items:
            grey, digit = files.images(self.folder, part)[i], str(files.labels(self.folder, part)[i])
            labels = {"objects": [{"digit": digit}], "fields": [], "mnist_file": part, "mnist_index": i,
                      "sources": {"rgb": f"mnist/{part}/{i}"}}
            yield Sample(f"{part}-{i:05d}", {
                "label.txt": LABEL.to_bytes(digit),
                "rgb.png": RGB.to_bytes(np.repeat(grey[:, :, None], 3, axis=2)),
                "labels.json": json.dumps(labels).encode(),
            })
