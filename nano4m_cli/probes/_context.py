"""What probes share: the run, its held-out tokens and raw samples, scoring by likelihood, generation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from nano4m_cli import dist
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources._base import DatasetInfo
from nano4m_cli.errors import DataError
from nano4m_cli.generate.likelihood import slot_nll
from nano4m_cli.generate.sampler import GenerateOptions, State, resolve
from nano4m_cli.masking._mixture import IN_DISTRIBUTION, direction
from nano4m_cli.model.batch import Packed, pack
from nano4m_cli.probes import _pieces as pieces
from nano4m_cli.probes._result import Direction
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import Tokenizer, open_tokenizer
from nano4m_cli.train.run import OpenRun, check_specs

TRAIN_LABELS = 8192  # labels of the train split that are read, at most


class Context:
    """A run on one held-out split.

    Args:
        limit: at most so many samples of the split.
        progress: called with (what, done, total).
    """

    def __init__(self, run: OpenRun, split: str, limit: int | None, seed: int, progress: Callable[[str, int, int], None]):
        self.run, self.split, self.seed, self.progress = run, split, seed, progress
        self.model, self.layout, self.dataset = run.model, run.layout, run.dataset
        self.names = run.layout.names
        self.tokens = TokenData(run.dataset, split, self.names)
        check_specs(run.layout.specs, self.tokens.layout.specs)
        self.n = len(self.tokens) if limit is None else min(limit, len(self.tokens))
        if not self.n:
            raise DataError(f"split '{split}' of '{run.dataset.name}' is empty")
        self.ids_NC, self.length_NM = self.tokens.read(np.arange(self.n))
        self._generated: dict[tuple, State] = {}
        self._decoded: dict[tuple, list[Any]] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._others: dict[str, Context] = {}
        self.limit = limit
        self.shared: dict[str, Any] = {}  # what one probe made and another uses

    @cached_property
    def info(self) -> DatasetInfo:
        return self.dataset.info()

    def on(self, split: str) -> Context:
        """Return the same run on another split."""
        if split not in self._others:
            self._others[split] = Context(self.run, split, self.limit, self.seed, self.progress)
        return self._others[split]

    def has_split(self, split: str) -> bool:
        return self.info.splits.get(split, 0) > 0 and self.dataset.tokens(self.names[0], split).is_dir()

    # -- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def inside_NC(self) -> np.ndarray:
        """Bool (N, C): the slots that each sample has."""
        slot = np.concatenate([np.arange(s.slots) for s in self.layout.specs])
        return slot < self.length_NM[:, self.layout.modality_C]

    def columns(self, *modalities: str) -> np.ndarray:
        """Return bool (C,): the columns of the named modalities."""
        out = np.zeros(self.layout.columns, dtype=bool)
        for name in modalities:
            out[self.layout.slice(name)] = True
        return out

    def tokenizer(self, modality: str) -> Tokenizer:
        if modality not in self._tokenizers:
            self._tokenizers[modality] = open_tokenizer(self.dataset.tokenizer(modality))
        return self._tokenizers[modality]

    @cached_property
    def labels(self) -> list[dict[str, Any]]:
        """Return labels.json of every sample."""
        raw = Split(self.dataset.raw(self.split))
        return [json.loads(raw.read(i, "labels.json")) for i in range(self.n)]

    @cached_property
    def train_labels(self) -> list[dict[str, Any]]:
        """Return labels.json of the train split's first samples."""
        raw = Split(self.dataset.raw(self.run.config.data.train))
        return [json.loads(raw.read(i, "labels.json")) for i in range(min(len(raw), TRAIN_LABELS))]

    @cached_property
    def _raw(self) -> dict[str, list[Any]]:
        return {}

    def raw(self, modality: str) -> list[Any]:
        """Return the raw values of every sample, as the best round trip would give them."""
        if modality not in self._raw:
            shards, kind = Split(self.dataset.raw(self.split)), MODALITIES.get(modality)
            values = [kind.from_bytes(shards.read(i, kind.ext), self.tokens.key(i)) for i in range(self.n)]
            self._raw[modality] = [self.tokenizer(modality).comparable(v) for v in values]
        return self._raw[modality]

    def raw_captions(self) -> list[str]:
        """Return captions as written (label spans refer to them)."""
        shards, kind = Split(self.dataset.raw(self.split)), MODALITIES.get("caption")
        return [kind.from_bytes(shards.read(i, kind.ext), self.tokens.key(i)) for i in range(self.n)]

    def ids(self, modality: str, ids_NC: np.ndarray | None = None) -> list[np.ndarray]:
        """Return the ids of a modality per sample, of true length."""
        columns = self.layout.slice(modality)
        source = self.ids_NC if ids_NC is None else ids_NC
        length = self.length_NM[:, self.names.index(modality)]
        return [row[columns][:n] for row, n in zip(source, length, strict=True)]

    def values(self, attribute: str) -> list[list[str]]:
        """Return per sample the attribute's value for every object."""
        return [[o[attribute] for o in label["objects"]] for label in self.labels]

    @cached_property
    def attributes(self) -> dict[str, list[str]]:
        return {name: a.values for name, a in self.info.attributes.items()}

    @cached_property
    def majority(self) -> dict[str, str]:
        """Return each attribute's commonest value in the first samples of the train split."""
        raw = Split(self.dataset.raw("train"))
        counts: dict[str, Counter] = {a: Counter() for a in self.attributes}
        for i in range(min(len(raw), 4000)):
            for thing in json.loads(raw.read(i, "labels.json"))["objects"]:
                for a in counts:
                    counts[a][thing[a]] += 1
        return {a: c.most_common(1)[0][0] for a, c in counts.items()}

    def baselines(self, source: Sequence[str], attribute: str, told: bool = False) -> dict[str, float | None]:
        """Return chance, majority and ceiling of an attribute's accuracy given the sources (told: and the object's others)."""
        truth = [v for values in self.values(attribute) for v in values]
        majority = sum(v == self.majority[attribute] for v in truth) / max(len(truth), 1)
        ceiling: float | None = None
        if any(attribute in self.info.determined.get(s, []) for s in source):
            ceiling = 1.0
        elif not self.split.endswith("novel"):
            ceilings = (self.info.told_ceilings if told else {}) or self.info.ceilings
            known = [ceilings[s][attribute] for s in source if attribute in ceilings.get(s, {})]
            ceiling = max(known) if len(known) == len(source) and len(source) == 1 else None
        return {"chance": 1.0 / len(self.attributes[attribute]), "majority": majority, "ceiling": ceiling}

    # -- questions ------------------------------------------------------------------------------------------------

    def direction(self, sources: Sequence[str], target: str) -> str:
        return direction(list(sources), target, self.names)

    def posed(self, name: str) -> Direction:
        """Return whether training posed a direction."""
        frequency = self.run.directions.get(name, 0.0)
        return Direction(value=frequency >= IN_DISTRIBUTION, frequency=round(frequency, 6))

    # -- the model ------------------------------------------------------------------------------------------------

    def pack(
        self, ids_BC: np.ndarray, shown_BC: np.ndarray, asked_BC: np.ndarray,
        answers: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Packed:
        """Return the batch on the model's device (see `model.batch.pack`)."""
        packed = pack(self.layout, ids_BC, shown_BC, asked_BC, self.model.config.registers, answers)
        return packed.to(self.model.device)

    def slot_nll(self, shown_NC: np.ndarray, asked_NC: np.ndarray) -> np.ndarray:
        """Return (N, C): -log p in nats of each asked slot (NaN elsewhere)."""
        return slot_nll(self.model, self.ids_NC, shown_NC, asked_NC, self.inside_NC)

    def answers(self, what: str, works: Sequence[dist.Work[Any]]) -> list[Any]:
        """Return the answers of questions; several processes share them out. Without `what` no progress is told."""
        return dist.answers(works, partial(self.progress, what)) if what else dist.answers(works)

    def spread(
        self, what: str, items: Sequence[Any], work: Callable[[Any], Any], costs: Sequence[float] | None = None
    ) -> list[Any]:
        """Return [work(item) for item in items]; several processes share them out (see `dist.spread`)."""
        return dist.spread(items, work, costs, partial(self.progress, what))

    # -- what the model makes -------------------------------------------------------------------------------------

    def sampling(self, targets: Sequence[str], options: GenerateOptions | None = None) -> GenerateOptions:
        """Return the options that targets are generated with."""
        return resolve(options or GenerateOptions(seed=self.seed), targets, self.model, self.run.directions)

    def generate(
        self, sources: Sequence[str], targets: Sequence[str], options: GenerateOptions | None = None, limit: int | None = None
    ) -> State:
        """Return the first `limit` samples with the targets generated from the sources; kept for other probes."""
        return self.generated([Made(sources, targets, options, limit)])[0]

    def generated(self, asked: Sequence[Made], what: str = "generated") -> list[State]:
        """Return what `generate` does for each; several processes share all of it out."""
        keys = [a.key(self) for a in asked]
        todo = list(dict.fromkeys(k for k in keys if k not in self._generated))
        self._generated.update(zip(todo, self.answers(what, [pieces.chain_work(self, *k) for k in todo]), strict=True))
        return [self._generated[k] for k in keys]

    def decoded(self, sources: Sequence[str], targets: Sequence[str], modality: str, options: GenerateOptions | None = None,
                limit: int | None = None) -> list[Any]:
        """Return the raw values of a generated modality (of the first `limit` samples); kept for other probes."""
        made = Made(sources, targets, options, limit)
        self.ahead([(made, modality)])
        return self._decoded[(*made.key(self), modality)]

    def round_trip(self, modality: str, limit: int | None = None) -> list[Any]:
        """Return what the tokenizer makes of the true ids (of the first `limit` samples); kept for other probes."""
        self.ahead(round_trips=[(modality, limit)])
        return self._decoded["round trip", modality, limit]

    def ahead(
        self, decoded: Sequence[tuple[Made, str]] = (), round_trips: Sequence[tuple[str, int | None]] = (), what: str = "decoded"
    ) -> None:
        """Make what will be asked of `decoded` and `round_trip`; several processes share all of it out."""
        states = self.generated([made for made, _ in decoded], what)
        works = {("round trip", *asked): pieces.round_trip_work(self, *asked) for asked in round_trips}
        for (made, modality), state in zip(decoded, states, strict=True):
            works[*made.key(self), modality] = pieces.decode_work(self, state, modality)
        works = {key: work for key, work in works.items() if key not in self._decoded}
        self._decoded.update(zip(works, self.answers(what, list(works.values())), strict=True))


@dataclass(frozen=True)
class Made:
    """What is generated of the first `limit` samples: targets from sources."""

    sources: Sequence[str]
    targets: Sequence[str]
    options: GenerateOptions | None = None
    limit: int | None = None

    def key(self, context: Context) -> tuple:
        n = context.n if self.limit is None else min(self.limit, context.n)
        return tuple(self.sources), tuple(self.targets), context.sampling(self.targets, self.options), n


def missing(context: Context, *modalities: str) -> str | None:
    """Return what a probe lacks, as text, or None."""
    lacking = [m for m in modalities if m not in context.names]
    return f"the run has no {', '.join(lacking)}" if lacking else None
