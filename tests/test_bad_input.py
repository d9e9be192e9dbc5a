"""What users do wrong and what happens to their files: a line that names the thing, a hint, and nothing lost."""

import contextlib
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import run
from workspace_factory import (  # noqa: F401
    config,
    copied,
    linked,
    media,
    one_thread,
    records,
    settings,
    tiny,
    weights,
)

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shards import Shard, index_path, shard_paths, write_shard
from nano4m_cli.spec import read_spec
from nano4m_cli.train import checkpoint
from nano4m_cli.train.loop import Stopped
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.tokenizing import tokenize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def space(tiny, tmp_path):  # noqa: F811
    """A workspace with the tiny data set (read only) and no runs."""
    return linked(tiny, tmp_path / "space")


@pytest.fixture
def own(tiny, tmp_path):  # noqa: F811
    """A workspace whose data may be damaged."""
    return copied(tiny, tmp_path / "own")


@pytest.fixture
def studio(media, tmp_path):  # noqa: F811
    """A workspace with the run `demo`, which may be damaged, and data that may not."""
    studio = linked(media, tmp_path / "studio")
    shutil.copytree(media.root / "runs", studio.root / "runs")
    return studio


def train(space, *args, **changes):
    (space.root / "tiny.yaml").write_text("{}")
    return run("train", space.root / "tiny.yaml", *settings(**changes), *args, "--root", space.root, "--device", "cpu")


def generate(space, *args):
    return run("generate", *args, "--root", space.root, "--out", space.root / "out", "--steps", 1)


def snapshot(folder):
    """Return the bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result, code, *said, hint=None):
    """Assert that a command failed with an `error:` line and perhaps a hint; progress may stand before it."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == "" and "Traceback" not in result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    for part in said:
        assert str(part) in error.partition("\nhint: ")[0], error
    if hint is not None:
        assert str(hint) in error.partition("\nhint: ")[2], error


def accepted(result, notice=None):
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.stderr
    if notice is None:
        assert "was cropped" not in result.stderr and "was cut" not in result.stderr
    else:
        assert any(line.startswith("notice: ") and notice in line for line in result.stderr.splitlines()), result.stderr


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said, hint",
    [
        ("train: {stpes: 3}", "unknown key 'train.stpes'", "did you mean 'steps'?"),
        ("model: {sise: d1-1w16}", "unknown key 'model.sise'", "did you mean 'size'?"),
        ("masking: {components: [{type: dirichlet, alhpa: 1}]}", "components.0: unknown key 'alhpa'", "'alpha'?"),
        ("masking: {components: [{type: dirchlet}]}", "unknown masking component 'dirchlet'", "'dirichlet'?"),
        ("masking: {components: [{type: directed, source: {rbg: 1}}]}", "modality 'rbg' is not in this run", "'rgb'?"),
        ("loss_weights: {captoin: 3}", "loss_weights: modality 'captoin' is not in this run", "'caption'?"),
        ("seed: 1\ntrain: {}\nseed: 2", "c.yaml:3: key 'seed' stands twice (first on line 1)", "remove one"),
        ("train:\n  steps: 1\n  batch: 8\n  steps: 2", "c.yaml:4: key 'steps' stands twice (first on line 2)", None),
        ("train: {steps: 0}", "train.steps", None),
        ("train: {lr: fast}", "train.lr", None),
        ("train: [steps", "is not valid YAML", None),
        ("- steps", "must hold a mapping", None),
        ("task: fuorm", "unknown task 'fuorm'", "did you mean 'fourm'?"),
        ("name: a/b", "'a/b' cannot be the name of a run's folder", None),
        ("model: {size: d1-1w20, head_width: 16}", "width 20 does not divide into heads of 16", None),
    ],
)
def test_configs(space, text, said, hint):
    path = space.root / "c.yaml"
    path.write_text(text + "\n")
    refused(run("train", path, "--root", space.root, "--device", "cpu"), 2, said, hint=hint)
    assert not (space.root / "runs").exists()


