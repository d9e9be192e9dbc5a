"""Colours of a traced scene: Lambert and ambient light, cast shadows; metal with highlight and reflected sky.

The background is desaturated, so that no object's colour is near it.

Shapes: n pixels per side; h, w sides of a rectangle of pixels; P visible pixels of one body.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from nano4m_cli.data.sources._scene_render import (
    F32,
    GROUND,
    Body,
    Camera,
    Grid,
    Traced,
    corners,
    make_grid,
    normals,
    points,
)

PALETTE = {
    "red": (0.88, 0.09, 0.09),
    "green": (0.10, 0.66, 0.14),
    "blue": (0.10, 0.22, 0.92),
    "yellow": (0.98, 0.84, 0.08),
    "purple": (0.60, 0.10, 0.80),
    "cyan": (0.08, 0.80, 0.86),
}
_HORIZON, _ZENITH = np.array([0.84, 0.86, 0.88], F32), np.array([0.62, 0.67, 0.74], F32)
_GROUND = np.array([0.60, 0.58, 0.56], F32)
_AMBIENT, _DIFFUSE = 0.36, 0.74


def _in_shadow(body: Body, light, px, py, pz) -> np.ndarray:
    """Return which points see the light (towards `light`) through `body`; the shapes of px, py, pz broadcast."""
    lx, ly, lz = (F32(v) for v in light)
    ox, oz = px - F32(body.x), pz - F32(body.z)
    if body.shape == "sphere":
        oy = py - F32(body.radius)
        b = ox * lx + oy * ly + oz * lz
        return (b < 0) & (ox * ox + oy * oy + oz * oz - b * b < F32(body.radius**2))
    t_top = (F32(body.height) - py) / ly  # the ray is below the top for t in (0, t_top)
    if body.shape == "cylinder":
        a, b = lx * lx + lz * lz, ox * lx + oz * lz
        disc = b * b - a * (ox * ox + oz * oz - F32(body.radius**2))
        root = np.sqrt(np.maximum(disc, 0))
        return (disc > 0) & (root > b) & (-b - root < a * t_top)
    sin, cos = math.sin(body.yaw), math.cos(body.yaw)
    enter, leave = F32(0), t_top
    for ax, az in ((F32(cos), F32(sin)), (F32(-sin), F32(cos))):
        along = lx * ax + lz * az
        inverse = F32(1) / (along if abs(along) > 1e-6 else F32(1e-6))
        o = (ox * ax + oz * az) * inverse
        half = abs(F32(body.radius) * inverse)
        enter, leave = np.maximum(enter, -o - half), np.minimum(leave, half - o)
    return enter < leave


def shade(grid: Grid, traced: Traced, bodies: list[Body], light: tuple[float, float, float]) -> np.ndarray:
    """Return float32 (n, n, 3) colours in [0, 1]; `light` is the unit vector towards the light."""
    lit_rows, dark_rows = _ground_rows(grid, light[1])  # (n, 3) each: ground in light and in shadow; sky in both
    rgb = np.repeat(lit_rows[:, None], grid.n, 1)
    for body in bodies:
        x, y, z = corners(body)
        shift = y / light[1]
        rows, cols = grid.rect(
            np.concatenate([x, x - light[0] * shift]), np.zeros(16), np.concatenate([z, z - light[2] * shift])
        )
        t = grid.t_ground[rows]
        dark = _in_shadow(body, light, t * grid.dx[:, cols], F32(0), t * grid.dz[rows])  # (h, w)
        np.copyto(rgb[rows, cols], dark_rows[rows, None], where=(dark & (traced.ids[rows, cols] == GROUND))[..., None])
    for i, body in enumerate(bodies):
        rows, cols = traced.pixels(i)
        if len(rows):
            others = [b for j, b in enumerate(bodies) if j != i]
            rgb[rows, cols] = _shade_body(grid, traced, body, others, light, rows, cols)
    return np.clip(rgb, 0, 1, out=rgb)


@lru_cache(maxsize=4)
def _sky_rows(grid_key: tuple[Camera, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return per row: is it sky (n, 1), the sky's colour (n, 3), and how much of the ground the haze hides (n, 1)."""
    grid = make_grid(*grid_key)
    sky = grid.t_ground == 0
    height = np.clip(grid.dy / np.sqrt(grid.dy**2 + grid.dz**2) / F32(0.25), 0, 1)
    return sky, _HORIZON + (_ZENITH - _HORIZON) * height, F32(1) - np.exp(-np.maximum(grid.t_ground - 3, 0) / F32(16))


