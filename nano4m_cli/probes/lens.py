"""Logit lens: what each layer of the decoder would answer if it were the last, for every direction.

Hidden states of a layer go through the model's own final norm and head (nostalgebraist 2020, "interpreting GPT: the logit lens").
Neither was trained on any layer but the last, so a poor figure of an early one is a bound from below of what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.dist import Work
from nano4m_cli.generate.likelihood import cost, posed
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
    """Of one layer, (means (N,) over a sample's asked slots, how many (N,)): of -log p in nats; of whether the likeliest id is
    right; of whether it is the one that the last layer finds likeliest."""

    ce: tuple[np.ndarray, np.ndarray]
    token_acc: tuple[np.ndarray, np.ndarray]
    settled: tuple[np.ndarray, np.ndarray]


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        return None if any(directions(context)) else f"a direction needs two modalities, the run has {', '.join(context.names)}"

    def measure(self, context: Context) -> Findings:
        marginal, metrics, todo = marginal_nll(context).unigram, [], list(directions(context))
        uniform = np.broadcast_to(np.log(np.array(context.layout.sizes))[context.layout.group_C], marginal.shape)
        curves: dict[str, dict[str, list[list[Metric]]]] = {}  # target -> source -> layer
        asks = [whole(context, [source], target) for source, target in todo]
        answers = context.answers("lens", [layers_work(context, *ask) for ask in asks])
        for (source, target), (_, asked), reads in zip(todo, asks, answers, strict=True):
            name = context.direction([source], target)
            known = {"ce": dict(chance=uniform[asked].mean(), majority=marginal[asked].mean(), unit="nats", higher_is_better=False),
                     "token_acc": dict(chance=np.exp(-uniform[asked]).mean())}
            by_layer = [
                [mean_metric(f"{name}/{what}", *x, setting={"layer": layer}, **known.get(what, {}))
                 for what, x in zip(Read._fields, read, strict=True)]
                for layer, read in enumerate(reads)
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


def layers_work(context: Context, shown_NC: np.ndarray, asked_NC: np.ndarray) -> Work[list[Read]]:
    """Ask for what each layer says of the asked slots."""
    model = context.model
    parts = posed(model, shown_NC, asked_NC, context.inside_NC)

    def piece(rows: slice, asked: np.ndarray) -> list[Read]:
        batch = context.pack(context.ids_NC[rows], shown_NC[rows], asked)
        with torch.inference_mode():
            answers = answers_by_layer(model, batch)
            likeliest = [_likeliest(model, batch, x) for x in answers]
            found = [(model.nll_of(batch, x), best == batch.dec_ids, best == likeliest[-1])
                     for x, best in zip(answers, likeliest, strict=True)]
        return [Read(*(_means(values.float().cpu().numpy(), asked, asked_NC[rows]) for values in layer)) for layer in found]

    def join(found: list[list[Read]]) -> list[Read]:
        out = [Read(*((np.zeros(len(asked_NC)), np.zeros(len(asked_NC), dtype=np.int64)) for _ in Read._fields))
               for _ in (found[0] if found else [])]
        for (rows, _), layers in zip(parts, found, strict=True):
            for into, read in zip(out, layers, strict=True):
                for (mean, n), (its_mean, its_n) in zip(into, read, strict=True):
                    mean[rows], n[rows] = its_mean, its_n
        return out

    return Work([partial(piece, *p) for p in parts], join, [cost(shown_NC[rows], asked) for rows, asked in parts])


def _likeliest(model: TokenModel, batch: Packed, answers_TD: Tensor) -> Tensor:
    """Return (Td,) the likeliest id of each answer's own vocabulary."""
    best = torch.zeros_like(batch.dec_ids)
    for index, logits in zip(batch.group_index, model.logits(batch, answers_TD), strict=True):
        if index is not None:
            best[index] = logits.argmax(-1)
    return best


def _means(values: np.ndarray, answered_NC: np.ndarray, asked_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (means (N,) of the asked ones of a model's answers, how many (N,))."""
    x = np.full(asked_NC.shape, np.nan)
    x[answered_NC] = values
    there = asked_NC & ~np.isnan(x)
    n = there.sum(1)
    return np.where(there, x, 0).sum(1) / np.maximum(n, 1), n


def _curve(target: str, what: str, at: int, of: dict[str, list[list[Metric]]]) -> Plot:
    found = {source: [layer[at] for layer in layers] for source, layers in of.items()}
    title, unit = WHAT[what]
    ends = lambda i: [[m.ci95 and m.ci95[i] for m in ms] for ms in found.values()]  # noqa: E731
    return Plot(
        name=f"{target}-{what}", title=f"{target} from each modality: {title}", kind="curve", rows=[f"from {s}" for s in found],
        columns=list(range(max(map(len, found.values())))), values=[[m.value for m in ms] for ms in found.values()],
        low=ends(0), high=ends(1), x="layer", y=f"{title}, {unit}" if unit else title,
    )
