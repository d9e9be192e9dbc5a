"""What `nano4m generate` does: conditions from files, texts or a held-out sample; media, texts and a sheet out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.data.shards import Split
from nano4m_cli.data.sheet import write_sheet
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import DataError, UnknownNameError, UsageError, did_you_mean
from nano4m_cli.generate.sampler import GenerateOptions, State, chain, resolve
from nano4m_cli.masking._mixture import IN_DISTRIBUTION, direction
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import Tokenizer, open_tokenizer
from nano4m_cli.train.run import OpenRun, check_specs, open_run


@dataclass
class GenerateReport:
    """What was written: files, texts by modality, and notices on what was done to the input."""

    run: str
    out: Path
    files: list[Path] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def open_tokenizers(run: OpenRun, names: Sequence[str]) -> dict[str, Tokenizer]:
    """Return the data set's tokenizers after checking that they are those the run was trained with."""
    for name in names:
        if not (run.dataset.tokenizer(name) / "tokenizer.json").is_file() and name in run.dataset.info().brought:
            raise DataError(
                f"the {name} tokens of '{run.dataset.name}' came without their tokenizer: {name} can be neither given nor shown",
                "train on them, and 'nano4m eval' the run",
            )
    tokenizers = {n: open_tokenizer(run.dataset.tokenizer(n)) for n in names}
    specs = [s for s in run.layout.specs if s.modality in names]
    check_specs(specs, [tokenizers[s.modality].spec() for s in specs])
    return tokenizers


def find_sample(dataset: DatasetFolder, key: str, modalities: Sequence[str]) -> dict[str, Any]:
    """Return the raw values of a sample by key, from any split (brought tokens have none)."""
    info = dataset.info()
    for split, count in info.splits.items():
        if not count:
            continue
        shards = Split(dataset.raw(split))
        for shard in shards.shards:
            if key in shard.keys:
                i = shard.keys.index(key)
                kinds = [MODALITIES.get(m) for m in modalities if m not in info.brought]
                return {k.name: k.from_bytes(shard.read(i, k.ext), f"{key}.{k.ext}") for k in kinds}
    example = Split(dataset.raw("test" if info.splits.get("test") else split)).shards[0].keys[0]
    raise DataError(f"data set '{dataset.name}' has no sample '{key}'", f"a key reads like '{example}'")


def empty_state(run: OpenRun, requests: int) -> State:
    """Return a state in which nothing is known."""
    shape = (requests, run.layout.columns)
    return State(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool), np.arange(requests))


def put(run: OpenRun, state: State, row: int, modality: str, ids: np.ndarray) -> None:
    """Make a modality known in a request."""
    start = run.layout.slice(modality).start
    state.ids_BC[row, start : start + len(ids)] = ids
    state.known_BC[row, start : start + len(ids)] = True


def take(run: OpenRun, state: State, row: int, modality: str) -> np.ndarray:
    """Return the known ids of a modality in a request."""
    columns = run.layout.slice(modality)
    return state.ids_BC[row, columns][state.known_BC[row, columns]]


def generate_files(
    workspace: Workspace, run_name: str | None, conditions: Mapping[str, str | None], sample: str | None,
    targets: Sequence[str], options: GenerateOptions, out: Path | None = None, n: int = 1,
    device: str = "cpu",
) -> GenerateReport:
    """Generate `targets` in order from conditions and write them.

    Args:
        conditions: per modality a file's path or text; None takes the modality from `sample`.
        sample: key of a sample of the data set; without conditions all its modalities but the targets are given.
        n: samples to draw.
    """
    run = open_run(workspace, run_name, device)
    names = run.layout.names
    for name in (*conditions, *targets):
        if name not in names:
            raise UnknownNameError(f"run '{run.name}' has no modality '{name}'", did_you_mean(name, names))
    if not targets:
        raise UsageError("nothing to generate", "name at least one modality with --to")
    read = {spec.modality: spec.kind for spec in run.layout.specs}
    both = [t for t in targets if t in conditions and read[t] != "sequence"]
    if both or len(set(targets)) != len(targets):
        raise UsageError(f"'{(both or list(targets))[0]}' is given and asked for, or asked for twice")
    truth = find_sample(run.dataset, sample, names) if sample else {}
    if sample and not conditions:
        conditions = dict.fromkeys(m for m in names if m not in targets)
    if not conditions and run.directions.get("->" + targets[0], 0.0) < IN_DISTRIBUTION:
        raise UsageError("no condition", 'give --from MODALITY=VALUE, e.g. --from caption="a large red metal sphere"')
    tokenizers = open_tokenizers(run, list(dict.fromkeys([*conditions, *targets])))
    report = GenerateReport(run.name, out or workspace.root / "generated" / run.name)
    sizes = run.dataset.info().sizes
    kinds = {n: MODALITIES.get(n).sized(sizes.get(n, {})) for n in tokenizers}
    raws: dict[str, Any] = {}
    for name, value in conditions.items():
        if value is None and name not in truth:
            raise UsageError(f"no value for '{name}'", f"give {name}=VALUE, or --sample KEY to take it from")
        kind = kinds[name]
        raw = truth[name] if value is None else kind.from_text(value)
        if value is not None and kind.kind != "text":
            report.notices += [f"{name}: {note}"] if (note := kind.conversion(Path(value))) else []
        raws[name], notice = tokenizers[name].adapt(raw)
        if notice:
            report.notices.append(notice)
    so_far, posed = [c for c in conditions if c not in targets], run.directions
    for target in targets:
        if posed.get(way := direction(so_far, target, names), 0.0) < IN_DISTRIBUTION:
            report.notices.append(f"{way} was (almost) never posed in training: expect little")
        so_far.append(target)

    state = empty_state(run, n)
    for name, raw in raws.items():
        ids = tokenizers[name].encode([raw], [f"--from {name}"])[0]
        if name in targets:
            ids = ids[:-1]  # a text to go on with does not end
        for row in range(n):
            put(run, state, row, name, ids)
    chain(run.model, state, targets, resolve(options, targets, run.model, posed))
    _write(run, report, state, raws, truth, list(targets), tokenizers, kinds, n)
    return report


def _write(run, report: GenerateReport, state: State, raws, truth, targets, tokenizers, kinds, n: int) -> None:
    """Write every output, its ids, and a sheet of condition | output | truth."""
    report.out.mkdir(parents=True, exist_ok=True)
    rows, made = [], {name: state.decode(run.layout, name, tokenizers[name]) for name in targets}
    for row in range(n):
        cells: list[Any] = [kinds[m].show(raw) for m, raw in raws.items() if m not in targets]
        for name in targets:
            kind, ids = kinds[name], take(run, state, row, name)
            raw = made[name][row]
            stem = report.out / (f"{row:03d}-{name}" if n > 1 else name)
            path = stem.with_suffix(kind.suffix)
            kind.write_file(raw, path)
            np.save(stem.with_suffix(".ids.npy"), ids)
            report.files += [path, stem.with_suffix(".ids.npy")]
            if kind.kind == "text":
                report.texts.append((name, raw))
            elif kind.name == "depth":
                picture = stem.with_suffix(".view.png")
                picture.write_bytes(MODALITIES.get("rgb").to_bytes(kind.show(raw)))
                report.files.append(picture)
            cells.append(kind.show(raw))
        cells += [kinds[m].show(truth[m]) for m in targets if m in truth]
        rows.append(cells)
    heads = [f"from {m}" for m in raws if m not in targets] + [f"to {m}" for m in targets]
    heads += [f"truth {m}" for m in targets if m in truth]
    report.files.append(write_sheet(report.out / "sheet.png", heads, rows))
