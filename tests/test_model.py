"""The packed model against slow references: nothing from outside a sample or ahead of a text."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError
from nano4m_cli.model.attention import BACKENDS, Mask, attend, best_backend
from nano4m_cli.model.batch import Ragged, pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.layers import MLP, TokenTable, position_table
from nano4m_cli.model.nll import grouped_nll
from nano4m_cli.spec import Layout, TokenSpec

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(layout, **options) -> FourM:
    torch.manual_seed(0)
    return FourM(FourMConfig(**{"size": "d2-2w32", "head_width": 16, **options}), layout).eval()


@pytest.fixture(scope="module")
def model(layout):
    return make(layout)


def nll_by_column(model, ids, shown, asked) -> list[dict[int, float]]:
    """Return per sample {column: nll}."""
    packed = pack(model.layout, ids, shown, asked, model.config.registers)
    with torch.no_grad():
        nll = model.nll(packed)
    row, col = np.nonzero(asked)
    assert np.array_equal(packed.dec_col.numpy(), col)
    out = [{} for _ in ids]
    for r, c, v in zip(row, col, nll.tolist(), strict=True):
        out[r][int(c)] = v
    return out


def same(a: dict, b: dict, only=None) -> bool:
    keys = set(a) if only is None else set(only)
    return all(abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])) for k in keys)


# -- attention ----------------------------------------------------------------------------------------------------


def slow_attend(q, k, v, heads, mask):
    """One query at a time, in float64, from the definition."""
    q_rows = torch.repeat_interleave(torch.arange(mask.q.rows), mask.q.lengths)
    k_start = torch.cumsum(mask.k.lengths, 0) - mask.k.lengths
    q_start = torch.cumsum(mask.q.lengths, 0) - mask.q.lengths
    out = torch.zeros_like(q, dtype=torch.float64)
    d = q.shape[1] // heads
    for t, row in enumerate(q_rows.tolist()):
        j = row if mask.k_row is None else int(mask.k_row[row])
        last = int(mask.k.lengths[j])
        if mask.causal is not None and mask.causal[row]:
            last = t - int(q_start[row]) + 1
        here = slice(int(k_start[j]), int(k_start[j]) + last)
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            if last:
                w = torch.softmax(k[here, part].double() @ q[t, part].double() / math.sqrt(d), 0)
                out[t, part] = w @ v[here, part].double()
    return out.float()


def attention_case(name: str):
    if name == "self":
        q = Ragged.of([3, 1, 7, 2])
        return Mask(q, q)
    if name == "causal":
        q = Ragged.of([3, 1, 7, 2, 5])
        return Mask(q, q, causal=torch.tensor([True, False, False, True, True]))
    if name == "cross":
        return Mask(Ragged.of([3, 1, 4]), Ragged.of([2, 6, 1]))
    if name == "k_row":
        return Mask(Ragged.of([3, 1, 4, 2, 2]), Ragged.of([2, 6, 1]), k_row=torch.tensor([2, 0, 0, 1, 2]))
    if name == "empty keys":
        return Mask(Ragged.of([3, 2, 4]), Ragged.of([2, 0, 1]))
    if name == "no keys at all":
        return Mask(Ragged.of([3, 2]), Ragged.of([0, 0]))
    if name.startswith("grouped"):  # enough rows of different length to be padded in groups
        q = Ragged.of(np.random.default_rng(0).integers(0, 12, 50))
        k = Ragged.of(np.random.default_rng(1).integers(0, 9, 50))
        causal = torch.arange(50) % 3 == 0
        mask = {"grouped self": Mask(q, q), "grouped causal": Mask(q, q, causal=causal), "grouped cross": Mask(q, k)}[name]
        assert len(mask.groups) == 3 and len({g.q_width for g in mask.groups}) > 1
        return mask
    if name == "empty queries":
        return Mask(Ragged.of([0, 2, 0]), Ragged.of([2, 3, 1]))
    raise AssertionError(name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["self", "causal", "cross", "k_row", "empty keys", "no keys at all", "empty queries",
                                  "grouped self", "grouped causal", "grouped cross"])
def test_backends_agree_with_the_definition(backend, name):
    mask = attention_case(name)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 24, generator=g).requires_grad_()  # noqa: E731
    q, k, v = draw(int(mask.q.lengths.sum())), draw(int(mask.k.lengths.sum())), draw(int(mask.k.lengths.sum()))
    y, want = attend(q, k, v, 3, mask, backend), slow_attend(q, k, v, 3, mask)
    assert y.shape == q.shape
    torch.testing.assert_close(y, want, **CLOSE)
    # Gradients as well: a padded row must not leak into them.
    weight = torch.randn(q.shape, generator=g)
    if want.requires_grad:
        got = torch.autograd.grad((y * weight).sum(), (q, k, v))
        for a, b in zip(got, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    else:
        assert name == "no keys at all" and not y.any()


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu"}, {"registers": 0}])
def test_backends_give_the_same_model(layout, sample, options):
    ids, _, shown, asked = sample(7)
    shown[2] = False
    base = make(layout, attention="padded", **options)
    packed = pack(layout, ids, shown, asked, base.config.registers)
    want = base.nll(packed)
    want.sum().backward()
    for backend in ("sdpa", "loop"):
        other = make(layout, attention=backend, **options)
        other.load_state_dict(base.state_dict())
        got = other.nll(packed)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        got.sum().backward()
        for (name, a), (_, b) in zip(base.named_parameters(), other.named_parameters(), strict=True):
            if a.grad is not None or b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_autocast_stays_near_fp32(layout, sample, backend):
    """What a CPU without bf16 never runs by itself still has to work where it is asked for, gradients too."""
    ids, _, shown, asked = sample(7)
    model = make(layout, attention=backend, qk_norm=True)
    packed = pack(layout, ids, shown, asked, model.config.registers)
    sides = {}
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss = model.nll(packed).mean()
        loss.backward()
        sides[on] = float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    (a, g), (b, h) = sides[False], sides[True]
    assert b == pytest.approx(a, rel=0.02) and b != a
    assert float(torch.cosine_similarity(g, h, 0)) > 0.99


def test_auto_picks_by_device_precision_and_width():
    assert best_backend("cpu", torch.float32, 128) == "padded" and best_backend("cpu", torch.float32, 512) == "loop"
    assert best_backend("cpu", torch.bfloat16, 512) == "padded" and best_backend("cpu", torch.bfloat16, 512, grad=False) == "loop"
    assert best_backend("cuda", torch.bfloat16, 128) == "varlen" and best_backend("cuda", torch.float32, 128) == "sdpa"
    assert best_backend("cuda", torch.bfloat16, 128, blocks=True) == "sdpa"


CASES = ["self", "causal", "cross", "k_row", "grouped causal", "grouped cross"]


@pytest.mark.parametrize("name", CASES)
def test_varlen_segments_hold_every_row_once(name):
    """Each segment's tokens, cut at its ends, are the rows of the mask: attention by plain loops over them is the definition."""
    mask = attention_case(name)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(int(n), 24, generator=g) for n in (mask.q.lengths.sum(), mask.k.lengths.sum(), mask.k.lengths.sum()))
    out = torch.full_like(q, torch.nan)
    for s in mask.segments:
        at = torch.arange(len(q)) if s.q is None else s.q
        of = torch.arange(len(k)) if s.k is None else s.k
        assert s.q_ends.dtype == s.k_ends.dtype == torch.int32 and len(s.q_ends) == len(s.k_ends)
        for (a, z), (b, y) in zip(s.q_ends.long().unfold(0, 2, 1).tolist(), s.k_ends.long().unfold(0, 2, 1).tolist(), strict=True):
            assert z - a <= s.q_width and y - b <= s.k_width
            one = Mask(Ragged.of([z - a]), Ragged.of([y - b]), causal=torch.tensor([s.causal]))
            out[at[a:z]] = slow_attend(q[at[a:z]], k[of[b:y]], v[of[b:y]], 3, one)
    torch.testing.assert_close(out, slow_attend(q, k, v, 3, mask), **CLOSE)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_varlen_on_cuda_agrees_with_the_definition(name):
    plain = attention_case(name)
    there = lambda x: None if x is None else x.cuda()  # noqa: E731
    q_rows = plain.q.to("cuda")
    mask = Mask(q_rows, q_rows if plain.k is plain.q else plain.k.to("cuda"), there(plain.k_row), there(plain.causal))
    g = torch.Generator().manual_seed(0)
    sizes = [int(r.lengths.sum()) for r in (plain.q, plain.k, plain.k)]
    q, k, v = (torch.randn(n, 96, generator=g).cuda().bfloat16().requires_grad_() for n in sizes)
    y = attend(q, k, v, 3, mask, "varlen")
    weight = torch.randn(y.shape, generator=g)
    got = torch.autograd.grad((y.float() * weight.cuda()).sum(), (q, k, v))
    p = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    want = slow_attend(*p, 3, plain)
    torch.testing.assert_close(y.float().cpu(), want, atol=0.02, rtol=0.02)
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), p), strict=True):
        torch.testing.assert_close(a.float().cpu(), b, atol=0.05, rtol=0.05)


