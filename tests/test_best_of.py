"""Best of n: candidates, what ranks them against slow code, what is recorded, and what cannot be ranked."""

import json

import numpy as np
import pytest
import torch
from test_cli import fails, run
from workspace_factory import media, one_thread, tiny  # noqa: F401

from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError, UsageError
from nano4m_cli.generate import best
from nano4m_cli.generate.command import Request, Studio
from nano4m_cli.generate.requests import generate_requests
from nano4m_cli.model.batch import pack
from nano4m_cli.train.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")
CUBE = {"caption": "a small red cube"}


class Brightness:
    """A judge to whom every bright picture is red and every dark one is blue."""

    attributes, objects = {"colour": ["blue", "red"]}, 2

    def logp(self, raws):
        p = np.array([np.mean(r) / 255 for r in raws])
        return {"colour": np.log(np.stack([np.stack([1 - p, p], -1)] * 2, 1))}


@pytest.fixture(scope="module")
def studio(media):  # noqa: F811
    judges = lambda dataset, name: Brightness() if name == "rgb" else None  # noqa: E731
    return Studio(open_run(media, "demo"), judges)


def made(studio, **data):
    return studio.make([studio.prepare(build(Request, {"temperature": 1, **data}))])[0]


def ids(one, target="rgb"):
    return [x.tolist() for x in one.ids[target]]


# -- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["likelihood", "cycle", "judge"])
def test_the_first_candidate_is_what_is_made_without_others(studio, rank):
    plain = made(studio, **{"from": CUBE}, to="rgb", n=3, seed=4)
    few = made(studio, **{"from": CUBE}, to="rgb", n=3, seed=4, best_of=3, rank=rank)
    assert few.scores.shape == (3, 3) and np.array_equal(few.chosen, few.scores.argmax(1))
    assert plain.scores is None and len(few.raws["rgb"]) == 3
    for i, candidate in enumerate(few.chosen):
        assert (ids(few)[i] == ids(plain)[i]) == (candidate == 0)
    assert len({tuple(x) for x in ids(few)}) == 3


def test_what_is_kept_is_the_candidate_with_the_best_score(studio):
    few = made(studio, **{"from": CUBE}, to="rgb", best_of=6, rank="judge")
    assert np.allclose(few.scores[0].max(), np.log(np.mean(few.raws["rgb"][0]) / 255))
    assert few.scores[0].std() > 0


def test_candidates_have_seeds_of_their_own_in_every_stage(studio):
    stages = studio.prepare(build(Request, {"from": CUBE, "chain": [{"to": "depth", "seed": 5}, {"to": "rgb"}]})).stages
    seeds = [[s.options.seed for s in best.candidate(stages, j)] for j in range(4)]
    assert seeds[0] == [5, 0] and len({tuple(s) for s in seeds}) == 4 and len({s for pair in seeds for s in pair}) == 8
    assert [s.options.seed for s in best.candidate(stages, 2)] == seeds[2]


# -- ranks against slow code --------------------------------------------------------------------------------------------


def nll(studio, ids_C, shown, asked):
    """-log p of what is asked, of one row, packed alone."""
    model = studio.run.model
    with torch.inference_mode():
        packed = pack(studio.layout, ids_C[None], shown[None], asked[None], model.config.registers)
        return model.nll(packed).sum().item()


def columns(studio, *names):
    return np.isin(studio.layout.modality_C, [studio.layout.names.index(n) for n in names])


def rows_of(studio, monkeypatch, **data):
    """Return (state, what was known, scores) of a request's candidates."""
    seen = {}
    name = data["rank"]
    real = getattr(best, name)

    def spy(model, state, known, stages):
        seen.update(state=state, known=known, scores=real(model, state, known, stages))
        return seen["scores"]

    monkeypatch.setattr(best, name, spy)
    made(studio, **data)
    return seen["state"], seen["known"], seen["scores"]


