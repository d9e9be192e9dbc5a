"""Ray casting of simple bodies on a ground plane, in numpy: exact depth and exact normals per pixel centre.

World axes: x right, y up, z forward, metres; the camera stands at (0, height, 0) and looks along +z, `pitch` down.
A ray is d = forward + u/focal * right + v/focal * up with u, v in [-1, 1] over the picture, so that the ray's
parameter t *is* z-depth. Columns share d_x, rows share d_y and d_z: rays, ground and sky are made once.

Shapes: n pixels per side; h, w sides of a rectangle of pixels; P visible pixels of one body.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FAR = 10.0  # metres: the depth of the sky and of all ground beyond
SKY, GROUND = -2, -1  # ids of what is no body
F32 = np.float32


@dataclass(frozen=True)
class Body:
    """One object. `radius` is the cube's half edge, else the radius; `height` that of its top; (x, z) its middle."""

    shape: str
    colour: str
    size: str
    material: str
    radius: float
    height: float
    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0

    @property
    def reach(self) -> float:
        """Largest distance from the vertical axis."""
        return self.radius * (math.sqrt(2.0) if self.shape == "cube" else 1.0)


@dataclass(frozen=True)
class Camera:
    height: float
    pitch: float  # radians below the horizontal
    focal: float  # in half widths of the picture

    @property
    def sin_cos(self) -> tuple[float, float]:
        return math.sin(self.pitch), math.cos(self.pitch)


@dataclass(frozen=True)
class Grid:
    """Rays through n x n pixel centres, and what they meet where there is no body."""

    camera: Camera
    n: int
    dx: np.ndarray  # (1, n)
    dy: np.ndarray  # (n, 1)
    dz: np.ndarray  # (n, 1)
    dd: np.ndarray  # (n, n) squared length
    depth: np.ndarray  # (n, n)
    ids: np.ndarray  # (n, n) int8: SKY or GROUND
    t_ground: np.ndarray  # (n, 1), not cut at FAR; 0 in the sky

    def rect(self, x, y, z) -> tuple[slice, slice]:
        """Return the rows and columns that hold the convex hull of the world points (arrays)."""
        sin, cos = self.camera.sin_cos
        y = y - self.camera.height
        depth = z * cos - y * sin
        half = 0.5 * self.n
        cols = (self.camera.focal * x / depth + 1.0) * half
        rows = (1.0 - self.camera.focal * (y * cos + z * sin) / depth) * half
        ends = [(int(a.min() - 0.5), int(a.max() + 1.5)) for a in (rows, cols)]
        return tuple(slice(min(max(first, 0), self.n), min(max(end, 0), self.n)) for first, end in ends)


@lru_cache(maxsize=4)
def make_grid(camera: Camera, n: int) -> Grid:
    """Return the rays of a camera; the same object for the same arguments."""
    sin, cos = camera.sin_cos
    centres = (np.arange(n) + 0.5) / n * 2.0 - 1.0
    dx = (centres / camera.focal)[None]
    up = (-centres / camera.focal)[:, None]
    dy, dz = -sin + up * cos, cos + up * sin
    sky = dy >= -1e-4
    t_ground = np.where(sky, 0.0, -camera.height / np.where(sky, -1.0, dy))
    depth = np.where(sky, FAR, np.minimum(t_ground, FAR))
    return Grid(
        camera, n, dx.astype(F32), dy.astype(F32), dz.astype(F32), (dx**2 + dy**2 + dz**2).astype(F32),
        np.repeat(depth, n, 1).astype(F32), np.repeat(np.where(sky, SKY, GROUND), n, 1).astype(np.int8),
        t_ground.astype(F32),
    )  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """What each ray meets first; `covered` counts the pixels that each body would take if it stood alone."""

    depth: np.ndarray  # (n, n) float32
    ids: np.ndarray  # (n, n) int8: index of the body, GROUND or SKY
    face: np.ndarray  # (n, n) int8, cube: 0, 1 sides, 2 top; cylinder: 0 side, 2 top
    rects: list[tuple[slice, slice]]  # per body, rows and columns that hold it
    covered: list[int]

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and columns (P,) of the pixels that show body i."""
        rect = self.rects[i]
        rows, cols = np.nonzero(self.ids[rect] == i)
        return rows + rect[0].start, cols + rect[1].start


def trace(grid: Grid, bodies: list[Body]) -> Traced:
    """Return what every ray meets; each body is only tried inside the rectangle that holds it."""
    depth, ids, face = grid.depth.copy(), grid.ids.copy(), np.zeros((grid.n, grid.n), np.int8)
    rects, covered = [], []
    for i, body in enumerate(bodies):
        rows, cols = grid.rect(*corners(body))
        rects.append((rows, cols))
        t, side = _HIT[body.shape](body, grid, rows, cols)  # (h, w), inf where missed
        covered.append(int(np.count_nonzero(t < FAR)))
        near = t < depth[rows, cols]
        np.copyto(depth[rows, cols], t, where=near)
        np.copyto(ids[rows, cols], np.int8(i), where=near)
        if side is not None:
            np.copyto(face[rows, cols], side, where=near)
    return Traced(depth, ids, face, rects, covered)


def corners(body: Body) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, y, z (8,) of an upright box that holds the body."""
    r, h = body.reach, body.height
    x, z = body.x, body.z
    return (
        np.array([x - r, x + r, x - r, x + r, x - r, x + r, x - r, x + r]),
        np.array([0.0, 0.0, 0.0, 0.0, h, h, h, h]),
        np.array([z - r, z - r, z + r, z + r, z - r, z - r, z + r, z + r]),
    )