def test_varlen_says_what_it_takes(layout, sample):
    ids, _, shown, asked = sample(3)
    model = make(layout, attention="varlen")
    with pytest.raises(ConfigError, match="float32 on cpu") as error:
        model.nll(pack(layout, ids, shown, asked, 1))
    assert "auto" in error.value.hint


# -- packing ------------------------------------------------------------------------------------------------------


def test_pack_equals_loops(layout, sample):
    ids, _, shown, asked = sample(9)
    packed = pack(layout, ids, shown, asked, registers=2)
    enc_ids, enc_col, enc_len, dec_ids, dec_col, prev, runs, causal, groups = [], [], [], [], [], [], [], [], {}
    for i in range(9):
        enc_ids += [0, 0] + [int(ids[i, c]) for c in range(layout.columns) if shown[i, c]]
        enc_col += [-1, -1] + [c for c in range(layout.columns) if shown[i, c]]
        enc_len.append(2 + int(shown[i].sum()))
        for m, spec in enumerate(layout.specs):
            n = 0
            for slot in range(spec.slots):
                c = int(layout.start[m]) + slot
                if asked[i, c]:
                    n += 1
                    book = slot % spec.shape[1] if spec.kind == "codes" else 0
                    groups.setdefault((m, book), []).append(len(dec_ids))
                    dec_ids.append(int(ids[i, c]))
                    dec_col.append(c)
                    prev.append(int(ids[i, c - 1]) if spec.kind == "sequence" and slot > 0 else -1)
            if n:
                runs.append(n)
                causal.append(spec.kind == "sequence")
    assert packed.enc_ids.tolist() == enc_ids and packed.enc_col.tolist() == enc_col
    assert packed.enc.lengths.tolist() == enc_len and packed.samples == 9
    assert (
        packed.dec_ids.tolist() == dec_ids and packed.dec_col.tolist() == dec_col and packed.dec_prev.tolist() == prev
    )
    assert packed.dec.lengths.tolist() == asked.sum(1).tolist()
    assert packed.dec_self.lengths.tolist() == runs and packed.dec_causal.tolist() == causal
    for (m, q, _), index in zip(layout.groups, packed.group_index, strict=True):
        assert (index.tolist() if index is not None else []) == groups.get((m, q), [])


