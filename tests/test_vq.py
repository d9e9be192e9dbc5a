"""Vector quantisers against plain loops, and the tokenizers that are trained with them, alone and against a critic."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run
from workspace_factory import one_thread, records, tiny, weights  # noqa: F401

from nano4m_cli.config import build, load_yaml
from nano4m_cli.errors import CheckpointError, ConfigError, MediaError, TrainingError
from nano4m_cli.tokenizers._adversary import PatchCritic, SpectralCritic, adaptive_weight, feature_distance, hinge
from nano4m_cli.tokenizers._base import codebook_use, open_tokenizer, save_tokenizer
from nano4m_cli.tokenizers._seanet import SpectralLoss
from nano4m_cli.tokenizers._vq import RECENT, ResidualVQ, VectorQuantizer, dead_notice, entropy_gap
from nano4m_cli.tokenizers._vqgan import VQGAN, differences
from nano4m_cli.tokenizers.rvq_wave import Tokenizer as Wave
from nano4m_cli.tokenizers.vqgan import Tokenizer as Pictures
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.loop import Stopped, Trainer
from nano4m_cli.train.tasks import TokenizerTask

pytestmark = pytest.mark.usefixtures("one_thread")
REPO = Path(__file__).parents[1]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(codes=8, dim=3, **options):
    """A quantiser past its first update, with a codebook that is known."""
    vq = VectorQuantizer(codes, dim, **options)
    vq.book.copy_(vq.placed(noise(codes, dim, seed=9)))
    vq.updates.fill_(1)
    return vq


# -- the quantiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_the_nearest(cosine):
    vq, z = started(cosine=cosine).eval(), noise(4, 5, 3)
    quantised, codes, loss = vq(z)
    error = 0.0
    for i in range(4):
        for j in range(5):
            v = z[i, j] / z[i, j].norm() if cosine else z[i, j]
            distance = [float(((v - e) ** 2).sum()) for e in vq.book]
            assert int(codes[i, j]) == int(np.argmin(distance))
            torch.testing.assert_close(quantised[i, j], vq.book[codes[i, j]])
            error += min(distance) / (20 * 3)
    assert float(loss) == pytest.approx(0.25 * error, rel=1e-5)
    assert torch.equal(vq.encode(z), codes) and torch.equal(vq.decode(codes), vq.book[codes])
    assert len(codes.unique()) > 3


def test_the_gradient_passes_straight_through():
    vq, z = started(commitment=0.5), noise(6, 3).requires_grad_()
    before = vq.book.clone()
    quantised, codes, loss = vq(z)
    (2 * quantised.sum() + loss).backward()
    wanted = 2 + 0.5 * 2 * (z.detach() - before[codes]) / z.numel()
    torch.testing.assert_close(z.grad, wanted)


def test_moving_averages_are_the_formula():
    """Codes are quotients of the moving averages of sums and counts, kept here as two tables."""
    vq = started(decay=0.9, revive=0)
    vq.count.fill_(2.0)
    count, total = vq.count.double().clone(), (vq.count[:, None] * vq.book).double()
    use = torch.zeros(8, dtype=torch.float64)
    for step in range(5):
        z = noise(20, 3, seed=step)
        codes = vq.encode(z)
        for k in range(8):
            mine = z[codes == k].double()
            count[k] = 0.9 * count[k] + 0.1 * len(mine)
            total[k] = 0.9 * total[k] + 0.1 * mine.sum(0)
            use[k] = 0.9 * use[k] + 0.1 * len(mine)
        vq(z)
        torch.testing.assert_close(vq.count.double(), count, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vq.book.double(), total / count[:, None], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vq.use.double(), use, rtol=1e-5, atol=1e-6)
    assert int(vq.updates) == 6
    book = vq.book.clone()
    vq.eval()(noise(20, 3))
    assert torch.equal(vq.book, book) and int(vq.updates) == 6, "nothing moves outside training"


def test_cosine_codes_stay_on_the_sphere():
    vq = VectorQuantizer(16, 4, cosine=True)
    for step in range(10):
        vq(noise(64, 4, seed=step))
    torch.testing.assert_close(vq.book.norm(dim=-1), torch.ones(16))


def clustered(n=256, clusters=32, seed=0):
    """Vectors around 32 points, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    centre = noise(clusters, 4, seed=77) * 3 + 10
    return centre[torch.randint(clusters, (n,), generator=g)] + 0.1 * torch.randn(n, 4, generator=g)


