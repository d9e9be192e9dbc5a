"""Which checkpoints stay, and writing them beside the next steps."""

import json
import threading

import pytest
from workspace_factory import by_hand, config, linked, one_thread, records, weights  # noqa: F401

from nano4m_cli.errors import CheckpointError, DataError
from nano4m_cli.train import checkpoint, saving
from nano4m_cli.train.run import prepare, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def space(by_hand, tmp_path):  # noqa: F811
    return linked(by_hand, tmp_path / "space")


def train(space, callback=lambda record: None, resume=False, **changes):
    prepared = prepare(config(space.root, **changes), space)
    start(prepared, resume, "cpu", callback)
    return prepared.folder


def steps(folder):
    return [checkpoint.step_of(p) for p in checkpoint.checkpoints(folder)]


def test_the_newest_those_of_every_n_steps_and_the_best_stay(space):
    common = dict(train__steps=12, train__checkpoint_every=2, train__val_every=2, train__keep=1)
    assert steps(train(space, name="newest", **common)) == [12]
    assert steps(train(space, name="every", **common, train__keep_every=4)) == [4, 8, 12]
    best = train(space, name="best", **common, train__keep_best=True, train__lr=0.3, train__schedule="constant", train__warmup=0)
    loss = {r["step"]: r["loss"] for r in records(best, "val")}
    least = min(loss, key=loss.get)
    assert least < 12, "at this rate the last is not the best"
    assert steps(best) == sorted({least, 12})
    assert json.loads((checkpoint.checkpoints(best)[0] / "state.json").read_text())["val_loss"] == loss[least]


def test_one_that_is_half_removed_when_the_process_is_killed_has_no_name(space, monkeypatch):
    folder, remove = train(space, train__checkpoint_every=2, train__keep=9), checkpoint.shutil.rmtree

    def killed(path, **how):
        if not how:
            (path / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(folder, checkpoint.Retention(1))
    monkeypatch.undo()
    assert steps(folder) == [4, 6] and all(checkpoint.load(p) for p in checkpoint.checkpoints(folder))
    checkpoint.sweep(folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_written_beside_the_next_steps_a_checkpoint_is_the_same(space):
    common = dict(train__checkpoint_every=2, train__keep=9, train__ema=0.9, train__log_every=4)
    at_once, told = train(space, name="at_once", **common), []
    beside = train(space, lambda r: told.append(r.step) if r.kind == "checkpoint" else None, name="beside", train__save_async=True,
                   **common)
    assert steps(at_once) == steps(beside) == told == [2, 4, 6]
    for step in (2, 4, 6):
        a, b = (checkpoint.step_folder(f, step) for f in (at_once, beside))
        for part in ("model", "ema", "optimizer"):
            assert (a / f"{part}.safetensors").read_bytes() == (b / f"{part}.safetensors").read_bytes(), (step, part)
        windows = [json.loads((p / "state.json").read_text())["window"] for p in (a, b)]
        assert windows[0] == windows[1] and len(windows[0]) == step % 4 - (step == 6) * 2


def test_training_goes_on_while_a_checkpoint_is_written(space, monkeypatch):
    write, gate, seen = checkpoint.save, threading.Event(), []

    def slow(run, step, *rest):
        if step == 3:
            assert gate.wait(60)
        return write(run, step, *rest)

    monkeypatch.setattr(saving.checkpoint, "save", slow)

    def callback(record):
        seen.append((record.kind, record.step))
        if record.kind == "train" and record.step == 5:
            gate.set()

    folder = train(space, callback, train__save_async=True)
    assert steps(folder) == [3, 6]
    assert seen.index(("checkpoint", 3)) > seen.index(("train", 5))
    assert weights(folder) == weights(train(space, name="sync"))


def test_a_failure_to_write_beside_is_told_and_leaves_the_earlier_ones(space, monkeypatch):
    write = checkpoint.save

    def full(run, step, *rest):
        if step == 4:
            raise checkpoint.not_written(run, step, DataError("cannot write: No space left on device"))
        return write(run, step, *rest)

    monkeypatch.setattr(saving.checkpoint, "save", full)
    with pytest.raises(CheckpointError, match="checkpoint at step 4 was not written.*No space left") as err:
        train(space, train__save_async=True, train__checkpoint_every=2, train__keep=9)
    assert "the last good one is step-00000002" in err.value.hint
    folder = space.root / "runs" / "tiny"
    assert steps(folder) == [2] and not [t for t in threading.enumerate() if t.name == "save"]
    monkeypatch.setattr(saving.checkpoint, "save", write)
    train(space, resume=True, train__checkpoint_every=2, train__keep=9)
    assert weights(folder) == weights(train(space, name="whole", train__checkpoint_every=2))


def test_a_bug_in_the_writing_thread_is_not_lost(space, monkeypatch):
    monkeypatch.setattr(saving.checkpoint, "save", lambda *args: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        train(space, train__save_async=True)


def test_shards_that_were_not_all_written_are_swept(space):
    folder = train(space)
    half = folder / "checkpoints" / ".step-00000009.shards.part"
    (half / "model").mkdir(parents=True)
    (half / "model" / "rank-00000-of-00002.safetensors").write_bytes(b"x" * 100)
    train(space, resume=True)
    assert not half.exists() and steps(folder) == [3, 6]


def test_shards_wait_for_every_rank_and_say_who_is_missing(tmp_path, monkeypatch, space):
    c = config(space.root, train__timeout=0.001).train
    saver = saving.Saver(tmp_path, c, lambda step: None)
    monkeypatch.setattr(saving.dist, "ranks", lambda: 2)
    aside = tmp_path / "checkpoints" / ".step-00000001.shards.part"
    aside.mkdir(parents=True)
    saver._write_shards(1, {}, aside)
    with pytest.raises(CheckpointError, match="rank 1 has not written its shard within 0.001 min"):
        saver._complete(1, {}, aside)
    patient = saving.Saver(tmp_path, config(space.root, train__timeout=60).train, lambda step: None)
    (aside / ".rank-00001.failed").touch()  # nobody waits an hour for who could not write
    with pytest.raises(CheckpointError, match="rank 1 has not written its shard$"):
        patient._complete(1, {}, aside)
    (aside / ".rank-00001.failed").unlink()
    patient.close()  # nor for who was killed
    with pytest.raises(CheckpointError, match="rank 1 has not written its shard$"):
        patient._complete(1, {}, aside)
    assert not checkpoint.checkpoints(tmp_path)
    (aside / ".rank-00001.json").write_text('{"sha256": {}, "shards": {}}')
    patient._complete(1, {}, aside)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
