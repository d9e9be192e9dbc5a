"""The sampler: known slots, a schedule that says which slots to fill when, a model call, a choice of ids.

Every draw is a function of (seed, request, slot), so a request gives the same sample alone and inside any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.errors import UsageError
from nano4m_cli.generate.choose import counts, draw, filter_logits
from nano4m_cli.masking._mixture import IN_DISTRIBUTION
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import Packed, pack
from nano4m_cli.model.fourm import FourM
from nano4m_cli.model.gpt import GPT
from nano4m_cli.rng import uniform
from nano4m_cli.spec import Layout
from nano4m_cli.tokenizers._base import Tokenizer
from nano4m_cli.tokenizers._fsq import FSQ

GUIDANCE = 2.5  # chosen on the val split of scenes: scripts/bench/guidance.py
Scheme = Literal["auto", "roar", "maskgit", "ar", "onepass", "mean"]


class GenerateOptions(Config):
    """scheme: roar (random order), maskgit (most confident first), ar (left to right), onepass (all at once); auto is
    roar for grids and codes. Text is always ar. Order of filters: temperature, top-k, top-p; temperature 0 is greedy.
    mean: an estimate instead of a sample, for what the condition determines (depth and normals of a picture): each slot
    is decoded from the expected value of its code, its id is the likeliest; temperature and filters do not matter.

    guidance: scale s of classifier-free guidance of grids and codes (Ho and Salimans 2022, arXiv:2207.12598): logits
    are u + s (c - u), where c sees all that is known and u only the target's own known slots. 1: none, and half the
    work. None: `GUIDANCE` where training posed u's question, else 1 (see `resolve`).
    """

    scheme: Scheme = "auto"
    steps: int = Field(12, ge=1)
    schedule: Literal["linear", "cosine"] = "linear"
    temperature: float = Field(0.5, ge=0)
    text_temperature: float = Field(0.3, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    guidance: float | None = Field(None, ge=0, le=100)
    seed: int = Field(0, ge=0)


def resolve(options: GenerateOptions, targets: Sequence[str], model: TokenModel, posed: Mapping[str, float]) -> GenerateOptions:
    """Return options with guidance set: where it is None, `GUIDANCE` if training asked for every grid and codes target
    with nothing else shown, else 1.

    Args:
        posed: how often training posed each direction; "->rgb" is rgb from nothing.
    """
    if options.guidance is not None:
        return options
    guided = [t for t in targets if model.layout.specs[model.layout.names.index(t)].kind != "sequence"]
    able = guided and all(posed.get(f"->{t}", 0.0) >= IN_DISTRIBUTION for t in guided)
    return options.model_copy(update={"guidance": GUIDANCE if able else 1.0})


@dataclass
class State:
    """Requests under way: ids (B, C) and which of them are known (B, C); request_B numbers them for the draws.

    values: per modality filled by scheme "mean", the expected code values (B, slots, levels).
    """

    ids_BC: np.ndarray
    known_BC: np.ndarray
    request_B: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, index: np.ndarray) -> State:
        values = {t: v[index] for t, v in self.values.items()}
        return State(self.ids_BC[index], self.known_BC[index], self.request_B[index], values)

    def decode(self, layout: Layout, target: str, tokenizer: Tokenizer, batch: int = 128) -> list[Any]:
        """Return the raw values of a filled modality."""
        columns, out = layout.slice(target), []
        for start in range(0, len(self.ids_BC), batch):
            part = self.rows(np.arange(start, min(start + batch, len(self.ids_BC))))
            if target in part.values:
                out += tokenizer.decode_values(part.values[target])
            else:
                out += tokenizer.decode([i[k] for i, k in zip(part.ids_BC[:, columns], part.known_BC[:, columns], strict=True)])
        return out


def fill(model: TokenModel, state: State, target: str, options: GenerateOptions) -> None:
    """Fill every unknown slot of modality `target` in place, conditioned on all that is known.

    Text is written until EOS; what follows EOS stays unknown.
    """
    spec = model.layout.specs[model.layout.names.index(target)]
    with torch.inference_mode():
        if isinstance(model, GPT):
            _read_on(model, state, target, options)
        elif spec.kind == "sequence" and not model.wholly and model.causal_text:
            _write_text(model, state, target, options)
        elif spec.kind == "sequence" and not model.wholly:
            left_to_right = {"scheme": "ar", "temperature": options.text_temperature}
            _fill_slots(model, state, target, options.model_copy(update=left_to_right))
        elif options.scheme == "mean":
            _estimate(model, state, target, options)
        else:
            _fill_slots(model, state, target, options)


def chain(model: TokenModel, state: State, targets: Sequence[str], options: GenerateOptions, batch: int = 128) -> None:
    """Fill several modalities one after the other, each conditioned on those before; requests in parts of `batch`."""
    for start in range(0, len(state.ids_BC), batch):
        index = np.arange(start, min(start + batch, len(state.ids_BC)))
        part = state.rows(index)
        for target in targets:
            fill(model, part, target, options)
        state.ids_BC[index], state.known_BC[index] = part.ids_BC, part.known_BC
        for target, values in part.values.items():
            state.values.setdefault(target, np.zeros((len(state.ids_BC), *values.shape[1:]), np.float32))[index] = values


def _fill_slots(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    columns = model.layout.slice(target)
    unknown = ~state.known_BC[:, columns] & _there(model.layout, state)[:, columns]
    slots = unknown.shape[1]
    scheme = "roar" if o.scheme == "auto" else o.scheme
    steps = {"onepass": 1, "ar": slots}.get(scheme, o.steps)
    if scheme == "ar":
        order = np.broadcast_to(np.arange(slots, dtype=np.float64), unknown.shape)
    else:
        order = uniform(o.seed, f"order/{target}", state.request_B[:, None], np.arange(slots))
    plan = [counts(int(n), steps, o.schedule) for n in unknown.sum(1)]
    for step in range(max((len(p) for p in plan), default=0)):
        n_now = np.array([p[step] if step < len(p) else 0 for p in plan])
        active = np.flatnonzero(n_now)
        now = unknown[active] & ~state.known_BC[active, columns]
        if scheme == "ar":  # a text may have ended
            now &= _there(model.layout, state.rows(active))[:, columns]
            if not now.any():
                break
        if scheme == "maskgit":
            asked = now
        else:
            rank = np.argsort(np.argsort(np.where(now, order[active], np.inf), axis=1, kind="stable"), axis=1)
            asked = now & (rank < n_now[active, None])
        row, slot, ids, logp = _ask(model, state.rows(active), columns, asked, target, o, step)
        if scheme == "maskgit" and step + 1 < steps:
            # Confidence of what was drawn, with Gumbel noise that fades as the schedule ends.
            u = uniform(o.seed, f"confidence/{target}", state.request_B[active][row], slot, step)
            confidence = logp - np.log(-np.log(u)) * o.temperature * (1 - (step + 1) / steps)
            grid = np.full(asked.shape, -np.inf)
            grid[row, slot] = confidence
            keep = np.argsort(np.argsort(-grid, axis=1, kind="stable"), axis=1) < n_now[active, None]
            take = keep[row, slot]
            row, slot, ids = row[take], slot[take], ids[take]
        state.ids_BC[active[row], columns.start + slot] = ids
        state.known_BC[active[row], columns.start + slot] = True
    there = _there(model.layout, state)[:, columns]
    assert (state.known_BC[:, columns] | ~there).all(), target
    state.known_BC[:, columns] &= there  # what follows the end of a text is none of it


def _estimate(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    """Fill all unknown slots at once: the likeliest ids, and the mean over the distribution of what codes stand for."""
    columns, spec = model.layout.slice(target), model.layout.specs[model.layout.names.index(target)]
    if not spec.levels:
        raise UsageError(f"scheme 'mean' needs codes that stand for numbers; those of {target} do not", "choose another --scheme")
    value_VD = FSQ(spec.levels).decode(torch.arange(spec.vocab_size))
    asked = ~state.known_BC[:, columns]
    values = value_VD[torch.from_numpy(np.where(asked, 0, state.ids_BC[:, columns]))].numpy()
    row, slot = np.nonzero(asked)
    for at, logits in _logits(model, state, columns, asked, o):
        values[row[at], slot[at]] = (logits.softmax(-1).cpu() @ value_VD).numpy()
        state.ids_BC[row[at], columns.start + slot[at]] = logits.argmax(-1).cpu().numpy()
    state.known_BC[:, columns] = True
    state.values[target] = values


def _ask(model: TokenModel, state: State, columns: slice, asked_BL: np.ndarray, target: str, o: GenerateOptions, step: int):
    """Return (row, slot, drawn id, the model's log-probability of it), numpy, for every asked slot."""
    row, slot = np.nonzero(asked_BL)
    ids, logp = np.zeros(len(row), dtype=np.int64), np.zeros(len(row))
    u = uniform(o.seed, f"draw/{target}", state.request_B[row], slot, step)
    for at, logits in _logits(model, state, columns, asked_BL, o):
        drawn, _ = draw(filter_logits(logits, o.temperature, o.top_k, o.top_p), u[at])
        # Confidence is the model's own, before temperature and filters.
        score = logits.log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
        ids[at], logp[at] = drawn.cpu().numpy(), score.cpu().numpy()
    return row, slot, ids, logp


def _logits(
    model: TokenModel, state: State, columns: slice, asked_BL: np.ndarray, o: GenerateOptions
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield (which of the asked slots in row-major order (n,), their fp32 logits (n, V)), guidance applied."""
    layout = model.layout
    asked_BC = np.zeros(state.known_BC.shape, dtype=bool)
    asked_BC[:, columns] = asked_BL
    ids_BC, shown_BC = state.ids_BC, state.known_BC
    guided = o.guidance not in (None, 1.0)
    if guided:  # every request once more, with nothing but the target shown
        bare_BC = shown_BC & (np.arange(layout.columns) >= columns.start) & (np.arange(layout.columns) < columns.stop)
        ids_BC, shown_BC, asked_BC = np.tile(ids_BC, (2, 1)), np.concatenate([shown_BC, bare_BC]), np.tile(asked_BC, (2, 1))
    posed_BC = asked_BC
    if model.wholly:  # it sees every slot: what is not shown is asked, and the answers that are not wanted are left
        posed_BC = np.tile(_there(layout, state), (2 if guided else 1, 1)) & ~shown_BC
    packed = pack(layout, ids_BC, shown_BC, posed_BC, model.config.registers).to(model.device)
    wanted = asked_BC[posed_BC]
    number = np.cumsum(wanted) - 1
    for index, logits in zip(packed.group_index, model(packed), strict=True):
        if index is None:
            continue
        index = index.cpu().numpy()
        take = wanted[index]
        if not take.any():
            continue
        logits = (logits if take.all() else logits[torch.from_numpy(take).to(logits.device)]).float()
        at = number[index[take]]
        if guided:
            half = len(logits) // 2
            at, given, bare = at[:half], logits[:half], logits[half:]
            logits = bare + o.guidance * (given - bare)
        yield at, logits


def _there(layout: Layout, state: State) -> np.ndarray:
    """Return bool (B, C): slots that exist; a text whose end is known has none after it."""
    there = np.ones(state.known_BC.shape, dtype=bool)
    for spec in layout.specs:
        if spec.kind == "sequence":
            columns = layout.slice(spec.modality)
            ended = (state.ids_BC[:, columns] == spec.eos) & state.known_BC[:, columns]
            there[:, columns] = np.cumsum(ended, 1) - ended == 0
    return there


def _read_on(model: GPT, state: State, target: str, o: GenerateOptions) -> None:
    """Fill the target slot by slot in reading order, after all that is known; keys and values read before are kept."""
    layout, columns = model.layout, model.layout.slice(target)
    spec = layout.specs[layout.names.index(target)]
    if o.guidance not in (None, 1.0):
        raise UsageError("a gpt run is trained without guidance", "leave --guidance out")
    unknown = ~state.known_BC[:, columns] & _there(layout, state)[:, columns]
    todo = np.flatnonzero(unknown.any(1))
    if not len(todo):
        return
    first = columns.start + unknown.argmax(1)
    col_C = np.arange(layout.columns)
    last = np.where(state.known_BC, col_C, -1).max(1)
    if (last[todo] >= first[todo]).any():
        late = layout.names[layout.modality_C[int(last[todo].max())]]
        raise UsageError(
            f"a gpt run reads {', '.join(layout.names)} in this order: '{late}' cannot be given for '{target}'",
            "give what comes before, or train the modalities in another order (data.modalities)",
        )
    part = state.rows(todo)
    nothing = np.zeros_like(part.known_BC)
    read = part.known_BC.sum(1)
    batch = pack(layout, part.ids_BC, nothing, part.known_BC).to(model.device)
    caches = model.open(batch, int((read + columns.stop - first[todo]).max()))
    before, col = last[todo].copy(), first[todo].copy()
    row = np.arange(len(todo))
    alive = np.ones(len(todo), dtype=bool)
    heat = o.text_temperature if spec.kind == "sequence" else o.temperature
    while alive.any():
        ids = np.where(before >= 0, part.ids_BC[row, np.maximum(before, 0)], 0)
        h = model.step(caches, (ids, before), col, read)
        groups = layout.group_C[col]
        for g in np.unique(groups[alive]):
            some = np.flatnonzero(alive & (groups == g))
            logp = filter_logits(group_logits(model, h[torch.from_numpy(some).to(h.device)], int(g)), heat, o.top_k, o.top_p)
            u = uniform(o.seed, f"draw/{target}", part.request_B[some], col[some] - columns.start)
            new = draw(logp, u)[0].cpu().numpy()
            if spec.kind == "sequence":  # the last slot can only end the text
                new = np.where(col[some] == columns.stop - 1, spec.eos, new)
            part.ids_BC[some, col[some]] = new
            part.known_BC[some, col[some]] = True
        ended = col == columns.stop - 1
        if spec.kind == "sequence":
            ended |= part.ids_BC[row, col] == spec.eos
        alive &= ~ended
        read, before, col = read + alive, np.where(alive, col, before), col + alive
    state.ids_BC[todo], state.known_BC[todo] = part.ids_BC, part.known_BC


def _write_text(model: FourM, state: State, target: str, o: GenerateOptions) -> None:
    layout, columns = model.layout, model.layout.slice(target)
    spec = layout.specs[layout.names.index(target)]
    group = int(layout.group_C[columns.start])
    b = len(state.ids_BC)
    known = state.known_BC[:, columns]
    begin = known.sum(1)
    assert (known == (np.arange(spec.slots) < begin[:, None])).all(), "the known part of a text is its beginning"
    last = state.ids_BC[np.arange(b), columns.start + np.maximum(begin - 1, 0)]
    alive = np.flatnonzero((begin == 0) | (last != spec.eos))
    nothing = np.zeros_like(state.known_BC)
    packed = pack(layout, state.ids_BC, state.known_BC, nothing, model.config.registers).to(model.device)
    encoded = model.encode(packed)  # once: what is shown does not change while the text is written
    end = begin.copy()
    while len(alive):
        asked = np.zeros_like(state.known_BC[alive])
        slot = np.arange(spec.slots)
        asked[:, columns] = (slot >= begin[alive, None]) & (slot <= end[alive, None])
        dec = pack(layout, state.ids_BC, nothing, asked, 0, answers=(state.ids_BC[alive], alive))
        h = model.decode(_with_encoder(dec, packed), encoded)
        final = h[torch.from_numpy(np.cumsum(asked.sum(1)) - 1)]
        logp = filter_logits(group_logits(model, final, group), o.text_temperature, o.top_k, o.top_p)
        u = uniform(o.seed, f"draw/{target}", state.request_B[alive], end[alive])
        ids = draw(logp, u)[0].cpu().numpy()
        full = end[alive] == spec.slots - 1
        ids = np.where(full, spec.eos, ids)  # the last slot can only end the text
        state.ids_BC[alive, columns.start + end[alive]] = ids
        end[alive] += 1
        alive = alive[ids != spec.eos]
    state.known_BC[:, columns] = np.arange(spec.slots) < end[:, None]


def group_logits(model: TokenModel, h_ND: Tensor, group: int) -> Tensor:
    """Return the logits (N, V) of one vocabulary group for decoder outputs."""
    start = model.layout.vocab_start
    return torch.nn.functional.linear(h_ND, model.head.weight()[start[group] : start[group + 1]].to(h_ND.dtype))


def _with_encoder(dec: Packed, enc: Packed) -> Packed:
    """Return `dec` with the encoder side of `enc`."""
    moved = dec.to(enc.enc_ids.device)
    return replace(moved, enc_ids=enc.enc_ids, enc_col=enc.enc_col, enc=enc.enc)
