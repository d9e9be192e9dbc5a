"""What the loop trains: the 4M model on token shards, and tokenizers on raw samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano4m_cli import dist
from nano4m_cli.data.loader import TRIES, SampleOrder, TokenData
from nano4m_cli.data.stand_in import Found, StandIns
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.errors import ConfigError, DataError, did_you_mean
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._blocks import draw_blocks
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, pack, sender
from nano4m_cli.rng import bits
from nano4m_cli.tokenizers._base import GradientTokenizer, codebook_use
from nano4m_cli.train.config import RunConfig, TrainConfig

VAL_PART = 100  # validation samples computed at once


@dataclass(frozen=True)
class Part:
    """A micro-batch, and how many answers of each modality (M,) the whole step has.

    skipped: what was wrong with the step's samples that others stand for (told by the first part of each rank).
    lost: of a stream, the shards that cannot be had and why, as far as the step's samples hang on them.
    notes: what a user should read of that.
    """

    packed: Packed
    answers_M: Tensor
    skipped: tuple[str, ...] = ()
    lost: tuple[tuple[tuple[int, int, int], str], ...] = ()
    notes: tuple[str, ...] = ()

    def each(self, do: Callable[[Tensor], Tensor]) -> Part:
        return replace(self, packed=self.packed.each(do), answers_M=do(self.answers_M))

    def to(self, device) -> Part:
        return self.each(sender(device))

    def pin_memory(self) -> Part:
        """Return the part in pinned memory: what loaders ask of a batch that goes to CUDA."""
        return self.each(torch.Tensor.pin_memory)


def check_divides(train: TrainConfig, ranks: int) -> None:
    """Raise ConfigError unless a step's batch divides among the processes and their parts."""
    if train.batch % (train.accumulate * ranks):
        parts = f"{ranks} processes" + (f" of train.accumulate={train.accumulate} parts each" if train.accumulate > 1 else "")
        whole = train.accumulate * ranks
        near = sorted({max(train.batch // whole, 1) * whole, -(-train.batch // whole) * whole})
        raise ConfigError(
            f"train.batch: {train.batch} samples do not divide among {parts}", "the nearest that do: " + ", ".join(map(str, near))
        )


def deal(tokens_B: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return each rank's samples by place: as many each, and about as many tokens.

    Dealt out from the longest to the shortest, back and forth; within a rank they keep their order.
    """
    if ranks == 1:
        return [np.arange(len(tokens_B))]
    order = np.argsort(-tokens_B, kind="stable").reshape(-1, ranks)
    order[1::2] = order[1::2, ::-1]
    return list(np.sort(order, axis=0).T)


class FourMTask:
    """Masked modelling on the token shards of a data set.

    Args:
        rank, ranks: which of so many parts, equal in samples, of every step's batch this process makes. Samples, masks and the
            answers that losses are divided by are those of the whole batch, the same for any number of ranks.
    """

    def __init__(
        self, config: RunConfig, train: TokenData, val: TokenData | None, model: TokenModel, rank: int = 0, ranks: int = 1
    ):
        assert 0 <= rank < ranks, (rank, ranks)
        check_divides(config.train, ranks)
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
        data = config.data
        self.order = train.order(config.seed, config.train.batch, data.lanes, data.window)
        self.stand_ins: StandIns | None = None
        self.lost: dict[tuple[int, int, int], str] = {}  # what all ranks know of lost shards (StandIns)
        if isinstance(self.order, StreamOrder):
            self.order.rows(rank, ranks)  # an error now rather than later
            if data.skip_broken:
                self.stand_ins = StandIns(train, self.order)
        self.apart = train.streamed
        self._val: tuple[list[Part], bool] | None = None

    def _counters(self, step: int) -> np.ndarray:
        b = self.config.train.batch
        return np.arange(step * b, (step + 1) * b)

    def _parts(self, data: TokenData, index: np.ndarray, key: Key, choose: Callable[[np.ndarray], list[np.ndarray]]) -> list[Part]:
        """Return parts of the samples `index`; only theirs are read.

        Args:
            choose: which samples are in each part wanted, by place in `index`, given every sample's tokens (B,).
        """
        shown, asked = self.mixture.draw(data.lengths(index), key)
        answers = torch.from_numpy(np.add.reduceat(asked.sum(0), self.layout.start[:-1]).astype(np.float32))
        rows = choose(shown.sum(1) + asked.sum(1))
        own = np.concatenate(rows)
        ids, _ = data.read(index[own], self._variant(key.stream, key.counter_B[own], key.seed))
        registers = self.model.config.registers
        block = draw_blocks(self.layout, shown, asked, key.sub("block")) if self.model.in_blocks else None
        ends = np.cumsum([len(r) for r in rows])
        return [
            Part(pack(self.layout, ids[end - len(r) : end], shown[r], asked[r], registers,
                      block_BC=None if block is None else block[r]), answers)
            for r, end in zip(rows, ends.tolist(), strict=True)
        ]

    def batch(self, step: int) -> list[Part]:
        counter, parts = self._counters(step), self.config.train.accumulate

        def mine(tokens_B: np.ndarray) -> list[np.ndarray]:
            return np.array_split(self._mine(tokens_B, step), parts)

        if self.stand_ins is not None:
            return self._of_lanes(step)
        index, skipped = self._readable(step)
        parts = self._parts(self.train, index, Key(self.config.seed, "mask", counter), mine)
        return [replace(parts[0], skipped=tuple(skipped.values())), *parts[1:]] if skipped else parts

    def _of_lanes(self, step: int) -> list[Part]:
        """Return this rank's parts of a step whose other samples it knows nothing of; `settle` puts in the answers of all."""
        counter, found = self._found(step)
        rows = np.array_split(np.arange(len(counter)), self.config.train.accumulate)
        parts = self._parts(self.train, found.index_B, Key(self.config.seed, "mask", counter), lambda tokens_B: rows)
        return [replace(parts[0], skipped=tuple(found.skipped.values()), lost=tuple(found.lost.items())), *parts[1:]]

    def _found(self, step: int) -> tuple[np.ndarray, Found]:
        """Return the positions of this rank's samples in the order, and what is read for them."""
        assert self.stand_ins is not None
        counter = self._counters(step)[self._mine(np.empty(0), step)]
        return counter, self.stand_ins.readable(counter, self._variant("mask", counter))

    def settle(self, parts: list[Part]) -> list[Part]:
        """Return a step's parts with what all ranks say of it, where each has made its own without knowing of the others'."""
        if self.stand_ins is None:
            return parts
        first = parts[0]
        told = torch.tensor([float(len(first.lost) + len(first.skipped))], dtype=torch.float64)
        sums = dist.sum_of(torch.cat([first.answers_M.double().cpu(), told]))
        answers = sums[:-1].to(first.answers_M)
        if sums[-1]:
            every = dist.gathered((first.skipped, first.lost))
            lost = {key: why for _, some in every for key, why in some}
            known = {key[1:] for key in self.lost}
            new = {key[1:]: why for key, why in lost.items() if key[1:] not in known}
            notes = [f"{why}; others stand in for its {len(self.train.split.shards[s])} samples in this epoch"
                     for (_, s), why in new.items()]
            self.lost |= lost
            parts[0] = replace(first, skipped=tuple(why for some, _ in every for why in some), notes=tuple(notes))
        return [replace(p, answers_M=answers) for p in parts]

    def _mine(self, tokens_B: np.ndarray, step: int) -> np.ndarray:
        """Return the places of this rank's samples in a step's batch; of a stream, those of its own lanes."""
        if isinstance(self.order, StreamOrder):
            rows = self.order.rows(self.rank, self.ranks)
            self.train.soon(self.order.ahead(rows, step, self.config.train.steps))
            return rows
        return deal(tokens_B, self.ranks)[self.rank]

    def _readable(self, step: int) -> tuple[np.ndarray, dict[int, str]]:
        """Return the samples of a step, and what was wrong with those that others stand for, by place.

        Each rank looks at the whole step, so that all agree: answers are counted over samples that others read.
        """
        counter = self._counters(step)
        index, skipped = self.order.at(counter), {}
        if not self.config.data.skip_broken:
            return index, skipped
        todo, ahead = np.arange(len(index)), 0
        while len(todo):
            bad = self.train.broken(index[todo], self._variant("mask", counter[todo]))
            todo, ahead = todo[sorted(bad)], ahead + 1
            for place, why in zip(todo.tolist(), (bad[i] for i in sorted(bad)), strict=True):
                skipped.setdefault(place, why)
            if ahead > TRIES:
                raise DataError(f"{TRIES} samples on end cannot be read, the last because {why}", "run 'nano4m tokenize' again")
            index[todo] = self.order.at(counter[todo] + ahead)
        return index, skipped

    def _variant(self, stream: str, counter_B: np.ndarray, seed: int | None = None) -> np.ndarray:
        variants = max(s.variants for s in self.layout.specs)
        mark = bits(self.config.seed if seed is None else seed, stream + "/variant", counter_B)
        return (mark % np.uint64(variants)).astype(np.int64)

    @staticmethod
    def tokens(part: Part) -> int:
        """Return how many tokens of a part are read (registers among them) or asked."""
        return len(part.packed.enc_ids) + len(part.packed.dec_ids)

    def loss(self, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy per modality over its answers in the whole step, weighted mean over modalities present."""
        total_M, _ = self.model.modality_sums(part.packed)
        present = part.answers_M > 0
        ce_M = total_M / part.answers_M.clamp_min(1)
        weight = self.weight_M.to(ce_M.device) * present
        loss = (weight * ce_M).sum() / weight.sum().clamp_min(1e-9)
        return loss, {f"ce_{n}": ce_M[m] for m, n in enumerate(self.layout.names) if bool(present[m])}

    def validate(self) -> dict[str, float]:
        """Return losses on the validation samples, whose parts the ranks share out. All ranks take part, as often each."""
        if self.val is None:
            return {}
        if self._val is None:
            with dist.together():  # a rank may lack a shard that the others do not need
                self._val = self._val_parts(self.val)
        device = next(self.model.parameters()).device
        parts, spare = [p.to(device) for p in self._val[0]], self._val[1]
        each = [self.model.modality_sums(p.packed)[0] for p in parts]
        sums = dist.sum_of(sum(each[:-1] if spare else each, torch.zeros_like(each[0])).cpu())
        answers = parts[0].answers_M.cpu()
        ce = (sums / answers.clamp_min(1)).tolist()
        figures = {f"ce_{n}": ce[m] for m, n in enumerate(self.layout.names) if answers[m] > 0}
        return {"loss": sum(figures.values()) / len(figures), **figures}

    def _val_parts(self, data: TokenData) -> tuple[list[Part], bool]:
        """Return this rank's validation parts, and whether the last one does not count: who has a part less than others does a
        sample more, because ranks that share a model out fetch it together."""
        index = np.arange(min(self.config.train.val_samples, len(data)))
        parts = np.array_split(index, max(-(-len(index) // VAL_PART), min(self.ranks, len(index))))
        own = parts[self.rank :: self.ranks]
        spare = len(own) < -(-len(parts) // self.ranks)
        return self._parts(data, index, Key(0, "val-mask", index), lambda tokens_B: own + [index[:1]] * spare), spare

    def _own(self, step: int, planned: bool = False) -> np.ndarray:
        """Return this rank's samples of a step; planned: without looking whether they can be read (which may take for ever)."""
        if self.stand_ins is not None and not planned:
            return self._found(step)[1].index_B
        counter = self._counters(step)
        index = self.order.at(counter) if planned else self._readable(step)[0]
        if self.ranks > 1:
            shown, asked = self.mixture.draw(self.train.lengths(index), Key(self.config.seed, "mask", counter))
            index = index[self._mine(shown.sum(1) + asked.sum(1), step)]
        return index

    def keys(self, step: int) -> list[str]:
        """Return the keys of this rank's samples of a step."""
        return [self.train.key(int(i)) for i in self._own(step)]

    def places(self, step: int) -> list[str]:
        """Return the keys of this rank's samples of a step, by the shards that they lie in."""
        by_shard: dict[str, list[str]] = {}
        for i in self._own(step, planned=True).tolist():
            shard, place = self.train.split.locate(i)
            by_shard.setdefault(str(shard.path), []).append(shard.keys[place])
        return [f"{path}: {', '.join(keys)}" for path, keys in by_shard.items()]

    def state(self) -> dict[str, Any]:
        lost = {"lost": [[*key, why] for key, why in self.lost.items()]} if self.lost else {}
        return {"specs": [s.model_dump(mode="json") for s in self.layout.specs], **lost}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over from a checkpoint's state what a step's samples hang on besides its number."""
        self.lost = {(lane, epoch, shard): why for lane, epoch, shard, why in state.get("lost", [])}
        if self.stand_ins is not None:
            self.stand_ins.restore(state.get("lost", []))


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
