"""Conditions: which slots a region keeps, and what partial, negative and weighted conditions and recipes make of a request."""

import json

import numpy as np
import pytest
from PIL import Image
from test_cli import run
from test_sampler import model, one_logits, start  # noqa: F401
from workspace_factory import media, one_thread, tiny  # noqa: F401

from nano4m_cli.config import build
from nano4m_cli.data.shards import Split
from nano4m_cli.errors import ConfigError, MediaError, Nano4MError, UsageError
from nano4m_cli.generate.command import Request, Studio
from nano4m_cli.generate.conditions import (
    box_slots,
    first_slots,
    fitted,
    kept_slots,
    seconds_of,
    span_slots,
    veiled,
    white_slots,
)
from nano4m_cli.generate.sampler import GenerateOptions, Stage, State, chains, fill
from nano4m_cli.generate.state import views
from nano4m_cli.spec import TokenSpec
from nano4m_cli.train.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")


def grid(*shape):
    return TokenSpec(modality="rgb", kind="grid", shape=shape, vocab_size=4)


SOUND = TokenSpec(modality="audio", kind="codes", shape=(8, 2), vocab_size=4, preprocess={"samples": 24_000, "rate": 24_000})
VIDEO = TokenSpec(modality="video", kind="grid", shape=(4, 1, 2), vocab_size=4, preprocess={"frames": 8, "fps": 4})
TEXT = TokenSpec(modality="caption", kind="sequence", shape=(9,), vocab_size=4, eos=0)


def drawn(*rows):
    return [c == "x" for row in rows for c in row]


# -- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "region, shape, want",
    [
        ("left-half", (2, 4), ["xx..", "xx.."]),
        ("left-half", (1, 5), ["xx..."]),  # the middle slot lies half outside
        ("right-half", (1, 5), ["...xx"]),
        ("top-half", (4, 2), ["xx", "xx", "..", ".."]),
        ("bottom-half", (3, 2), ["..", "..", "xx"]),
        ("centre", (4, 4), ["....", ".xx.", ".xx.", "...."]),
        ("border", (4, 4), ["xxxx", "x..x", "x..x", "xxxx"]),
        ("centre", (5, 5), [".....", ".....", "..x..", ".....", "....."]),
        ("border", (5, 5), ["xxxxx", "x...x", "x...x", "x...x", "xxxxx"]),
        ("left-half", (2, 1, 2), ["x.", "x."]),
    ],
)
def test_regions_literal(region, shape, want):
    assert box_slots(shape, region).tolist() == drawn(*want)


