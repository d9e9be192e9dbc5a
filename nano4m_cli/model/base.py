"""What the models share: the config of their layers, and answers as logits over each slot's own vocabulary.

A model is given a packed batch and returns logits for what is asked of it; how it gets there is its own. `wholly`
says that everything which is neither shown nor asked must be asked as well (a model that was never trained with slots
missing); `at_once` that the slots of a grid are answered independently of each other; `encodes` that what is shown is read
apart from what is asked; `causal_text` that a text's slot sees the ids before it; `reads` which questions its order of
reading can answer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.init import Init, initialise
from nano4m_cli.model.layers import Block, Linear, Norm, TokenTable, make_norm, position_table
from nano4m_cli.model.nll import grouped_nll
from nano4m_cli.model.positions import Fourier, rotations
from nano4m_cli.spec import Layout


class TransformerConfig(Config):
    """Options of the layers.

    size: depth and width, as each model spells them.
    positions: sincos and learned are added as a table, fourier as learned functions of the coordinates; rope turns queries
        and keys (model/positions.py).
    init: how weights begin (model/init.py).
    mup_base: the width at which rates and sizes were chosen; others are then scaled by muP (null: not at all).
    """

    form: ClassVar[tuple[str, str]]  # of `size`: a pattern, and how it reads
    size: str
    head_width: int = 64
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_ratio: float = 4.0
    norm: Norm = "layernorm"
    qk_norm: bool = False
    positions: Literal["sincos", "learned", "fourier", "rope"] = "sincos"
    init: Init = "scaled"
    mup_base: int | None = Field(None, ge=1)
    attention: Literal["auto", "padded", "sdpa", "loop", "varlen"] = "auto"

    @field_validator("size")
    @classmethod
    def _size(cls, v):
        pattern, reads = cls.form
        if not re.fullmatch(pattern, v) or 0 in [int(n) for n in re.findall(r"\d+", v)]:
            raise ValueError(f"a size reads {reads}")
        return v

    @model_validator(mode="after")
    def _divides(self) -> TransformerConfig:
        if self.head_width < 1 or self.mlp_ratio <= 0:
            raise ValueError("head_width and mlp_ratio are positive")
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} does not divide into heads of {self.head_width}")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"rope turns pairs, head_width {self.head_width} is odd")
        if self.mup_base and self.init not in ("scaled", "zero"):
            raise ValueError(f"muP scales init with the width, '{self.init}' does not: choose scaled or zero")
        return self

    @property
    def numbers(self) -> list[int]:
        """The numbers in `size`."""
        return [int(n) for n in re.findall(r"\d+", self.size)]

    @property
    def width(self) -> int:
        return self.numbers[-1]

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def base(self) -> int:
        """The width whose sizes and rates are used: its own without muP."""
        return self.mup_base or self.width


class StackConfig(TransformerConfig):
    """size: "d<layers>w<width>", e.g. "d8w512": 8 layers of width 512."""

    form: ClassVar = (r"d\d+w\d+", "d<layers>w<width>, e.g. d8w512")
    size: str = "d4w128"
    registers: ClassVar[int] = 0

    @property
    def layers(self) -> int:
        return self.numbers[0]


class PairConfig(TransformerConfig):
    """size: "d<layers>-<layers>w<width>", e.g. "d6-6w512": 6 encoder and 6 decoder layers of width 512."""

    form: ClassVar = (r"d\d+-\d+w\d+", "d<encoder layers>-<decoder layers>w<width>, e.g. d6-6w512")
    size: str = "d6-6w512"

    @property
    def encoder_layers(self) -> int:
        return self.numbers[0]

    @property
    def decoder_layers(self) -> int:
        return self.numbers[1]


class TokenModel(nn.Module, ABC):
    """A model over the modalities of a layout; subclasses have `head` and say how answers' vectors come about."""

    config: TransformerConfig
    layout: Layout
    head: TokenTable
    wholly: ClassVar[bool] = False
    at_once: ClassVar[bool] = True
    encodes: ClassVar[bool] = False
    causal_text: ClassVar[bool] = True
    notes: Sequence[str] = ()  # what a reader of its losses must know

    def _columns(self, layout: Layout) -> None:
        self.register_buffer("sequence_C", torch.from_numpy(layout.sequence_C), persistent=False)
        self.register_buffer("modality_C", torch.from_numpy(layout.modality_C), persistent=False)
        self.register_buffer("vocab_C", torch.from_numpy(layout.vocab_start[layout.group_C]), persistent=False)

    def _positions(self, config: TransformerConfig, layout: Layout) -> None:
        table = position_table(layout, config.width)
        self.fourier = Fourier(layout, config.width) if config.positions == "fourier" else None
        if config.positions == "learned":
            self.position = nn.Parameter(table)
        else:
            self.register_buffer("position", table, persistent=False)
        self.rope = config.positions == "rope"
        if self.rope:
            self.register_buffer("rotation", rotations(layout, config.head_width), persistent=False)

    def _head(self, config: TransformerConfig, layout: Layout) -> TokenTable:
        return TokenTable(layout, config.width, config.base**-0.5 * 0.5, config.base / config.width)

    def _ready(self, config: TransformerConfig, layout: Layout) -> None:
        """What a constructor ends with."""
        self._columns(layout)
        initialise(self, config.init)

    def places(self, col_T: Tensor) -> Tensor:
        """Return (T, D): positions of columns, to be added."""
        return F.embedding(col_T, self.position if self.fourier is None else self.fourier())

    def turns(self, col_T: Tensor) -> Tensor | None:
        """Return (T, 2, P): how queries and keys of columns turn (-1: a register), or None without rope."""
        return self.rotation[col_T] if self.rope else None

    @property
    def in_blocks(self) -> bool:
        """Whether what is shown comes in blocks, none of which sees a later one."""
        return False

    @property
    def grown(self) -> float:
        """Width over the width whose learning rates are used (1 without muP)."""
        return self.config.width / self.config.base

    @property
    def device(self) -> torch.device:
        return self.head.table.device

    def reads(self, sources: Sequence[str], target: str) -> bool:
        """Return whether the model can answer for `target` with exactly `sources` shown."""
        return True

    def posed(self, directions: dict[str, float]) -> dict[str, float]:
        """Return how often training posed each direction, given how often masks did."""
        return directions

    @abstractmethod
    def answers(self, batch: Packed) -> Tensor:
        """Return (Td, D): a vector for each slot that is asked."""

    def logits(self, batch: Packed, answers_TD: Tensor) -> list[Tensor | None]:
        """Return per vocabulary group the logits (n, vocab_size) of the slots asked of it, or None."""
        weights = self.head.weight().split(self.layout.sizes)
        return [None if index is None else F.linear(answers_TD.index_select(0, index), weight)
                for weight, index in zip(weights, batch.group_index, strict=True)]

    def forward(self, batch: Packed) -> list[Tensor | None]:
        """Return `logits` of the batch."""
        return self.logits(batch, self.answers(batch))

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Hold what is made of parameters at every call, for calls without gradients inside (parameters must not change): the
        head's table, and under autocast all weights in its type."""
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        layers = [m for m in self.modules() if isinstance(m, Linear)] if dtype else []
        head = [self.head] if isinstance(self.head, TokenTable) else []
        before = [m._held for m in (*layers, *head)]
        try:
            for m in (*layers, *head):
                m.hold(dtype)
            yield
        finally:
            for m, held in zip((*layers, *head), before, strict=True):
                m._held = held

    def ask(self, batch: Packed) -> list[Tensor | None]:
        """Return `logits` of the batch to rounding, in the quickest way: without gradients, while generating."""
        return self(batch)

    def nll(self, batch: Packed) -> Tensor:
        """Return (Td,) fp32: -log p of each answer, in nats."""
        return self.nll_of(batch, self.answers(batch))

    def nll_of(self, batch: Packed, answers_TD: Tensor) -> Tensor:
        """Return `nll` of answers' vectors that are made."""
        return grouped_nll(answers_TD, self.head.weight(), batch.dec_ids, batch.group_index, self.layout.sizes)

    def modality_sums(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return (summed -log p, count), each (M,), per modality of the answers."""
        modality = self.modality_C[batch.dec_col]
        zero = torch.zeros(len(self.layout.specs), device=modality.device)
        total = zero.index_add(0, modality, self.nll(batch))
        return total, zero.index_add(0, modality, torch.ones_like(modality, dtype=zero.dtype))


class Stack(TokenModel):
    """A model of one stack of blocks: `unknown` (1, D) stands where there is no token to be read."""

    def __init__(self, config: StackConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        d, m = config.width, len(layout.specs)
        self.embed = TokenTable(layout, d, 0.5)
        self.modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.unknown = nn.Parameter(torch.randn(1, d) * 0.5)
        self._positions(config, layout)
        self.blocks = nn.ModuleList([Block(config, config.layers, False) for _ in range(config.layers)])
        self.norm = make_norm(config.norm, d)
        self.head = self._head(config, layout)
        self._ready(config, layout)

    def slots(self, col_T: Tensor) -> Tensor:
        """Return (T, D): the modality of slots, and their position unless it turns."""
        modality = F.embedding(self.modality_C[col_T], self.modality)
        return modality if self.rope else modality + self.places(col_T)
