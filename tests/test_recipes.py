"""Options of the same model: rotary and Fourier positions, init, muP; each against its definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_siblings import LAYOUT, greedy, samples
from test_siblings import make as make_stack

from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError
from nano4m_cli.generate.sampler import GenerateOptions, State, fill
from nano4m_cli.model.attention import Mask
from nano4m_cli.model.base import StackConfig
from nano4m_cli.model.batch import Ragged, pack
from nano4m_cli.model.course4m import CourseConfig
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.layers import Attention
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.model.positions import coordinates, rotate, rotations
from nano4m_cli.spec import Layout, TokenSpec
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.optim import build_optimizers

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(layout, **options) -> FourM:
    torch.manual_seed(0)
    return FourM(FourMConfig(**{"size": "d2-2w32", "head_width": 16, **options}), layout).eval()


# -- coordinates ------------------------------------------------------------------------------------------------------


def test_coordinates_are_on_one_scale_across_modalities():
    layout = Layout([
        TokenSpec(modality="label", kind="grid", shape=(1, 1), vocab_size=5),
        TokenSpec(modality="rgb", kind="grid", shape=(2, 4), vocab_size=5),
        TokenSpec(modality="coarse", kind="grid", shape=(1, 2), vocab_size=5),
        TokenSpec(modality="video", kind="grid", shape=(2, 2, 2), vocab_size=5),
        TokenSpec(modality="audio", kind="codes", shape=(6, 2), vocab_size=5),
        TokenSpec(modality="text", kind="sequence", shape=(20,), vocab_size=5, eos=0),
    ])
    place, axes = coordinates(layout)
    assert axes == ["time", "y", "x", "codebook"]
    of = lambda name: place[layout.slice(name)].tolist()  # noqa: E731
    assert of("label") == [[0, 0, 0, 0]]
    assert of("rgb") == [[0, y, x, 0] for y in range(2) for x in range(4)]
    assert of("coarse") == [[0, 0, 0.5, 0], [0, 0, 2.5, 0]], "a cell lies over the middle of those it covers"
    assert of("video") == [[t, y, x, 0] for t in (1, 4) for y in (0, 1) for x in (0.5, 2.5)], "2 frames span 6 of sound"
    assert of("audio") == [[t, 0, 0, q] for t in range(6) for q in range(2)]
    assert of("text") == [[t, 0, 0, 0] for t in range(20)], "words have their own unit"


def test_only_axes_in_use_share_the_heads():
    text = Layout([TokenSpec(modality="text", kind="sequence", shape=(9,), vocab_size=5, eos=0)])
    turn = rotations(text, 8)
    omega = 10000.0 ** (-np.arange(4) / 4)
    torch.testing.assert_close(turn[:-1, 0], torch.from_numpy(np.cos(np.arange(9)[:, None] * omega)).float())
    torch.testing.assert_close(turn[:-1, 1], torch.from_numpy(np.sin(np.arange(9)[:, None] * omega)).float())
    one = Layout([TokenSpec(modality="label", kind="grid", shape=(1, 1), vocab_size=5)])
    assert coordinates(one)[1] == ["time"] and torch.equal(rotations(one, 8)[:, 0], torch.ones(2, 4))
    with pytest.raises(ConfigError, match=r"rope turns 4 axes \(time, y, x, codebook\), heads of 6 have 3 pairs"):
        rotations(LAYOUT, 6)
    with pytest.raises(ConfigError, match="head_width 15 is odd"):
        build(FourMConfig, {"size": "d1-1w30", "head_width": 15, "positions": "rope"})


# -- rope -------------------------------------------------------------------------------------------------------------


def shares(head_width: int, axes: int) -> list[tuple[int, int]]:
    """Return for each pair (axis, number within its share), larger shares first."""
    pairs = head_width // 2
    return [(a, i) for a in range(axes) for i in range(pairs // axes + (a < pairs % axes))]


def test_rotation_is_the_definition(layout):
    """In complex numbers and float64, pair by pair: x times e^(i place omega)."""
    place, axes = coordinates(layout)
    head, heads = 18, 2
    turn = rotations(layout, head).double()
    x = torch.randn(layout.columns + 1, heads * head, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = rotate(x, heads, turn).view(-1, heads, 2, head // 2)
    assert shares(head, 4)[:3] == [(0, 0), (0, 1), (0, 2)] and shares(head, 4)[-1] == (3, 1)
    for p, (a, i) in enumerate(shares(head, len(axes))):
        n = sum(b == a for b, _ in shares(head, len(axes)))
        omega = (10000.0 if axes[a] == "time" else 100.0) ** (-i / n)
        z = torch.complex(*x.view(-1, heads, 2, head // 2)[:-1, :, :, p].unbind(2))
        want = z * torch.polar(torch.ones(1, dtype=torch.float64), torch.from_numpy(place[:, a] * omega))[:, None]
        torch.testing.assert_close(torch.complex(*got[:-1, :, :, p].unbind(2)), want, atol=1e-6, rtol=0)
    assert torch.equal(got[-1].flatten(), x[-1].view(heads, 2, -1).flatten()), "a register stands still"


def test_scores_depend_on_distances_only(layout):
    """Within a modality and across two that share the axis; with a register they tell the place."""
    turn = rotations(layout, 16)
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 16, generator=g), torch.randn(1, 16, generator=g)
    score = lambda a, b: float((rotate(q, 1, turn[[a]]) * rotate(k, 1, turn[[b]])).sum())  # noqa: E731
    pic = lambda y, x: layout.slice("pic").start + 4 * y + x  # noqa: E731
    snd = lambda t, c: layout.slice("snd").start + 2 * t + c  # noqa: E731
    base = score(pic(1, 2), pic(0, 1))
    assert score(pic(2, 3), pic(1, 2)) == pytest.approx(base, abs=1e-5) and abs(score(pic(1, 2), pic(0, 2)) - base) > 1e-3
    base = score(snd(1, 1), snd(3, 0))
    assert score(snd(2, 1), snd(4, 0)) == pytest.approx(base, abs=1e-5) and abs(score(snd(2, 1), snd(3, 0)) - base) > 1e-3
    word = layout.slice("txt").start
    assert score(word + 2, snd(1, 0)) == pytest.approx(score(word + 4, snd(3, 0)), abs=1e-5)
    assert abs(score(pic(1, 2), -1) - score(pic(2, 2), -1)) > 1e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_turns_queries_by_theirs_and_keys_by_theirs(layout, qk_norm):
    c = FourMConfig(size="d1-1w32", head_width=16, positions="rope", qk_norm=qk_norm, attention="padded")
    torch.manual_seed(0)
    layer, turn = Attention(c, 1.0).double(), rotations(layout, 16).double()
    q_col, k_col = torch.tensor([0, 7, 12, 25]), torch.tensor([-1, 3, 22, 30, 9, 13])
    x, context = torch.randn(4, 32, dtype=torch.float64), torch.randn(6, 32, dtype=torch.float64)
    mask = Mask(Ragged.of([1, 3]), Ragged.of([4, 2]))
    with torch.no_grad():
        got = layer(x, mask, context, turn=turn[q_col], context_turn=turn[k_col])
        q, (k, v) = layer.q(x).view(4, 2, 16), layer.kv(context).view(6, 2, 2, 16).unbind(1)
        if qk_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        want = torch.zeros(4, 2, 16, dtype=torch.float64)
        for i in range(4):
            keys = range(4) if i == 0 else range(4, 6)
            for h in range(2):
                qz = torch.complex(q[i, h, :8], q[i, h, 8:]) * torch.complex(*turn[q_col[i]])
                scores = []
                for j in keys:
                    kz = torch.complex(k[j, h, :8], k[j, h, 8:]) * torch.complex(*turn[k_col[j]])
                    scores.append((qz * kz.conj()).real.sum() / 4)
                weights = torch.softmax(torch.stack(scores), 0)
                want[i, h] = sum(w * v[j, h] for w, j in zip(weights, keys, strict=True))
        torch.testing.assert_close(got, layer.out(want.flatten(1)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{"positions": "rope", "qk_norm": True}, {"positions": "rope", "registers": 0},
                                     {"positions": "fourier"}])
def test_backends_agree_with_gradients(layout, sample, options):
    ids, _, shown, asked = sample(7)
    shown[2] = False
    base = make(layout, attention="padded", **options)
    packed = pack(layout, ids, shown, asked, base.config.registers)
    want = base.nll(packed)
    want.sum().backward()
    assert not torch.allclose(want, make(layout, **options | {"positions": "sincos"}).nll(packed)), "positions matter"
    for backend in ("sdpa", "loop"):
        other = make(layout, attention=backend, **options)
        other.load_state_dict(base.state_dict())
        got = other.nll(packed)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        got.sum().backward()
        for (name, a), (_, b) in zip(base.named_parameters(), other.named_parameters(), strict=True):
            if a.grad is not None or b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("positions", ["rope", "fourier"])
def test_neighbours_order_and_autocast(layout, sample, positions):
    model = make(layout, positions=positions)
    ids, _, shown, asked = sample(6)
    with torch.no_grad():
        whole = model.nll(pack(layout, ids, shown, asked, 1)).split(asked.sum(1).tolist())
        for i in (4, 0):
            one = slice(i, i + 1)
            torch.testing.assert_close(model.nll(pack(layout, ids[one], shown[one], asked[one], 1)), whole[i], **CLOSE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.nll(pack(layout, ids, shown, asked, 1))
    assert float((rough - torch.cat(whole)).abs().mean()) < 0.05 and not torch.equal(rough, torch.cat(whole))


@pytest.mark.parametrize("positions", ["rope", "fourier"])
def test_questions_about_nothing_are_told_apart(layout, positions):
    """With nothing shown, slots of a picture have different answers: turning alone could not tell them."""
    pic = layout.slice("pic")
    for kind, config in ((FourM, FourMConfig(size="d1-1w32", head_width=16, positions=positions)),
                         (MaskGIT, StackConfig(size="d1w32", head_width=16, positions=positions))):
        torch.manual_seed(0)
        model = kind(config, layout)
        asked = np.zeros((1, layout.columns), dtype=bool)
        asked[:, pic] = True
        batch = pack(layout, np.zeros(asked.shape, dtype=int), asked & False, asked, config.registers)
        with torch.no_grad():
            logits = model(batch)[0]
        assert float(torch.cdist(logits, logits)[~torch.eye(12, dtype=torch.bool)].min()) > 1e-3


@pytest.mark.parametrize("target", ["rgb", "audio", "text"])
def test_cached_writing_equals_reading_all_again_with_rope(target):
    model, (ids, there) = make_stack(GPT, positions="rope"), samples()
    known = there & (LAYOUT.modality_C < LAYOUT.names.index(target))
    known[2:, LAYOUT.slice(target).start] = True
    begun = np.where(known, ids, 0)
    fast, slow = (State(begun.copy(), known.copy(), np.arange(5)) for _ in range(2))
    fill(model, fast, target, GenerateOptions(temperature=0, text_temperature=0))
    with torch.inference_mode():
        greedy(model, slow, target)
    assert np.array_equal(fast.known_BC, slow.known_BC)
    assert np.array_equal(fast.ids_BC[fast.known_BC], slow.ids_BC[slow.known_BC])


@pytest.mark.parametrize("positions", ["rope", "fourier"])
def test_a_step_is_the_vector_of_the_whole(positions):
    """Keys wait in the cache as they were turned: each next vector is that of reading everything at once."""
    model, (ids, there) = make_stack(GPT, positions=positions), samples(1)
    cols = np.flatnonzero(there[0])
    with torch.no_grad():
        whole = model.answers(pack(LAYOUT, ids, there & False, there))
        begun = there & (np.arange(LAYOUT.columns) < cols[4])
        caches = model.open(pack(LAYOUT, ids, there & False, begun), len(cols))
        for t in range(4, len(cols)):
            before = ids[:, cols[t - 1]], cols[t - 1 : t]
            got = model.step(caches, before, cols[t : t + 1], np.array([t]))
            torch.testing.assert_close(got[0], whole[t], **CLOSE)


@pytest.mark.parametrize("positions", ["rope", "fourier"])
def test_all_parameters_learn_and_tables_of_others_stay(layout, sample, positions):
    ids, _, shown, asked = sample(3)
    model = make(layout, positions=positions)
    model.nll(pack(layout, ids, shown, asked, 1)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    new = set(model.state_dict()) - set(make(layout).state_dict())
    assert new == ({f"fourier.{n}" for n in ("frequency", "fc1.weight", "fc2.weight")} if positions == "fourier" else set())


def test_fourier_rows_tell_slots_apart_and_neighbours_are_alike():
    layout = Layout([TokenSpec(modality="audio", kind="codes", shape=(128, 1), vocab_size=5)])
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="d1-1w64", positions="fourier"), layout)
    with torch.no_grad():
        rows = model.fourier()
        like = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert 0.3 < float(rows.std()) < 1.5
    assert float(like.diagonal(1).mean()) > float(like.diagonal(40).mean()) + 0.2
    assert float(torch.cdist(rows, rows)[~torch.eye(128, dtype=torch.bool)].min()) > 0.1


# -- init -------------------------------------------------------------------------------------------------------------


def test_init_variants(layout):
    def std(model):
        return {n: float(p.detach().std()) for n, p in model.named_parameters() if p.ndim > 1}

    size = {"size": "d2-2w128", "head_width": 32}
    gpt2, xavier, zero, plain = (make(layout, init=i, **size) for i in ("gpt2", "xavier", "zero", "scaled"))
    near = lambda x: pytest.approx(x, rel=0.05)  # noqa: E731
    s = std(gpt2)
    assert s["encoder.0.attn.q.weight"] == near(0.02) and s["context.weight"] == near(0.02) and s["embed.level"] == near(0.02)
    assert s["encoder.1.mlp.fc2.weight"] == near(0.02 / math.sqrt(4)), "two layers of two branches"
    assert s["decoder.0.cross.out.weight"] == near(0.02 / math.sqrt(6)), "two layers of three branches"
    s = std(xavier)
    assert s["encoder.0.attn.kv.weight"] == near(math.sqrt(2 / 256)), "keys and values on their own"
    assert s["decoder.1.mlp.fc1.weight"] == near(math.sqrt(2 / (128 + 512)))
    assert float(xavier.encoder[0].attn.q.weight.detach().abs().max()) <= math.sqrt(6 / 256)
    own = gpt2.embed.table[:12].detach().std() / gpt2.embed.table[12:].detach().std()
    assert float(own) < 0.1, "codes with levels still begin as the sum of their levels"
    assert all(not b.mlp.fc2.weight.any() and not b.attn.out.weight.any() for b in (*zero.encoder, *zero.decoder))
    assert not any(b.cross.out.weight.any() for b in zero.decoder)
    assert torch.equal(zero.encoder[0].attn.q.weight, plain.encoder[0].attn.q.weight)


@pytest.mark.parametrize("options, said", [
    ({"init": "orthogonal"}, "init: "), ({"mup_base": 0}, "mup_base: "), ({"positions": "rop"}, "positions: "),
    ({"mup_base": 32, "init": "gpt2"}, "'gpt2' does not: choose scaled or zero"),
])
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        build(FourMConfig, options)


@pytest.mark.parametrize("option", [{"init": "zero"}, {"mup_base": 64}, {"positions": "rope"}])
def test_foreign_models_take_none_of_them(option):
    with pytest.raises(ConfigError, match="are those of the checkpoint"):
        build(CourseConfig, option)


# -- muP --------------------------------------------------------------------------------------------------------------


def trained(layout, sample, steps, optimizer="adamw", **options):
    model = make(layout, **options).train()
    ids, _, shown, asked = sample(8)
    packed = pack(layout, ids, shown, asked, model.config.registers)
    c = TrainConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.1)
    optimizers = build_optimizers(model, c)
    losses = []
    for _ in range(steps):
        loss = model.nll(packed).mean()
        model.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
        losses.append(float(loss.detach()))
    return model, optimizers, losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mup_at_its_base_is_the_plain_model(layout, sample, optimizer):
    a, _, one = trained(layout, sample, 3, optimizer)
    b, _, two = trained(layout, sample, 3, optimizer, mup_base=32)
    assert one == two and one[-1] < one[0]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mup_is_table_8(layout, sample, optimizer):
    """Width twice the base: hidden matrices' rate halved (decay times rate kept), tables' and gains' kept, logits halved."""
    model, optimizers, _ = trained(layout, sample, 0, optimizer, mup_base=16, qk_norm=True)
    rate = {id(p): (g["peak_lr"], g["weight_decay"]) for o in optimizers for g in o.param_groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        lr, decay = rate[id(p)]
        if p.ndim == 1:
            want = (1e-2, 0.0)
        elif optimizer == "muon" and name.startswith(("encoder", "decoder")):
            want = (0.015, 0.1)
        else:
            want = (5e-3, 0.2) if name.endswith(".weight") else (1e-2, 0.1)
        assert (lr, decay) == pytest.approx(want), name
    plain = make(layout, qk_norm=True)
    plain.load_state_dict(model.state_dict())
    ids, _, shown, asked = sample(3)
    packed = pack(layout, ids, shown, asked, 1)
    with torch.no_grad():
        for x, y in zip(model(packed), plain(packed), strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y / 2, **CLOSE)
        assert torch.equal(model.embed.weight(), plain.embed.weight()), "of the head only"
    wide = make(layout, size="d1-1w512", head_width=64, mup_base=128)
    assert float(wide.head.table[12:].detach().std()) == pytest.approx(128**-0.5 * 0.5, rel=0.05)
    assert float(wide.encoder[0].attn.q.weight.detach().std()) == pytest.approx(512**-0.5, rel=0.05)
