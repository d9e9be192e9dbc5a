"""apple's 4M (github.com/apple/ml-4m, `FM`), to run its checkpoints: tokens of pictures, and text.

A text is trained by masked spans: what is missing of it stands in the encoder as a sentinel [S_1], and the decoder writes
it left to right from that sentinel, counting positions from it. So a text that has not ended brings [S_1] behind what is
shown of it, and the asked part begins anew at position 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nano4m_cli.errors import WeightsError
from nano4m_cli.model._foreign import ForeignConfig, ForeignModel, Head, Shown, Slots, with_more
from nano4m_cli.model.attention import Mask
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.layers import position_table
from nano4m_cli.spec import Layout, TokenSpec


class AppleConfig(ForeignConfig):
    """texts: which of the modalities are text.

    sentinel, eos: ids of [S_1] and [EOS]. registers: learned tokens before the encoder's input.
    """

    texts: list[str] = []
    registers: int = Field(0, ge=0)
    sentinel: int = Field(5, ge=0)
    eos: int = Field(3, ge=0)

    def check(self, specs: Sequence[TokenSpec]) -> None:
        """Raise WeightsError, which names the modality, unless tokens of these specs fit the tables."""
        for spec in specs:
            m, name = spec.modality, f"the checkpoint's '{spec.modality}'"
            vocab, length = self.table(m)
            text = m in self.texts
            if (spec.kind == "sequence") != text or spec.codebooks > 1:
                raise WeightsError(f"{name} is {'text' if text else 'a picture'}, the data set's is of kind '{spec.kind}'")
            if spec.vocab_size != vocab:
                raise WeightsError(
                    f"{name} has {vocab} ids, the data set's {spec.vocab_size}",
                    f"nano4m tokenize {m}.name=hf_text {m}.weights=DIR with the checkpoint's own vocabulary" if text
                    else "they are not of the same tokenizer",
                )
            if text and spec.eos != self.eos:
                raise WeightsError(f"{name} ends in id {self.eos}, the data set's in {spec.eos}", f"nano4m tokenize {m}.eos=[EOS]")
            if spec.slots > length or (spec.slots < length and not text):
                hint = f"nano4m tokenize {m}.max_length={length}" if text else None
                raise WeightsError(f"{name} has {length} slots, the data set's {spec.slots}", hint)


class Apple4M(ForeignModel):
    """Args: the config, and the layout of those of its modalities that are used. Tables hold these modalities only."""

    config: AppleConfig
    notes: ClassVar[list[str]] = ["an imported apple 4M: a text's asked part is written from the sentinel [S_1]"]

    def __init__(self, config: AppleConfig, layout: Layout):
        super().__init__(config, layout)
        c = self.config
        c.check(layout.specs)
        d, m, total = c.width, len(layout.specs), int(layout.vocab_start[-1])
        self.embed = nn.Parameter(torch.randn(total, d) * 0.02)
        self.enc_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.dec_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        for side in ("enc", "dec"):
            self.register_buffer(f"{side}_position", position_table(layout, d))
        self.mask_token = nn.Parameter(torch.randn(1, d) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(c.registers, d) * 0.02) if c.registers else None
        self.context = nn.Linear(d, d)
        self.head = Head(total, d)
        # The decoder embeds the ids of text only; its table begins at `told_C` for the text of a column.
        sizes = [s.vocab_size if s.kind == "sequence" else 0 for s in layout.specs]
        self.told = nn.Parameter(torch.randn(sum(sizes), d) * 0.02)
        told = np.cumsum([0, *sizes])[:-1]
        self.register_buffer("told_C", torch.from_numpy(told[layout.modality_C]), persistent=False)
        self.register_buffer("start_C", torch.from_numpy(layout.start[layout.modality_C]), persistent=False)
        self.texts = [(i, s) for i, s in enumerate(layout.specs) if s.kind == "sequence"]

    def shown(self, batch: Packed) -> Shown:
        register = batch.enc_col < 0
        col = batch.enc_col.clamp_min(0)
        slots = Slots(self.vocab_C[col] + batch.enc_ids, self.modality_C[col].masked_fill(register, -1), col)
        rows = batch.enc
        for m, spec in self.texts:
            slots, rows = self._to_be_written(slots, rows, m, spec)
        register = slots.modality < 0
        again = F.embedding(slots.modality.clamp_min(0), self.enc_modality) + F.embedding(slots.place, self.enc_position)
        again = again.masked_fill(register[:, None], 0.0)
        x = F.embedding(slots.row, self.embed)
        if self.register_tokens is not None:
            tokens = self.register_tokens.repeat(batch.samples, 1)
            x = x.index_copy(0, register.nonzero().squeeze(1), tokens.to(x.dtype))
        return Shown(x + again, again, rows)

    def _to_be_written(self, slots: Slots, rows, m: int, spec: TokenSpec):
        """Put [S_1] behind each text that is shown without its end."""
        sample = torch.repeat_interleave(torch.arange(rows.rows, device=slots.row.device), rows.lengths)
        mine = slots.modality == m
        first = int(self.layout.vocab_start[self.layout.group_C[self.layout.start[m]]])
        count = torch.bincount(sample[mine], minlength=rows.rows)
        ended = torch.bincount(sample[mine & (slots.row == first + spec.eos)], minlength=rows.rows)
        open_ = ((count > 0) & (ended == 0) & (count < spec.slots)).nonzero().squeeze(1)
        more = Slots(
            torch.full_like(open_, first + self.config.sentinel), torch.full_like(open_, m),
            int(self.layout.start[m]) + count[open_],
        )
        return with_more(slots, rows, open_, more)

    def asked(self, batch: Packed) -> tuple[Tensor, Mask]:
        col, text = batch.dec_col, self.sequence_C[batch.dec_col]
        begun = batch.dec_self.place % batch.dec_self.width  # how many of its run are asked before a slot
        place = torch.where(text, self.start_C[col] + begun, col)
        before = torch.where(begun > 0, batch.dec_prev, self.config.sentinel)
        y = self.mask_token.expand(len(col), -1)
        at = text.nonzero().squeeze(1)
        if len(at):
            y = y.index_copy(0, at, F.embedding((self.told_C[col] + before)[at], self.told))
        y = y + F.embedding(self.modality_C[col], self.dec_modality) + F.embedding(place, self.dec_position)
        return y, Mask(batch.dec_self, batch.dec_self, causal=batch.dec_causal)
