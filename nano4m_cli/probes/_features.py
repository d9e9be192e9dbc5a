"""What readouts share: questions about samples, and frozen features of them, made once for all readouts of an evaluation.

Readouts are fitted on samples of the train split, choose what is to be chosen on others (the val split, else a fifth of those
drawn), and are scored on the evaluated split, which neither of them touches. Samples of which any source (a recording, a picture,
an item) also stands in the evaluated split are left out of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shards import Split
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import pack
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._trace import hidden_shown
from nano4m_cli.rng import permutation, torch_seed
from nano4m_cli.train.run import MODELS

FIT, CHOOSE = 2000, 500  # samples that readouts are fitted on, and that settle their settings, at most
BATCH = 200
KEPT, PASS = 1 << 30, 1 << 28  # bytes of tokens that are kept at once, and that a pass of the model gives
FEWEST = 100  # samples of a part whose tokens are kept at least
IDS = 8192  # the commonest ids that a bag of ids counts
Layer = dict[str, np.ndarray]  # per part ("fit", "choose", "score"), features of its samples


@dataclass(frozen=True)
class Part:
    """Samples of one split: ids_NC, inside_NC (which slots a sample has), labels (of none, where none are needed)."""

    ids_NC: np.ndarray
    inside_NC: np.ndarray
    labels: list[dict[str, Any]]

    def rows(self, index: np.ndarray) -> Part:
        return Part(self.ids_NC[index], self.inside_NC[index], [self.labels[i] for i in index] if self.labels else [])

    def __len__(self) -> int:
        return len(self.ids_NC)


@dataclass(frozen=True)
class Question:
    """What is asked of a sample: one of `values`; answers per part, -1 where the question does not arise."""

    name: str
    values: list[str]
    answers: dict[str, np.ndarray]
    ceiling: dict[str, float | None] = field(default_factory=dict)

    @property
    def majority(self) -> int:
        """The commonest answer of the fitted samples."""
        y = self.answers["fit"]
        return int(np.bincount(y[y >= 0], minlength=len(self.values)).argmax())


class Features:
    """Frozen features of a context's run, and of the same model before any training.

    Args:
        context: of the evaluated split.
    """

    def __init__(self, context: Context):
        self.context = context
        self._means: dict[tuple[str, str, bool], list[np.ndarray]] = {}
        self.left_out = 0

    @classmethod
    def of(cls, context: Context) -> Features:
        """Return the features of a context, the same object each time."""
        if "features" not in context.shared:
            context.shared["features"] = cls(context)
        return context.shared["features"]

    # -- samples and questions ------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> dict[str, Part]:
        c = self.context
        score = Part(c.ids_NC, c.inside_NC, c.labels)
        train, val = c.run.config.data.train, c.run.config.data.val
        own_val = val not in (c.split, train) and c.has_split(val)
        taken = {o for label in score.labels for o in origins(label)}
        fit = self._without(self._drawn(train, FIT if own_val else FIT + CHOOSE), taken)
        if own_val:
            choose = self._without(self._drawn(val, CHOOSE), taken)
        else:
            fifth = max(1, len(fit) // 5)
            fit, choose = fit.rows(np.arange(fifth, len(fit))[:FIT]), fit.rows(np.arange(fifth)[:CHOOSE])
        self._chosen_on = f"{len(choose)} samples of the {val if own_val else train} split"
        return {"fit": fit, "choose": choose, "score": score}

    @property
    def chosen_on(self) -> str:
        """What settings are chosen on, in words."""
        return self._chosen_on if self.parts else ""

    def _drawn(self, split: str, most: int) -> Part:
        """Return at most so many samples of a split, drawn with a fixed seed (a split may be sorted)."""
        c = self.context
        tokens, raw = TokenData(c.dataset, split, c.names), Split(c.dataset.raw(split))
        index = np.sort(permutation(len(tokens), c.seed, "readout/" + split)[:most])
        ids, length = tokens.read(index)
        slot = np.concatenate([np.arange(s.slots) for s in c.layout.specs])
        labels = [json.loads(raw.read(int(i), "labels.json")) for i in index]
        part = Part(ids, slot < length[:, c.layout.modality_C], labels)
        return part.rows(permutation(len(part), c.seed, "readout/order"))

    def _without(self, part: Part, taken: set[str]) -> Part:
        keep = np.array([i for i, label in enumerate(part.labels) if taken.isdisjoint(origins(label))], dtype=np.int64)
        self.left_out += len(part) - len(keep)
        return part.rows(keep)

    @cached_property
    def questions(self) -> list[Question]:
        """The attributes of the first object (the only one, where there are no more), and where labels tell them the number of
        objects and the place of the first one; those with two values at least among the fitted samples."""
        info, made = self.context.info, []
        for name, attribute in info.attributes.items():
            values = attribute.values
            answer = lambda l, name=name, values=values: values.index(l["objects"][0][name]) if l["objects"] else -1  # noqa: E731
            ceiling = {m: self.context.baselines([m], name)["ceiling"] for m in self.context.names}
            made.append(self._question(name, values, answer, ceiling))
        if info.attributes and info.max_objects > 1:
            counts = [str(n) for n in range(1, info.max_objects + 1)]
            made.append(self._question("objects", counts, lambda l: len(l["objects"]) - 1 if l["objects"] else -1))
        if info.attributes and (edges := self._thirds()) is not None:
            place = lambda l: -1 if (x := middle(l)) is None else int(np.searchsorted(edges, x, side="right"))  # noqa: E731
            made.append(self._question("position", ["left", "middle", "right"], place))
        return [q for q in made if len(np.unique(q.answers["fit"][q.answers["fit"] >= 0])) > 1]

    def _question(self, name: str, values: list[str], answer: Callable[[dict], int], ceiling: dict | None = None) -> Question:
        answers = {p: np.array([answer(l) for l in part.labels], dtype=np.int64) for p, part in self.parts.items()}
        return Question(name, values, answers, ceiling or {})

    def _thirds(self) -> np.ndarray | None:
        """Return the two edges between thirds of the fitted samples by the place of their first object, or None."""
        found = [x for l in self.parts["fit"].labels if (x := middle(l)) is not None]
        return np.quantile(found, [1 / 3, 2 / 3]) if found else None

    def missing(self) -> str | None:
        """Return what a readout lacks here, or None."""
        c = self.context
        if not c.info.attributes:
            return f"data set '{c.dataset.name}' states no attributes"
        if c.split == c.run.config.data.train:
            return f"readouts are fitted on split '{c.split}', they cannot be scored on it"
        if not len(self.parts["fit"]) or not len(self.parts["choose"]):
            return f"every sample of split '{c.run.config.data.train}' shares a source with split '{c.split}'"
        if not self.questions:
            return f"the labels of split '{c.run.config.data.train}' have one value of each attribute: nothing to tell apart"
        return None

    # -- features -------------------------------------------------------------------------------------------------

    @cached_property
    def untrained(self) -> TokenModel:
        """The run's model with the weights that training would begin from, of another seed."""
        c = self.context
        torch.manual_seed(torch_seed(c.seed, "untrained"))
        model = MODELS[c.run.config.task](c.run.config.model, c.layout)
        return model.eval().requires_grad_(False).to(c.model.device)

    def means(self, source: str, untrained: bool = False) -> list[dict[str, np.ndarray]]:
        """Return per layer {part: (N, D) float32}: the mean of the tokens of `source` shown whole."""
        found = {p: self._pooled(p, part, source, untrained) for p, part in self.parts.items()}
        return [{p: layers[i] for p, layers in found.items()} for i in range(len(found["fit"]))]

    def scored(self, source: str, untrained: bool = False) -> list[np.ndarray]:
        """Return per layer `means` of the evaluated split, of which no labels are needed."""
        c = self.context
        return self._pooled("score", Part(c.ids_NC, c.inside_NC, []), source, untrained)

    def _pooled(self, name: str, part: Part, source: str, untrained: bool) -> list[np.ndarray]:
        key = (name, source, untrained)
        if key not in self._means:
            batches = [pooled(*b) for b in self._read(source, untrained, part)]
            self._means[key] = [np.concatenate(layer) for layer in zip(*batches, strict=True)]
        return self._means[key]

    def tokens(self, source: str, untrained: bool = False) -> Iterator[tuple[list[int], Layer, dict[str, np.ndarray]]]:
        """Yield (layers, {part: (Y, N, L, D) float32 padded with zeros}, {part: lengths (N,)}) of as many layers at a time as there
        is room for; where there is none for all samples of one, of the first ones. Means are kept on the way."""
        at_once, most = self.room(source)
        for first in range(0, self.layers, at_once):
            some = list(range(self.layers))[first : first + at_once]
            tokens, lengths = {}, {}
            for p, part in self.parts.items():
                batches = list(self._read(source, untrained, part.rows(np.arange(min(len(part), most))), some))
                if len(some) == self.layers and len(part) <= most:
                    each = (pooled(*b) for b in batches)
                    self._means[p, source, untrained] = [np.concatenate(x) for x in zip(*each, strict=True)]
                tokens[p], lengths[p] = padded(batches)
            yield some, tokens, lengths

    @property
    def layers(self) -> int:
        """How many layers there are to read, the first block's input among them."""
        config = self.context.run.config.model
        return 1 + (config.encoder_layers if self.context.model.encodes else config.layers)

    def room(self, source: str) -> tuple[int, int]:
        """Return how many layers are kept at once, and how many samples of a part at most."""
        samples = sum(map(len, self.parts.values()))
        each = self._token_bytes(source)
        return max(1, min(self.layers, KEPT // (each * samples))), max(FEWEST, KEPT // each)

    def _token_bytes(self, source: str) -> int:
        """Bytes of one sample's tokens in one layer (with a few that models add)."""
        columns = self.context.layout.slice(source)
        return (columns.stop - columns.start + 8) * self.context.run.config.model.width * 4

    def _read(
        self, source: str, untrained: bool, part: Part, some: Sequence[int] | None = None
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Yield (per layer, or for some of them, the tokens (T, D), lengths (B,)) batch by batch."""
        c, model = self.context, self.untrained if untrained else self.context.model
        size = int(np.clip(PASS // (self.layers * self._token_bytes(source)), 1, BATCH))
        for a in range(0, len(part), size):
            batch = shown_whole(model, part.rows(np.arange(a, min(a + size, len(part)))), c.columns(source))
            layers, lengths = hidden_shown(model, batch)
            layers = layers if some is None else [layers[i] for i in some]
            yield [x.float().cpu().numpy() for x in layers], lengths.cpu().numpy()

    def bag(self, source: str) -> dict[str, np.ndarray]:
        """Return {part: (N, V) float32}: how often each id of a modality (of each codebook) occurs in a sample."""
        c, columns = self.context, self.context.layout.slice(source)
        start = c.layout.vocab_start[c.layout.group_C[columns]]
        counted = {}
        for p, part in self.parts.items():
            row, col = np.nonzero(part.inside_NC[:, columns])
            counted[p] = row, start[col] + part.ids_NC[:, columns][row, col]
        ids, often = np.unique(counted["fit"][1], return_counts=True)
        known = np.sort(ids[np.argsort(-often, kind="stable")[:IDS]])
        out = {}
        for p, (row, token) in counted.items():
            x = np.zeros((len(self.parts[p]), len(known)), dtype=np.float32)
            place = np.searchsorted(known, token).clip(max=len(known) - 1)
            there = known[place] == token
            np.add.at(x, (row[there], place[there]), 1.0)
            out[p] = x
        return out


def shown_whole(model: TokenModel, part: Part, columns_C: np.ndarray):
    """Return the batch that shows the chosen columns of each sample.

    A model that reads left to right has not read the last id until the slot after it is asked: the first one that follows is. One
    that was never trained with slots missing is asked for all others.
    """
    shown = part.inside_NC & columns_C
    asked = np.zeros_like(shown)
    if model.wholly:
        asked = part.inside_NC & ~shown
    elif not model.encodes:
        follows = part.inside_NC & (np.arange(shown.shape[1]) >= np.flatnonzero(columns_C)[-1] + 1)
        some = follows.any(1)
        asked[some, follows.argmax(1)[some]] = True
    return pack(model.layout, part.ids_NC, shown, asked, model.config.registers).to(model.device)


def origins(label: dict[str, Any]) -> set[str]:
    """Return what a sample was made from, as far as its labels name it."""
    out: set[str] = set()
    named = label.get("sources")
    for value in (named.values() if isinstance(named, dict) else []):
        out |= {str(v) for v in (value if isinstance(value, list) else [value])}
    if isinstance(label.get("item"), str):
        out.add("item/" + label["item"])
    return out


def middle(label: dict[str, Any]) -> float | None:
    """Return the middle of the first object's box from the left, in pixels, or None where no box is told."""
    box = label["objects"][0].get("box") if label["objects"] else None
    return None if not box else (box[0] + box[2]) / 2


def padded(batches: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens (Y, N, L, D) padded with zeros, lengths (N,)) of batches of packed tokens (per layer (T, D)) with lengths."""
    lengths = np.concatenate([n for _, n in batches])
    first = batches[0][0]
    out = np.zeros((len(first), len(lengths), int(lengths.max()), first[0].shape[1]), dtype=np.float32)
    at = 0
    for layers, n in batches:
        inside = np.arange(out.shape[2]) < n[:, None]
        for y, x in enumerate(layers):
            out[y, at : at + len(n)][inside] = x
        at += len(n)
    return out, lengths


def pooled(layers: Sequence[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Return per layer the mean (B, D) of each sample's tokens; of none, zeros."""
    some = lengths > 0
    start = (np.cumsum(lengths) - lengths)[some]
    out = []
    for x in layers:
        mean = np.zeros((len(lengths), x.shape[1]), dtype=np.float32)
        if len(start):
            mean[some] = np.add.reduceat(x, start, axis=0) / lengths[some, None]
        out.append(mean)
    return out
