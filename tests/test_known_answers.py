"""What theory says that the likelihood probes return for models whose answers are known (tests/predictors.py)."""

import numpy as np
import pytest
from predictors import ClassOnly, Marginal, Perfect, Uniform, findings, make_world


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
    from predictors import known_context

    from nano4m_cli.probes.loss import SHRINK, marginal_nll

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
    assert recall.columns == ["asked", "rgb", "audio"] and all(row == [8, 1.0, 1.0] for row in recall.values)


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