@pytest.mark.parametrize(
    "changes, code, said, hint",
    [
        ({"data.dataset": "scense"}, 2, "unknown data set 'scense'", "did you mean 'scenes'?"),
        ({"data.train": "trian"}, 1, "data set 'scenes' has no split 'trian' of rgb tokens", "did you mean 'train'?"),
        ({"data.modalities": "[rgb, depht]"}, 1, "data set 'scenes' has no depht tokens", "tokenize --modality depht"),
    ],
)
def test_names_of_data(space, changes, code, said, hint):
    refused(train(space, **changes), code, said, hint=hint)
    assert not (space.root / "runs").exists()


def test_an_unknown_val_split_is_not_ignored(space):
    result = train(space, **{"data.val": "vla"})
    refused(result, 1, "no split 'vla'", hint="did you mean 'val'?")


def test_a_modality_twice(space):
    refused(train(space, **{"data.modalities": "[rgb, rgb]"}), 2, "rgb")


def test_names_of_runs(studio):
    for args in (["eval"], ["probe", "linear"], ["generate", "--from", "caption=a", "--to", "rgb"]):
        result = run(*args, "--run", "dmeo", "--root", studio.root)
        refused(result, 2, "unknown run 'dmeo'", hint="did you mean 'demo'?")


def test_names_of_splits(studio):
    result = run("eval", "--probe", "loss", "--split", "tset", "--root", studio.root)
    refused(result, 1, "tset", hint="did you mean 'test'?")


# -- token shards -----------------------------------------------------------------------------------------------------


