"""Generation: schedules, choices of ids, and the sampler against a slow loop that packs everything anew."""

import math

import numpy as np
import pytest
import torch

from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError, UsageError
from nano4m_cli.generate.choose import draw, filter_logits, penalize
from nano4m_cli.generate.sampler import GUIDANCE, GenerateOptions, State, chain, fill, group_logits, resolve
from nano4m_cli.generate.schedules import counts, ramp_at, ramp_parts
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.rng import uniform

SCHEMES = ["roar", "maskgit", "ar", "onepass"]
INF = float("inf")


@pytest.fixture(scope="module")
def model(layout):
    """Untrained, its logits stretched so that they say something."""
    torch.manual_seed(1)
    model = FourM(FourMConfig(size="d1-1w32", head_width=16), layout).eval()
    with torch.no_grad():
        model.head.table.mul_(4.0)
    return model


def start(layout, sample, n: int, known: list[str], seed: int = 0, part: dict[str, int] | None = None) -> State:
    """Requests with whole modalities known (texts up to their end), and the first slots of others."""
    ids, length, _, _ = sample(n, seed)
    is_known = np.zeros_like(ids, dtype=bool)
    for name in [*known, *(part or {})]:
        here, m = layout.slice(name), layout.names.index(name)
        size = length[:, m] if name in known else np.full(n, part[name])
        is_known[:, here] = np.arange(here.stop - here.start) < size[:, None]
    return State(np.where(is_known, ids, 10**6), is_known, np.arange(n))  # unknown ids must never be read


# -- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots, steps, schedule, want",
    [
        (16, 4, "linear", [4, 4, 4, 4]),
        (10, 4, "linear", [2, 3, 3, 2]),
        (3, 8, "linear", [1, 1, 1]),
        (5, 1, "linear", [5]),
        (1, 1, "linear", [1]),
        (0, 4, "linear", []),
        (16, 4, "cosine", [1, 4, 5, 6]),
        (16, 8, "cosine", [1, 2, 2, 2, 3, 3, 3]),
        (4, 4, "cosine", [1, 1, 2]),
        (0, 4, "cosine", []),
        (7, 1, "cosine", [7]),
    ],
)
def test_counts_literal(slots, steps, schedule, want):
    assert counts(slots, steps, schedule) == want


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_counts_sum_and_bounds(schedule):
    for slots in range(0, 70, 3):
        for steps in range(1, 40, 3):
            got = counts(slots, steps, schedule)
            assert sum(got) == slots and len(got) <= steps and all(n > 0 for n in got)
            if schedule == "linear" and got:
                assert max(got) - min(got) <= 1


def test_cosine_fills_few_at_first():
    got = counts(256, 8, "cosine")
    assert got == sorted(got)


@pytest.mark.parametrize(
    "slots, shares, want",
    [
        (16, (4, 4, 8), [4, 4, 8]),
        (16, (0.25, 0.25, 0.5), [4, 4, 8]),
        (8, (4, 4, 8), [2, 2, 4]),
        (5, (1, 1), [2, 3]),
        (10, (1, 0, 3), [2, 8]),
        (2, (1, 1, 1, 1), [1, 1]),
        (7, (9,), [7]),
        (0, (1, 2), []),
    ],
)
def test_counts_of_shares(slots, shares, want):
    assert counts(slots, 99, shares) == want


# -- ramps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ramp, steps, want",
    [
        (0.5, 3, [0.5, 0.5, 0.5]),
        ("0.5", 2, [0.5, 0.5]),
        ("1..0", 5, [1, 0.75, 0.5, 0.25, 0]),
        ("1..0^2", 5, [1, 15 / 16, 0.75, 7 / 16, 0]),
        ("0..4^0.5", 3, [0, 4 * 0.5**0.5, 4]),
        ("1..3", 1, [1]),
        ("2e-1..1", 2, [0.2, 1]),
    ],
)
def test_ramps_literal(ramp, steps, want):
    assert [float(ramp_at(ramp, i, steps)) for i in range(steps)] == pytest.approx(want)
    assert np.broadcast_to(ramp_at(ramp, np.arange(steps), steps), steps).tolist() == pytest.approx(want)


@pytest.mark.parametrize("bad", ["", "a", "1..", "..1", "1..2..3", "1..2^", "1...2..", "1-2"])
def test_what_is_no_ramp(bad):
    with pytest.raises(ValueError, match="write a number"):
        ramp_parts(bad)


# -- filters ------------------------------------------------------------------------------------------------------


def logp(*p):
    return torch.tensor([p]).log()


