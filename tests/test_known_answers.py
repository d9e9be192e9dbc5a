"""What theory says that the likelihood probes return for models whose answers are known (tests/predictors.py)."""

import numpy as np
import pytest
import torch
from predictors import (
    ClassOnly,
    Marginal,
    Memoriser,
    Perfect,
    Uniform,
    findings,
    known_context,
    known_run,
    make_world,
)

from nano4m_cli.dist import answers
from nano4m_cli.errors import CheckpointError, DataError
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes.forward_vs_ar import orders, positions, sequential_work
from nano4m_cli.probes.loss import SHRINK, marginal_nll
from nano4m_cli.registry import PROBES
from nano4m_cli.spec import read_spec
from nano4m_cli.train import checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("known"))


VOCAB = {"rgb": 12, "audio": 10}
DIRECTIONS = [(s, t) for t in ("rgb", "audio", "caption") for s in ("rgb", "audio", "caption") if s != t]

# -- loss ---------------------------------------------------------------------------------------------------------


def test_loss_of_a_uniform_model_is_log_v_everywhere(world):
    found = findings("loss", Uniform(world))
    size = VOCAB | {"caption": world.layout.specs[2].vocab_size}
    for name, m in found.metrics.items():
        target = name.split("/")[0].split("->")[-1]
        if name.endswith("/ce") or "codebook" in name:
            assert m.value == pytest.approx(np.log(size[target]), abs=2e-6) == pytest.approx(m.chance, abs=2e-6), name
        if name.endswith("/bits"):
            assert m.value == pytest.approx(np.log2(size[target]), abs=2e-6) and m.unit == "bits"
    assert {f"audio/ce_codebook{q}" for q in (0, 1)} <= set(found.metrics)


def test_loss_of_a_perfect_model_is_nothing_given_any_whole_source(world):
    found = findings("loss", Perfect(world))
    for s, t in DIRECTIONS:
        assert found.metrics[f"{s}->{t}/ce"].value == pytest.approx(0, abs=1e-6)
    assert found.metrics["audio+caption->rgb/ce"].value == pytest.approx(0, abs=1e-6)
    # From nothing: slot by slot the entropy of each slot over kinds, text the entropy of the kinds over its length.
    rgb = world.ids_KC[:, world.layout.slice("rgb")]
    entropy = [-(p := np.bincount(c) / len(c))[p > 0] @ np.log(p[p > 0]) for c in rgb.T]
    assert found.metrics["->rgb/ce"].value == pytest.approx(np.mean(entropy), abs=1e-5)
    length = world.inside_KC[:, world.layout.slice("caption")].sum(1)
    assert found.metrics["->caption/ce"].value == pytest.approx(np.log(64) * 64 / length.sum(), abs=1e-5)


def test_loss_of_a_marginal_model_is_the_marginal_baseline(world):
    for name, m in findings("loss", Marginal(world)).metrics.items():
        if not name.endswith("positional_ce"):
            assert m.value == pytest.approx(m.majority, abs=1e-5), name


def test_the_positional_marginal_is_counted_by_slot(world):
    """Its frequencies, by a slow count with the shrinkage written out."""
    found = findings("loss", Uniform(world))
    context = known_context(Uniform(world))
    positional = marginal_nll(context).positional
    train, column = world.ids_KC[world.splits["train"]], world.layout.slice("rgb").start + 2
    block = train[:, world.layout.slice("rgb")]
    for sample in (0, 17, 40):
        own = context.ids_NC[sample, column]
        unigram = ((block == own).sum() + 0.5) / (block.size + 12 * 0.5)
        p = ((train[:, column] == own).sum() + SHRINK * unigram) / (len(train) + SHRINK)
        assert positional[sample, column] == pytest.approx(-np.log(p))
    assert found.metrics["rgb/positional_ce"].value < found.metrics["rgb/ce"].majority < np.log(12)


