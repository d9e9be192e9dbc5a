"""Attentive readout of labels: per layer one learned query looks over a modality's frozen tokens.

A mean over tokens hides what stands in a few of them. So a query attends over a layer's tokens (Bardes et al. 2024,
arXiv:2404.08471, use a deeper one) and a linear layer reads what it finds. Every layer and question has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.probes._features import Features, Question
from nano4m_cli.probes._readout import Answered, Readout
from nano4m_cli.probes.linear import accuracy, read_linear
from nano4m_cli.rng import permutation

KIND = "probe"
LOOKS = 10  # times during fitting that settings are looked at: the best of them is kept, per layer and question


class Probe(Readout):
    class Options(Config):
        """steps, batch, lr: of AdamW with a linear decay."""

        steps: int = Field(200, ge=LOOKS)
        batch: int = Field(128, ge=1)
        lr: float = Field(0.03, gt=0)
        weight_decay: float = Field(0.05, ge=0)

    options: Probe.Options

    @property
    def how(self) -> str:
        o = self.options
        return (f"readout: per question one query, begun at zero, attends over the tokens; {o.steps} steps of {o.batch} samples, "
                f"AdamW {o.lr:g}, weight decay {o.weight_decay:g}, the best of {LOOKS} stops")

    def read(self, features: Features, source: str, untrained: bool) -> list[dict[str, Answered]]:
        out = []
        for _, tokens, lengths in features.tokens(source, untrained):
            out += read_attentive(tokens, lengths, features.questions, self.options, features.context.seed)
        return out

    def read_bag(self, features: Features, source: str) -> dict[str, Answered]:
        return read_linear(features.bag(source), features.questions)

    def _notes(self, features: Features) -> list[str]:
        cut = [f"{s}: {r}" for s in features.context.names if (r := features.room(s)[1]) < len(features.parts["fit"])]
        more = [f"of modalities of many tokens the first samples only ({', '.join(cut)})"] if cut else []
        return [*super()._notes(features), "the bag of ids is read linearly", *more]


class Queries(nn.Module):
    """Q queries and classes of each over Y layers of width D; everything begins at zero, where every token weighs the same.

    Args: classes: of each question.
    """

    def __init__(self, layers: int, width: int, classes: Sequence[int]):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(layers, width, len(classes)))
        self.weight = nn.Parameter(torch.zeros(layers, sum(classes), width))
        self.bias = nn.Parameter(torch.zeros(layers, 1, sum(classes)))
        self.sizes = list(classes)
        self.register_buffer("of_C", torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes)))

    def forward(self, x_YBLD: Tensor, inside_BL: Tensor) -> Tensor:
        """Return logits (Y, B, C) of all questions side by side."""
        score = torch.einsum("ybld,ydq->ybql", x_YBLD, self.query) * x_YBLD.shape[-1] ** -0.5
        share = score.masked_fill(~inside_BL[:, None], -torch.inf).softmax(-1)
        found = (share @ x_YBLD).index_select(2, self.of_C)  # (Y, B, C, D)
        return (found * self.weight[:, None]).sum(-1) + self.bias


def read_attentive(tokens: dict[str, np.ndarray], lengths: dict[str, np.ndarray], questions: Sequence[Question],
                   options: Probe.Options, seed: int) -> list[dict[str, Answered]]:
    """Return per layer each question's answers. Deterministic: what is drawn is the order of samples, by the seed.

    Args:
        tokens: per part (Y, N, L, D), padded. lengths: (N,), none of them zero.
    """
    x = {p: torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for p, t in tokens.items()}
    inside = {p: torch.from_numpy(np.arange(tokens[p].shape[2]) < np.maximum(n, 1)[:, None]) for p, n in lengths.items()}
    there = inside["fit"][None, :, :, None]
    count = there.sum()
    mean = (x["fit"] * there).sum((1, 2), keepdim=True) / count
    std = (((x["fit"] - mean) * there) ** 2).sum((1, 2), keepdim=True).div(count).sqrt() + 1e-6
    x = {p: (t - mean) / std for p, t in x.items()}
    y = [torch.from_numpy(q.answers["fit"]) for q in questions]
    model = Queries(len(x["fit"]), x["fit"].shape[-1], [len(q.values) for q in questions])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    n, stops = len(inside["fit"]), set(np.linspace(0, options.steps, LOOKS + 1).round().astype(int)[1:].tolist())
    best: list[dict[str, Answered]] = [{} for _ in range(len(x["fit"]))]
    order, epoch = np.zeros(0, dtype=np.int64), 0
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order, epoch = np.concatenate([order, permutation(n, seed, "attentive", epoch)]), epoch + 1
        rows, order = torch.from_numpy(order[: options.batch]), order[options.batch :]
        optimizer.param_groups[0]["lr"] = options.lr * (1 - (step - 1) / options.steps)
        logits = model(x["fit"][:, rows], inside["fit"][rows])
        loss = sum(_loss(l, t[rows]) for l, t in zip(logits.split(model.sizes, -1), y, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in stops:
            guess = {p: _guesses(model, x[p], inside[p]) for p in ("choose", "score")}
            for i, q in enumerate(questions):
                for layer, kept in enumerate(best):
                    chosen = accuracy(q, guess["choose"][i][layer])
                    if q.name not in kept or chosen > kept[q.name].chosen:
                        kept[q.name] = Answered(chosen, guess["score"][i][layer])
    return best


def _loss(logits_YBC: Tensor, y_B: Tensor) -> Tensor:
    """Return the sum over layers of the mean cross-entropy where there is an answer."""
    each = F.cross_entropy(logits_YBC.flatten(0, 1), y_B.repeat(len(logits_YBC)), ignore_index=-1, reduction="sum")
    return each / (y_B >= 0).sum().clamp_min(1)


@torch.no_grad()
def _guesses(model: Queries, x: Tensor, inside: Tensor, batch: int = 256) -> list[np.ndarray]:
    """Return per question the guesses (Y, N)."""
    logits = torch.cat([model(x[:, a : a + batch], inside[a : a + batch]) for a in range(0, len(inside), batch)], 1)
    return [l.argmax(-1).numpy() for l in logits.split(model.sizes, -1)]
