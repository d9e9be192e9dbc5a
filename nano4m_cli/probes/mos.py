"""Mean opinion scores: what people said of the sounds on the page that tts writes, with intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.errors import DataError
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot
from nano4m_cli.probes._speech_listen import KEY, SCALE
from nano4m_cli.probes._speech_ratings import (
    SYSTEMS,
    krippendorff,
    mean_interval,
    read_key,
    read_ratings,
    reliable,
    table,
)

KIND = "eval"
NAMES = {"truth": "recordings", "round_trip": "round trip", "generated": "generated"}


class Probe(Base):
    costly = True  # people's work: it runs where it is asked for

    class Options(Config):
        """ratings: folder with the files that raters sent. key: the test's key.json (default: in that folder).

        least: who rates the hidden reference lower than this in the mean is left out.
        """

        ratings: str | None = None
        key: str | None = None
        least: float = Field(3.0, ge=1, le=5)

    def missing(self, context: Context) -> str | None:
        return None if self.options.ratings else "no ratings are given: mos.ratings=DIR, after tts.listen=DIR and some listening"

    def measure(self, context: Context) -> Findings:
        o, folder = self.options, Path(self.options.ratings)
        key = read_key(Path(o.key) if o.key else folder / KEY)
        for what, theirs, mine in (("run", key.run, context.run.name), ("checkpoint", key.checkpoint, context.run.checkpoint.name),
                                   ("data set", key.data, context.dataset.name), ("split", key.split, context.split)):
            if theirs != mine:
                raise DataError(f"these ratings are of {what} '{theirs}', not of '{mine}'",
                                f"give --{what} {theirs}" if what in ("run", "split") else "write a new listening test")
        ratings = read_ratings(folder, key)
        samples, every_RIS = table(key, ratings)
        stay = reliable(every_RIS, o.least)
        if not stay.any():
            raise DataError(
                f"all {len(ratings)} raters rated the real recordings under {o.least:g} in the mean: nothing is left",
                "lower mos.least, if the recordings are that bad",
            )
        scores = every_RIS[stay]
        target = key.direction.rpartition("->")[2]
        names = {"truth": f"{target}/mos", "round_trip": f"{target}/mos_round_trip", "generated": f"{key.direction}/mos"}
        of = {system: scores[:, :, s] for s, system in enumerate(SYSTEMS)}
        metrics = [_metric(names[system], of[system], context.seed, chance=3.0,
                           reference=None if system == "truth" else mean_interval(of["truth"], context.seed)[0])
                   for system in ("generated", "round_trip", "truth")]
        for than in ("truth", "round_trip"):
            metrics.append(_metric(f"{key.direction}/mos_minus_{than}", of["generated"] - of[than], context.seed))
        flat = scores.reshape(len(scores), -1)
        metrics.append(Metric(name=f"{target}/agreement", value=krippendorff(flat), n=int(np.isfinite(flat).sum())))
        out = [r.rater for r, s in zip(ratings, stay, strict=True) if not s]
        full = len(samples) * len(SYSTEMS)
        partial = sum(len(r.ratings) < full for r in ratings)
        before = ", ".join(f"{NAMES[s]} {np.nanmean(every_RIS[:, :, i]):.2f}" if np.isfinite(every_RIS[:, :, i]).any()
                           else f"{NAMES[s]} none" for i, s in enumerate(SYSTEMS))
        return Findings(metrics, [
            f"{int(stay.sum())} raters, {len(samples)} recordings of {len(SYSTEMS)} kinds each; scale of ITU-T P.800: "
            + ", ".join(f"{k} {v.lower()}" for k, v in SCALE.items()),
            "95 % intervals: bootstrap over raters and over recordings, both drawn with replacement (Owen 2007); differences are "
            "of the same rater and recording; chance: the middle of the scale",
            f"left out: raters whose mean rating of the real recordings, hidden among the sounds, is under {o.least:g}: "
            + (", ".join(out) if out else "none") + f"; with all raters: {before}",
            "agreement: Krippendorff's alpha for interval data over all sounds (1: alike, 0: as by chance)",
            *([f"{partial} of {len(ratings)} raters did not rate all {full} sounds"] if partial else []),
        ], [_distribution(of), _raters([r.rater for r in ratings], every_RIS, stay)])


def _metric(name: str, scores_RI: np.ndarray, seed: int, **more) -> Metric:
    value, interval, n = mean_interval(scores_RI, seed)
    return Metric(name=name, value=value, ci95=interval, n=n, **more)


def _distribution(of: dict[str, np.ndarray]) -> Plot:
    """Return how often each system got each score."""
    rows = {NAMES[s]: [float((x == k).sum()) / max(int(np.isfinite(x).sum()), 1) for k in sorted(SCALE)] for s, x in of.items()}
    return Plot(name="scores", title="How often each score was given (share)", kind="matrix", rows=list(rows),
                columns=[f"{k} {SCALE[k]}" for k in sorted(SCALE)], values=list(rows.values()), x="score", y="what was heard")


def _raters(names: list[str], scores_RIS: np.ndarray, stay: np.ndarray) -> Plot:
    mean = lambda x: float(np.nanmean(x)) if np.isfinite(x).any() else None  # noqa: E731
    return Plot(
        name="raters", title="Mean score by rater", kind="table", rows=names,
        columns=[*(NAMES[s] for s in SYSTEMS), "ratings", "used"],
        values=[[*(mean(row[:, s]) for s in range(len(SYSTEMS))), float(np.isfinite(row).sum()), "yes" if used else "left out"]
                for row, used in zip(scores_RIS, stay, strict=True)],
    )