def test_ragged_places():
    r = Ragged.of([2, 0, 3])
    assert (r.width, r.rows, r.place.tolist()) == (3, 3, [0, 1, 6, 7, 8])
    assert Ragged.of([0, 0]).width == 1 and Ragged.of([]).rows == 0


# -- what a prediction may depend on ------------------------------------------------------------------------------


def test_neighbours_and_order_change_nothing(model, sample):
    ids, _, shown, asked = sample(10)
    whole = nll_by_column(model, ids, shown, asked)
    for i in range(10):
        assert same(nll_by_column(model, ids[i : i + 1], shown[i : i + 1], asked[i : i + 1])[0], whole[i])
    order = np.random.default_rng(0).permutation(10)[:7]
    for i, got in zip(order, nll_by_column(model, ids[order], shown[order], asked[order]), strict=True):
        assert same(got, whole[i])


def test_padding_values_are_never_read(model, sample):
    """Ids that are neither shown nor asked (nor before an asked word) do not matter."""
    ids, _, shown, asked = sample(6)
    other = ids.copy()
    used = shown | asked
    used[:, :-1] |= asked[:, 1:]
    other[~used] = 0
    assert all(
        same(a, b)
        for a, b in zip(nll_by_column(model, ids, shown, asked), nll_by_column(model, other, shown, asked), strict=True)
    )


