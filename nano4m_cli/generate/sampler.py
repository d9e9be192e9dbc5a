"""The sampler: known slots, a schedule that says which slots to fill when, a model call, a choice of ids.

Every draw is a function of (seed, request, slot), so a request gives the same sample alone and inside any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.errors import UsageError
from nano4m_cli.generate.choose import draw, filter_logits, penalize
from nano4m_cli.generate.options import GUIDANCE, GenerateOptions, resolve
from nano4m_cli.generate.reader import Reader, Rewriter, Writer
from nano4m_cli.generate.schedules import counts, ramp_at
from nano4m_cli.generate.speculative import fill_drafted, write_drafted
from nano4m_cli.generate.state import Stage, State, there, views
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM
from nano4m_cli.model.gpt import GPT
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._fsq import FSQ

__all__ = ["GUIDANCE", "GenerateOptions", "Stage", "State", "chain", "chains", "fill", "resolve"]


def fill(model: TokenModel, state: State, target: str, options: GenerateOptions) -> None:
    """Fill every unknown slot of modality `target` in place, conditioned on all that is known.

    Text is written until EOS; what follows EOS stays unknown.
    """
    spec = model.layout.specs[model.layout.names.index(target)]
    if options.refresh and not isinstance(model, FourM):
        raise UsageError(
            "only runs of task fourm keep what their encoder made of earlier slots", "leave --refresh out"
        )
    if options.draft and (isinstance(model, GPT) or (spec.kind == "sequence" and not (isinstance(model, FourM)))):
        raise UsageError(f"the model of this run cannot draft {target}: only runs of task fourm draft text", "leave --draft out")
    columns = model.layout.slice(target)
    known = state.known_BC[:, columns].sum(1)
    state.work[target] = np.zeros((len(known), 2), dtype=np.int64)
    kind = model.device.type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=options.precision == "bf16"), model.lean():
        if isinstance(model, GPT):
            _read_on(model, state, target, options)
        elif spec.kind == "sequence" and not model.wholly and model.causal_text:
            _write_text(model, state, target, options)
        elif spec.kind == "sequence" and not model.wholly:
            left_to_right = {"scheme": "ar", "temperature": options.text_temperature}
            _fill_slots(model, state, target, options.model_copy(update=left_to_right))
        elif options.draft and options.scheme in ("ar", "auto") and (spec.kind == "codes" or options.scheme == "ar"):
            _draft_slots(model, state, target, options)
        elif options.scheme == "mean":
            _estimate(model, state, target, options)
        else:
            _fill_slots(model, state, target, options)
    state.work[target][:, 0] = state.known_BC[:, columns].sum(1) - known


def chain(model: TokenModel, state: State, targets: Sequence[str], options: GenerateOptions, batch: int = 128) -> None:
    """Fill several modalities one after the other, each conditioned on those before; requests in parts of `batch`."""
    chains(model, state, [[Stage(t, options) for t in targets]] * len(state.ids_BC), batch)


def chains(model: TokenModel, state: State, stages_B: Sequence[Sequence[Stage]], batch: int = 128) -> None:
    """Go through every request's own stages; those that wait for the same target and options (but for the seed) go together."""
    left = [list(stages) for stages in stages_B]
    while any(left):
        waiting: dict[tuple[str, GenerateOptions], list[int]] = {}
        for row, stages in enumerate(left):
            if stages:
                waiting.setdefault((stages[0].target, stages[0].options.model_copy(update={"seed": 0})), []).append(row)
        (target, options), rows = max(waiting.items(), key=lambda item: len(item[1]))
        _stage(model, state, target, options, np.array(rows[:batch]), [left[row].pop(0) for row in rows[:batch]])


def _stage(
    model: TokenModel, state: State, target: str, options: GenerateOptions, index: np.ndarray, stages: Sequence[Stage]
) -> None:
    """Fill one modality in the requests `index`, each seeing what its stage shows."""
    part, columns = state.rows(index), model.layout.slice(target)
    part.seed_B = np.array([s.options.seed for s in stages])
    nothing = np.zeros(model.layout.columns, dtype=bool)
    hidden = np.stack([nothing if s.hidden_C is None else s.hidden_C for s in stages])
    aside = part.known_BC & hidden
    aside[:, columns] = False
    part.known_BC &= ~hidden
    part.values.clear()
    fill(model, part, target, options)
    state.ids_BC[index], state.known_BC[index] = part.ids_BC, part.known_BC | aside
    if target in part.values and target not in state.values:
        state.values[target] = np.full((len(state.ids_BC), *part.values[target].shape[1:]), np.nan, np.float32)
    if target in state.values:
        state.values[target][index] = part.values.get(target, np.nan)
    state.work.setdefault(target, np.zeros((len(state.ids_BC), 2), dtype=np.int64))[index] = part.work[target]