def test_loss_matrices_hold_the_figures_of_directions(world):
    found = findings("loss", ClassOnly(world))
    matrix = found.plots["directions"]
    assert matrix.rows == ["nothing", "rgb", "audio", "caption", "all others"] and matrix.columns == ["rgb", "audio", "caption"]
    for s, t in DIRECTIONS:
        assert matrix.values[matrix.rows.index(s)][matrix.columns.index(t)] == found.metrics[f"{s}->{t}/ce"].value
    assert matrix.values[0][0] == found.metrics["->rgb/ce"].value and matrix.values[1][0] is None
    assert found.plots["bits"].values[0][0] == pytest.approx(np.log2(12), abs=1e-5)
    gain = found.plots["gains"].values
    assert gain[3][0] > 0.1 and gain[4][0] == pytest.approx(gain[3][0], abs=0.02), "class and class is no more than class"


# -- class --------------------------------------------------------------------------------------------------------


def test_class_of_a_perfect_model_is_one(world):
    found = findings("class", Perfect(world))
    for name, m in found.metrics.items():
        assert m.value == 1, name
    assert np.array_equal(found.plots["rgb colour_acc"].values, np.eye(8))


@pytest.mark.parametrize("model", [Uniform, Marginal])
def test_class_of_a_model_that_does_not_look_is_at_chance(world, model):
    found = findings("class", model(world))
    for name, m in found.metrics.items():
        want = 5 / 8 if name.endswith("top5") else 1 / 8
        assert m.chance == pytest.approx(want), name
        if not (name.endswith("top5") and model is Marginal):
            assert m.value == pytest.approx(want, abs=1e-6), name  # classes are equally often: one answer for all is chance
    pmi = found.metrics["rgb->caption/colour_acc_pmi"]
    assert pmi.ci95[0] == pmi.ci95[1] == 0.125, "all ties: every sample counts an eighth"


def test_class_of_a_model_that_knows_the_class_only(world):
    found = findings("class", ClassOnly(world))
    for source in ("rgb", "audio"):
        for figure in ("acc", "acc_pmi", "top1", "top1_pmi", "acc_balanced", "top1_balanced"):
            assert found.metrics[f"{source}->caption/colour_{figure}"].value == 1, figure
            assert found.metrics[f"{source}->caption/number_{figure}"].value == pytest.approx(1 / 8), figure
        assert np.allclose(found.plots[f"{source} number_acc"].values, 1 / 8)
    recall = found.plots["recall colour_acc"]
    assert recall.columns == ["asked", "rgb", "audio"] and all(row == ["8", 1.0, 1.0] for row in recall.values)


def test_a_label_that_captions_do_not_word(tmp_path):
    """A folder with labels and free captions: classes are told by the train split's captions, whole."""
    world = make_world(tmp_path, 4, 4)
    info = world.dataset.info()
    told = info.model_copy(update={"attributes": {}, "determined": {}, "options": {"label": "colour"}})
    world.dataset.info_path.write_text(told.model_dump_json())
    for model, want in ((ClassOnly, 1.0), (Uniform, 1 / 4)):
        found = findings("class", model(world))
        assert set(found.metrics) == {f"{s}->caption/colour_{f}" for s in ("rgb", "audio") for f in (
            "top1", "top1_pmi", "top1_balanced")}
        m = found.metrics["audio->caption/colour_top1"]
        assert m.value == pytest.approx(want) and m.chance == m.majority == 1 / 4 and m.ceiling is None
        assert findings("retrieval", model(world)).metrics["audio->rgb/class_r1"].value == pytest.approx(want)


def test_a_label_that_is_a_modality(tmp_path):
    world = make_world(tmp_path, 4, 4, label=True)
    for model, want in ((Perfect, 1.0), (ClassOnly, 1.0), (Uniform, 1 / 4), (Marginal, 1 / 4)):
        found = findings("class", model(world))
        for source in ("rgb", "audio", "caption"):
            assert found.metrics[f"{source}->label/label_top1"].value == pytest.approx(want), (model, source)
            assert found.metrics[f"{source}->label/label_top1_pmi"].value == pytest.approx(want)
    assert findings("loss", Perfect(world)).metrics["rgb->label/ce"].ceiling == 0.0


