"""What a caption says of which object, and which of its objects is which true one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nano4m_cli.data.sources._base import Attribute

Thing = dict[str, str]  # attribute -> value
Rule = Literal["phrase", "count"]
ORDER = 1e-3  # what a matched field outweighs: of equally good assignments, the one that keeps the order


def assign(cost_RC: np.ndarray) -> np.ndarray:
    """Return (R,) the column of each row so that the sum of costs is least, each column once; -1: none was left for it.

    The Hungarian method with shortest paths (Kuhn 1955; Jonker and Volgenant 1987), exact, O(R^2 C).
    """
    cost = np.asarray(cost_RC, dtype=np.float64)
    rows, columns = cost.shape
    if rows > columns:
        out = np.full(rows, -1)
        out[assign(cost.T)] = np.arange(columns)
        return out
    row_price, column_price, owner = np.zeros(rows), np.zeros(columns), np.full(columns, -1)
    for row in range(rows):
        # The cheapest way from this row to a free column, along which rows hand on their columns (Dijkstra).
        distance, before, settled = np.full(columns, np.inf), np.full(columns, -1), np.zeros(columns, dtype=bool)
        at, so_far, column = row, 0.0, -1
        while at >= 0:
            through = so_far + cost[at] - row_price[at] - column_price
            nearer = ~settled & (through < distance)
            distance[nearer], before[nearer] = through[nearer], column
            column = int(np.where(settled, np.inf, distance).argmin())
            so_far, settled[column] = distance[column], True
            at = owner[column]
        row_price[row] += so_far
        for c in np.flatnonzero(settled & (owner >= 0)):
            row_price[owner[c]] += so_far - distance[c]
        column_price[settled] -= so_far - distance[settled]
        while column >= 0:
            owner[column] = row if before[column] < 0 else owner[before[column]]
            column = before[column]
    out = np.full(rows, -1)
    out[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return out


class Reader:
    """Finds objects in captions by the words that a data set has for its attributes' values.

    rule: "phrase" begins another object after any other word, or where an attribute comes again; "count" takes the k-th
        mention of an attribute as that of object k.
    """

    def __init__(self, attributes: dict[str, Attribute], rule: Rule = "phrase"):
        self.rule = rule
        self.known: dict[str, tuple[str, str]] = {}
        for name, attribute in attributes.items():
            for value in attribute.values:
                for surface in attribute.surfaces.get(value, [value]):
                    self.known.setdefault(" ".join(surface.lower().split()), (name, value))
        longest = sorted((w for w in self.known if w), key=lambda w: (-len(w), w))  # "light blue" before "blue"
        pattern = "|".join(re.escape(w).replace(r"\ ", r"\s+") for w in longest)
        self.pattern = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)" if longest else r"(?!)")

    def read(self, text: str) -> list[Thing]:
        """Return the objects in order of mention; whole words only, so there is no pig in a pigeon."""
        text, things, end = text.lower(), [], 0
        counts: dict[str, int] = {}
        for found in self.pattern.finditer(text):
            attribute, value = self.known[" ".join(found[0].split())]
            if self.rule == "count":
                at = counts[attribute] = counts.get(attribute, -1) + 1
            else:
                apart = not things or attribute in things[-1] or re.search(r"\w", text[end : found.start()])
                at = len(things) if apart else len(things) - 1
            things += [{}] * (at >= len(things))
            things[at] = {**things[at], attribute: value}
            end = found.end()
        return things


def told(label: dict[str, Any]) -> list[Thing]:
    """Return what a true caption says of each object that it mentions, by the label's fields."""
    things: dict[int, Thing] = {}
    for field in label["fields"]:
        name = field["attribute"]
        things.setdefault(field["object"], {})[name] = label["objects"][field["object"]][name]
    return [things[i] for i in sorted(things)]


def best_reader(attributes: dict[str, Attribute], captions: Sequence[str], truth: Sequence[list[Thing]]) -> Reader:
    """Return the reader whose rule finds more of what true captions say (to be chosen on train samples)."""
    def found(reader: Reader) -> int:
        return sum(matched(reader.read(c), t)[0].total() for c, t in zip(captions, truth, strict=True))

    return max((Reader(attributes, "phrase"), Reader(attributes, "count")), key=found)


def matched(said: Sequence[Thing], truth: Sequence[Thing]) -> tuple[Counter, bool]:
    """Return (fields right per attribute, whether everything is right: objects, fields, order, and nothing more said).

    Said objects are assigned to true ones so that as many fields as possible agree; of a true object that none is left
    for, no field is right.
    """
    right: Counter = Counter()
    if said and truth:
        agree = np.array([[sum(s.get(a) == v for a, v in t.items()) for s in said] for t in truth], dtype=np.float64)
        apart = np.abs(np.arange(len(truth))[:, None] - np.arange(len(said)))
        for thing, column in zip(truth, assign(ORDER * apart / (1 + apart.max()) - agree), strict=True):
            for a, v in thing.items():
                right[a] += int(column >= 0 and said[column].get(a) == v)
    return right, list(said) == list(truth)
