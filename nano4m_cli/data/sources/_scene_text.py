"""Captions: every attribute of every object, objects from left to right, in varied wording of a small vocabulary.

Wording k of one value corresponds to wording k of any other value of its attribute, and no wording depends on a value:
so a caption's wording tells nothing of the scene, and exchanging one word gives another caption that could have been.
"""

from __future__ import annotations

import math

from nano4m_cli.data.sources._base import Attribute

ATTRIBUTES = {
    "shape": Attribute(
        values=["sphere", "cube", "cylinder"],
        surfaces={"sphere": ["sphere"], "cube": ["cube"], "cylinder": ["cylinder"]},
    ),
    "colour": Attribute(
        values=["red", "green", "blue", "yellow", "purple", "cyan"],
        surfaces={c: [c] for c in ("red", "green", "blue", "yellow", "purple", "cyan")},
    ),
    "size": Attribute(values=["large", "small"], surfaces={"large": ["large", "big"], "small": ["small", "little"]}),
    "material": Attribute(
        values=["rubber", "metal"], surfaces={"rubber": ["rubber", "matte"], "metal": ["metal", "shiny"]}
    ),
}
# by wording of the material: a noun stands next to the shape, an adjective before the colour
ORDERS = (("size", "colour", "material", "shape"), ("size", "material", "colour", "shape"))
# per number of objects: (text before, between and after the objects), the likeliest first
TEMPLATES = {
    1: (("", ""), ("there is ", ""), ("a picture of ", "")),
    2: (("", " to the left of ", ""), ("", " left of ", ""), ("", " and ", ""), ("", " next to ", "")),
    3: (("", ", ", " and ", ""), ("from left to right ", ", ", " and ", ""), ("", " left of ", " and ", "")),
}
FIRST = 0.6  # share of the first template, and of the first wording


def choose(count: int, u: float) -> int:
    """Return an index below `count`: 0 with probability FIRST, else uniform over the others."""
    if count == 1 or u < FIRST:
        return 0
    return 1 + min(int((u - FIRST) / (1 - FIRST) * (count - 1)), count - 2)


def entropy(count: int) -> float:
    """Return the nats of `choose` among so many."""
    p = [1.0] if count == 1 else [FIRST] + [(1 - FIRST) / (count - 1)] * (count - 1)
    return -sum(q * math.log(q) for q in p)


def wording_entropy(objects: int) -> float:
    """Return the nats by which captions of the same scene vary: its template, and each object's wordings of size and material."""
    return entropy(len(TEMPLATES[objects])) + objects * 2 * entropy(2)


def compose(objects: list[dict[str, str]], template: int, wordings: list[tuple[int, int]]) -> tuple[str, list[dict]]:
    """Return (caption, fields).

    Args:
        objects: {attribute: value}, left to right.
        template: index into TEMPLATES for this number of objects.
        wordings: per object, the wording of its size and of its material.

    Returns:
        fields: {"attribute", "object", "span": [start, end], "wording": k} in order of the text, so that
            caption[start:end] == ATTRIBUTES[attribute].surfaces[value][k].
    """
    parts = TEMPLATES[len(objects)][template]
    text, fields = parts[0], []
    for i, (values, (size_k, material_k)) in enumerate(zip(objects, wordings, strict=True)):
        text += "a"
        for attribute in ORDERS[material_k]:
            k = {"size": size_k, "material": material_k}.get(attribute, 0)
            word = ATTRIBUTES[attribute].surfaces[values[attribute]][k]
            start = len(text) + 1
            text += " " + word
            fields.append({"attribute": attribute, "object": i, "span": [start, start + len(word)], "wording": k})
        text += parts[i + 1]
    return text, fields