def _hit_sphere(body: Body, grid: Grid, rows: slice, cols: slice):
    ox, oy, oz = -body.x, grid.camera.height - body.radius, -body.z
    a = grid.dd[rows, cols]
    b = grid.dx[:, cols] * F32(ox) + (grid.dy[rows] * F32(oy) + grid.dz[rows] * F32(oz))
    disc = b * b - a * F32(ox * ox + oy * oy + oz * oz - body.radius**2)
    t = (-b - np.sqrt(np.maximum(disc, 0))) / a
    return np.where(disc > 0, t, F32(np.inf)), None


def _hit_cylinder(body: Body, grid: Grid, rows: slice, cols: slice):
    # the camera is above every top: a ray comes in through the top or the side, never from below
    dx, dy, dz = grid.dx[:, cols], grid.dy[rows], grid.dz[rows]
    ox, oz, above = F32(-body.x), F32(-body.z), grid.camera.height - body.height
    a, b = dx * dx + dz * dz, dx * ox + dz * oz
    disc = b * b - a * F32(body.x**2 + body.z**2 - body.radius**2)
    t_side = (-b - np.sqrt(np.maximum(disc, 0))) / a
    y = t_side * dy
    t_top = F32(above) / np.maximum(-dy, F32(1e-6))  # (h, 1)
    top = (ox + t_top * dx) ** 2 + (oz + t_top * dz) ** 2 <= F32(body.radius**2)
    # 1e-5: no pinholes between side and top
    side = (disc > 0) & (y <= F32(-above + 1e-5)) & (y >= F32(-grid.camera.height))
    return np.where(top, t_top, np.where(side, t_side, F32(np.inf))), top * np.int8(2)


def _hit_cube(body: Body, grid: Grid, rows: slice, cols: slice):
    sin, cos = math.sin(body.yaw), math.cos(body.yaw)
    dx, dz = grid.dx[:, cols], grid.dz[rows]
    r, t_in, t_out = body.radius, [], []
    for axis_x, axis_z in ((cos, sin), (-sin, cos)):  # slabs of the two upright pairs of faces
        inverse = F32(1) / (dx * F32(axis_x) + dz * F32(axis_z) + F32(1e-9))
        o = -body.x * axis_x - body.z * axis_z
        first, second = F32(r - o) * inverse, F32(-r - o) * inverse
        t_in.append(np.minimum(first, second))
        t_out.append(np.maximum(first, second))
    down = np.maximum(-grid.dy[rows], F32(1e-6))
    t_top = F32(grid.camera.height - body.height) / down
    enter = np.maximum(np.maximum(t_in[0], t_in[1]), t_top)
    leave = np.minimum(np.minimum(t_out[0], t_out[1]), F32(grid.camera.height) / down)
    face = np.where(t_top >= enter, np.int8(2), (t_in[1] >= t_in[0]).astype(np.int8))
    return np.where((enter <= leave) & (leave > 0), enter, F32(np.inf)), face


_HIT = {"sphere": _hit_sphere, "cylinder": _hit_cylinder, "cube": _hit_cube}


def normals(body: Body, px: np.ndarray, py: np.ndarray, pz: np.ndarray, face: np.ndarray) -> list[np.ndarray]:
    """Return the unit normal's x, y, z (P,) in world axes."""
    if body.shape == "cube":
        sin, cos = math.sin(body.yaw), math.cos(body.yaw)
        table = np.zeros((3, 3), F32)  # row: face
        for row, (ax, az) in enumerate(((cos, sin), (-sin, cos))):
            to_camera = 1.0 if -body.x * ax - body.z * az > 0 else -1.0
            table[row] = (to_camera * ax, 0.0, to_camera * az)
        table[2, 1] = 1.0
        return list(table[face].T)
    scale = F32(1.0 / body.radius)
    nx, nz = (px - F32(body.x)) * scale, (pz - F32(body.z)) * scale
    if body.shape == "sphere":
        return [nx, (py - F32(body.radius)) * scale, nz]
    top = face == 2
    return [np.where(top, F32(0), nx), top.astype(F32), np.where(top, F32(0), nz)]


def normal_map(grid: Grid, traced: Traced, bodies: list[Body]) -> np.ndarray:
    """Return float32 (n, n, 3) unit normals in camera axes (x right, y up, z towards the camera)."""
    sin, cos = grid.camera.sin_cos
    rows = np.where(grid.t_ground == 0, np.array([0, 0, 1], F32), np.array([0, cos, sin], F32))  # (n, 3)
    out = np.repeat(rows[:, None], grid.n, 1)
    for i, body in enumerate(bodies):
        rows, cols = traced.pixels(i)
        px, py, pz = points(grid, traced.depth[rows, cols], rows, cols)
        nx, ny, nz = normals(body, px, py, pz, traced.face[rows, cols])
        out[rows, cols, 0] = nx
        out[rows, cols, 1] = ny * F32(cos) + nz * F32(sin)
        out[rows, cols, 2] = ny * F32(sin) - nz * F32(cos)
    return out


def points(grid: Grid, t: np.ndarray, rows: np.ndarray, cols: np.ndarray):
    """Return world x, y, z (P,) at depths t."""
    return t * grid.dx[0, cols], F32(grid.camera.height) + t * grid.dy[rows, 0], t * grid.dz[rows, 0]