def test_likelihood_is_that_of_each_target_given_what_its_stage_saw(studio, monkeypatch):
    chain = [{"to": "depth"}, {"to": "rgb", "given": "depth"}]
    state, known, scores = rows_of(studio, monkeypatch, **{"from": CUBE}, chain=chain, best_of=3, rank="likelihood")
    own = {m: columns(studio, m) for m in ("depth", "rgb", "caption")}
    for ids_C, there, score in zip(state.ids_BC, known, scores, strict=True):
        total = nll(studio, ids_C, there, own["depth"]) + nll(studio, ids_C, own["depth"], own["rgb"])
        assert score == pytest.approx(-total / (own["depth"].sum() + own["rgb"].sum()), abs=1e-5)


def test_likelihood_of_a_text_is_per_id_of_its_own_length(studio, monkeypatch):
    data = {"sample": "test-000000001", "from": {"rgb": None}, "to": "caption", "text_temperature": 2}
    state, known, _ = rows_of(studio, monkeypatch, **data, best_of=3, rank="likelihood")
    caption, (spec,) = studio.layout.slice("caption"), [s for s in studio.layout.specs if s.modality == "caption"]
    for row, length in enumerate((3, 7, spec.slots)):
        state.ids_BC[row, caption.start + length - 1] = spec.eos
        state.known_BC[row, caption.start + length : caption.stop] = False
    stages = [studio.prepare(build(Request, data)).stages] * 3
    scores = best.likelihood(studio.run.model, state, known, stages)
    for ids_C, end, there, score in zip(state.ids_BC, state.known_BC, known, scores, strict=True):
        asked = end & columns(studio, "caption")
        assert score == pytest.approx(-nll(studio, ids_C, there, asked) / asked.sum(), abs=1e-5)


def test_likelihood_asks_for_what_was_made_not_for_what_was_kept(studio, monkeypatch):
    data = {"sample": "test-000000001", "from": {"rgb": None}, "keep": "rgb:left-half", "to": "rgb"}
    state, known, scores = rows_of(studio, monkeypatch, **data, best_of=2, rank="likelihood")
    rgb = columns(studio, "rgb")
    for ids_C, there, score in zip(state.ids_BC, known, scores, strict=True):
        assert (there & rgb).sum() == 8
        assert score == pytest.approx(-nll(studio, ids_C, there, rgb & ~there) / 8, abs=1e-5)


def test_a_slot_made_twice_counts_where_it_was_made_last(studio, monkeypatch):
    chain = [{"to": "rgb"}, {"to": "depth"}, {"to": "rgb", "keep": "rgb:left-half"}]
    state, known, scores = rows_of(studio, monkeypatch, **{"from": CUBE}, chain=chain, best_of=2, rank="likelihood")
    rgb, depth = columns(studio, "rgb"), columns(studio, "depth")
    left = rgb.copy()
    left[rgb] = np.tile([True, True, False, False], 4)
    for ids_C, there, score in zip(state.ids_BC, known, scores, strict=True):
        total = nll(studio, ids_C, there, left) + nll(studio, ids_C, there | rgb, depth)
        total += nll(studio, ids_C, there | left | depth, rgb & ~left)
        assert score == pytest.approx(-total / (rgb.sum() + depth.sum()), abs=1e-5)


def test_cycle_asks_the_conditions_given_what_was_made_alone(studio, monkeypatch):
    data = {"sample": "test-000000001", "from": {"caption": None, "depth": None}, "to": "rgb"}
    state, known, scores = rows_of(studio, monkeypatch, **data, best_of=3, rank="cycle")
    rgb = columns(studio, "rgb")
    for ids_C, there, score in zip(state.ids_BC, known, scores, strict=True):
        assert not (there & rgb).any()
        assert score == pytest.approx(-nll(studio, ids_C, rgb, there) / there.sum(), abs=1e-5)
    assert len(set(scores.tolist())) == 3


def test_cycle_of_a_half_asks_the_kept_half(studio, monkeypatch):
    data = {"sample": "test-000000001", "from": {"rgb": None}, "keep": "rgb:left-half", "to": "rgb"}
    state, known, scores = rows_of(studio, monkeypatch, **data, best_of=2, rank="cycle")
    rgb = columns(studio, "rgb")
    for ids_C, there, score in zip(state.ids_BC, known, scores, strict=True):
        assert score == pytest.approx(-nll(studio, ids_C, rgb & ~there, there & rgb) / 8, abs=1e-5)


