"""Transfer: what a model of other modalities takes over, and few-shot curves from a run against from scratch."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_cli import run
from workspace_factory import make_by_hand, media, tiny  # noqa: F401

from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError, UnknownNameError
from nano4m_cli.masking._mixture import Mixture
from nano4m_cli.model.base import StackConfig
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes._transplant import transplant
from nano4m_cli.probes.transfer import Few, Probe, Scored, _config
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.train.run import open_run

# -- what is taken over -----------------------------------------------------------------------------------------------


def made(kind, layout, seed, **options):
    torch.manual_seed(seed)
    if kind is FourM:
        return FourM(FourMConfig(size="d1-1w32", head_width=16, **options), layout).eval()
    return kind(StackConfig(size="d1w32", head_width=16, **options), layout).eval()


@pytest.mark.parametrize("kind, options", [(FourM, {}), (FourM, {"positions": "learned"}), (FourM, {"positions": "rope"}),
                                           (MaskGIT, {"positions": "learned"}), (GPT, {})])
def test_the_same_modalities_in_another_order_are_the_same_model(layout, sample, kind, options):
    old = made(kind, layout, 0, **options)
    order = [2, 0, 3, 1] if kind is not GPT else [0, 1, 2, 3]
    other = Layout([layout.specs[i] for i in order])
    new = made(kind, other, 1, **options)
    moved = transplant(old, new)
    assert moved.drawn == 0 and moved.known == other.names
    assert moved.copied == sum(p.numel() for p in new.parameters())
    ids, _, shown, asked = sample(4)
    column = np.concatenate([np.arange(layout.columns)[layout.slice(n)] for n in other.names])
    registers = old.config.registers
    with torch.no_grad():
        a = old.nll(pack(layout, ids, shown, asked, registers))
        b = new.nll(pack(other, ids[:, column], shown[:, column], asked[:, column], registers))
    row, col = np.nonzero(asked)
    at = {(r, c): v for r, c, v in zip(row.tolist(), col.tolist(), a.tolist(), strict=True)}
    row, col = np.nonzero(asked[:, column])
    for r, c, v in zip(row.tolist(), column[col].tolist(), b.tolist(), strict=True):
        assert v == pytest.approx(at[r, c], abs=2e-5)


def test_what_is_new_stays_as_drawn(layout):
    """A sound of another tokenizer, and a modality that was not there."""
    new_snd = TokenSpec(modality="snd", kind="codes", shape=(5, 2), vocab_size=9)
    touch = TokenSpec(modality="touch", kind="grid", shape=(2, 2), vocab_size=12, levels=(4, 3))
    target = Layout([touch, new_snd, layout.specs[0]])
    old, new, drawn = made(FourM, layout, 0), made(FourM, target, 1), made(FourM, target, 1)
    moved = transplant(old, new)
    assert moved.known == ["pic"]
    for name, p in old.named_parameters():
        if name.startswith(("encoder.", "decoder.", "context", "register")):
            assert torch.equal(new.get_parameter(name), p), name
    start, was = target.vocab_start, layout.vocab_start
    for table in ("embed", "head"):
        mine, before, theirs = (m.get_submodule(table).weight() for m in (new, drawn, old))
        assert torch.equal(mine[: start[3]], before[: start[3]]), "touch and sound are as drawn"
        assert torch.allclose(mine[start[3] :], theirs[: was[1]], atol=1e-6), "pictures are the run's, levels and all"
    assert torch.equal(new.enc_modality[0], drawn.enc_modality[0])
    assert torch.equal(new.enc_modality[1:], old.enc_modality[[1, 0]]), "a modality's vector goes by its name"
    changed = sum(int((a != b).sum()) for a, b in zip(new.parameters(), drawn.parameters(), strict=True))
    gains = sum(p.numel() for n, p in new.named_parameters() if "norm" in n)  # these all begin as ones
    assert moved.copied - gains <= changed <= moved.copied
    assert moved.copied + moved.drawn == sum(p.numel() for p in new.parameters())


# -- the probe --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(media, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("transfer")
    shutil.copytree(media.root, root, dirs_exist_ok=True)
    make_by_hand(root, "other")
    return Workspace(root)


SMALL = ["transfer.sizes=[8,16,9999]", "transfer.steps=10", "transfer.batch=4", "transfer.rates=[1.0,0.1]",
         "transfer.modalities=[rgb,normal,caption]"]


def test_a_tiny_run(space):
    asked = ["eval", "--probe", "transfer", "--root", space.root, "--run", "demo", "--device", "cpu", *SMALL]
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    value = {(m["name"], m["setting"]["samples"], m["setting"]["from"]): m for m in found["metrics"]}
    subjects, kinds = ("all", "rgb", "normal", "caption"), [("ce", "run"), ("ce", "scratch"), ("ce", "unigram"), ("gain", "run")]
    assert set(value) == {(f"{s}/{what}", n, f) for s in subjects for n in (8, 16) for what, f in kinds}
    for s in subjects:
        for n in (8, 16):
            ours, scratch = (value[f"{s}/ce", n, f]["value"] for f in ("run", "scratch"))
            gain = value[f"{s}/gain", n, "run"]["value"]
            assert ours > 0 and gain == pytest.approx(scratch - ours, abs=3e-6)
            low, high = value[f"{s}/gain", n, "run"]["ci95"]
            assert low <= gain <= high
    assert value["rgb/ce", 8, "run"]["chance"] == pytest.approx(np.log(24), abs=1e-6)
    notes = " ".join(found["notes"])
    assert "left out: 9999" in notes and "10 steps of 4 samples" in notes and '"type": "directed"' in notes
    assert "tables serve no modality" in notes, "ids of the other data set mean something else"
    curve = next(p for p in found["plots"] if p["name"] == "all")
    assert curve["columns"] == [8, 16] and curve["rows"] == ["from demo", "from scratch", "frequencies of ids"] and curve["low"]
    again = evaluate(space, "demo", ["transfer"], settings=SMALL).results[0].model_dump(mode="json")
    assert again["metrics"] == found["metrics"] and again["plots"] == found["plots"]


def test_nothing_learned_is_the_run_as_it_was(space):
    """At a learning rate of nothing, a transfer to the run's own modalities scores as the run does."""
    opened = open_run(space, "demo")
    context = Context(opened, "test", None, 0, lambda *a: None)
    options = Probe.Options(data="scenes", modalities=context.names[::-1], sizes=[8], steps=10, batch=4, rates=[1e-9])
    found = Probe(options).measure(context)
    got = {m.setting["from"]: m for m in found.metrics if m.name == "all/ce"}
    config = _config(context, context.dataset, context.names[::-1], options)
    assert config.masking == opened.config.masking, "masks of the run's own, where they fit"
    test = TokenData(context.dataset, "test", context.names[::-1])
    scored = Scored(test, Mixture(config.masking, test.layout), context)
    column = np.concatenate([np.arange(context.layout.columns)[context.layout.slice(n)] for n in scored.layout.names])
    inverse = np.argsort(column)
    nll = context.slot_nll(scored.shown_NC[:, inverse], scored.asked_NC[:, inverse])
    assert got["run"].value == pytest.approx(np.nanmean(nll), abs=1e-4)
    assert got["scratch"].value != pytest.approx(got["run"].value, abs=1e-4)
    assert "0 are drawn" in " ".join(found.notes)


