"""What a run is, in short: its name, a sentence, facts, how to make it again, versions."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from nano4m_cli import __version__
from nano4m_cli.registry import SOURCES
from nano4m_cli.report._numbers import count, duration, finite, rounded
from nano4m_cli.report._read import Inputs


def name_of(run: Inputs) -> str:
    return str(run.setting("name") or run.folder.resolve().name)


def step_of(run: Inputs) -> int | None:
    """Return the step reached: of the checkpoint, else of the last record."""
    for found in (run.state, *run.records[-1:]):
        step = finite(found.get("step"))
        if step is not None:
            return round(step)
    return None


def training_time(run: Inputs) -> float | None:
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
    data = run.dataset
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
    step, steps = step_of(run), finite(run.setting("train", "steps"))
    batch = finite(run.setting("train", "batch"))
    reached, seconds = count(step), training_time(run)
    found = [
        ("Data set", run.dataset),
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
    data, name = " ".join((run.dataset or "DATASET").split()), name_of(run)
    config = shlex.quote(f"runs/{run.folder.resolve().name}/config.yaml")
    if run.data is not None and run.data.source in SOURCES:
        given = {"name": data, **run.data.options}
        options = [f"{k}={_option(v)}" for k, v in given.items() if v is not None and not (k == "name" and v == run.data.source)]
        fetch = " ".join(["nano4m fetch", run.data.source, *map(shlex.quote, options)])
    else:
        fetch = f"nano4m fetch {data}" if data in SOURCES else f"# put the data set '{data}' into data/{data}/raw"
    again = shlex.quote(f"name={name}-again")
    limits = sorted({n for r in run.results if (n := finite(r.settings.get("limit"))) is not None})
    evaluate = "nano4m eval" + (f" --limit {round(limits[-1])}" if limits else "")
    lines = [fetch, "nano4m tokenize", f"nano4m train {config} {again}", evaluate]
    return "\n".join(lines if run.setting("task") != "tokenizer" else [fetch, lines[2]])


def _option(value: Any) -> str:
    """Return an option as the command line takes it; a path of the machine it was made on is left open."""
    text = json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)
    return without_paths(text)


ABSOLUTE = re.compile(r"""(?<![\w./:])(?:~|[A-Za-z]:)?[/\\](?:[^\s'"\[\]{},:;/\\]+[/\\])+([^\s'"\[\]{},:;/\\]*)""")


def without_paths(text: str) -> str:
    """Return a text in which absolute paths are cut to their last part: they name a person's machine, and fit no other."""
    return ABSOLUTE.sub(lambda m: f"PATH/{m[1]}", text)


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


def spec_row(spec: dict[str, Any]) -> dict[str, str]:
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
