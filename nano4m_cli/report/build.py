"""`build(run)`: the run's report, one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nano4m_cli import __version__
from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.registry import SOURCES
from nano4m_cli.report import _numbers as numbers
from nano4m_cli.report._curves import charts
from nano4m_cli.report._figures import cards, figures, interval, scales, tally
from nano4m_cli.report._media import ShownGallery, show
from nano4m_cli.report._numbers import count, duration, finite, rounded
from nano4m_cli.report._read import Inputs, read_run
from nano4m_cli.report._tradeoffs import tables

HERE = Path(__file__).parent
BUDGET = 15_000_000  # bytes of the page
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def build(run: Path, budget: int = BUDGET) -> Path:
    """Write `report/index.html` of a run folder and return its path.

    The page is a function of the run's files alone. What is missing is said on the page; gallery rows that would
    take it over `budget` bytes are left out, from the end, and the page says so.
    """
    inputs = read_run(Path(run))
    media = budget
    while True:
        gallery = show(inputs.gallery, inputs.folder / "eval" / "gallery", media)
        page = render(inputs, gallery)
        if len(page) <= budget or not gallery.rows:
            break
        # Media took all of the budget or less; what the rest of the page takes is known now.
        media = min(media - 1, budget - (len(page) - _weight(gallery)))
    out = inputs.folder / "report" / "index.html"
    with atomic_file(out) as file:
        file.write(page)
    return out


def render(run: Inputs, gallery: ShownGallery) -> bytes:
    """Return the page as UTF-8."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update(figure=numbers.figure, count=count, duration=duration, share=numbers.share)
    env.globals["interval"] = interval
    style, script = ((HERE / name).read_text() for name in ("style.css", "filter.js"))
    losses, rest = charts(run)
    all_cards = cards(run)
    scale = scales([m for r in run.results for m in r.metrics])
    text = env.get_template("template.html.j2").render(
        # Both are files of this package, the only text that goes in as it is.
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=_name(run),
        sentence=sentence(run),
        facts=facts(run),
        problems=run.problems,
        cards=all_cards,
        tally=tally(all_cards),
        losses=losses,
        rest=rest,
        specs=[_spec_row(s) for s in run.specs],
        probes=[
            (r, _by_subject([f for f in figures(r, scale) if f.metric.setting is None]), tables(r.metrics)) for r in run.results
        ],
        gallery=gallery,
        config_text=run.config_text,
        commands=commands(run),
        versions=versions(run),
    )
    # Control characters are errors in HTML, and a lone surrogate cannot be encoded.
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).encode("utf-8", "replace")


def _weight(gallery: ShownGallery) -> int:
    sides = [i for rows in gallery.groups.values() for r in rows for i in (*r.condition, *r.output, *r.truth)]
    return sum(len(i.text) + len(i.sound) + (len(i.picture.src) if i.picture else 0) for i in sides)


def _name(run: Inputs) -> str:
    return str(run.setting("name") or run.folder.resolve().name)


def _dataset(run: Inputs) -> str | None:
    found = run.setting("data", "dataset") or next((r.data for r in run.results if r.data), None)
    return None if found is None else str(found)


def _step(run: Inputs) -> int | None:
    """Return the step reached: of the checkpoint, else of the last record."""
    for found in (run.state, *run.records[-1:]):
        step = finite(found.get("step"))
        if step is not None:
            return round(step)
    return None


def _training_time(run: Inputs) -> float | None:
    """Return the seconds spent in training steps: samples over samples per second, record by record."""
    batch, before, seconds = finite(run.setting("train", "batch")), 0.0, 0.0
    for r in run.records:
        step, rate = finite(r.get("step")), finite(r.get("samples_per_s"))
        if r.get("kind") == "train" and batch and step is not None and rate:
            seconds += max(0.0, step - before) * batch / rate
            before = step
    return seconds or None


def sentence(run: Inputs) -> str:
    """Return what the run is, as far as its files tell."""
    data = _dataset(run)
    on = f"trained on the data set {data}" if data else "whose data set is not known"
    if run.setting("task") == "tokenizer":
        modality, name = run.setting("tokenizer", "modality"), run.setting("tokenizer", "name")
        return f"A tokenizer{f' ({name})' if name else ''} for {modality or 'an unknown modality'}, {on}."
    names = run.modalities
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""
    size = f" of {rounded(run.parameters)} parameters" if run.parameters is not None else ""
    over = f" that predicts any of {listed} from any others" if len(names) > 1 else f" over {listed}" if names else ""
    return f"A 4M model{size}{over}, {on}."


def facts(run: Inputs) -> list[tuple[str, str]]:
    """Return (what, value) of the header; what is not known is left out."""
    step, steps = _step(run), finite(run.setting("train", "steps"))
    batch = finite(run.setting("train", "batch"))
    reached, seconds = count(step), _training_time(run)
    found = [
        ("Data set", _dataset(run)),
        ("Model", run.setting("model", "size")),
        ("Parameters", count(run.parameters) if run.parameters is not None else None),
        ("Steps", f"{reached} of {count(steps)}" if steps else reached if step is not None else None),
        ("Samples seen", count(step * batch) if step and batch else None),
        ("Training time", duration(seconds) if seconds else None),
        ("Seed", run.setting("seed")),
        ("Evaluated on", ", ".join(sorted({r.split for r in run.results if r.split})) or None),
    ]
    return [(k, str(v)) for k, v in found if v is not None]


def commands(run: Inputs) -> str:
    """Return the shell lines that make this run again, beside the one that is there."""
    data, name = " ".join((_dataset(run) or "DATASET").split()), _name(run)
    config = shlex.quote(f"runs/{run.folder.resolve().name}/config.yaml")
    fetch = f"nano4m fetch {data}" if data in SOURCES else f"# put the data set '{data}' into data/{data}/raw"
    lines = [fetch, "nano4m tokenize", f"nano4m train {config} {shlex.quote(f'name={name}-again')}", "nano4m eval"]
    return "\n".join(lines if run.setting("task") != "tokenizer" else [fetch, lines[2]])


def versions(run: Inputs) -> list[tuple[str, str]]:
    """Return (what, version) of everything the figures depend on, as far as it is known."""
    found: list[tuple[str, Any]] = [
        ("nano4m of the training", run.state.get("version")),
        ("nano4m of this page", __version__),
        ("Commit of the evaluation", ", ".join(sorted({r.commit for r in run.results if r.commit}))),
        ("Checkpoint", run.checkpoint),
    ]
    hashes = run.state.get("sha256")
    if isinstance(hashes, dict) and "model.safetensors" in hashes:
        found.append(("sha256 of the weights", str(hashes["model.safetensors"])[:16]))
    found += [(f"Probe {r.probe}", f"version {r.version}") for r in run.results if r.version is not None]
    return [(k, str(v)) for k, v in found if v]


def _spec_row(spec: dict[str, Any]) -> dict[str, str]:
    tokenizer = spec.get("tokenizer") if isinstance(spec.get("tokenizer"), dict) else {}
    shape = spec.get("shape") if isinstance(spec.get("shape"), list) else []
    return {
        "modality": str(spec["modality"]),
        "kind": str(spec.get("kind", "-")),
        "shape": " x ".join(map(str, shape)) or "-",
        "vocab": count(spec.get("vocab_size")),
        "tokenizer": str(tokenizer.get("name", "-")),
        "weights": str(tokenizer.get("weights_sha256") or "-")[:12],
    }


def _by_subject(found: list) -> list[tuple[str, list]]:
    groups: dict[str, list] = {}
    for f in found:
        groups.setdefault(f.metric.subject, []).append(f)
    return list(groups.items())
