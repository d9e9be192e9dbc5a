"""MNIST as pictures of bits with class labels: source, tokenizers, and the siblings' configs on it."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from workspace_factory import one_thread  # noqa: F401

from nano4m_cli.cli._app import app
from nano4m_cli.config import build
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, FetchError, MediaError
from nano4m_cli.modalities.rgb import MODALITY as RGB
from nano4m_cli.tokenizers.bits import Tokenizer as Bits
from nano4m_cli.tokenizers.classes import Tokenizer as Classes
from nano4m_cli.train.tokenizing import tokenize


def digit(seed: int) -> np.ndarray:
    """A thick slanted stroke, uint8 (28, 28): enough structure to learn."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28]
    at = 6 + 1.6 * (seed % 10) + (y - 14) * (seed % 10 - 5) / 12
    return np.clip(255 - 60 * np.abs(x - at) + g.integers(-20, 20, (28, 28)), 0, 255).astype(np.uint8)


def write_idx(folder, part: str, count: int) -> None:
    labels = (np.arange(count) % 10).astype(np.uint8)
    pictures = np.stack([digit(i) for i in range(count)])
    head = lambda *lengths: bytes([0, 0, 8, len(lengths)]) + b"".join(int(n).to_bytes(4, "big") for n in lengths)  # noqa: E731
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head(count) + labels.tobytes()))
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head(count, 28, 28) + pictures.tobytes()))


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist")
    write_idx(root / "mirror" / "mnist_idx", "train", 260)
    write_idx(root / "mirror" / "mnist_idx", "t10k", 40)
    workspace = Workspace(root)
    fetch(open_source("mnist", [f"mirror={root / 'mirror'}", "val=60", "shard_size=100"], workspace), workspace, 1)
    dataset = workspace.dataset()
    tokenize(dataset, "rgb", ["variants=3"], workers=1)
    tokenize(dataset, "label", workers=1)
    return workspace


def test_splits_are_the_published_ones(space):
    info = space.dataset().info()
    assert info.splits == {"train": 200, "val": 60, "test": 40} and info.modalities == ["label", "rgb"]
    keys = {s: {TokenData(space.dataset(), s, ["label"]).key(i) for i in range(n)} for s, n in info.splits.items()}
    assert {k[:5] for k in keys["test"]} == {"t10k-"} and not keys["train"] & keys["val"] and len(keys["train"]) == 200


def test_ids_are_bits_of_patches(space):
    """The slow obvious way: shrink, cut, and count the pixels of each patch as binary digits."""
    data = TokenData(space.dataset(), "test", ["label", "rgb"])
    ids, _ = data.read(np.arange(40))
    for i in range(40):
        number = int(data.key(i)[5:])
        small = np.asarray(Image.fromarray(digit(number)).resize((14, 14), Image.Resampling.BILINEAR))
        plain = [
            8 * int(small[y, x] > 127) + 4 * int(small[y, x + 1] > 127) + 2 * int(small[y + 1, x] > 127)
            + int(small[y + 1, x + 1] > 127) for y in range(0, 14, 2) for x in range(0, 14, 2)
        ]
        assert ids[i, 0] == number % 10 and ids[i, 1:].tolist() == plain
    assert len(np.unique(ids[:, 1:])) > 8


def test_train_pictures_have_variants(space):
    data = TokenData(space.dataset(), "train", ["label", "rgb"])
    first, other = (data.read(np.arange(200), np.full(200, k))[0] for k in (0, 2))
    changed = (first[:, 1:] != other[:, 1:]).mean()
    assert 0.01 < changed < 0.5 and np.array_equal(first[:, 0], other[:, 0])


def test_a_varied_picture_is_a_crop():
    raw = np.zeros((40, 40, 3), np.uint8)
    raw[10:30, 10:30] = 255
    made = [RGB.vary(raw, np.random.default_rng(s)) for s in range(20)]
    sizes = [(m[..., 0] > 127).sum() for m in made]
    assert all(m.shape == raw.shape for m in made) and len({m.tobytes() for m in made}) == 20
    assert min(sizes) >= 400 and 420 < max(sizes) < 520, "never smaller, at most ten per cent larger each way"