@pytest.mark.parametrize(
    "options, want",
    [
        ((1.0, None, None), [0.1, 0.4, 0.3, 0.2]),
        ((0.0, None, None), [0, 1, 0, 0]),
        ((0.0, 3, 0.5), [0, 1, 0, 0]),
        ((1.0, 1, None), [0, 1, 0, 0]),
        ((1.0, 2, None), [0, 4 / 7, 3 / 7, 0]),
        ((1.0, 4, None), [0.1, 0.4, 0.3, 0.2]),
        ((1.0, 99, None), [0.1, 0.4, 0.3, 0.2]),
        ((1.0, None, 0.39), [0, 1, 0, 0]),
        ((1.0, None, 0.5), [0, 4 / 7, 3 / 7, 0]),
        ((1.0, None, 0.75), [0, 4 / 9, 3 / 9, 2 / 9]),
        ((1.0, None, 0.95), [0.1, 0.4, 0.3, 0.2]),
        ((1.0, None, 1.0), [0.1, 0.4, 0.3, 0.2]),
        ((1.0, None, 1e-9), [0, 1, 0, 0]),
        ((0.5, None, None), [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ((2.0, 2, None), [0, 2 / (2 + math.sqrt(3)), math.sqrt(3) / (2 + math.sqrt(3)), 0]),
        # The order matters: temperature before top-p (16/30 reaches 0.5), top-k before top-p (4/7 reaches 0.55).
        ((0.5, None, 0.5), [0, 1, 0, 0]),
        ((1.0, 2, 0.55), [0, 1, 0, 0]),
    ],
)
def test_filters_literal(options, want):
    got = filter_logits(logp(0.1, 0.4, 0.3, 0.2), *options)
    assert got.dtype == torch.float32
    assert got.exp()[0].tolist() == pytest.approx(want, abs=1e-6)
    assert [math.isinf(x) for x in got[0].tolist()] == [w == 0 for w in want], "barred ids are -inf"


@pytest.mark.parametrize(
    "options, want",
    [
        ((1.0, None, None, 0.5), [0, 4 / 9, 3 / 9, 2 / 9]),
        ((1.0, None, None, 0.51), [0, 4 / 7, 3 / 7, 0]),
        ((1.0, None, None, 1.0), [0, 1, 0, 0]),
        ((1.0, None, None, 1e-6), [0.1, 0.4, 0.3, 0.2]),
        # Temperature comes first: (0.2 / 0.4)^2 is less than 0.5. min-p sees what top-k left, of the same ratios.
        ((0.5, None, None, 0.5), [0, 16 / 25, 9 / 25, 0]),
        ((1.0, 3, None, 0.7), [0, 4 / 7, 3 / 7, 0]),
        ((0.0, None, None, 0.1), [0, 1, 0, 0]),
    ],
)
def test_min_p_literal(options, want):
    assert filter_logits(logp(0.1, 0.4, 0.3, 0.2), *options).exp()[0].tolist() == pytest.approx(want, abs=1e-6)


def test_each_row_may_have_its_own_temperature():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    heat = torch.tensor([0.0, 0.3, 1.0, 0.0, 2.0, 0.7])
    got = filter_logits(logits, heat, 5, 0.9, 0.05)
    for i, t in enumerate(heat.tolist()):
        torch.testing.assert_close(got[i : i + 1], filter_logits(logits[i : i + 1], t, 5, 0.9, 0.05))


def test_repetition_penalty():
    p = logp(0.1, 0.4, 0.3, 0.2)
    seen = torch.tensor([[False, True, False, True]])
    want = np.array([0.1, 0.4**2, 0.3, 0.2**2])
    for level in (0.0, 7.0):
        got = penalize(p + level, seen, 2.0).softmax(-1)[0].tolist()
        assert got == pytest.approx((want / want.sum()).tolist(), abs=1e-6)
    assert torch.allclose(penalize(p, seen, 1.0), p)


def test_filters_do_not_depend_on_the_level_of_the_logits():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for options in ((0.7, 4, None), (1.0, None, 0.6), (0.0, None, None), (1.3, 5, 0.9)):
        torch.testing.assert_close(filter_logits(logits + 3.0, *options), filter_logits(logits, *options))
        for i in range(5):
            torch.testing.assert_close(
                filter_logits(logits[i : i + 1], *options)[0], filter_logits(logits, *options)[i]
            )


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.softmax(-1)
    for top_p in (0.3, 0.8, 0.99):
        kept = torch.isfinite(filter_logits(logits, 1.0, None, top_p))
        for row, keep in zip(p, kept, strict=True):
            total, want = 0.0, set()
            for i in row.argsort(descending=True).tolist():
                if total >= top_p:
                    break
                want.add(i)
                total += float(row[i])
            assert set(keep.nonzero().squeeze(1).tolist()) == want


# -- draws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(1.0, None, None), (0.7, 5, None), (1.0, None, 0.8), (1.5, 6, 0.9)])
def test_draws_follow_the_distribution_and_never_yield_barred_ids(options):
    n = 20_000
    p = filter_logits(torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.2, -0.4, 0.9, 0.8]]), *options)
    ids, score = draw(p.expand(n, -1), np.random.default_rng(0).random(n))
    seen, want = np.bincount(ids.numpy(), minlength=8), n * p[0].exp().numpy()
    assert (seen[want == 0] == 0).all()
    here = want > 0
    chi2 = float(((seen[here] - want[here]) ** 2 / want[here]).sum())
    assert chi2 < here.sum() - 1 + 5 * math.sqrt(2 * (here.sum() - 1)), chi2
    assert torch.equal(score, p[0][ids])