@pytest.mark.parametrize("pixels", [(8, 8), (16, 24), (7, 9), (3, 2)])
def test_a_slot_of_a_mask_is_kept_where_each_of_its_pixels_is_white(pixels):
    """Against the slow loop over slots and pixels; pixels may straddle slots."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        white, (h, w) = rng.random(pixels) < 0.93, (4, 3)
        want = [
            all(
                white[y, x]
                for y in range(pixels[0]) for x in range(pixels[1])
                if y < (i + 1) * pixels[0] / h and y + 1 > i * pixels[0] / h
                and x < (j + 1) * pixels[1] / w and x + 1 > j * pixels[1] / w
            )
            for i in range(h) for j in range(w)
        ]
        assert white_slots((h, w), white).tolist() == want
        assert white_slots((2, h, w), white).tolist() == want * 2


def test_first_parts_are_of_whole_frames():
    assert first_slots(grid(2, 3), 0.5, 6).tolist() == [True] * 3 + [False] * 3
    assert first_slots(grid(2, 3), 0.65, 6).sum() == 3 and first_slots(grid(3, 3), 1 / 3, 9).sum() == 3
    assert first_slots(SOUND, 0.3, 16).tolist() == [True] * 4 + [False] * 12
    assert first_slots(VIDEO, 0.5, 8).tolist() == [True] * 4 + [False] * 4
    assert first_slots(TEXT, 0.5, 5).tolist() == [True] * 2 + [False] * 3


def test_spans_of_seconds():
    assert span_slots(SOUND, 0, 0.5, 1.0).sum() == 8 and span_slots(SOUND, 0, 0.49, 1.0).sum() == 6
    assert np.flatnonzero(span_slots(SOUND, 0.25, 0.5, 1.0)).tolist() == [4, 5, 6, 7]
    assert seconds_of(VIDEO) == 2.0 and seconds_of(SOUND) == 1.0 and seconds_of(TEXT) is None
    assert kept_slots(VIDEO, ["0.5-1.5s"], 8).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert kept_slots(SOUND, ["0.5s"], 16).sum() == 8


def test_several_regions_keep_what_all_hold():
    assert kept_slots(grid(2, 2), ["left-half", "top-half"], 4).tolist() == drawn("x.", "..")


@pytest.mark.parametrize(
    "spec, regions, said",
    [
        (grid(2, 2), ["left-half", "right-half"], "contradicts itself: left-half and right-half have no slot in common"),
        (grid(1, 1), ["left-half"], "holds no whole slot of rgb (1 x 1)"),
        (grid(4, 4), ["0.01"], "holds no whole slot"),
        (grid(4, 4), ["0"], "a share lies between 0 and 1"),
        (grid(4, 4), ["1.5"], "a share lies between 0 and 1"),
        (grid(4, 4), ["0.5s"], "rgb is not counted in seconds"),
        (grid(4, 4), ["lefthalf"], "no such region or file"),
        (SOUND, ["left-half"], "audio is no picture"),
        (SOUND, ["0.6-0.5s"], "ends before it begins"),
        (SOUND, ["2-3s"], "audio ends at 1 s"),
        (SOUND, ["mask.png"], "is no part of audio"),
        (TEXT, ["centre"], "caption is no picture"),
        (TEXT, ["1s"], "not counted in seconds"),
    ],
)
def test_what_cannot_be_kept(spec, regions, said):
    with pytest.raises(UsageError) as err:
        kept_slots(spec, regions, spec.slots)
    assert said in str(err.value) and err.value.hint or "ends at" in said


def test_a_mask_goes_through_what_its_picture_goes_through():
    raw = np.zeros((4, 8, 3), dtype=np.uint8)
    white = np.zeros((4, 8), dtype=bool)
    white[:, 2:5] = True
    middle = lambda picture: (picture[:, 2:6], None)  # noqa: E731
    assert fitted(white, "m.png", raw, middle).tolist() == [[True, True, True, False]] * 4
    still = np.zeros((3, 4, 8, 3), dtype=np.uint8)
    assert fitted(white, "m.png", still, lambda video: (video[:, :, 2:6], None)).tolist() == [[True, True, True, False]] * 4
    with pytest.raises(MediaError, match="mask 'm.png' is of 8 x 4, its picture of 6 x 4"):
        fitted(white, "m.png", raw[:, :6], middle)


def test_what_is_not_kept_is_shown_grey():
    picture = np.full((4, 4, 3), 9, dtype=np.uint8)
    assert veiled(picture, grid(2, 2), np.array([True, False, True, True]))[..., 0].tolist() == [
        [9, 9, 128, 128], [9, 9, 128, 128], [9, 9, 9, 9], [9, 9, 9, 9]
    ]


    assert veiled(picture[:2], SOUND, np.arange(16) < 4)[0, :, 0].tolist() == [9, 128, 128, 128], "2 of 8 frames, 1 of 4 columns"
    assert veiled(picture, VIDEO, np.zeros(8, dtype=bool)) is picture


# -- guidance ---------------------------------------------------------------------------------------------------------


def asked_of(layout, known, i, target):
    out = np.zeros_like(known[i : i + 1])
    out[0, layout.slice(target)] = ~known[i, layout.slice(target)]
    return out


def test_weights_equal_questions_asked_apart(model, layout, sample):  # noqa: F811
    """u + sum of w_i (c_i - u), one request and one question at a time: txt and vid by weight, pic by the guidance scale."""
    state = start(layout, sample, 4, ["txt", "vid", "pic"], part={"snd": 3})
    state.known_BC[1, layout.slice("pic")] = False  # a request that lacks a condition
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    options = GenerateOptions(scheme="onepass", temperature=0, guidance=1.5, weights={"txt": 3, "vid": -0.5})
    fill(model, state, "snd", options)
    for i in range(4):
        asked = asked_of(layout, known, i, "snd")

        def answer(*shown, i=i, asked=asked):
            only = np.zeros_like(known[i : i + 1])
            for name in ("snd", *shown):
                only[0, layout.slice(name)] = known[i, layout.slice(name)]
            return one_logits(model, ids[i : i + 1], only, asked)

        u, txt, vid, pic = answer(), answer("txt"), answer("vid"), answer("pic")
        assert len(u) == 7
        for c in u:
            want = u[c] + 3 * (txt[c] - u[c]) - 0.5 * (vid[c] - u[c]) + 1.5 * (pic[c] - u[c])
            assert state.ids_BC[i, c] == int(want.argmax())


def test_one_weighted_condition_is_plain_guidance(model, layout, sample):  # noqa: F811
    made = []
    for options in ({"guidance": 3.0}, {"guidance": 7.0, "weights": {"txt": 3.0}}):
        state = start(layout, sample, 5, ["txt"])
        fill(model, state, "pic", GenerateOptions(temperature=1.0, steps=4, **options))
        made.append(state.ids_BC[:, layout.slice("pic")])
    assert np.array_equal(*made)


def test_a_negative_condition_takes_the_place_of_nothing(model, layout, sample):  # noqa: F811
    """n + s (c - n), where n sees the target's own slots and the negative text; requests without one see nothing."""
    state = start(layout, sample, 4, ["vid"], part={"snd": 3})
    ids, known = np.where(state.known_BC, state.ids_BC, 0), state.known_BC.copy()
    state.away_ids_BC, state.away_BC = np.zeros_like(ids), np.zeros_like(known)
    text = layout.slice("txt").start
    for i, words in enumerate([[4, 5, 3], [], [7, 3], [8, 8, 8, 3]]):
        state.away_ids_BC[i, text : text + len(words)] = words
        state.away_BC[i, text : text + len(words)] = True
    plain = State(state.ids_BC.copy(), known.copy(), np.arange(4))
    options = GenerateOptions(scheme="onepass", temperature=0, guidance=3.0)
    fill(model, state, "snd", options)
    fill(model, plain, "snd", options)
    for i in range(4):
        asked, own = asked_of(layout, known, i, "snd"), known[i : i + 1].copy()
        own[0, layout.slice("vid")] = False
        c = one_logits(model, ids[i : i + 1], known[i : i + 1], asked)
        n = one_logits(model, ids[i : i + 1] + state.away_ids_BC[i : i + 1], own | state.away_BC[i : i + 1], asked)
        for col in c:
            assert state.ids_BC[i, col] == int((n[col] + 3 * (c[col] - n[col])).argmax())
    same = (state.ids_BC == plain.ids_BC)[:, layout.slice("snd")].all(1)
    assert same[1] and not same.all()