def test_what_is_shown_matters(model, layout, sample):
    ids, _, shown, asked = sample(1, seed=3)
    shown[:], asked[:] = False, False
    shown[0, layout.slice("pic")], asked[0, layout.slice("vid")] = True, True
    base = nll_by_column(model, ids, shown, asked)[0]
    ids[0, 0] = (ids[0, 0] + 1) % 12
    changed = nll_by_column(model, ids, shown, asked)[0]
    assert all(abs(base[c] - changed[c]) > 1e-7 for c in base)


def test_decoder_self_attention_stays_within_one_modality(model, layout, sample):
    ids, _, shown, asked = sample(1)
    shown[:], asked[:] = False, False
    pic, snd, vid = (layout.slice(n) for n in ("pic", "snd", "vid"))
    shown[0, snd.start : snd.start + 4] = True
    asked[0, pic.start : pic.start + 6] = True
    base = nll_by_column(model, ids, shown, asked)[0]
    columns = list(base)

    more = asked.copy()
    more[0, vid], more[0, layout.slice("txt")] = True, np.arange(6) < 3
    more[0, snd.start + 4 : snd.stop] = True
    assert same(nll_by_column(model, ids, shown, more)[0], base, columns), "other modalities asked change nothing"

    fewer = asked.copy()
    fewer[0, pic.start + 5] = False
    got = nll_by_column(model, ids, shown, fewer)[0]
    assert not same(got, base, columns[:5]), "slots asked of one modality see each other"
    assert max(abs(got[c] - base[c]) for c in columns[:5]) > 1e-4


