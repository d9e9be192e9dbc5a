"""What the loop trains: the 4M model on token shards, and tokenizers on raw samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.data.loader import SampleOrder, TokenData
from nano4m_cli.errors import ConfigError, DataError, did_you_mean
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._blocks import draw_blocks
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, pack
from nano4m_cli.rng import bits
from nano4m_cli.tokenizers._base import GradientTokenizer, codebook_use
from nano4m_cli.train.config import RunConfig


@dataclass(frozen=True)
class Part:
    """A micro-batch, and how many answers of each modality (M,) the whole step has."""

    packed: Packed
    answers_M: Tensor

    def to(self, device) -> Part:
        return Part(self.packed.to(device), self.answers_M.to(device))


class FourMTask:
    """Masked modelling on the token shards of a data set.

    Args:
        rank, ranks: which of so many equal parts of every step's batch this process makes. Samples, masks and the answers that
            losses are divided by are those of the whole batch, the same for any number of ranks.
    """

    def __init__(
        self, config: RunConfig, train: TokenData, val: TokenData | None, model: TokenModel, rank: int = 0, ranks: int = 1
    ):
        assert 0 <= rank < ranks and config.train.batch % (config.train.accumulate * ranks) == 0, (rank, ranks)
        self.rank, self.ranks = rank, ranks
        self.config, self.train, self.val, self.model = config, train, val, model
        self.layout = train.layout
        for name in config.loss_weights:
            if name not in self.layout.names:
                raise ConfigError(f"loss_weights: modality '{name}' is not in this run", did_you_mean(name, self.layout.names))
        self.weight_M = torch.tensor([config.loss_weights.get(n, 1.0) for n in self.layout.names])
        self.mixture = Mixture(config.masking, self.layout)
        if not len(train):
            raise DataError(f"split '{train.name}' of data set '{train.dataset.name}' is empty")
        self.order = SampleOrder(len(train), config.seed)
        self._val: list[Part] | None = None

    def _counters(self, step: int) -> np.ndarray:
        b = self.config.train.batch
        return np.arange(step * b, (step + 1) * b)

    def _parts(self, data: TokenData, index: np.ndarray, key: Key, parts: int, mine: slice = slice(None)) -> list[Part]:
        """Return the chosen ones of so many parts of the samples `index`; only theirs are read."""
        shown, asked = self.mixture.draw(data.lengths(index), key)
        answers = torch.from_numpy(np.add.reduceat(asked.sum(0), self.layout.start[:-1]).astype(np.float32))
        rows = [slice(r[0], r[-1] + 1) for r in np.array_split(np.arange(len(index)), parts)][mine]
        own = slice(rows[0].start, rows[-1].stop)
        variants = max(s.variants for s in self.layout.specs)
        variant = (bits(key.seed, key.stream + "/variant", key.counter_B[own]) % np.uint64(variants)).astype(np.int64)
        ids, _ = data.read(index[own], variant)
        registers = self.model.config.registers
        block = draw_blocks(self.layout, shown, asked, key.sub("block")) if self.model.in_blocks else None
        return [
            Part(pack(self.layout, ids[r.start - own.start : r.stop - own.start], shown[r], asked[r], registers,
                      block_BC=None if block is None else block[r]), answers)
            for r in rows
        ]

    def batch(self, step: int) -> list[Part]:
        counter, each = self._counters(step), self.config.train.accumulate
        mine = slice(self.rank * each, (self.rank + 1) * each)
        return self._parts(self.train, self.order.at(counter), Key(self.config.seed, "mask", counter), each * self.ranks, mine)

    def loss(self, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy per modality over its answers in the whole step, weighted mean over modalities present."""
        total_M, _ = self.model.modality_sums(part.packed)
        present = part.answers_M > 0
        ce_M = total_M / part.answers_M.clamp_min(1)
        weight = self.weight_M.to(ce_M.device) * present
        loss = (weight * ce_M).sum() / weight.sum().clamp_min(1e-9)
        return loss, {f"ce_{n}": ce_M[m] for m, n in enumerate(self.layout.names) if bool(present[m])}

    def validate(self) -> dict[str, float]:
        if self.val is None:
            return {}
        if self._val is None:
            n = min(self.config.train.val_samples, len(self.val))
            index = np.arange(n)
            self._val = self._parts(self.val, index, Key(0, "val-mask", index), -(-n // 100))
        device = next(self.model.parameters()).device
        parts = [p.to(device) for p in self._val]
        sums = sum(self.model.modality_sums(p.packed)[0] for p in parts)
        answers = parts[0].answers_M
        ce = (sums / answers.clamp_min(1)).tolist()
        figures = {f"ce_{n}": ce[m] for m, n in enumerate(self.layout.names) if answers[m] > 0}
        return {"loss": sum(figures.values()) / len(figures), **figures}

    def keys(self, step: int) -> list[str]:
        return [self.train.key(int(i)) for i in self.order.at(self._counters(step))]

    def state(self) -> dict[str, Any]:
        return {"specs": [s.model_dump(mode="json") for s in self.layout.specs]}


@dataclass(frozen=True)
class Rows:
    index: Tensor
    step: int

    def to(self, device) -> Rows:
        return self


class TokenizerTask:
    """Fits a gradient tokenizer on its `data`; the last twentieth is kept for validation."""

    def __init__(self, tokenizer: GradientTokenizer, seed: int, batch: int):
        self.tokenizer, self.model, self.batch_size = tokenizer, tokenizer.module, batch
        self.critic, self.critic_loss = tokenizer.critic, tokenizer.critic_loss
        n = len(tokenizer.data)
        self.held = max(1, n // 20) if n > 40 else 0
        self.order = SampleOrder(n - self.held, seed)

    def batch(self, step: int) -> list[Rows]:
        counter = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return [Rows(torch.from_numpy(self.order.at(counter)), step)]

    def loss(self, part: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return self.tokenizer.train_loss(part.index, part.step)

    def validate(self) -> dict[str, float]:
        n, tokenizer = len(self.tokenizer.data), self.tokenizer
        index = (torch.arange(n - self.held, n) if self.held else torch.arange(n))[:512]
        figures: dict[str, float] = {}
        codes = []
        for rows in index.split(tokenizer.chunk):
            loss, parts = tokenizer.loss(rows)
            for k, v in {"loss": loss, **parts}.items():
                figures[k] = figures.get(k, 0.0) + float(v) * len(rows)
            codes.append(tokenizer.codes(rows))
        figures = {k: v / len(index) for k, v in figures.items()}
        if codes[0] is not None:
            figures |= codebook_use(torch.cat(codes).numpy(), tokenizer.spec().vocab_size)
        return figures

    def keys(self, step: int) -> list[str]:
        return [f"row {int(i)}" for i in self.batch(step)[0].index]

    def state(self) -> dict[str, Any]:
        return {}
