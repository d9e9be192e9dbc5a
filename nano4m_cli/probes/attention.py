"""Who attends to whom: how much of its attention each modality gives to each, by layer, against uniform attention.

Of an encoder its self-attention, of a decoder its cross-attention to what is shown (its self-attention stays within one modality),
of one stack its self-attention. What uniform attention would give is each modality's share of the tokens that may be looked at.
Attention tells where values are taken from, not what they are used for (Jain and Wallace 2019, arXiv:1902.10186).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.masking._base import Key
from nano4m_cli.model._foreign import ForeignModel
from nano4m_cli.model.attention import Mask, weights
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, merged
from nano4m_cli.model.layers import Attention
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric

KIND = "probe"
BATCH = 100


class Probe(Base):
    class Options(Config):
        """samples: at most; draws: masks of each."""

        samples: int = Field(300, ge=1)
        draws: int = Field(2, ge=1)

    options: Probe.Options

    def missing(self, context: Context) -> str | None:
        if isinstance(context.model, ForeignModel):
            return f"an imported model of task {context.run.config.task} puts tokens of its own among the modalities'"
        return None

    def measure(self, context: Context) -> Findings:
        model, n, draws = context.model, min(self.options.samples, context.n), self.options.draws
        names = [*context.names, "register"] if model.config.registers else list(context.names)
        empty = lambda: {part: [Shares(n, len(names), model.config.heads) for _ in modules]  # noqa: E731
                         for part, modules in looking(model).items()}

        def batch(draw: np.ndarray) -> dict[str, list[Shares]]:
            rows, out = draw % n, empty()
            shown, asked = context.run.mixture.draw(context.length_NM[rows], Key(context.seed, "attention", draw))
            if model.wholly:
                asked = context.inside_NC[rows] & ~shown
            add_batch(out, model, context.pack(context.ids_NC[rows], shown, asked), rows)
            return out

        layers = empty()
        for some in context.spread("attention", np.split(np.arange(n * draws), range(BATCH, n * draws, BATCH)), batch):
            for part, found in some.items():
                for total, more in zip(layers[part], found, strict=True):
                    total += more
        metrics, plots = [], []
        for part, found in layers.items():
            metrics += [m for i, layer in enumerate(found, 1) for m in layer.metrics(f"{part}/layer{i}", len(context.names))]
            metrics += _pairs(part, found, context.names)
            for i, layer in enumerate(found, 1):
                share = layer.mean(layer.share)
                kept = [r for r in range(len(names)) if not np.isnan(share[r]).all()]
                over = share / layer.mean(layer.uniform)
                for what, title, x in (("share", "share of attention", share), ("times", "attention over uniform", over)):
                    plots.append(Plot(
                        name=f"{part}-layer{i}-{what}", title=f"{part}, layer {i}: {title}", kind="matrix",
                        rows=[f"from {names[r]}" for r in kept], columns=[f"to {n}" for n in names], values=_cells(x[kept]),
                    ))
            heads = np.stack([layer.entropy.sum(0) / max(layer.choices.sum(), 1) for layer in found])
            plots.append(Plot(
                name=f"{part}-entropy", title=f"{part}: entropy of each head's attention (1: uniform)", kind="matrix",
                rows=[f"layer {i}" for i in range(1, len(found) + 1)], columns=[f"head {h + 1}" for h in range(heads.shape[1])],
                values=_cells(heads),
            ))
        return Findings(metrics, [
            f"masks drawn as in training with fixed seed, {draws} of each of {n} samples: what is shown and asked is what training "
            "poses; a share is averaged over heads and over the tokens that look, where the modality looked at is there",
            "chance: what uniform attention gives, the modality's share of the tokens that may be looked at; entropy: over that of "
            "uniform attention, where there is more than one token to look at",
        ], plots)


class Shares:
    """Sums over the tokens that look, per sample, of one layer.

    share, uniform (N, M, M): attention from modality to modality, and what uniform attention would be. count (N, M, M): tokens
    that look, where the other is there. away, away_uniform, away_count (N,): to any other modality than one's own. entropy
    (N, heads), over that of uniform attention; choices (N,): tokens with more than one to look at.
    """

    def __init__(self, samples: int, modalities: int, heads: int):
        self.share, self.uniform, self.count = (np.zeros((samples, modalities, modalities)) for _ in range(3))
        self.away, self.away_uniform, self.away_count, self.choices = (np.zeros(samples) for _ in range(4))
        self.entropy = np.zeros((samples, heads))

    def add(self, sample: int, share_HQK: np.ndarray, uniform_QK: np.ndarray, q_Q: np.ndarray, k_K: np.ndarray, register: int):
        """Add a row's attention. q, k: modality of each token that looks and that is looked at. register: which is none."""
        m = self.share.shape[1]
        looks, of = np.eye(m)[q_Q], np.eye(m)[k_K]
        share_QM, uniform_QM = share_HQK.mean(0) @ of, uniform_QK @ of
        there = uniform_QM > 0
        self.share[sample] += looks.T @ share_QM
        self.uniform[sample] += looks.T @ uniform_QM
        self.count[sample] += looks.T @ there
        other = there & (np.arange(m) != q_Q[:, None]) & (np.arange(m) != register)
        self.away[sample] += share_QM[other].sum()
        self.away_uniform[sample] += uniform_QM[other].sum()
        self.away_count[sample] += other.any(1).sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            of_uniform = np.log((uniform_QK > 0).sum(1))
            entropy = -np.where(share_HQK > 0, share_HQK * np.log(share_HQK), 0).sum(-1) / of_uniform
        some = of_uniform > 0
        self.entropy[sample] += entropy[:, some].sum(1)
        self.choices[sample] += some.sum()

    def __iadd__(self, other: Shares) -> Shares:
        for mine, more in zip(vars(self).values(), vars(other).values(), strict=True):
            mine += more
        return self

    def mean(self, total: np.ndarray) -> np.ndarray:
        """Return (M, M), NaN where the two never met."""
        count = self.count.sum(0)
        return np.where(count > 0, total.sum(0) / np.maximum(count, 1), np.nan)

    def metrics(self, name: str, modalities: int) -> list[Metric]:
        some = np.maximum(self.choices, 1)
        out = [mean_metric(f"{name}_entropy", self.entropy.mean(1) / some, self.choices, chance=1.0)]
        if self.away_count.any():
            chance = self.away_uniform.sum() / self.away_count.sum()
            away = self.away / np.maximum(self.away_count, 1)
            out.append(mean_metric(f"{name}_to_others", away, self.away_count, chance=chance))
        return out