# -- retrieval ----------------------------------------------------------------------------------------------------


def test_retrieval_of_a_perfect_model_is_one(world):
    found = findings("retrieval", Perfect(world))
    assert len(found.metrics) == 6 * 2 * 3 * 4
    for name, m in found.metrics.items():
        assert m.value == 1, name
    assert all(p is not None and p < 0.05 for row in found.plots["significance"].values for p in row)


@pytest.mark.parametrize("model", [Uniform, Marginal])
def test_retrieval_of_a_model_that_does_not_look_is_chance_to_the_digit(world, model):
    """By PMI and features all candidates tie; by likelihood the same ranking answers every query, and each is right once."""
    found = findings("retrieval", model(world))
    for name, m in found.metrics.items():
        if "/likelihood_class" not in name or model is Uniform:
            assert m.value == pytest.approx(m.chance, abs=1e-6), name
        assert m.ci95[0] <= m.chance + 1e-6 and m.ci95[1] >= m.chance - 1e-6, name
    assert found.metrics["audio->rgb/r1"].chance == pytest.approx(1 / 64)
    assert found.metrics["audio->rgb/class_r1"].chance == pytest.approx(1 / 64), "both attributes are shared: a class is a kind"
    assert all(p == 1 for row in found.plots["significance"].values for p in row)


def test_retrieval_of_a_model_that_knows_the_class_only(tmp_path):
    world = make_world(tmp_path)
    info = world.dataset.info()
    determined = {m: ["colour"] for m in ("rgb", "audio")} | {"caption": ["colour", "number"]}
    world.dataset.info_path.write_text(info.model_copy(update={"determined": determined}).model_dump_json())
    found = findings("retrieval", ClassOnly(world))
    for s, t in DIRECTIONS:
        n = 50 if t == "caption" else 64
        for way in ("", "features_"):
            assert found.metrics[f"{s}->{t}/{way}class_r1"].value == 1, (s, t, way)
            sizes = np.bincount(world.class_K[:n])[world.class_K[:n]]  # the last of fifty captions' class is cut
            assert found.metrics[f"{s}->{t}/{way}r1"].value == pytest.approx((1 / sizes).mean(), abs=1e-6), (s, t, way)
            assert found.metrics[f"{s}->{t}/{way}r5"].value == pytest.approx(np.minimum(5 / sizes, 1).mean(), abs=1e-6)
        assert found.metrics[f"{s}->{t}/likelihood_class_r1"].value == 1


def test_instance_retrieval_is_not_defined_where_modalities_are_paired_by_class(tmp_path):
    found = findings("retrieval", ClassOnly(make_world(tmp_path, pairing="class")))
    assert not any(m.endswith(("/r1", "/mrr", "_likelihood_r1")) for m in found.metrics)
    assert found.metrics["audio->rgb/class_r1"].value == 1
    assert any("instance retrieval is not defined on 'known'" in n for n in found.notes)


# -- one pass and the chain rule ----------------------------------------------------------------------------------


def test_the_chain_rule_of_a_perfect_model_adds_up_to_the_entropy_of_the_kinds_in_any_order(world):
    """From nothing a picture costs log 64 nats in all, however it is revealed; at once it costs the sum of its slots' own."""
    found = findings("forward_vs_ar", Perfect(world), samples=64)
    for target in ("rgb", "audio"):
        for what in ("sequential_ce", "sequential_random_ce"):
            assert found.metrics[f"->{target}/{what}"].value == pytest.approx(np.log(64) / 6, abs=1e-5), (target, what)
        gap = found.metrics[f"->{target}/onepass_ce"].value - np.log(64) / 6
        assert found.metrics[f"->{target}/independence_cost"].value == pytest.approx(gap, abs=1e-5) and gap > 0.5
        assert found.metrics[f"caption->{target}/independence_cost"].value == pytest.approx(0, abs=1e-6)
    assert found.plots["independence"].values[0][0] == found.metrics["->rgb/independence_cost"].value


