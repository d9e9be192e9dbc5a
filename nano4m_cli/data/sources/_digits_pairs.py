"""Which recording goes with which picture, in which split: published lists, or a rule of the same structure.

The rule, per digit: recordings in the order of their names take pictures in the order of a fixed shuffle; a training
clip takes eight, a validation or test clip one. Test pictures come from MNIST's t10k, the others from its train file:
training takes the shuffle from the front and validation from the back, so that pictures do not depend on who is held
out. The lists in digits_av/ were made so, with another shuffle.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nano4m_cli import rng
from nano4m_cli.data.sources import _digits_files as files
from nano4m_cli.errors import DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = {"american": "an American", "belgian-french": "a Belgian French", "german": "a German", "greek": "a Greek"}
CODES = {"USA/neutral": "american", "BEL/French": "belgian-french", "DEU/German": "german", "GRC/Greek": "greek"}
SPEAKERS = {
    "george": "greek",
    "jackson": "american",
    "lucas": "german",
    "nicolas": "belgian-french",
    "theo": "american",
    "yweweler": "german",
}
SPLITS = ("train", "val", "test")
REPEATS = {"train": 8, "val": 1, "test": 1}
SEED = 0


class Pair(NamedTuple):
    """One sample to be: `clip` is a file in fsdd/recordings, `part` and `image` a place in MNIST."""

    key: str
    split: str
    clip: str
    part: str
    image: int
    digit: int
    speaker: str
    accent: str
    caption: str


def caption_of(digit: int, accent: str) -> str:
    return f"the digit {WORDS[digit]}, spoken by a man with {ACCENTS[accent]} accent"


def held_out(split: str) -> tuple[str, str]:
    """Return (test speaker, validation speaker) of "speaker:NAME"; validation is the next in alphabetical circle."""
    names, test = sorted(SPEAKERS), split.removeprefix("speaker:")
    return test, names[(names.index(test) + 1) % len(names)]


def split_of(split: str, speaker: str, index: int) -> str:
    """Return the split of recording `index` (0-49) of a speaker; "clip" keeps FSDD's official test indices 0-4."""
    if split == "clip":
        return "test" if index < 5 else "val" if index < 10 else "train"
    test, val = held_out(split)
    return "test" if speaker == test else "val" if speaker == val else "train"


def by_rule(names: Sequence[str], split: str, labels: dict[str, np.ndarray]) -> list[Pair]:
    """Pair recordings with pictures by the rule.

    Args:
        names: file names of the recordings, sorted.
        split: "clip" or "speaker:NAME".
        labels: digits of MNIST's "train" and "t10k".
    """
    order = {}
    for part, digits in labels.items():
        for d in range(10):
            at = np.flatnonzero(digits == d)
            order[part, d] = at[rng.permutation(len(at), SEED, f"digits/{part}", d)].tolist()
    used: dict[tuple[str, int], int] = defaultdict(int)
    pairs = []
    for name in names:
        digit_text, speaker, index = files.WAV.match(name).groups()
        if speaker not in SPEAKERS:
            raise DataError(
                f"recording {name} is by an unknown speaker", f"take it out; known: {', '.join(sorted(SPEAKERS))}"
            )
        digit, accent, where = int(digit_text), SPEAKERS[speaker], split_of(split, speaker, int(index))
        part = "t10k" if where == "test" else "train"
        pool = order[part, digit]
        for k in range(REPEATS[where]):
            n = used[where, digit]
            used[where, digit] += 1
            taken = used["test", digit] if where == "test" else used["train", digit] + used["val", digit]
            if taken > len(pool):
                raise DataError(f"MNIST's {part} file has {len(pool)} pictures of digit {digit}; more are needed")
            image = pool[-1 - n] if where == "val" else pool[n]
            key = f"{name.removesuffix('.wav')}_{k}"
            pairs.append(Pair(key, where, name, part, image, digit, speaker, accent, caption_of(digit, accent)))
    return pairs


def read_list(path: Path) -> list[Pair]:
    """Return the rows of a pair list; a broken one is a DataError that names the line."""
    pairs = []
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for row in rows:
            try:
                pair = Pair(
                    row["id"], row["split"], row["fsdd_file"].removeprefix("recordings/"), row["mnist_file"],
                    int(row["mnist_index"]), int(row["digit"]), row["speaker"], CODES[row["accent"]], row["caption"],
                )  # fmt: skip
                named = files.WAV.match(pair.clip)
                if named is None or named.groups()[:2] != (str(pair.digit), pair.speaker):
                    raise ValueError(f"{pair.clip} is not digit {pair.digit} by {pair.speaker}")
                if pair.split not in SPLITS or pair.part not in files.LABELS:
                    raise ValueError(f"no split '{pair.split}' or no MNIST file '{pair.part}'")
            except (KeyError, ValueError, AttributeError, TypeError) as err:
                raise DataError(f"{path}:{rows.line_num}: not a row of a pair list: {err!r}") from err
            pairs.append(pair)
    return pairs


def check(pairs: Sequence[Pair], labels: dict[str, np.ndarray], where: str) -> None:
    """Raise a DataError unless digits match, and no clip, picture or key stands where it must not."""
    seen: dict[tuple, str] = {}
    keys = set()
    for pair in pairs:
        if not 0 <= pair.image < len(labels[pair.part]):
            raise DataError(f"{where}: {pair.key} names picture {pair.image}, MNIST's {pair.part} file ends before")
        if (found := int(labels[pair.part][pair.image])) != pair.digit:
            raise DataError(f"{where}: {pair.key} is digit {pair.digit}, picture {pair.part}/{pair.image} is {found}")
        if (pair.part == "t10k") != (pair.split == "test"):
            raise DataError(f"{where}: {pair.key} takes a {pair.part} picture for {pair.split}")
        for thing in ((pair.clip,), (pair.part, pair.image)):
            if seen.setdefault(thing, pair.split) != pair.split:
                name = "/".join(map(str, thing))
                raise DataError(f"{where}: {name} stands in two splits, {seen[thing]} and {pair.split}")
        if pair.key in keys:
            raise DataError(f"{where}: id {pair.key} stands twice")
        keys.add(pair.key)
