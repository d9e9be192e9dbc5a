"""The training loop: schedules, optimizers, and that a run is a function of its config, however often it is stopped."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import ENV, run
from workspace_factory import by_hand, config, linked, one_thread, records, settings, tiny, weights  # noqa: F401

from nano4m_cli.config import build, load_yaml
from nano4m_cli.errors import ConfigError, TrainingError
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.loop import Stopped, Trainer, resolve_precision
from nano4m_cli.train.optim import Muon, build_optimizers
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.schedule import lr_factor
from nano4m_cli.train.tasks import FourMTask

pytestmark = pytest.mark.usefixtures("one_thread")
REPO = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
EMA = {"train__ema": 0.9}


@pytest.fixture
def space(tiny, tmp_path):  # noqa: F811
    """A workspace with the tiny data set and no runs."""
    return linked(tiny, tmp_path / "space")


def silent(*_):
    pass


def train(space, callback=silent, resume=False, **changes):
    """Train the tiny config in this process; return the run's folder."""
    prepared = prepare(config(space.root, **changes), space)
    start(prepared, resume, "cpu", callback)
    return prepared.folder


def trainer(space, callback=silent, **changes):
    """Return a Trainer of the tiny config, as `start` makes it."""
    prepared = prepare(config(space.root, **changes), space)
    prepared.folder.mkdir(parents=True)
    made = Trainer(prepared.task, prepared.config.train, prepared.config.seed, prepared.folder, {}, "cpu", None)
    made.callback = lambda record: callback(made, record)
    return made


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, factors",
    [
        (dict(steps=4, warmup=3, schedule="constant"), [0.25, 0.5, 0.75, 1.0]),
        (dict(steps=3, warmup=0, schedule="constant"), [1.0, 1.0, 1.0]),
        # cosine: half a period from 1 to min_lr over the steps after warmup; min_lr would be reached at step `steps`
        (dict(steps=8, warmup=0, schedule="cosine", min_lr=0.0),
         [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0.0]),
        (dict(steps=6, warmup=2, schedule="cosine", min_lr=0.2),
         [1 / 3, 2 / 3, 1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2]),
        # wsd: the last half falls linearly
        (dict(steps=8, warmup=1, schedule="wsd", decay=0.5, min_lr=0.2),
         [0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (dict(steps=4, warmup=0, schedule="wsd", decay=0.0), [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_lr_factor(options, factors):
    c = build(TrainConfig, options)
    assert [lr_factor(s, c) for s in range(len(factors))] == pytest.approx(factors, abs=1e-6)


def test_warmup_and_schedule_reach_the_optimizer(space):
    folder = train(space, train__optimizer="muon", model__size="d1-1w32", train__lr=0.01, train__schedule="wsd",
                   train__decay=0.5, train__min_lr=0.1)
    lr = [r["lr"] for r in records(folder, "train")]
    assert lr == pytest.approx([0.01 * f for f in (1 / 3, 2 / 3, 1.0, 1.0, 0.7, 0.4)])


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_muon_is_torchs_muon_bit_for_bit():
    shapes = [(32, 32), (32, 32), (96, 32), (32, 128), (17, 40), (40, 17), (128, 32), (32, 128), (32, 32)]
    make = torch.Generator().manual_seed(0)
    start_ = [torch.randn(s, generator=make) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start_] for _ in range(2))
    options = dict(lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=5)
    mine, reference = Muon(ours, **options, dtype=torch.bfloat16), torch.optim.Muon(theirs, nesterov=True, **options)
    for step in range(6):
        for optimizer in (mine, reference):
            optimizer.param_groups[0]["lr"] = 0.02 * (step + 1) / 6
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(a.shape, generator=make) * 10.0 ** (i - 4)
            a.grad, b.grad = grad.clone(), grad.clone()
            if i == 4 and step == 2:
                a.grad = b.grad = None  # a parameter that had no part in this step
        mine.step()
        reference.step()
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b), (step, i, shapes[i], float((a - b).abs().max()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])
    assert not torch.equal(ours[0], start_[0])


def test_formats_follow_the_hardware_unless_told(space, monkeypatch):
    """bf16 that the hardware does not multiply is a hundred times slower than fp32, and at small widths on a CPU twice: nothing
    chooses it by itself there."""
    cpu, matrix, one = torch.device("cpu"), torch.randn(2, 24, 40), [torch.nn.Parameter(torch.ones(2, 2))]
    for dtype in (torch.bfloat16, None):
        for module in ("compute", "train.optim"):
            monkeypatch.setattr(f"nano4m_cli.{module}.multiplies_bf16", lambda device, able=dtype is not None: able)
        assert resolve_precision("auto", cpu, 512) is dtype and resolve_precision("auto", torch.device("cuda"), 64) is dtype
        assert resolve_precision("auto", cpu, 64) is None
        assert resolve_precision("bf16", cpu, 64) is torch.bfloat16 and resolve_precision("fp32", cpu, 512) is None
        free, full = Muon(one, 0.1, 0.0), Muon(one, 0.1, 0.0, dtype=torch.float32)
        assert free.orthogonalise(matrix, 5).dtype is (dtype or torch.float32)
        assert full.orthogonalise(matrix, 5).dtype is torch.float32
    near = full.orthogonalise(matrix, 5)
    values = torch.linalg.svdvals(near)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3, "singular values near one"


def test_every_parameter_has_one_optimizer(space):
    for optimizer in ("adamw", "muon"):
        c = config(space.root, train__optimizer=optimizer, model__size="d1-1w32")
        model = prepare(c, space).task.model
        groups = [g for o in build_optimizers(model, c.train) for g in o.param_groups]
        held = [id(p) for g in groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        for group in groups:
            assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    assert any(isinstance(o, Muon) for o in build_optimizers(model, c.train))


# -- a run is a function of its config --------------------------------------------------------------------------------


def gradients(space, accumulate):
    task = prepare(config(space.root, train__accumulate=accumulate, train__batch=8), space).task
    parts = task.batch(0)
    assert len(parts) == accumulate
    total = 0.0
    for part in parts:
        loss, _ = task.loss(part)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}


def test_accumulation_changes_nothing_but_rounding(space):
    whole, grads = gradients(space, 1)
    parts, summed = gradients(space, 4)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert grads.keys() == summed.keys()
    for name, grad in grads.items():
        scale = float(grad.abs().max())
        assert scale > 0 or "key" in name, name
        assert torch.allclose(grad, summed[name], rtol=1e-3, atol=1e-5 * scale + 1e-9), name
    one = records(train(space, name="one"), "train")
    four = records(train(space, name="four", train__accumulate=4), "train")
    assert len(one) == 6
    for a, b in zip(one, four, strict=True):
        assert (a.pop("kind"), a.pop("step")) == (b.pop("kind"), b.pop("step"))
        assert b == pytest.approx(a, rel=1e-3)


def test_a_step_s_data_is_the_same_list_for_any_number_of_ranks(space):
    """Samples, ids and masks of a step, put together from 1, 2 and 4 ranks, are one list; so is the gradient they sum to."""
    c = config(space.root, train__batch=8)
    base = prepare(c, space).task
    found, grads = {}, {}
    for ranks in (1, 2, 4):
        rows, answers, total = [], [], {}
        for rank in range(ranks):
            task = FourMTask(c, base.train, None, base.model, rank, ranks)
            for step in (0, 7):
                (part,) = task.batch(step)
                p = part.packed
                assert p.samples == 8 // ranks
                answers.append((step, *part.answers_M.tolist()))
                sides = [(ids.split(r.lengths.tolist()), col.split(r.lengths.tolist()))
                         for ids, col, r in ((p.enc_ids, p.enc_col, p.enc), (p.dec_ids, p.dec_col, p.dec))]
                for each in zip(*sides[0], *sides[1], strict=True):
                    rows.append((step, *(tuple(t.tolist()) for t in each)))
            base.model.zero_grad()
            task.loss(task.batch(7)[0])[0].backward()
            for name, q in base.model.named_parameters():
                if q.grad is not None:
                    total[name] = total.get(name, 0) + q.grad.clone()
        grads[ranks] = total
        assert len(set(answers)) == 2  # every rank divides by the answers of the whole step
        for step, *counts in set(answers):
            assert sum(counts) == sum(len(r[3]) for r in rows if r[0] == step) > 8
        found[ranks] = sorted(rows)
    assert found[1] == found[2] == found[4] and len(base.layout.names) > 1
    assert grads[1].keys() == grads[2].keys() == grads[4].keys()
    for name, grad in grads[1].items():
        for ranks in (2, 4):
            scale = float(grad.abs().max())
            assert torch.allclose(grad, grads[ranks][name], rtol=1e-3, atol=1e-5 * scale + 1e-9), (name, ranks)


def test_a_batch_that_does_not_divide_is_refused(space):
    with pytest.raises(ConfigError, match="batch 8 does not divide into 3 parts"):
        config(space.root, train__accumulate=3)


def test_the_same_config_gives_the_same_run(space):
    runs = [train(space, name=name, train__val_every=2, **EMA) for name in ("a", "b")]
    first, second = (records(r) for r in runs)
    assert first == second and len(first) == 6 + 3
    assert weights(runs[0]) == weights(runs[1])
    other = records(train(space, name="c", seed=1, train__val_every=2, **EMA))
    assert [r["loss"] for r in other] != [r["loss"] for r in first]


def test_workers_change_nothing(space):
    runs = [train(space, name=f"w{n}", train__workers=n) for n in (0, 2)]
    assert records(runs[0]) == records(runs[1])
    assert weights(runs[0]) == weights(runs[1])


def test_losses_fall(space):
    """The one test here that a loop which never steps would fail in its figures."""
    folder = train(space, train__steps=40, train__lr=0.02, train__checkpoint_every=40)
    loss = [r["loss"] for r in records(folder, "train")]
    assert np.mean(loss[-5:]) < 0.75 * np.mean(loss[:5])


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_is_fixed_and_disturbs_nothing(space):
    often = train(space, name="often", train__val_every=1, **EMA)
    never = train(space, name="never", train__val_every=1000, **EMA)
    assert weights(often) == weights(never)
    assert records(often, "train") == records(never, "train")
    assert records(often, "val")[-1] == records(never, "val")[-1]
    assert [r["step"] for r in records(often, "val")] == [1, 2, 3, 4, 5, 6]


def test_validation_gives_the_same_figures_twice(space):
    made = trainer(space, **EMA)
    made.fit()
    assert made.validate() == made.validate()
    other = trainer(space, name="other", seed=5, **EMA)  # other masks in training, the same ones in validation
    other.model.load_state_dict(made.model.state_dict())
    for k, v in made.ema.items():
        other.ema[k].copy_(v)
    assert other.validate() == made.validate()
    assert made.validate()["loss"] == pytest.approx(records(made.run, "val")[-1]["loss"], abs=0)


def test_validation_uses_the_averaged_weights(space):
    made = trainer(space, train__lr=0.05, **EMA)
    made.fit()
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    figures = made.validate()
    assert all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
    plain = trainer(space, name="plain")
    plain.model.load_state_dict(before)
    assert plain.validate()["loss"] != figures["loss"]
    plain.model.load_state_dict({**before, **made.ema})
    assert plain.validate() == figures


# -- averaged weights -------------------------------------------------------------------------------------------------


def test_ema_is_the_formula(space):
    slow, seen = {}, []

    def follow(made, record):
        if record.kind != "train":
            return
        seen.append(record.step)
        decay = min(0.6, (1 + record.step) / (10 + record.step))
        for name, p in made.model.named_parameters():
            slow[name] = decay * slow[name] + (1 - decay) * p.detach().double()

    made = trainer(space, follow, train__steps=12, train__ema=0.6, train__lr=0.02)
    slow.update({n: p.detach().double().clone() for n, p in made.model.named_parameters()})
    made.fit()
    assert seen == list(range(1, 13))
    for name in slow:
        assert torch.allclose(made.ema[name].double(), slow[name], rtol=0, atol=1e-6), name
    assert any(not torch.equal(made.ema[n], p) for n, p in made.model.named_parameters())
    stored = checkpoint.load(checkpoint.latest(made.run)).tensors["ema"]
    assert stored.keys() == made.ema.keys()
    assert all(torch.equal(stored[n], made.ema[n]) for n in stored)


# -- stopping and going on --------------------------------------------------------------------------------------------


def at_step(step, do):
    def callback(record):
        if record.kind == "train" and record.step == step:
            do()

    return callback


def test_sigterm_saves_and_resume_equals_the_uninterrupted_run(space):
    options = dict(train__steps=8, train__checkpoint_every=5, train__optimizer="muon", model__size="d1-1w32", **EMA)
    whole = train(space, name="whole", **options)
    with pytest.raises(Stopped) as stopped:
        train(space, at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), name="cut", **options)
    assert (stopped.value.step, stopped.value.signum) == (2, signal.SIGTERM)
    cut = space.root / "runs" / "cut"
    assert [p.name for p in checkpoint.checkpoints(cut)] == ["step-00000002"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers were put back
    train(space, resume=True, name="cut", **options)
    assert weights(cut) == weights(whole)
    assert records(cut) == records(whole)


def test_resume_drops_what_was_measured_after_the_checkpoint(space):
    whole = train(space, name="whole", train__steps=6)
    cut = train(space, name="cut", train__steps=6)
    newest = checkpoint.latest(cut)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if the kill had come before it was renamed
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # and in the middle of a line
    train(space, resume=True, name="cut", train__steps=6)
    assert records(cut) == records(whole)
    assert weights(cut) == weights(whole)


def test_resume_between_two_records_gives_the_same_records(space):
    options = dict(train__steps=8, train__log_every=4, train__checkpoint_every=3)
    whole = train(space, name="whole", **options)
    with pytest.raises(Stopped):
        def stop(record):
            if record.kind == "checkpoint" and record.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        train(space, stop, name="cut", **options)
    train(space, resume=True, name="cut", **options)
    cut = space.root / "runs" / "cut"
    assert weights(cut) == weights(whole)
    assert records(cut) == records(whole)


def test_a_finished_run_resumes_to_nothing(space):
    folder = train(space)
    before = weights(folder), records(folder)
    train(space, resume=True)
    assert (weights(folder), records(folder)) == before


def test_settings_that_change_no_result_may_change_at_resume(space):
    whole = train(space, name="whole", train__steps=6)
    with pytest.raises(Stopped):
        train(space, at_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1)), name="cut", train__steps=6)
    cut = train(space, resume=True, name="cut", train__steps=6, train__keep=5, train__workers=1)
    assert weights(cut) == weights(whole)
    assert load_yaml(cut / "config.yaml")["train"]["keep"] == 5


def test_only_the_newest_checkpoints_are_kept(space):
    for keep, left in ((1, [9]), (2, [8, 9]), (3, [6, 8, 9])):
        folder = train(space, name=f"k{keep}", train__steps=9, train__checkpoint_every=2, train__keep=keep)
        assert [p.name for p in checkpoint.checkpoints(folder)] == [f"step-{s:08d}" for s in left]
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in left]