def _pairs(part: str, layers: list[Shares], names: list[str]) -> list[Metric]:
    """Return the share from each modality to each other one, averaged over layers."""
    out, count = [], layers[0].count
    for a, looks in enumerate(names):
        for b, looked_at in enumerate(names):
            n = count[:, a, b]
            if a != b and n.any():
                share = sum(layer.share[:, a, b] for layer in layers) / len(layers) / np.maximum(n, 1)
                chance = layers[0].uniform[:, a, b].sum() / n.sum()
                out.append(mean_metric(f"{part}/{looks}_to_{looked_at}", share, n, chance=chance))
    return out


def looking(model: TokenModel) -> dict[str, list[Attention]]:
    """Return the attention that goes between modalities, by part of the model and layer."""
    if model.encodes:
        return {"encoder": [b.attn for b in model.encoder], "decoder": [b.cross for b in model.decoder]}
    return {"stack": [b.attn for b in model.blocks]}


@contextmanager
def watched(modules: list[Attention]) -> Iterator[list[tuple[Mask, list[Tensor], Tensor]]]:
    """Record for each module, in the order they are called, its mask, weights per row (heads, Lq, Lk) and values."""
    seen: list[tuple[Mask, list[Tensor], Tensor]] = []

    def look(module: Attention, args: tuple, more: dict) -> None:
        seen.append((args[1], *module.look(*args, **{k: v for k, v in more.items() if k != "cache"})))

    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def add_batch(layers: dict[str, list[Shares]], model: TokenModel, batch: Packed, sample_B: np.ndarray) -> None:
    """Add what a model's layers look at while it answers a batch."""
    modules = looking(model)
    with watched([m for part in modules.values() for m in part]) as seen, torch.inference_mode():
        model.answers(batch)
    register = len(model.layout.names)
    if model.encodes:
        enc, dec = (_by_row(model, c, r.lengths) for c, r in ((batch.enc_col, batch.enc), (batch.dec_col, batch.dec)))
        ends = {"encoder": (enc, enc), "decoder": (dec, enc)}
    else:
        m = merged(batch)
        row = _by_row(model, m.col, m.rows.lengths)
        ends = {"stack": (row, row)}
    of = iter(seen)  # in the order of calls, which is that of layers
    for part, found in layers.items():
        q_rows, k_rows = ends[part]
        uniform = None
        for layer in found:
            mask, shares, _ = next(of)
            uniform = uniform or [u[0].cpu().numpy() for u in uniform_shares(mask)]
            for i, (share, flat) in enumerate(zip(shares, uniform, strict=True)):
                layer.add(int(sample_B[i]), share.cpu().numpy().astype(np.float64), flat, q_rows[i], k_rows[i], register)


def uniform_shares(mask: Mask) -> list[Tensor]:
    """Return per row (1, Lq, Lk): the attention of queries that are zero."""
    zeros = lambda lengths: torch.zeros(int(lengths.sum()), 1, device=lengths.device)  # noqa: E731
    return weights(zeros(mask.q.lengths), zeros(mask.k.lengths), 1, mask)


def _by_row(model: TokenModel, col_T: Tensor, lengths: Tensor) -> list[np.ndarray]:
    """Return per row the modality of each token; of a register, the number after the last."""
    col = col_T.cpu().numpy()
    modality = np.where(col < 0, len(model.layout.names), model.layout.modality_C[np.maximum(col, 0)])
    return np.split(modality, np.cumsum(lengths.cpu().numpy())[:-1])


def _cells(x: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in x]