def test_bits_and_classes_refuse():
    with pytest.raises(ConfigError, match="size 14 does not divide into patches of 4"):
        build(Bits.Options, {"patch": 4}, "bits")
    with pytest.raises(MediaError, match="here: rgb is a picture of vectors, this tokenizer takes 8-bit"):
        Bits("rgb", Bits.Options(), {"size": [28, 28]}).encode([np.zeros((28, 28, 3))], ["here"])
    classes = Classes("label", Classes.Options(), {})
    classes.fit(["dog", "cat", "dog"])
    assert classes.classes == ["cat", "dog"] and classes.decode(classes.encode(["dog"])) == ["dog"]
    with pytest.raises(MediaError, match="k1: 'dig' is none of the 2 classes of the train split") as err:
        classes.encode(["dig"], ["k1"])
    assert "dog" in err.value.hint
    with pytest.raises(MediaError, match="5000 distinct values"):
        classes.fit(map(str, range(5000)))


def test_a_mirror_that_lacks_a_file_says_which(tmp_path):
    write_idx(tmp_path / "mnist_idx", "train", 20)
    workspace = Workspace(tmp_path)
    with pytest.raises(FetchError, match="lacks mnist_idx/t10k-images"):
        fetch(open_source("mnist", [f"mirror={tmp_path}"], workspace), workspace, 1)


TINY = ["model.size=d2w32", "train.steps=30", "train.batch=32", "train.lr=1e-2", "train.val_every=30", "train.warmup=5"]


@pytest.mark.parametrize("task, score", [("gpt", 1.6), ("maskgit", 2.0)])
def test_siblings_train_generate_and_are_evaluated(space, task, score, monkeypatch):
    monkeypatch.setenv("NANO4M_ROOT", str(space.root))
    run = lambda *args: CliRunner().invoke(app, list(args))  # noqa: E731
    result = run("train", f"cfgs/{task}/mnist.yaml", *TINY, "--json")
    assert result.exit_code == 0, result.output + result.stderr
    figures = json.loads(result.stdout)["figures"]
    assert figures["ce_rgb"] < score < np.log(16), "it learns"
    name = f"{task}-mnist"
    result = run("generate", "--run", name, "--from", "label=3", "--to", "rgb", "-n", "2", "--json")
    assert result.exit_code == 0, result.output + result.stderr
    files = json.loads(result.stdout)["files"]
    pictures = [f for f in files if f.endswith("-rgb.png")]
    assert len(pictures) == 2 and all(Image.open(p).size == (28, 28) for p in pictures)
    result = run("eval", "--run", name, "--limit", "20", "--json")
    assert result.exit_code == 0, result.output + result.stderr
    done = json.loads(result.stdout)
    metrics = {m["name"]: m for r in done["results"] for m in r["metrics"]}
    assert metrics["label->rgb/ce"]["in_distribution"] and metrics["label->rgb/digit_acc"]["n"] == 20
    assert ("rgb->label/ce" in metrics) == (task == "maskgit")
    assert (space.root / "runs" / name / "report" / "index.html").is_file()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("task", ["gpt", "maskgit"])
def test_golden_losses(space, task, tmp_path):
    """Write them again with NANO4M_GOLDEN=write; a change that moves them belongs in the CHANGELOG, in bold."""
    tiny = ["model.size=d2w32", "model.head_width=16", "train.steps=6", "train.batch=8", "train.precision=fp32", "seed=0",
            "train.log_every=1", "train.val_every=3", f"name=golden-{task}", "--root", str(space.root), "--device", "cpu"]
    result = CliRunner().invoke(app, ["train", f"cfgs/{task}/mnist.yaml", *tiny])
    assert result.exit_code == 0, result.output + result.stderr
    got = {}
    for line in (space.root / "runs" / f"golden-{task}" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        told = {k: v for k, v in record.items() if k.startswith(("loss", "ce_", "grad_norm"))}
        got |= {f"{record['kind']} {record['step']} {k}": v for k, v in told.items()}
    path = Path(__file__).parent / "golden" / f"{task}.txt"
    if os.environ.get("NANO4M_GOLDEN") == "write":
        path.write_text("".join(f"{k} {v:.6f}\n" for k, v in got.items()))
    want = {k: float(v) for k, v in (line.rsplit(" ", 1) for line in path.read_text().splitlines())}
    assert got.keys() == want.keys() and len({k.rsplit(" ", 1)[0] for k in got}) == 8
    moved = {k: (want[k], v) for k, v in got.items() if abs(v - want[k]) > 1e-4}
    assert not moved, json.dumps(moved, indent=1)
