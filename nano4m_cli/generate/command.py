"""What `nano4m generate` does: conditions from files, texts or a held-out sample; media, texts and a sheet out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sheet import write_sheet
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.errors import DataError, UnknownNameError, UsageError, did_you_mean
from nano4m_cli.generate import best
from nano4m_cli.generate.conditions import fitted, kept_slots, veiled
from nano4m_cli.generate.options import WHY_IDLE, GenerateOptions, idle, resolve
from nano4m_cli.generate.sampler import chains
from nano4m_cli.generate.state import Stage, State
from nano4m_cli.masking._mixture import IN_DISTRIBUTION, direction
from nano4m_cli.modalities._base import Modality
from nano4m_cli.model.fourm import FourM
from nano4m_cli.registry import MODALITIES
from nano4m_cli.tokenizers._base import Tokenizer, open_tokenizer
from nano4m_cli.train.run import OpenRun, check_specs, open_run


def _names(value: Any) -> Any:
    return tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value


def _keeps(value: Any) -> Any:
    """Return ((modality, region), ...) of {modality: region or regions}, "modality:region", or a list of such."""
    if isinstance(value, Mapping):
        return tuple((m, str(r)) for m, regions in value.items() for r in (regions if isinstance(regions, list) else [regions]))
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("write MODALITY:REGION, or a mapping of them")
    out = []
    for item in items:
        pair = tuple(item.partition(":")[::2]) if isinstance(item, str) else tuple(item)
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"'{item}' is not of the form MODALITY:REGION (rgb:left-half, rgb:0.5, rgb:mask.png, audio:0-0.5s)")
        out.append(pair)
    return tuple(out)


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Keeps = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_keeps)]


class Step(GenerateOptions):
    """A step of a chain, with its own options where they differ from the request's.

    to: modalities, made one after the other. given: all that they see, beside themselves (None: all that is known by then).
    keep: parts of what is known by then that this step sees; of a modality in `to` the rest is made anew.
    """

    to: Names = Field(min_length=1)
    given: Names | None = None
    keep: Keeps = ()


class Request(GenerateOptions):
    """What is asked for; the options are those of every step. A recipe file and a line of --requests hold one.

    from: per modality a file's path or text; None takes the modality from `sample`, a sample's key; without any, a sample
    gives all its modalities but the targets. keep: parts of them (several of a modality: what all hold); the rest of one
    that is asked for is made. not: conditions to move away from. to: targets in order; or chain, steps. n: samples.
    best_of: candidates that are drawn of each sample; the best by `rank` stays (generate/best.py).
    """

    conditions: dict[str, str | None] = Field({}, alias="from")
    keep: Keeps = ()
    away: dict[str, str] = Field({}, alias="not")
    sample: str | None = None
    to: Names = ()
    chain: tuple[Step, ...] = ()
    n: int = Field(1, ge=1)
    best_of: int = Field(1, ge=1)
    rank: best.Rank = "likelihood"

    @property
    def course(self) -> tuple[Step, ...]:
        return self.chain or ((Step(to=self.to),) if self.to else ())

    @property
    def targets(self) -> list[str]:
        return [t for step in self.course for t in step.to]

    def options(self, step: Step) -> GenerateOptions:
        """Return the options of a step: its own, else the request's."""
        own = step.model_fields_set
        return GenerateOptions(**{f: getattr(step if f in own else self, f) for f in GenerateOptions.model_fields})


@dataclass
class Prepared:
    """A request in ids. raws: conditions as encoded; kept: per modality, which of its ids; truth: of its sample."""

    request: Request
    ids_C: np.ndarray
    known_C: np.ndarray
    away_ids_C: np.ndarray
    away_C: np.ndarray
    stages: list[Stage]
    raws: dict[str, Any]
    kept: dict[str, np.ndarray]
    truth: dict[str, Any]
    notices: list[str]
    claims: best.Claims = field(default_factory=dict)  # for rank "judge"


@dataclass
class GenerateReport:
    """What was written: files, texts by modality, notices on what was done to the input, and how many ids a model call gave.

    best: of candidates: rank, their scores per sample, and which was chosen.
    """

    run: str
    out: Path
    files: list[Path] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    ids_per_call: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None


