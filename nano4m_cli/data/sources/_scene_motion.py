"""How objects move in a scene's video: each straight on, at the scene's speed, through its place in the still picture.

The still picture is the middle frame. Each object draws one of five motions; where any two of them would run into or hide
one another on any two of the ways drawn (whoever takes which), all objects move as the first. So nothing collides, and
since that test does not depend on who drew what, each motion of each object is equally likely in every scene: only the
video tells it, and 1 / 5 is the best that anyone can guess from all else.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from typing import NamedTuple

from nano4m_cli import rng
from nano4m_cli.data.sources._base import Attribute
from nano4m_cli.data.sources._scene_place import outline
from nano4m_cli.data.sources._scene_render import Body, Camera

# metres (x, z) from the middle frame on, as far as the first frame is from it the other way
WAYS = {"still": (0.0, 0.0), "left": (-0.30, 0.0), "right": (0.30, 0.0), "towards": (0.0, -0.50), "away": (0.0, 0.50)}
MOTION = Attribute(values=list(WAYS), surfaces={way: [way] for way in WAYS})
SPEED = (0.85, 1.15)  # times the way; one for the whole scene
HIDDEN = 0.35  # part of the narrower outline that may lie behind the other's


class Move(NamedTuple):
    """A motion, and the way (x, z) that it leads in metres."""

    motion: str
    x: float
    z: float

    def of(self, body: Body, part: float) -> Body:
        """Return the body at a part of its way; -1 is the first frame, 0 the middle one."""
        return replace(body, x=body.x + part * self.x, z=body.z + part * self.z)


def draw_moves(seed: int, split: str, index: int, bodies: list[Body], cam: Camera) -> list[Move]:
    """Return the move of every body of the scene (seed, split, index)."""
    u_speed, *u_ways = (float(rng.uniform(seed, f"scenes/{split}/motion", index, i)) for i in range(1 + len(bodies)))
    ways = [MOTION.values[min(int(u * len(WAYS)), len(WAYS) - 1)] for u in u_ways]
    if not all(apart(a, b, way, other, cam) for a, b in combinations(bodies, 2) for way, other in permutations(ways, 2)):
        ways = ways[:1] * len(ways)
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * u_speed
    return [Move(way, *(speed * part for part in WAYS[way])) for way in ways]


def apart(a: Body, b: Body, way_a: str, way_b: str, cam: Camera) -> bool:
    """Return whether two bodies keep free of each other, and in sight, when they go these ways at full speed."""
    if way_a == way_b:
        return True
    go_a, go_b = (Move(way, *(SPEED[1] * part for part in WAYS[way])) for way in (way_a, way_b))
    x, z, dx, dz = b.x - a.x, b.z - a.z, go_b.x - go_a.x, go_b.z - go_a.z
    nearest = min(max(-(x * dx + z * dz) / (dx * dx + dz * dz), -1.0), 1.0)
    if (x + nearest * dx) ** 2 + (z + nearest * dz) ** 2 < (a.reach + b.reach) ** 2:
        return False
    for part in (-1.0, 1.0):
        (left, right), (left_b, right_b) = (outline(m.of(c, part), c.x + part * m.x, cam) for m, c in ((go_a, a), (go_b, b)))
        if min(right, right_b) - max(left, left_b) > HIDDEN * min(right - left, right_b - left_b):
            return False
    return True


def parts(frames: int) -> list[float]:
    """Return the part of its way at which a body is in each frame: from -1 on, 0 in frame `frames // 2`."""
    middle = frames // 2
    return [(t - middle) / middle for t in range(frames)]
