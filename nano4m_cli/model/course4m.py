"""The 4M of the EPFL course and of the projects that grew from it (nanofm's `FourM`; nano4M-Audio), to run their checkpoints.

It poses other questions than `fourm`: one table of ids serves all modalities; every slot that is asked sees all others
that are asked, of any modality; text is asked slot by slot like a picture, and stands in its row as
[SOS] ids [EOS] [PAD] ..., of which our data hold ids and EOS. So a text that is shown brings its [SOS], and its [PAD]s
once it has ended; slots of [SOS] and [PAD] are never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nano4m_cli.errors import WeightsError
from nano4m_cli.model._foreign import ForeignConfig, ForeignModel, Head, Shown, Slots, with_more
from nano4m_cli.model.attention import Mask
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.layers import sincos
from nano4m_cli.spec import Layout, TokenSpec


class CourseConfig(ForeignConfig):
    """vocab, places: rows of the tables of ids and of positions. sos, eos, pad: ids of text.
    softmax: over "all" ids of the table, as the original trains and publishes its losses, or over the modality's "own".
    Generation is always over the modality's own.
    """

    registers: ClassVar[int] = 0
    vocab: int = Field(50304, ge=1)
    places: int = Field(512, ge=1)
    context_bias: bool = True
    logits_bias: bool = False
    sos: int = 50258
    eos: int = 50259
    pad: int = 50257
    softmax: Literal["all", "own"] = "all"

    @model_validator(mode="after")
    def _room(self) -> CourseConfig:
        if max(self.vocab_sizes, default=0) > self.vocab or max(self.lengths, default=0) > self.places:
            raise ValueError("a modality has more ids than 'vocab' or more slots than 'places'")
        return self

    def check(self, specs: Sequence[TokenSpec]) -> None:
        """Raise WeightsError, which names the modality, unless tokens of these specs fit the tables."""
        for spec in specs:
            m, name = spec.modality, f"the checkpoint's '{spec.modality}'"
            vocab, length = self.table(m)
            ids = spec.vocab_size * spec.codebooks
            if spec.kind != "sequence":
                if ids != vocab:
                    each = f"{spec.codebooks} x {spec.vocab_size}" if spec.codebooks > 1 else ids
                    raise WeightsError(f"{name} has {vocab} ids, the data set's {each}", "they are not of the same tokenizer")
                if spec.slots != length:
                    raise WeightsError(f"{name} has {length} slots, the data set's {spec.slots}")
                continue
            if max(self.sos, self.eos, self.pad) >= vocab or ids > vocab:
                top = max(self.sos, self.eos, self.pad, ids - 1)
                raise WeightsError(f"{name} has {vocab} ids, text needs id {top}", "say model.sos, model.eos and model.pad")
            if ids < min(self.sos, self.eos, self.pad):
                raise WeightsError(
                    f"{name} has {min(self.sos, self.eos, self.pad)} ids of words, the data set's {ids}",
                    f"nano4m tokenize {m}.name=hf_text with the checkpoint's own vocabulary (GPT-2's)",
                )
            if spec.slots + 1 > length:
                hint = f"nano4m tokenize {m}.name=hf_text {m}.max_length={length - 1}"
                raise WeightsError(f"{name} has {length} slots with [SOS], the data set's {spec.slots} without it", hint)


class Course4M(ForeignModel):
    """Args: the config, and the layout of those of its modalities that are used."""

    causal_text = False
    config: CourseConfig

    def __init__(self, config: CourseConfig, layout: Layout):
        super().__init__(config, layout)
        c = self.config
        c.check(layout.specs)
        d, m = c.width, len(c.modalities)
        self.embed = nn.Parameter(torch.randn(c.vocab, d) * 0.02)
        self.register_buffer("position", sincos(np.arange(c.places)[:, None], d, 1))
        self.enc_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.dec_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.context = nn.Linear(d, d, bias=c.context_bias)
        self.head = Head(c.vocab, d, c.logits_bias)
        text = [s.kind == "sequence" for s in layout.specs]
        rows = [np.arange(v) + q * v for _, q, v in layout.groups]  # codebook q has its own ids in the table
        for g, (i, _, _) in enumerate(layout.groups):
            if text[i]:
                rows[g][layout.specs[i].eos] = c.eos
        slot_C = np.arange(layout.columns) - layout.start[layout.modality_C]
        theirs = np.array([c.modalities.index(n) for n in layout.names])
        for name, array in {"row_V": np.concatenate(rows), "place_C": slot_C + np.array(text)[layout.modality_C],
                            "theirs_C": theirs[layout.modality_C]}.items():
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        self.texts = [(c.modalities.index(s.modality), c.table(s.modality)[1]) for s in layout.specs if s.kind == "sequence"]

    @property
    def notes(self) -> list[str]:
        if self.config.softmax == "own":
            return ["an imported course model, its softmax over each modality's own ids (the published losses are over all)"]
        return [f"an imported course model: losses are over all {self.config.vocab} ids of its one table, as published"]

    def shown(self, batch: Packed) -> Shown:
        col = batch.enc_col
        row = self.row_V[self.vocab_C[col] + batch.enc_ids]
        slots, rows = Slots(row, self.theirs_C[col], self.place_C[col]), batch.enc
        for modality, length in self.texts:
            slots, rows = self._whole_row(slots, rows, modality, length)
        again = F.embedding(slots.place, self.position)
        return Shown(F.embedding(slots.row, self.embed) + F.embedding(slots.modality, self.enc_modality) + again, again, rows)

    def _whole_row(self, slots: Slots, rows, modality: int, length: int):
        """Add what is known of a text's row besides its ids: [SOS] where any is shown, [PAD] where the end is."""
        sample = torch.repeat_interleave(torch.arange(rows.rows, device=slots.row.device), rows.lengths)
        mine = slots.modality == modality
        some = torch.unique(sample[mine])
        end = (mine & (slots.row == self.config.eos)).nonzero().squeeze(1)
        n = length - 1 - slots.place[end]
        after = torch.arange(int(n.sum()), device=n.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        place = torch.cat([torch.zeros_like(some), torch.repeat_interleave(slots.place[end] + 1, n) + after])
        row = torch.where(torch.arange(len(place), device=n.device) < len(some), self.config.sos, self.config.pad)
        more = Slots(row, torch.full_like(row, modality), place)
        return with_more(slots, rows, torch.cat([some, torch.repeat_interleave(sample[end], n)]), more)

    def asked(self, batch: Packed) -> tuple[Tensor, Mask]:
        col = batch.dec_col
        y = F.embedding(self.theirs_C[col], self.dec_modality) + F.embedding(self.place_C[col], self.position)
        return y, Mask(batch.dec, batch.dec)

    def logits(self, batch: Packed, answers_TD: Tensor) -> list[Tensor | None]:
        weight, start = self.head.weight().to(answers_TD.dtype), self.layout.vocab_start
        out: list[Tensor | None] = []
        for g, index in enumerate(batch.group_index):
            rows = self.row_V[start[g] : start[g + 1]]
            bias = None if self.head.bias is None else self.head.bias[rows].to(answers_TD.dtype)
            out.append(None if index is None else F.linear(answers_TD.index_select(0, index), weight[rows], bias))
        return out

    def nll_of(self, batch: Packed, answers_TD: Tensor) -> Tensor:
        h = answers_TD
        if self.config.softmax == "own":
            out = h.new_zeros(len(h), dtype=torch.float32)
            for index, logits in zip(batch.group_index, self.logits(batch, h), strict=True):
                if index is not None:
                    loss = F.cross_entropy(logits.float(), batch.dec_ids[index], reduction="none")
                    out = out.index_copy(0, index, loss)
            return out
        row = self.row_V[self.vocab_C[batch.dec_col] + batch.dec_ids]
        weight = self.head.weight().to(h.dtype)
        bias = None if self.head.bias is None else self.head.bias.to(h.dtype)
        parts = [F.cross_entropy(F.linear(x, weight, bias).float(), r, reduction="none")  # the logits of some at a time
                 for x, r in zip(h.split(4096), row.split(4096), strict=True)]
        return torch.cat(parts) if parts else h.new_zeros(0)