def test_plain_options_ask_one_question(layout, sample):
    state = start(layout, sample, 2, ["txt"])
    columns = layout.slice("pic")
    assert len(views(layout, state, columns, GenerateOptions())) == 1
    assert [v.weight for v in views(layout, state, columns, GenerateOptions(guidance="4..1"))] == [1.0, "4..1"]
    weighted = GenerateOptions(weights={"txt": 2, "vid": 0})
    assert [v.weight for v in views(layout, state, columns, weighted)] == [1.0, 2.0], "what is not known is not asked"


def test_mixed_requests_are_each_as_alone(model, layout, sample):  # noqa: F811
    """Other targets, options, seeds, chains, hidden parts and negatives in one batch."""
    state = start(layout, sample, 9, ["txt"])
    state.ids_BC[~state.known_BC] = 0
    state.away_ids_BC, state.away_BC = np.zeros_like(state.ids_BC), np.zeros_like(state.known_BC)
    state.away_BC[::2, layout.slice("vid")] = True
    hot = GenerateOptions(temperature="1..0.3", steps=3, guidance="3..1", seed=5)
    hide = np.zeros(layout.columns, dtype=bool)
    hide[layout.slice("txt")] = True
    hide[layout.slice("pic").start + 6 : layout.slice("pic").stop] = True
    stages = [
        [Stage("pic", hot.model_copy(update={"seed": i})), Stage("snd", GenerateOptions(temperature=1.0, seed=1))] if i % 3 == 0
        else [Stage("snd", GenerateOptions(temperature=1.0, seed=2)), Stage("pic", GenerateOptions(scheme="mean"))] if i % 3 == 1
        else [Stage("pic", hot), Stage("pic", hot.model_copy(update={"seed": 9}), hide), Stage("vid", GenerateOptions(seed=7))]
        for i in range(9)
    ]
    alone = [state.rows(np.array([i])) for i in range(9)]
    chains(model, state, stages, batch=2)
    for i, one in enumerate(alone):
        chains(model, one, [stages[i]])
        assert np.array_equal(one.known_BC[0], state.known_BC[i])
        assert np.array_equal(np.where(one.known_BC, one.ids_BC, 0)[0], np.where(state.known_BC, state.ids_BC, 0)[i])
        assert state.known_BC[i, layout.slice("txt")].any(), "what a stage does not see is still there after it"
    assert np.isfinite(state.values["pic"]).all((1, 2)).tolist() == [i % 3 == 1 for i in range(9)]
    assert len({tuple(r) for r in state.ids_BC[::3, layout.slice("pic")]}) == 3, "seeds differ"


