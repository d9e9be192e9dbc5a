"""Run probes on a run: JSON results, the gallery, the report."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from nano4m_cli import dist
from nano4m_cli.config import apply_overrides, build
from nano4m_cli.data._atomic import atomic_file, write_json
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError, UnknownNameError, UsageError, did_you_mean
from nano4m_cli.probes._base import Probe
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Metric, Result
from nano4m_cli.registry import PROBES
from nano4m_cli.train.run import open_run

Progress = Callable[[str, int, int], None]


@dataclass
class EvalReport:
    """Results in the order they were run, the files written, and probes left out with the reason."""

    run: str
    results: list[Result] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    report: Path | None = None


def kind_of(name: str) -> str:
    """Return a probe's KIND without importing it: "eval" (what the model can do) or "probe" (its features)."""
    for node in ast.parse(PROBES._files()[name].read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "KIND":
            return ast.literal_eval(node.value)
    raise AssertionError(f"probe file {name}.py has no KIND")


def listing(kind: str) -> dict[str, str]:
    """Return {name: first docstring line} of the probes of a kind."""
    return {n: PROBES.summary(n) for n in PROBES.names() if kind_of(n) == kind}


def evaluate(
    workspace: Workspace, run_name: str | None, probes: Sequence[str] = (), split: str | None = None,
    limit: int | None = None, kind: str = "eval", progress: Progress | None = None, seed: int = 0,
    device: str = "cpu", settings: Sequence[str] = (), only_report: bool = False,
) -> EvalReport:
    """Run the named probes (default: all of the kind but costly ones), write eval/<probe>.json each, the gallery and the report.

    The same checkpoint, split and limit give the same files, but for measured seconds (probe decoding); so do several processes
    that have met (`dist.joined`) and share the work of each probe, the first of which writes. A probe that the data set or run
    cannot serve is left out with its reason, unless it was named: then that reason is the error.

    Args:
        settings: "PROBE.KEY=VALUE", options of the probes that are run.
        only_report: run none; write the gallery and the report of the results that are there (of jobs that ran a probe each).
    """
    progress = progress or (lambda what, done, total: None)
    with dist.together():
        made = _asked(kind, probes, settings, only_report)
        run = open_run(workspace, run_name, device)
        context = Context(run, split or _held_out(run), limit, seed, progress)
    report = EvalReport(run.name)
    folder = run.path / "eval"
    for i, (name, probe) in enumerate(made.items()):
        progress(f"probe {name}", i, len(made))
        with dist.together():
            lack = probe.missing(context)
            if lack and probes:
                raise DataError(f"probe '{name}' cannot run here: {lack}")
            if lack:
                report.skipped[name] = lack
                continue
            result = _measured(name, probe, context, settings)
            path = folder / f"{name}.json"
            report.results.append(result)
            report.files += [path, path.with_suffix(".samples.safetensors")]
            if dist.rank() == 0:
                write_json(path, result.model_dump(mode="json"))
                _write_samples(context, result.metrics, report.files[-1])
    progress("probes", len(made), len(made))
    with dist.together():
        if kind == "eval" and not probes:
            from nano4m_cli.probes._gallery import write_gallery

            report.files.append(write_gallery(context, folder / "gallery"))
        from nano4m_cli.report.build import build as build_report

        report.report = dist.by_first(lambda: build_report(run.path))
    return report


def _asked(kind: str, probes: Sequence[str], settings: Sequence[str], only_report: bool) -> dict[str, Probe]:
    """Return the probes to run, with their options, in order."""
    known = listing(kind)
    for name in probes:
        if name not in known:
            raise UnknownNameError.of("probe", name, known)
    wanted = list(dict.fromkeys(probes)) or [n for n in known if not (only_report or PROBES.get(n).costly)]
    options = apply_overrides({}, settings)
    for name in options:
        if name not in wanted:
            raise UnknownNameError(f"settings of '{name}', which is no probe of this evaluation", did_you_mean(name, wanted))
    made = {n: PROBES.get(n)(build(PROBES.get(n).Options, options.get(n, {}), n)) for n in wanted}
    for name, probe in made.items():
        if probe.alone and dist.ranks() > 1:
            raise UsageError(f"probe '{name}' runs by one process, this is one of {dist.ranks()}: {probe.alone}",
                             "start it without torchrun")
    return made


def _measured(name: str, probe: Probe, context: Context, settings: Sequence[str]) -> Result:
    """Return what a probe finds."""
    found = probe.measure(context)
    directions = sorted({m.name.rpartition("/")[0] for m in found.metrics if "->" in m.name})
    posed = {d: context.posed(d) for d in directions}
    metrics = [
        m.model_copy(update={"in_distribution": posed[d].value}) if (d := m.name.rpartition("/")[0]) in posed
        and m.in_distribution is None else m  # a probe that asks several questions for one figure says so itself
        for m in found.metrics
    ]
    return Result(
        probe=name, version=probe.version, title=PROBES.summary(name), split=context.split, seed=context.seed,
        run=context.run.name, checkpoint=context.run.checkpoint.name, data=context.dataset.name, commit=commit(),
        metrics=metrics, in_distribution=posed, notes=found.notes, plots=found.plots,
        settings={"limit": context.limit, "samples": context.n, **({"options": " ".join(settings)} if settings else {})},
    )


def _write_samples(context: Context, metrics: Sequence[Metric], path: Path) -> None:
    """Write the per-sample values that figures are means of, for paired comparisons of runs: "<metric name>" (n,) and
    "<metric name>/weight" (n,), of the first n samples of the split; figures under several settings are left out."""
    tensors = {}
    for m in metrics:
        if m.per_sample is not None and m.setting is None:
            values, weights = m.per_sample
            tensors[m.name], tensors[f"{m.name}/weight"] = (np.ascontiguousarray(x, np.float64) for x in (values, weights))
    about = {"data": context.dataset.name, "split": context.split, "samples": context.n, "seed": context.seed,
             "checkpoint": context.run.checkpoint.name, **fingerprint(context)}
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"about": json.dumps(about)}))  # one entry: of several, their order is not kept


def fingerprint(context: Context) -> dict[str, Any]:
    """Return hashes by which two results are known to be of the same samples: of the data set's making and of the keys; and per
    modality of what its ids mean, without which likelihoods do not compare."""
    info = context.info
    short = lambda x: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()[:16]  # noqa: E731
    ids = {s.modality: short(s.model_dump(mode="json", include={"kind", "shape", "vocab_size", "levels", "eos"})
                             | {"weights": s.tokenizer.weights_sha256}) for s in context.layout.specs}
    return {"made": short([info.source, info.version, info.options]), "tokens": ids,
            "keys": short([context.tokens.key(i) for i in range(context.n)])}


def _held_out(run) -> str:
    splits = run.dataset.info().splits
    for name in ("test", "val"):
        if splits.get(name):
            return name
    raise DataError(f"data set '{run.dataset.name}' has no test or val split", "name one with --split")


def commit() -> str | None:
    """Return the commit of the source tree this package runs from, if it is one; "+" marks local changes."""
    here = Path(__file__).parent
    try:
        ask = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10)  # noqa: E731
        head = ask("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if ask("status", "--porcelain", "--", ".").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
