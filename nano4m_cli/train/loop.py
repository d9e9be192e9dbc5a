"""The one training loop. It knows a `Task` (model, batches, loss, validation) and nothing of modalities or displays.

All randomness is a function of (seed, step), so the loop's whole state is step, weights, averaged weights and
optimizer: a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nano4m_cli import dist
from nano4m_cli.compute import pays_bf16
from nano4m_cli.errors import CheckpointError, Nano4MError, TrainingError
from nano4m_cli.model.layers import compile_blocks
from nano4m_cli.rng import torch_seed
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.exchange import Exchange
from nano4m_cli.train.feed import Feed
from nano4m_cli.train.metrics import Metrics
from nano4m_cli.train.optim import build_optimizers, clip_gradients
from nano4m_cli.train.parallel import arrange
from nano4m_cli.train.saving import Saver
from nano4m_cli.train.schedule import lr_factor
from nano4m_cli.train.sharding import fill, fill_optimizers, local
from nano4m_cli.train.watch import KeyLog, Watch, stall_line, start_note


class Task(Protocol):
    """What is trained. `batch(step)` is a function of the step alone and may run in another process.

    A task may also have a `critic` (a module, or None) and `critic_loss()`: the critic's own loss on what the last `loss`
    made, or None while it waits. The critic has optimizers of its own, of the same settings, and is in every checkpoint.
    `apart`: whether each rank waits for data that the others do not need. `settle(parts)`: the step's parts once ranks have
    told each other of them. `restore(state)`: takes over what `state()` told a checkpoint.
    """

    model: nn.Module

    def batch(self, step: int) -> list[Any]:
        """Return the step's parts (gradient accumulation), each with what `loss` needs."""

    def loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the part's share of the step's loss, and named figures that sum over parts."""

    def validate(self) -> dict[str, float]:
        """Return named figures on the validation data, by fixed masks; "loss" among them."""

    def keys(self, step: int) -> list[str]:
        """Return the keys of the samples of a step, for error messages."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must say besides weights."""


@dataclass(frozen=True)
class StepRecord:
    """What the loop calls back with. kind: "train", "val", "checkpoint", "done". Some have a note, a line to be shown: "damaged",
    of a checkpoint that was set aside; "skipped", of data that others stand in for; "stall" and "late", of a step that took long or
    is taking long (the latter by another thread, and on the rank that it is about)."""

    kind: str
    step: int
    steps: int
    figures: dict[str, float]
    note: str = ""


Callback = Callable[[StepRecord], None]


class Stopped(Exception):
    """Training was asked to stop (signal or Ctrl-C); a checkpoint of `step` was written."""

    def __init__(self, step: int, signum: int):
        super().__init__(f"stopped at step {step}")
        self.step, self.signum = step, signum
        self.speaks = dist.rank() == 0  # one process of a run says so


def resolve_precision(precision: str, device: torch.device, width: int) -> torch.dtype | None:
    """Return the autocast dtype, or None for fp32. auto: bf16 where it is quicker for a model of this width (0: of none)."""
    bf16 = pays_bf16(device.type, width) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else None