def cut(path, share=0.5):
    """Truncate a file; what stood in its place keeps its time, as after a crash."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("where", ["everything", "half", "last id", "end of archive"])
def test_truncated_shard(own, where):
    shard = own.dataset().tokens("rgb", "train") / "shard-000001.tar"
    index = Shard(shard).index
    end = int(index.offset["rgb.npy"][-1] + index.size["rgb.npy"][-1])
    left = {"everything": 0, "half": index.tar_bytes // 2, "last id": end - 2, "end of archive": end}[where]
    shard.write_bytes(shard.read_bytes()[:left])
    refused(train(own), 1, shard, hint="shard-000001.tar")
    assert not (own.root / "runs").exists()
    before = snapshot(own.dataset().tokens("caption"))
    tokenize(own.dataset(), "rgb", workers=1)  # what the hint says, without the deletion
    assert train(own).exit_code == 0
    assert snapshot(own.dataset().tokens("caption")) == before


def test_truncated_shard_with_an_index_that_is_older(own):
    shard = own.dataset().tokens("rgb", "train") / "shard-000000.tar"
    cut(shard, 0.7)
    os.utime(shard, (1, 1))  # the index beside it looks newer
    refused(train(own), 1, f"{shard} is cut short or damaged", hint="delete shard-000000.tar")


def test_missing_shard(own):
    folder = own.dataset().tokens("rgb", "train")
    (folder / "shard-000001.tar").unlink()
    refused(train(own), 1, f"{folder}: shard-000001.tar is missing (next is shard-000002.tar)", hint="tokenize again")


def rewrite(path, change):
    """Write a shard again with `change(position, key, members)` applied to each sample."""
    shard = Shard(path)
    samples = [(k, {m: shard.read(i, m) for m in shard.index.offset}) for i, k in enumerate(shard.keys)]
    write_shard(path, iter([change(i, k, m) for i, (k, m) in enumerate(samples)]))


def test_keys_that_differ(own):
    dataset = own.dataset()
    shard = dataset.tokens("caption", "train") / "shard-000002.tar"
    key = Shard(shard).keys[5]
    rewrite(shard, lambda i, k, m: ("other-key" if i == 5 else k, m))
    other = dataset.tokens("rgb", "train") / "shard-000002.tar"
    place = f"sample 5 is '{key}' there and 'other-key' here"
    refused(train(own), 1, f"{shard} (caption) does not fit {other} (rgb)", place, hint="tokenize --modality caption")
    assert not (own.root / "runs").exists()


def test_shards_of_different_number(own):
    dataset = own.dataset()
    last = shard_paths(dataset.tokens("rgb", "train"))[-1]
    last.unlink()
    index_path(last).unlink()
    refused(train(own), 1, "rgb has 2 shards in", "caption has 3 in", hint="nano4m tokenize")


def test_ids_outside_the_vocabulary(own):
    """A spec.json that says less than the ids: the loader finds it, and says which sample."""
    dataset = own.dataset()
    ids, _ = TokenData(dataset, "train", ["rgb"]).read(np.arange(48))
    spec = read_spec(dataset.spec_path("rgb"))
    assert ids.max() == 7
    write_json(dataset.spec_path("rgb"), {**spec.model_dump(mode="json"), "vocab_size": 7})
    result = train(own)
    refused(result, 1, "id 7 of 'rgb' is outside its vocabulary of 7", "sample 'train-",
            hint="run 'nano4m tokenize --modality rgb'")
    key = result.stderr.split("sample '")[1].split("'")[0]
    assert (ids[TokenData(dataset, "train", ["rgb"]).split.keys.index(key)] == 7).any()
    assert not (own.root / "runs" / "tiny" / "checkpoints").exists()


def test_ids_of_another_shape(own):
    dataset = own.dataset()
    spec = read_spec(dataset.spec_path("rgb"))
    write_json(dataset.spec_path("rgb"), {**spec.model_dump(mode="json"), "shape": [16, 15]})
    refused(train(own), 1, "shard-000000.tar: 'train-", "has 256 ids of rgb, 240 expected")


def test_broken_spec(own):
    path = own.dataset().spec_path("rgb")
    cut(path)
    refused(train(own), 1, f"{path} is not valid JSON")


def test_a_member_that_is_no_array(own):
    shard = own.dataset().tokens("rgb", "train") / "shard-000000.tar"
    rewrite(shard, lambda i, k, m: (k, {"rgb.npy": b"not an array at all, but long enough"} if i == 3 else m))
    refused(train(own), 1, f"{shard}: 'rgb.npy' of '{Shard(shard).keys[3]}' is no npy file")


def test_a_missing_val_split_still_trains(own):
    for modality in ("rgb", "caption"):
        shutil.rmtree(own.dataset().tokens(modality, "val"))
    result = train(own, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"] == {}
    assert [r["step"] for r in records(own.root / "runs" / "tiny", "train")] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.latest(own.root / "runs" / "tiny").name == "step-00000006"


def test_a_val_split_of_one_modality_only(own):
    """Half a validation split is no missing one: somebody deleted something."""
    shutil.rmtree(own.dataset().tokens("caption", "val"))
    refused(train(own), 1, "has no split 'val' of caption tokens")


# -- checkpoints ------------------------------------------------------------------------------------------------------


def stop_at(space, steps, **changes):
    """Train the first `steps` of ten steps as if the run had been stopped there; return its folder."""
    def callback(record):
        if record.kind == "train" and record.step == steps:
            os.kill(os.getpid(), signal.SIGUSR1)

    prepared = prepare(config(space.root, **{"name": "tiny", **LONG, **changes}), space)
    with pytest.raises(Stopped):
        start(prepared, False, "cpu", callback)
    return prepared.folder


LONG = dict(train__steps=10, train__checkpoint_every=2)


def damage(point, how):
    if how == "one byte":
        path = point / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    elif how == "half of model":
        cut(point / "model.safetensors")
    elif how == "half of state":
        cut(point / "state.json")
    elif how == "no state":
        (point / "state.json").unlink()
    elif how == "no model":
        (point / "model.safetensors").unlink()
    elif how == "empty state":
        (point / "state.json").write_text("{}")
    elif how == "list as state":
        (point / "state.json").write_text("[]")


DAMAGE = ["one byte", "half of model", "half of state", "no state", "no model", "empty state",
          pytest.param("list as state")]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_at_resume(space, how):
    folder = stop_at(space, 6)
    old, new = checkpoint.checkpoints(folder)
    assert (old.name, new.name) == ("step-00000004", "step-00000006")
    damage(new, how)
    before = snapshot(folder)
    refused(train(space, "--resume", **LONG), 1, f"checkpoint {new} is damaged",
            hint=f"the previous one is step-00000004: delete {new}")
    assert snapshot(folder) == before
    shutil.rmtree(new)  # the hint
    done = train(space, "--resume", **LONG)
    assert done.exit_code == 0, done.output
    whole = train(space, name="whole", **LONG)
    assert whole.exit_code == 0, whole.output
    assert weights(folder) == weights(space.root / "runs" / "whole")


@pytest.mark.parametrize("how", ["half of model", "half of state", "no model"])
def test_damaged_checkpoint_is_set_aside_where_asked(space, how):
    """What an unattended job does: two in a row, and the weights are those of a run that nothing happened to."""
    keep = {**LONG, "train__keep": 9}
    folder = stop_at(space, 6, train__keep=9)
    checkpoints = folder / "checkpoints"
    damage(checkpoints / "step-00000004", "one byte")
    damage(checkpoints / "step-00000006", how)
    done = train(space, "--resume", "--set-aside", **keep)
    accepted(done)
    for at, before in ((6, 4), (4, 2)):
        assert done.stderr.count(f"warning: checkpoint {checkpoints}/step-0000000{at} is damaged: ") == 1
        assert f"it is damaged-step-0000000{at} now, and training goes on from step-0000000{before}" in done.stderr
    assert {"damaged-step-00000004", "damaged-step-00000006", "step-00000010"} < {p.name for p in checkpoints.iterdir()}
    accepted(train(space, name="whole", **keep))
    assert weights(folder) == weights(space.root / "runs" / "whole")
    assert records(folder) == records(space.root / "runs" / "whole")


def test_the_last_checkpoint_there_is_is_not_set_aside(space):
    refused(train(space, "--set-aside", **LONG), 2, "--set-aside needs --resume")
    folder = stop_at(space, 2)
    damage(folder / "checkpoints" / "step-00000002", "one byte")
    before = snapshot(folder)
    refused(train(space, "--resume", "--set-aside", **LONG), 1, "step-00000002 is damaged", hint="there is no earlier one")
    assert snapshot(folder) == before


def test_a_checkpoint_that_the_disk_does_not_give_is_not_called_damaged(space, monkeypatch):
    folder = stop_at(space, 6)

    def gone(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint, "_sha256", gone)
    for more in ([], ["--set-aside"]):
        refused(train(space, "--resume", *more, **LONG), 1, "step-00000006 cannot be read: Stale file handle", hint="disk")
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_at_generate(studio, how):
    old, new = checkpoint.checkpoints(studio.root / "runs" / "demo")
    damage(new, how)
    result = generate(studio, "--from", "caption=a red cube", "--to", "rgb")
    refused(result, 1, f"checkpoint {new} is damaged", hint=f"the previous one is {old.name}: delete {new}")
    assert not (studio.root / "out").exists()
    shutil.rmtree(new)
    accepted(generate(studio, "--from", "caption=a red cube", "--to", "rgb"))


def test_the_only_checkpoint_is_damaged(studio):
    old, new = checkpoint.checkpoints(studio.root / "runs" / "demo")
    shutil.rmtree(old)
    damage(new, "one byte")
    refused(generate(studio, "--from", "caption=a", "--to", "rgb"), 1, "is damaged", hint="there is no earlier one")


def test_checkpoints_without_their_config(space):
    folder = stop_at(space, 4)
    (folder / "config.yaml").unlink()
    before = snapshot(folder)
    refused(train(space, "--resume", **LONG), 1, f"{folder} has checkpoints but no config.yaml")
    assert snapshot(folder) == before


@contextlib.contextmanager
def disk(folder, size):
    """Put a small disk in the place of a folder, as root; elsewhere the test is skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_while_writing_a_checkpoint(space):
    """The disk fills up at step 4; what was saved at step 2 stays, and training goes on once there is space."""
    runs = space.root / "runs"
    with disk(runs, "8m"):
        first = stop_at(space, 2)
        size = sum(len(b) for b in snapshot(first).values())
        kept = snapshot(checkpoint.latest(first))
        free = os.statvfs(runs).f_bavail * os.statvfs(runs).f_frsize
        assert free > 2 * size
        (runs / "filler").write_bytes(b"x" * (free - size // 2))
        result = train(space, "--resume", **LONG)
        refused(result, 1, "checkpoint at step 4 was not written", hint="the last good one is step-00000002; free some")
        assert "--resume" in result.stderr
        assert [p.name for p in (first / "checkpoints").iterdir()] == ["step-00000002"]
        assert snapshot(checkpoint.latest(first)) == kept
        checkpoint.load(checkpoint.latest(first))
        (runs / "filler").unlink()
        done = train(space, "--resume", **LONG)
        assert done.exit_code == 0, done.output
        resumed, metrics = weights(first), records(first)
        assert train(space, name="whole", **LONG).exit_code == 0
        assert weights(runs / "whole") == resumed
        assert records(runs / "whole") == metrics


def fill(path):
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def train_until_full(space):
    """Resume a run of 150 steps on a disk with three free pages; return (what it said, the run, its settings)."""
    runs, many = space.root / "runs", {"train__steps": 150, "train__checkpoint_every": 150}
    folder = stop_at(space, 2, **many)
    (runs / "room").write_bytes(b"x" * 12_000)  # config and metrics are rewritten at resume
    fill(runs / "filler")
    (runs / "room").unlink()
    result = train(space, "--resume", **many)
    (runs / "filler").unlink()
    return result, folder, many


def test_full_disk_while_writing_metrics(space):
    """Not a byte is left: the line that could not be written is no traceback, and nothing is missing afterwards."""
    with disk(space.root / "runs", "8m"):
        result, folder, many = train_until_full(space)
        refused(result, 1, "No space left on device")
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
        done = train(space, "--resume", **many)
        assert done.exit_code == 0, done.output
        assert [r["step"] for r in records(folder, "train")] == list(range(1, 151))


def test_full_disk_while_writing_metrics_is_said_well(space):
    with disk(space.root / "runs", "8m"):
        result, folder, _ = train_until_full(space)
        refused(result, 1, folder / "metrics.jsonl", hint="--resume")


@pytest.mark.parametrize("what", ["save_file", "replace"])
def test_full_disk_anywhere(space, monkeypatch, what):
    """The same without a small disk: the write or the rename of the second checkpoint fails."""
    from nano4m_cli.data import _atomic

    folder = space.root / "runs" / "tiny"
    real = {"save_file": checkpoint.save_file, "replace": os.replace}[what]

    def full(*args):
        if "step-00000004" in str(args[1]):
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if what == "save_file" else _atomic.os, what, full)
        result = train(space, **LONG)
    refused(result, 1, "checkpoint at step 4 was not written", "No space left on device", hint="step-00000002")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.load(checkpoint.latest(folder)).state["step"] == 2
    assert train(space, "--resume", **LONG).exit_code == 0
    assert checkpoint.latest(folder).name == "step-00000010"


def test_full_disk_while_tokenizing(own, tmp_path):
    dataset = own.dataset()
    shutil.rmtree(dataset.tokens("rgb"))
    with disk(dataset.tokens("rgb"), "24k"):
        result = run("tokenize", "--modality", "rgb", "name=identity", "levels=8", "--root", own.root, "--workers", 1)
        refused(result, 1, f"cannot write {dataset.tokens('rgb')}", "No space left on device", hint="free some space")
        left = [p for p in dataset.tokens("rgb").rglob("*") if p.is_file()]
        assert not [p for p in left if ".part" in p.name]
        for path in shard_paths(dataset.tokens("rgb", "train")):
            assert len(Shard(path)) == 16  # whatever has a name is whole


# -- run folders ------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_config(space):
    folder = stop_at(space, 4)
    before = snapshot(folder)
    other = {**LONG, "train__lr": 0.5, "model.registers": 2}
    refused(train(space, **other), 1, "run 'tiny' exists already (step-00000004 in ", "belongs to another config",
            hint="name=NEW")
    refused(train(space, "--resume", **other), 2, f"run folder {folder} belongs to another config",
            "train.lr: 0.001 -> 0.5", "model.registers: 1 -> 2", hint="name=NEW")
    refused(train(space, "--resume", **{**LONG, "train__steps": 20}), 2, "train.steps: 10 -> 20")
    assert snapshot(folder) == before


def test_what_a_run_chose_at_its_start_stays_chosen(own):
    """A data set fetched since does not make the same command another config."""
    folder = stop_at(own, 4)
    newer = own.root / "data" / "newer"
    shutil.copytree(own.dataset().path, newer)
    os.utime(newer / "raw" / "dataset.json")
    assert own.dataset().name == "newer"
    result = train(own, "--resume", **LONG)
    assert result.exit_code == 0, result.output
    assert checkpoint.latest(folder).name == "step-00000010"


def test_the_same_config_again(space):
    folder = stop_at(space, 4)
    before = snapshot(folder)
    result = train(space, **LONG)
    refused(result, 1, "run 'tiny' exists already (step-00000004 in ", hint="go on with --resume")
    assert "another config" not in result.stderr
    assert snapshot(folder) == before


def test_tokens_made_again_by_another_tokenizer(own):
    """A new caption vocabulary: shapes may be the same, the ids mean something else."""
    folder = stop_at(own, 4)
    before, dataset = snapshot(folder), own.dataset()
    shutil.rmtree(dataset.tokenizer("caption"))
    shutil.rmtree(dataset.tokens("caption"))
    tokenize(dataset, "caption", ["vocab=300"], workers=1)
    refused(train(own, "--resume", **LONG), 1, "the caption tokens are not those this run was trained on",
            hint="use the data set with the tokenizers of the run")
    assert snapshot(folder) == before


def test_tokens_of_the_same_size_by_another_tokenizer(media, tmp_path):  # noqa: F811
    """Only the weights differ: their hash tells."""
    studio = copied(media, tmp_path / "studio")
    dataset = studio.dataset()
    model = dataset.tokenizer("rgb") / "model.safetensors"
    state = load_file(model)
    name = next(n for n, t in state.items() if t.ndim == 2)
    state[name] = state[name] * 1.5
    save_file(state, model)
    result = generate(studio, "--from", "caption=a red cube", "--to", "rgb")
    refused(result, 1, "the rgb tokens are not those this run was trained on: tokenizer weights differ")
    result = run("tokenize", "--modality", "rgb", "--root", studio.root, "--workers", 1)
    said = f"{dataset.spec_path('rgb')} was written by another tokenizer"
    refused(result, 1, said, hint=f"delete {dataset.tokens('rgb')}")
    shutil.rmtree(dataset.tokens("rgb"))
    tokenize(dataset, "rgb", workers=1)
    result = train(studio, "--resume", name="demo", train__steps=4, train__checkpoint_every=2)
    refused(result, 1, "the rgb tokens are not those this run was trained on: tokenizer weights differ")


def test_a_tokenizer_with_other_options_is_not_replaced(own):
    before = snapshot(own.dataset().path)
    result = run("tokenize", "--modality", "rgb", "name=identity", "levels=4", "--root", own.root)
    refused(result, 2, "rgb of 'scenes' has a tokenizer already, with other options", hint="delete ")
    assert snapshot(own.dataset().path) == before


# -- what users give to generate --------------------------------------------------------------------------------------


def picture(mode, size, path, seed=0):
    h, w, rng = size[1], size[0], np.random.default_rng(seed)
    shape = {"RGB": (h, w, 3), "RGBA": (h, w, 4), "L": (h, w), "LA": (h, w, 2), "I;16": (h, w)}[mode]
    dtype = np.uint16 if mode == "I;16" else np.uint8
    Image.fromarray(rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype)).save(path)
    assert Image.open(path).mode == mode
    return path


