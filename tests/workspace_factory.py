"""Tiny workspaces, made without a gradient step: `scenes` of 16 x 16 pixels, and hand-written ids under any names.

Import `tiny`, `media` and `one_thread` into a test module to have the fixtures; each workspace is made once a session
and is never written to: `linked` and `copied` give a test its own.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from nano4m_cli.data._atomic import atomic_folder, write_json
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import shard_name, write_shard
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.rng import generator
from nano4m_cli.spec import TokenizerRef, TokenSpec
from nano4m_cli.tokenizers._base import GradientTokenizer, save_tokenizer
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.tokenizing import make_tokenizer, npy, read_raw, tokenize

SPLITS = {"train": 48, "val": 8, "test": 8, "test_novel": 8}
SHARD = 16
# A model of 32 or fewer channels, batches of 8, a checkpoint every third step.
TINY = {
    "model.size": "d1-1w16", "model.head_width": 16, "train.batch": 8, "train.steps": 6, "train.warmup": 2,
    "train.log_every": 1, "train.val_every": 100, "train.checkpoint_every": 3, "train.precision": "fp32",
    "masking.components": "[{type: directed, weight: 0.5, max_target: 24}, "
                          "{type: dirichlet, weight: 0.5, input: [4, 32], target: [4, 24]}]",
}


def settings(**changes):
    """Return TINY as command-line settings; in `changes` "__" stands for the dot."""
    merged = {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [f"{k}={v}" for k, v in merged.items()]


def set_up(dataset, modality, **options):
    """Save a tokenizer with the weights it starts from: ids of the right form, but nothing was fitted."""
    tokenizer = make_tokenizer(dataset, modality, None, options)
    assert isinstance(tokenizer, GradientTokenizer)
    torch.manual_seed(0)
    tokenizer.fit(read_raw(dataset, "train", modality, range(SPLITS["train"])))
    with atomic_folder(dataset.tokenizer(modality)) as folder:
        save_tokenizer(tokenizer, folder)


def make_tiny(root):
    """Fetch `scenes` and tokenize rgb (identity, 256 slots of 8 ids) and caption (bpe)."""
    workspace = Workspace(root)
    sizes = [f"{k}={v}" for k, v in SPLITS.items()] + ["size=16", f"shard_size={SHARD}"]
    dataset = fetch(open_source("scenes", sizes, workspace), workspace, workers=1).dataset
    tokenize(dataset, "rgb", ["name=identity", "levels=8"], workers=1)
    tokenize(dataset, "caption", [], workers=1)
    return workspace


def make_media(root, tiny):
    """The same pictures with tokenizers that adapt what users give (rgb, depth, audio), and a run `demo` of 4 steps."""
    raw = tiny.dataset().path / "raw"
    shutil.copytree(raw, root / "data" / "scenes" / "raw")
    dataset = Workspace(root).dataset()
    set_up(dataset, "rgb", patch=4, width=16, depth=1)
    set_up(dataset, "depth", patch=4, width=16, depth=1)
    set_up(dataset, "audio", width=16, depth=1, griffin_lim=2)
    for modality in ("rgb", "depth", "audio", "caption"):
        tokenize(dataset, modality, workers=1)
    start(prepare(config(root, name="demo", train__steps=4, train__checkpoint_every=2), Workspace(root)), False, "cpu",
          lambda record: None)
    return Workspace(root)


def config(root, **changes):
    """Return the run config that the command line would make of `settings(**changes)`."""
    from nano4m_cli.train.config import load_run_config

    path = root / "tiny.yaml"
    path.write_text("{}")
    return load_run_config(path, settings(**changes))


def write_tokens(dataset, split, count, spec, ids_of):
    """Write token shards by hand: `ids_of(i)` gives the ids of sample i."""
    write_json(dataset.spec_path(spec.modality), spec.model_dump(mode="json"))
    for shard in range(-(-count // SHARD)):
        rows = range(shard * SHARD, min((shard + 1) * SHARD, count))

        def samples(rows=rows):
            for i in rows:
                ids = np.asarray(ids_of(i)).astype(spec.dtype)
                row = ids if spec.kind == "sequence" else ids[None]
                yield f"{split}-{i:08d}", {f"{spec.modality}.npy": npy(row)}

        write_shard(dataset.tokens(spec.modality, split) / shard_name(shard), samples())


def make_by_hand(root, name="scenes"):
    """A data set of five modalities whose ids come from a seed alone, so that no tokenizer or renderer can move them.

    Every id of a sample leans on the sample's class, so that there is something to learn across modalities.
    """
    dataset = DatasetFolder(root / "data" / name)
    specs = [
        TokenSpec(modality=m, kind="grid", shape=(4, 4), vocab_size=24, tokenizer=TokenizerRef(name="by_hand"))
        for m in ("rgb", "depth", "normal")
    ]
    specs.append(TokenSpec(modality="audio", kind="codes", shape=(8, 2), vocab_size=24))
    specs.append(TokenSpec(modality="caption", kind="sequence", shape=(12,), vocab_size=40, eos=0))
    write_json(dataset.info_path, {
        "name": name, "source": "scenes", "options": {}, "version": 1, "modalities": [s.modality for s in specs],
        "splits": SPLITS,
    })
    for split, count in SPLITS.items():
        for spec in specs:

            def ids_of(i, spec=spec, split=split):
                draw = generator(0, f"{split}/{spec.modality}", i)
                kind = int(generator(0, f"{split}/class", i).integers(4))
                if spec.kind == "sequence":
                    return np.append(draw.integers(1, 9, size=int(draw.integers(4, 11))) + 8 * kind, spec.eos)
                return draw.integers(0, 6, size=spec.slots) + 6 * kind

            write_tokens(dataset, split, count, spec, ids_of)
    return Workspace(root)


_MADE = {}  # a fixture imported by two modules is two fixtures, of one workspace


def _once(what, factory, make):
    if what not in _MADE:
        _MADE[what] = make(factory.mktemp(what))
    return _MADE[what]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return _once("tiny", tmp_path_factory, make_tiny)


@pytest.fixture(scope="session")
def media(tmp_path_factory, tiny):
    return _once("media", tmp_path_factory, lambda root: make_media(root, tiny))


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory):
    return _once("by_hand", tmp_path_factory, make_by_hand)


@pytest.fixture
def one_thread():
    """Threads that spin for cores others hold make small models a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linked(workspace, root):
    """Return a workspace at `root` with its own runs and the data of another (to be read only)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data").symlink_to(workspace.root / "data")
    return Workspace(root)


def copied(workspace, root):
    """Return a copy of a workspace, to be damaged."""
    shutil.copytree(workspace.root, root, dirs_exist_ok=True)
    return Workspace(root)


def records(run, *kinds):
    """Return metrics.jsonl without the clock; of the kinds named, else of those that are the same every time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "samples_per_s")
    kinds = kinds or ("train", "val")
    return [{k: v for k, v in r.items() if k not in clock} for r in lines if r["kind"] in kinds]


def weights(run):
    """Return the bytes of the newest checkpoint's tensors, by file."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return newest.name, {p.name: p.read_bytes() for p in sorted(newest.glob("*.safetensors"))}