def test_grid_targets_never_see_their_own_or_each_other_s_ids(model, layout, sample):
    ids, _, shown, asked = sample(4, seed=5)
    packed = pack(layout, ids, shown, asked, 1)
    other = ids.copy()
    text = layout.slice("txt")
    keep = np.zeros(layout.columns, dtype=bool)
    keep[text] = True
    other[asked & ~keep] = 0
    with torch.no_grad():
        for a, b in zip(model(packed), model(pack(layout, other, shown, asked, 1)), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_text_is_causal(model, layout, sample):
    ids, _, shown, asked = sample(1, seed=1)
    text = layout.slice("txt")
    shown[:], asked[:] = False, False
    shown[0, layout.slice("pic")] = True
    asked[0, text] = True
    ids[0, text] = [4, 5, 6, 7, 8, 3]
    base = nll_by_column(model, ids, shown, asked)[0]
    for change in range(6):
        other = ids.copy()
        other[0, text.start + change] = 9
        got = nll_by_column(model, other, shown, asked)[0]
        assert same(got, base, range(text.start, text.start + change)), "later words do not matter"
        if change < 5:
            assert abs(got[text.start + change + 1] - base[text.start + change + 1]) > 1e-5, "the word before matters"
        if 0 < change < 4:
            assert abs(got[text.start + 5] - base[text.start + 5]) > 1e-6, "so do words further back"
    shorter = asked.copy()
    shorter[0, text.start + 3 : text.stop] = False
    assert same(nll_by_column(model, ids, shown, shorter)[0], base, range(text.start, text.start + 3)), (
        "so does the length"
    )


def test_logits_are_over_their_own_vocabulary(model, layout, sample):
    ids, _, shown, asked = sample(5)
    out = model(pack(layout, ids, shown, asked, 1))
    assert [(layout.names[m], q, v) for m, q, v in layout.groups] == [
        ("pic", 0, 12),
        ("snd", 0, 7),
        ("snd", 1, 7),
        ("txt", 0, 11),
        ("vid", 0, 9),
    ]
    total = 0
    for (m, q, size), logits in zip(layout.groups, out, strict=True):
        spec, here = layout.specs[m], asked[:, layout.start[m] : layout.start[m + 1]]
        count = here.reshape(5, *spec.shape)[..., q].sum() if spec.kind == "codes" else here.sum()
        assert logits.shape == (count, size)
        total += len(logits)
    assert total == asked.sum()
    only = np.zeros_like(asked)
    only[:, layout.slice("vid")] = True
    out = model(pack(layout, ids, shown & ~only, only, 1))
    assert [x is None for x in out] == [True, True, True, True, False]


def test_codebooks_have_separate_embeddings_and_heads(layout, sample):
    model = make(layout)
    ids, _, shown, asked = sample(3)
    snd = layout.slice("snd")
    shown[:], asked[:] = False, False
    shown[:, snd.start : snd.start + 6], asked[:, snd.start + 6 : snd.stop] = True, True
    packed = pack(layout, ids, shown, asked, 1)
    with torch.no_grad():
        before = [x.clone() for x in model(packed) if x is not None]
        first = layout.vocab_start[2]  # codebook 1 of snd
        model.head.table[first : first + 7] += 1.0
        after = [x for x in model(packed) if x is not None]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    with torch.no_grad():
        x = model.embed_shown(packed)
        model.embed.table[first : first + 7] += 1.0
        change = (model.embed_shown(packed) - x).abs().sum(1) > 0
    books = (packed.enc_col - snd.start) % 2
    assert change.tolist() == [
        (c >= 0 and b == 1) for c, b in zip(packed.enc_col.tolist(), books.tolist(), strict=True)
    ]


def test_nll_equals_cross_entropy_by_hand(model, layout, sample):
    ids, _, shown, asked = sample(4)
    packed = pack(layout, ids, shown, asked, 1)
    with torch.no_grad():
        nll, decoded = model.nll(packed), model.decode(packed, model.encode(packed))
        weight = model.head.weight()
        for t in range(len(nll)):
            c = int(packed.dec_col[t])
            g = int(layout.group_C[c])
            rows = weight[layout.vocab_start[g] : layout.vocab_start[g + 1]]
            want = -F.log_softmax(rows @ decoded[t], 0)[packed.dec_ids[t]]
            assert abs(float(nll[t]) - float(want)) < 1e-5
        total, count = model.modality_sums(packed)
    modality = layout.modality_C[packed.dec_col.numpy()]
    for m in range(4):
        assert abs(float(total[m]) - float(nll[modality == m].sum())) < 1e-3 and int(count[m]) == (modality == m).sum()


# -- tables, positions --------------------------------------------------------------------------------------------


def test_token_table_adds_its_levels():
    layout = Layout(
        [
            TokenSpec(modality="a", kind="grid", shape=(2, 2), vocab_size=12, levels=(2, 3, 2)),
            TokenSpec(modality="b", kind="codes", shape=(2, 2), vocab_size=6, levels=(3, 2)),
            TokenSpec(modality="c", kind="grid", shape=(1, 1), vocab_size=5),
        ]
    )
    torch.manual_seed(0)
    table = TokenTable(layout, 8, 0.5)
    weight, used = table.weight(), 1
    for g, (m, _, size) in enumerate(layout.groups):
        levels = layout.specs[m].levels
        for i in range(size):
            want, rest, row = table.table[layout.vocab_start[g] + i].clone(), i, used
            for level in levels:
                want = want + table.level[row + rest % level]
                rest //= level
                row += level
            torch.testing.assert_close(weight[layout.vocab_start[g] + i], want)
        used += sum(levels)
    assert used == len(table.level)
    some = torch.tensor([0, 11, 12, 17, 18, 22, 11])
    torch.testing.assert_close(table(some), weight[some])
    first_c = int(layout.vocab_start[-2])
    assert float(table.table.data[:first_c].std()) < 0.1 * float(table.table.data[first_c:].std()), "codes begin as their levels"
    weight.sum().backward()
    assert table.level.grad[0].abs().sum() == 0 and (table.level.grad[1:].abs().sum(1) > 0).all()


def test_token_table_without_levels_is_a_plain_table():
    table = TokenTable(Layout([TokenSpec(modality="c", kind="grid", shape=(2, 2), vocab_size=5)]), 8, 0.5)
    assert table.weight() is table.table and [n for n, _ in table.named_parameters()] == ["table"]
    assert torch.equal(table(torch.tensor([4, 0, 4])), table.table[[4, 0, 4]])


def test_positions_tell_all_slots_of_a_modality_apart(layout):
    table = position_table(layout, 48)
    assert table.shape == (layout.columns, 48)
    for spec in layout.specs:
        rows = table[layout.slice(spec.modality)]
        apart = torch.cdist(rows, rows) + 10 * torch.eye(len(rows))
        assert float(apart.min()) > 0.1, spec.modality
    # An axis owns its share of the width: the rows of a picture agree there, whatever their column.
    pic = table[layout.slice("pic")].view(3, 4, 48)
    assert torch.equal(pic[:, 0, :24], pic[:, 3, :24]) and torch.equal(pic[0, :, 24:], pic[2, :, 24:])


# -- other ways in ------------------------------------------------------------------------------------------------


def test_answers_on_another_context_equal_the_plain_path(model, layout, sample):
    ids, _, shown, asked = sample(4, seed=2)
    want = nll_by_column(model, ids, shown, asked)
    context = np.array([3, 0, 0, 2, 1, 3])
    encoder = pack(layout, ids, shown, np.zeros_like(asked), 1)
    mixed = pack(layout, ids, shown, asked[context], 1, answers=(ids[context], context))
    with torch.no_grad():
        got = model.nll(mixed)
        encoded = model.encode(encoder)
        dec = pack(layout, ids, np.zeros_like(shown), asked[context], 0, answers=(ids[context], context))
        dec = replace(dec, enc_ids=encoder.enc_ids, enc_col=encoder.enc_col, enc=encoder.enc)
        h = model.decode(dec, encoded)
        torch.testing.assert_close(h, model.decode(mixed, encoded), **CLOSE)
    at = 0
    for c in context:
        for value in want[c].values():
            assert abs(float(got[at]) - value) < 1e-5 * max(1, value)
            at += 1
    assert at == len(got)


def test_answers_may_differ_from_the_context_s_own_ids(model, layout, sample):
    """Candidates for one context: each equals the sample that holds this candidate."""
    ids, _, shown, asked = sample(1, seed=4)
    text = layout.slice("txt")
    shown[:], asked[:] = False, False
    shown[0, layout.slice("pic")], asked[0, text] = True, True
    candidates = np.repeat(ids, 3, 0)
    candidates[:, text] = np.random.default_rng(0).integers(0, 11, (3, 6))
    packed = pack(layout, ids, shown, np.repeat(asked, 3, 0), 1, answers=(candidates, np.zeros(3, int)))
    with torch.no_grad():
        got = model.nll(packed).view(3, 6)
    for i in range(3):
        want = nll_by_column(model, candidates[i : i + 1], shown, asked)[0]
        assert np.allclose(got[i].numpy(), list(want.values()), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("registers", [0, 1, 3])
def test_an_empty_condition_works(layout, sample, backend, registers):
    model = make(layout, attention=backend, registers=registers)
    ids, _, shown, asked = sample(3)
    alone = nll_by_column(model, ids[:1], shown[:1], asked[:1])[0]
    shown[1:] = False
    got = nll_by_column(model, ids, shown, asked)
    assert same(got[0], alone) and all(math.isfinite(v) for row in got for v in row.values())
    shown[:] = False
    packed = pack(layout, ids, shown, asked, registers)
    loss = model.nll(packed).mean()
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_layers_are_given_on_request(model, layout, sample):
    ids, _, shown, asked = sample(2)
    packed = pack(layout, ids, shown, asked, 1)
    layers = []
    with torch.no_grad():
        out = model.encode(packed, layers)
        assert (
            len(layers) == 2 and torch.equal(model.enc_norm(layers[-1]), out) and torch.equal(model.encode(packed), out)
        )


# -- config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, want", [("d6-6w512", (6, 6, 512, 8)), ("d3-12w128", (3, 12, 128, 2))])
def test_sizes(size, want):
    c = FourMConfig(size=size)
    assert (c.encoder_layers, c.decoder_layers, c.width, c.heads) == want


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": "big"}, "size: a size reads d<encoder layers>"),
        ({"size": "d0-3w128"}, "size: a size reads"),
        ({"size": "d3-3w0"}, "size: a size reads"),
        ({"size": "d3-3w100"}, "width 100 does not divide into heads of 64"),
        ({"registers": -1}, "registers cannot be negative"),
        ({"attention": "flash"}, "attention: "),
        ({"mlpp": "gelu"}, "unknown key 'mlpp'"),
    ],
)
def test_impossible_models_are_config_errors(options, said):
    with pytest.raises(ConfigError, match=said):
        build(FourMConfig, options)