def test_a_stage_makes_anew_what_it_hides_of_its_target(model, layout, sample):  # noqa: F811
    state = start(layout, sample, 6, ["pic", "txt"])
    before, columns = state.ids_BC.copy(), layout.slice("pic")
    hide = np.zeros(layout.columns, dtype=bool)
    hide[columns.start + 6 : columns.stop] = True
    chains(model, state, [[Stage("pic", GenerateOptions(temperature=1.0), hide)]] * 6)
    assert np.array_equal(state.ids_BC[:, columns][:, :6], before[:, columns][:, :6])
    assert (state.ids_BC[:, columns][:, 6:] != before[:, columns][:, 6:]).any(1).all()


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(media):  # noqa: F811
    return Studio(open_run(media))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)
    return path


def asked(**data):
    return build(Request, {"from" if k == "given" else k.rstrip("_"): v for k, v in data.items()})


def made(studio, **data):
    (out,) = studio.make([studio.prepare(asked(**data))])
    return out


def test_what_is_kept_stays_and_the_rest_is_made(studio, photo):
    whole = studio.tokenizer("rgb").encode([np.asarray(Image.open(photo))])[0].reshape(4, 4)
    ids = np.array(made(studio, given={"rgb": str(photo)}, keep="rgb:left-half", to="rgb", n=3, temperature=1).ids["rgb"])
    ids = ids.reshape(3, 4, 4)
    assert (ids[:, :, :2] == whole[:, :2]).all() and (ids[:, :, 2:] != whole[:, 2:]).any((1, 2)).all()