def test_few_samples_are_those_of_the_data(space):
    data = TokenData(space.dataset("other"), "train", ["rgb", "caption"])
    few = Few(data, np.array([4, 7, 30]))
    ids, length = few.read(np.array([2, 0]))
    want, lengths = data.read(np.array([30, 4]))
    assert np.array_equal(ids, want) and np.array_equal(length, lengths) and len(few) == 3 and few.key(1) == data.key(7)
    assert np.array_equal(few.lengths(slice(1, 3)), data.lengths(np.array([7, 30])))


def test_frequencies_of_ids_are_those_of_the_few(space):
    context = Context(open_run(space, "demo"), "test", None, 0, lambda *a: None)
    names = ["rgb", "caption"]
    train, test = (TokenData(space.dataset("other"), s, names) for s in ("train", "test"))
    options = Probe.Options(data="other", modalities=names)
    scored = Scored(test, Mixture(_config(context, space.dataset("other"), names, options).masking, test.layout), context)
    found = scored.unigram(Few(train, np.array([3])))
    ids, length = train.read(np.array([3]))
    n, c = np.argwhere(scored.asked_NC & (test.layout.modality_C == 0))[0]
    count = (ids[0, :16] == scored.ids_NC[n, c]).sum()
    assert found[n, c] == pytest.approx(-np.log((count + 0.5) / (16 + 12))), "add one half to each of 24 ids"
    assert np.array_equal(np.isnan(found), ~scored.asked_NC)


def test_what_is_missing_is_said(space, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown data set 'nowhere'"):
        evaluate(space, "demo", ["transfer"], settings=["transfer.data=nowhere"])
    with pytest.raises(DataError, match="no touch tokens of split train"):
        evaluate(space, "demo", ["transfer"], settings=["transfer.modalities=[rgb,touch]"])
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(space.root / "runs", alone / "runs")
    (alone / "data").mkdir()
    (alone / "data" / "scenes").symlink_to(space.root / "data" / "scenes")
    with pytest.raises(DataError, match="no other data set to transfer to"):
        evaluate(Workspace(alone), "demo", ["transfer"])
    assert Probe.costly, "it runs where it is named, never by default"