@pytest.mark.parametrize("model", [Uniform, Marginal])
def test_independence_costs_nothing_where_slots_are_independent(world, model):
    for name, m in findings("forward_vs_ar", model(world)).metrics.items():
        if "independence" in name:
            assert m.value == pytest.approx(0, abs=1e-6) and m.ci95 == pytest.approx((0, 0), abs=1e-6)


def test_some_turns_estimate_all(world):
    """Evenly spread turns from a random start: over many samples every turn is asked as often."""
    context = known_context(Perfect(world))
    rows = np.arange(64)
    some = positions(context, "rgb", rows, 4)
    assert some.shape == (64, 4) and (np.diff(some, axis=1) > 0).all() and some.min() == 0 and some.max() == 5
    assert (positions(context, "rgb", rows, 6) == np.arange(6)).all()
    order = orders(context, "rgb", rows, True)
    works = [sequential_work(context, [], "rgb", rows, order, picked) for picked in (positions(context, "rgb", rows, 6), some)]
    every, few = answers(works)
    assert np.allclose(np.take_along_axis(every, some, 1), few)


# -- calibration --------------------------------------------------------------------------------------------------


def test_predictors_that_know_their_odds_are_calibrated(world):
    """Bayes over the kinds is right as often as it says: what is left of its ECE is what chance leaves."""
    for model in (Perfect, ClassOnly):
        found = findings("calibration", model(world))
        for name in ("rgb", "audio", "caption"):
            m = found.metrics[f"{name}/ece"]
            assert m.value < 3 * m.reference + 0.02, (model, name)
            low, high = found.metrics[f"{name}/overconfidence"].ci95
            assert low - 0.02 <= 0 <= high + 0.02
    found = findings("calibration", Perfect(world))
    assert found.metrics["rgb->caption/choice_ece"].value < 1e-6 and found.metrics["rgb->caption/choice_top1_acc"].value == 1
    assert found.plots["tokens"].diagonal and found.plots["tokens"].columns[0] == 0.05


def test_a_uniform_model_says_one_in_v_and_is_right_so_often(world):
    found = findings("calibration", Uniform(world))
    for name, size in VOCAB.items():
        assert found.metrics[f"{name}/top1_acc"].value == pytest.approx(1 / size, abs=1e-6)
        assert found.metrics[f"{name}/ece"].value == pytest.approx(0, abs=1e-6)


class TooSure(ClassOnly):
    """Says what ClassOnly says, four times as sure in log-odds."""

    def answers(self, batch):
        return 4 * super().answers(batch)


def test_a_model_that_is_too_sure_is_told_so(world):
    sure, sober = findings("calibration", TooSure(world)), findings("calibration", ClassOnly(world))
    for name in VOCAB:
        assert sure.metrics[f"{name}/ece"].value > 0.1 > sober.metrics[f"{name}/ece"].value
        assert sure.metrics[f"{name}/overconfidence"].ci95[0] > 0
        assert sure.metrics[f"{name}/ece"].ci95[0] > sure.metrics[f"{name}/ece"].reference


# -- memorization -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Train shows half of every class's members, the test split the other half."""
    kinds = np.arange(64)
    half = kinds[kinds % 8 < 4]
    splits = {"train": half, "val": half, "test": kinds[kinds % 8 >= 4]}
    return make_world(tmp_path_factory.mktemp("halves"), splits=splits)


