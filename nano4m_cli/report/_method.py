"""The method of a run as a picture: its modalities and tokenizers, one mask as its training draws them, its model, its targets.

Drawn from config and specs alone. The mask is the first that the run's own masking draws with the run's seed; samples of text
are taken to be of full length. A wide and a tall picture say the same; the style sheet shows the one that fits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from nano4m_cli.config import build
from nano4m_cli.errors import Nano4MError
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, MaskReport, Mixture
from nano4m_cli.report._numbers import count, finite
from nano4m_cli.report._read import Inputs
from nano4m_cli.spec import Layout, TokenSpec

SAMPLES = 4096  # masks drawn for the shares ...
DRAWN = 4_000_000  # ... or fewer, so that no more slots than this are drawn
MOST = 24  # modalities that are drawn
LATTICE = (104.0, 56.0)  # room for the slots of a modality
CELLS = 4096  # slots that are drawn one by one

NAMES = {
    "fourm": "4M", "course4m": "4M (of the course)", "apple4m": "4M (apple)", "gpt": "GPT", "maskgit": "MaskGIT",
    "tokenizer": "Tokenizer",
}  # fmt: skip


@dataclass
class Method:
    """wide, tall: the picture (None: the specs are not known). shares: per modality, (shown, asked) on average; notes: what
    the picture leaves open."""

    wide: Markup | None = None
    tall: Markup | None = None
    shares: list[tuple[str, float, float]] = field(default_factory=list)
    masks: MaskReport | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Lane:
    """One modality: what is written beside it, and per slot 0 (neither), 1 (shown), 2 (asked); None: not known."""

    name: str
    tokenizer: str
    tokens: str
    vocab: str
    shape: tuple[int, ...]
    slots: np.ndarray | None


def method(run: Inputs) -> Method:
    """Return the picture of a run."""
    out = Method()
    if run.setting("task") == "tokenizer" or not run.specs:
        return out
    specs: list[TokenSpec] = []
    try:
        specs = [build(TokenSpec, s, "spec") for s in run.specs]
        layout = Layout(specs)
    except (Nano4MError, AssertionError):
        out.notes.append("The specs of this run's checkpoint cannot be read, so there is no picture.")
        return out
    state: list[np.ndarray | None] = [None] * len(specs)
    try:
        shown, asked, out.masks = _masks(run, layout)
        starts = layout.start
        state = [np.where(asked[a:b], 2, np.where(shown[a:b], 1, 0)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        out.shares = [(s.modality, out.masks.visible[s.modality], out.masks.asked[s.modality]) for s in specs]
    except (Nano4MError, TypeError, ValueError):
        out.notes.append("This run's masking cannot be drawn from its config.")
    lanes = [_lane(s, one) for s, one in zip(specs, state, strict=True)]
    if len(lanes) > MOST:
        out.notes.append(f"The first {MOST} of {len(lanes)} modalities are drawn.")
    told = _told(run, lanes)
    out.wide, out.tall = _wide(run, lanes[:MOST], told), _tall(run, lanes[:MOST], told)
    return out


def _masks(run: Inputs, layout: Layout) -> tuple[np.ndarray, np.ndarray, MaskReport]:
    """Return (shown_C, asked_C) of the first mask, and the shares over many."""
    config = run.setting("masking") or {}
    if run.setting("task") in ("gpt", "maskgit") and "components" not in config:
        config = {**config, "components": [{"type": "causal" if run.setting("task") == "gpt" else "masked"}]}
    mixture = Mixture(build(MaskingConfig, config, "masking"), layout)
    length = np.array([[s.slots for s in layout.specs]])
    seed = finite(run.setting("seed")) or 0
    shown, asked = mixture.draw(length, Key(int(seed), "mask", np.arange(1)))
    return shown[0], asked[0], mixture.simulate(length, int(seed), max(16, min(SAMPLES, DRAWN // layout.columns)))


def _lane(spec: TokenSpec, slots: np.ndarray | None) -> _Lane:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, spec.shape))
    tokens = {"grid": shape, "codes": f"{spec.shape[0]} frames", "sequence": f"up to {spec.shape[0]}"}[spec.kind]
    if spec.kind == "codes" and spec.shape[1] > 1:
        tokens += f" \N{MULTIPLICATION SIGN} {spec.shape[1]} codebooks"
    return _Lane(spec.modality, spec.tokenizer.name, tokens, count(spec.vocab_size), spec.shape, slots)


def blocks(run: Inputs) -> list[tuple[str, str]]:
    """Return (name, what it is) of the model's parts, from the input on."""
    numbers = re.findall(r"\d+", str(run.setting("model", "size") or ""))
    task = run.setting("task")
    if task in ("gpt", "maskgit"):
        depth, width = (numbers + ["?", "?"])[:2]
        how = "reads left to right" if task == "gpt" else "reads in all directions"
        return [("Decoder" if task == "gpt" else "Encoder", f"{_layers(depth)}, width {width}, {how}")]
    if len(numbers) != 3:
        return [("Encoder", "reads what is shown"), ("Decoder", "asks for the rest")]
    return [("Encoder", f"{_layers(numbers[0])}, width {numbers[2]}"), ("Decoder", f"{_layers(numbers[1])}, width {numbers[2]}")]


