"""How near generated pictures and sounds are to real ones as distributions: FID, KID and FAD in features of the judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from safetensors.torch import save

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context, Made
from nano4m_cli.probes._directions import heard, plans, sampled_with
from nano4m_cli.probes._distances import across_halves, frechet, jackknifed, kernel_mmd
from nano4m_cli.probes._judges import JUDGED, Judge, open_judge
from nano4m_cli.probes._result import Findings, Metric

KIND = "eval"
TRAIN = 500  # real samples that features are scaled by
FEWEST = 8  # samples: with less there is no half to speak of
DISTANCES = {"rgb": {"fid": frechet, "kid": kernel_mmd}, "audio": {"fad": frechet, "kad": kernel_mmd}}


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        if not able(context):
            return "no generated modality has a judge, whose features distances are measured in"
        return None if context.n >= FEWEST else f"{context.n} samples are too few for a distribution, {FEWEST} are needed"

    def measure(self, context: Context) -> Findings:
        metrics, notes = [], []
        for target in able(context):
            judge = open_judge(context.dataset, target, context.progress)
            n, todo = heard(context, target), plans(context, target)
            context.ahead([(Made(plan, [target], None, n), target) for plan in todo], [(target, n)], f"{target} made")
            see = scaled(context, judge, target)
            real = see(context.raw(target)[:n])
            copied = see(context.round_trip(target, n))
            known = {}
            for what, distance in DISTANCES[SAME.get(target, target)].items():
                for kind, features in (("real", real), ("roundtrip", copied)):
                    known[kind, what] = _metric(f"{target}/{what}_judge_{kind}", features, real, distance)
                    metrics.append(known[kind, what])

            def distances(plan: list[str], target=target, n=n, see=see, real=real, known=known) -> list[Metric]:
                made = see(context.decoded(plan, [target], target, limit=n))
                return [
                    _metric(f"{context.direction(plan, target)}/{what}_judge", made, real, distance,
                            reference=known["roundtrip", what].value)
                    for what, distance in DISTANCES[SAME.get(target, target)].items()
                ]

            for found in context.spread(f"{target} as a distribution", todo, distances):
                metrics += found
            notes.append(f"{target}: the judge of this data set ({network(judge)}), {judge.width} features of its last hidden "
                         f"layer, in deviations of real train samples; n {n}, each distance between {n - n // 2} and {n // 2}")
        return Findings(metrics, [
            "fid, fad: Frechet distance; kid, kad: squared maximum mean discrepancy, cubic kernel, unbiased; _judge names the "
            "features: distances in those of Inception, VGGish or other judges do not compare",
            "always from one half of what was made to the other half of what is real, both ways, so that no scene stands on both "
            "sides; real: between the halves of what is real, which no generator can be told from; roundtrip (and reference): the "
            "truth after the tokenizer; intervals by jackknife over 20 blocks of samples; all Frechet distances are biased upwards "
            "alike, at equal n",
            *notes, *sampled_with(context, *able(context)),
        ])


SAME = {"rgb_hi": "rgb"}  # distances of a modality that are those of another


def able(context: Context) -> list[str]:
    return [t for t in JUDGED if t in context.names and context.info.determined.get(t) and t not in context.info.brought]


def scaled(context: Context, judge: Judge, target: str) -> Callable[[Sequence[Any]], np.ndarray]:
    """Return the judge's features in units of their deviation among real samples of the train split, so that figures do not
    follow the scale of its weights; features that hardly vary there count by a tenth of the usual deviation."""
    train = Context(context.run, context.run.config.data.train, TRAIN, 0, context.progress)
    deviation = judge.features(train.raw(target)).std(0)
    deviation = np.maximum(deviation, 0.1 * max(float(deviation.mean()), 1e-9))
    return lambda raws: judge.features(raws) / deviation


def network(judge: Judge) -> str:
    """Return the judge's name: what it sees, and the beginning of its weights' hash."""
    weights = save({k: v.contiguous() for k, v in judge.net.state_dict().items()})
    return f"CNN of {judge.modality}, weights {hashlib.sha256(weights).hexdigest()[:12]}"


def _metric(name: str, made: np.ndarray, real: np.ndarray, distance, **more) -> Metric:
    value, interval = jackknifed(lambda rows: across_halves(distance, made[rows], real[rows]), len(made))
    return Metric(name=name, value=value, n=len(made), ci95=interval, higher_is_better=False, **more)