class Trainer:
    """Runs a task to its last step.

    Args:
        run: the run's folder (None: nothing is written, no checkpoints).
        header: what state.json of every checkpoint says of the run.
    """

    def __init__(self, task: Task, config: TrainConfig, seed: int, run: Path | None, header: dict[str, Any] | None = None,
                 device: str = "cpu", callback: Callback | None = None):
        self.task, self.c, self.seed, self.run = task, config, seed, run
        self.device = torch.device(device)
        self.header = header or {}
        self.callback = callback or (lambda record: None)
        self.model = task.model.to(self.device)
        if config.compile:
            compile_blocks(self.model)
        self.parallel = arrange(task, config, self.device)
        self.optimizers = build_optimizers(self.model, config)
        self.critic: nn.Module | None = getattr(task, "critic", None)
        if self.critic is not None:
            self.critic.to(self.device)
            self.optimizers += build_optimizers(self.critic, config)
        width = getattr(getattr(self.model, "config", None), "width", 0)
        self.dtype = resolve_precision(config.precision, self.device, width)
        self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()} if config.ema else None
        self.step = 0
        self._window: list[dict[str, float]] = []  # figures since the last record
        self.exchange, self.metrics = Exchange(), Metrics(run)
        self._written = -1
        self._val_loss: float | None = None
        self.watch = Watch(self.device, config.stall)
        self.keys: KeyLog | None = None
        tell = lambda step: self.callback(StepRecord("checkpoint", step, config.steps, {}))  # noqa: E731
        self.saver = Saver(run, config, tell) if run is not None else None

    # -- state ----------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest checkpoint and drop later metrics; return the step to go on from."""
        newest = dist.told(checkpoint.latest(self.run).name if dist.rank() == 0 else None)
        with dist.together():
            point = checkpoint.Reader(self.run / "checkpoints" / newest)
            self._restore(point)
        if hasattr(self.task, "restore"):
            self.task.restore(point.state)
        self.step = self._written = point.state["step"]
        self._window = point.state.get("window", [])
        self._val_loss = point.state.get("val_loss")
        self.metrics.back_to(self.step)
        return self.step

    def _restore(self, point: checkpoint.Reader) -> None:
        """Fill weights and optimizers from a checkpoint, of any number of ranks; each rank reads its own rows."""
        fill(point, "model", self.model.state_dict())
        if self.critic is not None:
            if not point.has("critic"):
                raise CheckpointError(
                    f"{point.path} has no critic: the run was started without one", "start another with name=NEW"
                )
            fill(point, "critic", self.critic.state_dict())
        if self.ema is not None:
            fill(point, "ema", self.ema)
        fill_optimizers(point, self.optimizers)

    def save(self) -> None:
        """Write a checkpoint of the current step, once."""
        if self.saver is None or self._written == self.step:
            return
        tensors = {"model": dict(self.model.state_dict()), "optimizer": checkpoint.pack_optimizers(self.optimizers)}
        if self.ema is not None:
            tensors["ema"] = self.ema
        if self.critic is not None:
            tensors["critic"] = dict(self.critic.state_dict())
        state = {**self.header, **self.task.state(), "window": list(self._window), "val_loss": self._val_loss}
        self.saver.save(self.step, tensors, state)
        self._written = self.step

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the averaged weights in, for evaluation."""
        if self.ema is None:
            yield
            return
        params = dict(self.model.named_parameters())
        before = {k: p.detach().clone() for k, p in params.items()}
        with torch.no_grad():
            for k, p in params.items():
                local(p).copy_(local(self.ema[k]))
        try:
            yield
        finally:
            with torch.no_grad():
                for k, p in params.items():
                    local(p).copy_(local(before[k]))

    # -- running --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train from the current step to the last; return the final validation figures.

        SIGTERM, SIGUSR1 and Ctrl-C end the current step, write a checkpoint and raise `Stopped`.
        """
        late = lambda line: self.callback(StepRecord("late", self.step, self.c.steps, {}, line))  # noqa: E731
        with (
            self.exchange.signals(), contextlib.closing(self._loader()) as feed, contextlib.closing(self.saver or feed),
            self.watch.patrol(lambda: self.parallel.doing, late, dist.rank()),
        ):
            figures: dict[str, float] = {}
            self._begin()
            clock, since = time.perf_counter(), self.step
            for parts in self._watched(feed):
                window = self._window
                window.append(self._one_step(parts))
                self._end_step()
                if self.step % self.c.log_every == 0 or self.step == self.c.steps:
                    now = time.perf_counter()
                    mean = {k: sum(w[k] for w in window if k in w) / sum(k in w for w in window) for w0 in window for k in w0}
                    mean["samples_per_s"] = (self.step - since) * self.c.batch / max(now - clock, 1e-9)
                    self._record("train", mean)
                    self._write("speed", self.watch.speed())
                    self._window, clock, since = [], now, self.step
                if self.step % self.c.val_every == 0 or self.step == self.c.steps:
                    before = time.perf_counter()
                    figures = self.validate()
                    self._val_loss = figures.get("loss")
                    self._record("val", figures)
                    clock += time.perf_counter() - before
                if self.step % self.c.checkpoint_every == 0 or self.step == self.c.steps:
                    self.save()
                if self.exchange.stop is not None:
                    self.save()
                    self._saved()
                    raise Stopped(self.step, self.exchange.stop)
                if self.saver is not None:
                    self.saver.poll()
            self._saved()
            self._record("done", figures)
            return figures

    def _begin(self) -> None:
        """Note the start, and open what takes records."""
        if self.run is None:
            return
        with dist.together():
            self.metrics.open_sinks(self.c)
            self._write("start", start_note(self.device))
            if self.c.log_keys:
                self.keys = KeyLog(self.run, self.step)

    def _watched(self, feed: Feed) -> Iterator[list[Any]]:
        """Yield what the feed gives, timed; tell of samples that others stand for."""
        while True:
            self.watch.begins()
            parts = self._fed(feed)
            if parts is None:
                return
            skipped = [why for p in parts for why in getattr(p, "skipped", ())]
            if skipped:
                self._write("skipped", {"n": len(skipped), "samples": skipped})
            for note in (note for p in parts for note in getattr(p, "notes", ())):
                self.callback(StepRecord("skipped", self.step, self.c.steps, {}, f"warning: step {self.step + 1}: {note}"))
            yield parts

    def _fed(self, feed: Feed) -> list[Any] | None:
        """Return the next step's parts, None after the last. Where each rank waits for data of its own, all raise what one of
        them cannot have: else the others would wait for its gradients."""
        tokens, parts, error = getattr(self.task, "tokens", lambda part: 0), None, None
        try:
            parts = next(feed, None)
        except Nano4MError as err:
            last = checkpoint.checkpoints(self.run) if self.run else []
            err.hint = "; ".join(filter(None, [
                err.hint, f"the last good checkpoint is {last[-1].name}, go on from it with --resume" if last else None]))
            error = err
        self.watch.fed(sum(tokens(p) for p in parts or ()))
        if dist.ranks() > 1 and getattr(self.task, "apart", False):
            self.parallel.doing = "waiting for other ranks' data"
            if dist.sum_of(torch.tensor(float(error is not None))):
                with dist.together():
                    if error is not None:
                        raise error
        if error is not None:
            raise error
        settle = getattr(self.task, "settle", None)
        return parts if parts is None or settle is None else settle(parts)

    def _end_step(self) -> None:
        if self.keys is not None:
            self.keys.write(self.step, self.task.keys(self.step - 1))
        note = self.watch.ends(*self.exchange.times)
        if note is not None:
            self._write("stall", note)
            self.callback(StepRecord("stall", self.step, self.c.steps, {}, stall_line(self.step, note)))

    def _saved(self) -> None:
        if self.saver is not None:
            self.saver.finish()

    def validate(self) -> dict[str, float]:
        self.model.eval()
        with self.averaged(), torch.no_grad(), self._autocast():
            figures = self.task.validate()
        self.model.train()
        return figures

    def _one_step(self, parts: list[Any]) -> dict[str, float]:
        self.model.train()
        torch.manual_seed(torch_seed(self.seed, "dropout", self.step))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        figures: dict[str, Tensor] = {}
        self.parallel.seconds = 0.0
        for part in parts:
            if self.critic is not None:
                self.critic.requires_grad_(False)  # judged by it, not training it
            named = self.parallel.backward(part, self._autocast(), part is parts[-1])
            if self.critic is not None:
                named = {**named, **self._critic_backward()}
            for k, v in named.items():
                figures[k] = figures.get(k, 0.0) + v.detach()
        mine = {k: float(v) for k, v in figures.items()}
        shared = self.exchange.begin(mine, self.watch.wait, self.parallel.seconds)
        norm = clip_gradients(self.model.parameters(), self.c.clip)
        whole = self.exchange.end(mine, shared)
        finite = math.isfinite(whole["loss"]) and math.isfinite(norm)
        if self.critic is not None:
            finite &= math.isfinite(clip_gradients(self.critic.parameters(), self.c.clip))
        if not finite:
            self._not_finite(mine, norm)
        factor = lr_factor(self.step, self.c)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        self.step += 1
        if self.ema is not None:
            # The average forgets its start: early on it is over the steps so far.
            decay = min(self.c.ema, (1 + self.step) / (10 + self.step))
            now = [local(p.detach()) for p in self.model.parameters()]
            torch._foreach_lerp_([local(v) for v in self.ema.values()], now, 1 - decay)
        return {**whole, "grad_norm": norm, "lr": self.c.lr * factor}

    def _critic_backward(self) -> dict[str, Tensor]:
        self.critic.requires_grad_(True)
        with self._autocast():
            loss = self.task.critic_loss()
        if loss is None:
            return {}
        loss.backward()
        return {"critic": loss}

    def _not_finite(self, mine: dict[str, float], norm: float) -> None:
        """Raise on all ranks; the first of those whose own figures are bad (else rank 0) names its samples."""
        bad = [r for r, n in enumerate(dist.gathered(sum(not math.isfinite(v) for v in mine.values()))) if n]
        named = ", ".join(f"{k}={v:.4g}" for k, v in mine.items())
        keys = self.task.keys(self.step)
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        last = checkpoint.checkpoints(self.run) if self.run else []
        error = TrainingError(
            f"step {self.step + 1}: loss or gradient is not finite ({named}, grad_norm={norm:.4g}); samples: {shown}",
            f"last good checkpoint: {last[-1] if last else 'none yet'}; look at the samples, lower train.lr, or set "
            "train.precision=fp32",
        )
        error.said = dist.rank() != (bad[0] if bad else 0)
        raise error

    def _autocast(self):
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _record(self, kind: str, figures: dict[str, float]) -> None:
        if kind != "done":
            self._write(kind, figures)
        self.callback(StepRecord(kind, self.step, self.c.steps, figures))

    def _write(self, kind: str, figures: dict[str, Any]) -> None:
        self.metrics.write(kind, self.step, figures)

    def _loader(self) -> Feed:
        """Return what gives the parts of every step to come."""
        cuda = self.device.type == "cuda"
        return Feed(self.task, range(self.step, self.c.steps), self.c.workers, self.c.timeout, self._move, pin=cuda)

    def _move(self, parts: list[Any]) -> list[Any]:
        return parts if self.device.type == "cpu" else [p.to(self.device) for p in parts]
