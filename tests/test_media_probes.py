"""What generated media are measured by: known errors, parity with other implementations, predictors with known answers."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from predictors import ClassOnly, Perfect, Uniform, findings, make_world
from workspace_factory import copied, media, one_thread, tiny  # noqa: F401

from nano4m_cli.data.sources import _scene_sound as scene
from nano4m_cli.data.sources._base import Attribute
from nano4m_cli.data.sources._scene_text import ATTRIBUTES, compose
from nano4m_cli.errors import DataError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import RATE
from nano4m_cli.probes._audio import cents, log_mel, onset, pitch
from nano4m_cli.probes._distances import across_halves, frechet, jackknifed, kernel_mmd
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.probes._images import absrel, angle, angle_figures, delta1, psnr, rmse, ssim
from nano4m_cli.probes._judges import Judge
from nano4m_cli.probes._matching import Reader, assign, best_reader, matched, told
from nano4m_cli.probes._texts import bleu_counts, bleu_interval, chrf, words
from nano4m_cli.probes.sounds import Notes

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng


# -- pictures, depth, normals -----------------------------------------------------------------------------------------


def test_depth_errors_literal():
    truth = [np.array([[2.0, 4.0], [0.0, 8.0]], np.float32)]
    guess = [np.array([[2.0, 5.0], [9.0, 4.0]], np.float32)]  # what is unknown does not count
    assert absrel(guess, truth) == pytest.approx([(0 + 0.25 + 0.5) / 3])
    assert rmse(guess, truth) == pytest.approx([math.sqrt((0 + 1 + 16) / 3)])
    assert delta1(guess, truth) == pytest.approx([1 / 3]), "a factor of 1.25 is not below 1.25"
    assert delta1([np.array([[2.4, 4.9], [0, -8.0]])], truth) == pytest.approx([2 / 3]), "a depth behind the camera is no depth"
    assert absrel(truth, truth) == rmse(truth, truth) == [0] and delta1(truth, truth) == [1]


def test_normal_errors_literal():
    up = np.zeros((2, 2, 3), np.float32)
    up[..., 2] = 1
    tilted = np.stack([[np.sin(a), 0, np.cos(a)] for a in np.radians([0, 10, 20, 40])]).reshape(2, 2, 3)
    found = angle_figures([tilted], [up])
    assert angle([tilted], [up]) == pytest.approx([17.5]) and found["angle_median"] == pytest.approx([15])
    assert {k: v[0] for k, v in found.items() if "under" in k} == {
        "angle_under_11.25": 0.5, "angle_under_22.5": 0.75, "angle_under_30": 0.75}


def test_equal_pictures():
    picture = [RNG(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)]
    assert psnr(picture, picture) == [99] and ssim(picture, picture) == pytest.approx([1])
    other = [np.clip(picture[0].astype(int) + 5, 0, 255).astype(np.uint8)]
    assert 25 < psnr(other, picture)[0] < 40 and ssim(other, picture)[0] < 1


def test_the_judge_counts_as_a_plain_loop_does():
    attributes = {"shape": ["cube", "sphere"], "colour": ["red", "green", "blue"]}
    judge, rng = Judge("rgb", attributes, 2, None), RNG(0)
    said = {a: rng.integers(0, len(v), (40, 2)) for a, v in attributes.items()}
    judge.judge = lambda raws: said
    labels = [{"objects": [{a: str(rng.choice([*v, "never taught"])) for a, v in attributes.items()}
                           for _ in range(rng.integers(1, 3))]} for _ in range(40)]
    for a, values in attributes.items():
        right, there = judge.correct([None] * 40, labels)[a]
        want = [sum(values[said[a][i, o]] == t[a] for o, t in enumerate(x["objects"])) for i, x in enumerate(labels)]
        assert right.tolist() == want
        assert there.tolist() == [len(x["objects"]) for x in labels]


# -- distances of distributions -----------------------------------------------------------------------------------------


class _Features(torch.nn.Module):
    num_features = 12

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("n, m", [(60, 40), (9, 8)])
def test_distances_are_those_of_torchmetrics(n, m):
    ensure_torchaudio()
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = RNG(0).normal(size=(n, 12)), 0.5 + 1.5 * RNG(1).normal(size=(m, 12))
    fid = FrechetInceptionDistance(feature=_Features()).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=_Features(), subsets=1, subset_size=min(n, m))
    for real, values in ((True, x), (False, y)):
        fid.update(torch.from_numpy(values).reshape(-1, 3, 2, 2), real=real)
        kid.update(torch.from_numpy(values[: min(n, m)]).reshape(-1, 3, 2, 2), real=real)
    assert frechet(x, y) == pytest.approx(float(fid.compute()), rel=1e-5)
    few = min(n, m)
    assert kernel_mmd(x[:few], y[:few]) == pytest.approx(float(kid.compute()[0]), rel=1e-4, abs=1e-5)


def test_a_set_is_at_no_distance_from_itself():
    for n in (5, 40):
        x = RNG(n).normal(size=(n, 12))
        assert frechet(x, x) == pytest.approx(0, abs=1e-9)
        assert frechet(x, RNG(0).permutation(x)) == pytest.approx(0, abs=1e-9), "the order of samples tells nothing"
    same = np.ones((20, 12))
    assert frechet(same, same) == 0 and kernel_mmd(same, same) == pytest.approx(0), "features that never vary"


def test_frechet_of_known_normals_and_its_bias():
    """|mean|^2 + sum (s - 1)^2 for axes of deviations 1 and s; more samples come nearer, from above."""
    x, y = RNG(0).normal(size=(20000, 6)), 2.0 + 3.0 * RNG(1).normal(size=(20000, 6))
    assert frechet(x, y) == pytest.approx(6 * (4 + 4), rel=0.02)
    small = np.mean([frechet(x[i : i + 20], x[i + 20 : i + 40]) for i in range(0, 4000, 40)])
    larger = np.mean([frechet(x[i : i + 200], x[i + 200 : i + 400]) for i in range(0, 4000, 400)])
    assert small > larger > frechet(x[:9000], x[9000:])


def test_kernel_distance_is_unbiased():
    found = [kernel_mmd(*RNG(i).normal(size=(2, 25, 6))) for i in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20


def test_no_scene_stands_on_both_sides():
    """Copies of what is real are as far from it as real samples are from others: made and real rows never meet."""
    real = RNG(0).normal(size=(40, 5))
    assert across_halves(frechet, real, real) == pytest.approx(frechet(real[::2], real[1::2]))
    seen = []
    across_halves(lambda a, b: seen.append((a[:, 0], b[:, 0])) or 0.0, np.arange(9.0)[:, None], np.arange(9.0)[:, None])
    assert all(not set(a) & set(b) for a, b in seen) and len(seen) == 2


def test_jackknife_error_of_a_mean():
    x, hits = RNG(0), 0
    for _ in range(200):
        values = x.normal(size=80)
        value, (low, high) = jackknifed(lambda rows, v=values: float(v[rows].mean()), 80)
        assert value == values.mean()
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert jackknifed(lambda rows: 1.0, 8)[1] is None


# -- sound --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", scene.PARTIALS)
@pytest.mark.parametrize("material", scene.DECAY)
def test_notes_are_heard_where_and_how_high_they_are(shape, material):
    for hertz in (215.3, 671.9):
        wave = scene.clip([("sphere", "metal", 226.0 if hertz > 300 else 640.0, 0.2), (shape, material, hertz, 0.3)], 1.0)
        when, rise = onset(wave, 1 / 3, 1 / 6)
        assert abs(when - 1 / 3) < 0.012 and rise > math.log(4)
        assert cents(np.array([pitch(wave, 1 / 3)]), np.array([hertz]))[0] < 30
        late = np.concatenate([np.zeros(RATE // 25, np.float32), wave])[: len(wave)]  # 40 ms
        assert onset(late, 1 / 3, 1 / 6)[0] - when == pytest.approx(0.04, abs=0.006)


def test_silence_has_no_notes():
    wave = np.zeros(RATE, np.float32)
    assert onset(wave, 0.3, 0.1)[1] == 0 and math.isnan(pitch(wave, 0.3))
    assert cents(np.array([np.nan, 440.0, 880.0, 10.0]), np.full(4, 440.0)).tolist() == [2400, 0, 1200, 2400]


def test_scenes_notes_are_counted_and_timed():
    labels = [{"objects": [{"hertz": h, "size": "large"} for h in hertz]} for hertz in ([220.0], [224.0, 216.0], [220.0] * 3)]
    clips = [scene.clip([("cube", "rubber", o["hertz"], 0.3) for o in x["objects"]], 1.0) for x in labels]
    context = SimpleNamespace(info=SimpleNamespace(sizes={"audio": {"seconds": 1.0}}), labels=labels)
    notes = Notes(context, 3)
    found = notes.figures(clips)
    assert found["notes_acc"][0].tolist() == [1, 1, 1] and found["pitch_acc"][0].tolist() == [1, 1, 1]
    assert (found["onset_ms"][0] < 10).all() and (found["pitch_cents"][0] < 25).all()
    assert found["pitch_cents"][1].tolist() == [1, 2, 3]
    wrong = notes.figures([clips[1], clips[0], np.zeros(RATE, np.float32)])
    assert wrong["notes_acc"][0].tolist() == [0, 0, 0] and wrong["pitch_cents"][0][2] == 2400
    octave = [scene.clip([("cube", "rubber", 2 * o["hertz"], 0.3) for o in x["objects"]], 1.0) for x in labels]
    assert notes.figures(octave)["pitch_cents"][0] == pytest.approx([1200] * 3, abs=20)
    assert log_mel(clips, {"seconds": 1.0}).shape == (3, 96, 64)


# -- captions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 3), (3, 3), (4, 4), (3, 5), (5, 2)])
def test_assignment_is_the_best_of_all(rows, columns):
    for i in range(30):
        cost = RNG(i).integers(-3, 4, (rows, columns)) if i % 2 else RNG(i).normal(size=(rows, columns))
        found = assign(cost)
        used = found[found >= 0]
        assert len(found) == rows and len(set(used)) == len(used) == min(rows, columns)
        wide = cost if rows <= columns else cost.T
        best = min(sum(wide[r, c] for r, c in enumerate(p)) for p in itertools.permutations(range(wide.shape[1]), len(wide)))
        assert sum(cost[r, c] for r, c in enumerate(found) if c >= 0) == pytest.approx(best)


def test_captions_of_scenes_are_read_back_in_any_wording():
    rng, reader = RNG(0), Reader(ATTRIBUTES)
    for _ in range(60):
        count = int(rng.integers(1, 4))
        objects = [{a: str(rng.choice(v.values)) for a, v in ATTRIBUTES.items()} for _ in range(count)]
        text, fields = compose(objects, int(rng.integers(3)), [tuple(rng.integers(0, 2, 2)) for _ in objects])
        assert reader.read(text) == objects == told({"objects": objects, "fields": fields})


def test_whole_words_only():
    pets = {"pet": Attribute(values=["pig", "cat", "sea cat"], surfaces={"pig": ["pig"], "cat": ["cat"], "sea cat": ["sea cat"]})}
    assert Reader(pets).read("a pigeon, concatenated") == []
    assert Reader(pets).read("A Sea  cat and a pig.") == [{"pet": "sea cat"}, {"pet": "pig"}]
    assert Reader({}).read("a pig") == [] and Reader(pets).read("") == []


def test_the_rule_of_reading_is_chosen_by_what_it_finds():
    digits = {"digit": Attribute(values=["1", "2"], surfaces={"1": ["one"], "2": ["two"]}),
              "accent": Attribute(values=["de", "fr"], surfaces={"de": ["german"], "fr": ["french"]})}
    truth = [[{"digit": "1", "accent": "fr"}, {"digit": "2"}], [{"digit": "2", "accent": "de"}]]
    reader = best_reader(digits, ["the digits one two in a french accent", "the digits two in a german accent"], truth)
    assert reader.rule == "count"
    assert reader.read("the digits two two in a german accent") == [{"digit": "2", "accent": "de"}, {"digit": "2"}]


def test_fields_are_counted_for_the_objects_they_are_said_of():
    red, blue = {"colour": "red", "shape": "cube"}, {"colour": "blue", "shape": "ball"}
    assert matched([red, blue], [red, blue]) == ({"colour": 2, "shape": 2}, True)
    right, whole = matched([blue, red], [red, blue])
    assert right == {"colour": 2, "shape": 2} and not whole, "in another order, all fields are right and the caption is not"
    mixed, _ = matched([{"colour": "blue", "shape": "cube"}, {"colour": "red", "shape": "ball"}], [red, blue])
    assert mixed.total() == 2, "words that belong to other things are not right"
    assert matched([red], [red, blue]) == ({"colour": 1, "shape": 1}, False)
    assert matched([], [red])[0].total() == 0 and matched([red, blue], [red]) == ({"colour": 1, "shape": 1}, False)


SAID = ["a large red metal sphere", "there is a small blue cube, and a sphere", "a red cube next to a cube", "green"]
TRUE = ["a large red rubber sphere", "there is a small blue cube and a big sphere", "a red cube next to a cube", "a green sphere"]


def test_bleu_is_that_of_torchmetrics():
    ensure_torchaudio()
    from torchmetrics.functional.text import bleu_score

    value, (low, high) = bleu_interval(bleu_counts(SAID, TRUE))
    want = float(bleu_score([" ".join(words(s)) for s in SAID], [[" ".join(words(t))] for t in TRUE]))
    assert value == pytest.approx(want, rel=1e-5) and low <= value <= high
    assert bleu_interval(bleu_counts(TRUE, TRUE))[0] == pytest.approx(1)
    assert bleu_interval(bleu_counts(["x"] * 4, TRUE))[0] == bleu_interval(bleu_counts([""] * 4, TRUE))[0] == 0


def test_chrf_literal():
    assert chrf("a red cube", "a red cube") == 1 and chrf("", "x") == chrf("abc", "xyz") == 0 and chrf("", "") == 1
    # "abcd" to "abc": precisions 3/4, 2/3, 1/2, recalls 1, 1, 1 over the three lengths that both have
    p = np.mean([3 / 4, 2 / 3, 1 / 2])
    assert chrf("ab cd", "abc") == pytest.approx(5 * p / (4 * p + 1))
    assert chrf("abc", "abcd") < chrf("abcd", "abc"), "recall counts more"


# -- predictors with known answers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("known"))


def test_captions_of_known_predictors(world):
    perfect = findings("captions", Perfect(world)).metrics
    for source in ("rgb", "audio"):
        for what in ("exact", "chrf", "bleu", "colour_field_acc", "number_field_acc", "fields_acc", "objects_acc", "all_acc"):
            metric = perfect[f"{source}->caption/{what}"]
            assert metric.value == metric.reference == 1 and metric.ci95 == (1, 1), what
    chance = perfect["rgb->caption/colour_field_acc"]
    assert 0 <= chance.chance <= 0.3 and 0 <= chance.majority <= 0.3 and chance.ceiling == 1
    only = findings("captions", ClassOnly(world)).metrics
    assert only["rgb->caption/colour_field_acc"].value == 1 and only["rgb->caption/objects_acc"].value == 1
    number = only["rgb->caption/number_field_acc"]
    assert number.ci95[0] <= 1 / 8 <= number.ci95[1] and number.value == only["rgb->caption/exact"].value
    nothing = findings("captions", Uniform(world)).metrics
    assert nothing["audio->caption/exact"].value == 0 and nothing["audio->caption/all_acc"].value == 0
    assert nothing["audio->caption/colour_field_acc"].value < 0.1 and nothing["audio->caption/chrf"].value < 0.3


def test_one_class_only(tmp_path):
    """There is nothing to choose from: chance says so, and no figure breaks."""
    found = findings("captions", Perfect(make_world(tmp_path, classes=1, members=4))).metrics
    assert found["rgb->caption/colour_field_acc"].value == found["rgb->caption/colour_field_acc"].chance == 1
    gains = findings("fusion", Uniform(make_world(tmp_path / "b", classes=1, members=1))).metrics
    assert all(m.n == 1 and m.value == pytest.approx(0) for m in gains.values())


# -- the real path, on a run that learned nothing ------------------------------------------------------------------------


@pytest.fixture
def studio(media, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nano4m_cli.probes._judges.STEPS", {"rgb": 3, "audio": 3})
    return copied(media, tmp_path / "studio")


NEW = ["captions", "crossmodal", "fid", "fusion", "sounds"]


def test_probes_of_generated_media(studio):
    done = evaluate(studio, None, NEW)
    found = {(r.probe, m.name): m for r in done.results for m in r.metrics}
    for probe, names in {
        "crossmodal": ["rgb->depth/rmse", "rgb->depth/delta1", "rgb->depth/token_acc", "caption->rgb/recognised",
                       "caption->rgb/ssim", "depth->rgb/psnr", "caption->audio/recognised"],
        "captions": ["rgb->caption/fields_acc", "audio->caption/bleu", "depth->caption/chrf", "rgb->caption/all_acc"],
        "sounds": ["caption->audio/mel", "rgb->audio/onset_ms", "caption->audio/pitch_cents", "audio/true_notes_acc",
                   "audio/roundtrip_mel"],
        "fid": ["caption->rgb/fid_judge", "caption->rgb/kid_judge", "caption->audio/fad_judge", "rgb/fid_judge_real"],
        "fusion": ["caption->rgb/gain", "caption->rgb/gain_last", "caption->rgb/gain_shapley", "audio+caption->rgb/synergy"],
    }.items():
        for name in names:
            assert found[probe, name].value is not None, name
    for (_, name), m in found.items():
        assert m.ci95 is None or m.ci95[0] <= m.value + 1e-6 and m.value - 1e-6 <= m.ci95[1], name
    assert found["sounds", "audio/true_mel"].value == 0 and found["sounds", "audio/true_pitch_acc"].value == 1
    assert found["crossmodal", "rgb->depth/token_acc"].chance == 1 / 1000
    assert found["crossmodal", "caption->rgb/recognised"].chance == pytest.approx(1 / 72, abs=1e-6)
    before = {f.name: f.read_bytes() for f in done.files}
    again = evaluate(studio, None, NEW)
    assert {f.name: f.read_bytes() for f in again.files} == before, "the same checkpoint gives the same files"


def test_what_is_too_little_for_them(studio):
    with pytest.raises(DataError, match="probe 'fid' cannot run here: 4 samples are too few"):
        evaluate(studio, None, ["fid"], limit=4)
    done = evaluate(studio, None, ["captions", "sounds", "fusion"], limit=1)
    assert all(m.n <= 1 for r in done.results for m in r.metrics)