@pytest.mark.parametrize("u", [1e-300, 2.0**-54, 0.5, 1 - 2.0**-53, 1.0])
def test_extreme_numbers_still_give_legal_ids(u):
    p = torch.tensor(
        [[-INF, -INF, 0.0, -INF], [-INF, math.log(0.5), math.log(0.5), -INF], [math.log(1e-30), 0.0, -INF, -INF]]
    )
    ids, score = draw(p, np.full(3, u))
    assert torch.isfinite(score).all() and ids[0] == 2 and ids[1] in (1, 2) and ids[2] in (0, 1)


def test_draw_inverts_the_cumulative_distribution():
    p = logp(0.25, 0.0, 0.5, 0.25)
    ids = [int(draw(p, np.array([u]))[0]) for u in (0.01, 0.24, 0.26, 0.74, 0.76, 0.999)]
    assert ids == [0, 0, 2, 2, 3, 3]


# -- filling slots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["pic", "snd", "vid"])
def test_every_slot_is_filled_and_known_ones_stay(model, layout, sample, scheme, target):
    state = start(layout, sample, 6, [n for n in ("pic", "txt") if n != target], part={target: 3})
    before = state.ids_BC.copy(), state.known_BC.copy()
    fill(model, state, target, GenerateOptions(scheme=scheme, steps=4, temperature=1.0))
    here, spec = layout.slice(target), layout.specs[layout.names.index(target)]
    assert state.known_BC[:, here].all()
    assert np.array_equal(state.ids_BC[before[1]], before[0][before[1]]), "known slots are untouched"
    elsewhere = np.ones(layout.columns, dtype=bool)
    elsewhere[here] = False
    assert np.array_equal(state.known_BC[:, elsewhere], before[1][:, elsewhere])
    assert np.array_equal(state.ids_BC[:, elsewhere], before[0][:, elsewhere])
    spec.check_ids(state.ids_BC[:, here], "test")
    assert len({tuple(r) for r in state.ids_BC[:, here]}) > 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seed_reproduces_and_another_differs(model, layout, sample, scheme):
    def run(seed):
        state = start(layout, sample, 8, ["txt"])
        fill(model, state, "snd", GenerateOptions(scheme=scheme, steps=3, temperature=1.0, seed=seed))
        return state.ids_BC[:, layout.slice("snd")]

    assert np.array_equal(run(0), run(0)) and (run(0) != run(1)).any(1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["pic", "snd", "txt"])
def test_a_request_alone_equals_the_same_request_in_a_batch(model, layout, sample, scheme, target):
    options = GenerateOptions(scheme=scheme, steps=5, temperature=1.0, text_temperature=1.0, schedule="cosine")
    # Requests with different known parts: they end at different steps.
    whole = start(layout, sample, 7, ["vid"])
    here = layout.slice(target)
    for i in range(7):
        whole.known_BC[i, here.start : here.start + i % 4] = True
        whole.ids_BC[i, here.start : here.start + i % 4] = 1
    alone = [whole.rows(np.array([i])) for i in range(7)]
    shuffled = whole.rows(np.array([4, 2, 6, 0]))
    for state in (whole, shuffled, *alone):
        fill(model, state, target, options)
    for i, state in enumerate(alone):
        assert np.array_equal(state.known_BC[0], whole.known_BC[i])
        assert np.array_equal(state.ids_BC[0][state.known_BC[0]], whole.ids_BC[i][whole.known_BC[i]])
    assert np.array_equal(
        np.where(shuffled.known_BC, shuffled.ids_BC, 0), np.where(whole.known_BC, whole.ids_BC, 0)[[4, 2, 6, 0]]
    )


