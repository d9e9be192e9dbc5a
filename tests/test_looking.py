"""What is seen inside a model: attention weights, layers as answers, geometry; against slow references and known answers."""

import numpy as np
import pytest
import torch
from test_siblings import LAYOUT
from test_siblings import make as sibling
from test_siblings import samples as rows_of

from nano4m_cli.masking._base import Key
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.model.attention import Mask, attend, weights
from nano4m_cli.model.batch import Ragged, pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.probes._trace import answers_by_layer
from nano4m_cli.probes.attention import Shares, add_batch, looking, uniform_shares, watched
from nano4m_cli.probes.geometry import alignment, cka, effective_rank, gap, hsic, jackknife, uniformity
from nano4m_cli.probes.lens import _likeliest

# -- attention --------------------------------------------------------------------------------------------------------


def fourm(layout, **options):
    torch.manual_seed(0)
    model = FourM(FourMConfig(**{"size": "d2-2w32", "head_width": 16, **options}), layout).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("name", ["self", "causal", "cross", "blocks", "no keys"])
def test_weights_times_values_are_attention(name):
    q, k = Ragged.of(np.array([3, 1, 5])), Ragged.of(np.array([4, 2]))
    mask = {"self": lambda: Mask(q, q), "causal": lambda: Mask(q, q, causal=torch.tensor([True, False, True])),
            "cross": lambda: Mask(q, k, k_row=torch.tensor([1, 0, 1])),
            "blocks": lambda: Mask(q, q, block=torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 1])),
            "no keys": lambda: Mask(q, Ragged.of(np.array([2, 0, 1])))}[name]()
    torch.manual_seed(0)
    x, y, v = torch.randn(9, 8), torch.randn(int(mask.k.lengths.sum()), 8), torch.randn(int(mask.k.lengths.sum()), 8)
    found, values = weights(x, y, 2, mask), v.split(mask.k.lengths.tolist())
    out = []
    for i, w in enumerate(found):
        mine = values[i if mask.k_row is None else int(mask.k_row[i])]
        assert w.shape == (2, int(mask.q.lengths[i]), len(mine))
        assert not len(mine) or torch.allclose(w.sum(-1), torch.ones(w.shape[:2]))
        out.append((w @ mine.unflatten(1, (2, 4)).transpose(0, 1)).transpose(0, 1).flatten(1))
    torch.testing.assert_close(torch.cat(out), attend(x, y, v, 2, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "positions": "rope"}])
def test_what_is_watched_gives_each_layers_own_output(layout, sample, options):
    model, (ids, _, shown, asked) = fourm(layout, **options), sample(5)
    modules, outs = [m for part in looking(model).values() for m in part], []
    handles = [m.register_forward_hook(lambda module, args, out: outs.append(out)) for m in modules]
    batch = pack(layout, ids, shown, asked, 1)
    with watched(modules) as seen, torch.no_grad():
        want = model.answers(batch)
    for h in handles:
        h.remove()
    assert len(seen) == len(outs) == 4
    for module, (mask, shares, v), out in zip(modules, seen, outs, strict=True):
        values, rows = v.split(mask.k.lengths.tolist()), []
        for w, mine in zip(shares, values, strict=True):
            rows.append((w @ mine.unflatten(1, (module.heads, -1)).transpose(0, 1)).transpose(0, 1).flatten(1))
        torch.testing.assert_close(module.out(torch.cat(rows)), out, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.answers(batch), want), "looking changes nothing, and leaves nothing behind"
    assert not any(m._forward_pre_hooks for m in modules)


def drawn(layout, length, n):
    mixture = Mixture(MaskingConfig(components=[{"type": "dirichlet", "input": [6, 20], "target": [4, 16]}]), layout)
    return mixture.draw(length, Key(0, "t", np.arange(n)))