@pytest.fixture(scope="module")
def shared_studio(media, tmp_path_factory):  # noqa: F811
    """A studio for tests that only read."""
    return linked_with_runs(media, tmp_path_factory.mktemp("shared") / "studio")


def linked_with_runs(workspace, root):
    made = linked(workspace, root)
    (root / "runs").symlink_to(workspace.root / "runs")
    return made


def give(studio, tmp_path, modality, value, to):
    args = ["--from", f"{modality}={value}", "--to", to, "--out", tmp_path / "out", "--steps", 1]
    return run("generate", *args, "--root", studio.root)


def test_a_picture_that_fits_is_taken_as_it_is(shared_studio, tmp_path):
    path = picture("RGB", (16, 16), tmp_path / "a.png")
    result = give(shared_studio, tmp_path, "rgb", path, "caption")
    accepted(result)
    assert (tmp_path / "out" / "caption.txt").is_file() and (tmp_path / "out" / "sheet.png").is_file()


@pytest.mark.parametrize("size", [(40, 24), (16, 17), (5, 5), (1, 200)])
def test_a_picture_of_another_size_is_adapted(shared_studio, tmp_path, size):
    path = picture("RGB", size, tmp_path / "a.png")
    accepted(give(shared_studio, tmp_path, "rgb", path, "caption"), f"rgb of {size[0]} x {size[1]} was cropped")


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA"])
def test_a_picture_of_another_mode_is_converted(shared_studio, tmp_path, mode):
    path = picture(mode, (16, 16), tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), Image.open(path).convert("RGBA")).convert("RGB")
    white.save(tmp_path / "plain.png")
    accepted(give(shared_studio, tmp_path, "rgb", path, "depth"))
    got = np.load(tmp_path / "out" / "depth.ids.npy")
    accepted(give(shared_studio, tmp_path, "rgb", tmp_path / "plain.png", "depth"))
    assert np.array_equal(np.load(tmp_path / "out" / "depth.ids.npy"), got)


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_a_conversion_of_mode_is_said(shared_studio, tmp_path, mode):
    path = picture(mode, (16, 16), tmp_path / "a.png")
    accepted(give(shared_studio, tmp_path, "rgb", path, "caption"), "rgb")