@pytest.mark.parametrize("options", [{"head_width": 0}, {"head_width": -32}, {"mlp_ratio": 0}, {"mlp_ratio": -1}])
def test_impossible_widths_are_config_errors(options):
    with pytest.raises(ConfigError):
        build(FourMConfig, options)


def test_every_option_makes_a_model(layout, sample):
    ids, _, shown, asked = sample(3)
    for options in (
        {"mlp": "swiglu"},
        {"norm": "rmsnorm"},
        {"qk_norm": True},
        {"positions": "learned"},
        {"registers": 4},
        {"size": "d1-3w48"},
    ):
        model = make(layout, **options)
        nll = model.nll(pack(layout, ids, shown, asked, model.config.registers))
        assert torch.isfinite(nll).all()
        nll.mean().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert missing == [], options


def test_learned_positions_are_parameters(layout):
    assert "position" in dict(make(layout, positions="learned").named_parameters())
    assert "position" not in make(layout).state_dict()


# -- learning -----------------------------------------------------------------------------------------------------


def test_a_batch_is_the_sum_of_its_samples(layout, sample):
    """Loss and gradient: sums over samples, whatever the packing."""
    model = make(layout)
    ids, _, shown, asked = sample(6)
    together = model.nll(pack(layout, ids, shown, asked, 1)).sum() / 6
    together.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = 0.0
    for i in range(6):
        part = model.nll(pack(layout, ids[i : i + 1], shown[i : i + 1], asked[i : i + 1], 1)).sum() / 6
        part.backward()
        loss += float(part.detach())
    assert abs(float(together.detach()) - loss) < 1e-4
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[n], atol=2e-5, rtol=1e-3, msg=n)


def test_gradient_equals_finite_differences(layout, sample):
    model = make(layout, size="d1-1w32").double()
    ids, _, shown, asked = sample(2)
    packed = pack(layout, ids, shown, asked, 1)
    model.position = model.position.double()

    def loss() -> torch.Tensor:
        out = model(packed)  # nll rounds to fp32
        return sum(
            F.cross_entropy(x, packed.dec_ids[i], reduction="sum")
            for i, x in zip(packed.group_index, out, strict=True)
            if i is not None
        )

    loss().backward()
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        slope = float((p.grad * direction).sum())
        values = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                p.add_(direction, alpha=step)
                values.append(float(loss()))
                p.sub_(direction, alpha=step)
        assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-4 * max(1.0, abs(slope)), name


def test_eight_samples_can_be_learned_by_heart(layout, sample):
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="d1-1w64", head_width=32), layout)
    ids, length, _, _ = sample(8, seed=11)
    shown, asked = np.zeros_like(ids, dtype=bool), np.zeros_like(ids, dtype=bool)
    shown[:, layout.slice("pic")] = True
    for name in ("snd", "txt", "vid"):
        m = layout.names.index(name)
        asked[:, layout.slice(name)] = np.arange(layout.specs[m].slots) < length[:, m : m + 1]
    packed = pack(layout, ids, shown, asked, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    start = float(model.nll(packed).mean().detach())
    for _ in range(150):
        loss = model.nll(packed).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.02:
            break
    assert start > 1.5 and float(loss.detach()) < 0.05
    with torch.no_grad():
        for index, logits in zip(packed.group_index, model(packed), strict=True):
            if index is not None:
                assert (logits.argmax(-1) == packed.dec_ids[index]).all()


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "registers": 2, "attention": "loop"}, {"attention": "sdpa"}])
def test_gradients_are_the_same_bits_however_threads_race(layout, sample, options):
    """Plain indexing of a parameter adds its gradient in an order that changes from run to run."""
    torch.manual_seed(0)
    model = FourM(FourMConfig(size="d1-1w64", head_width=32, **options), layout)
    ids, _, shown, asked = sample(128)
    batch = pack(layout, ids, shown, asked, model.config.registers)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = []
        for _ in range(6):
            model.zero_grad()
            model.nll(batch).sum().backward()
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert len(seen[0]) > 20 and all(float(g.abs().max()) > 0 for n, g in seen[0].items() if "key" not in n)
    for other in seen[1:]:
        assert [n for n in seen[0] if not torch.equal(seen[0][n], other[n])] == []


# -- what is written out instead of left to autograd ------------------------------------------------------------------


def nll_plainly(h, weight, ids, group_index, sizes):
    out = torch.zeros(len(h), dtype=torch.float32)
    for index, rows in zip(group_index, weight.split(sizes), strict=True):
        if index is not None:
            loss = F.cross_entropy(F.linear(h[index], rows).float(), ids[index], reduction="none")
            out = out.index_copy(0, index, loss)
    return out


@pytest.mark.parametrize("bf16", [False, True])
def test_grouped_nll_and_its_gradients_equal_plain_cross_entropies(bf16):
    draw = torch.Generator().manual_seed(0)
    sizes, groups = [30, 7, 50], (torch.tensor([0, 3, 4, 9]), None, torch.tensor([1, 2, 5, 6, 7, 8]))
    ids = torch.randint(30, (10,), generator=draw)
    upstream = torch.rand(10, generator=draw)
    found = {}
    for name, nll in (("ours", grouped_nll), ("plain", nll_plainly)):
        h = torch.randn(10, 16, generator=draw.manual_seed(1)).requires_grad_()
        weight = torch.randn(87, 16, generator=draw).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = nll(h, weight, ids, groups, sizes)
        assert out.dtype == torch.float32
        (out * upstream).sum().backward()
        found[name] = out.detach(), h.grad, weight.grad
    for a, b in zip(found["ours"], found["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if bf16 else 1e-5, atol=2e-2 if bf16 else 1e-6)
    assert not found["ours"][2][30:37].any() and found["ours"][2][37:].any()  # the group that nothing is asked of


def test_grouped_nll_refuses_a_second_backward_pass():
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = grouped_nll(h, weight, torch.zeros(3, dtype=torch.long), (torch.arange(3),), [5]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_mlp_s_gradients_are_those_of_autograd_bit_for_bit(bf16):
    torch.manual_seed(0)
    mlp = MLP(16, "gelu", 4.0, 1.0)
    found = []
    for plain in (False, True):
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = mlp.fc2(F.gelu(mlp.fc1(x))) if plain else mlp(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, mlp.fc1.weight.grad.clone(), mlp.fc2.weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