# -- what conditions claim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, want",
    [
        ("a small red cube", {"shape": ["cube"], "colour": ["red"], "size": ["small"]}),
        ("A RED cube, next to a blue sphere.", {"shape": ["cube", "sphere"], "colour": ["red", "blue"]}),
        ("a shiny cube and a matte cube", {"shape": ["cube", "cube"], "material": ["metal", "rubber"]}),
        ("a large cube left of a sphere", {"shape": ["cube", "sphere"]}),  # whose size it is cannot be told
        ("redder cubes", {}),
        ("", {}),
    ],
)
def test_claims_of_words(studio, text, want):
    assert best.claims_of_text(studio.run.dataset.info(), text) == want


def test_claims_of_a_sample_are_what_its_conditions_determine(studio):
    prepare = lambda *given: studio.prepare(build(Request, {  # noqa: E731
        "sample": "test-000000001", "from": dict.fromkeys(given), "to": "rgb", "best_of": 2, "rank": "judge"})).claims
    told = prepare("caption")
    assert set(told) == {"shape", "colour", "size", "material"} and all(len(v) == len(told["shape"]) for v in told.values())
    with pytest.raises(UsageError, match="the conditions name none of colour"):
        prepare("depth")


def test_a_judge_of_the_condition_tells_of_its_first_object(studio, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((16, 16, 3), 250, dtype=np.uint8)).save(tmp_path / "white.png")
    request = build(Request, {"from": {"rgb": str(tmp_path / "white.png")}, "keep": "rgb:left-half", "to": "rgb",
                              "best_of": 2, "rank": "judge"})
    prepared = studio.prepare(request)
    assert prepared.claims == {"colour": ["red"]} and "first object" in prepared.notices[-1]


# -- what is written ----------------------------------------------------------------------------------------------------


def test_scores_are_recorded_and_a_request_is_what_it_is_alone(media, tmp_path):  # noqa: F811
    lines = [
        {"id": "a", "from": CUBE, "to": "rgb", "best_of": 3, "n": 2, "temperature": 1},
        {"id": "b", "from": {"caption": "a sphere"}, "chain": [{"to": "depth"}, {"to": "rgb"}], "best_of": 2, "rank": "cycle",
         "temperature": 1},
        {"id": "c", "from": CUBE, "to": "rgb", "temperature": 1},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    report = generate_requests(media, "demo", path, tmp_path / "all", {})
    assert report.samples == 4
    said = {m["id"]: m for m in map(json.loads, (tmp_path / "all" / "manifest.jsonl").read_text().splitlines())}
    assert "best_of" not in said["c"]
    for key, (n, k), rank in (("a", (2, 3), "likelihood"), ("b", (1, 2), "cycle")):
        told = said[key]["best_of"]
        assert told["rank"] == rank and np.shape(told["scores"]) == (n, k)
        assert told["chosen"] == np.argmax(told["scores"], 1).tolist()
        assert json.loads((tmp_path / "all" / key / "best_of.json").read_text()) == told
        assert json.loads((tmp_path / "all" / key / "request.json").read_text())["best_of"] == told
    generate_requests(media, "demo", path, tmp_path / "one", {}, batch=1)
    for file in (tmp_path / "all").rglob("*.ids.npy"):
        assert np.array_equal(np.load(file), np.load(tmp_path / "one" / file.relative_to(tmp_path / "all")))
    assert generate_requests(media, "demo", path, tmp_path / "all", {}).kept == ["a", "b", "c"]


def test_the_command_and_a_recipe(media, tmp_path):  # noqa: F811
    args = ["generate", "--from", "caption=a small red cube", "--to", "rgb", "--temperature", 1, "--root", media.root,
            "--device", "cpu", "--json"]
    data = json.loads(run(*args, "--best-of", 3, "--rank", "cycle", "--out", tmp_path / "a").stdout)
    assert len(data["best_of"]["scores"][0]) == 3 and any(f.endswith("best_of.json") for f in data["files"])
    (tmp_path / "r.yaml").write_text("from: {caption: a small red cube}\nto: rgb\nbest_of: 3\nrank: cycle\ntemperature: 1\n")
    again = run("generate", "--recipe", tmp_path / "r.yaml", "--root", media.root, "--out", tmp_path / "b", "--device", "cpu")
    assert again.exit_code == 0
    assert np.array_equal(np.load(tmp_path / "a" / "rgb.ids.npy"), np.load(tmp_path / "b" / "rgb.ids.npy"))
    assert "best_of" not in json.loads(run(*args, "--out", tmp_path / "c").stdout)


# -- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, equal", [
    ({"scheme": "mean"}, True), ({"scheme": "onepass", "temperature": 0}, True), ({"scheme": "ar", "temperature": 0}, True),
    ({"scheme": "onepass"}, False),
])
def test_candidates_that_are_all_equal_are_said(studio, options, equal):
    few = made(studio, **{"from": CUBE}, to="depth", best_of=3, **options)
    assert any("all 3 candidates are equal" in n for n in few.notices) == equal
    assert not equal or few.chosen.tolist() == [0]


