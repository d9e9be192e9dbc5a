"""What a model of other modalities can take over from a trained one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.layers import TokenTable


class Moved(NamedTuple):
    """Parameters copied and drawn, and the modalities whose tables were copied."""

    copied: int
    drawn: int
    known: list[str]


@torch.no_grad()
def transplant(old: TokenModel, new: TokenModel) -> Moved:
    """Copy into a new model what means the same in an old one of the same config, and leave the rest as it is.

    That is all that is of no modality; the vectors of modalities by name; and where the ids mean the same, those of ids. Of learned
    positions, those of modalities of the same shape.
    """
    shared = [(m, old.layout.names.index(s.modality)) for m, s in enumerate(new.layout.specs) if s.modality in old.layout.names]
    alike = [(m, k) for m, k in shared if new.layout.specs[m].same_ids_as(old.layout.specs[k]) is None]
    before, copied, total = dict(old.named_parameters()), 0, 0
    tables = {name: t for name, t in new.named_modules() if isinstance(t, TokenTable)}
    for name, p in new.named_parameters():
        total += p.numel()
        owner, _, last = name.rpartition(".")
        if name not in before:  # levels, which the run's modalities do not have
            continue
        other = before[name].to(p.device)
        if owner in tables:
            told = torch.zeros(len(p), dtype=torch.bool, device=p.device)
            for m, k in alike:
                mine, its = _ids(new, m), _ids(old, k)
                if last == "level":
                    mine, its = _levels(tables[owner], mine), _levels(old.get_submodule(owner), its).to(p.device)
                p[mine] = other[its]
                told[mine] = True
            copied += int(told.sum()) * p.shape[1]
        elif name in ("enc_modality", "dec_modality", "begin", "modality"):
            for m, k in shared:
                p[m] = other[k]
                copied += p.shape[1]
        elif name == "position":
            for m, k in shared:
                if new.layout.specs[m].shape == old.layout.specs[k].shape:
                    mine, its = (x.layout.slice(new.layout.names[m]) for x in (new, old))
                    p[mine] = other[its]
                    copied += p[mine].numel()
        elif p.shape == other.shape:
            p.copy_(other)
            copied += p.numel()
    return Moved(copied, total - copied, [new.layout.names[m] for m, _ in alike])


def _ids(model: TokenModel, m: int) -> slice:
    """Return the rows of a modality's ids in the tables."""
    groups = [g for g, (owner, _, _) in enumerate(model.layout.groups) if owner == m]
    return slice(int(model.layout.vocab_start[groups[0]]), int(model.layout.vocab_start[groups[-1] + 1]))


def _levels(table: TokenTable, ids: slice) -> Tensor:
    """Return the rows of the level table that ids use, in their order (and the first one, which stands for no level)."""
    return torch.unique(torch.cat([table.level_row.new_zeros(1), table.level_row[ids].flatten()]))
