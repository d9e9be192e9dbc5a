"""The contract of a source: it plans its shards first, then makes any one of them from its plan alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from nano4m_cli.config import Config
from nano4m_cli.spec import TokenSpec


class Attribute(Config):
    """One thing that labels state of an object: its values, and how captions may word each value."""

    values: list[str]
    surfaces: dict[str, list[str]]  # value -> wordings; wording k of one value corresponds to wording k of another


class Transcript(Config):
    """How a text modality holds, word for word, what the sound says: all between two marks ("": from its begin, to its end).

    attribute: the attribute whose wordings, object by object, are the words said ("": any words may be).
    """

    before: str = ""
    after: str = ""
    attribute: str = ""


class DatasetInfo(Config):
    """What `dataset.json` says of a data set; probes and defaults are driven by it, never by its name.

    Attributes:
        name: folder below data/.
        source, options, version: how it was made; options identify it.
        modalities: names, in a fixed order.
        brought: those of them whose tokens come with the data set: they have no raw members, and nothing to tokenize.
        splits: samples per split.
        judge: samples in raw/judge, for judges only (never tokenised): what the train split does not show but another
            split asks about.
        sizes: per modality, what tokenizers need to know, e.g. {"rgb": {"size": [32, 32]}, "audio": {"seconds": 1.0}}.
        tokenizers: per modality, options for its tokenizer that suit this data (a modality's default name applies
            unless "name" is given).
        judge_steps: per modality, how long its judge is trained (not named: the usual, which suits `scenes`).
        attributes: label schema, per object.
        max_objects: objects per sample at most.
        determined: per modality, the attributes that it determines exactly.
        ceilings: best possible accuracy of an attribute a modality does not determine, e.g. {"audio": {"colour": .2}}.
        told_ceilings: the same where every other attribute of the object is told as well (empty: no different).
        through_labels: modalities that say nothing of the others beyond the attributes they determine.
        wording: per modality that words attributes, the nats by which it varies when all that it says is given, by the number of
            objects (from one on): what is left of its entropy to whoever knows every attribute.
        transcripts: text modalities that hold what is said in the sound (a caption that describes it is none).
        pairing: "instance" (modalities of a sample show the same thing) or "class" (paired by label only).
        notes: licence and anything a reader must know.
    """

    name: str
    source: str
    options: dict[str, Any]
    version: int
    modalities: list[str]
    brought: list[str] = []
    splits: dict[str, int]
    judge: int = 0
    sizes: dict[str, dict[str, Any]] = {}
    tokenizers: dict[str, dict[str, Any]] = {}
    judge_steps: dict[str, int] = {}
    attributes: dict[str, Attribute] = {}
    max_objects: int = 1
    determined: dict[str, list[str]] = {}
    ceilings: dict[str, dict[str, float]] = {}
    told_ceilings: dict[str, dict[str, float]] = {}
    through_labels: list[str] = []
    wording: dict[str, list[float]] = {}
    transcripts: dict[str, Transcript] = {}
    pairing: Literal["instance", "class"] = "instance"
    notes: str = ""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make: where it goes, and what goes in (picklable; the meaning of `items` is the source's)."""

    split: str
    index: int
    items: Any
    count: int


class Sample(NamedTuple):
    """A raw sample: key of letters, digits, '_' and '-'; members by extension, e.g. {"rgb.png": bytes}.

    `labels.json` holds {"objects": [{attribute: value, ...}, ...] in caption order,
    "fields": [{"attribute", "object", "span": [start, end], "wording": k}, ...]}: where in the caption an attribute of
    an object is worded, so that every alternative wording can be scored.
    """

    key: str
    members: dict[str, bytes]


class Failure(NamedTuple):
    """A file that a source could not use, and why."""

    file: str
    reason: str


class Source(ABC):
    """A source of raw data. Instances are picklable and cheap; `samples` may run in another process."""

    class Options(Config):
        pass

    version: ClassVar[int] = 1
    tolerant: bool = False  # whether a fetch with failures counts as done

    def __init__(self, options: Config, cache: Path):
        self.options, self.cache = options, cache

    def prepare(self, progress: Callable[[str, int, int], None]) -> None:  # noqa: B027 - optional step
        """Download or check what is needed, once, before `plan`; progress(what, done, total)."""

    def failures(self) -> list[Failure]:
        """Return what could not be used (after `prepare`); all the rest is planned."""
        return []

    def token_specs(self) -> list[TokenSpec]:
        """Return the spec of each modality that `info` says is brought (after `prepare`).

        Its ids are the member "<modality>.npy" of each sample: (variants, slots) of the spec's dtype, as `npy` writes them.
        """
        return []

    def left_out(self) -> list[dict[str, Any]]:
        """Return what filters left out (after `prepare`): file, start, scores, and which filters did."""
        return []

    @abstractmethod
    def info(self) -> DatasetInfo:
        """Return the description of the data set that these options give (after `prepare`)."""

    @abstractmethod
    def plan(self) -> list[ShardPlan]:
        """Return every shard of every split; the same options always give the same plan."""

    @abstractmethod
    def samples(self, plan: ShardPlan) -> Iterator[Sample]:
        """Yield the samples of one shard; a function of (options, plan) alone."""
