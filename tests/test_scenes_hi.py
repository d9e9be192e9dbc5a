"""Super-resolution: scenes at two resolutions, from rendering to a chain that makes both."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from workspace_factory import settings

from nano4m_cli.config import build
from nano4m_cli.data.sources._scene_shade import shrink
from nano4m_cli.data.sources.scenes import Source, encode, raw_scene
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError
from nano4m_cli.modalities.rgb_hi import MODALITY as RGB_HI
from nano4m_cli.probes._judges import open_judge
from nano4m_cli.train.run import open_run

FINE = Source.Options(hires=True)


@pytest.mark.parametrize("more", [{}, {"video": True}, {"supersample": 1}])
def test_all_but_the_finer_picture_is_what_it_is_without(more):
    fine, plain = Source.Options(hires=True, **more), Source.Options(**more)
    for index in range(6):
        a, b = (encode("k", raw_scene(o, "val", index)).members for o in (fine, plain))
        assert set(a) - set(b) == {"rgb_hi.png"} and all(a[m] == b[m] for m in b)
        assert RGB_HI.from_bytes(a["rgb_hi.png"], "here").shape == (64, 64, 3)


def test_both_show_the_same():
    for index in range(12):
        raw = raw_scene(FINE, "train", index)
        small = shrink(raw.rgb_hi.astype(np.float32) / 255, 2)
        far = np.abs(small.astype(int) - raw_scene(FINE, "train", index + 1).rgb).mean()
        assert np.abs(small.astype(int) - raw.rgb).mean() < min(2, far / 4), "smaller, it is rgb but for what falls between samples"


def test_it_is_the_picture_of_that_size():
    for factor in (2, 3):
        options = Source.Options(hires=True, factor=factor)
        raw = raw_scene(options, "test", 5)
        assert np.array_equal(raw.rgb_hi, raw_scene(Source.Options(size=32 * factor), "test", 5).rgb)


def test_info_and_options():
    plain, fine = (Source(o, Path("unused")).info() for o in (Source.Options(), FINE))
    assert not {"hires", "factor"} & set(plain.options) and "rgb_hi" not in plain.modalities
    assert fine.name == "scenes-hi" and fine.options["hires"] is True and fine.options["factor"] == 2
    assert fine.modalities == [*plain.modalities, "rgb_hi"] and fine.sizes["rgb_hi"] == {"size": [64, 64]}
    assert fine.determined["rgb_hi"] == plain.determined["rgb"] and "rgb_hi" not in fine.ceilings
    assert Source.Options(hires=True, video=True).name == "scenes-video-hi"
    assert Source.Options(hires=True, name="mine").name == "mine"
    for bad, said in (({"factor": 1}, "factor"), ({"factor": 9}, "factor"),
                      ({"size": 1024, "factor": 4}, "size x factor x supersample is 8192 pixels a side; 4096 at most")):
        with pytest.raises(ConfigError, match=said):
            build(Source.Options, {"hires": True, **bad}, "source 'scenes'")
    build(Source.Options, {"size": 1024, "factor": 8}, "not asked for")


def test_a_crop_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="rgb_hi has no variants"):
        RGB_HI.vary(raw_scene(FINE, "train", 0).rgb_hi, np.random.default_rng(0))


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Scenes of 16 and 32 pixels, tokenizers fitted for a few steps, and a run of a few steps, all by the command line."""
    root = tmp_path_factory.mktemp("studio")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "tiny.yaml").write_text("data: {dataset: scenes-hi, modalities: [rgb, rgb_hi, caption]}")
    tiny = ["train=32", "val=8", "test=8", "test_novel=0", "judge=0", "size=16", "supersample=1", "shard_size=32"]
    masking = "[{type: directed, source: {caption: 1, rgb: 1}, target: {rgb: 1, rgb_hi: 1}, sources: [0.5, 0.5], max_target: 16}]"
    fit = [f"{m}.{o}" for m in ("rgb", "rgb_hi") for o in ("width=16", "depth=1", "fit_steps=6")]
    for args in (
        ["fetch", "scenes", "hires=true", *tiny, "--workers", 1],
        ["tokenize", "--modality", "rgb,rgb_hi,caption", *fit, "--workers", 1],
        ["train", root / "tiny.yaml", *settings(train__steps=4, masking__components=masking), "--device", "cpu"],
    ):
        result = run(*args, "--root", root)
        assert result.exit_code == 0, result.output
    yield Workspace(root)
    torch.set_num_threads(before)


def test_tokens_are_those_of_the_tokenizer(studio):
    result = run("tokenize", "--check", "--modality", "rgb,rgb_hi", "--root", studio.root)
    assert result.exit_code == 0, result.output
    shapes = {s.modality: s.shape for s in open_run(studio).layout.specs}
    assert shapes["rgb"] == (2, 2) and shapes["rgb_hi"] == (4, 4)


def test_a_chain_makes_both_and_a_picture_is_made_larger(studio, tmp_path):
    here = ["--root", studio.root, "--device", "cpu"]
    words = "caption=a large red metal sphere"
    result = run("generate", "--from", words, "--to", "rgb,rgb_hi", "--out", tmp_path / "a", *here)
    assert result.exit_code == 0, result.output
    assert [Image.open(tmp_path / "a" / f"{m}.png").size for m in ("rgb", "rgb_hi")] == [(16, 16), (32, 32)]
    given = f"rgb={tmp_path / 'a' / 'rgb.png'}"
    result = run("generate", "--from", given, "--from", words, "--to", "rgb_hi", "--out", tmp_path / "b", *here)
    assert result.exit_code == 0, result.output
    again = [np.load(tmp_path / f / "rgb_hi.ids.npy") for f in "ab"]
    assert again[0].shape == again[1].shape == (16,)


def test_the_judge_of_rgb_sees_the_larger_picture_made_small(studio, monkeypatch):
    monkeypatch.setattr("nano4m_cli.probes._judges.STEPS", {"rgb": 3, "audio": 3})
    dataset, quiet = studio.dataset(), lambda *_: None
    judge = open_judge(dataset, "rgb_hi", quiet)
    assert (dataset.judge("rgb") / "judge.json").is_file() and not dataset.judge("rgb_hi").exists()
    small = [np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8) for i in range(3)]
    big = [s.repeat(2, 0).repeat(2, 1) for s in small]
    for a, p in judge.logp(big).items():
        assert np.allclose(p, open_judge(dataset, "rgb", quiet).logp(small)[a], atol=1e-5)


def test_crossmodal_measures_super_resolution(studio, monkeypatch):
    monkeypatch.setattr("nano4m_cli.probes._judges.STEPS", {"rgb": 3, "audio": 3})
    result = run("eval", "--probe", "crossmodal", "--root", studio.root, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = {m["name"]: m["value"] for r in json.loads(result.stdout)["results"] for m in r["metrics"]}
    assert {"rgb->rgb_hi/psnr", "rgb->rgb_hi/enlarged_psnr", "rgb->rgb_hi/shrunk_psnr", "caption->rgb_hi/colour_acc",
            "rgb_hi/judge_shape_acc"} <= set(found)
    assert found["rgb->rgb_hi/enlarged_psnr"] > found["rgb->rgb_hi/enlarged_codes_psnr"] > 3 and found["rgb->rgb_hi/psnr"] > 3
    assert found["rgb->rgb_hi/enlarged_psnr"] > found["rgb->rgb_hi/psnr"]