def generate_files(
    workspace: Workspace, run_name: str | None, request: Request, out: Path | None = None, device: str = "cpu",
    judges: Callable[[DatasetFolder, str], best.Judge | None] | None = None,
) -> GenerateReport:
    """Generate what a request asks for and write it (default: into generated/RUN of the workspace).

    Args:
        judges: gives the judge of a data set's modality, for best_of by judge.
    """
    studio = Studio(open_run(workspace, run_name, device), judges)
    (made,) = studio.make([studio.prepare(request)])
    return studio.write(made, out or workspace.root / "generated" / studio.run.name)


@dataclass
class Made:
    """A request's samples: per target raw values and ids, and how many ids were made in how many model calls; of candidates
    their scores (n, best_of) and who was chosen (n,)."""

    prepared: Prepared
    raws: dict[str, list[Any]]
    ids: dict[str, list[np.ndarray]]
    work: dict[str, np.ndarray] = field(default_factory=dict)
    scores: np.ndarray | None = None
    chosen: np.ndarray | None = None
    notices: list[str] = field(default_factory=list)


class Studio:
    """A run with the tokenizers of what is asked of it."""

    def __init__(self, run: OpenRun, judges: Callable[[DatasetFolder, str], best.Judge | None] | None = None):
        self.run, self.layout = run, run.layout
        self.judges: best.Judges | None = None if judges is None else cache(lambda name: judges(run.dataset, name))
        self.sizes = run.dataset.info().sizes
        self.spec = {s.modality: s for s in run.layout.specs}
        self.tokenizer = cache(self._tokenizer)

    def _tokenizer(self, name: str) -> Tokenizer:
        """Return the data set's tokenizer after checking that it is the one the run was trained with."""
        run = self.run
        if not (run.dataset.tokenizer(name) / "tokenizer.json").is_file() and name in run.dataset.info().brought:
            raise DataError(
                f"the {name} tokens of '{run.dataset.name}' came without their tokenizer: {name} can be neither given nor shown",
                "train on them, and 'nano4m eval' the run",
            )
        tokenizer = open_tokenizer(run.dataset.tokenizer(name))
        check_specs([self.spec[name]], [tokenizer.spec()])
        return tokenizer

    def kind(self, name: str) -> Modality:
        return MODALITIES.get(name).sized(self.sizes.get(name, {}))

    # -- what is asked ------------------------------------------------------------------------------------------------

    def prepare(self, request: Request) -> Prepared:
        """Return a request in ids, checked; a Nano4MError says what is wrong with it."""
        names, targets = self.layout.names, request.targets
        steps = [(step, request.options(step)) for step in request.course]
        keeps = [k for step, _ in steps for k, _ in step.keep] + [k for k, _ in request.keep]
        weights = [m for _, options in steps for m, _ in options.weights]
        given = [m for step, _ in steps for m in step.given or ()]
        for name in (*request.conditions, *request.away, *targets, *keeps, *weights, *given):
            if name not in names:
                raise UnknownNameError(f"run '{self.run.name}' has no modality '{name}'", did_you_mean(name, names))
        if not targets or (request.to and request.chain):
            raise UsageError("nothing to generate" if not targets else "both 'to' and 'chain' say what to generate",
                             "name at least one modality with --to")
        if "rank" in request.model_fields_set and "best_of" not in request.model_fields_set:
            raise UsageError("rank chooses among candidates, and there is but one", "say how many to draw: --best-of 4")
        regions: dict[str, list[str]] = {}
        for name, region in request.keep:
            regions.setdefault(name, []).append(region)
        self._check_targets(request, regions)
        truth = find_sample(self.run.dataset, request.sample, names) if request.sample else {}
        conditions = dict(request.conditions)
        if request.sample and not conditions:
            conditions = dict.fromkeys(m for m in names if m not in targets or m in regions)
        for name in regions:
            if name not in conditions:
                raise UsageError(f"{name} is to be kept and not given", f"give it: --from {name}=VALUE")
        for name in weights:
            if name not in conditions and name not in targets:
                raise UsageError(f"weight of {name}: it is no condition", f"give it: --from {name}=VALUE")
        self._check_guidance(request, [options for _, options in steps])
        if not conditions and self.run.directions.get("->" + targets[0], 0.0) < IN_DISTRIBUTION:
            raise UsageError("no condition", 'give --from MODALITY=VALUE, e.g. --from caption="a large red metal sphere"')

        blank = lambda dtype: np.zeros(self.layout.columns, dtype=dtype)  # noqa: E731
        out = Prepared(request, blank(np.int64), blank(bool), blank(np.int64), blank(bool), [], {}, {}, truth, [])
        for name, value in conditions.items():
            self._condition(out, name, value, regions.get(name, []))
        for name, value in request.away.items():
            raw = self._read(out, name, value)
            ids = self.tokenizer(name).encode([self._adapt(out, name, raw)], [f"--not {name}"])[0]
            put(self.layout, out.away_ids_C, out.away_C, name, ids)
        self._stages(out, steps, [c for c in conditions if c not in targets])
        if request.best_of > 1:
            {"likelihood": lambda out: None, "cycle": self._check_cycle, "judge": self._claim}[request.rank](out)
        return out

    def _check_cycle(self, out: Prepared) -> None:
        """Raise UsageError where nothing can be asked back of what is made; say where training never asked it."""
        targets = list(dict.fromkeys(out.request.targets))
        back = [c for c in out.raws if not (c in targets and self.spec[c].kind == "sequence")]
        if not back:
            raise UsageError("rank cycle: there is no condition to score", "choose --rank likelihood")
        for name in back:
            if not self.run.model.reads([t for t in targets if t != name], name):
                raise UsageError(f"rank cycle: this run cannot tell {name} from {', '.join(targets)}", "choose --rank likelihood")
            if name in targets or name in out.kept:
                continue
            if self.run.directions.get(way := direction(targets, name, self.layout.names), 0.0) < IN_DISTRIBUTION:
                out.notices.append(f"rank cycle asks {way}, which was (almost) never posed in training: its scores tell little")

    def _claim(self, out: Prepared) -> None:
        """Find what the conditions say of the things that a judge names; a UsageError where there is nothing to judge."""
        judges, info = best.need_judges(self.judges, out.request.targets), self.run.dataset.info()
        if out.request.sample and all(v is None for v in out.request.conditions.values()):
            objects = find_labels(self.run.dataset, out.request.sample).get("objects", [])
            out.claims = best.claims_of_labels(info, list(out.raws), objects)
        else:
            for name, raw in out.raws.items():
                if self.kind(name).kind == "text":
                    said = best.claims_of_text(info, raw)
                elif (judge := self.judges(name)) is not None:
                    said = best.claims_of_media(judge, raw)
                    out.notices.append(f"rank judge compares the first object of {name} only")
                else:
                    continue
                out.claims = {**said, **out.claims}
        seen = {a for judge in judges.values() for a in judge.attributes}
        if not seen & set(out.claims):
            raise UsageError(
                f"rank judge: the conditions name none of {', '.join(sorted(seen))}", "choose --rank likelihood or --rank cycle"
            )

    def _check_targets(self, request: Request, regions: Mapping[str, Sequence[str]]) -> None:
        """Raise UsageError where a target is known already when its step begins."""
        known = {m for m in request.conditions if m not in regions and self.spec[m].kind != "sequence"}
        for step in request.course:
            for target in step.to:
                if target in known and target not in dict(step.keep):
                    raise UsageError(
                        f"'{target}' is given and asked for, or asked for twice", f"keep a part of it: --keep {target}:0.5"
                    )
                known.add(target)

    def _check_guidance(self, request: Request, options: Sequence[GenerateOptions]) -> None:
        if not request.away:
            return
        for name in request.away:
            if name in request.targets:
                raise UsageError(f"'{name}' is to be moved away from and asked for")
        if all(self.spec[t].kind == "sequence" for t in request.targets):
            raise UsageError("text is written without guidance: it cannot be moved away from a condition", "leave --not out")
        if any(o.guidance == 1.0 and not o.weights for o in options):
            raise UsageError("--not does nothing at --guidance 1", "give more, e.g. --guidance 2.5")

    def _read(self, out: Prepared, name: str, value: str) -> Any:
        kind = self.kind(name)
        raw = kind.from_text(value)
        if kind.kind != "text" and (note := kind.conversion(Path(value))):
            out.notices.append(f"{name}: {note}")
        return raw

    def _adapt(self, out: Prepared, name: str, raw: Any) -> Any:
        raw, notice = self.tokenizer(name).adapt(raw)
        out.notices += [notice] if notice else []
        return raw

    def _condition(self, out: Prepared, name: str, value: str | None, regions: Sequence[str]) -> None:
        """Put a condition, or its kept part, into the ids of a request."""
        if value is None and name not in out.truth:
            raise UsageError(f"no value for '{name}'", f"give {name}=VALUE, or --sample KEY to take it from")
        tokenizer, spec = self.tokenizer(name), self.spec[name]
        raw = out.truth[name] if value is None else self._read(out, name, value)
        out.raws[name] = self._adapt(out, name, raw)
        ids = tokenizer.encode([out.raws[name]], [f"--from {name}"])[0]
        asked = name in out.request.targets
        if spec.kind == "sequence" and (asked or regions):
            ids = ids[:-1]  # a text to go on with does not end
        kept = np.ones(len(ids), dtype=bool)
        if regions:
            kept = kept_slots(spec, regions, len(ids), lambda white, path: fitted(white, path, raw, tokenizer.adapt))
            if kept.all() and asked and spec.kind != "sequence":
                raise UsageError(f"all of {name} is kept: nothing is left to generate", "keep less of it")
            out.kept[name] = kept
        put(self.layout, out.ids_C, out.known_C, name, ids, kept)

    def _stages(self, out: Prepared, steps: Sequence[tuple[Step, GenerateOptions]], so_far: list[str]) -> None:
        """Append the stages of a request's steps, and say what training never showed."""
        names, posed = self.layout.names, self.run.directions
        given, useful = set(), set()  # options that were chosen; those of them that change what some target is
        for step, options in steps:
            plain = resolve(options, step.to, self.run.model, posed, bool(out.request.away))
            regions: dict[str, list[str]] = {}
            for name, region in step.keep:
                if self.spec[name].kind == "sequence":
                    raise UsageError(f"keep {name}:{region}: a step keeps parts of pictures, sounds and videos")
                regions.setdefault(name, []).append(region)
            said = step.model_fields_set | out.request.model_fields_set
            chosen = {o for o in WHY_IDLE if getattr(options, o) not in (None, (), 0, {"guidance": 1.0, "repetition": 1.0}.get(o))}
            given |= chosen
            useful |= chosen - set.intersection(*(idle(options, self.spec[target].kind) for target in step.to))
            asked = "steps" in said and isinstance(options.schedule, str) and options.scheme in ("auto", "roar", "maskgit")
            for target in step.to:
                hidden = np.zeros(self.layout.columns, dtype=bool)
                for name in names:
                    columns = self.layout.slice(name)
                    if step.given is not None and name != target and name not in step.given:
                        hidden[columns] = True
                    if name in regions:
                        hidden[columns] |= ~kept_slots(self.spec[name], regions[name], self.spec[name].slots)
                out.stages.append(Stage(target, plain, hidden if hidden.any() else None))
                free = self.spec[target].slots - int(out.kept.get(target, np.zeros(1)).sum())
                if asked and self.spec[target].kind != "sequence" and (n := options.steps) > free:
                    out.notices.append(f"{n} steps are more than the {free} slots of {target} to fill: {free} are done")
                seen = [m for m in so_far if m != target and (step.given is None or m in step.given)]
                whole = not any(m in out.kept or m in regions for m in seen)
                if whole and posed.get(way := direction(seen, target, names), 0.0) < IN_DISTRIBUTION:
                    out.notices.append(f"{way} was (almost) never posed in training: expect little")
                so_far.append(target)
            if plain.guidance == 0 and not plain.weights:
                out.notices.append("guidance 0: the conditions are read and count for nothing")
        if isinstance(self.run.model, FourM):
            out.notices += [f"{option} changes nothing here: {WHY_IDLE[option]}" for option in sorted(given - useful)]

    # -- what is made -------------------------------------------------------------------------------------------------

    def make(self, requests: Sequence[Prepared], batch: int = 128) -> list[Made]:
        """Return the samples of several requests, made together; each as it would be alone."""
        best_of = np.array([r.request.best_of for r in requests])
        owner = np.repeat(np.arange(len(requests)), [r.request.n for r in requests] * best_of)
        number = np.concatenate([np.repeat(np.arange(r.request.n), k) for r, k in zip(requests, best_of, strict=True)])
        which = np.concatenate([np.tile(np.arange(k), r.request.n) for r, k in zip(requests, best_of, strict=True)])
        rows = lambda what: np.stack([getattr(requests[i], what) for i in owner])  # noqa: E731
        state = State(rows("ids_C"), rows("known_C"), number)
        if any(r.away_C.any() for r in requests):
            state.away_ids_BC, state.away_BC = rows("away_ids_C"), rows("away_C")
        stages = [best.candidate(requests[i].stages, j) for i, j in zip(owner, which, strict=True)]
        chains(self.run.model, state, stages, batch)
        out = [Made(r, {}, {}, notices=list(r.notices)) for r in requests]
        stay = np.ones(len(owner), dtype=bool)
        for i in np.flatnonzero(best_of > 1):
            mine = np.flatnonzero(owner == i)
            self._choose(out[i], state.rows(mine), [stages[row] for row in mine], batch)
            stay[mine] = (which[mine].reshape(-1, best_of[i]) == out[i].chosen[:, None]).reshape(-1)
        state, owner = state.rows(np.flatnonzero(stay)), owner[stay]
        for target in self.layout.names:
            wanted = np.flatnonzero([target in requests[i].request.targets for i in owner])
            if len(wanted):
                raws = state.rows(wanted).decode(self.layout, target, self.tokenizer(target), batch)
                for row, raw in zip(wanted, raws, strict=True):
                    made = out[owner[row]]
                    made.raws.setdefault(target, []).append(raw)
                    made.ids.setdefault(target, []).append(take(self.layout, state, row, target))
                    made.work[target] = made.work.get(target, 0) + state.work[target][row]
        return out

    def _choose(self, made: Made, state: State, stages: Sequence[Sequence[Stage]], batch: int) -> None:
        """Score the candidates of a request; of equal ones the first is the best."""
        prepared, request = made.prepared, made.prepared.request
        if request.rank == "judge":
            judges = best.need_judges(self.judges, request.targets).items()
            parts = [
                best.agreement(judge, state.decode(self.layout, target, self.tokenizer(target), batch), prepared.claims)
                for target, judge in judges if set(judge.attributes) & set(prepared.claims)
            ]
            scores = np.mean(parts, 0, dtype=np.float64)
        else:
            known = np.broadcast_to(prepared.known_C, state.known_BC.shape)
            scores = {"likelihood": best.likelihood, "cycle": best.cycle}[request.rank](self.run.model, state, known, stages)
        made.scores = scores.reshape(request.n, request.best_of)
        made.chosen = made.scores.argmax(1)
        columns = np.isin(self.layout.modality_C, [self.layout.names.index(t) for t in request.targets])
        ids = np.where(state.known_BC, state.ids_BC, -1)[:, columns].reshape(request.n, request.best_of, -1)
        if (ids == ids[:, :1]).all():
            made.notices.append(
                f"all {request.best_of} candidates are equal, so there was nothing to choose: these options leave nothing to chance"
            )

    def write(self, made: Made, out: Path) -> GenerateReport:
        """Write every output, its ids, and a sheet of condition | output | truth."""
        prepared = made.prepared
        rates = {m: round(float(ids / calls), 4) for m, (ids, calls) in made.work.items() if calls}
        report = GenerateReport(self.run.name, out, notices=made.notices, ids_per_call=rates)
        out.mkdir(parents=True, exist_ok=True)
        if made.scores is not None:
            scores = np.round(made.scores, 6).tolist()
            report.best = {"rank": prepared.request.rank, "scores": scores, "chosen": made.chosen.tolist()}
            write_json(out / "best_of.json", report.best)
            report.files.append(out / "best_of.json")
        targets, n, truth = list(dict.fromkeys(prepared.request.targets)), prepared.request.n, prepared.truth
        given, rows = dict(self._given(prepared, targets)), []
        for row in range(n):
            cells: list[Any] = list(given.values())
            for name in targets:
                kind, raw = self.kind(name), made.raws[name][row]
                stem = out / (f"{row:03d}-{name}" if n > 1 else name)
                path = stem.with_suffix(kind.suffix)
                kind.write_file(raw, path)
                np.save(stem.with_suffix(".ids.npy"), made.ids[name][row])
                report.files += [path, stem.with_suffix(".ids.npy")]
                if kind.kind == "text":
                    report.texts.append((name, raw))
                elif kind.name == "depth":
                    picture = stem.with_suffix(".view.png")
                    picture.write_bytes(MODALITIES.get("rgb").to_bytes(kind.show(raw)))
                    report.files.append(picture)
                cells.append(kind.show(raw))
            cells += [self.kind(m).show(truth[m]) for m in targets if m in truth]
            rows.append(cells)
        heads = [f"from {m}" for m in given] + [f"to {m}" for m in targets] + [f"truth {m}" for m in targets if m in truth]
        report.files.append(write_sheet(out / "sheet.png", heads, rows))
        return report

    def _given(self, prepared: Prepared, targets: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield (modality, picture or text) of each condition, grey where it is not kept; a text that goes on is left out."""
        for name, raw in prepared.raws.items():
            shown, kept = self.kind(name).show(raw), prepared.kept.get(name)
            if name not in targets or (kept is not None and not isinstance(shown, str)):
                yield name, shown if kept is None or isinstance(shown, str) else veiled(shown, self.spec[name], kept)


def find_sample(dataset: DatasetFolder, key: str, modalities: Sequence[str]) -> dict[str, Any]:
    """Return the raw values of a sample by key, from any split (brought tokens have none)."""
    info, read = dataset.info(), find_members(dataset, key)
    kinds = [MODALITIES.get(m) for m in modalities if m not in info.brought]
    return {k.name: k.from_bytes(read(k.ext), f"{key}.{k.ext}") for k in kinds}


def find_labels(dataset: DatasetFolder, key: str) -> dict[str, Any]:
    """Return labels.json of a sample by key, from any split."""
    return json.loads(find_members(dataset, key)("labels.json"))


def find_members(dataset: DatasetFolder, key: str) -> Callable[[str], bytes]:
    """Return what reads a member of a sample by extension; the sample is of any split."""
    for split, count in dataset.info().splits.items():
        if not count:
            continue
        shards = Split(dataset.raw(split))
        for shard in shards.shards:
            if key in shard.keys:
                i = shard.keys.index(key)
                return lambda ext: shard.read(i, ext)
    example = Split(dataset.raw("test" if dataset.info().splits.get("test") else split)).shards[0].keys[0]
    raise DataError(f"data set '{dataset.name}' has no sample '{key}'", f"a key reads like '{example}'")


def put(layout, ids_C: np.ndarray, known_C: np.ndarray, modality: str, ids: np.ndarray, kept: np.ndarray | None = None) -> None:
    """Make the ids of a modality, or those kept of them, known in a request."""
    start = layout.slice(modality).start
    known = np.ones(len(ids), dtype=bool) if kept is None else kept
    ids_C[start : start + len(ids)] = np.where(known, ids, 0)
    known_C[start : start + len(ids)] = known


def take(layout, state: State, row: int, modality: str) -> np.ndarray:
    """Return the known ids of a modality in a request."""
    columns = layout.slice(modality)
    return state.ids_BC[row, columns][state.known_BC[row, columns]]
