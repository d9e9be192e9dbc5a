"""GPT and MaskGIT: the same packed batch, loop, sampler and commands as the 4M model."""

import numpy as np
import pytest
import torch

from nano4m_cli.errors import UsageError
from nano4m_cli.generate.sampler import GenerateOptions, State, fill, resolve
from nano4m_cli.masking._base import Key
from nano4m_cli.masking.masked import Component as Masked
from nano4m_cli.model.base import StackConfig
from nano4m_cli.model.batch import pack
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.spec import Layout, TokenSpec

SPECS = [
    TokenSpec(modality="label", kind="grid", shape=(1, 1), vocab_size=5),
    TokenSpec(modality="rgb", kind="grid", shape=(3, 2), vocab_size=16),
    TokenSpec(modality="audio", kind="codes", shape=(3, 2), vocab_size=9),
    TokenSpec(modality="text", kind="sequence", shape=(7,), vocab_size=11, eos=0),
]
LAYOUT = Layout(SPECS)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def make(kind, **options):
    torch.manual_seed(0)
    model = kind(StackConfig(size="d2w32", head_width=8, qk_norm=True, **options), LAYOUT).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def samples(n=5, seed=0):
    """Return ids (n, C) and which slots exist: texts of different length, one sample without audio."""
    g = np.random.default_rng(seed)
    vocab = np.array([v for _, _, v in LAYOUT.groups])[LAYOUT.group_C]
    ids = g.integers(1, vocab, (n, LAYOUT.columns))
    there = np.ones(ids.shape, dtype=bool)
    text = LAYOUT.slice("text")
    for i in range(n):
        length = 2 + i % 5
        ids[i, text.start + length - 1] = 0
        there[i, text.start + length : text.stop] = False
    there[1:2, LAYOUT.slice("audio")] = False
    return ids, there


def plain_gpt(model, ids, cols):
    """The GPT of one sample, token by token and head by head: (n,) -log p of each id given those before it."""
    c, out = model.config, []
    weight = model.head.weight()
    start = LAYOUT.vocab_start
    for n in range(len(cols)):
        x = []
        for t in range(n + 1):
            told = model.unknown[0] if t == 0 else model.embed(torch.tensor([start[LAYOUT.group_C[cols[t - 1]]] + ids[t - 1]]))[0]
            x.append(told + model.modality[LAYOUT.modality_C[cols[t]]] + model.position[cols[t]])
        x = torch.stack(x)
        for block in model.blocks:
            h = block.norm1(x)
            q = block.attn.q_norm(block.attn.q(h).view(n + 1, c.heads, -1))
            k, v = block.attn.kv(h).chunk(2, -1)
            k, v = block.attn.k_norm(k.reshape(n + 1, c.heads, -1)), v.reshape(n + 1, c.heads, -1)
            y = torch.zeros_like(q)
            for i in range(n + 1):
                for head in range(c.heads):
                    p = torch.softmax(k[: i + 1, head] @ q[i, head] / c.head_width**0.5, 0)
                    y[i, head] = p @ v[: i + 1, head]
            x = x + block.attn.out(y.flatten(1))
            x = x + block.mlp(block.norm2(x))
        g = LAYOUT.group_C[cols[n]]
        logits = weight[start[g] : start[g + 1]] @ model.norm(x)[n]
        out.append(-torch.log_softmax(logits, 0)[ids[n]])
    return torch.stack(out)


def test_gpt_is_the_plain_one():
    model, (ids, there) = make(GPT), samples(3)
    with torch.no_grad():
        nll = model.nll(pack(LAYOUT, ids, np.zeros_like(there), there))
        plain = [plain_gpt(model, ids[i][there[i]], np.flatnonzero(there[i])) for i in range(3)]
    torch.testing.assert_close(nll, torch.cat(plain), **CLOSE)


@pytest.mark.parametrize("backend", ["padded", "sdpa", "loop"])
def test_what_is_shown_is_read_in_its_place(backend):
    """Asked slots have the same probabilities whether what stands before them is shown or asked."""
    model, (ids, there) = make(GPT, attention=backend), samples()
    early = LAYOUT.modality_C < 2
    with torch.no_grad():
        whole = model.nll(pack(LAYOUT, ids, np.zeros_like(there), there))
        part = model.nll(pack(LAYOUT, ids, there & early, there & ~early))
    torch.testing.assert_close(part, whole[torch.from_numpy(np.broadcast_to(~early, there.shape)[there])], **CLOSE)


def test_a_later_id_changes_nothing_before_it():
    model, (ids, there) = make(GPT), samples(1)
    other = ids.copy()
    other[0, 4] = (other[0, 4] + 1) % 16
    with torch.no_grad():
        a, b = (model.nll(pack(LAYOUT, i, np.zeros_like(there), there)) for i in (ids, other))
    assert torch.equal(a[:4], b[:4]) and not torch.allclose(a[4:], b[4:])


