"""Generated sound beside the truth: distance in mel bands; of sounding scenes also how many notes, when and how high."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.data.sources import _scene_sound as scene
from nano4m_cli.probes._audio import RISE, cents, log_mel, onset, pitch
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, Made, missing
from nano4m_cli.probes._directions import heard, plans, sampled_with, train_mean
from nano4m_cli.probes._result import Findings, Metric, mean_metric

KIND = "eval"
SEMITONE = 100.0  # cents
UNITS = {"mel": "nats", "onset_ms": "ms", "pitch_cents": "cents"}
LOWER = tuple(UNITS)
NOTES = [
    "notes_acc: clips in which power rises by 6 dB near exactly those onsets where a note belongs; onset_ms: time from where a "
    "note belongs to the steepest rise of power",
    "pitch_cents: of the strongest partial between 150 and 1000 Hz to the note's own pitch, at most 2400; pitch_acc: notes within "
    "a semitone; ceiling: what an object's size tells of its pitch, which is detuned by up to 3 percent",
]


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        lack = missing(context, "audio")
        if not lack and "audio" in context.info.brought:
            return "the sounds' tokens were brought without sounds or a tokenizer"
        return lack or (None if plans(context, "audio") else "the run tells sound from nothing else")

    def measure(self, context: Context) -> Findings:
        n, size, todo = heard(context, "audio"), context.tokenizer("audio").size, plans(context, "audio")
        context.ahead([(Made(plan, ["audio"], None, n), "audio") for plan in todo], [("audio", n)], "sounds made")
        truth = context.raw("audio")[:n]
        bands = log_mel(truth, size)
        notes = Notes(context, n) if context.info.source == "scenes" else None
        mean = train_mean(context, "audio", lambda raws: log_mel(raws, size), 200)
        figures = lambda raws: self._figures(raws, bands, size, notes)  # noqa: E731
        own = figures(context.round_trip("audio", n))
        best = figures(truth)
        metrics = [_metric(f"audio/true_{k}", v) for k, v in best.items()]
        metrics += [_metric(f"audio/roundtrip_{k}", v) for k, v in own.items()]
        made_of = lambda plan: figures(context.decoded(plan, ["audio"], "audio", limit=n))  # noqa: E731
        for plan, made in zip(todo, context.spread("sounds", todo, made_of), strict=True):
            name = context.direction(plan, "audio")
            for what, value in made.items():
                values, weights = own[what]
                more = {"majority": float(np.abs(mean - bands).mean())} if what == "mel" else {}
                if what == "pitch_cents" and notes and all("size" in context.info.determined.get(s, []) for s in plan):
                    more["ceiling"] = notes.best_cents
                metrics.append(_metric(f"{name}/{what}", value, reference=float((values * weights).sum() / weights.sum()), **more))
        return Findings(metrics, [
            f"the first {n} samples; mel: mean absolute difference of log-mel power (64 bands, 96 frames/s) to the one true sound, "
            "of which the source may tell only part; majority: the train split's mean log-mel",
            "reference, roundtrip: the truth after the tokenizer's round trip; true: what the same estimators say of real sounds",
            *(NOTES if notes else ["onsets and pitches are known of sounding scenes only"]),
            *sampled_with(context, "audio"),
        ])

    def _figures(self, raws: Sequence[np.ndarray], bands: np.ndarray, size: dict, notes: Notes | None) -> dict:
        """Return {figure: (values (N,), weights (N,))}."""
        off = np.abs(log_mel(raws, size) - bands).mean((1, 2))
        return {"mel": (off, np.ones(len(off))), **(notes.figures(raws) if notes else {})}


class Notes:
    """The notes of the first n sounding scenes: object i sounds from i / SLOTS of the clip, at its own pitch."""

    def __init__(self, context: Context, n: int):
        self.seconds = context.info.sizes["audio"]["seconds"]
        self.hertz = [[o["hertz"] for o in label["objects"]] for label in context.labels[:n]]
        sizes = [o["size"] for label in context.labels[:n] for o in label["objects"]]
        centre = np.array([scene.PITCH[s] for s in sizes])
        self.best_cents = float(cents(centre, np.concatenate(self.hertz)).mean())

    def figures(self, raws: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {figure: (mean over a sample's notes (N,), notes (N,))}."""
        count = np.array([len(h) for h in self.hertz])
        rows, each = [], self.seconds / scene.SLOTS
        for wave, true in zip(raws, self.hertz, strict=True):
            found = [onset(wave, i * each, each / 2) for i in range(scene.SLOTS)]
            late = [abs(found[i][0] - i * each) * 1000 for i in range(len(true))]
            off = cents(np.array([pitch(wave, i * each) for i in range(len(true))]), np.array(true))
            sounding = [rise >= RISE for _, rise in found]
            rows.append((float(sum(sounding) == len(true) == sum(sounding[: len(true)])), np.mean(late), off.mean(),
                         (off < SEMITONE).mean()))
        right, late, off, near = np.array(rows).T
        return {"notes_acc": (right, np.ones(len(rows))), "onset_ms": (late, count), "pitch_cents": (off, count),
                "pitch_acc": (near, count)}


def _metric(name: str, value: tuple[np.ndarray, np.ndarray], **more) -> Metric:
    values, weights = value
    what = name.rpartition("/")[2].removeprefix("true_").removeprefix("roundtrip_")
    return mean_metric(name, values, weights, higher_is_better=what not in LOWER, unit=UNITS.get(what, ""), **more)