def _fill_slots(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    columns = model.layout.slice(target)
    unknown = ~state.known_BC[:, columns] & _exists(model, state)[:, columns]
    slots = unknown.shape[1]
    scheme = "roar" if o.scheme == "auto" else o.scheme
    steps = {"onepass": 1, "ar": slots}.get(scheme, o.steps if isinstance(o.schedule, str) else len(o.schedule))
    schedule = "linear" if scheme in ("onepass", "ar") else o.schedule
    if scheme == "ar":
        order = np.broadcast_to(np.arange(slots, dtype=np.float64), unknown.shape)
    else:
        order = state.uniform(o.seed, f"order/{target}", np.arange(len(unknown))[:, None], np.arange(slots))
    plan = [counts(int(n), steps, schedule) for n in unknown.sum(1)]
    steps_B = np.array([len(p) for p in plan])
    reader = Reader.of(model, o, columns)
    for step in range(max((len(p) for p in plan), default=0)):
        n_now = np.array([p[step] if step < len(p) else 0 for p in plan])
        active = np.flatnonzero(n_now)
        now = unknown[active] & ~state.known_BC[active, columns]
        if scheme == "ar":  # a text may have ended
            now &= _exists(model, state.rows(active))[:, columns]
            if not now.any():
                break
        if scheme == "maskgit":
            asked = now
        else:
            rank = np.argsort(np.argsort(np.where(now, order[active], np.inf), axis=1, kind="stable"), axis=1)
            asked = now & (rank < n_now[active, None])
        if reader is not None:
            reader.turn(step, active)
        state.work[target][active, 1] += 1
        row, slot, ids, logp = _ask(model, state.rows(active), columns, asked, target, o, step, steps_B[active], reader)
        if scheme == "maskgit" and step + 1 < steps:
            # Confidence of what was drawn, with Gumbel noise that fades as the schedule ends.
            u = state.uniform(o.seed, f"confidence/{target}", active[row], slot, step)
            confidence = logp - np.log(-np.log(u)) * _noise(o, step, steps, steps_B[active[row]])
            grid = np.full(asked.shape, -np.inf)
            grid[row, slot] = confidence
            keep = np.argsort(np.argsort(-grid, axis=1, kind="stable"), axis=1) < n_now[active, None]
            take = keep[row, slot]
            row, slot, ids = row[take], slot[take], ids[take]
        state.ids_BC[active[row], columns.start + slot] = ids
        state.known_BC[active[row], columns.start + slot] = True
    there = _exists(model, state)[:, columns]
    assert (state.known_BC[:, columns] | ~there).all(), target
    state.known_BC[:, columns] &= there  # what follows the end of a text is none of it


def _draft_slots(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    columns, spec = model.layout.slice(target), model.layout.specs[model.layout.names.index(target)]

    def choose(part: State, asked_NL: np.ndarray, number_N: np.ndarray, total_N: np.ndarray, block_NC: np.ndarray | None) -> Tensor:
        out = torch.zeros(len(number_N), spec.vocab_size, device=model.device)
        heat = ramp_at(o.temperature, number_N, total_N)
        for at, logits in _logits(model, part, columns, asked_NL, o, number_N, total_N, block_BC=block_NC):
            own = heat if isinstance(heat, float) else torch.from_numpy(heat[at]).to(logits)
            out[torch.from_numpy(at).to(out.device)] = filter_logits(logits, own, o.top_k, o.top_p, o.min_p)
        return out

    def count(rows: np.ndarray) -> None:
        state.work[target][rows, 1] += 1

    fill_drafted(model, state, target, o, choose, count)


def _noise(o: GenerateOptions, step: int, steps: int, own_N: np.ndarray) -> float | np.ndarray:
    """Return the temperature of the confidence's noise: a ramp as it is written, a number falling evenly to 0 at the end."""
    heat = ramp_at(o.temperature if o.noise is None else o.noise, step, own_N)
    return heat if isinstance(o.noise, str) else heat * (1 - (step + 1) / steps)


def _estimate(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    """Fill all unknown slots at once: the likeliest ids, and the mean over the distribution of what codes stand for."""
    columns, spec = model.layout.slice(target), model.layout.specs[model.layout.names.index(target)]
    if not spec.levels:
        raise UsageError(f"scheme 'mean' needs codes that stand for numbers; those of {target} do not", "choose another --scheme")
    value_VD = FSQ(spec.levels).decode(torch.arange(spec.vocab_size))
    asked = ~state.known_BC[:, columns]
    values = value_VD[torch.from_numpy(np.where(asked, 0, state.ids_BC[:, columns]))].numpy()
    row, slot = np.nonzero(asked)
    state.work[target][:, 1] = 1
    for at, logits in _logits(model, state, columns, asked, o):
        values[row[at], slot[at]] = (logits.softmax(-1).cpu() @ value_VD).numpy()
        state.ids_BC[row[at], columns.start + slot[at]] = logits.argmax(-1).cpu().numpy()
    state.known_BC[:, columns] = True
    state.values[target] = values


def _ask(
    model: TokenModel, state: State, columns: slice, asked_BL: np.ndarray, target: str, o: GenerateOptions, step: int,
    steps_B: np.ndarray, reader: Reader | None = None,
):
    """Return (row, slot, drawn id, for maskgit the model's log-probability of it), numpy, for every asked slot.

    Args:
        steps_B: how many steps each request's own schedule has.
    """
    row, slot = np.nonzero(asked_BL)
    ids, logp = np.zeros(len(row), dtype=np.int64), np.zeros(len(row))
    u = state.uniform(o.seed, f"draw/{target}", row, slot, step)
    spec = model.layout.specs[model.layout.names.index(target)]
    heat = ramp_at(o.temperature, step, steps_B[row])
    for at, logits in _logits(model, state, columns, asked_BL, o, step, steps_B, reader):
        own = heat if isinstance(heat, float) else torch.from_numpy(heat[at]).to(logits)
        drawn, _ = draw(filter_logits(_fresh(logits, state, columns, row[at], spec, o), own, o.top_k, o.top_p, o.min_p), u[at])
        ids[at] = drawn.cpu().numpy()
        if o.scheme == "maskgit":  # confidence is the model's own, before temperature and filters
            logp[at] = logits.log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1).cpu().numpy()
    return row, slot, ids, logp


def _fresh(logits_NV: Tensor, state: State, columns: slice, row_N: np.ndarray, spec: TokenSpec, o: GenerateOptions) -> Tensor:
    """Return logits with the repetition penalty on what the text of each row holds already."""
    if spec.kind != "sequence" or o.repetition == 1:
        return logits_NV
    seen = np.zeros((len(state.ids_BC), spec.vocab_size), dtype=bool)
    at, slot = np.nonzero(state.known_BC[:, columns])
    seen[at, state.ids_BC[at, columns.start + slot]] = True
    seen[:, spec.eos] = False
    return penalize(logits_NV, torch.from_numpy(seen[row_N]).to(logits_NV.device), o.repetition)


def _logits(
    model: TokenModel, state: State, columns: slice, asked_BL: np.ndarray, o: GenerateOptions, step: int = 0,
    steps_B: np.ndarray | None = None, reader: Reader | None = None, block_BC: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield (which of the asked slots in row-major order (n,), their fp32 logits (n, V)), guidance applied.

    Args:
        step: one, or one per asked slot. block_BC: of a block-causal encoder that is read anew.
    """
    layout = model.layout
    asked_BC = np.zeros(state.known_BC.shape, dtype=bool)
    asked_BC[:, columns] = asked_BL
    shown = views(layout, state, columns, o)  # every request is asked once for each
    steps_N = np.repeat(np.ones(len(asked_BL), int) if steps_B is None else steps_B, asked_BL.sum(1))
    ids_BC, shown_BC, there_BC = (np.concatenate([getattr(v, x) for v in shown]) for x in ("ids_BC", "shown_BC", "there_BC"))
    asked_BC = np.tile(asked_BC, (len(shown), 1))
    # A model that sees every slot is asked for all that is not shown; the answers that are not wanted are left.
    posed_BC = there_BC & ~shown_BC if model.wholly else asked_BC
    if reader is None:
        blocks = None if block_BC is None else np.tile(block_BC, (len(shown), 1))
        packed = pack(layout, ids_BC, shown_BC, posed_BC, model.config.registers, block_BC=blocks).to(model.device)
        answers = model.ask(packed)
    else:
        packed, answers = reader.ask([v.name for v in shown], ids_BC, shown_BC, posed_BC)
    wanted = asked_BC[posed_BC]
    number = np.cumsum(wanted) - 1
    for index, logits in zip(packed.group_index, answers, strict=True):
        if index is None:
            continue
        index = index.cpu().numpy()
        take = wanted[index]
        if not take.any():
            continue
        logits = (logits if take.all() else logits[torch.from_numpy(take).to(logits.device)]).float()
        at = number[index[take]]
        if len(shown) > 1:
            at = at[: len(at) // len(shown)]
            base, *given = logits.split(len(at))
            logits = base
            for view, one in zip(shown[1:], given, strict=True):
                scale = ramp_at(view.weight, step if np.ndim(step) == 0 else step[at], steps_N[at])
                scale = scale if isinstance(scale, float) else torch.from_numpy(scale).to(one)[:, None]
                logits = logits + scale * (one - base)
        yield at, logits


def _exists(model: TokenModel, state: State) -> np.ndarray:
    return there(model.layout, state.ids_BC, state.known_BC)


def _read_on(model: GPT, state: State, target: str, o: GenerateOptions) -> None:
    """Fill the target slot by slot in reading order, after all that is known; keys and values read before are kept."""
    layout, columns = model.layout, model.layout.slice(target)
    spec = layout.specs[layout.names.index(target)]
    if o.guided or state.away_BC is not None:
        raise UsageError("a gpt run is trained without guidance", "leave --guidance, --weight and --not out")
    missing = ~state.known_BC & _exists(model, state)
    unknown = missing[:, columns]
    todo = np.flatnonzero(unknown.any(1))
    if not len(todo):
        return
    for m, name in enumerate(layout.names):
        part = slice(layout.start[m], layout.start[m + 1])
        if name != target and (state.known_BC[:, part].any(1) & missing[:, part].any(1))[todo].any():
            raise UsageError(f"a gpt run reads a modality whole or not at all: part of {name} was given", "leave --keep out")
    first = columns.start + unknown.argmax(1)
    col_C = np.arange(layout.columns)
    last = np.where(state.known_BC, col_C, -1).max(1)
    if (last[todo] >= first[todo]).any():
        late = layout.names[layout.modality_C[int(last[todo].max())]]
        if late == target:
            raise UsageError(f"a gpt run goes on with {target}: it can keep no more than its beginning", "e.g. --keep rgb:0.5")
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
    begin, length = first[todo], columns.stop - first[todo]
    while alive.any():
        ids = np.where(before >= 0, part.ids_BC[row, np.maximum(before, 0)], 0)
        h = model.step(caches, (ids, before), col, read)
        groups = layout.group_C[col]
        for g in np.unique(groups[alive]):
            some = np.flatnonzero(alive & (groups == g))
            logits = group_logits(model, h[torch.from_numpy(some).to(h.device)], int(g)).float()
            heat = o.text_temperature
            if spec.kind != "sequence":
                heat = ramp_at(o.temperature, col[some] - begin[some], length[some])
                heat = heat if isinstance(heat, float) else torch.from_numpy(heat).to(logits)
            logp = filter_logits(_fresh(logits, part, columns, some, spec, o), heat, o.top_k, o.top_p, o.min_p)
            u = part.uniform(o.seed, f"draw/{target}", some, col[some] - columns.start)
            new = draw(logp, u)[0].cpu().numpy()
            state.work[target][todo[some], 1] += 1
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


def _write_text(model: TokenModel, state: State, target: str, o: GenerateOptions) -> None:
    layout, columns = model.layout, model.layout.slice(target)
    spec = layout.specs[layout.names.index(target)]
    group = int(layout.group_C[columns.start])
    b = len(state.ids_BC)
    known = state.known_BC[:, columns]
    begin = known.sum(1)
    assert (known == (np.arange(spec.slots) < begin[:, None])).all(), "the known part of a text is its beginning"
    last = state.ids_BC[np.arange(b), columns.start + np.maximum(begin - 1, 0)]
    alive = np.flatnonzero((begin == 0) | (last != spec.eos))
    if o.draft:
        def choose(h: Tensor, holds: State) -> Tensor:
            logits = _fresh(group_logits(model, h, group), holds, columns, np.arange(len(h)), spec, o)
            return filter_logits(logits, o.text_temperature, o.top_k, o.top_p, o.min_p)

        def count(rows: np.ndarray) -> None:
            state.work[target][rows, 1] += 1

        end = write_drafted(model, state, target, o, begin, alive, choose, count)
        state.known_BC[:, columns] = np.arange(spec.slots) < end[:, None]
        return
    if isinstance(model, FourM):
        writer: Writer | Rewriter = Writer(model, state, target, alive)
    else:
        writer = Rewriter(model, state, target, begin)
    end = begin.copy()
    while len(alive):
        final = writer.next(alive, end[alive])
        state.work[target][alive, 1] += 1
        part = state.rows(alive)
        part.known_BC[:, columns] = np.arange(spec.slots) < end[alive, None]  # what is written already
        logits = _fresh(group_logits(model, final, group), part, columns, np.arange(len(alive)), spec, o)
        logp = filter_logits(logits, o.text_temperature, o.top_k, o.top_p, o.min_p)
        u = state.uniform(o.seed, f"draw/{target}", alive, end[alive])
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
    return torch.nn.functional.linear(h_ND, model.head.weight()[start[group] : start[group + 1]])
