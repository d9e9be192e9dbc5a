"""Readouts of frozen features: known answers on features that are known, and the whole way on tiny runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_cli import run
from workspace_factory import config, make_media, media, one_thread, tiny  # noqa: F401

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError
from nano4m_cli.model.base import StackConfig
from nano4m_cli.model.batch import pack
from nano4m_cli.model.fourm import FourM, FourMConfig
from nano4m_cli.model.gpt import GPT
from nano4m_cli.model.maskgit import MaskGIT
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes._features import Features, Part, Question, middle, origins, pooled, shown_whole
from nano4m_cli.probes._readout import Answered, _best
from nano4m_cli.probes._trace import hidden_shown
from nano4m_cli.probes.attentive import Probe as Attentive
from nano4m_cli.probes.attentive import read_attentive
from nano4m_cli.probes.knn import nearest, read_nearest, votes
from nano4m_cli.probes.linear import accuracy, read_linear, ridge_classifier, ridge_path
from nano4m_cli.train.run import open_run, prepare, start

SIZES = {"fit": 400, "choose": 150, "score": 250}


def question(name="q", values=4, seed=0):
    rng = np.random.default_rng(seed)
    return Question(name, [str(v) for v in range(values)], {p: rng.integers(0, values, n) for p, n in SIZES.items()})


def layer(of, width=24, seed=1):
    """Return features of width numbers, `of(part)` (N, k) added to the first k."""
    rng = np.random.default_rng(seed)
    out = {p: rng.normal(size=(n, width)) for p, n in SIZES.items()}
    for p in out:
        given = of(p)
        out[p][:, : given.shape[1]] += given
    return out


def score(q, answered):
    return accuracy(q, answered.guess, "score")


def interval(q, share):
    return 3 * np.sqrt(share * (1 - share) / SIZES["score"])


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_linear, read_nearest])
def test_a_label_that_is_there_is_read_and_noise_is_chance(read):
    q, other = question(), question("other", 2, seed=5)
    there = layer(lambda p: 20 * np.eye(4)[q.answers[p]])
    found = read(there, [q, other])
    assert score(q, found["q"]) == found["q"].chosen == 1.0
    assert abs(score(other, found["other"]) - 0.5) < interval(other, 0.5)
    noise = read(layer(lambda p: np.zeros((SIZES[p], 1))), [q])
    assert abs(score(q, noise["q"]) - 0.25) < interval(q, 0.25)


@pytest.mark.parametrize("read", [read_linear, read_nearest])
def test_where_a_question_does_not_arise_nothing_is_learned(read):
    """Answers of -1 are neither fitted nor scored: labels that only such samples could teach stay unknown."""
    q = question(values=2)
    hidden = {p: np.where(np.arange(len(y)) % 3 == 0, -1, y) for p, y in q.answers.items()}
    some = Question("q", q.values, hidden)
    x = layer(lambda p: 20 * np.eye(2)[np.maximum(hidden[p], 0)] + 500 * (hidden[p] < 0)[:, None])
    assert score(some, read(x, [some])["q"]) == 1.0


def test_linear_needs_the_label_to_be_linear_and_neighbours_do_not():
    """The exclusive or of two signs: no plane tells it, neighbours do."""
    rng = np.random.default_rng(0)
    signs = {p: rng.integers(0, 2, (n, 2)) for p, n in SIZES.items()}
    q = Question("xor", ["no", "yes"], {p: s[:, 0] ^ s[:, 1] for p, s in signs.items()})
    x = {p: (2 * s - 1) * 3 + rng.normal(size=s.shape) * 0.3 for p, s in signs.items()}
    assert score(q, read_nearest(x, [q])["xor"]) > 0.98
    assert abs(score(q, read_linear(x, [q])["xor"]) - 0.5) < 0.12


@pytest.mark.parametrize("shape", [(60, 12), (20, 50)])
def test_ridge_path_is_ridge_by_either_equations(shape):
    rng = np.random.default_rng(0)
    x, z, y = rng.normal(size=shape), rng.normal(size=(9, shape[1])), rng.integers(0, 3, shape[0])
    for penalty, (scores,) in zip([0.5, 30.0], ridge_path(x, np.eye(3)[y], [z], [0.5, 30.0]), strict=True):
        s, sz = ((a - x.mean(0)) / (x.std(0) + 1e-6) for a in (x, z))
        for c in range(3):  # as augmented least squares: min |Xw - t|^2 + penalty |w|^2
            t = (y == c) - (y == c).mean()
            w = np.linalg.lstsq(np.vstack([s, penalty**0.5 * np.eye(shape[1])]), np.r_[t, np.zeros(shape[1])], rcond=None)[0]
            np.testing.assert_allclose(scores[:, c], sz @ w + (y == c).mean(), atol=1e-8)
        assert ridge_classifier(x, y, z, 3, penalty).tolist() == scores.argmax(1).tolist()


def slow_vote(near):
    return max(range(3), key=lambda c: (near.count(c), -near.index(c) if c in near else -99))


def test_votes_equal_a_slow_count():
    answers = np.random.default_rng(0).integers(0, 3, (200, 7))
    for k, guess in zip((1, 2, 5, 7), votes(answers, 3, (1, 2, 5, 7)), strict=True):
        for row, g in zip(answers.tolist(), guess.tolist(), strict=True):
            assert g == slow_vote(row[:k]), (row, k)


def test_nearest_is_by_angle():
    x = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert nearest(np.array([[0.9, 0.1], [-0.5, 0.4]]), x, 2).tolist() == [[0, 1], [2, 1]]


def in_one_token(seed=0, tokens=10, width=16, values=3):
    """Tokens of which one (told by a mark) carries the label, and the others carry labels at random."""
    rng = np.random.default_rng(seed)
    q = Question("q", list(map(str, range(values))), {p: rng.integers(0, values, n) for p, n in SIZES.items()})
    x, lengths = {}, {}
    for p, n in SIZES.items():
        said = rng.integers(0, values, (n, tokens))
        at, lengths[p] = rng.integers(0, tokens - 2, n), rng.integers(tokens - 2, tokens + 1, n)
        said[np.arange(n), at] = q.answers[p]
        t = 0.3 * rng.normal(size=(n, tokens, width)) + 2 * np.eye(width)[said]
        t[np.arange(n), at, values] += 2
        t[np.arange(tokens) >= lengths[p][:, None]] = 99.0  # beyond a sample's tokens: never read
        x[p] = np.stack([rng.normal(size=t.shape), t]).astype(np.float32)
    return q, x, lengths


def test_attentive_finds_a_label_in_one_token_where_the_mean_hides_it(one_thread):  # noqa: F811
    q, x, lengths = in_one_token()
    noise, found = read_attentive(x, lengths, [q], Attentive.Options(), 0)
    assert score(q, found["q"]) > 0.95 and abs(score(q, noise["q"]) - 1 / 3) < interval(q, 1 / 3)
    inside = {p: (np.arange(10) < n[:, None])[..., None] for p, n in lengths.items()}
    means = {p: (x[p][1] * inside[p]).sum(1) / lengths[p][:, None] for p in x}
    assert score(q, read_linear(means, [q])["q"]) < 0.75
    again = read_attentive(x, lengths, [q], Attentive.Options(), 0)[1]["q"]
    assert again.chosen == found["q"].chosen and np.array_equal(again.guess, found["q"].guess)


def test_the_layer_is_chosen_on_other_samples_than_the_scored():
    worse = Answered(0.9, np.zeros(3))
    assert _best([Answered(0.5, np.ones(3)), worse, Answered(0.9, np.ones(3))]) == (worse, 1)


# -- features ---------------------------------------------------------------------------------------------------------


def test_pooled_means_equal_a_loop():
    x, lengths = np.random.default_rng(0).normal(size=(9, 4)), np.array([2, 0, 3, 4, 0])
    (got,) = pooled([x], lengths)
    want = [np.zeros(4) if a == z else x[a:z].mean(0) for a, z in ((0, 2), (2, 2), (2, 5), (5, 9), (9, 9))]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-6)


def test_what_a_sample_is_made_from():
    assert origins({"sources": {"audio": "fsdd/a.wav", "rgb": ["m/1", "m/2"]}}) == {"fsdd/a.wav", "m/1", "m/2"}
    assert origins({"item": "clip7"}) == {"item/clip7"} and origins({"objects": []}) == set()
    assert middle({"objects": [{"box": [2, 0, 8, 9]}, {"box": [9, 9, 9, 9]}]}) == 5.0
    assert middle({"objects": []}) is None and middle({"objects": [{"box": None}]}) is None


def models(layout):
    torch.manual_seed(0)
    one = StackConfig(size="d2w32", head_width=16)
    return {"fourm": FourM(FourMConfig(size="d2-1w32", head_width=16), layout).eval(), "gpt": GPT(one, layout).eval(),
            "maskgit": MaskGIT(one, layout).eval()}


@pytest.mark.parametrize("kind", ["fourm", "gpt", "maskgit"])
def test_hidden_states_are_of_the_source_alone(layout, sample, kind):
    """They do not change with what is not shown, and change with what is."""
    model, (ids, length, _, _) = models(layout)[kind], sample(5)
    slot = np.concatenate([np.arange(s.slots) for s in layout.specs])
    part = Part(ids, slot < length[:, layout.modality_C], [])
    columns = np.zeros(layout.columns, bool)
    columns[layout.slice("snd")] = True
    layers, lengths = hidden_shown(model, shown_whole(model, part, columns))
    assert len(layers) == 3 and lengths.tolist() == [10 + (kind != "maskgit")] * 5
    other = np.where(columns, ids, (ids + 1) % 7)
    again, _ = hidden_shown(model, shown_whole(model, Part(other, part.inside_NC, []), columns))
    assert all(torch.equal(a, b) for a, b in zip(layers, again, strict=True))
    ids[:, layout.slice("snd").stop - 1] = (ids[:, layout.slice("snd").stop - 1] + 1) % 7  # the last id is read as well
    moved, _ = hidden_shown(model, shown_whole(model, Part(ids, part.inside_NC, []), columns))
    ends = lengths.cumsum(0) - 1
    assert (moved[-1][ends] - layers[-1][ends]).abs().amax(1).min() > 1e-4


def test_hidden_states_of_the_last_layer_are_the_encoders(layout, sample):
    model, (ids, _, shown, asked) = models(layout)["fourm"], sample(4)
    batch = pack(layout, ids, shown, asked, 1)
    layers, lengths = hidden_shown(model, batch)
    with torch.no_grad():
        assert torch.equal(layers[0], model.embed_shown(batch)) and torch.equal(model.enc_norm(layers[-1]), model.encode(batch))
    assert torch.equal(lengths, batch.enc.lengths)
    assert not model.encoder[0]._forward_hooks and not model.encoder[0]._forward_pre_hooks


# -- tiny runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(media, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("readouts")
    shutil.copytree(media.root, root, dirs_exist_ok=True)
    return Workspace(root)


def test_all_probes_of_features_on_a_tiny_run(space):
    result = run("probe", "attentive.steps=10", "--root", space.root, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    found = {r["probe"]: r for r in doc["results"]}
    assert list(found) == ["attention", "attentive", "geometry", "knn", "lens", "linear"] and not doc["skipped"]
    for name in ("attentive", "knn", "linear"):
        metrics = {m["name"]: m for m in found[name]["metrics"]}
        assert {n.partition("/")[0] for n in metrics} == {"rgb", "depth", "audio", "caption"}
        m = metrics["audio/colour_acc"]
        assert m["chance"] == pytest.approx(1 / 6, abs=1e-6) and 0 < m["ceiling"] < 0.3 and m["n"] == 8 and m["ci95"]
        assert metrics["rgb/objects_acc"]["chance"] == 0.5 and metrics["rgb/position_acc"]["ceiling"] is None
        curves = {p["name"]: p for p in found[name]["plots"]}
        assert curves["shape"]["rows"][:2] == ["rgb", "rgb, untrained"] and curves["shape"]["columns"] == [0, 1]
        table = curves["baselines"]
        i = table["rows"].index("rgb: shape")
        this = dict(zip(table["columns"], table["values"][i], strict=True))
        assert this["this run"] == pytest.approx(metrics["rgb/shape_acc"]["value"], abs=1e-6)
        assert curves["shape"]["values"][0][int(this["its layer"])] == pytest.approx(this["this run"], abs=1e-6)
        gain = metrics["rgb/shape_gain"]["value"]
        assert any(gain == pytest.approx(this["this run"] - this[b], abs=2e-6) for b in ("bag of ids", "untrained"))
    assert "fitted on 48 samples of split 'train'" in found["linear"]["notes"][0]
    files = {n: (space.run("demo") / "eval" / f"{n}.json").read_bytes() for n in ("linear", "attentive", "geometry")}
    evaluate(space, "demo", ["linear", "attentive", "geometry"], kind="probe", settings=["attentive.steps=10"])
    again = {n: json.loads((space.run("demo") / "eval" / f"{n}.json").read_text()) for n in files}
    for n, before in files.items():
        now, then = again[n], json.loads(before)
        assert (now["metrics"], now["plots"]) == (then["metrics"], then["plots"]), n


def test_features_of_a_split_are_never_fitted_on_it(space):
    opened = open_run(space, "demo")
    with pytest.raises(DataError, match="cannot be scored"):
        evaluate(space, "demo", ["linear"], split="train", kind="probe")
    val = Features(Context(opened, "val", None, 0, lambda *a: None))
    assert "train split" in val.chosen_on, "where val is scored, settings are settled on samples of train"
    fit, choose = ({json.dumps(l, sort_keys=True) for l in val.parts[p].labels} for p in ("fit", "choose"))
    assert fit.isdisjoint(choose) and len(fit) + len(choose) == 48
    test = Features(Context(opened, "test", None, 0, lambda *a: None))
    assert len(test.parts["fit"]) == 48 and "val split" in test.chosen_on


def test_samples_that_share_a_source_are_left_out(space, monkeypatch):
    context = Context(open_run(space, "demo"), "test", None, 0, lambda *a: None)
    features = Features(context)
    shared = {l["index"] for l in features._drawn("train", 10).labels}
    name = lambda l: {f"r{l['index']}"} if l["split"] != "test" or l["index"] else {f"r{min(shared)}"}  # noqa: E731
    monkeypatch.setattr("nano4m_cli.probes._features.origins", name)
    again = Features(context)
    kept = {l["index"] for l in again.parts["fit"].labels}
    assert min(shared) not in kept and again.left_out >= 1
    monkeypatch.setattr("nano4m_cli.probes._features.origins", lambda l: {"one recording"})
    assert "shares a source" in Features(context).missing()


def test_one_value_only_is_nothing_to_read(space, monkeypatch):
    context = Context(open_run(space, "demo"), "test", None, 0, lambda *a: None)
    features = Features(context)
    for p in features.parts.values():
        for l in p.labels:
            l["objects"] = [{**l["objects"][0], "shape": "cube"}]
    context.info  # noqa: B018 - cached
    assert "shape" not in {q.name for q in features.questions} and "objects" not in {q.name for q in features.questions}
    for a in context.info.attributes:
        for p in features.parts.values():
            for l in p.labels:
                l["objects"][0][a] = context.info.attributes[a].values[0]
                l["objects"][0]["box"] = None
    del features.questions
    assert "one value" in features.missing()


@pytest.mark.parametrize("task, component", [("gpt", "causal"), ("maskgit", "masked")])
def test_models_of_one_stack_are_read_as_well(space, task, component):
    changes = dict(task=task, model__size="d1w16", masking__components=f"[{{type: {component}}}]", train__steps=2, name=task,
                   train__checkpoint_every=2)
    start(prepare(config(space.root, **changes), space), False, "cpu", lambda record: None)
    done = evaluate(space, task, kind="probe", settings=["attentive.steps=10"])
    assert {r.probe for r in done.results} == {"attention", "attentive", "geometry", "knn", "lens", "linear"}
    by_name = {r.probe: r for r in done.results}
    assert {p.name.partition("-")[0] for p in by_name["attention"].plots} == {"stack"}
    lens = {m.name for m in by_name["lens"].metrics}
    assert "rgb->caption/ce" in lens and ("caption->rgb/ce" in lens) == (task == "maskgit")
    told = [n for n in by_name["linear"].notes if "left to right" in n]
    assert bool(told) == (task == "gpt")


def test_tokens_of_few_layers_at_a_time_are_those_of_all(space, monkeypatch):
    features = Features(Context(open_run(space, "demo"), "test", None, 0, lambda *a: None))
    ((layers, whole, lengths),) = features.tokens("audio")
    assert layers == [0, 1] and whole["fit"].shape[:2] == (2, 48) and len(features._means) == 3
    kept = {k: [x.copy() for x in v] for k, v in features._means.items()}
    features._means.clear()
    for layer, means in enumerate(features.means("audio")):
        for p, x in means.items():
            np.testing.assert_allclose(x, kept[p, "audio", False][layer], atol=1e-6)
            inside = np.arange(whole[p].shape[2]) < lengths[p][:, None]
            np.testing.assert_allclose((whole[p][layer] * inside[..., None]).sum(1) / lengths[p][:, None], x, atol=1e-5)
    monkeypatch.setattr("nano4m_cli.probes._features.KEPT", 1)
    monkeypatch.setattr("nano4m_cli.probes._features.PASS", 1)
    monkeypatch.setattr("nano4m_cli.probes._features.FEWEST", 20)
    for one, (layers, some, _) in enumerate(features.tokens("audio")):
        assert layers == [one] and some["fit"].shape[:2] == (1, 20) and some["score"].shape[1] == 8
        np.testing.assert_allclose(some["fit"][0], whole["fit"][one, :20], atol=1e-5)
    assert one == 1