def test_onepass_equals_maskgit_and_roar_of_one_step(model, layout, sample):
    out = []
    for scheme, temperature in [(s, t) for t in (0.0, 1.0) for s in ("onepass", "maskgit", "roar")]:
        state = start(layout, sample, 5, ["txt"])
        fill(model, state, "pic", GenerateOptions(scheme=scheme, steps=1, temperature=temperature))
        out.append(state.ids_BC[:, layout.slice("pic")])
    assert np.array_equal(out[0], out[1]) and np.array_equal(out[0], out[2])
    assert np.array_equal(out[3], out[4]) and np.array_equal(out[3], out[5]) and not np.array_equal(out[0], out[3])


def one_logits(model, ids, known, asked):
    """Return {column: logits} of one request, packed anew."""
    packed = pack(model.layout, ids, known, asked, model.config.registers)
    with torch.no_grad():
        out = model(packed)
    found = {}
    for index, logits in zip(packed.group_index, out, strict=True):
        for i, row in zip([] if index is None else index.tolist(), [] if logits is None else logits, strict=True):
            found[int(packed.dec_col[i])] = row
    return found


def test_onepass_at_temperature_zero_is_the_argmax(model, layout, sample):
    state = start(layout, sample, 3, ["txt", "vid"], part={"snd": 4})
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    fill(model, state, "snd", GenerateOptions(scheme="onepass", temperature=0))
    here = layout.slice("snd")
    for i in range(3):
        asked = np.zeros_like(known[i : i + 1])
        asked[0, here] = ~known[i, here]
        for c, row in one_logits(model, ids[i : i + 1], known[i : i + 1], asked).items():
            assert state.ids_BC[i, c] == int(row.argmax())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_mean_is_the_expected_value_of_the_codes(model, layout, sample, guidance):
    """Against one request and one slot at a time; what was known keeps the values of its ids."""
    state = start(layout, sample, 5, ["txt", "vid"], part={"pic": 4})
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    chain(model, state, ["pic"], GenerateOptions(scheme="mean", guidance=guidance), batch=2)
    here, digits = layout.slice("pic"), [(v % 4, v // 4) for v in range(12)]
    value = torch.tensor([[(a - 2) / 2, float(b - 1)] for a, b in digits])  # FSQ of levels (4, 3), written out
    assert state.known_BC[:, here].all() and state.values["pic"].shape == (5, 12, 2)
    for i in range(5):
        asked, bare = np.zeros_like(known[i : i + 1]), np.zeros_like(known[i : i + 1])
        asked[0, here], bare[0, here] = ~known[i, here], known[i, here]
        given = one_logits(model, ids[i : i + 1], known[i : i + 1], asked)
        alone = one_logits(model, ids[i : i + 1], bare, asked)
        assert len(given) == 8
        for c in range(here.start, here.stop):
            got = torch.from_numpy(state.values["pic"][i, c - here.start])
            if c in given:
                logits = alone[c] + guidance * (given[c] - alone[c])
                assert torch.allclose(got, (logits.softmax(-1)[:, None] * value).sum(0), atol=1e-5)
                assert state.ids_BC[i, c] == int(logits.argmax())
            else:
                assert torch.equal(got, value[ids[i, c]])


def test_mean_needs_codes_that_stand_for_numbers_and_leaves_text_to_ar(model, layout, sample):
    with pytest.raises(UsageError, match="those of snd do not"):
        fill(model, start(layout, sample, 1, ["txt"]), "snd", GenerateOptions(scheme="mean"))
    texts = []
    for scheme in ("mean", "auto"):
        state = start(layout, sample, 3, ["pic"])
        fill(model, state, "txt", GenerateOptions(scheme=scheme))
        texts.append(np.where(state.known_BC, state.ids_BC, 0)[:, layout.slice("txt")])
    assert np.array_equal(*texts) and not state.values


def test_state_decodes_values_where_it_has_them(layout, sample):
    class Echo:
        def decode(self, ids):
            return [("ids", tuple(i)) for i in ids]

        def decode_values(self, values):
            return [("values", v.shape, float(v[0, 0])) for v in values]

    state = start(layout, sample, 5, ["pic", "txt"])
    assert [kind for kind, _ in state.decode(layout, "pic", Echo(), 2)] == ["ids"] * 5
    lengths = [len(ids) for _, ids in state.decode(layout, "txt", Echo())]
    assert lengths == state.known_BC[:, layout.slice("txt")].sum(1).tolist()
    state.values["pic"] = np.arange(5.0)[:, None, None] * np.ones((5, 12, 2))
    assert state.decode(layout, "pic", Echo(), 2) == [("values", (12, 2), float(i)) for i in range(5)]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_equals_two_questions_asked_apart(model, layout, sample, scale):
    """Greedy, one request and one logit vector at a time: u + s (c - u), u seeing the target's own slots alone."""
    state = start(layout, sample, 4, ["txt", "vid"], part={"snd": 3})
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    fill(model, state, "snd", GenerateOptions(scheme="onepass", temperature=0, guidance=scale))
    here = layout.slice("snd")
    for i in range(4):
        asked, bare = np.zeros_like(known[i : i + 1]), np.zeros_like(known[i : i + 1])
        asked[0, here], bare[0, here] = ~known[i, here], known[i, here]
        given = one_logits(model, ids[i : i + 1], known[i : i + 1], asked)
        alone = one_logits(model, ids[i : i + 1], bare, asked)
        assert len(given) > 3
        for c in given:
            assert state.ids_BC[i, c] == int((alone[c] + scale * (given[c] - alone[c])).argmax())


def test_guidance_moves_what_is_drawn_and_keeps_requests_apart(model, layout, sample):
    def run(scale, rows):
        state = start(layout, sample, 6, ["txt"]).rows(rows)
        fill(model, state, "pic", GenerateOptions(temperature=1.0, steps=4, guidance=scale))
        return state.ids_BC[:, layout.slice("pic")]

    everyone = np.arange(6)
    assert np.array_equal(run(1.0, everyone), run(None, everyone)) and not np.array_equal(run(1.0, everyone), run(4.0, everyone))
    assert np.array_equal(run(4.0, everyone)[[4, 1]], run(4.0, np.array([4, 1])))


def test_guidance_is_used_only_where_training_asked_from_nothing(model):
    posed = {"->pic": 0.01, "->snd": 1e-5, "txt->snd": 0.2}
    auto = GenerateOptions()
    assert resolve(auto, ["pic"], model, posed).guidance == resolve(auto, ["pic", "txt"], model, posed).guidance == GUIDANCE
    for targets in (["snd"], ["pic", "snd"], ["vid"], ["txt"]):
        assert resolve(auto, targets, model, posed).guidance == 1.0, targets
    assert resolve(GenerateOptions(guidance=4.0), ["snd"], model, posed).guidance == 4.0


@pytest.mark.parametrize("target", ["pic", "snd"])
def test_ar_over_slots_equals_a_slow_loop(model, layout, sample, target):
    state = start(layout, sample, 3, ["txt"], part={target: 2})
    slow = state.rows(np.arange(3))
    fill(model, state, target, GenerateOptions(scheme="ar", temperature=0))
    here = layout.slice(target)
    for i in range(3):
        for c in range(here.start + 2, here.stop):
            asked = np.zeros((1, layout.columns), dtype=bool)
            asked[0, c] = True
            row = one_logits(model, slow.ids_BC[i : i + 1], slow.known_BC[i : i + 1], asked)[c]
            slow.ids_BC[i, c], slow.known_BC[i, c] = int(row.argmax()), True
        assert np.array_equal(state.ids_BC[i, here], slow.ids_BC[i, here])


def test_roar_fills_a_random_order_in_the_planned_numbers(model, layout, sample, monkeypatch):
    from nano4m_cli.generate import sampler

    asked = []
    real = sampler._ask

    def spy(model, state, columns, asked_BL, *rest):
        asked.append((state.request_B.copy(), asked_BL.copy()))
        return real(model, state, columns, asked_BL, *rest)

    monkeypatch.setattr(sampler, "_ask", spy)
    state = start(layout, sample, 4, ["txt"])
    state.known_BC[1, layout.slice("pic").start : layout.slice("pic").start + 10] = True
    state.ids_BC[1, layout.slice("pic").start : layout.slice("pic").start + 10] = 0
    fill(model, state, "pic", GenerateOptions(scheme="roar", steps=4))
    per_request = {r: [m[list(req).index(r)] for req, m in asked if r in req] for r in range(4)}
    assert [int(m.sum()) for m in per_request[0]] == counts(12, 4) and [int(m.sum()) for m in per_request[1]] == [1, 1]
    for r, masks in per_request.items():
        assert (np.sum(masks, axis=0) == (np.arange(12) >= (10 if r == 1 else 0))).all(), "each unknown slot once"
    assert len({tuple(per_request[r][0]) for r in (0, 2, 3)}) > 1, "requests have their own order"


def taken_by_step(model, state, target, options, monkeypatch):
    """Return the slots of request 0 in the order in which they become known, one list per step."""
    from nano4m_cli.generate import sampler

    seen, real = [], sampler._ask

    def spy(model, part, columns, *rest):
        seen.append(part.known_BC[0, columns].copy())
        return real(model, part, columns, *rest)

    with monkeypatch.context() as m:
        m.setattr(sampler, "_ask", spy)
        fill(model, state, target, options)
    seen.append(np.ones_like(seen[0]))
    return [np.flatnonzero(b & ~a).tolist() for a, b in zip(seen[:-1], seen[1:], strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_maskgit_takes_the_most_confident_first(model, layout, sample, monkeypatch, temperature):
    """At (nearly) no temperature the drawn id is the likeliest; its probability under the model is the confidence."""
    state = start(layout, sample, 1, ["txt"])
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    here = layout.slice("pic")
    asked = np.zeros_like(known)
    asked[0, here] = True
    confidence = [
        float(one_logits(model, ids, known, asked)[c].log_softmax(-1).max()) for c in range(here.start, here.stop)
    ]
    first = taken_by_step(
        model, state, "pic", GenerateOptions(scheme="maskgit", steps=4, temperature=temperature), monkeypatch
    )[0]
    assert first == sorted(np.argsort(-np.array(confidence), kind="stable")[:3].tolist())


def test_maskgit_prefers_confident_slots(model, layout, sample, monkeypatch):
    """With noise on the confidence, slots taken at the first step are likelier on average than those left."""
    from nano4m_cli.generate import sampler

    first, real = [], sampler._ask

    def spy(model, part, columns, *rest):
        out = real(model, part, columns, *rest)
        first.append((out, part.request_B))
        return out

    monkeypatch.setattr(sampler, "_ask", spy)
    state = start(layout, sample, 60, ["txt"])
    fill(model, state, "pic", GenerateOptions(scheme="maskgit", steps=4, temperature=0.7))
    (row, slot, ids, logp), _ = first[0]
    left = np.zeros((60, 12), dtype=bool)
    (row2, slot2, _, _), _ = first[1]
    left[row2, slot2] = True
    taken = ~left[row, slot]
    assert taken.sum() == 60 * 3 and logp[taken].mean() > logp[~taken].mean() + 0.3
    assert (state.ids_BC[row[taken], slot[taken]] == ids[taken]).all(), "what was drawn is what is kept"


def test_maskgit_takes_as_many_as_planned(model, layout, sample, monkeypatch):
    state = start(layout, sample, 1, ["txt"])
    steps = taken_by_step(
        model, state, "pic", GenerateOptions(scheme="maskgit", steps=4, temperature=1.0, schedule="cosine"), monkeypatch
    )
    assert [len(s) for s in steps] == counts(12, 4, "cosine")


def test_noise_of_its_own_decides_the_order_and_the_temperature_the_ids(model, layout, sample, monkeypatch):
    """Without noise the surest go first even when ids are drawn hot; much noise orders by chance alone."""
    def order(**options):
        state = start(layout, sample, 1, ["txt"])
        return taken_by_step(
            model, state, "pic", GenerateOptions(scheme="maskgit", temperature=0, schedule=(3, 3, 6), **options), monkeypatch
        )

    sure = order()
    assert order(noise=0) == order(noise="0..0") == sure and [len(s) for s in sure] == [3, 3, 6]
    assert order(noise=50.0) != sure and order(noise="50..50") != sure


def test_a_ramp_of_temperature_is_greedy_where_it_is_zero(model, layout, sample):
    """From hot to greedy over 12 steps: the last slot is the likeliest of what was drawn before."""
    state = start(layout, sample, 5, ["txt"])
    fill(model, state, "pic", GenerateOptions(scheme="ar", temperature="3..0"))
    here = layout.slice("pic")
    last = here.stop - 1
    for i in range(5):
        known, asked = state.known_BC[i : i + 1].copy(), np.zeros((1, layout.columns), dtype=bool)
        known[0, last], asked[0, last] = False, True
        ids = np.where(known, state.ids_BC[i : i + 1], 0)
        assert state.ids_BC[i, last] == int(one_logits(model, ids, known, asked)[last].argmax())


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
def test_ramps_leave_a_request_what_it_is_alone(model, layout, sample, scheme):
    """Requests with as many steps as slots are unknown, so that each has its own place on every ramp."""
    options = GenerateOptions(
        scheme=scheme, steps=9, temperature="2..0.1^2", noise="3..0", guidance="4..0", min_p=0.01, seed=3
    )
    whole = start(layout, sample, 6, ["txt"])
    here = layout.slice("pic")
    for i in range(6):
        whole.known_BC[i, here.start : here.start + 2 * i] = True
        whole.ids_BC[i, here.start : here.start + 2 * i] = 1
    alone = [whole.rows(np.array([i])) for i in range(6)]
    for state in (whole, *alone):
        fill(model, state, "pic", options)
    assert all(np.array_equal(one.ids_BC[0, here], whole.ids_BC[i, here]) for i, one in enumerate(alone))


def test_a_ramp_of_guidance_passes_through_its_scales(model, layout, sample, monkeypatch):
    """A scale that never changes, written as a ramp, is the scale; one that falls to 1 ends as plain conditioning."""
    made = []
    for guidance in (3.0, "3..3", "3..1"):
        state = start(layout, sample, 6, ["txt"])
        fill(model, state, "pic", GenerateOptions(temperature=1.0, steps=4, guidance=guidance))
        made.append(state.ids_BC[:, layout.slice("pic")])
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_sampling_follows_the_model(model, layout, sample):
    """One slot of many equal requests: the drawn ids follow the model's distribution."""
    n = 3000
    one = start(layout, sample, 1, ["txt"])
    here = layout.slice("vid")
    one.known_BC[0, here.start : here.stop - 1], one.ids_BC[0, here.start : here.stop - 1] = True, 2
    state = State(np.repeat(one.ids_BC, n, 0), np.repeat(one.known_BC, n, 0), np.arange(n))
    asked = np.zeros_like(one.known_BC)
    asked[0, here.stop - 1] = True
    p = one_logits(model, np.where(one.known_BC, one.ids_BC, 0), one.known_BC, asked)[here.stop - 1].softmax(-1).numpy()
    chain(model, state, ["vid"], GenerateOptions(temperature=1.0), batch=1000)
    seen = np.bincount(state.ids_BC[:, here.stop - 1], minlength=9)
    assert (abs(seen - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 1).all()


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_text_ends_with_eos_exactly_once(model, layout, sample, temperature):
    state = start(layout, sample, 60, ["pic"])
    fill(model, state, "txt", GenerateOptions(text_temperature=temperature))
    here, spec = layout.slice("txt"), layout.specs[2]
    sizes = set()
    for ids, known in zip(state.ids_BC[:, here], state.known_BC[:, here], strict=True):
        n = int(known.sum())
        assert known[:n].all() and n >= 1
        assert np.flatnonzero(ids[:n] == spec.eos).tolist() == [n - 1]
        spec.check_ids(ids[:n], "test")
        sizes.add(n)
    assert temperature == 0 or len(sizes) > 2


def test_a_known_beginning_stays_and_a_finished_text_is_left_alone(model, layout, sample):
    state = start(layout, sample, 4, ["pic"])
    here = layout.slice("txt")
    for i, text in enumerate([[4, 5], [4, 3], [4, 5, 6, 7, 8], []]):
        state.ids_BC[i, here.start : here.start + len(text)] = text
        state.known_BC[i, here.start : here.start + len(text)] = True
    fill(model, state, "txt", GenerateOptions(text_temperature=1.0))
    text = [row[known].tolist() for row, known in zip(state.ids_BC[:, here], state.known_BC[:, here], strict=True)]
    assert text[0][:2] == [4, 5] and text[1] == [4, 3] and text[2] == [4, 5, 6, 7, 8, 3]
    assert all(t[-1] == 3 and t.count(3) == 1 for t in text)


@pytest.mark.parametrize("begun", [0, 2])
def test_text_equals_a_slow_loop_that_packs_everything_anew(model, layout, sample, begun):
    state = start(layout, sample, 6, ["pic", "snd"])
    here = layout.slice("txt")
    state.known_BC[:, here.start : here.start + begun] = True
    state.ids_BC[:, here.start : here.start + begun] = 5
    given = state.rows(np.arange(6))
    fill(model, state, "txt", GenerateOptions(text_temperature=0))
    lengths = set()
    for i in range(6):
        ids, known = np.where(given.known_BC, given.ids_BC, 0)[i : i + 1], given.known_BC[i : i + 1]
        end = begun
        while end < 6:
            asked = np.zeros_like(known)
            asked[0, here.start + begun : here.start + end + 1] = True
            row = one_logits(model, ids, known, asked)[here.start + end]
            ids[0, here.start + end] = int(row.argmax()) if end < 5 else 3
            end += 1
            if ids[0, here.start + end - 1] == 3:
                break
        assert int(state.known_BC[i, here].sum()) == end
        assert np.array_equal(state.ids_BC[i, here.start : here.start + end], ids[0, here.start : here.start + end])
        lengths.add(end)
    assert lengths


def test_a_penalty_keeps_a_text_from_repeating_itself(model, layout, sample):
    """Against the slow loop in which the penalty is written out; a greater one repeats less."""
    here, repeats = layout.slice("txt"), []
    for penalty in (1.0, 2.0, 10.0):
        state = start(layout, sample, 30, ["pic"])
        fill(model, state, "txt", GenerateOptions(text_temperature=1, repetition=penalty))
        texts = [r[k].tolist() for r, k in zip(state.ids_BC[:, here], state.known_BC[:, here], strict=True)]
        repeats.append(sum(len(t) - len(set(t)) for t in texts))
        for i in range(3):
            ids, known = np.where(state.known_BC, state.ids_BC, 0)[i : i + 1].copy(), state.known_BC[i : i + 1].copy()
            known[0, here] = False
            for at, want in enumerate(texts[i][:5]):
                asked = np.zeros_like(known)
                asked[0, here.start : here.start + at + 1] = True
                p = one_logits(model, ids, known, asked)[here.start + at].log_softmax(-1)
                p[sorted(set(texts[i][:at]))] *= penalty
                assert int(draw(p.log_softmax(-1)[None], uniform(0, "draw/txt", np.array([i]), at))[0]) == want
    assert repeats[0] > repeats[1] >= repeats[2]


def test_a_text_with_a_gap_is_a_programmer_s_error(model, layout, sample):
    state = start(layout, sample, 1, ["pic"])
    state.known_BC[0, layout.slice("txt").start + 1] = True
    with pytest.raises(AssertionError, match="beginning"):
        fill(model, state, "txt", GenerateOptions())


# -- chains and options -------------------------------------------------------------------------------------------


def test_chain_equals_fills_one_after_the_other(model, layout, sample):
    options = GenerateOptions(temperature=1.0, steps=3)
    a, b = (start(layout, sample, 7, ["pic"]) for _ in range(2))
    chain(model, a, ["snd", "txt", "vid"], options, batch=3)
    for target in ("snd", "txt", "vid"):
        fill(model, b, target, options)
    assert np.array_equal(a.known_BC, b.known_BC)
    assert np.array_equal(a.ids_BC[a.known_BC], b.ids_BC[b.known_BC])


def test_a_chain_conditions_on_what_came_before(model, layout, sample):
    """The second target given a generated first equals the second given the same first as a condition."""
    options = GenerateOptions(temperature=1.0, steps=3)
    a = start(layout, sample, 4, ["pic"])
    chain(model, a, ["snd"], options)
    b = a.rows(np.arange(4))
    chain(model, a, ["vid"], options)
    other = start(layout, sample, 4, ["pic"])
    chain(model, other, ["vid"], options)
    chain(model, b, ["vid"], options)
    assert np.array_equal(a.ids_BC[:, layout.slice("vid")], b.ids_BC[:, layout.slice("vid")])
    assert not np.array_equal(a.ids_BC[:, layout.slice("vid")], other.ids_BC[:, layout.slice("vid")])


def test_filling_what_is_known_asks_nothing(model, layout, sample, monkeypatch):
    state = start(layout, sample, 2, ["pic"])
    before = state.ids_BC.copy()
    monkeypatch.setattr(FourM, "forward", lambda *a: pytest.fail("the model was called"))
    fill(model, state, "pic", GenerateOptions())
    assert np.array_equal(state.ids_BC, before)


def test_nothing_known_at_all_can_be_filled(model, layout, sample):
    state = start(layout, sample, 3, [])
    chain(model, state, ["txt", "pic", "snd", "vid"], GenerateOptions(temperature=1.0, steps=2))
    for spec in layout.specs:
        here = layout.slice(spec.modality)
        known = state.known_BC[:, here]
        assert known.all() if spec.kind != "sequence" else known[:, 0].all()
        spec.check_ids(state.ids_BC[:, here][known], "test")


def test_group_logits_equal_the_model_s(model, layout, sample):
    ids, _, shown, asked = sample(3)
    packed = pack(layout, ids, shown, asked, 1)
    with torch.no_grad():
        h = model.decode(packed, model.encode(packed))
        for g, (index, logits) in enumerate(zip(packed.group_index, model.logits(packed, h), strict=True)):
            if index is not None:
                torch.testing.assert_close(group_logits(model, h[index], g), logits)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "magic"},
        {"steps": 0},
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"seed": -1},
        {"tempreture": 1},
        {"temperature": "1..x"},
        {"noise": -1},
        {"min_p": 2},
        {"repetition": 0},
        {"schedule": "1,a"},
        {"guidance": -1},
    ],
)
def test_impossible_options_are_config_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(GenerateOptions, options)