def _layers(depth: str) -> str:
    return "1 layer" if depth == "1" else f"{depth} layers"


def _told(run: Inputs, lanes: list[_Lane]) -> str:
    parts = [f"{li.name} by {li.tokenizer} into {li.tokens} tokens of {li.vocab} ids"
             + ("" if li.slots is None else f", {int((li.slots == 1).sum())} shown and {int((li.slots == 2).sum())} asked")
             for li in lanes]
    model = ", ".join(f"{a.lower()} with {b}" for a, b in blocks(run))
    return f"Method of the run: {'; '.join(parts)}. Model: {model}."


def _lattice(lane: _Lane, x: float, y: float, of: int, room: tuple[float, float] = LATTICE) -> tuple[list[str], float]:
    """Return the slots of a modality within `room` at (x, middle y), those of state `of` filled, and their width."""
    if len(lane.shape) == 3:
        rows, columns = lane.shape[1], lane.shape[0] * lane.shape[2]
        place = lambda s: (s // lane.shape[2] % lane.shape[1],  # noqa: E731
                           s // (lane.shape[1] * lane.shape[2]) * lane.shape[2] + s % lane.shape[2])
    elif len(lane.shape) == 2 and lane.shape[1] <= 32 and lane.shape[0] > 2 * lane.shape[1]:  # time runs to the right
        rows, columns = lane.shape[1], lane.shape[0]
        place = lambda s: (s % rows, s // rows)  # noqa: E731
    elif len(lane.shape) == 2:
        rows, columns = lane.shape
        place = lambda s: (s // columns, s % columns)  # noqa: E731
    else:
        rows, columns = 1, lane.shape[0]
        place = lambda s: (0, s)  # noqa: E731
    n = rows * columns
    if n > CELLS or lane.slots is None or len(lane.slots) != n:
        width, height = (room[0], room[1]) if rows > 1 else (room[0], 12.0)
        return [f'<rect class="slot" x="{x:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}"/>'], width
    if rows == 1 and columns > 16:  # long lines are broken, so that single slots can be seen
        rows = min(4, math.ceil(columns / 16))
        columns = math.ceil(columns / rows)
        place = lambda s: (s // columns, s % columns)  # noqa: E731
    side = min(room[0] / columns, room[1] / rows, 13.0)
    gap = 1.2 if side > 5 else 0.5
    top = y - side * rows / 2
    paths: dict[bool, list[str]] = {True: [], False: []}
    for s in range(len(lane.slots)):
        r, c = place(s)
        square = f"h{side - gap:.1f}v{side - gap:.1f}h{gap - side:.1f}z"
        paths[bool(lane.slots[s] == of)].append(f"M{x + side * c:.1f} {top + side * r:.1f}{square}")
    out = [f'<path class="slot" d="{"".join(paths[False])}"/>'] if paths[False] else []
    if paths[True]:
        out.append(f'<path class="slot {"shown" if of == 1 else "asked"}" d="{"".join(paths[True])}"/>')
    return out, side * columns


def _wide(run: Inputs, lanes: list[_Lane], told: str) -> Markup:
    row, top = 74.0, 46.0
    tall = top + row * len(lanes) + 14
    width, parts = 1060, blocks(run)
    left, right, boxes = 192.0, 790.0, [(396.0, 128.0), (590.0, 128.0)] if len(parts) == 2 else [(466.0, 168.0)]
    out = _begin("wide", width, tall, told)
    heads = [(0, "modality, its tokenizer", "start"), (left, "tokens: shown", "start"), (right, "asked, and predicted", "start"),
             (width, "one of", "end")]
    out += [f'<text class="head" x="{x:.0f}" y="18" text-anchor="{a}">{t}</text>' for x, t, a in heads]
    first, last = boxes[0], boxes[-1]
    middle, high = top + row * len(lanes) / 2, max(row * len(lanes) - 20, 96.0)
    for i, lane in enumerate(lanes):
        y = top + row * (i + 0.5)
        if i:
            out.append(f'<line class="grid" x1="0" x2="{width}" y1="{y - row / 2:.1f}" y2="{y - row / 2:.1f}"/>')
        out.append(f'<text class="name" x="0" y="{y - 8:.1f}">{_cut(lane.name, 22)}</text>')
        out.append(f'<text x="0" y="{y + 9:.1f}">{_cut(lane.tokenizer, 26)}</text>')
        out.append(f'<text x="0" y="{y + 25:.1f}">{escape(lane.tokens)}</text>')
        cells, wide = _lattice(lane, left, y, 1)
        out += cells
        if lane.slots is None or (lane.slots == 1).any():
            out.append(_flow(left + wide + 8, y, first[0] - 4, middle + (y - middle) * 0.72))
        cells, _ = _lattice(lane, right, y, 2)
        out += cells
        if lane.slots is None or (lane.slots == 2).any():
            out.append(_flow(last[0] + last[1] + 4, middle + (y - middle) * 0.72, right - 8, y))
        out.append(f'<text x="{width}" y="{y - 3:.1f}" text-anchor="end">{escape(lane.vocab)}</text>')
        out.append(f'<text x="{width}" y="{y + 12:.1f}" text-anchor="end">ids</text>')
    for (x, w), (name, what) in zip(boxes, parts, strict=True):
        out += _box(x, middle - high / 2, w, high, name, what)
    if len(boxes) == 2:
        a, b = first[0] + first[1] + 4, last[0] - 5
        out.append(f'<path class="flow" d="M{a} {middle:.1f}H{b}"/><path class="tip" d="M{b - 5} {middle - 4:.1f}l6 4l-6 4z"/>')
        out.append(f'<text x="{(a + b) / 2}" y="{middle - 12:.1f}" text-anchor="middle">cross-</text>'
                   f'<text x="{(a + b) / 2}" y="{middle + 20:.1f}" text-anchor="middle">attention</text>')
    return Markup("".join([*out, "</svg>"]))


def _tall(run: Inputs, lanes: list[_Lane], told: str) -> Markup:
    row, top, width = 66.0, 30.0, 340
    room = (84.0, 44.0)
    left, right, foot = 152.0, 250.0, top + row * len(lanes) + 16
    parts = blocks(run)
    out = _begin("tall", width, foot + 92 * len(parts) + 6, told)
    out += [f'<text class="head" x="{x}" y="14">{t}</text>' for x, t in ((0, "modality"), (left, "shown"), (right, "asked"))]
    for i, lane in enumerate(lanes):
        y = top + row * (i + 0.5)
        if i:
            out.append(f'<line class="grid" x1="0" x2="{width}" y1="{y - row / 2:.1f}" y2="{y - row / 2:.1f}"/>')
        out.append(f'<text class="name" x="0" y="{y - 12:.1f}">{_cut(lane.name, 18)}</text>')
        out.append(f'<text x="0" y="{y + 5:.1f}">{_cut(lane.tokenizer, 20)}</text>')
        out.append(f'<text x="0" y="{y + 21:.1f}">{escape(lane.tokens)} of {escape(lane.vocab)}</text>')
        out += _lattice(lane, left, y, 1, room)[0] + _lattice(lane, right, y, 2, room)[0]
    y = foot
    for i, (name, what) in enumerate(parts):
        said = ("from what is shown" if i == 0 else "cross-attention") if len(parts) == 2 else "from what is shown"
        out.append(f'<path class="flow" d="M170 {y - 8:.1f}V{y + 20:.1f}"/><path class="tip" d="M166 {y + 17:.1f}l4 6l4 -6z"/>')
        out.append(f'<text x="180" y="{y + 11:.1f}">{said}</text>')
        out += _box(60, y + 26, 220, 46, name, what)
        y += 92
    out.append(f'<text x="170" y="{y - 6:.1f}" text-anchor="middle">to ids of what is asked</text>')
    return Markup("".join([*out, "</svg>"]))


def _begin(css: str, width: float, height: float, told: str) -> list[str]:
    return [f'<svg class="method {css}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(told)}">']


def _box(x: float, y: float, w: float, h: float, name: str, what: str) -> list[str]:
    out = [f'<rect class="block" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3"/>']
    lines = [what] if w > 200 else what.split(", ")
    middle = y + h / 2 - 8 * (len(lines) - 1)
    out.append(f'<text class="name" x="{x + w / 2:.1f}" y="{middle - 4:.1f}" text-anchor="middle">{name}</text>')
    for i, text in enumerate(lines):
        out.append(f'<text x="{x + w / 2:.1f}" y="{middle + 14 + 16 * i:.1f}" text-anchor="middle">{escape(text)}</text>')
    return out


def _flow(x1: float, y1: float, x2: float, y2: float) -> str:
    bend = (x2 - x1) * 0.5
    return (f'<path class="flow" d="M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2 - 4:.1f} {y2:.1f}"/>'
            f'<path class="tip" d="M{x2 - 6:.1f} {y2 - 3.5:.1f}l6 3.5l-6 3.5z"/>')


def _cut(text: str, most: int) -> Markup:
    short = text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return Markup("{}").format(short)