def _ground_rows(grid: Grid, light_y: float) -> tuple[np.ndarray, np.ndarray]:
    sky, sky_rgb, haze = _sky_rows((grid.camera, grid.n))
    rows = []
    for lit in (1.0, 0.0):
        ground = _GROUND * F32(_AMBIENT + 0.06 + _DIFFUSE * light_y * lit)
        rows.append(np.where(sky, sky_rgb, ground + (_HORIZON - ground) * haze))
    return rows[0], rows[1]


def _shade_body(grid: Grid, traced: Traced, body: Body, others: list[Body], light, rows, cols) -> np.ndarray:
    """Return (P, 3): Lambert; metal adds a highlight and the reflection of sky and ground, both tinted."""
    px, py, pz = points(grid, traced.depth[rows, cols], rows, cols)
    nx, ny, nz = normals(body, px, py, pz, traced.face[rows, cols])
    lx, ly, lz = (F32(v) for v in light)
    diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0)
    for other in others:
        diffuse *= ~_in_shadow(other, light, px, py, pz)
    ambient = F32(_AMBIENT) + F32(0.08) * ny
    albedo = np.array(PALETTE[body.colour], F32)
    if body.material == "rubber":
        return (ambient + F32(_DIFFUSE) * diffuse)[:, None] * albedo
    # polished faces are shaded as if they bulged a little, so that highlight and reflection show on flat ones too
    if body.shape != "sphere":
        bulge = F32(0.6 / body.radius)
        nx = nx + (px - F32(body.x)) * bulge
        ny = ny + (py - F32(body.height / 2)) * bulge * F32(2 * body.radius / body.height)
        nz = nz + (pz - F32(body.z)) * bulge
        inverse = 1 / np.sqrt(nx * nx + ny * ny + nz * nz)
        nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
    inverse = 1 / np.sqrt(grid.dd[rows, cols])
    vx, vy, vz = -grid.dx[0, cols] * inverse, -grid.dy[rows, 0] * inverse, -grid.dz[rows, 0] * inverse
    facing = 2 * (nx * vx + ny * vy + nz * vz)
    rx, ry, rz = facing * nx - vx, facing * ny - vy, facing * nz - vz  # the mirrored view
    sky = F32(0.30) + np.clip(ry * F32(2.5) + F32(0.5), 0, 1) * (F32(0.85) - F32(0.5) * np.maximum(ry, 0))
    shine = np.maximum(rx * lx + ry * ly + rz * lz, 0)
    gain, floor = (2.8, 1.5) if body.shape == "sphere" else (4.2, 1.3)  # bulged faces catch less of a narrow highlight
    shine = np.clip(shine * shine * F32(gain) - F32(floor), 0, 1) * (diffuse > 0)
    base = F32(0.05) + F32(0.20) * (ambient + diffuse) + F32(0.45) * sky
    coat = F32(0.66) * np.maximum(sky - F32(0.35), 0) + shine  # a polished coat mirrors the sky without the tint
    return base[:, None] * albedo + coat[:, None]


def shrink(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Return uint8 (n / factor, n / factor, 3): the mean of factor x factor subpixels."""
    total = 0
    for i in range(factor):
        for j in range(factor):
            total = total + rgb[i::factor, j::factor]
    return (total * F32(255.0 / factor**2) + F32(0.5)).astype(np.uint8)