def test_a_memoriser_has_a_gap_and_copies(halves):
    found = findings("memorization", Memoriser(halves))
    uniform = findings("memorization", Uniform(halves))
    for name in VOCAB:
        assert found.metrics[f"{name}/ce_train"].value < 0.5 * uniform.metrics[f"{name}/ce_train"].value
        assert found.metrics[f"{name}/ce_gap"].ci95[0] > 1, "unseen kinds cost log V where enough of them is shown"
        assert uniform.metrics[f"{name}/ce_gap"].value == pytest.approx(0, abs=1e-6)
    # A model that knows the class but no member generates samples whose slots are those of its class.
    knows = findings("memorization", Perfect(halves))
    to_rgb = next(n.split("/")[0] for n in knows.metrics if n.endswith("->rgb/exact_copies"))
    assert knows.metrics[f"{to_rgb}/exact_copies"].value == knows.metrics[f"{to_rgb}/exact_copies"].reference == 0
    assert knows.metrics["rgb/ce_gap"].value == pytest.approx(0, abs=0.3)


class Parrot(Perfect):
    """Whatever it is shown, it goes on as the first kind of the train split would."""

    def knows(self, belief_SK):
        return np.broadcast_to(np.eye(64)[self.world.splits["train"][0]], belief_SK.shape).copy()


def test_a_parrot_copies_always(halves):
    found = findings("memorization", Parrot(halves))
    for name, m in found.metrics.items():
        if name.endswith(("exact_copies", "nearest_train", "/near")):
            assert m.value == 1, name
            if name.endswith("copies"):
                assert m.reference == 0, "no real one is a copy"


# -- where figures come from --------------------------------------------------------------------------------------

OURS = ["calibration", "class", "forward_vs_ar", "loss", "memorization", "retrieval"]
NARROW = {"components": [{"type": "directed", "source": {"caption": 1.0}, "target": {"rgb": 1.0, "audio": 1.0}}]}


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A function (model, probes, masking) that evaluates a predictor as the command would; reports are another's."""
    monkeypatch.setattr("nano4m_cli.report.build.build", lambda path: path / "report")

    def run(model, probes, masking=None, limit=None):
        made = known_run(model, masking)
        made.path = tmp_path / "runs" / "known"
        monkeypatch.setattr("nano4m_cli.probes._evaluate.open_run", lambda *args: made)
        done = evaluate(model.world.workspace, None, probes, limit=limit)
        return {r.probe: r for r in done.results}, {p.name: p.read_bytes() for p in done.files}

    return run


def test_a_question_that_training_never_posed_is_flagged(world, evaluated):
    results, _ = evaluated(Perfect(world), ["loss", "class", "retrieval", "forward_vs_ar"], NARROW, 20)
    for result in results.values():
        assert all(d.value == (name in ("caption->rgb", "caption->audio")) for name, d in result.in_distribution.items())
        for m in result.metrics:
            name = m.name.split("/")[0]
            want = None if "->" not in name else name in ("caption->rgb", "caption->audio")
            assert m.in_distribution is want, m.name
    assert any("training did not pose '->caption'" in n for n in results["class"].notes)
    assert results["loss"].in_distribution["audio->rgb"].frequency == 0


def test_the_same_model_gives_the_same_files(world, evaluated):
    first, again = (evaluated(ClassOnly(world), OURS, limit=20)[1] for _ in range(2))
    assert len(first) == 2 * len(OURS) and first == again


def test_the_ceiling_of_text_is_its_wording(tmp_path):
    """In a world whose captions say the colour only, but hold a number, log 8 nats are left to whoever knows the colour."""
    world = make_world(tmp_path)
    info = world.dataset.info()
    determined = {m: ["colour"] for m in ("rgb", "audio", "caption")}
    told = info.model_copy(update={"determined": determined, "wording": {"caption": [float(np.log(8))]}})
    world.dataset.info_path.write_text(told.model_dump_json())
    found = findings("loss", ClassOnly(world)).metrics
    assert found["rgb->caption/ce"].value == pytest.approx(found["rgb->caption/ce"].ceiling, abs=1e-6)
    assert found["->caption/ce"].ceiling is None and found["caption->rgb/ce"].ceiling is None


# -- bad input ----------------------------------------------------------------------------------------------------


