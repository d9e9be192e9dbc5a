"""Where bodies stand: side by side in the picture, never rejected, whatever they are.

Positions are found from outlines: the range of u (in [-1, 1] over the picture) that a body covers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from nano4m_cli.data.sources._scene_render import Body, Camera

MARGIN = 0.05  # half widths of the picture that stay free at either side
GAP, OVERLAP = 0.04, 0.18  # least gap of outlines in x; with room in z they may overlap by this part of the narrower


def place(bodies: list[Body], yaws: list[float], u_gaps: list[float], cam: Camera) -> list[Body]:
    """Return the bodies with x and yaw set: outlines inside the frame, in order, (nearly) free of each other.

    Constructive, so that it always succeeds: outlines are packed from the left, then the free width is shared out
    at random. Where they do not fit, all move back. Outlines apart in x, or boxes apart in z, are apart in 3-D.
    """
    tight = [0.0] * len(bodies)
    xs, right = _pack(bodies, tight, cam)
    while right > 1 - MARGIN:
        bodies = [replace(b, z=b.z + 0.1) for b in bodies]
        xs, right = _pack(bodies, tight, cam)
    logs = [-math.log(u) for u in u_gaps]  # exponential gaps, the last one on the right: a uniform split
    free = 1 - MARGIN - right
    while free > 1e-3:
        spread, right = _pack(bodies, [free * part / sum(logs) for part in logs[:-1]], cam)
        if right <= 1 - MARGIN:
            xs = spread
            break
        free *= 0.95  # outlines are wider off the axis than where they were packed
    return [
        replace(b, x=x, yaw=yaw - math.atan2(x, b.z) if b.shape == "cube" else 0.0)  # yaws are to the line of sight
        for b, x, yaw in zip(bodies, xs, yaws, strict=True)
    ]


def _pack(bodies: list[Body], gaps: list[float], cam: Camera) -> tuple[list[float], float]:
    """Return each body's x, and the right end, when outlines stand from left to right with `gaps` before them."""
    xs, right, before = [], -1 + MARGIN, None
    for body, gap in zip(bodies, gaps, strict=True):
        left = right + gap
        if before is not None:
            last, width = before
            if abs(body.z - last.z) >= body.reach + last.reach:
                own = outline(body, 0.0, cam)
                left -= OVERLAP * min(width, own[1] - own[0])
            else:
                left += GAP
        x = _x_of_left(body, left, cam)
        start, right = outline(body, x, cam)
        before = body, right - start
        xs.append(x)
    return xs, right


def _rings(body: Body, cam: Camera) -> list[tuple[float, float]]:
    """Return (z-depth of the middle, how much of a ring's reach is in depth) whose tangents bound the outline in x."""
    sin, cos = cam.sin_cos
    if body.shape == "sphere":
        return [(body.z * cos + (cam.height - body.radius) * sin, 1.0)]
    return [(body.z * cos + (cam.height - y) * sin, cos) for y in (0.0, body.height)]


def _x_of_left(body: Body, u: float, cam: Camera) -> float:
    """Return the x at which the outline's left end is at u."""
    k = u / cam.focal
    return max(k * depth + body.reach * math.sqrt(1 + (k * part) ** 2) for depth, part in _rings(body, cam))


def outline(body: Body, x: float, cam: Camera) -> tuple[float, float]:
    """Return the left and right end (u) of the outline: (x - k depth)^2 = reach^2 (1 + (k part)^2), k = u / focal."""
    ends = []
    for depth, part in _rings(body, cam):
        a, b, c = depth**2 - (body.reach * part) ** 2, depth * x, x * x - body.reach**2
        root = math.sqrt(b * b - a * c)
        ends += [(b - root) / a, (b + root) / a]
    return cam.focal * min(ends), cam.focal * max(ends)