def test_a_model_without_queries_attends_uniformly(layout, sample):
    model, (ids, length, _, _) = fourm(layout), sample(8)
    with torch.no_grad():
        for part in looking(model).values():
            for m in part:
                m.q.weight.zero_()
    shown, asked = drawn(layout, length, 8)
    layers = {p: [Shares(8, 5, 2) for _ in m] for p, m in looking(model).items()}
    batch = pack(layout, ids, shown, asked, 1)
    add_batch(layers, model, batch, np.arange(8))
    for part in ("encoder", "decoder"):
        for layer in layers[part]:
            np.testing.assert_allclose(layer.share, layer.uniform, atol=1e-5)
            assert (layer.entropy.mean(1) / layer.choices).tolist() == pytest.approx([1.0] * 8, abs=1e-5)
            (even, away) = layer.metrics("x", 4)
            assert away.value == pytest.approx(away.chance, abs=1e-5) and even.value == pytest.approx(1.0, abs=1e-5)
    # what is uniform, by counting: sample 3's encoder, from pictures to sounds
    pic, snd = (shown[3, layout.slice(m)].sum() for m in ("pic", "snd"))
    total = shown[3].sum() + 1
    assert layers["encoder"][0].uniform[3, 0, 1] == pytest.approx(pic * snd / total)
    assert layers["encoder"][0].count[3, 0, 1] == pic * (snd > 0) and pic * snd > 0
    assert layers["decoder"][0].uniform[3, 2, 4] == pytest.approx(asked[3, layout.slice("txt")].sum() / total), "the register"


def test_all_attention_of_a_token_is_counted_once(layout, sample):
    model, (ids, length, _, _) = fourm(layout), sample(6)
    shown, asked = drawn(layout, length, 6)
    layers = {p: [Shares(6, 5, 2) for _ in m] for p, m in looking(model).items()}
    add_batch(layers, model, pack(layout, ids, shown, asked, 1), np.arange(6))
    for part, looks in (("encoder", shown), ("decoder", asked)):
        tokens = looks.sum(1) + (part == "encoder")
        for layer in layers[part]:
            np.testing.assert_allclose(layer.share.sum((1, 2)), tokens, rtol=1e-5)
            np.testing.assert_allclose(layer.uniform.sum((1, 2)), tokens, rtol=1e-5)
            assert (layer.away <= layer.away_count + 1e-9).all() and (layer.choices <= tokens).all()
            assert np.nanmax(layer.mean(layer.share)) <= 1 and layer.entropy.max() <= 1.001 * tokens.max()


@pytest.mark.parametrize("kind", [GPT, MaskGIT])
def test_stacks_are_watched_in_rows_of_all_their_tokens(kind):
    model = sibling(kind)
    ids, there = rows_of(4)
    early = np.arange(LAYOUT.columns) < LAYOUT.slice("audio").start
    layers = {"stack": [Shares(4, 4, 4) for _ in model.blocks]}
    add_batch(layers, model, pack(LAYOUT, ids, there & early, there & ~early), np.arange(4))
    tokens = there.sum(1)
    for layer in layers["stack"]:
        np.testing.assert_allclose(layer.share.sum((1, 2)), tokens, rtol=1e-5)
        ahead = np.triu(np.ones((4, 4)), 1).astype(bool)
        assert (layer.share[:, ahead].sum() == 0) == (kind is GPT), "a causal stack sees no later modality"


def test_uniform_shares_of_a_causal_row_are_one_over_how_many_came_before():
    rows = Ragged.of(np.array([3]))
    (u,) = uniform_shares(Mask(rows, rows, causal=torch.tensor([True])))
    torch.testing.assert_close(u[0], torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]))


# -- lens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fourm", GPT, MaskGIT])
def test_the_last_layer_of_the_lens_is_the_models_own_loss(layout, sample, kind):
    if kind == "fourm":
        model, (ids, _, shown, asked) = fourm(layout), sample(5)
        batch = pack(layout, ids, shown, asked, 1)
    else:
        model, (ids, there) = sibling(kind), rows_of(5)
        early = np.arange(LAYOUT.columns) < LAYOUT.slice("audio").start
        batch = pack(LAYOUT, ids, there & early, there & ~early)
    layers = answers_by_layer(model, batch)
    with torch.no_grad():
        assert len(layers) == 3 and torch.equal(model.nll_of(batch, layers[-1]), model.nll(batch))
        assert torch.equal(layers[-1], model.answers(batch))
        assert not torch.allclose(model.nll_of(batch, layers[0]), model.nll(batch))
        best = torch.zeros_like(batch.dec_ids)
        for index, logits in zip(batch.group_index, model(batch), strict=True):
            if index is not None:
                best[index] = logits.argmax(-1)
        assert torch.equal(_likeliest(model, batch, layers[-1]), best)


