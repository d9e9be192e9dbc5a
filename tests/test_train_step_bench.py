"""The two sides of the training step's bench compute the same: losses and gradients of padded and packed, weights made equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from workspace_factory import one_thread  # noqa: F401

from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.rng import generator
from nano4m_cli.spec import Layout, TokenSpec

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
VOCAB, WIDTH, BUDGET = 60, 32, 24
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def layout():
    specs = [TokenSpec(modality=m, kind="grid", shape=(4, 4), vocab_size=v) for m, v in (("rgb", 60), ("depth", 40))]
    return Layout([*specs, TokenSpec(modality="audio", kind="codes", shape=(8, 2), vocab_size=24)])


def drawn(own, samples=6):
    """Return ids, shown and asked of some samples, their budgets between 4 and BUDGET."""
    masks = MaskingConfig(components=[{"type": "dirichlet", "input": [4, BUDGET], "target": [4, BUDGET]}])
    draw = generator(0, "bench")
    ids = np.concatenate([draw.integers(0, s.vocab_size, (samples, s.slots)) for s in own.specs], 1)
    length = np.tile([s.slots for s in own.specs], (samples, 1))
    return ids, *Mixture(masks, own).draw(length, Key(0, "mask", np.arange(samples)))


def pairs(padded, packed):
    """Yield (name, parameter of padded, parameter of packed) of all parameters."""
    theirs, ours = dict(padded.named_parameters()), dict(packed.named_parameters())
    names = {"embed.weight": "embed.table", "enc_modality.weight": "enc_modality", "dec_modality.weight": "dec_modality",
             "head.weight": "head.table"}
    for name, p in theirs.items():
        same = names.get(name, name.replace(".fc", ".mlp.fc"))
        yield same, p, ours.pop(same)
    assert set(ours) == {"begin", "register_tokens"}  # of text, and unused


@pytest.mark.parametrize("backend", ["padded", "sdpa", "loop"])
def test_padded_and_packed_agree(bench, backend):
    from _padded import Padded4M, pad, shared_ids
    from train_step import one_vocabulary

    own = layout()
    one = one_vocabulary(own, VOCAB)
    ids, shown, asked = drawn(own)
    assert (shown.sum(1) != shown.sum(1)[0]).any() and (asked.sum(1) < BUDGET).any()  # there is something to pad
    together = shared_ids(own, ids)
    assert together.max() < VOCAB and (together != ids).any()
    torch.manual_seed(0)
    packed = FourM(FourMConfig(size=f"d2-2w{WIDTH}", head_width=16, registers=0, attention=backend), one)
    padded = Padded4M(own, WIDTH, 2, 2, 2, VOCAB)
    with torch.no_grad():
        for _, theirs, ours in pairs(padded, packed):
            theirs.copy_(ours)

    batch = pad(own, together, shown, asked, BUDGET, within=True)
    theirs = padded.loss(batch)
    theirs.backward()
    total, count = packed.modality_sums(pack(one, together, shown, asked))
    ours = (total / count.clamp_min(1)).sum() / (count > 0).sum()
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, a, b in pairs(padded, packed):
        assert float(a.grad.norm()) > 1e-6, name
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 1e-5, name
    # What sets them apart otherwise: the field's targets see each other across modalities.
    across = padded.loss(pad(own, together, shown, asked, BUDGET))
    assert float(across.detach()) != pytest.approx(float(theirs.detach()), rel=1e-5)


def test_padding_takes_every_chosen_slot_once(bench):
    from _padded import IGNORE, pad, shared_ids

    own = layout()
    ids, shown, asked = drawn(own)
    together = shared_ids(own, ids)
    batch = pad(own, together, shown, asked, BUDGET)
    for i in range(len(ids)):
        real = batch.asked_ids[i] != IGNORE
        assert batch.asked_ids[i][real].tolist() == together[i, asked[i]].tolist()
        assert batch.asked_col[i][real].tolist() == np.flatnonzero(asked[i]).tolist()
        n = int(shown[i].sum())
        assert batch.shown_ids[i, :n].tolist() == together[i, shown[i]].tolist()
        assert batch.encoder_mask[i].sum(1).unique().tolist() == [n]


def test_flops_are_those_of_the_reference(bench):
    """Padded to 256 and 256 with one head of 50,304, one sample takes 38.3 GFLOP forward."""
    from _reference import forward_flops

    assert forward_flops(512, 6, 6, [256], [256], 256**2, 256 * 50304) == pytest.approx(38.3e9, rel=2e-3)


def test_a_smoke_run_has_all_figures(bench, tmp_path):
    import train_step

    memory = {"padded": 2.0, train_step.OURS: 1.0}
    figures = {f["name"]: f for f in train_step.Bench(tmp_path, train_step.QUICK).run(1, memory, 64)}
    assert {"fp32_speedup", "gemm_share_fp32", "peak_memory_ratio", "useful_tokens_per_s"} <= set(figures)
    assert all(0 < f["low"] <= f["value"] <= f["high"] for f in figures.values())


def test_the_step_on_a_device_has_all_figures(bench, tmp_path):
    """On a CPU it shows that the bench runs; tokens per second and share of the peak come of the same step."""
    import gpu_step
    from _reference import make_tokens

    settings = ["train.workers=0", "model.size=d1-1w64"]
    figures = {f["name"]: f for f in gpu_step.measure(make_tokens(tmp_path, 256), 4, 2, "cpu", settings, 1e12)}
    assert set(figures) == {"b4_tokens_per_s", "b4_mfu", "b4_step", "b4_run_minutes"}
    assert all(0 < f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert figures["b4_run_minutes"]["low"] == pytest.approx(18311 * 64 / 4 * figures["b4_step"]["low"] / 60)
