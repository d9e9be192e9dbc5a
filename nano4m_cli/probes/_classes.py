"""What a sample's class is, and choices among classes by likelihood: ties count at expectation, never in the model's favour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nano4m_cli.data.shards import Split
from nano4m_cli.dist import Work
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import text_work
from nano4m_cli.registry import MODALITIES

PROMPTS = 8  # captions of a class that stand for it, at most
DIGITS = 5  # scores that agree so far (in nats per token) are ties: the rest is rounding


@dataclass(frozen=True)
class Options:
    """One question about a sample: its true value and, for every value, which of the texts says so."""

    sample: int
    attribute: str
    truth: str
    texts: list[int]


def hit_at(score_QV: np.ndarray, truth_Q: np.ndarray, k: int = 1) -> np.ndarray:
    """Return per question the probability that the truth is among the k best, equal scores in random order."""
    score = rounded(score_QV)
    own = score[np.arange(len(score)), truth_Q][:, None]
    above, equal = (score > own).sum(1), (score == own).sum(1)
    return np.clip((k - above) / equal, 0.0, 1.0)


def rounded(score: np.ndarray, digits: int = DIGITS) -> np.ndarray:
    """Return scores without what is rounding; NaN is worse than anything."""
    return np.round(np.where(np.isnan(score), -np.inf, score), digits)


def shares(score_QV: np.ndarray) -> np.ndarray:
    """Return (Q, V): 1 for the chosen value, shared among equal ones."""
    score = rounded(score_QV)
    best = score == score.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def confusion(score_QV: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    """Return (V, V): of each true value's questions the share that chose each value; NaN where there are none."""
    values = score_QV.shape[1]
    out, asked = np.zeros((values, values)), np.bincount(truth_Q, minlength=values)[:, None]
    np.add.at(out, truth_Q, shares(score_QV))
    return np.where(asked > 0, out / np.maximum(asked, 1), np.nan)


# -- classes ------------------------------------------------------------------------------------------------------


def labels_of(context: Context) -> dict[str, list[str]]:
    """Return the labels that every sample has one of, by name: attributes where there is one object, else the one label that
    the data set was made with."""
    info = context.info
    if info.attributes:
        if info.max_objects > 1:
            return {}
        return {a: [v[0] for v in context.values(a)] for a in info.attributes}
    name = info.options.get("label")
    if not isinstance(name, str) or not name:
        return {}
    found = [label.get("labels", {}).get(name) for label in context.labels]
    return {} if any(not isinstance(v, str) for v in found) else {name: found}


def classes_of(context: Context, source: str, target: str, n: int) -> tuple[np.ndarray, str] | None:
    """Return (class of each of the first n samples, what it is), or None where source and target share no label.

    Where modalities are paired by class it is the first attribute, else all attributes that both determine; of all objects, in
    order.
    """
    info = context.info
    if not info.attributes:
        named = labels_of(context)
        return next(((np.array(v[:n]), a) for a, v in named.items()), None)
    if info.pairing == "class":
        shared = [next(iter(info.attributes))]
    else:
        shared = [a for a in info.determined.get(source, []) if a in info.determined.get(target, [])]
    if not shared:
        return None
    columns = [context.values(a)[:n] for a in shared]
    return np.array(["\n".join(" ".join(v) for v in row) for row in zip(*columns, strict=True)]), ", ".join(shared)


# -- texts that say a value ---------------------------------------------------------------------------------------


def questions(context: Context) -> tuple[list[Options], list[np.ndarray], np.ndarray]:
    """Return (questions, token ids of the texts they compare, the sample each text belongs to): every attribute word of the true
    caption against every alternative of the same wording. Equal texts of a sample are scored once."""
    tokenizer, info, captions = context.tokenizer("caption"), context.info, context.raw_captions()
    rows, strings, owner = [], [], []
    for i, label in enumerate(context.labels):
        seen: dict[str, int] = {}
        for field in label.get("fields", []):
            attribute = info.attributes[field["attribute"]]
            begin, end = field["span"]
            texts = []
            for value in attribute.values:
                text = captions[i][:begin] + attribute.surfaces[value][field["wording"]] + captions[i][end:]
                if text not in seen:
                    seen[text] = len(strings)
                    strings.append(text)
                    owner.append(i)
                texts.append(seen[text])
            rows.append(Options(i, field["attribute"], label["objects"][field["object"]][field["attribute"]], texts))
    return rows, tokenizer.encode(strings), np.array(owner, dtype=np.int64)


def prior_work(context: Context, texts: Sequence[np.ndarray]) -> Work[np.ndarray]:
    """Ask for (A,): mean log p per token of captions given nothing; equal ones are scored once."""
    keys = [t.tobytes() for t in texts]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    place = {key: k for k, key in enumerate(first)}
    work = text_work(context, [], "caption", [texts[i] for i in first.values()], np.zeros(len(first), dtype=np.int64))
    return replace(work, join=lambda parts: work.join(parts)[[place[key] for key in keys]])


def prompts(context: Context, attribute: str) -> tuple[list[str], list[list[str]]]:
    """Return (values that the train split shows, for each its commonest captions there): what stands for a class.

    Nothing of the held-out samples is in them.
    """
    raw, kind = Split(context.dataset.raw(context.run.config.data.train)), MODALITIES.get("caption")
    said: dict[str, Counter] = {}
    for i, label in enumerate(context.train_labels):
        value = _value(label, attribute)
        if value is not None:
            said.setdefault(value, Counter())[kind.from_bytes(raw.read(i, kind.ext), str(i))] += 1
    values = sorted(said)
    return values, [[c for c, _ in sorted(said[v].items(), key=lambda item: (-item[1], item[0]))[:PROMPTS]] for v in values]


def train_share(context: Context, attribute: str) -> dict[str, float]:
    """Return how often each value stands in the train split."""
    found = Counter(_value(label, attribute) for label in context.train_labels)
    return {v: c / found.total() for v, c in found.items() if v is not None}


def _value(label: dict, attribute: str) -> str | None:
    objects = label.get("objects") or [{}]
    return objects[0].get(attribute, label.get("labels", {}).get(attribute))