def test_a_mask_image_keeps_what_is_white(studio, photo, tmp_path):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[0:9, 0:16] = 255  # two rows of patches, and a line of the third
    Image.fromarray(mask).save(tmp_path / "m.png")
    kept = studio.prepare(asked(given={"rgb": str(photo)}, keep=[f"rgb:{tmp_path / 'm.png'}"], to="rgb")).kept["rgb"]
    assert kept.reshape(4, 4).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


def test_a_mask_of_a_picture_of_another_size_is_cropped_with_it(studio, tmp_path):
    """40 x 24 pixels: the middle 24 x 24 are read as 16 x 16; of the mask, the middle's left 12 columns are white."""
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 40, 3)).astype(np.uint8)).save(tmp_path / "p.png")
    mask = np.zeros((24, 40), dtype=np.uint8)
    mask[:, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    prepared = studio.prepare(asked(given={"rgb": str(tmp_path / "p.png")}, keep=f"rgb:{tmp_path / 'm.png'}", to="rgb"))
    assert prepared.kept["rgb"].reshape(4, 4).tolist() == [[True, True, False, False]] * 4
    assert any("rgb of 40 x 24 was cropped" in n for n in prepared.notices)
    Image.fromarray(mask[:, :24]).save(tmp_path / "m.png")
    with pytest.raises(MediaError, match="is of 24 x 24, its picture of 40 x 24"):
        studio.prepare(asked(given={"rgb": str(tmp_path / "p.png")}, keep=f"rgb:{tmp_path / 'm.png'}", to="rgb"))


def test_a_kept_part_may_be_a_condition_only(studio, photo):
    prepared = studio.prepare(asked(given={"rgb": str(photo)}, keep={"rgb": "centre"}, to="caption"))
    assert prepared.known_C[studio.layout.slice("rgb")].sum() == 4
    words = made(studio, given={"caption": "a large red cube"}, keep="caption:0.5", to="caption", n=2).raws["caption"]
    text = studio.prepare(asked(given={"caption": "a large red cube"}, keep="caption:0.5", to="caption"))
    assert 0 < text.known_C.sum() < len(studio.tokenizer("caption").encode(["a large red cube"])[0]) - 1
    assert all(isinstance(w, str) for w in words)


def test_a_sound_goes_on(studio):
    key = Split(studio.run.dataset.raw("test")).shards[0].keys[0]
    prepared = studio.prepare(asked(sample=key, keep={"audio": "0-0.5s"}, to="audio"))
    frames = studio.spec["audio"].shape[0]
    assert prepared.kept["audio"].sum() == frames // 2 and set(prepared.raws) == set(studio.layout.names)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"given": {"caption": "a"}, "keep": "rgb:left-half", "to": "rgb"}, "rgb is to be kept and not given"),
        ({"given": {"rgb": "P"}, "to": "rgb"}, "'rgb' is given and asked for"),
        ({"given": {"rgb": "P"}, "keep": "rgb:1.0", "to": "rgb"}, "all of rgb is kept: nothing is left to generate"),
        ({"given": {"rgb": "P"}, "keep": ["rgb:top-half", "rgb:bottom-half"], "to": "rgb"}, "contradicts itself"),
        ({"given": {"caption": "a"}, "not": {"rgb": "P"}, "to": "rgb"}, "moved away from and asked for"),
        ({"given": {"rgb": "P"}, "not": {"depth": "P"}, "to": "caption"}, "text is written without guidance"),
        ({"given": {"rgb": "P"}, "not": {"caption": "a"}, "to": "audio", "guidance": 1}, "--not does nothing at --guidance 1"),
        ({"given": {"caption": "a"}, "not": {"depth": "nowhere.png"}, "to": "rgb"}, "no depth file"),
        ({"given": {"caption": "a"}, "to": "rgb", "weights": {"audio": 2}}, "weight of audio: it is no condition"),
        ({"given": {"caption": "a"}, "to": "rgb", "weights": {"sound": 2}}, "has no modality 'sound'"),
        ({"given": {"caption": "a"}, "to": "rgb", "chain": [{"to": "rgb"}]}, "both 'to' and 'chain'"),
        ({"given": {"caption": "a"}, "chain": [{"to": "rgb"}, {"to": "rgb"}]}, "asked for twice"),
        ({"given": {"caption": "a"}, "chain": [{"to": "rgb", "keep": "caption:0.5"}]}, "a step keeps parts of pictures"),
        ({"given": {"caption": "a"}, "chain": [{"to": "rgb", "given": "sound"}]}, "has no modality 'sound'"),
    ],
)
def test_requests_that_contradict_themselves(studio, photo, data, said):
    filled = {k: {m: str(photo) if v == "P" else v for m, v in d.items()} if k in ("given", "not") else d for k, d in data.items()}
    with pytest.raises(Nano4MError, match=said):
        studio.prepare(asked(**filled))


