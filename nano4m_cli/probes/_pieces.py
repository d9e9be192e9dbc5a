"""Questions to a run's model in pieces, which several processes share out: scores of candidates and texts, generation, decoding.

A piece is what one process asks at once as well, so the answers are the same to the last bit, whoever does it. Costs are in tokens
or in samples: they only have to be right among the pieces that are shared out together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nano4m_cli.dist import Work
from nano4m_cli.generate.likelihood import CHUNK, chunk_size, cost
from nano4m_cli.generate.likelihood import nll_work as _nll_work
from nano4m_cli.generate.sampler import GenerateOptions, State, chain
from nano4m_cli.registry import MODALITIES

if TYPE_CHECKING:
    from nano4m_cli.probes._context import Context

TEXTS = 1500  # texts that are scored at once, at most
SOUND = 30.0  # pictures that are decoded while one sound is, whose phases are reconstructed


def nll_work(
    context: Context, shown_NC: np.ndarray, asked_NC: np.ndarray, rows: slice | np.ndarray = slice(None)
) -> Work[np.ndarray]:
    """Ask for (N, C): -log p in nats of each asked slot (NaN elsewhere), of all samples or of some (shown, asked: of these)."""
    return _nll_work(context.model, context.ids_NC[rows], shown_NC, asked_NC, context.inside_NC[rows])


def candidate_work(context: Context, shown_NC: np.ndarray, target: str, ids_MS: np.ndarray) -> Work[np.ndarray]:
    """Ask for (n, M) of the first n samples: log p of each candidate's ids of a grid or codes target, asked whole at once, slot
    by slot independent."""
    model, layout, columns = context.model, context.layout, context.columns(target)
    slots = int(columns.sum())
    chunk = chunk_size(layout, (context.columns(*context.names) if model.wholly else columns)[None])
    parts = [slice(a, min(a + chunk, len(shown_NC))) for a in range(0, len(shown_NC), chunk)]
    # A model that sees every slot is asked for all that is not shown; the answers that are not wanted are left.
    asked = [context.inside_NC[rows] & ~shown_NC[rows] if model.wholly else np.broadcast_to(columns, shown_NC[rows].shape)
             for rows in parts]

    def piece(rows: slice, asked: np.ndarray) -> np.ndarray:
        packed = context.pack(context.ids_NC[rows], shown_NC[rows], asked)
        wanted_T = columns[packed.dec_col.cpu().numpy()]
        place_T = torch.from_numpy(np.cumsum(wanted_T) - 1)
        with torch.inference_mode():
            whole = torch.empty(len(asked) * slots, max(layout.sizes[g] for g in set(layout.group_C[columns])))
            for index, l in zip(packed.group_index, model(packed), strict=True):
                if index is not None and wanted_T[int(index[0])]:
                    whole[place_T[index.cpu()]] = l.float().log_softmax(-1).cpu()
        logp = whole.view(len(asked), slots, -1).numpy()
        return logp[:, np.arange(slots), ids_MS].sum(-1, dtype=np.float64)

    costs = [cost(shown_NC[rows], a) for rows, a in zip(parts, asked, strict=True)]
    return Work([partial(piece, *p) for p in zip(parts, asked, strict=True)], np.concatenate, costs)


def text_work(
    context: Context, sources: Sequence[str], target: str, texts: Sequence[np.ndarray], owner: np.ndarray
) -> Work[np.ndarray]:
    """Ask for (A,) mean log p per token of texts given the sources of sample `owner`; each source is encoded once."""
    layout, columns = context.layout, context.layout.slice(target)
    shown_NC = context.inside_NC & context.columns(*sources)
    order = np.argsort(owner, kind="stable")
    parts = []
    for a in range(0, context.n, CHUNK):
        mine = order[(owner[order] >= a) & (owner[order] < a + CHUNK)]
        parts += [mine[b : b + TEXTS] for b in range(0, len(mine), TEXTS)]

    def piece(some: np.ndarray) -> np.ndarray:
        ids = np.zeros((len(some), layout.columns), dtype=np.int64)
        asked = np.zeros(ids.shape, dtype=bool)
        for r, t in enumerate(some):
            ids[r, columns.start : columns.start + len(texts[t])] = texts[t]
            asked[r, columns.start : columns.start + len(texts[t])] = True
        who, row = np.unique(owner[some], return_inverse=True)
        packed = context.pack(context.ids_NC[who], shown_NC[who], asked, (ids, row))
        with torch.inference_mode():
            nll = context.model.nll(packed).cpu().numpy().astype(np.float64)
        lengths = asked.sum(1)
        return -np.add.reduceat(nll, np.cumsum(lengths) - lengths) / lengths

    def join(found: list[np.ndarray]) -> np.ndarray:
        out = np.zeros(len(texts))
        for some, values in zip(parts, found, strict=True):
            out[some] = values
        return out

    costs = [float(sum(len(texts[t]) for t in some) + shown_NC[np.unique(owner[some])].sum()) for some in parts]
    return Work([partial(piece, some) for some in parts], join, costs)


def chain_work(
    context: Context, sources: Sequence[str], targets: Sequence[str], options: GenerateOptions, n: int
) -> Work[State]:
    """Generate the targets of the first n samples from the sources. Draws go by the sample, not by its place in a batch."""
    known = context.inside_NC[:n] & context.columns(*sources)
    state = State(np.where(known, context.ids_NC[:n], 0), known, np.arange(n))
    parts = chunks(n)

    def piece(rows: np.ndarray) -> State:
        part = state.rows(rows)
        chain(context.model, part, targets, options, batch=CHUNK)
        return part

    slots = int(context.columns(*targets).sum())
    return Work([partial(piece, rows) for rows in parts], State.joined, [float(len(rows) * slots) for rows in parts])


def decode_work(context: Context, state: State, modality: str) -> Work[list[Any]]:
    """Decode what was generated."""
    tokenizer = context.tokenizer(modality)
    decode = lambda rows: state.rows(rows).decode(context.layout, modality, tokenizer, CHUNK)  # noqa: E731
    return _raws(modality, chunks(len(state.ids_BC)), decode)


def round_trip_work(context: Context, modality: str, limit: int | None = None) -> Work[list[Any]]:
    """Decode the true ids (of the first `limit` samples)."""
    ids, tokenizer = context.ids(modality)[:limit], context.tokenizer(modality)
    return _raws(modality, chunks(len(ids)), lambda rows: tokenizer.decode([ids[i] for i in rows]))


def chunks(n: int) -> list[np.ndarray]:
    """Return the samples that are generated, or decoded, at once."""
    return np.split(np.arange(n), range(CHUNK, n, CHUNK))


def _raws(modality: str, parts: Sequence[np.ndarray], decode: Callable[[np.ndarray], list[Any]]) -> Work[list[Any]]:
    each = SOUND if MODALITIES.get(modality).kind == "audio" else 1.0
    join = lambda found: [raw for some in found for raw in some]  # noqa: E731
    return Work([partial(decode, rows) for rows in parts], join, [each * len(rows) for rows in parts])