def bad_file(tmp_path, name):
    path = tmp_path / name
    if name == "16bit.png":
        picture("I;16", (16, 16), path)
    elif name == "empty.png":
        path.write_bytes(b"")
    elif name == "text.png":
        path.write_text("no picture")
    elif name == "cut.png":
        cut(picture("RGB", (64, 64), path), 0.5)
    return path


@pytest.mark.parametrize(
    "modality, name, said, hint",
    [
        ("rgb", "16bit.png", "has mode I;16", "pass it as depth"),
        ("rgb", "empty.png", "is empty (0 bytes)", None),
        ("rgb", "text.png", "is no readable picture", None),
        ("rgb", "cut.png", "is no readable picture", None),
        ("rgb", "nowhere.png", "no rgb file", "give the path of"),
        ("depth", "8bit.png", "depth is a 16-bit single-channel PNG in millimetres", None),
    ],
)
def test_pictures_that_cannot_be_used(shared_studio, tmp_path, modality, name, said, hint):
    path = bad_file(tmp_path, name) if name != "8bit.png" else picture("RGB", (16, 16), tmp_path / name)
    refused(give(shared_studio, tmp_path, modality, path, "caption"), 1, name, said, hint=hint)
    assert not (tmp_path / "out").exists()


def test_identity_takes_its_own_size_only(tiny, tmp_path):  # noqa: F811
    """A tokenizer that cannot adapt says what it takes."""
    space = linked(tiny, tmp_path / "space")
    assert train(space, name="demo").exit_code == 0
    path = picture("RGB", (20, 16), tmp_path / "a.png")
    refused(give(space, tmp_path, "rgb", path, "caption"), 1, "--from rgb: uint8 (16, 20, 3), uint8 (16, 16) expected")
    accepted(give(space, tmp_path, "rgb", picture("RGB", (16, 16), path), "caption"))


