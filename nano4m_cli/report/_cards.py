"""Data card and model card: what a reader must know before using either, from the files of the run and of its data set.

After Datasheets for Datasets (Gebru et al. 2018, arXiv:1803.09010) and Model Cards (Mitchell et al. 2018, arXiv:1810.03993).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nano4m_cli.masking._mixture import IN_DISTRIBUTION
from nano4m_cli.report._about import step_of, training_time, without_paths
from nano4m_cli.report._method import NAMES, Method, blocks
from nano4m_cli.report._numbers import count, duration, figure, finite, share
from nano4m_cli.report._read import Inputs
from nano4m_cli.report._words import Verdict

VALUES = 12  # values of an attribute that are listed
UNTRAINED = 40  # directions that are listed
ARROW = "\N{RIGHTWARDS ARROW}"


@dataclass
class Part:
    """A section of a card: facts as (what, value), sentences, and tables (head, rows of text; the first cell names the row)."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def data_card(run: Inputs) -> list[Part]:
    """Return the sections of the data card; a data set whose folder is gone is said so."""
    data, out = run.data, []
    if data is None:
        name = run.dataset or "of this run"
        out.append(Part("What is known", lines=[
            f"The data set {name} is not in this workspace any more (or its raw/dataset.json cannot be read), so its source, its "
            "splits and its licence are not known here. What follows is what the run's checkpoint says of its tokens."]))
    else:
        out.append(Part("Source", [
            ("Name", data.name), ("Made by", f"nano4m fetch {data.source}" if data.source else "not known"),
            ("Version", str(data.version) if data.version is not None else "not known"),
            ("Pairing", {"instance": "the modalities of a sample show the same thing",
                         "class": "paired by class only: the modalities of a sample share a label, not an instance"}.get(
                             data.pairing, data.pairing or "not known")),
            *((("Objects per sample", f"up to {data.max_objects}"),) if data.max_objects > 1 else ()),
        ]))
        total = sum(data.splits.values())
        out.append(Part("Splits", head=["Split", "Samples", "Share"],
                        rows=[[s, count(n), share(n / total if total else None)] for s, n in data.splits.items()],
                        lines=[f"{count(data.judge)} further samples are kept for judges only; no model is trained on them."]
                        if data.judge else []))
        out.append(Part("Licence and remarks", lines=[without_paths(data.notes) if data.notes else
                        "The data set states no licence and no remarks: find out before you use it for more than your own work."]))
        if data.attributes:
            out.append(Part("Labels", head=["Attribute", "Values", "Carried by"], rows=[
                [name, _values(a.get("values")), ", ".join(m for m, d in data.determined.items() if name in d) or "nothing"]
                for name, a in data.attributes.items()
            ], lines=["Carried by: the modalities that determine the attribute exactly."]))
        if data.options:
            out.append(Part("Options it was made with", [
                (k, without_paths(str(v))) for k, v in data.options.items() if v is not None]))
    rows = []
    for spec in run.specs:
        size = (data.sizes if data else {}).get(str(spec["modality"]), {})
        tokenizer = spec.get("tokenizer") if isinstance(spec.get("tokenizer"), dict) else {}
        rows.append([
            str(spec["modality"]), _pairs(size) or "-", _pairs(spec.get("preprocess")) or "-", str(tokenizer.get("name", "-")),
            str(tokenizer.get("weights_sha256") or "-")[:12],
        ])
    if rows:
        head = ["Modality", "Raw", "Brought to", "Tokenizer", "Weights, sha256"]
        out.append(Part("Preprocessing and tokenizers", head=head, rows=rows))
    trip = [m for r in run.results if r.probe == "tokenizer" for m in r.metrics if m.setting is None]
    if trip:
        out.append(Part("What tokenizing loses", head=["Figure", "Value", "95 % interval"], lines=[
            "Measured on held-out samples: a round trip through the tokenizer, beside the truth."], rows=[
            [m.name, figure(m.value) + (f" {m.unit}" if m.unit else ""),
             f"{figure(m.ci95[0])} to {figure(m.ci95[1])}" if m.ci95 else "-"] for m in trip]))
    return out