@pytest.mark.parametrize("kind", [GPT, MaskGIT])
def test_neighbours_change_nothing(kind):
    model, (ids, there) = make(kind), samples()
    g = np.random.default_rng(1)
    asked = there & (g.random(there.shape) < 0.5)
    asked[:, 0] = True
    shown = there & ~asked
    with torch.no_grad():
        together = model.nll(pack(LAYOUT, ids, shown, asked)).split(asked.sum(1).tolist())
        for i in range(len(ids)):
            one = slice(i, i + 1)
            torch.testing.assert_close(model.nll(pack(LAYOUT, ids[one], shown[one], asked[one])), together[i], **CLOSE)


def test_maskgit_does_not_see_what_it_is_asked():
    model, (ids, there) = make(MaskGIT), samples()
    asked = there & (LAYOUT.modality_C != 1)
    other = np.where(asked, (ids + 1) % 5, ids)
    with torch.no_grad():
        a, b = (model(pack(LAYOUT, i, there & ~asked, asked)) for i in (ids, other))
        seen = np.where(there & ~asked, (ids + 1) % 5, ids)
        c = model(pack(LAYOUT, seen, there & ~asked, asked))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True) if x is not None)


def greedy(model, state, target):
    """The slow obvious writer: the whole of what is known is read again for each slot, with the largest logit taken."""
    columns = LAYOUT.slice(target)
    spec = SPECS[LAYOUT.names.index(target)]
    for i in range(len(state.ids_BC)):
        for col in range(columns.start, columns.stop):
            if state.known_BC[i, col]:
                continue
            asked = np.zeros((1, LAYOUT.columns), dtype=bool)
            asked[0, col] = True
            logits = [l for l in model(pack(LAYOUT, state.ids_BC[i : i + 1], state.known_BC[i : i + 1], asked)) if l is not None][0]
            state.ids_BC[i, col] = int(logits[0].argmax())
            if spec.eos is not None and col == columns.stop - 1:
                state.ids_BC[i, col] = spec.eos
            state.known_BC[i, col] = True
            if state.ids_BC[i, col] == spec.eos:
                break


@pytest.mark.parametrize("target", ["rgb", "audio", "text"])
def test_cached_writing_equals_reading_all_again(target):
    model, (ids, there) = make(GPT), samples()
    known = there & (LAYOUT.modality_C < LAYOUT.names.index(target))
    known[2:, LAYOUT.slice(target).start] = True  # some have the beginning already
    begun = np.where(known, ids, 0)
    fast, slow = (State(begun.copy(), known.copy(), np.arange(5)) for _ in range(2))
    fill(model, fast, target, GenerateOptions(temperature=0, text_temperature=0))
    with torch.inference_mode():
        greedy(model, slow, target)
    assert np.array_equal(fast.known_BC, slow.known_BC)
    assert np.array_equal(fast.ids_BC[fast.known_BC], slow.ids_BC[slow.known_BC])
    assert fast.known_BC[:, LAYOUT.slice(target)].sum() > known[:, LAYOUT.slice(target)].sum()


def test_a_request_is_the_same_alone_and_among_others():
    model, (ids, there) = make(GPT), samples()
    known = there & (LAYOUT.modality_C == 0)
    options = GenerateOptions(temperature=1.0, seed=3)
    together = State(np.where(known, ids, 0), known.copy(), np.arange(5))
    fill(model, together, "rgb", options)
    for i in range(5):
        one = slice(i, i + 1)
        alone = State(np.where(known, ids, 0)[one], known[one].copy(), np.array([i]))
        fill(model, alone, "rgb", options)
        assert np.array_equal(alone.ids_BC, together.ids_BC[one])
    assert len({tuple(r) for r in together.ids_BC[:, LAYOUT.slice("rgb")]}) > 1


def test_gpt_refuses_what_comes_after():
    model, (ids, there) = make(GPT), samples()
    known = there & (LAYOUT.modality_C == 1)
    with pytest.raises(UsageError, match="reads label, rgb, audio, text in this order: 'rgb' cannot be given for 'label'"):
        fill(model, State(ids, known, np.arange(5)), "label", GenerateOptions())
    with pytest.raises(UsageError, match="without guidance"):
        fill(model, State(ids, known, np.arange(5)), "text", GenerateOptions(guidance=2.0))
    assert resolve(GenerateOptions(), ["label"], model, model.posed({})).guidance == 1.0, "asked from nothing, and read on"
    assert resolve(GenerateOptions(), ["label"], make(MaskGIT), {"->label": 1.0}).guidance > 1
    assert model.reads(["label"], "rgb") and not model.reads(["label", "text"], "rgb")
    assert model.posed({})["label+rgb->audio"] == 1.0


