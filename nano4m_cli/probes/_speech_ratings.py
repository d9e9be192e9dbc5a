"""From raters' files to mean opinion scores: strict reading, exclusion by a stated rule, intervals over raters and items.

Legend: R raters, I items (samples), S systems; a score that was not given is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field

from nano4m_cli.config import Config
from nano4m_cli.errors import DataError
from nano4m_cli.probes._result import RESAMPLES
from nano4m_cli.probes._speech_json import read_strictly
from nano4m_cli.probes._speech_listen import KEY, Key
from nano4m_cli.rng import generator

SYSTEMS = ("truth", "round_trip", "generated")
MOST = 1000  # files


class Rating(Config):
    model_config = ConfigDict(strict=True)
    clip: str = Field(max_length=64)
    score: int = Field(ge=1, le=5)
    plays: int = Field(ge=1, le=1000)
    position: int = Field(ge=0, le=100_000)


class Ratings(Config):
    """A rater's file, as the page saves it."""

    model_config = ConfigDict(strict=True)
    format: Literal["nano4m-mos"]
    version: Literal[1]
    test: str = Field(max_length=64)
    rater: str = Field(min_length=1, max_length=40, pattern=r"^[\p{L}\p{N}][\p{L}\p{N} ._-]*$")
    ratings: list[Rating] = Field(min_length=1, max_length=10_000)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_key(path: Path) -> Key:
    if not path.is_file():
        raise DataError(f"there is no {path}", f"give mos.key=FILE, the {KEY} that was written with the page")
    return read_strictly(path, Key)


def read_ratings(folder: Path, key: Key) -> list[Ratings]:
    """Return the raters' files of a folder, by rater; a file that is wrong is a DataError, none is passed over."""
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'", "give mos.ratings=DIR, with the files that raters sent")
    files = [p for p in sorted(folder.glob("*.json")) if p.name != KEY]
    if not files:
        raise DataError(f"'{folder}' holds no ratings", "put the .json files there that raters saved on the page")
    if len(files) > MOST:
        raise DataError(f"'{folder}' holds {len(files)} .json files, more than {MOST}")
    out: dict[str, tuple[Path, Ratings]] = {}
    for path in files:
        one = read_strictly(path, Ratings)
        wrong = lambda what, p=path: DataError(f"{p}: {what}", "take it out of the folder, or ask for it again")  # noqa: E731
        if one.test != key.test:
            raise wrong(f"it is of another listening test ('{one.test}', not '{key.test}')")
        seen: set[str] = set()
        for rating in one.ratings:
            if rating.clip not in key.clips:
                raise wrong(f"the test has no sound '{rating.clip}'")
            if rating.clip in seen:
                raise wrong(f"sound '{rating.clip}' is rated twice")
            seen.add(rating.clip)
        who = one.rater.casefold()
        if who in out:
            raise wrong(f"rater '{one.rater}' has a file already: {out[who][0].name}")
        out[who] = path, one
    return [one for _, one in sorted(out.values(), key=lambda o: o[1].rater)]


def table(key: Key, ratings: Sequence[Ratings]) -> tuple[list[str], np.ndarray]:
    """Return (samples, scores (R, I, S)), samples sorted, systems as SYSTEMS."""
    samples = sorted({c.sample for c in key.clips.values()})
    scores = np.full((len(ratings), len(samples), len(SYSTEMS)), np.nan)
    for r, one in enumerate(ratings):
        for rating in one.ratings:
            clip = key.clips[rating.clip]
            scores[r, samples.index(clip.sample), SYSTEMS.index(clip.system)] = rating.score
    return samples, scores


# -- figures ----------------------------------------------------------------------------------------------------------


def reliable(scores_RIS: np.ndarray, least: float) -> np.ndarray:
    """Return bool (R,): whose mean rating of the hidden reference (the real recordings) is at least `least`.

    Who rated no reference cannot be checked and does not count either.
    """
    truth = scores_RIS[:, :, SYSTEMS.index("truth")]
    count = np.isfinite(truth).sum(1)
    return np.where(count > 0, np.nansum(truth, 1) / np.maximum(count, 1), -math.inf) >= least


def mean_interval(scores_RI: np.ndarray, seed: int) -> tuple[float, tuple[float, float], int]:
    """Return (mean of the scores given, its 95 % bootstrap interval, how many there are).

    Raters and items are drawn anew, both with replacement and apart from each other (the pigeonhole bootstrap of Owen 2007):
    another panel would hear other recordings.
    """
    there = np.isfinite(scores_RI)
    value = np.where(there, scores_RI, 0.0)
    if not there.any():
        return math.nan, (math.nan, math.nan), 0
    r, i = scores_RI.shape
    draw = lambda n, what: generator(seed, f"mos/{what}", n).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # noqa: E731
    raters, items = draw(r, "raters"), draw(i, "items")
    top = ((raters @ value) * items).sum(1)
    bottom = ((raters @ there.astype(float)) * items).sum(1)
    means = top[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(value.sum() / there.sum()), (float(low), float(high)), int(there.sum())


def krippendorff(scores_RU: np.ndarray) -> float:
    """Return Krippendorff's alpha of interval data (Krippendorff 2011): 1 is full agreement, 0 what chance gives; NaN where no
    unit has two ratings, or all ratings are alike."""
    there = np.isfinite(scores_RU)
    units = there.sum(0) > 1
    x, there = np.where(there, scores_RU, 0.0)[:, units], there[:, units]
    m = there.sum(0)
    n = m.sum()
    if not n:
        return math.nan
    # Sums of (a - b)^2 over ordered pairs are 2 (m sum a^2 - (sum a)^2).
    observed = (2 * (m * (x**2).sum(0) - x.sum(0) ** 2) / (m - 1)).sum() / n
    expected = 2 * (n * (x**2).sum() - x.sum() ** 2) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 0 else math.nan