def test_a_reverse_question_that_was_never_posed_is_said(studio):
    prepared = studio.prepare(build(Request, {"from": CUBE, "to": "depth,audio,rgb", "best_of": 2, "rank": "cycle"}))
    assert any("rank cycle asks rgb+depth+audio->caption" in n and "never posed" in n for n in prepared.notices)


@pytest.mark.parametrize("data, said, hint", [
    ({"from": {}, "to": "rgb", "rank": "cycle"}, "there is no condition to score", "likelihood"),
    ({"from": CUBE, "to": "depth", "rank": "judge"}, "no independent judge sees depth", "likelihood"),
    ({"from": {"caption": "something"}, "to": "rgb", "rank": "judge"}, "the conditions name none of colour", "cycle"),
    ({"from": {"caption": "a red"}, "keep": "caption:0.5", "to": "caption", "rank": "cycle"}, "no condition to score", "likel"),
])
def test_what_cannot_be_ranked(studio, data, said, hint, monkeypatch):
    monkeypatch.setitem(studio.run.directions, "->rgb", 1.0)
    with pytest.raises(UsageError, match=said) as caught:
        studio.prepare(build(Request, {**data, "best_of": 2}))
    assert hint in caught.value.hint


def test_no_judges_at_all_and_no_candidates(media):  # noqa: F811
    studio = Studio(open_run(media, "demo"))
    with pytest.raises(UsageError, match="no independent judge sees rgb"):
        studio.prepare(build(Request, {"from": CUBE, "to": "rgb", "best_of": 2, "rank": "judge"}))
    with pytest.raises(UsageError, match="there is but one"):
        studio.prepare(build(Request, {"from": CUBE, "to": "rgb", "rank": "cycle"}))


@pytest.mark.parametrize("data, said", [
    ({"best_of": 0}, "best_of: Input should be greater"), ({"best_of": -1}, "best_of"), ({"best_of": 1.5}, "best_of"),
    ({"best_of": 2, "rank": "best"}, "'likelihood', 'cycle' or 'judge'"),
])
def test_requests_that_are_badly_written(data, said):
    with pytest.raises(ConfigError, match=said):
        build(Request, {"from": CUBE, "to": "rgb", **data})


def test_the_command_s_own_errors(media):  # noqa: F811
    args = ["generate", "--from", "caption=a cube", "--to", "rgb", "--root", media.root, "--device", "cpu"]
    fails(run(*args, "--best-of", 0), 2, "invalid value for '--best-of'")
    fails(run(*args, "--best-of", 2, "--rank", "best"), 2, "'likelihood', 'cycle' or 'judge'")
    fails(run(*args, "--rank", "cycle"), 2, "there is but one", "--best-of 4")