def model_card(run: Inputs, how: Method, verdict: Verdict) -> list[Part]:
    """Return the sections of the model card."""
    task = str(run.setting("task") or "fourm")
    step, steps = step_of(run), finite(run.setting("train", "steps"))
    batch = finite(run.setting("train", "batch"))
    seconds = training_time(run)
    model = run.setting("model") if isinstance(run.setting("model"), dict) else {}
    out = [Part("Architecture", [
        ("Kind", NAMES.get(task, task)),
        *[(name, what) for name, what in blocks(run)],
        ("Parameters", count(run.parameters) if run.parameters is not None else "not known"),
        *[(k.replace("_", " "), _plain(v)) for k, v in model.items() if v not in (None, [], {})],
    ])]
    train = run.setting("train") if isinstance(run.setting("train"), dict) else {}
    out.append(Part("Training", [
        ("Data", f"{run.dataset or 'not known'}, split {run.setting('data', 'train') or 'train'}"),
        ("Steps", f"{count(step)} of {count(steps)}" if steps else count(step)),
        ("Samples seen", count(step * batch) if step and batch else "not known"),
        ("Time in steps", duration(seconds) if seconds else "not known"),
        ("Seed", str(run.setting("seed") if run.setting("seed") is not None else "not known")),
        *[(k.replace("_", " "), _plain(train[k])) for k in ("batch", "optimizer", "lr", "muon_lr", "schedule", "ema", "precision")
          if train.get(k) is not None],
    ], lines=["Training had not come to its end when this page was made: the figures are those of the checkpoint named."]
        if steps and step is not None and step < steps else []))
    if how.shares:
        out.append(Part("What training shows and asks", head=["Modality", "Shown", "Asked"], rows=[
            [name, share(a), share(b)] for name, a, b in how.shares], lines=[
            "Shares of a modality's slots, on average over masks drawn as training draws them."]))
    names = run.modalities
    out.append(Part("Intended use", lines=[
        f"Study of multimodal masked modelling: to generate or to score {_listed(names) or 'its modalities'} given any of the "
        f"others, on samples like those of the data set {run.dataset or 'it was trained on'}.",
        "It is a small research model. It is not meant for decisions about people, nor for media that are to be taken for real.",
        "The weights' licence is for those to state who publish them; what the data set says is on the data card.",
    ]))
    out.append(Part("Limits", lines=limits(run, how, verdict)))
    return out


def never(run: Inputs, how: Method) -> list[str]:
    """Return the directions from one whole modality to another that the run's masking hardly ever draws."""
    if how.masks is None or run.setting("task") not in (None, "fourm"):
        return []
    names = run.modalities
    return [f"{s}->{t}" for t in names for s in names if s != t and how.masks.directions.get(f"{s}->{t}", 0.0) < IN_DISTRIBUTION]


def limits(run: Inputs, how: Method, verdict: Verdict) -> list[str]:
    """Return what the run cannot do or was not shown to do, as far as its results and data set know."""
    out = []
    if not run.results:
        out.append("It has not been evaluated: nothing is known of what it can do.")
    untrained = list(dict.fromkeys([*(c.subject for c in verdict.untrained), *never(run, how)]))
    if untrained:
        named = ", ".join(f"{d.replace('+', ' + ').replace('->', f' {ARROW} ')}" for d in untrained[:UNTRAINED])
        more = len(untrained) - UNTRAINED
        out.append(f"Directions that training (almost) never posed: {named}{f' and {more} more' if more > 0 else ''}.")
    if verdict.nothing:
        named = ", ".join(f.metric.name.replace("->", ARROW) for f in verdict.nothing[:12])
        more = len(verdict.nothing) - 12
        out.append(f"No better than the baseline: {named}{f' and {more} more' if more > 0 else ''}.")
    if run.data is not None:
        for m in run.modalities:
            carried = run.data.determined.get(m)
            lacking = [a for a in run.data.attributes if a not in (carried or [])]
            if carried is not None and lacking:
                known = run.data.ceilings.get(m, {})
                told = [a + (f" (at best {share(known[a])} of answers can be right)" if finite(known.get(a)) is not None else "")
                        for a in lacking]
                out.append(f"No model can tell from {m} what it does not carry: {_listed(told)}.")
        nobody = [a for a in run.data.attributes if not any(a in d for d in run.data.determined.values())]
        if nobody and run.data.determined:
            out.append(f"No modality carries {_listed(nobody)}.")
    out.append("One run with one seed: intervals are over held-out samples, not over trainings.")
    return out


def _values(values: Any) -> str:
    found = [str(v) for v in values] if isinstance(values, list) else []
    return ", ".join(found[:VALUES]) + (f" and {len(found) - VALUES} more" if len(found) > VALUES else "") if found else "-"


def _pairs(given: Any) -> str:
    return ", ".join(f"{k} {_plain(v)}" for k, v in given.items()) if isinstance(given, dict) else ""


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " \N{MULTIPLICATION SIGN} ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return without_paths(f"{value:g}" if isinstance(value, float) else str(value))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""