def after(revive, steps=150, **options):
    """A badly begun codebook (all codes in one far place) after so many updates, and its error on new vectors."""
    vq = VectorQuantizer(32, 4, revive=revive, **options)
    vq.book.copy_(0.01 * noise(32, 4, seed=5))
    vq.updates.fill_(1)
    for step in range(steps):
        vq(clustered(seed=step))
    vq.eval()
    z = clustered(seed=999)
    return vq, float((vq(z)[0] - z).square().mean()), codebook_use(vq.encode(z)[:, None].numpy(), 32)


def test_revival_revives():
    dead, far, few = after(revive=0)
    alive, near, many = after(revive=10)
    assert few["codes_used"] < 0.3 and dead.usage()["codes_used"] < 0.3, (few, dead.usage())
    assert many["codes_used"] > 0.9 and alive.usage()["codes_used"] > 0.9, (many, alive.usage())
    assert many["perplexity"] > 20 > 3 * few["perplexity"] and near < far / 10
    assert "nearly dead" in dead_notice("rgb", {"codes_used": 0.1, "perplexity": 2.0})
    assert dead_notice("rgb", alive.usage()) is None


def test_the_first_update_takes_codes_from_what_it_sees():
    z = clustered(40)
    vq = VectorQuantizer(32, 4)
    vq(z)
    assert all(any(torch.equal(e, v) for v in z) for e in vq.book) and len(vq.book.unique(dim=0)) == 32
    few = VectorQuantizer(32, 4)
    few(z[:5])
    assert sum(any(torch.equal(e, v) for v in z[:5]) for e in few.book) == 5


def test_a_code_that_was_only_moved_counts_as_unused():
    vq = started(revive=3)
    far = torch.tensor([[100.0, 0, 0]])
    for _ in range(RECENT + 10):
        vq(far.repeat(4, 1))
    assert vq.usage()["codes_used"] <= 2 / 8 and vq.usage()["perplexity"] < 1.5


def test_updates_are_a_function_of_state_and_batch():
    """Ambient randomness plays no part, and a quantiser loaded from its state goes on as the one it was."""
    one, other = VectorQuantizer(32, 4, revive=2), VectorQuantizer(32, 4, revive=2)
    other.load_state_dict(one.state_dict())
    for step in range(12):
        torch.manual_seed(step)
        one(clustered(16, seed=step))
        if step == 6:
            again = VectorQuantizer(32, 4, revive=2)
            again.load_state_dict(other.state_dict())
            other = again
        torch.manual_seed(1000 + step)
        other(clustered(16, seed=step))
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True)), step


def test_entropy_is_least_for_sure_and_even_choices():
    z = torch.eye(4) * 5
    even, one = VectorQuantizer(4, 4, entropy=1.0), VectorQuantizer(4, 4)
    even.book.copy_(torch.eye(4) * 5)
    gap = float(entropy_gap(even.distances(z)))
    assert gap == pytest.approx(-math.log(4), abs=1e-3)
    assert float(entropy_gap(even.distances(z[:1].repeat(4, 1)))) == pytest.approx(0, abs=1e-3), "even use is missing"
    assert float(entropy_gap(torch.zeros(4, 4))) == pytest.approx(0, abs=1e-6), "sureness is missing"
    x = (z + 0.3 * noise(4, 4)).requires_grad_()
    even(x)[2].backward()  # the update that came between does not disturb the gradient
    assert torch.isfinite(x.grad).all() and one(x)[2] < 1