@pytest.mark.parametrize(
    "data, said",
    [
        ({"guidance": -1}, "guidance: lies outside 0..100"),
        ({"guidance": "5..-1"}, "guidance: lies outside 0..100"),
        ({"temperature": "hot"}, "temperature: write a number, A..B"),
        ({"temperature": "1..0^-2"}, "power of a ramp is positive"),
        ({"temperature": None}, "temperature: write a number"),
        ({"noise": -0.1}, "noise: must be 0 or more"),
        ({"schedule": "sine"}, "schedule: write linear, cosine, or the share"),
        ({"schedule": [0, 0]}, "shares of steps are 0 or more"),
        ({"schedule": "1,-1"}, "shares of steps are 0 or more"),
        ({"min_p": 0}, "min_p"),
        ({"repetition": 0.5}, "repetition"),
        ({"weights": {"rgb": 1000}}, "weight of rgb lies outside"),
        ({"weights": [["rgb", 1], ["rgb", 2]]}, "a modality has one weight"),
        ({"keep": "rgb"}, "'rgb' is not of the form MODALITY:REGION"),
        ({"n": 0}, "n: "),
        ({"chain": [{"steps": 3}]}, "chain.0.to"),
        ({"form": {}}, "unknown key 'form'"),
    ],
)
def test_requests_that_are_badly_written(data, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        build(Request, {"to": "rgb", **data})


def test_a_step_has_the_request_s_options_where_it_says_nothing():
    request = asked(chain=[{"to": "depth", "steps": 4}, {"to": "normal,rgb", "weights": {"depth": 2}}], steps=9, temperature=0.2)
    first, second = (request.options(step) for step in request.course)
    assert (first.steps, first.temperature, second.steps, second.weights) == (4, 0.2, 9, (("depth", 2.0),))
    assert request.targets == ["depth", "normal", "rgb"]


def test_a_chain_of_steps_equals_the_same_targets_in_a_row(studio):
    row = made(studio, given={"caption": "a red cube"}, to="depth,rgb", seed=4, temperature=1)
    steps = made(studio, given={"caption": "a red cube"}, chain=[{"to": "depth"}, {"to": "rgb"}], seed=4, temperature=1)
    blind = made(studio, given={"caption": "a red cube"}, seed=4, temperature=1,
                 chain=[{"to": "depth"}, {"to": "rgb", "given": "caption"}])
    alone = made(studio, given={"caption": "a red cube"}, to="rgb", seed=4, temperature=1)
    assert np.array_equal(row.ids["rgb"], steps.ids["rgb"]) and np.array_equal(row.ids["depth"], steps.ids["depth"])
    assert np.array_equal(blind.ids["rgb"], alone.ids["rgb"]) and np.array_equal(blind.ids["depth"], row.ids["depth"])


def test_a_step_may_make_a_part_anew(studio):
    first = made(studio, given={"caption": "a red cube"}, chain=[{"to": "rgb"}], temperature=1).ids["rgb"][0]
    again = made(studio, given={"caption": "a red cube"}, temperature=1,
                 chain=[{"to": "rgb"}, {"to": "rgb", "keep": "rgb:top-half", "seed": 3}]).ids["rgb"][0]
    assert np.array_equal(first[:8], again[:8]) and (first[8:] != again[8:]).any()


def test_a_negative_needs_no_guidance_from_nothing(studio):
    prepared = studio.prepare(asked(given={"caption": "a red cube"}, not_={"caption": "a blue cube"}, to="rgb"))
    assert prepared.stages[0].options.guidance == 2.5 and prepared.away_C.any()
    plain = studio.make([studio.prepare(asked(given={"caption": "a red cube"}, to="rgb", temperature=1))])[0]
    pushed = made(studio, given={"caption": "a red cube"}, not_={"caption": "a blue cube"}, to="rgb", temperature=1)
    assert not np.array_equal(plain.ids["rgb"], pushed.ids["rgb"])


def test_what_is_done_otherwise_is_said(studio, photo):
    notices = studio.prepare(asked(given={"rgb": str(photo)}, keep="rgb:left-half", to="rgb", steps=50, guidance=0)).notices
    assert "50 steps are more than the 8 slots of rgb to fill: 8 are done" in notices
    assert "guidance 0: the conditions are read and count for nothing" in notices


def test_the_command_paints_the_rest_of_a_picture(media, photo, tmp_path):  # noqa: F811
    args = ["generate", "--from", f"rgb={photo}", "--keep", "rgb:left-half", "--to", "rgb", "--schedule", "1,3",
            "--temperature", "1..0.2", "--root", media.root, "--out", tmp_path / "out", "--device", "cpu", "--json"]
    result = run(*args)
    assert result.exit_code == 0, result.output
    files = [f.rsplit("/")[-1] for f in json.loads(result.stdout)["files"]]
    assert files == ["rgb.png", "rgb.ids.npy", "sheet.png"]
    steps = "[{to: depth, steps: 2}, {to: rgb, scheme: maskgit}]"
    (tmp_path / "recipe.yaml").write_text(f"from: {{caption: a red cube}}\nchain: {steps}\n")
    result = run("generate", "--recipe", tmp_path / "recipe.yaml", "--root", media.root, "--out", tmp_path / "two", "--json")
    assert result.exit_code == 0, result.output
    assert {f.name for f in (tmp_path / "two").iterdir()} >= {"depth.png", "rgb.png", "sheet.png"}
    result = run("generate", "--from", f"rgb={photo}", "--keep", "rgb:left-half", "--keep", "rgb:right-half", "--to", "rgb",
                 "--root", media.root, "--out", tmp_path / "three")
    assert result.exit_code == 2 and "left-half and right-half have no slot in common" in result.stderr
    assert not (tmp_path / "three").exists()


# -- options that change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, to, idle", [
    ({"noise": 1.0}, "rgb", ["noise"]), ({"noise": 1.0, "scheme": "maskgit"}, "rgb", []),
    ({"draft": 2}, "rgb", ["draft"]), ({"draft": 2}, "rgb,caption", []), ({"draft": 2}, "audio", []),
    ({"draft": 2, "scheme": "ar"}, "rgb", []), ({"draft": 2, "scheme": "maskgit"}, "audio", ["draft"]),
    ({"guidance": 3, "repetition": 2}, "caption", ["guidance"]), ({"repetition": 2}, "rgb", ["repetition"]),
    ({"refresh": 2, "scheme": "onepass"}, "rgb", ["refresh"]), ({"refresh": 2}, "caption,rgb", []),
    ({"guidance": None, "draft": None, "refresh": 0, "repetition": 1}, "caption", []), ({}, "rgb", []),
])
def test_what_changes_nothing_is_said(studio, options, to, idle):
    notices = studio.prepare(asked(given={"caption": "a red cube"}, to=to, **options)).notices
    assert [n.partition(" ")[0] for n in notices if "changes nothing here" in n] == idle
