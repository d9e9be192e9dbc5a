"""What the muP benches share: the same small model at several widths, with muP and without, and a plot of lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from _reference import ROOT, make_tokens

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.spec import TokenSpec
from nano4m_cli.train.config import load_run_config
from nano4m_cli.train.loop import Trainer
from nano4m_cli.train.run import prepare

HEAD = 16  # the same at all widths: what grows is the number of heads
SPECS = [
    TokenSpec(modality="rgb", kind="grid", shape=(4, 4), vocab_size=64),
    TokenSpec(modality="audio", kind="codes", shape=(16, 1), vocab_size=64),
    TokenSpec(modality="caption", kind="sequence", shape=(12,), vocab_size=64, eos=0),
]
KINDS = ("plain", "mup")
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#e09f3e", "#6a4c93", "#444444", "#00a6a6", "#a05195")


def made_up(root: Path) -> Workspace:
    """Return a workspace of made-up tokens that can be learned: 8,192 samples of 64 classes."""
    return make_tokens(root, 8192, SPECS, classes=64)


def trainer(workspace: Workspace, kind: str, width: int, base: int, seed: int, settings: Sequence[str]) -> Trainer:
    """Return a trainer of the model at a width; `mup` at the base width is the plain model."""
    masks = "masking.components=[{type: dirichlet, alpha: 1.0, input: [4, 40], target: [4, 24]}]"
    config = load_run_config(ROOT / "cfgs" / "demo.yaml", [
        "data.dataset=null", "data.modalities=[]", "loss_weights={}", masks, f"model.size=d2-2w{width}", f"model.head_width={HEAD}",
        f"model.mup_base={base if kind == 'mup' else 'null'}", "train.ema=0", "train.weight_decay=0", "name=widths", f"seed={seed}",
        *settings,
    ])  # fmt: skip
    return Trainer(prepare(config, workspace).task, config.train, seed, None)


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent: least squares of log value over log width."""
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


Lines = Mapping[str, Sequence[tuple[float, float]]]


def plot(path: Path, panels: Mapping[str, Lines], x_label: str, y_label: str, log_y: bool) -> None:
    """Write an SVG of panels side by side, lines by name over a logarithmic x; all panels share the range of y."""
    points = [p for lines in panels.values() for line in lines.values() for p in line]
    across = (lambda v: math.log(v)), (math.log if log_y else float)
    (x0, x1), (y0, y1) = (_range([f(p[i]) for p in points]) for i, f in enumerate(across))
    wide, high, pad = 340, 260, 46
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide * len(panels) + 130} {high}" font-family="sans-serif" '
           'font-size="10">', '<rect width="100%" height="100%" fill="white"/>']
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for n, (title, lines) in enumerate(panels.items()):
        left, right, top, bottom = n * wide + pad, (n + 1) * wide - 12, 24, high - 34

        def at(p, left=left, right=right, top=top, bottom=bottom):
            x, y = across[0](p[0]), across[1](p[1])
            return left + (right - left) * (x - x0) / (x1 - x0), bottom - (bottom - top) * (y - y0) / (y1 - y0)

        out.append(f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#bbb"/>')
        out.append(f'<text x="{(left + right) / 2}" y="{top - 8}" text-anchor="middle" font-size="12">{escape(title)}</text>')
        out.append(f'<text x="{(left + right) / 2}" y="{high - 4}" text-anchor="middle">{escape(x_label)}</text>')
        for v in sorted({p[0] for p in points}):
            out.append(f'<text x="{at((v, points[0][1]))[0]:.1f}" y="{bottom + 13}" text-anchor="middle">{v:g}</text>')
        for i in range(5):
            y = y0 + (y1 - y0) * i / 4
            value = math.exp(y) if log_y else y
            place = at((points[0][0], value))[1]
            out.append(f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" stroke="#eee"/>')
            out.append(f'<text x="{left - 4}" y="{place + 3:.1f}" text-anchor="end">{value:.3g}</text>')
        for name, line in lines.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            where = [at(p) for p in line]
            path_ = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
            out.append(f'<polyline points="{path_}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in where]
    out.append(f'<text x="4" y="12">{escape(y_label)}</text>')
    for i, name in enumerate(names):
        y = 34 + 14 * i
        out.append(f'<rect x="{wide * len(panels) + 4}" y="{y - 8}" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>')
        out.append(f'<text x="{wide * len(panels) + 18}" y="{y + 1}">{escape(name)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*out, "</svg>\n"]))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad
