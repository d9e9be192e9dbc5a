"""What generation keeps: block-causal encoders, incremental and speculative decoding, against slow loops that keep nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from workspace_factory import config, linked, one_thread, records, tiny  # noqa: F401

from nano4m_cli.errors import ConfigError, UsageError
from nano4m_cli.generate.options import GenerateOptions
from nano4m_cli.generate.sampler import State, chain, fill
from nano4m_cli.generate.speculative import settle
from nano4m_cli.masking._base import Key
from nano4m_cli.masking._blocks import draw_blocks
from nano4m_cli.masking._mixture import MaskingConfig, Mixture
from nano4m_cli.model.base import StackConfig
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.model.memory import Memory
from nano4m_cli.train.run import open_run, prepare
from nano4m_cli.train.run import start as start_run

BENCH = Path(__file__).parents[1] / "scripts" / "bench"

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ENCODERS = ["bidirectional", "block_causal"]


def build(layout, encoder="bidirectional", **options):
    """Untrained, its logits stretched so that they say something."""
    torch.manual_seed(1)
    model = FourM(FourMConfig(size="d2-2w32", head_width=16, encoder=encoder, **options), layout).eval()
    with torch.no_grad():
        model.head.table.mul_(4.0)
        model.head.level.mul_(4.0)
    return model


def start(layout, sample, n, known, part=None, seed=0):
    """Requests with whole modalities known, and of others as many first slots as `part` says, one more for every other row."""
    ids, length, _, _ = sample(n, seed)
    is_known = np.zeros_like(ids, dtype=bool)
    for name in [*known, *(part or {})]:
        here, m = layout.slice(name), layout.names.index(name)
        size = length[:, m] if name in known else part[name] + np.arange(n) % 2
        is_known[:, here] = np.arange(here.stop - here.start) < size[:, None]
    return State(np.where(is_known, ids, 10**6), is_known, np.arange(n))


def drawn_blocks(layout, sample, blocks=4):
    """Return ids, shown, asked of grids and codes, and each shown slot's block."""
    ids, _, shown, asked = sample(6)
    asked = asked & ~layout.sequence_C
    block = np.random.default_rng(0).integers(0, blocks, ids.shape)
    return ids, shown, asked, np.where(shown, block, 0)


# -- the encoder in blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["padded", "sdpa", "loop"])
def test_no_block_sees_a_later_one(layout, sample, backend):
    """Every block's tokens are encoded as if nothing came after it: against one call for each beginning."""
    model = build(layout, "block_causal", attention=backend)
    ids, shown, asked, block = drawn_blocks(layout, sample)
    with torch.no_grad():
        whole = pack(layout, ids, shown, asked, 1, block_BC=block)
        out = model.encode(whole)
        assert not torch.allclose(out, model.encode(pack(layout, ids, shown, asked, 1)), **CLOSE)
        for last in range(4):
            some = shown & (block <= last)
            part = pack(layout, ids, some, asked, 1, block_BC=block)
            at = (whole.enc_block <= last).nonzero().squeeze(1)
            torch.testing.assert_close(model.encode(part), out[at], **CLOSE)


def test_one_block_is_the_bidirectional_encoder(layout, sample):
    model = build(layout)
    ids, _, shown, asked = sample(5)
    with torch.no_grad():
        a = model.answers(pack(layout, ids, shown, asked, 1))
        b = model.answers(pack(layout, ids, shown, asked, 1, block_BC=np.zeros_like(ids)))
    torch.testing.assert_close(a, b, **CLOSE)
    assert pack(layout, ids, shown, asked, 1).enc_block is None
    assert build(layout, "block_causal").state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("positions", ["sincos", "fourier", "rope"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_memory_answers_as_the_model_that_reads_all_blocks_at_once(layout, sample, qk_norm, positions):
    model = build(layout, qk_norm=qk_norm, positions=positions)
    ids, shown, asked, block = drawn_blocks(layout, sample)
    with torch.no_grad():
        packed = pack(layout, ids, shown, asked, 1, block_BC=block)
        want = model.decode(packed, model.encode(packed))
        torch.testing.assert_close(model.decode(packed, model.encode(packed), few=True), want, **CLOSE)
        memory = Memory(model, 6, int(shown.sum(1).max()) + 1)
        for b in range(4):
            memory.read(pack(layout, ids, shown & (block == b), asked, int(b == 0)))
        torch.testing.assert_close(memory.answer(packed), want, **CLOSE)
        rows = np.array([4, 1])
        memory.keep(rows)
        few = pack(layout, ids[rows], shown[rows], asked[rows], 1, block_BC=block[rows])
        torch.testing.assert_close(memory.answer(few), model.decode(few, model.encode(few)), **CLOSE)


def test_few_queries_need_no_keys_and_values(layout, sample):
    """Where folding is less work it is done, and says the same."""
    model = build(layout)
    ids, _, shown, _ = sample(4)
    one = np.zeros_like(shown)
    one[np.arange(4), (~shown & (np.arange(layout.columns) < 12)).argmax(1)] = True
    packed = pack(layout, ids, shown & ~one, one, 1)
    with torch.no_grad():
        encoded = model.encode(packed)
        want = model.decode(packed, encoded)
        calls = []
        handle = model.decoder[0].cross.kv.register_forward_hook(lambda *a: calls.append(1))
        torch.testing.assert_close(model.decode(packed, encoded, few=True), want, **CLOSE)
        handle.remove()
    assert not calls


def test_drawn_blocks_are_what_generation_does(layout, sample):
    masks = MaskingConfig(components=[{"type": "dirichlet", "input": [4, 24], "target": [4, 16]}])
    length = np.tile([s.slots for s in layout.specs], (400, 1))
    shown, asked = Mixture(masks, layout).draw(length, Key(0, "mask", np.arange(400)))
    key = Key(0, "mask/block", np.arange(400))
    block = draw_blocks(layout, shown, asked, key)
    assert (block[~shown] == 0).all() and (block[:, layout.slice("txt")] == 0).all()
    sizes, shares = set(), []
    for i in range(400):
        grown = np.zeros(layout.columns, dtype=bool)
        for name in ("pic", "snd", "vid"):
            here = layout.slice(name)
            grown[here] = shown[i, here] & asked[i, here].any()
        assert (block[i, ~grown] == 0).all()
        counts = np.bincount(block[i, grown])[1:]
        if len(counts):
            assert (counts[:-1] == counts[0]).all() and 0 < counts[-1] <= counts[0], "one size, the last may be smaller"
            sizes.add(int(counts[0]))
        if grown.any():
            shares.append((block[i, grown] == 0).mean())
    assert len(sizes) > 4 and 0.3 < np.mean(np.array(shares) == 0) < 0.8
    some = np.array([7, 3, 200])
    assert np.array_equal(draw_blocks(layout, shown[some], asked[some], key.rows(some)), block[some])


# -- incremental ----------------------------------------------------------------------------------------------------------


def slow_incremental(model, state, target, options, refresh):
    """Roar without guidance, one request and one question at a time, everything packed anew with the blocks that keeping makes."""
    from nano4m_cli.generate.choose import draw, filter_logits
    from nano4m_cli.generate.schedules import counts
    from nano4m_cli.rng import uniform

    layout, here = model.layout, model.layout.slice(target)
    for i, request in enumerate(state.request_B):
        ids, known = np.where(state.known_BC[i], state.ids_BC[i], 0)[None], state.known_BC[i][None].copy()
        block = np.zeros_like(ids)
        free = np.flatnonzero(~known[0, here])
        order = free[np.argsort(uniform(options.seed, f"order/{target}", np.array([request]), free))]
        for step, now in enumerate(np.split(order, np.cumsum(counts(len(order), options.steps))[:-1])):
            if refresh and step % refresh == 0:
                block[:] = 0
            asked = np.zeros_like(known)
            asked[0, here.start + now] = True
            packed = pack(layout, ids, known, asked, 1, block_BC=block)
            with torch.no_grad():
                logits = model(packed)
            for index, group in zip(packed.group_index, logits, strict=True):
                for at, row in zip([] if index is None else index.tolist(), [] if group is None else group, strict=True):
                    col = int(packed.dec_col[at])
                    u = uniform(options.seed, f"draw/{target}", np.array([request]), col - here.start, step)
                    ids[0, col] = int(draw(filter_logits(row[None], options.temperature, None, None), u)[0])
            known |= asked
            block[asked] = step + 1
        state.ids_BC[i], state.known_BC[i] = np.where(known[0], ids[0], state.ids_BC[i]), known[0]


@pytest.mark.parametrize("encoder, refresh", [("bidirectional", 1), ("bidirectional", 3), ("bidirectional", 99),
                                              ("block_causal", None), ("block_causal", 2)])
@pytest.mark.parametrize("target", ["pic", "snd"])
def test_incremental_equals_a_slow_loop(layout, sample, encoder, refresh, target):
    model = build(layout, encoder)
    options = GenerateOptions(steps=5, temperature=1.0, refresh=refresh, seed=3)
    fast, slow = (start(layout, sample, 5, ["txt"], {target: 2}) for _ in range(2))
    fill(model, fast, target, options)
    slow_incremental(model, slow, target, options, refresh)
    here = layout.slice(target)
    assert fast.known_BC[:, here].all() and np.array_equal(fast.ids_BC[:, here], slow.ids_BC[:, here])


def test_exact_is_refreshed_at_every_step(layout, sample):
    model = build(layout)
    made = {}
    for refresh in (None, 0, 1, 99):
        state = start(layout, sample, 8, ["txt", "vid"])
        fill(model, state, "pic", GenerateOptions(steps=6, temperature=1.0, refresh=refresh))
        made[refresh] = state.ids_BC[:, layout.slice("pic")]
    assert np.array_equal(made[None], made[0]) and np.array_equal(made[None], made[1])
    assert not np.array_equal(made[None], made[99])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("more", [{"scheme": "roar"}, {"scheme": "maskgit"}, {"scheme": "ar"}, {"scheme": "ar", "draft": 3},
                                  {"guidance": 3.0}, {"weights": {"txt": 2.0, "vid": 3.0}}])
def test_a_request_alone_equals_the_same_request_in_a_batch(layout, sample, encoder, more):
    """Requests end at different steps and know different modalities."""
    model = build(layout, encoder)
    options = GenerateOptions(**{"steps": 4, "temperature": 1.0, "refresh": 3, **more})
    whole = start(layout, sample, 6, ["vid"], {"snd": 1})
    here = layout.slice("snd")
    whole.known_BC[3:, layout.slice("vid")] = False
    whole.known_BC[2, here.start : here.start + 7], whole.ids_BC[2, here.start : here.start + 7] = True, 1
    alone = [whole.rows(np.array([i])) for i in range(6)]
    for state in (whole, *alone):
        fill(model, state, "snd", options)
    for i, state in enumerate(alone):
        assert np.array_equal(state.ids_BC[0, here], whole.ids_BC[i, here])
        assert np.array_equal(state.work["snd"][0], whole.work["snd"][i])


def test_what_cannot_keep_or_draft_says_so(layout, sample):
    stack = StackConfig(size="d1w32", head_width=16)
    for model in (GPT(stack, layout), MaskGIT(stack, layout)):
        with pytest.raises(UsageError, match="only runs of task fourm keep"):
            fill(model.eval(), start(layout, sample, 1, []), "pic", GenerateOptions(refresh=2))
    with pytest.raises(UsageError, match="cannot draft"):
        fill(GPT(stack, layout).eval(), start(layout, sample, 1, []), "pic", GenerateOptions(draft=2))
    from nano4m_cli.config import build as read

    for bad in ({"refresh": -1}, {"draft": 0}, {"draft": 65}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            read(GenerateOptions, bad)


# -- speculative ----------------------------------------------------------------------------------------------------------


def test_settling_gives_the_model_s_distribution_whatever_the_draft():
    rng, n, v = np.random.default_rng(0), 40_000, 6
    p = torch.tensor([0.3, 0.0, 0.2, 0.1, 0.4, 0.0])
    for q in (torch.tensor([0.1, 0.5, 0.1, 0.1, 0.1, 0.1]), p, torch.tensor([0.0, 1.0, 0, 0, 0, 0])):
        ids = rng.choice(v, n, p=(q / q.sum()).double().numpy() / float((q / q.sum()).double().sum()))
        keep, other = settle(p.log().expand(n, v), q.log().expand(n, v), ids, rng.random(n), rng.random(n))
        got = np.bincount(np.where(keep, ids, other), minlength=v)
        assert (got[p.numpy() == 0] == 0).all()
        want = n * p.double().numpy()[p.numpy() > 0]
        chi2 = float(((got[p.numpy() > 0] - want) ** 2 / want).sum())
        assert chi2 < 3 + 5 * 6**0.5, chi2
        assert abs(keep.mean() - float(torch.minimum(p, q).sum())) < 0.02


def exact_codes(model, ids, known, columns, block, options):
    """Return {ids of the last slots: probability} left to right, by the model's own answers for every beginning."""
    if not len(columns):
        return {(): 1.0}
    asked = np.zeros_like(known)
    asked[0, columns[0]] = True
    packed = pack(model.layout, ids, known, asked, 1, block_BC=block)
    with torch.no_grad():
        (logits,) = [x for x in model(packed) if x is not None]
    out = {}
    for i, p in enumerate((logits[0] / options.temperature).softmax(-1).tolist()):
        ids2, known2, block2 = ids.copy(), known.copy(), block.copy()
        ids2[0, columns[0]], known2[0, columns[0]] = i, True
        if model.config.encoder == "block_causal":
            block2[0, columns[0]] = block.max() + 1
        out |= {(i, *rest): p * q for rest, q in exact_codes(model, ids2, known2, columns[1:], block2, options).items()}
    return out


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("draft", [1, 2, 5])
def test_drafted_codes_are_distributed_as_the_model_says(layout, sample, encoder, draft):
    """Three slots left, 343 outcomes enumerated; chi-square over many requests."""
    model, n, options = build(layout, encoder), 3000, GenerateOptions(temperature=0.8, draft=draft)
    one, here = start(layout, sample, 1, ["txt"]), layout.slice("snd")
    one.known_BC[0, here.start : here.stop - 3], one.ids_BC[0, here.start : here.stop - 3] = True, 2
    want = exact_codes(model, np.where(one.known_BC, one.ids_BC, 0), one.known_BC.copy(),
                       np.arange(here.stop - 3, here.stop), np.zeros(one.ids_BC.shape, dtype=np.int64), options)
    state = State(np.repeat(one.ids_BC, n, 0), np.repeat(one.known_BC, n, 0), np.arange(n))
    chain(model, state, ["snd"], options, batch=1000)
    got = {k: 0 for k in want}
    for row in state.ids_BC[:, here.stop - 3 : here.stop].tolist():
        got[tuple(row)] += 1
    assert chi_square(got, want, n) < 5, (got, want)
    ids, calls = state.work["snd"].sum(0)
    assert ids == 3 * n and 2 * n <= calls < 3 * n


def chi_square(got, want, n):
    """Return by how many standard deviations chi-square lies above its mean; outcomes of fewer than 5 are taken together."""
    pairs = [(got[k], n * p) for k, p in want.items()]
    few = [x for x in pairs if x[1] < 5]
    pairs = [x for x in pairs if x[1] >= 5] + ([(sum(a for a, _ in few), sum(b for _, b in few))] if few else [])
    chi2 = sum((a - b) ** 2 / b for a, b in pairs if b > 0)
    return (chi2 - (len(pairs) - 1)) / (2 * (len(pairs) - 1)) ** 0.5


@pytest.mark.parametrize("draft", [1, 2, 4])
def test_drafted_text_is_distributed_as_the_model_says(layout, sample, draft):
    """The first three tokens, EOS among them, enumerated by asking for every beginning."""
    model, n = build(layout), 3000
    options = GenerateOptions(text_temperature=0.6, top_k=4, repetition=1.5, draft=draft)
    one, here, spec = start(layout, sample, 1, ["pic"]), layout.slice("txt"), layout.specs[2]
    from nano4m_cli.generate.choose import filter_logits, penalize

    def tree(begun):
        if len(begun) == 3 or spec.eos in begun:
            return {tuple(begun): 1.0}
        ids, asked = np.where(one.known_BC, one.ids_BC, 0), np.zeros_like(one.known_BC)
        ids[0, here.start : here.start + len(begun)] = begun
        asked[0, here.start : here.start + len(begun) + 1] = True
        with torch.no_grad():
            (logits,) = [x for x in model(pack(layout, ids, one.known_BC, asked, 1)) if x is not None]
        seen = torch.zeros(1, spec.vocab_size, dtype=torch.bool)
        seen[0, [i for i in begun if i != spec.eos]] = True
        p = filter_logits(penalize(logits[-1:], seen, 1.5), 0.6, 4, None)[0].exp().tolist()
        return {k: q * w for i, q in enumerate(p) if q > 0 for k, w in tree([*begun, i]).items()}

    want = tree([])
    state = State(np.repeat(one.ids_BC, n, 0), np.repeat(one.known_BC, n, 0), np.arange(n))
    fill(model, state, "txt", options)
    got = dict.fromkeys(want, 0)
    for ids, known in zip(state.ids_BC[:, here], state.known_BC[:, here], strict=True):
        got[tuple(ids[known][:3].tolist())] += 1
        assert (ids[known] == spec.eos).sum() == 1 and ids[known][-1] == spec.eos
    assert chi_square(got, want, n) < 5
    ids, calls = state.work["txt"].sum(0)
    assert ids == state.known_BC[:, here].sum() and ids > calls


def test_greedy_drafts_change_nothing(layout, sample):
    model = build(layout)
    for target, known in (("snd", "pic"), ("txt", "pic")):
        made = []
        for draft in (None, 1, 3, 64):
            state = start(layout, sample, 7, [known], {target: 1})
            fill(model, state, target, GenerateOptions(scheme="ar", temperature=0, text_temperature=0, draft=draft))
            made.append(np.where(state.known_BC, state.ids_BC, -1)[:, layout.slice(target)])
        assert all(np.array_equal(m, made[0]) for m in made[1:]), target


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_written_text_is_what_one_pass_over_it_says(layout, sample, positions):
    """Greedy text, written token by token from cached keys and values, against the model's answers for all of it at once."""
    model, text = build(layout, positions=positions), layout.slice("txt")
    state = start(layout, sample, 6, ["pic"], {"txt": 1})
    before = state.known_BC.copy()
    fill(model, state, "txt", GenerateOptions(text_temperature=0))
    asked = state.known_BC & ~before
    assert asked.sum() > 12
    with torch.no_grad():
        (logits,) = [x for x in model(pack(layout, state.ids_BC, before, asked, 1)) if x is not None]
    row, col = np.nonzero(asked)
    free = col < text.stop - 1  # the last slot can only end the text
    assert np.array_equal(logits.argmax(-1).numpy()[free], state.ids_BC[row, col][free])


def test_work_counts_ids_and_calls(layout, sample):
    model = build(layout)
    state = start(layout, sample, 4, ["txt"])
    chain(model, state, ["pic", "snd"], GenerateOptions(steps=3), batch=3)
    assert state.work["pic"].tolist() == [[12, 3]] * 4 and state.work["snd"].tolist() == [[10, 3]] * 4


# -- training and files -----------------------------------------------------------------------------------------------------


def test_a_block_causal_encoder_is_trained_on_blocks_and_reloaded(tiny, tmp_path, one_thread):  # noqa: F811
    """Losses fall, accumulation changes nothing, and the run generates without reading anything twice."""
    space = linked(tiny, tmp_path)
    prepared = prepare(config(space.root, model__encoder="block_causal", train__steps=40), space)
    (part,) = prepared.task.batch(0)
    assert part.packed.enc_block.max() > 1 and part.packed.enc_block.shape == part.packed.enc_ids.shape
    start_run(prepared, False, "cpu", lambda *_: None)
    losses = [r["loss"] for r in records(prepared.folder, "train")]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.95 * sum(losses[:5])
    run = open_run(space, prepared.folder.name, "cpu")
    assert run.model.config.encoder == "block_causal"
    (plain,) = prepare(config(space.root, name="plain"), space).task.batch(0)
    assert plain.packed.enc_block is None and torch.equal(plain.packed.enc_ids, part.packed.enc_ids)


def test_the_bench_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import generate

    monkeypatch.setattr(generate, "STEPS", 5)
    figures = {f["name"]: f for f in generate.Bench(2, "d1-1w64").run(1)}
    assert {"exact_speedup", "incremental_speedup", "plain_sample", "exact_sample", "incremental_sample"} <= set(figures)
    assert all(0 < f["low"] <= f["value"] <= f["high"] for f in figures.values())
    bench = generate.Bench(2, "d2-1w64")
    plain, exact = bench.flops()
    d, heads, vocab = 64, 1, 16384
    shown = [64 + round(196 * i / 5) for i in range(5)]
    asked = np.diff([round(196 * i / 5) for i in range(6)])
    want = sum(2 * (24 * d * d * n + 4 * d * n * n) + 2 * d * d * n + 28 * d * d * m + 4 * d * m * m + 4 * d * d * n + 4 * d * m * n
               + 2 * d * 50304 * m for n, m in zip(shown, asked, strict=True))
    assert plain == pytest.approx(want)
    want = sum(2 * (24 * d * d * n + 4 * d * n * n) + 2 * d * d * n + 32 * d * d * m + 4 * d * m * m + 4 * heads * d * m * n
               + 2 * d * vocab * m for n, m in zip([n + 1 for n in shown], asked, strict=True))
    assert exact == pytest.approx(want)


def test_the_plain_way_of_the_bench_is_the_model_without_masks(monkeypatch, layout, sample):
    """Without padding, masks of ones and none are the same."""
    monkeypatch.syspath_prepend(str(BENCH))
    from _padded import Padded4M

    torch.manual_seed(0)
    model = Padded4M(layout, 32, 1, 1, 2, 60)
    draw = np.random.default_rng(0)
    ids, col, asked = (torch.from_numpy(draw.integers(0, 30, (2, n))) for n in (9, 9, 4))
    see = torch.ones(2, 9, 9, dtype=torch.bool)
    want = model(ids, col, asked, see, see[:, :4, :4], see[:, :4])
    torch.testing.assert_close(model(ids, col, asked), want, **CLOSE)