def missing(probe, context):
    return PROBES.get(probe)().missing(context)


def test_one_class_only(tmp_path):
    world = make_world(tmp_path, classes=1, members=6)
    info = world.dataset.info()
    only = {a: v for a, v in info.attributes.items() if a == "colour"}
    determined = {m: ["colour"] for m in ("rgb", "audio", "caption")}
    told = info.model_copy(update={"attributes": only, "determined": determined})
    world.dataset.info_path.write_text(told.model_dump_json())
    context = known_context(Perfect(world))
    assert missing("class", context) == "there is one class only ('red'): nothing to choose from"
    found = findings("retrieval", Perfect(world), context)
    assert found.metrics["audio->rgb/r1"].value == 1 and not any("class_" in m for m in found.metrics)


def test_an_empty_split_and_one_of_a_single_sample(tmp_path):
    kinds = np.arange(16)
    world = make_world(tmp_path, 4, 4, splits={"train": kinds, "val": kinds[:1], "test": kinds[:0]})
    with pytest.raises(DataError, match="data set 'known' has no split 'test' of rgb tokens"):
        known_context(Perfect(world))
    alone = known_context(Perfect(world), "val")
    assert missing("retrieval", alone) == "a gallery needs two samples at least"
    for probe in ("loss", "class", "calibration", "forward_vs_ar", "memorization"):
        assert findings(probe, Perfect(world), alone).metrics, probe


def test_what_a_run_or_data_set_lacks_is_said(world, tmp_path):
    run = known_run(Perfect(world))
    context = known_context(Perfect(world))
    assert missing("memorization", Context(run, "train", None, 0, lambda *a: None)) == (
        "it compares a held-out split with the train split, and 'train' was asked for")
    context.names = ["rgb", "audio"]
    assert missing("class", context) == "the run has no caption"
    context.names = ["caption"]
    assert missing("class", context).startswith("the run has no modality to tell a class from")
    assert missing("retrieval", context) == "the run has one modality only"


def test_a_run_of_another_data_set(world, tmp_path):
    other = make_world(tmp_path)
    spec = read_spec(other.dataset.spec_path("rgb"))
    other.dataset.spec_path("rgb").write_text(spec.model_copy(update={"vocab_size": 13}).model_dump_json())
    run = known_run(Perfect(world))
    run.dataset = other.dataset
    with pytest.raises(CheckpointError, match="the rgb tokens are not those this run was trained on: vocab_size is 12 here and 13"):
        Context(run, "test", None, 0, lambda *a: None)


def test_a_checkpoint_that_another_process_is_writing_is_not_read(tmp_path):
    tensors = {"model": {"w": torch.ones(2)}}
    good = checkpoint.save(tmp_path, 10, tensors, {"step": 10}, keep=2)
    half = tmp_path / "checkpoints" / ".step-00000020.4242.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 7)
    assert checkpoint.latest(tmp_path) == good and checkpoint.checkpoints(tmp_path) == [good]
    assert checkpoint.load(checkpoint.latest(tmp_path)).tensors["model"]["w"].tolist() == [1, 1]
    half.rename(tmp_path / "checkpoints" / "step-00000020")  # copied by hand, cut short
    with pytest.raises(CheckpointError, match="step-00000020 is damaged") as err:
        checkpoint.load(checkpoint.latest(tmp_path))
    assert "the previous one is step-00000010" in err.value.hint


def test_a_training_that_shows_some_classes_only(tmp_path):
    """Held-out samples of a class that training never showed have no caption to be compared: they are left out, and counted."""
    kinds = np.arange(64)
    world = make_world(tmp_path, splits={"train": kinds[:32], "val": kinds[:8], "test": kinds})
    found = findings("class", Perfect(world))
    assert found.metrics["rgb->caption/colour_top1"].n == 32 and found.metrics["rgb->caption/colour_top1"].value == 1
    assert found.metrics["rgb->caption/colour_acc"].n == 64