def test_a_middle_layer_of_the_lens_is_a_model_that_ends_there(layout, sample):
    model, (ids, _, shown, asked) = fourm(layout), sample(4)
    batch = pack(layout, ids, shown, asked, 1)
    middle = answers_by_layer(model, batch)[1]
    model.decoder = model.decoder[:1]
    with torch.no_grad():
        torch.testing.assert_close(model.answers(batch), middle)


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_effective_rank_of_what_is_known():
    rng = np.random.default_rng(0)
    assert effective_rank(rng.normal(size=(20_000, 12))) == pytest.approx(12, rel=1e-3)
    assert effective_rank(np.outer(rng.normal(size=50), rng.normal(size=8)) + 3.0) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.ones((9, 4))) == 0
    two = np.concatenate([np.eye(2), -np.eye(2)]) @ np.array([[3.0, 0, 0], [0, 1, 0]])  # singular values 3 : 1
    assert effective_rank(two) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_the_gap_is_zero_for_one_distribution_and_the_distance_else():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 16))
    assert gap(a, a.copy()) == 0
    below, squared = 0, []
    for _ in range(200):
        a, b = rng.normal(size=(2, 30, 16))
        d = a - b
        squared.append(((d.sum(0) ** 2).sum() - (d**2).sum()) / (30 * 29))
        below += gap(a, b) == 0
    assert abs(np.mean(squared)) < 4 * np.std(squared) / np.sqrt(200) and below > 60, "no bias from finite samples"
    shift = np.zeros(16)
    shift[0] = 6.0
    assert gap(a + shift, b) == pytest.approx(6 / 4, rel=0.1)  # spread: the root of 16 variances of 1
    assert gap((a + shift) * 7, b * 7) == pytest.approx(gap(a + shift, b)), "of no scale"
    slow = [(a[i] + shift - b[i]) @ (a[j] + shift - b[j]) for i in range(30) for j in range(30) if i != j]
    within = (a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()) / 2
    assert gap(a + shift, b) == pytest.approx(np.sqrt(np.mean(slow) / within))


def test_cka_is_one_of_a_rotation_and_zero_of_what_is_independent():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 6))
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert cka(a, 3 * a @ q + 5) == pytest.approx(1)
    values = [cka(rng.normal(size=(30, 12)), rng.normal(size=(30, 12))) for _ in range(100)]
    assert abs(np.mean(values)) < 0.03, "the biased one gives 0.3 here"


def test_hsic_equals_its_sum_over_four_tuples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 3))
    k, l = x @ x.T, y @ y.T
    n, each = 7, []
    from itertools import permutations

    for i, j, q, r in permutations(range(n), 4):
        each.append(k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q])
    assert hsic(k, l) == pytest.approx(np.mean(each))


def test_alignment_and_uniformity_by_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 4))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    assert alignment(a, b) == pytest.approx(np.mean([((u[i] - v[i]) ** 2).sum() for i in range(9)]))
    each = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(a) == pytest.approx(np.log(np.mean(each)))
    assert uniformity(np.ones((5, 3))) == pytest.approx(0) and alignment(a, a) == 0 and alignment(a, -a) == pytest.approx(4)


def test_jackknife_of_a_mean_is_its_usual_interval():
    x = np.random.default_rng(0).normal(size=(200, 1))
    value, (low, high) = jackknife(lambda a: float(a.mean()), [x], groups=200)
    assert value == x.mean() and (high - low) / 2 == pytest.approx(1.96 * x.std(ddof=1) / np.sqrt(200))
    _, few = jackknife(lambda a: float(a.mean()), [x])
    assert (few[1] - few[0]) == pytest.approx(high - low, rel=0.5)


def test_a_bidirectional_probe_model_is_what_the_fixtures_make(layout):
    """The reference model attends: with its queries as drawn, attention is not uniform (so the tests above could fail)."""
    model = fourm(layout)
    x, rows = torch.randn(6, 32), Ragged.of(np.array([6]))
    shares, _ = model.encoder[0].attn.look(x, Mask(rows, rows))
    assert (shares[0] - 1 / 6).abs().max() > 0.05
