"""Logit lens: what each layer of the decoder would answer if it were the last, for every direction.

Hidden states of a layer go through the model's own final norm and head (nostalgebraist 2020, "interpreting GPT: the logit lens").
Neither was trained on any layer but the last, so a poor figure of an early one is a bound from below of what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.generate.likelihood import chunk_size
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._trace import answers_by_layer
from nano4m_cli.probes.loss import marginal_nll, whole

KIND = "probe"
WHAT = {"ce": ("cross-entropy", "nats"), "token_acc": ("share of ids that are likeliest", ""),
        "settled": ("share of ids whose likeliest is the last layer's", "")}


class Read(NamedTuple):
    """Of one layer, (N, C) with NaN where nothing was asked: -log p in nats; whether the likeliest id is right; whether it is the
    one that the last layer finds likeliest."""

    ce: np.ndarray
    token_acc: np.ndarray
    settled: np.ndarray


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        return None if any(directions(context)) else f"a direction needs two modalities, the run has {', '.join(context.names)}"

    def measure(self, context: Context) -> Findings:
        marginal, metrics, todo = marginal_nll(context).unigram, [], list(directions(context))
        uniform = np.broadcast_to(np.log(np.array(context.layout.sizes))[context.layout.group_C], marginal.shape)
        curves: dict[str, dict[str, list[list[Metric]]]] = {}  # target -> source -> layer
        for i, (source, target) in enumerate(todo):
            context.progress(f"lens {source}->{target}", i, len(todo))
            shown, asked = whole(context, [source], target)
            name = context.direction([source], target)
            known = {"ce": dict(chance=uniform[asked].mean(), majority=marginal[asked].mean(), unit="nats", higher_is_better=False),
                     "token_acc": dict(chance=np.exp(-uniform[asked]).mean())}
            by_layer = [
                [_mean(f"{name}/{what}", x, layer, **known.get(what, {})) for what, x in zip(Read._fields, read, strict=True)]
                for layer, read in enumerate(read_layers(context, shown, asked))
            ]
            metrics += [m for found in by_layer for m in found]
            curves.setdefault(target, {})[source] = by_layer
        plots = [_curve(target, what, at, of) for target, of in curves.items() for at, what in enumerate(Read._fields)]
        return Findings(metrics, [
            "layer 0 is what the decoder's (or the stack's) first block reads, the last layer is the model's own answer; one whole "
            "source, the whole target", *context.model.notes,
        ], plots)


def directions(context: Context) -> Iterator[tuple[str, str]]:
    """Yield (source, target) of every pair that the model can answer for."""
    for target in context.names:
        yield from ((s, target) for s in context.names if s != target and context.model.reads([s], target))


def read_layers(context: Context, shown_NC: np.ndarray, asked_NC: np.ndarray) -> list[Read]:
    """Return what each layer says of the asked slots."""
    model, inside = context.model, context.inside_NC
    out: list[Read] = []
    chunk = chunk_size(model.layout, asked_NC)
    for a in range(0, context.n, chunk):
        rows = slice(a, a + chunk)
        asked = inside[rows] & ~shown_NC[rows] if model.wholly else asked_NC[rows]
        if not asked.any():
            continue
        batch = context.pack(context.ids_NC[rows], shown_NC[rows], asked)
        with torch.inference_mode():
            answers = answers_by_layer(model, batch)
            likeliest = [_likeliest(model, batch, x) for x in answers]
            for layer, (x, best) in enumerate(zip(answers, likeliest, strict=True)):
                if len(out) <= layer:
                    out.append(Read(*(np.full(asked_NC.shape, np.nan) for _ in Read._fields)))
                found = (model.nll_of(batch, x), best == batch.dec_ids, best == likeliest[-1])
                for into, values in zip(out[layer], found, strict=True):
                    into[rows][asked] = values.float().cpu().numpy()
    return [Read(*(np.where(asked_NC, x, np.nan) for x in read)) for read in out]


def _likeliest(model: TokenModel, batch: Packed, answers_TD: Tensor) -> Tensor:
    """Return (Td,) the likeliest id of each answer's own vocabulary."""
    best = torch.zeros_like(batch.dec_ids)
    for index, logits in zip(batch.group_index, model.logits(batch, answers_TD), strict=True):
        if index is not None:
            best[index] = logits.argmax(-1)
    return best


def _mean(name: str, x_NC: np.ndarray, layer: int, **known) -> Metric:
    there = ~np.isnan(x_NC)
    n = there.sum(1)
    return mean_metric(name, np.where(there, x_NC, 0).sum(1) / np.maximum(n, 1), n, setting={"layer": layer}, **known)


def _curve(target: str, what: str, at: int, of: dict[str, list[list[Metric]]]) -> Plot:
    found = {source: [layer[at] for layer in layers] for source, layers in of.items()}
    title, unit = WHAT[what]
    ends = lambda i: [[m.ci95 and m.ci95[i] for m in ms] for ms in found.values()]  # noqa: E731
    return Plot(
        name=f"{target}-{what}", title=f"{target} from each modality: {title}", kind="curve", rows=[f"from {s}" for s in found],
        columns=list(range(max(map(len, found.values())))), values=[[m.value for m in ms] for ms in found.values()],
        low=ends(0), high=ends(1), x="layer", y=f"{title}, {unit}" if unit else title,
    )
