"""`nano4m train`: token shards and a config to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nano4m_cli.cli._app import stopped
from nano4m_cli.cli._options import Device, Json, Quiet, Root, Settings, pick_device, said_once
from nano4m_cli.cli._show import Show
from nano4m_cli.errors import ConfigError, UsageError, did_you_mean

FOLDER = Path("cfgs")  # where configs named without a folder are


def command(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="With --resume: rename a damaged newest checkpoint, and take the one before.")
    ] = False,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what the masking shows; write nothing.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Do not train: write the run's model into a folder.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ID", help="With --export: upload it to this repository on the hub.")
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Do not train: say how far a run is (CONFIG: its name; default: the newest).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    root: Root = None,
) -> None:
    """Train what a config says, into runs/<name>. CONFIG is a file; a bare name is looked for in cfgs/ too.

    \b
    nano4m train cfgs/5mod.yaml
    nano4m train demo train.steps=50 --dry-run
    nano4m train demo --resume
    nano4m train cfgs/import/nano4m_audio.yaml checkpoint=checkpoint-final.safetensors
    nano4m train demo --export shared/demo
    nano4m train --status demo
    torchrun --nproc_per_node=4 -m nano4m_cli train demo

    --json: {run, path, dataset, steps, figures}; with --dry-run {run, dataset, ..., masking: {...},
    directions: {"a->b": {frequency, in_distribution}}}; with --export {run, folder, files, pushed}; with --status {run, state,
    step, steps, rate, eta, restarts, checkpoint, train: {...}, val: {...}, speed: {...}, ...}.
    """
    from nano4m_cli import dist

    here = dist.place()
    show = Show(as_json, quiet, mute=not here.first)
    from nano4m_cli.data.workspace import Workspace
    from nano4m_cli.train.config import load_run_config

    if status:
        _status(show, Workspace.at(root), config)
        return
    with said_once(here.first):
        if config is None:
            raise UsageError("missing argument 'CONFIG'", "nano4m train cfgs/demo.yaml, or nano4m train --status")
        loaded = load_run_config(find_config(config), settings or [])
        workspace = Workspace.at(root)
        if set_aside and not resume:
            raise UsageError("--set-aside needs --resume", "without it no checkpoint is read")
        if push and not export:
            raise UsageError("--push needs --export", "--export DIR says where the export is written first")
        if here.ranks > 1 and (export or loaded.task in ("tokenizer", "import")):
            what = "an export is written" if export else f"task: {loaded.task} runs"
            raise UsageError(f"{what} by one process, this is one of {here.ranks}", "start it without torchrun")
    if export:
        _export(show, workspace, loaded, export, push)
        return
    if loaded.task in ("tokenizer", "import"):
        work = _fit_tokenizer if loaded.task == "tokenizer" else _import
        work(show, workspace, loaded, resume, device, dry_run)
    else:
        _train(show, workspace, loaded, (resume, set_aside), device, dry_run, quiet)


def find_config(given: str) -> Path:
    """Return the config file meant by a path, or by a name in cfgs/ with or without its suffix."""
    path = Path(given)
    if path.is_file():
        return path
    for candidate in (Path(f"{given}.yaml"), FOLDER / given, FOLDER / f"{given}.yaml"):
        if candidate.is_file():
            return candidate
    known = [str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.yaml")]
    name = path.relative_to(FOLDER) if path.is_relative_to(FOLDER) else path
    if not known:
        raise ConfigError(f"no config file '{given}'", f"give the path of a YAML file ({FOLDER.absolute()} holds none)")
    raise ConfigError(f"no config file '{given}'", did_you_mean(str(name.with_suffix("")), known))


def _train(show: Show, workspace: Any, config: Any, resume: tuple[bool, bool], device: str, dry_run: bool, quiet: bool) -> None:
    from nano4m_cli import dist
    from nano4m_cli.train.loop import Stopped
    from nano4m_cli.train.run import prepare, start

    stop, figures = None, {}
    with said_once(dist.place().first):
        device = pick_device(device)
    with dist.joined(device, config.train.timeout) as own:
        with dist.together():
            prepared = prepare(config, workspace)
        show.say(f"data set: {prepared.dataset.name} ({prepared.dataset.path})")
        for warning in prepared.warnings:
            show.say(f"warning: {warning}")
        if dry_run:
            if dist.rank() == 0:
                _show_plan(show, prepared)
            return
        beside = f", {dist.ranks()} processes" if dist.ranks() > 1 else ""
        name = own.partition(":")[0]
        show.say(f"run: {prepared.config.name} ({prepared.folder}), {prepared.config.train.steps} steps on {name}{beside}")
        try:
            with show.work() as work:
                again, set_aside = resume
                figures = start(prepared, again, own, work.record if dist.rank() == 0 else _late(quiet), set_aside)
        except Stopped as err:
            stop = err
    if stop is not None:
        raise stopped(stop, True) from stop
    _show_end(show, prepared.config, prepared.folder, prepared.dataset.name, figures)


def _late(quiet: bool) -> Any:
    """Return what takes the records of a rank that is not the first: it speaks of its own delays only."""

    def record(record: Any) -> None:
        if record.kind == "late" and not quiet:
            typer.echo(record.note, err=True)

    return record


def _fit_tokenizer(show: Show, workspace: Any, config: Any, resume: bool, device: str, dry_run: bool) -> None:
    from nano4m_cli.train import tokenizing
    from nano4m_cli.train.checkpoint import checkpoints
    from nano4m_cli.train.loop import Stopped

    dataset = workspace.dataset(config.data.dataset)
    folder = workspace.root / "runs" / config.name
    show.say(f"data set: {dataset.name} ({dataset.path})")
    if dry_run:
        choice = config.tokenizer
        tokenizer = tokenizing.make_tokenizer(dataset, choice.modality, choice.name, choice.options)
        plan = {
            "run": config.name, "dataset": dataset.name, "modality": choice.modality, "tokenizer": tokenizer.name,
            "steps": config.train.steps, "samples_per_step": config.train.batch,
        }
        show.table(["", ""], list(plan.items()))
        show.document({**plan, "options": tokenizer.options, "dry_run": True})
        return
    if device == "cuda":
        pick_device(device)
        show.say("notice: tokenizers are fitted on the CPU; --device is not used")
    show.say(f"run: {config.name} ({folder}), {config.train.steps} steps")
    last: dict[str, float] = {}
    try:
        with show.work() as work:

            def keep(record: Any) -> None:
                if record.kind == "val":
                    last.update(record.figures)
                work.record(record)

            tokenizer = tokenizing.fit_from_config(config, dataset, folder, resume and bool(checkpoints(folder)), keep)
    except Stopped as err:
        raise stopped(err, True) from err
    if tokenizer.notice():
        show.say(f"notice: {tokenizer.notice()}")
    _show_end(show, config, folder, dataset.name, last)
    show.line(f"tokenizer: {dataset.tokenizer(config.tokenizer.modality)}")


def _import(show: Show, workspace: Any, config: Any, resume: bool, device: str, dry_run: bool) -> None:
    from nano4m_cli.train.importing import convert

    made = convert(config, workspace)
    show.say(f"data set: {made.dataset.name} ({made.dataset.path})")
    show.table(["tensors", "n", "what became of them"], made.rows)
    show.line("")
    head = ["checkpoint's", "ours", "ids", "slots", "tokens of the data set"]
    keys = ("theirs", "ours", "ids", "slots", "tokens")
    show.table(head, [[m[k] for k in keys] for m in made.report["modalities"]])
    if not dry_run:
        show.line(f"run: {made.write()}")
    show.document({**made.report, "path": made.folder, "dry_run": dry_run})


def _export(show: Show, workspace: Any, config: Any, folder: Path, repo: str | None) -> None:
    from nano4m_cli.train import export
    from nano4m_cli.train.run import open_run

    run = open_run(workspace, config.name)
    files = export.export(run, folder)
    show.say(f"run: {run.name}, {run.checkpoint.name}")
    for file in files:
        show.line(str(file))
    pushed = export.push(folder, repo) if repo else None
    if pushed:
        show.line(pushed)
    show.document({"run": run.name, "folder": folder, "files": files, "pushed": pushed})


def _status(show: Show, workspace: Any, name: str | None) -> None:
    from nano4m_cli.cli._show import clock
    from nano4m_cli.train.status import status

    if name is None:
        runs = workspace.runs()  # the newest, though it may have no checkpoint yet
        folder = runs[0] if runs else workspace.run(None)
    else:
        folder = workspace.root / "runs" / name
        folder = folder if (folder / "config.yaml").is_file() else workspace.run(name)
    found = status(folder)
    ago = lambda seconds: None if seconds is None else f"{clock(seconds)} ago"  # noqa: E731
    rows = [
        ("run", f"{found.run} ({found.path})"),
        ("state", f"{found.state}, {found.restarts} restarts, {found.ranks} processes"), ("host", found.host),
        ("step", f"{found.step}/{found.steps}" + (f" ({found.step / found.steps:.1%})" if found.steps else "")),
        ("samples/s", found.rate), ("eta", None if found.eta is None else clock(found.eta)),
        ("last record", ago(found.silence)),
        ("checkpoint", None if found.checkpoint is None else f"{found.checkpoint}, {ago(found.checkpoint_age)}"),
        ("train loss", found.train.get("loss")), ("val loss", found.val.get("loss")), ("stalls", found.stalls),
        ("samples skipped", found.skipped or None),
        *((name.replace("_", " "), f"{v['min']:.4g} / {v['median']:.4g} / {v['max']:.4g}")
          for name, v in found.speed.items() if isinstance(v, dict)),
    ]
    show.table(["", ""], [(k, v) for k, v in rows if v is not None])
    show.document(found.document())


def _show_end(show: Show, config: Any, folder: Path, dataset: str, figures: dict[str, float]) -> None:
    if figures:
        show.table(["validation", "value"], list(figures.items()))
    show.line(f"run: {folder}")
    steps = config.train.steps
    show.document({"run": config.name, "path": folder, "dataset": dataset, "steps": steps, "figures": figures})


def _show_plan(show: Show, prepared: Any) -> None:
    from nano4m_cli.masking._mixture import IN_DISTRIBUTION, direction

    summary, masks = prepared.summary, prepared.masks()
    modalities = list(summary["modalities"])
    show.table(["", ""], [(k, v) for k, v in summary.items() if k != "modalities"])
    show.line(f"\nmasking, over {masks.samples} samples: {masks.used:.1%} of the slots are used, "
              f"{masks.encoder_tokens:.1f} shown and {masks.decoder_tokens:.1f} asked per sample")
    show.line(f"P(single source) {masks.single_source:.4f}   P(full source) {masks.full_source:.4f}\n")
    show.table(
        ["modality", "tokens", "shown", "asked"],
        [[m, summary["modalities"][m], f"{masks.visible[m]:.1%}", f"{masks.asked[m]:.1%}"] for m in modalities],
    )
    pairs = [(s, t) for s in modalities for t in modalities if s != t]
    frequency = {direction([s], t, modalities): 0.0 for s, t in pairs} | masks.directions

    def shown(source: str, target: str) -> str | None:
        if source == target:
            return None
        share = frequency[direction([source], target, modalities)]
        return f"{share:.2%}" if share >= IN_DISTRIBUTION else f"({share:.2%})"

    show.line(f"\ndirections: share of samples that show the whole source alone and ask the target "
              f"(in brackets: under {IN_DISTRIBUTION:.1%}, outside the training distribution)")
    rows = [[s, *(shown(s, t) for t in modalities)] for s in modalities]
    show.table(["source", *(f"->{t}" for t in modalities)], rows)
    top = list(masks.directions.items())[:8]
    if top:
        show.line("\nmost frequent: " + ", ".join(f"{'nothing' * name.startswith('->')}{name} {share:.2%}" for name, share in top))
    masking = {k: v for k, v in vars(masks).items() if k != "directions"}
    directions = {n: {"frequency": f, "in_distribution": f >= IN_DISTRIBUTION} for n, f in frequency.items()}
    show.document({**summary, "masking": masking, "directions": directions, "warnings": prepared.warnings, "dry_run": True})
