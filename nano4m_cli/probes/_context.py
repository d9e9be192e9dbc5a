"""What probes share: the run, its held-out tokens and raw samples, scoring by likelihood, generation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources._base import DatasetInfo
from nano4m_cli.errors import DataError
from nano4m_cli.generate.likelihood import CHUNK, chunk_size, slot_nll
from nano4m_cli.generate.sampler import GenerateOptions, State, chain, resolve
from nano4m_cli.masking._mixture import IN_DISTRIBUTION, direction
from nano4m_cli.model.batch import Packed, pack
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

    def candidate_logp(self, shown_NC: np.ndarray, target: str, ids_MS: np.ndarray) -> np.ndarray:
        """Return (n, M) for the first n samples: log p of each candidate's ids of a grid or codes target, asked whole
        at once, slot by slot independent."""
        columns, parts = self.columns(target), []
        slots = int(columns.sum())
        chunk = chunk_size(self.layout, (self.columns(*self.names) if self.model.wholly else columns)[None])
        for a in range(0, len(shown_NC), chunk):
            rows = slice(a, min(a + chunk, len(shown_NC)))
            shown = shown_NC[rows]
            # A model that sees every slot is asked for all that is not shown; the answers that are not wanted are left.
            asked = (self.inside_NC[rows] & ~shown) if self.model.wholly else np.broadcast_to(columns, shown.shape)
            packed = self.pack(self.ids_NC[rows], shown, asked)
            wanted_T = columns[packed.dec_col.cpu().numpy()]
            place_T = torch.from_numpy(np.cumsum(wanted_T) - 1)
            with torch.inference_mode():
                whole = torch.empty(len(shown) * slots, max(self.layout.sizes[g] for g in set(self.layout.group_C[columns])))
                for index, l in zip(packed.group_index, self.model(packed), strict=True):
                    if index is not None and wanted_T[int(index[0])]:
                        whole[place_T[index.cpu()]] = l.float().log_softmax(-1).cpu()
            logp = whole.view(len(shown), slots, -1).numpy()
            parts.append(logp[:, np.arange(slots), ids_MS].sum(-1, dtype=np.float64))
        return np.concatenate(parts)

    def text_logp(self, sources: Sequence[str], target: str, texts: list[np.ndarray], owner: np.ndarray) -> np.ndarray:
        """Return (A,) mean log p per token of texts given the sources of sample `owner`; each source is encoded once."""
        columns = self.layout.slice(target)
        shown_NC = self.inside_NC & self.columns(*sources)
        out = np.zeros(len(texts))
        order = np.argsort(owner, kind="stable")
        for a in range(0, self.n, CHUNK):
            mine = order[(owner[order] >= a) & (owner[order] < a + CHUNK)]
            for b in range(0, len(mine), 1500):
                some = mine[b : b + 1500]
                ids = np.zeros((len(some), self.layout.columns), dtype=np.int64)
                asked = np.zeros(ids.shape, dtype=bool)
                for r, t in enumerate(some):
                    ids[r, columns.start : columns.start + len(texts[t])] = texts[t]
                    asked[r, columns.start : columns.start + len(texts[t])] = True
                who, context = np.unique(owner[some], return_inverse=True)
                packed = self.pack(self.ids_NC[who], shown_NC[who], asked, (ids, context))
                with torch.inference_mode():
                    nll = self.model.nll(packed).cpu().numpy().astype(np.float64)
                lengths = asked.sum(1)
                out[some] = -np.add.reduceat(nll, np.cumsum(lengths) - lengths) / lengths
        return out

    def sampling(self, targets: Sequence[str], options: GenerateOptions | None = None) -> GenerateOptions:
        """Return the options that targets are generated with."""
        return resolve(options or GenerateOptions(seed=self.seed), targets, self.model, self.run.directions)

    def generate(
        self, sources: Sequence[str], targets: Sequence[str], options: GenerateOptions | None = None, limit: int | None = None
    ) -> State:
        """Return the first `limit` samples with the targets generated from the sources; kept for other probes."""
        options, n = self.sampling(targets, options), self.n if limit is None else min(limit, self.n)
        key = (tuple(sources), tuple(targets), options, n)
        if key not in self._generated:
            known = self.inside_NC[:n] & self.columns(*sources)
            state = State(np.where(known, self.ids_NC[:n], 0), known, np.arange(n))
            chain(self.model, state, targets, options, batch=CHUNK)
            self._generated[key] = state
        return self._generated[key]

    def decoded(self, sources: Sequence[str], targets: Sequence[str], modality: str, options: GenerateOptions | None = None,
                limit: int | None = None) -> list[Any]:
        """Return the raw values of a generated modality (of the first `limit` samples); kept for other probes."""
        key = (tuple(sources), tuple(targets), modality, self.sampling(targets, options), limit)
        if key not in self._decoded:
            state = self.generate(sources, targets, options, limit)
            self._decoded[key] = state.decode(self.layout, modality, self.tokenizer(modality), CHUNK)
        return self._decoded[key]

    def round_trip(self, modality: str, limit: int | None = None) -> list[Any]:
        """Return what the tokenizer makes of the true ids (of the first `limit` samples); kept for other probes."""
        key = ("round trip", modality, limit)
        if key not in self._decoded:
            ids, tokenizer = self.ids(modality)[:limit], self.tokenizer(modality)
            self._decoded[key] = [raw for a in range(0, len(ids), CHUNK) for raw in tokenizer.decode(ids[a : a + CHUNK])]
        return self._decoded[key]


def missing(context: Context, *modalities: str) -> str | None:
    """Return what a probe lacks, as text, or None."""
    lacking = [m for m in modalities if m not in context.names]
    return f"the run has no {', '.join(lacking)}" if lacking else None