def tone(path, rate=24_000, channels=1, seconds=1.0, subtype="PCM_16", value=None):
    t = np.arange(int(rate * seconds)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * t) if value is None else np.full(len(t), value)
    soundfile.write(path, np.stack([wave] * channels, 1), rate, subtype=subtype)
    return path


@pytest.mark.parametrize("rate, channels", [(24_000, 2), (8_000, 1), (44_100, 2), (48_000, 1)])
def test_sounds_of_other_form_are_converted(shared_studio, tmp_path, rate, channels):
    from nano4m_cli.modalities.audio import MODALITY

    path = tone(tmp_path / "a.wav", rate, channels)
    got, plain = MODALITY.from_text(str(path)), MODALITY.from_text(str(tone(tmp_path / "b.wav")))
    assert got.shape == plain.shape == (24_000,) and got.dtype == np.float32
    assert np.abs(got - plain)[500:-500].max() < 5e-3
    accepted(give(shared_studio, tmp_path, "audio", path, "caption"))


def test_sounds_of_other_length_are_adapted(shared_studio, tmp_path):
    for seconds, how in ((0.5, "padded with silence"), (3.0, "cut")):
        path = tone(tmp_path / "a.wav", seconds=seconds)
        result = give(shared_studio, tmp_path, "audio", path, "caption")
        accepted(result, f"audio of {seconds:.2f} s was {how} to 1.00 s")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
        (lambda p: tone(p, seconds=0), "holds no samples"),
        (lambda p: tone(p, subtype="FLOAT", value=np.nan), "holds NaN or infinite samples"),
        (lambda p: tone(p, subtype="FLOAT", value=np.inf), "holds NaN or infinite samples"),
        (lambda p: p.write_text("no sound"), "is no readable sound"),
    ],
)
def test_sounds_that_cannot_be_used(shared_studio, tmp_path, make, said):
    make(tmp_path / "a.wav")
    refused(give(shared_studio, tmp_path, "audio", tmp_path / "a.wav", "caption"), 1, "a.wav", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_captions(shared_studio, tmp_path, text):
    refused(give(shared_studio, tmp_path, "caption", text, "rgb"), 1, "the caption is empty", hint="give some words")
    assert not (tmp_path / "out").exists()


def test_captions_that_are_too_long(shared_studio, tmp_path):
    refused(give(shared_studio, tmp_path, "caption", "a red cube " * 60, "rgb"), 1, "caption has ", "tokens, at most ",
            hint="shorten it")


def test_captions_of_unseen_characters_are_taken(shared_studio, tmp_path):
    accepted(give(shared_studio, tmp_path, "caption", "\u00e9\u4e16 \U0001f600", "rgb"))


@pytest.mark.parametrize(
    "args, code, said, hint",
    [
        (["--from", "caption=a", "--to", "normal"], 2, "run 'demo' has no modality 'normal'", "known: audio"),
        (["--from", "normal=a.png", "--to", "rgb"], 2, "run 'demo' has no modality 'normal'", None),
        (["--from", "captoin=a", "--to", "rgb"], 2, "run 'demo' has no modality 'captoin'", "did you mean 'caption'?"),
        (["--from", "rgb=a.png", "--to", "rgb"], 2, "'rgb' is given and asked for", "keep a part of it: --keep rgb:0.5"),
        (["--to", "rgb"], 2, "no condition", "--from MODALITY=VALUE"),
        (["--sample", "test-99999999", "--to", "rgb"], 1, "has no sample 'test-99999999'", "a key reads like 'test-"),
        (["--from", "caption=a", "--to", "rgb", "--temperature", "-1"], 2, "temperature", None),
        (["--from", "caption=a", "--to", "rgb", "--scheme", "magic"], 2, "scheme", None),
    ],
)
def test_requests_that_cannot_be_met(shared_studio, tmp_path, args, code, said, hint):
    result = run("generate", *args, "--root", shared_studio.root, "--out", tmp_path / "out")
    refused(result, code, said, hint=hint)
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_are_gone(media, tmp_path):  # noqa: F811
    studio = copied(media, tmp_path / "studio")
    shutil.rmtree(studio.dataset().tokenizer("rgb"))
    result = generate(studio, "--from", "caption=a", "--to", "rgb")
    refused(result, 1, "no tokenizer at", hint="tokenize --modality rgb")


def test_tokenizers_that_are_damaged(media, tmp_path):  # noqa: F811
    studio = copied(media, tmp_path / "studio")
    path = studio.dataset().tokenizer("rgb") / "model.safetensors"
    cut(path)
    refused(generate(studio, "--from", "caption=a", "--to", "rgb"), 1, f"{path} cannot be used", hint="tokenize again")


def test_a_raw_sample_that_is_damaged(own):
    """A picture cut inside its shard: tokenize names shard, key and member, and leaves no half shard."""
    dataset = own.dataset()
    shutil.rmtree(dataset.tokens("rgb"))
    shard = dataset.raw("train") / "shard-000001.tar"

    def spoil(i, key, members):
        return key, {**members, "rgb.png": members["rgb.png"][:40]} if i == 2 else members

    key = Shard(shard).keys[2]
    rewrite(shard, spoil)
    result = run("tokenize", "--modality", "rgb", "--root", own.root, "--workers", 1)
    refused(result, 1, f"{shard}, '{key}', rgb.png is no readable picture")
    train_shards = sorted(p.name for p in dataset.tokens("rgb", "train").iterdir())
    assert train_shards == ["shard-000000.idx.json", "shard-000000.tar"]


def test_a_file_in_the_place_of_a_folder(space):
    """A file stands where the folder of runs should be."""
    (space.root / "runs").write_text("")
    refused(train(space), 1, space.root / "runs")