def test_residual_quantisation_is_the_loop():
    rvq = ResidualVQ(3, 16, 4)
    for step in range(20):
        rvq(noise(64, 4, seed=step))
    rvq.eval()
    z = noise(5, 7, 4, seed=50)
    quantised, codes, loss = rvq(z)
    rest, total, losses = z.clone(), torch.zeros_like(z), []
    for q, book in enumerate(rvq.books):
        distance = ((rest[..., None, :] - book.book) ** 2).sum(-1)
        assert torch.equal(distance.argmin(-1), codes[..., q])
        chosen = book.book[codes[..., q]]
        losses.append(0.25 * float(((rest - chosen) ** 2).mean()))
        rest, total = rest - chosen, total + chosen
    torch.testing.assert_close(quantised, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rvq.decode(codes), total)
    assert torch.equal(rvq.encode(z), codes) and float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert losses[2] < losses[1] < losses[0], "each level leaves less"
    x = z.clone().requires_grad_()
    rvq(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    rvq(x)[2].backward()
    left = [z - sum(b.book[codes[..., q]] for q, b in enumerate(rvq.books[: n + 1])) for n in range(3)]
    wanted = sum(2 * 0.25 * r / z.numel() for r in left) / 3
    torch.testing.assert_close(x.grad, wanted, atol=1e-7, rtol=1e-3)


def test_residual_books_draw_different_numbers():
    rvq = ResidualVQ(2, 8, 4)
    assert [b.stream for b in rvq.books] == ["vq0", "vq1"]


def test_quantisers_agree_with_the_library_where_it_is_installed():
    lib = pytest.importorskip("vector_quantize_pytorch")
    theirs = lib.VectorQuantize(dim=4, codebook_size=16, decay=0.9, threshold_ema_dead_code=0, commitment_weight=1.0)
    mine, z = started(16, 4), noise(1, 40, 4)
    mine.book.copy_(theirs.codebook)
    assert torch.equal(theirs.eval()(z)[1], mine.eval()(z)[1])


def test_codebook_use_is_counted():
    ids = np.array([[0, 1], [0, 1], [1, 1], [1, 1]])
    assert codebook_use(ids, 4) == {"codes_used": pytest.approx(3 / 8), "perplexity": pytest.approx(1.5)}


# -- losses and critics -----------------------------------------------------------------------------------------------


def test_hinge_and_feature_distance_are_the_formulas():
    real, made = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.0])]
    assert float(hinge(real, made)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    assert float(feature_distance(made, real)) == pytest.approx((5 + 0.5) / 2 / 1.25)


def test_the_adaptive_weight_brings_gradients_to_one_size():
    last, x = torch.nn.Parameter(noise(3, 3)), noise(5, 3, seed=1)
    y = x @ last
    reconstruction, fooled = (y - 1).square().mean(), -1000 * y.mean()
    weight = adaptive_weight(reconstruction, fooled, last)
    a, b = (torch.autograd.grad(f, last, retain_graph=True)[0].norm() for f in (reconstruction, weight * fooled))
    assert float(a) == pytest.approx(float(b), rel=1e-3) and not weight.requires_grad


def test_structure_sees_edges_and_not_brightness():
    flat, edge = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 0.5
    assert float(differences(flat)) == 0 and float(differences(edge)) > 0.05


def test_spectral_loss_hears_pitch_and_not_a_sample_of_delay():
    t, loss = torch.arange(6000) / 24_000, SpectralLoss()
    tone = lambda hz: (0.3 * torch.sin(2 * math.pi * hz * t))[None]  # noqa: E731
    late, other = float(loss(tone(440).roll(1), tone(440))), float(loss(tone(660), tone(440)))
    assert 10 * late < other and float(loss(tone(440), tone(440))) == 0
    x = torch.zeros(1, 3000, requires_grad=True)
    loss(x, tone(440)[:, :3000]).backward()
    assert torch.isfinite(x.grad).all(), "silence has a gradient"


def test_critics_learn_to_tell():
    """A few steps of the hinge loss: real above made, at every scale."""
    for critic, real, made in (
        (PatchCritic(3, 8), torch.ones(4, 3, 16, 16) + 0.1 * noise(4, 3, 16, 16), noise(4, 3, 16, 16)),
        (SpectralCritic((256, 128), 4), torch.sin(torch.arange(500) / 5).repeat(4, 1) + 0.1 * noise(4, 500), noise(4, 500)),
    ):
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
        for _ in range(12):
            loss = hinge(critic(real)[0], critic(made)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.5
        with torch.no_grad():
            scores = zip(critic(real)[0], critic(made)[0], strict=True)
        assert all(float(r.mean()) > float(m.mean()) for r, m in scores)


# -- the tokenizers ---------------------------------------------------------------------------------------------------

SMALL = dict(downsample=4, stem=2, width=16, codes=32, dim=8)
SHORT = dict(strides=(8, 5, 4), width=8, dim=8, codebooks=2, codes=32, window=640)


def picture(seed, size=16):
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    rng = np.random.default_rng(seed)
    disc = ((x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2 < 0.09)[..., None]
    return np.where(disc, rng.uniform(120, 255, 3), 90 * (x + y)[..., None] / 2).astype(np.uint8)


def sound(seed, n=1200):
    rng, t = np.random.default_rng(seed), np.arange(n) / 24_000
    return (0.4 * np.sin(2 * np.pi * rng.uniform(200, 800) * t) * np.exp(-5 * t)).astype(np.float32)


def fitted(which, n=48, seed=0, **options):
    torch.manual_seed(seed)
    if which == "pictures":
        tokenizer = Pictures("rgb", Pictures.Options(**{**SMALL, **options}), {"size": [16, 16]})
        tokenizer.fit([picture(i) for i in range(n)])
    else:
        tokenizer = Wave("audio", Wave.Options(**{**SHORT, **options}), {"seconds": 0.05})
        tokenizer.fit([sound(i) for i in range(n)])
    return tokenizer


def training(folder, tokenizer, callback=None, resume=False, seed=0, **changes):
    """Train as `fit_tokenizer` does; return the Trainer."""
    usual = dict(steps=8, batch=8, warmup=2, log_every=1, val_every=4, checkpoint_every=4, precision="fp32")
    config = build(TrainConfig, {**usual, **changes}, "test")
    folder.mkdir(exist_ok=True)
    trainer = Trainer(TokenizerTask(tokenizer, seed, config.batch), config, seed, folder, callback=callback)
    if resume:
        trainer.resume()
    trainer.fit()
    return trainer


ADVERSE = dict(adversarial=0.5, feature_matching=1.0, adversarial_start=3)


@pytest.mark.parametrize("which", ["pictures", "sounds"])
@pytest.mark.parametrize("at", [2, 5])
def test_a_stopped_fit_against_a_critic_goes_on_as_if_never_stopped(which, at, tmp_path):
    """Stopped before and after the critic came in."""
    whole = training(tmp_path / "whole", fitted(which, revive=2, **ADVERSE))

    def stop(record):
        if record.kind == "train" and record.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training(tmp_path / "cut", fitted(which, revive=2, **ADVERSE), stop)
    tokenizer = fitted(which, revive=2, **ADVERSE)
    torch.manual_seed(999)
    training(tmp_path / "cut", tokenizer, resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert "critic.safetensors" in weights(tmp_path / "whole")[1]
    for a, b in zip(whole.critic.parameters(), tokenizer.critic.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = records(tmp_path / "whole", "train")
    assert [("critic" in r and "fooled" in r) for r in lines] == [False] * 3 + [True] * 5
    assert all(0 < r["codes_used"] <= 1 and 1 <= r["perplexity"] <= 32 for r in lines)
    assert all({"codes_used", "perplexity", "mse"} <= set(r) for r in records(tmp_path / "whole", "val"))


def test_the_critic_moves_and_the_tokenizer_feels_it(tmp_path):
    alone, judged = fitted("pictures"), fitted("pictures", **ADVERSE)
    assert alone.critic is None
    before = [p.detach().clone() for p in judged.critic.parameters()]
    states = {}
    for name, tokenizer in (("alone", alone), ("judged", judged)):
        training(tmp_path / name, tokenizer)
        states[name] = tokenizer.module.state_dict()
    assert all(not torch.equal(a, b) for a, b in zip(before, judged.critic.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*(s.values() for s in states.values()), strict=True))
    lines = {n: records(tmp_path / n, "train") for n in states}
    assert [r["loss"] for r in lines["alone"][:3]] == [r["loss"] for r in lines["judged"][:3]], "equal until it starts"
    assert lines["alone"][4]["loss"] != lines["judged"][4]["loss"]


def test_the_critic_is_not_saved_with_the_tokenizer(tmp_path):
    tokenizer = fitted("pictures", **ADVERSE)
    save_tokenizer(tokenizer, tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.critic is None and not any("critic" in k for k in again.module.state_dict())


def test_a_run_without_a_critic_is_not_resumed_with_one(tmp_path):
    training(tmp_path / "run", fitted("pictures"), steps=4)
    with pytest.raises(CheckpointError, match="has no critic"):
        training(tmp_path / "run", fitted("pictures", **ADVERSE), resume=True)


def test_tiny_overfit(tmp_path):
    """Eight samples are learned by heart, the sounds as waveforms: a spectrum alone would leave their error where it was."""
    for which, options in (("pictures", {}), ("sounds", dict(window=1200, width=16, time=30.0))):
        tokenizer = fitted(which, n=8, **options)
        spread = float((tokenizer.data.float() - tokenizer.data.float().mean(0)).square().mean())
        training(tmp_path / which, tokenizer, steps=60, lr=8e-3, log_every=60, val_every=60, checkpoint_every=60)
        last = records(tmp_path / which, "val")[-1]
        assert last["mse"] < 0.6 * spread and last["codes_used"] > 0.5, (which, last, spread)


@pytest.mark.parametrize("which", ["pictures", "sounds"])
def test_encoding_alone_is_encoding_in_a_batch(which):
    tokenizer = fitted(which)
    tokenizer.train_loss(torch.arange(32), 0)  # codes of its own data
    tokenizer.module.eval()
    raws = [picture(i) if which == "pictures" else sound(i) for i in range(100, 112)]
    together = tokenizer.encode(raws)
    assert all(np.array_equal(tokenizer.encode([r])[0], ids) for r, ids in zip(raws, together, strict=True))
    assert len({tuple(i) for i in together}) > 6
    back, alone = tokenizer.decode(together), [tokenizer.decode([i])[0] for i in together]
    assert all(np.array_equal(a, b) for a, b in zip(back, alone, strict=True))


def test_windows_are_drawn_by_step_and_row():
    tokenizer = fitted("sounds")
    index = torch.tensor([3, 11, 3])
    cut = tokenizer._cut(index, 5)
    assert cut.shape == (3, 640) and torch.equal(cut[0], cut[2])
    where = [i for i in range(641) if torch.equal(tokenizer.data[11, i : i + 640], cut[1])]
    assert len(where) == 1
    assert torch.equal(tokenizer._cut(index[1:2], 5)[0], cut[1]), "whatever else is in the batch"
    assert not torch.equal(tokenizer._cut(index, 6), cut)
    short = fitted("sounds", window=10**6)
    assert torch.equal(short._cut(index, 5), short.data[index])


@pytest.mark.parametrize("form", ["metres", "vectors", "grey"])
def test_vqgan_takes_every_form_of_picture(form, tmp_path):
    modality = {"metres": "depth", "vectors": "normal", "grey": "edges"}[form]
    raws = [picture(i) for i in range(16)]
    if form == "metres":
        raws = [2 + r[..., 0].astype(np.float32) / 60 for r in raws]
    elif form == "grey":
        raws = [r[..., 0] for r in raws]
    else:
        raws = [np.dstack([r[..., :2] / 255 - 0.5, np.ones((16, 16))]).astype(np.float32) for r in raws]
        raws = [r / np.linalg.norm(r, axis=-1, keepdims=True) for r in raws]
    tokenizer = Pictures(modality, Pictures.Options(**SMALL), {"size": [16, 16]})
    tokenizer.fit(raws)
    save_tokenizer(tokenizer, tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.form == form
    back = again.decode(again.encode(raws[:2]))[0]
    assert back.shape == raws[0].shape and back.dtype == raws[0].dtype
    if form == "metres":
        assert raws[0].min() * 0.9 < back.min() and back.max() < 1.1 * max(r.max() for r in raws)


@pytest.mark.parametrize("downsample, stem", [(4, 4), (8, 2), (16, 1), (16, 4)])
def test_vqgan_has_one_code_per_square(downsample, stem):
    net = VQGAN(3, (32, 64), downsample, stem, 8, 1, 16, 4, {}).eval()
    x = noise(2, 3, 32, 64)
    z = net.latent(x)
    assert z.shape == (2, 32 // downsample, 64 // downsample, 4) and net.picture(net.vq(z)[0]).shape == x.shape


def test_the_last_sample_is_kept_when_frames_do_not_divide():
    tokenizer = Wave("audio", Wave.Options(**SHORT), {"seconds": 1000 / 24_000})
    tokenizer.fit([sound(i, 1000) for i in range(4)])
    assert tokenizer.spec().shape == (7, 2) and tokenizer.data.shape == (4, 1120)
    assert tokenizer.decode(tokenizer.encode([sound(1, 1000)]))[0].shape == (1000,)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="do not divide into patches of 16") as caught:
        Pictures("rgb", Pictures.Options(), {"size": [40, 40]})
    assert "rgb.downsample" in caught.value.hint
    with pytest.raises(ConfigError, match="rvq_wave serves sounds"):
        Wave("rgb", Wave.Options(), {"size": [16, 16]})
    with pytest.raises(ConfigError, match="every stride must be at least 2"):
        build(Wave.Options, {"strides": [8, 1]}, "test")
    for options in ({"downsample": 5}, {"codes": 1}, {"adversarial": -1}, {"stem": 3}):
        with pytest.raises(ConfigError):
            build(Pictures.Options, options, "test")
    bad = sound(0)
    bad[7] = np.nan
    with pytest.raises(MediaError, match="sample 'k'.*not finite"):
        fitted("sounds").encode([bad], ["sample 'k'"])
    with pytest.raises(MediaError, match="the train split"):
        Wave("audio", Wave.Options(**SHORT), {"seconds": 0.05}).fit([bad])


@pytest.mark.parametrize("poison", ["model", "critic"])
def test_a_loss_that_is_not_finite_stops_and_keeps_a_good_codebook(poison, tmp_path):
    tokenizer = fitted("pictures", **{**ADVERSE, "adversarial_start": 0})

    def spoil(record):
        if record.kind == "train" and record.step == 6:
            (tokenizer.module.out if poison == "model" else tokenizer.critic.out).weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match="step 7: loss or gradient is not finite.*row "):
        training(tmp_path / "run", tokenizer, spoil)
    point = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert point.state["step"] == 4
    for part in point.tensors.values():
        assert all(bool(torch.isfinite(t).all()) for t in part.values())


# -- the command line -------------------------------------------------------------------------------------------------

FEW = ["train.steps=3", "train.batch=4", "train.log_every=1", "train.val_every=3", "train.checkpoint_every=3", "train.warmup=1"]


def untouched(workspace, root):
    """Return the root of a workspace with the raw shards of another, and no tokens."""
    (root / "data" / "scenes").mkdir(parents=True)
    (root / "data" / "scenes" / "raw").symlink_to(workspace.dataset().path / "raw")
    return root


CONFIGS = {
    "rgb_vqgan_f16": ["width=8", "dim=4", "codes=16"],
    "audio_encodec_small": ["width=4", "dim=4", "codes=16", "codebooks=2", "window=2400", "fit_samples=12"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_new_config_trains_at_the_command_line(tiny, tmp_path, name):  # noqa: F811
    root = untouched(tiny, tmp_path / "space")
    critic = ["adversarial=0.3", "feature_matching=1", "adversarial_start=1"]
    options = [f"tokenizer.options.{o}" for o in [*CONFIGS[name], *critic]]
    config = REPO / "cfgs" / "tokenizers" / f"{name}.yaml"
    modality = load_yaml(config)["tokenizer"]["modality"]
    result = run("train", config, *FEW, *options, "--root", root, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert {"loss", "mse", "codes_used", "perplexity"} <= set(figures) and all(np.isfinite(v) for v in figures.values())
    assert "codes_used" in result.stderr and [r["step"] for r in records(root / "runs" / name, "train")] == [1, 2, 3]
    folder = root / "data" / "scenes" / "tokenizers" / modality
    tokenizer = open_tokenizer(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    result = run("tokenize", "-m", modality, "--root", root, "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["modalities"][modality]
    assert told["tokenizer"] == tokenizer.name and told["made"] == 72
    assert Path(told["sheet"]).is_file() and 0 < told["figures"]["codes_used"] <= 1
    assert ("psnr" if modality == "rgb" else "mel_wave") in told["figures"]


def test_a_dead_codebook_is_told_of(tiny, tmp_path):  # noqa: F811
    root = untouched(tiny, tmp_path / "space")
    options = ["width=8", "dim=4", "codes=512", "revive=0"]  # four pictures of one code each
    config = REPO / "cfgs" / "tokenizers" / "rgb_vqgan_f16.yaml"
    said = run("train", config, *FEW, *[f"tokenizer.options.{o}" for o in options], "--root", root)
    assert said.exit_code == 0, said.output
    assert "notice: the rgb codebook is nearly dead" in said.stderr
