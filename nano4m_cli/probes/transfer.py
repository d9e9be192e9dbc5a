"""Transfer to another data set or modality: few-shot fine-tuning of this run against training from scratch.

Both are the same model on the same few samples, with the same masks, steps and learning rates to choose from; both keep the step
and the rate with the least loss on the target's val split. They differ in where weights begin: from scratch all are drawn, from the
run the shared blocks are the run's, and so are the tables of modalities whose ids mean the same; other tables are drawn. The one
training loop trains both.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator

from nano4m_cli.config import Config
from nano4m_cli.data.loader import SampleOrder, TokenData
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.generate.likelihood import slot_nll
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.model._foreign import ForeignModel
from nano4m_cli.model.base import TokenModel
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._transplant import transplant
from nano4m_cli.rng import permutation, torch_seed
from nano4m_cli.train.config import RunConfig
from nano4m_cli.train.loop import StepRecord, Stopped, Trainer
from nano4m_cli.train.run import MODELS
from nano4m_cli.train.tasks import FourMTask

KIND = "eval"
ARMS = ("run", "scratch")
STOPS = 10  # times that a fine-tuning is validated
TEST = 600  # samples that are scored at most
MASKING = {  # where the run's own names modalities that the target lacks
    "fourm": [{"type": "directed", "weight": 0.75}, {"type": "dirichlet", "weight": 0.25, "input": [4, 64], "target": [4, 64]}],
    "gpt": [{"type": "causal"}], "maskgit": [{"type": "masked"}],
}  # fmt: skip


class Probe(Base):
    costly = True

    class Options(Config):
        """data: the target (null: the workspace's only other data set). modalities: of it, in model order (empty: all tokenised).
        sizes: samples of its train split. steps, batch: of each fine-tuning, of which there are 2 x sizes x rates x repeats.
        rates: multiples of the run's learning rates to choose from. repeats: draws of the few samples, with a model's seed each.
        """

        data: str | None = None
        modalities: list[str] = []
        sizes: list[int] = [50, 200, 1000]
        steps: int = Field(300, ge=STOPS)
        batch: int = Field(32, ge=1)
        rates: list[float] = [1.0, 0.3]
        repeats: int = Field(1, ge=1)

        @field_validator("sizes", "rates")
        @classmethod
        def _some(cls, v):
            if not v or min(v) <= 0:
                raise ValueError("one at least, and all above zero")
            return sorted(set(v)) if isinstance(v[0], int) else v

    options: Probe.Options

    def missing(self, context: Context) -> str | None:
        if isinstance(context.model, ForeignModel):
            return f"an imported model of task {context.run.config.task} has a fixed list of modalities"
        others = [d.name for d in _workspace(context).datasets() if d.name != context.dataset.name]
        if self.options.data is None and len(others) != 1:
            which = f"which of {', '.join(others)} to transfer to" if others else "there is no other data set to transfer to"
            return f"{which}: name one with transfer.data=NAME"
        target = self._target(context)
        names = self.options.modalities or target.tokenised()
        for split in ("train", "val", "test"):
            lacking = [m for m in names if not target.tokens(m, split).is_dir()] if names else ["any"]
            if lacking:
                return f"data set '{target.name}' has no {', '.join(lacking)} tokens of split {split}"
        return None

    def _target(self, context: Context) -> DatasetFolder:
        workspace, name = _workspace(context), self.options.data
        return workspace.dataset(name or next(d.name for d in workspace.datasets() if d.name != context.dataset.name))

    def measure(self, context: Context) -> Findings:
        o, target = self.options, self._target(context)
        have = target.tokenised()
        names = o.modalities or [m for m in target.info().modalities if m in have]
        train, val, test = (TokenData(target, s, names) for s in ("train", "val", "test"))
        config = _config(context, target, names, o)
        scored = Scored(test, Mixture(config.masking, test.layout), context)
        sizes = [n for n in o.sizes if n <= len(train)]
        left = [n for n in o.sizes if n > len(train)]
        metrics, curves, chosen = [], {}, []
        draws = {(n, r): Few(train, np.sort(permutation(len(train), context.seed, "transfer", r)[:n]))
                 for n in sizes for r in range(o.repeats)}

        def tuned(n: int, r: int, arm: str) -> tuple[float, int, np.ndarray]:
            """Return the best rate and step, and the test samples' -log p by the model there."""
            found = [_tuned(context, config, rate, context.seed + r, draws[n, r], val, arm) for rate in o.rates]
            best = min(found, key=lambda t: t.loss)
            return best.rate, best.step, scored.nll(best.model)

        jobs = [(n, r, arm) for n, r in draws for arm in ARMS]
        told = dict(zip(jobs, context.spread(f"transfer to {target.name}", jobs, lambda job: tuned(*job)), strict=True))
        for n in sizes:
            nll: dict[str, list[np.ndarray]] = {arm: [] for arm in (*ARMS, "unigram")}
            for r in range(o.repeats):
                for arm in ARMS:
                    rate, step, values = told[n, r, arm]
                    chosen.append(f"{n} {arm}: rate x{rate:g}, step {step}")
                    nll[arm].append(values)
                nll["unigram"].append(scored.unigram(draws[n, r]))
            for m in scored.measured({k: np.mean(v, 0) for k, v in nll.items()}, n):
                metrics.append(m)
                if m.name.endswith("/ce"):
                    curves.setdefault(m.name.partition("/")[0], {}).setdefault(m.setting["from"], []).append(m)
        moved = transplant(context.model, MODELS[config.task](config.model, train.layout))
        t, rates = config.train, ", ".join(f"x{r:g}" for r in o.rates)
        muon = f" and muon_lr {t.muon_lr:g}" if t.optimizer == "muon" else ""
        notes = [
            f"{', '.join(context.names)} of '{context.dataset.name}' to {', '.join(names)} of '{target.name}'",
            f"{o.steps} steps of {o.batch} samples, {t.optimizer}, {t.schedule}, weight decay {t.weight_decay:g}; learning rates "
            f"{rates} of lr {t.lr:g}{muon}; rate and step by the loss on {min(t.val_samples, len(val))} samples of the val split, "
            f"for both alike: {'; '.join(chosen)}",
            f"masks: {json.dumps(config.masking.components)}; scored on {scored.n} samples of the test split, masks of fixed seed",
            f"{moved.copied:,} parameters begin as the run's, {moved.drawn:,} are drawn; the run's own tables serve "
            f"{', '.join(moved.known) or 'no modality'} (where ids mean the same)",
            f"intervals are over test samples, of {o.repeats} draw(s) of the few samples and of the weights that are drawn",
            "gain: loss from scratch less that from the run, sample by sample (above 0: the run helped); unigram: frequencies of "
            "ids in the same few samples",
        ]
        if left:
            notes.append(f"'{target.name}' has {len(train)} samples to train on; left out: {', '.join(map(str, left))}")
        return Findings(metrics, notes, [_curve(subject, of, target.name, context.run.name) for subject, of in curves.items()])


class Few:
    """Some samples of token data, as the loop's tasks read them."""

    streamed = False  # all of them are here

    def __init__(self, data: TokenData, index_N: np.ndarray):
        self.data, self.index_N = data, index_N
        self.layout, self.dataset, self.name = data.layout, data.dataset, data.name

    def __len__(self) -> int:
        return len(self.index_N)

    def key(self, i: int) -> str:
        return self.data.key(int(self.index_N[i]))

    def read(self, index_B: np.ndarray, variant_B: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.data.read(self.index_N[index_B], variant_B)

    def lengths(self, index_B: np.ndarray | slice) -> np.ndarray:
        return self.data.lengths(self.index_N[index_B])

    def order(self, seed: int, *_: int) -> SampleOrder:
        return SampleOrder(len(self), seed)


class Scored:
    """The target's held-out samples with masks of fixed seed."""

    def __init__(self, test: TokenData, mixture: Mixture, context: Context):
        self.layout, self.n = test.layout, min(len(test), TEST if context.limit is None else context.limit)
        self.ids_NC, length = test.read(np.arange(self.n))
        self.inside_NC = _inside(test, length)
        self.shown_NC, self.asked_NC = mixture.draw(length, Key(context.seed, "transfer-mask", np.arange(self.n)))

    def nll(self, model: TokenModel) -> np.ndarray:
        """Return (N, C), NaN where nothing is asked."""
        return slot_nll(model, self.ids_NC, self.shown_NC, self.asked_NC, self.inside_NC)

    def unigram(self, few: Few) -> np.ndarray:
        """Return (N, C): -log p under the frequencies of ids (add one half) in the few samples."""
        ids, length = few.read(np.arange(len(few)))
        inside, out = _inside(few, length), np.full(self.asked_NC.shape, np.nan)
        for g, size in enumerate(self.layout.sizes):
            columns = np.flatnonzero(self.layout.group_C == g)
            counts = np.bincount(ids[:, columns][inside[:, columns]], minlength=size) + 0.5
            out[:, columns] = -np.log(counts / counts.sum())[self.ids_NC[:, columns]]
        return np.where(self.asked_NC, out, np.nan)

    def measured(self, nll: dict[str, np.ndarray], n: int) -> list[Metric]:
        """Return the cross-entropy per modality and over all asked ids, of each of `nll`, and what the run gains."""
        out = []
        for subject in ("all", *self.layout.names):
            columns = slice(None) if subject == "all" else self.layout.slice(subject)
            asked = self.asked_NC[:, columns]
            count = asked.sum(1)
            mean = {k: np.where(asked, x[:, columns], 0).sum(1) / np.maximum(count, 1) for k, x in nll.items()}
            uniform = np.log(np.array(self.layout.sizes))[self.layout.group_C[columns]]
            known = dict(unit="nats", chance=float((asked * uniform).sum() / max(asked.sum(), 1)))
            for k, values in mean.items():
                setting = {"samples": n, "from": k}
                out.append(mean_metric(f"{subject}/ce", values, count, setting=setting, higher_is_better=False, **known))
            gain = mean["scratch"] - mean["run"]
            out.append(mean_metric(f"{subject}/gain", gain, count, setting={"samples": n, "from": "run"}, unit="nats", chance=0.0))
        return out


class Tuned(NamedTuple):
    loss: float
    step: int
    rate: float
    model: TokenModel


def _workspace(context: Context) -> Workspace:
    return Workspace(context.dataset.path.parent.parent)


def _config(context: Context, target: DatasetFolder, names: list[str], o: Probe.Options) -> RunConfig:
    """Return the run's config for the target: its model and optimizer, its masking where that names no other modality."""
    run = context.run.config
    named = {m for c in run.masking.components for v in c.values() if isinstance(v, (dict, list)) for m in v if isinstance(m, str)}
    own = named <= set(names) and set(run.masking.slots) <= set(names)
    every = max(1, o.steps // STOPS)
    train = run.train.model_copy(update={
        "steps": o.steps, "batch": o.batch, "accumulate": 1, "warmup": every, "val_every": every, "log_every": o.steps, "ema": 0.0,
        "val_samples": min(run.train.val_samples, 400), "workers": 0,
    })
    return run.model_copy(update={
        "data": run.data.model_copy(update={"dataset": target.name, "modalities": names, "train": "train", "val": "val"}),
        "masking": run.masking if own else MaskingConfig(components=MASKING[run.task]),
        "loss_weights": {m: w for m, w in run.loss_weights.items() if m in names},
        "train": train,
    })


def _tuned(context: Context, config: RunConfig, rate: float, seed: int, few: Few, val: TokenData, arm: str) -> Tuned:
    """Return the model at its best stop."""
    torch.manual_seed(torch_seed(seed, "transfer"))
    model = MODELS[config.task](config.model, few.layout)
    if arm == "run":
        transplant(context.model, model)
    t = config.train.model_copy(update={"lr": config.train.lr * rate, "muon_lr": config.train.muon_lr * rate})
    config = config.model_copy(update={"seed": seed, "train": t})
    best = {"loss": np.inf, "step": 0, "state": None}

    def callback(record: StepRecord) -> None:
        if record.kind == "val" and record.figures["loss"] < best["loss"]:
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            best.update(loss=record.figures["loss"], step=record.step, state=state)

    try:
        Trainer(FourMTask(config, few, val, model), t, seed, None, device=str(context.model.device), callback=callback).fit()
    except Stopped as err:  # a second loop inside a command: its signal is the command's
        raise KeyboardInterrupt from err
    model.load_state_dict(best["state"])
    return Tuned(best["loss"], best["step"], rate, model.eval().requires_grad_(False))


def _inside(data: TokenData | Few, length_NM: np.ndarray) -> np.ndarray:
    slot = np.concatenate([np.arange(s.slots) for s in data.layout.specs])
    return slot < length_NM[:, data.layout.modality_C]


def _curve(subject: str, of: dict[str, list[Metric]], data: str, run: str) -> Plot:
    rows = {"run": f"from {run}", "scratch": "from scratch", "unigram": "frequencies of ids"}
    found = [of[k] for k in rows]
    ends = lambda i: [[m.ci95 and m.ci95[i] for m in ms] for ms in found]  # noqa: E731
    return Plot(
        name=subject, title=f"{data}: loss of {'all modalities' if subject == 'all' else subject}", kind="curve",
        rows=list(rows.values()), columns=[m.setting["samples"] for m in found[0]],
        values=[[m.value for m in ms] for ms in found], low=ends(0), high=ends(1), x=f"samples of {data}", y="cross-entropy, nats",
    )