def test_gpt_goes_on_with_a_beginning_and_takes_no_other_part():
    model, (ids, there) = make(GPT), samples()
    known = there & (LAYOUT.modality_C < 1)
    rgb = LAYOUT.slice("rgb")
    known[:, rgb.start : rgb.start + 3] = True
    state = State(np.where(known, ids, 0), known.copy(), np.arange(5))
    fill(model, state, "rgb", GenerateOptions(temperature="2..0.1", min_p=0.01, seed=1))
    assert state.known_BC[:, rgb].all() and np.array_equal(state.ids_BC[known], ids[known])
    for i in range(5):  # each as it is alone
        alone = State(np.where(known, ids, 0)[i : i + 1], known[i : i + 1].copy(), np.array([i]))
        fill(model, alone, "rgb", GenerateOptions(temperature="2..0.1", min_p=0.01, seed=1))
        assert np.array_equal(alone.ids_BC[0, rgb], state.ids_BC[i, rgb])
    with pytest.raises(UsageError, match="part of rgb was given"):
        fill(model, State(ids, known, np.arange(5)), "audio", GenerateOptions())
    known[:, rgb.start : rgb.start + 3], known[:, rgb.start + 4] = False, True
    with pytest.raises(UsageError, match="it can keep no more than its beginning"):
        fill(model, State(ids, known, np.arange(5)), "rgb", GenerateOptions())


@pytest.mark.parametrize("scheme", ["roar", "maskgit", "onepass", "ar"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_maskgit_fills_every_slot(scheme, guidance):
    model, (ids, there) = make(MaskGIT), samples()
    known = there & (LAYOUT.modality_C == 0)
    state = State(np.where(known, ids, 0), known.copy(), np.arange(5))
    fill(model, state, "rgb", GenerateOptions(scheme=scheme, steps=3, guidance=guidance, temperature=1.0))
    assert state.known_BC[:, LAYOUT.slice("rgb")].all() and not state.known_BC[:, LAYOUT.slice("audio")].any()
    fill(model, state, "text", GenerateOptions(scheme=scheme, steps=3, guidance=guidance, temperature=1.0))
    text, known = state.ids_BC[:, LAYOUT.slice("text")], state.known_BC[:, LAYOUT.slice("text")]
    for row, there in zip(text, known, strict=True):
        stop = np.flatnonzero(row == 0)
        assert there.sum() == (stop[0] + 1 if len(stop) else len(row)) and there[: there.sum()].all()


def test_maskgit_weighs_conditions_with_every_slot_shown_or_asked():
    """u + 2 (label - u) + 3 (audio - u) and n + 2 (label - n), each question with all unknown slots masked."""
    model, (ids, there) = make(MaskGIT), samples(4)
    audio, label, rgb, text = (LAYOUT.modality_C == LAYOUT.names.index(m) for m in ("audio", "label", "rgb", "text"))

    def answers(shown, exists=None):
        exists = np.ones_like(there) if exists is None else exists
        packed = pack(LAYOUT, ids, shown, exists & ~shown)
        with torch.no_grad():
            return model(packed)[1].view(4, 6, 16)

    known = there & (audio | label)
    state = State(np.where(known, ids, 0), known.copy(), np.arange(4))
    weights = GenerateOptions(scheme="onepass", temperature=0, weights={"label": 2, "audio": 3})
    fill(model, state, "rgb", weights)
    u, a, l = answers(there & False), answers(there & audio), answers(there & label)
    assert np.array_equal(state.ids_BC[:, rgb], (u + 2 * (l - u) + 3 * (a - u)).argmax(-1).numpy())
    known = there & label
    state = State(np.where(known, ids, 0), known.copy(), np.arange(4), away_ids_BC=ids, away_BC=there & text)
    fill(model, state, "rgb", GenerateOptions(scheme="onepass", temperature=0, guidance=2.0))
    n = answers(there & text, there | ~text)  # the negative text has no slots after its end
    assert np.array_equal(state.ids_BC[:, rgb], (n + 2 * (answers(known) - n)).argmax(-1).numpy())


def test_maskgit_is_asked_for_all_it_does_not_know():
    """One slot wanted: its logits are those with every unknown slot masked, not those with the others missing."""
    model, (ids, there) = make(MaskGIT), samples(2)
    known = np.zeros_like(there)
    known[:, 0] = True
    state = State(np.where(known, ids, 0), known.copy(), np.arange(2))
    fill(model, state, "rgb", GenerateOptions(scheme="onepass", temperature=0))
    with torch.no_grad():
        logits = model(pack(LAYOUT, ids, known, ~known))[1].view(2, 6, 16)
    assert np.array_equal(state.ids_BC[:, LAYOUT.slice("rgb")], logits.argmax(-1).numpy())


@pytest.mark.parametrize("schedule, mean", [("uniform", 0.5), ("cosine", 2 / np.pi), ("arccos", 2 / np.pi)])
def test_masked_asks_a_share_of_all_slots(schedule, mean):
    length = np.tile([1, 49, 0, 10], (4000, 1))
    shown, asked = Masked(Masked.Options(schedule=schedule), list("abcd")).counts(length, Key(0, "t", np.arange(4000)))
    assert np.array_equal(shown + asked, length) and asked.sum(1).min() == 1 and asked.sum(1).max() == 60
    assert abs(asked.sum(1).mean() / 60 - mean) < 0.02
    share = asked.mean(0) / np.maximum(length[0], 1)
    assert abs(share[0] - mean) < 0.03 and abs(share[1] - mean) < 0.02 and abs(share[3] - mean) < 0.02
    if schedule == "uniform":
        assert np.bincount(asked.sum(1), minlength=61)[1:].min() > 30