def test_half_written_checkpoints_of_killed_processes_are_removed(space):
    folder = train(space, train__steps=6)
    half = folder / "checkpoints" / ".step-00000009.99999.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"x" * 1000)
    train(space, resume=True, train__steps=6)
    assert not half.exists()


def start_shell(root, *args):
    """Start `nano4m train` in its own process group."""
    env = {**os.environ, **ENV, "OMP_NUM_THREADS": "1"}
    (root / "tiny.yaml").write_text("{}")
    command = [sys.executable, "-m", "nano4m_cli", "train", str(root / "tiny.yaml"), *args, "--root", str(root)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, "--device", "cpu"], **pipes, env=env, start_new_session=True)


def wait_for(process, what, seconds=300):  # many times what it takes: the machine may be busy
    """Wait until what() is true while the process runs; return whether it is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if what():
            return True
        time.sleep(0.005)
    return what()


def newest(folder):
    return max((p.name for p in folder.glob("checkpoints/step-*")), default="")


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_from_outside(space, signum, code):
    args = settings(name="cut", train__steps=100_000, train__checkpoint_every=100_000)
    child = start_shell(space.root, *args)
    cut = space.root / "runs" / "cut"
    assert wait_for(child, lambda: (cut / "metrics.jsonl").is_file() and len(records(cut)) > 2), child.communicate()[1]
    os.killpg(child.pid, signum)  # as a terminal and a scheduler do: the whole group
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    step = int(newest(cut).removeprefix("step-"))
    assert step > 2 and f"stopped at step {step}, checkpoint saved; go on with --resume" in err
    assert out == "" and "Traceback" not in err
    assert checkpoint.load(checkpoint.latest(cut)).state["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, code",
    [
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 75),
        (signal.SIGTERM, 75),
    ],
)
def test_signals_to_the_loaders_processes_as_well(space, signum, code):
    args = settings(name="cut", train__steps=100_000, train__checkpoint_every=100_000, train__workers=2)
    child = start_shell(space.root, *args)
    cut = space.root / "runs" / "cut"
    assert wait_for(child, lambda: (cut / "metrics.jsonl").is_file() and len(records(cut)) > 2), child.communicate()[1]
    os.killpg(child.pid, signum)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "Traceback" not in err and "checkpoint saved" in err
    assert checkpoint.load(checkpoint.latest(cut)).state["step"] > 2


@pytest.mark.slow
def test_killed_again_and_again_the_run_is_the_same(space):
    steps = 240
    changes = dict(
        train__steps=steps, train__checkpoint_every=3, train__val_every=20, train__optimizer="muon", train__ema=0.99,
        train__workers=1, model__size="d1-1w32",
    )
    whole = train(space, name="whole", **changes)
    args, cut = settings(name="cut", **changes), space.root / "runs" / "cut"
    moments, killed_at = random.Random(0), []
    for n in range(6):
        child, before = start_shell(space.root, *args, "--resume"), newest(cut)
        assert wait_for(child, lambda before=before: newest(cut) > before), (n, before)
        time.sleep(moments.uniform(0.0, 0.25))
        os.killpg(child.pid, signal.SIGKILL)
        _, err = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, (n, err)
        killed_at.append(newest(cut))
        for point in checkpoint.checkpoints(cut):
            checkpoint.load(point)  # every one that has its name is whole
    assert killed_at == sorted(set(killed_at)) and killed_at[-1] < f"step-{steps:08d}", killed_at
    child = start_shell(space.root, *args, "--resume")
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert weights(cut) == weights(whole)
    seen = [(r["kind"], r["step"]) for r in records(cut)]
    assert len(set(seen)) == len(seen)
    assert [s for k, s in seen if k == "train"] == list(range(1, steps + 1))
    assert records(cut) == records(whole)


# -- losses that are not finite ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(space):
    def poison(made, record):
        if record.kind == "train" and record.step == 5:
            made.model.context.weight.data[0, 0] = float("nan")

    made = trainer(space, poison, train__steps=9)
    with pytest.raises(TrainingError) as caught:
        made.fit()
    keys = made.task.keys(5)
    assert len(keys) == 8 and all(k.startswith("train-") for k in keys)
    assert caught.value.message.startswith("step 6: loss or gradient is not finite (loss=nan")
    assert ", ".join(keys) in caught.value.message
    assert "last good checkpoint: " + str(made.run / "checkpoints" / "step-00000003") in caught.value.hint
    assert [r["step"] for r in records(made.run, "train")] == [1, 2, 3, 4, 5]
    good = checkpoint.load(checkpoint.latest(made.run)).tensors["model"]
    assert all(bool(torch.isfinite(t).all()) for t in good.values())


def test_a_rate_that_is_too_high_is_said_at_the_command_line(space):
    (space.root / "tiny.yaml").write_text("{}")
    result = run("train", space.root / "tiny.yaml", *settings(train__lr=1e30), "--root", space.root, "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert "error: step " in result.stderr and "is not finite" in result.stderr and "samples: train-" in result.stderr
    assert "hint: last good checkpoint: none yet" in result.stderr and "Traceback" not in result.stderr
    assert not (space.root / "runs" / "tiny" / "checkpoints").exists()


def test_a_checkpoint_called_good_holds_finite_weights(space):
    """A step may have a finite loss and yet leave weights that are not."""
    (space.root / "tiny.yaml").write_text("{}")
    args = settings(train__lr=1e30, train__checkpoint_every=1)
    result = run("train", space.root / "tiny.yaml", *args, "--root", space.root, "--device", "cpu")
    assert result.exit_code == 1, result.output
    for point in checkpoint.checkpoints(space.root / "runs" / "tiny"):
        tensors = checkpoint.load(point).tensors["model"]
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values()), point


# -- golden losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "5mod"])
def test_golden_losses(by_hand, tmp_path, name):  # noqa: F811
    """Write them again with NANO4M_GOLDEN=write; a change that moves them belongs in the CHANGELOG, in bold."""
    space = linked(by_hand, tmp_path / "space")
    tiny_version = ["train.steps=6", "model.size=d2-2w32", "model.head_width=16", "train.precision=fp32", "seed=0",
                    "train.batch=8", "train.log_every=1", "train.val_every=3"]
    result = run("train", REPO / "cfgs" / f"{name}.yaml", *tiny_version, "--root", space.root, "--device", "cpu")
    assert result.exit_code == 0, result.output
    got = {}
    for record in records(space.root / "runs" / name):
        for key, value in record.items():
            if key.startswith(("loss", "ce_", "grad_norm")):
                got[f"{record['kind']} {record['step']} {key}"] = value
    assert len({k.rsplit(" ", 1)[0] for k in got}) == 6 + 2 and all(math.isfinite(v) for v in got.values())
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("NANO4M_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text("".join(f"{k} {v:.6f}\n" for k, v in got.items()))
    want = {k: float(v) for k, v in (line.rsplit(" ", 1) for line in path.read_text().splitlines())}
    assert got.keys() == want.keys()
    moved = {k: (want[k], v) for k, v in got.items() if abs(v - want[k]) > 1e-4}
    assert not moved, json.dumps(moved, indent=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_alike(space):
    """Any number of tokens, compiled once; the state keeps its names, so that a run may go on either way."""
    losses, names = [], []
    for on in (False, True):
        made = trainer(space, name=f"compiled-{on}", train__compile=on, train__steps=3)
        losses.append([made._one_step(made.task.batch(step))["loss"] for step in range(3)])
        names.append(list(made.model.state_dict()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and names[0] == names[1]
    assert len({round(x, 6) for x in losses[0]}) == 3
