"""Best of n: candidates with seeds of their own, ranked by likelihood, by what they tell of the conditions, or by a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from nano4m_cli.data.sources._base import DatasetInfo
from nano4m_cli.errors import UsageError
from nano4m_cli.generate.likelihood import slot_nll
from nano4m_cli.generate.state import Stage, State, there
from nano4m_cli.model.base import TokenModel
from nano4m_cli.rng import torch_seed
from nano4m_cli.spec import Layout

Rank = Literal["likelihood", "cycle", "judge"]


def candidate(stages: Sequence[Stage], number: int) -> list[Stage]:
    """Return the stages under a candidate's own seed; candidate 0 is what is made without others."""
    if number == 0:
        return list(stages)
    own = lambda s: torch_seed(s.options.seed, "candidate", number)  # noqa: E731
    return [replace(s, options=s.options.model_copy(update={"seed": own(s)})) for s in stages]


# -- by the model itself ----------------------------------------------------------------------------------------------


def likelihood(model: TokenModel, state: State, known_BC: np.ndarray, stages_B: Sequence[Sequence[Stage]]) -> np.ndarray:
    """Return (B,): mean log p in nats of the ids that were made, each modality asked at once given what its stage saw.

    A slot that was made twice counts where it was made last.

    Args:
        known_BC: what was known before the first stage.
    """
    known, questions = known_BC.copy(), []
    for k in range(max(map(len, stages_B), default=0)):
        seen, made = np.zeros_like(known), np.zeros_like(known)
        for row, stages in enumerate(stages_B):
            if k < len(stages):
                own = _columns(model.layout, [stages[k].target])
                seen[row] = known[row] if stages[k].hidden_C is None else known[row] & ~stages[k].hidden_C
                made[row] = state.known_BC[row] & own & ~seen[row]
        known |= made
        questions.append((seen, made))
    later, total, count = np.zeros_like(known), 0.0, 0
    for seen, made in reversed(questions):
        asked = made & ~later
        later |= made
        total = total + _log_p(model, state, seen & state.known_BC, asked)
        count = count + asked.sum(1)
    return total / np.maximum(count, 1)


def cycle(model: TokenModel, state: State, known_BC: np.ndarray, stages_B: Sequence[Sequence[Stage]]) -> np.ndarray:
    """Return (B,): mean log p in nats of the conditions' ids, asked at once given nothing but what was made.

    This ranks candidates as their pointwise mutual information with the conditions does.
    """
    made, anew = np.zeros_like(known_BC), np.zeros_like(known_BC)
    for row, stages in enumerate(stages_B):
        for stage in stages:
            own = _columns(model.layout, [stage.target])
            made[row] |= own
            if stage.hidden_C is not None:
                anew[row] |= own & stage.hidden_C
    # The beginning of a text that goes on cannot be asked after its end.
    asked = known_BC & ~anew & ~(made & model.layout.sequence_C)
    total = _log_p(model, state, state.known_BC & made & ~asked, asked)
    return total / np.maximum(asked.sum(1), 1)


def _log_p(model: TokenModel, state: State, shown_BC: np.ndarray, asked_BC: np.ndarray) -> np.ndarray:
    """Return (B,): log p of all that is asked of each row (0 where nothing is)."""
    rows, out = np.flatnonzero(asked_BC.any(1)), np.zeros(len(asked_BC))
    ids, shown, asked = state.ids_BC[rows], shown_BC[rows], asked_BC[rows]
    inside = there(model.layout, ids, state.known_BC[rows])
    out[rows] = -np.nansum(slot_nll(model, ids, shown, asked, inside), 1)
    return out


def _columns(layout: Layout, modalities: Sequence[str]) -> np.ndarray:
    out = np.zeros(layout.columns, dtype=bool)
    for name in modalities:
        out[layout.slice(name)] = True
    return out


# -- by an independent judge ------------------------------------------------------------------------------------------


class Judge(Protocol):
    """A classifier that no model here was trained with (probes/_judges.py has them; they are handed in)."""

    attributes: dict[str, list[str]]
    objects: int

    def logp(self, raws: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return per attribute log-probabilities (N, objects, values)."""


Judges = Callable[[str], Judge | None]  # of a modality of the data set
Claims = dict[str, list[str]]  # what an attribute must be, object by object


def claims_of_labels(info: DatasetInfo, conditions: Sequence[str], objects: Sequence[Mapping[str, str]]) -> Claims:
    """Return what conditions taken from a labelled sample determine; the labels say more, which they do not."""
    told = {a for c in conditions for a in info.determined.get(c, [])}
    return {a: [o[a] for o in objects] for a in info.attributes if a in told}


def claims_of_text(info: DatasetInfo, text: str) -> Claims:
    """Return what the words of a text say of each object; what it says of some objects only is left out."""
    words = "".join(c if c.isalnum() else " " for c in text.lower())
    found: Claims = {}
    for name, attribute in info.attributes.items():
        places = []
        for value, surfaces in attribute.surfaces.items():
            for surface in surfaces:
                at = f" {words} ".find(f" {surface} ")
                while at >= 0:
                    places.append((at, value))
                    at = f" {words} ".find(f" {surface} ", at + 1)
        if places:
            found[name] = [value for _, value in sorted(places)]
    objects = max(map(len, found.values()), default=0)
    return {name: values for name, values in found.items() if len(values) == objects}


def claims_of_media(judge: Judge, raw: Any) -> Claims:
    """Return what a judge names of the first object: how many there are it does not tell."""
    return {a: [judge.attributes[a][int(p[0, 0].argmax())]] for a, p in judge.logp([raw]).items()}


def agreement(judge: Judge, raws: Sequence[Any], claims: Claims) -> np.ndarray:
    """Return (N,): mean log-probability that the judge gives to what is claimed."""
    said = judge.logp(raws)
    parts = [
        said[a][:, o, judge.attributes[a].index(value)]
        for a, values in claims.items() if a in said for o, value in enumerate(values[: judge.objects])
    ]
    assert parts, (list(claims), list(said))
    return np.mean(parts, 0)


def need_judges(judges: Judges | None, targets: Sequence[str]) -> dict[str, Judge]:
    """Return the judges of the targets that have one; a UsageError where none has."""
    found = {t: j for t in dict.fromkeys(targets) if judges is not None and (j := judges(t)) is not None}
    if not found:
        raise UsageError(f"no independent judge sees {' or '.join(targets)}", "choose --rank likelihood or --rank cycle")
    return found
