"""The options that one modality is generated with, and the guidance that they get where none is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from nano4m_cli.config import Config
from nano4m_cli.generate.schedules import Ramp, Shares
from nano4m_cli.masking._mixture import IN_DISTRIBUTION
from nano4m_cli.model.base import TokenModel

GUIDANCE = 2.5  # chosen on the val split of scenes: scripts/bench/guidance.py
STRONGEST = 100.0  # scale of guidance, beyond which logits are but noise
Scheme = Literal["auto", "roar", "maskgit", "ar", "onepass", "mean"]


class GenerateOptions(Config):
    """scheme: roar (random order), maskgit (most confident first), ar (left to right), onepass (all at once); auto is
    roar for grids and codes. Text is always ar. Order of filters: temperature, top-k, top-p, min-p; temperature 0 is greedy.
    mean: an estimate instead of a sample, for what the condition determines (depth and normals of a picture): each slot
    is decoded from the expected value of its code, its id is the likeliest; temperature and filters do not matter.

    schedule: linear, cosine, or the shares of the slots that each step fills (`steps` does not matter then).
    temperature, noise, guidance: ramps over the steps (generate/schedules.py). noise: of maskgit's confidence (Gumbel); a
    number falls evenly to 0, as in MaskGIT; None: that number is the temperature.
    repetition: p becomes p ** repetition for ids that the text holds already, before all filters; 1: none.

    guidance: scale s of classifier-free guidance of grids and codes (Ho and Salimans 2022, arXiv:2207.12598): logits
    are u + s (c - u), where c sees all that is known and u only the target's own known slots and what is to be moved away
    from. 1: none, and half the work. None: `GUIDANCE` where training posed u's question, else 1 (see `resolve`).
    weights: (modality, w), a mapping in files: logits are u + sum of w_i (c_i - u), where c_i sees the target's own slots
    and modality i alone; all conditions without a weight are one more c_i, of weight `guidance`.

    refresh: r: what the encoder made of slots known before stays as it is when slots become known, and is made anew every r
    steps only; None or 0: it is made anew at every step. A block-causal encoder makes nothing anew unless told to.
    draft: k: text, and codes and grids of scheme ar (codes also of auto), are drafted k slots at a time, then checked: the ids are
    distributed as without it (generate/speculative.py).
    precision: bf16 multiplies in 16 bits, quicker where hardware does it; other ids are drawn than in fp32.
    """

    scheme: Scheme = "auto"
    steps: int = Field(12, ge=1)
    schedule: Shares = "linear"
    temperature: Ramp(0) = 0.5
    noise: Ramp(0) = None
    text_temperature: float = Field(0.3, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, gt=0, le=1)
    repetition: float = Field(1.0, ge=1, le=10)
    guidance: Ramp(0, STRONGEST) = None
    weights: tuple[tuple[str, float], ...] = ()
    refresh: int | None = Field(None, ge=0)
    draft: int | None = Field(None, ge=1, le=64)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)

    @field_validator("temperature")
    @classmethod
    def _some(cls, v):
        if v is None:
            raise ValueError("write a number, A..B, or A..B^POWER")
        return v

    @field_validator("weights", mode="before")
    @classmethod
    def _pairs(cls, v: Any) -> Any:
        return tuple(v.items()) if isinstance(v, Mapping) else v

    @field_validator("weights")
    @classmethod
    def _bounded(cls, v):
        for name, weight in v:
            if not -STRONGEST <= weight <= STRONGEST:
                raise ValueError(f"the weight of {name} lies outside -{STRONGEST:g}..{STRONGEST:g}")
        if len(dict(v)) != len(v):
            raise ValueError("a modality has one weight")
        return v

    @property
    def guided(self) -> bool:
        """Whether conditions are weighed against their absence; so by options alone, not by what a batch holds."""
        return bool(self.weights) or self.guidance not in (None, 1.0)


WHY_IDLE = {
    "noise": "only scheme maskgit draws with it",
    "draft": "text is drafted, sound, and what is made with scheme ar",
    "repetition": "only text is penalised",
    "refresh": "only what is made in several steps reads anything again",
    "guidance": "text is written without guidance",
    "weights": "text is written without guidance",
}


def idle(options: GenerateOptions, kind: str) -> set[str]:
    """Return which of the options in `WHY_IDLE` change nothing where a fourm run makes a modality of this kind."""
    text, scheme = kind == "sequence", options.scheme
    matters = {
        "noise": not text and scheme == "maskgit",
        "draft": text or scheme == "ar" or (kind == "codes" and scheme == "auto"),
        "repetition": text,
        "refresh": not text and scheme not in ("onepass", "mean"),
        "guidance": not text,
        "weights": not text,
    }
    return {name for name, does in matters.items() if not does}


def resolve(
    options: GenerateOptions, targets: Sequence[str], model: TokenModel, posed: Mapping[str, float], away: bool = False
) -> GenerateOptions:
    """Return options with guidance set: where it is None, `GUIDANCE` if training asked for every grid and codes target
    with nothing else shown (and the model can be guided: one that reads on from token to token cannot), else 1.

    Args:
        posed: how often training posed each direction; "->rgb" is rgb from nothing.
        away: whether there is a condition to move away from, which then stands in the place of nothing.
    """
    if options.guidance is not None:
        return options
    guided = [t for t in targets if model.layout.specs[model.layout.names.index(t)].kind != "sequence"]
    able = guided and model.at_once and (away or all(posed.get(f"->{t}", 0.0) >= IN_DISTRIBUTION for t in guided))
    return options.model_copy(update={"guidance": GUIDANCE if able else 1.0})
