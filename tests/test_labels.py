"""Pseudo-labels against what is known exactly, and a data set that carries them from folder to generation."""

import math

import numpy as np
import pytest
from PIL import Image
from test_cli import run as shell
from test_folder import everything, run
from workspace_factory import settings

from nano4m_cli.data.labels.edges import canny
from nano4m_cli.data.labels.normal import normals
from nano4m_cli.data.sources.scenes import Source, camera, raw_scene
from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.probes._roundtrip import fidelity
from nano4m_cli.tokenizers.fsq_image import Tokenizer as FSQImage


@pytest.mark.parametrize("index", range(4))
def test_normals_of_exact_depth_are_the_exact_normals(index):
    """On the ground and the flat sides of things, everywhere but at outlines; the sky is a plane of its own here."""
    o = Source.Options(size=64)
    scene = raw_scene(o, "train", index)
    field = 2 * math.atan(1 / camera(o.max_objects).focal)
    off = np.degrees(np.arccos(np.clip((normals(scene.depth, field) * scene.normal).sum(-1), -1, 1)))
    near = scene.depth < 0.99 * scene.depth.max()
    assert np.median(off[near]) < 1 and (off[near] < 8).mean() > 0.85
    thing = near & (np.abs(scene.normal - np.median(scene.normal[-4:], axis=(0, 1))).max(-1) > 0.1)
    assert thing.mean() > 0.05 and np.median(off[thing]) < 6


def test_normals_of_a_tilted_plane_and_of_unknown_depth():
    slope = 0.5  # half a metre nearer for each metre to the right: the plane z = x / 2 - 4
    field = math.radians(60)
    scale = 2 * math.tan(field / 2) / 32
    x = (np.arange(32) + 0.5 - 16)[None, :] * scale * np.ones((32, 1))
    depth = 4 / (1 + slope * x)
    wanted = np.array([-slope, 0, 1]) / math.hypot(slope, 1)
    assert np.allclose(normals(depth, field), wanted, atol=1e-5)
    depth[10:14, 10:14] = 0
    made = normals(depth, field)
    assert np.allclose(made[11:13, 11:13], (0, 0, 1)) and np.isfinite(made).all()
    known = np.ones((32, 32), bool)
    known[10:14, 10:14] = False
    assert np.allclose(made[known], wanted, atol=1e-5), "what borders on the unknown uses its other side"


def test_edges_run_where_brightness_steps():
    picture = np.full((40, 40, 3), 40, np.uint8)
    picture[:, 20:] = 200
    edge = canny(picture)
    assert edge.dtype == np.uint8 and set(np.unique(edge)) == {0, 255}
    columns = np.flatnonzero(edge[5:-5].all(0))
    assert len(columns) == 1 and columns[0] in (19, 20) and edge[:, :15].max() == edge[:, 25:].max() == 0
    assert np.array_equal(canny(picture.transpose(1, 0, 2)).T, edge)
    assert canny(np.full((20, 20, 3), 77, np.uint8)).max() == 0
    y, x = np.mgrid[:64, :64]
    disc = np.where(((x - 32) ** 2 + (y - 32) ** 2 < 400)[..., None], 220, 30) * np.ones(3)
    ring = canny(disc.astype(np.uint8)) > 0
    radius = np.hypot(x - 32, y - 32)[ring]
    assert 100 < ring.sum() < 160 and abs(radius.mean() - 20) < 0.6 and radius.std() < 0.8, "one thin closed line"


def test_weak_edges_count_where_they_touch_strong_ones():
    ramp = np.linspace(0, 160, 60)[:, None] * np.ones((1, 40))  # the step along the middle grows from nothing
    picture = np.full((60, 40), 50.0)
    picture[:, 20:] += ramp[:, 20:]
    edge = canny(np.repeat(picture[..., None], 3, 2).astype(np.uint8))
    rows = np.flatnonzero(edge[:, 18:22].any(1))
    assert rows.min() < 25 and rows.max() >= 57 and len(rows) == rows.max() - rows.min() + 1


def test_forms_of_pictures_are_told_by_the_values():
    tokenizer = FSQImage("anything", FSQImage.Options(width=16, depth=1), {"size": [16, 16]})
    grey = [np.full((16, 16), 10 * i, np.uint8) for i in range(8)]
    tokenizer.fit(grey)
    assert tokenizer.form == "grey" and tokenizer.spec().preprocess["scale"] == "x / 255"
    with pytest.raises(MediaError, match="is a picture of colour, this tokenizer takes grey"):
        tokenizer.encode([np.zeros((16, 16, 3), np.uint8)])
    back = tokenizer.decode(tokenizer.encode(grey))
    assert back[0].shape == (16, 16) and back[0].dtype == np.uint8
    assert set(fidelity_of(tokenizer, grey)) == {"psnr", "ssim"}
    with pytest.raises(ConfigError, match="fsq_image serves pictures"):
        FSQImage("caption", FSQImage.Options(), {})


def fidelity_of(tokenizer, raws):
    tokenizer.modality = "edges"
    return fidelity(tokenizer, raws, tokenizer.encode(raws))


def test_a_derived_modality_goes_all_the_way(tmp_path):
    """From pictures with depth to normals and edges, through every command: nothing else knows these modalities by name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(12):
        scene = raw_scene(Source.Options(size=32), "train", i)
        Image.fromarray(scene.rgb).save(folder / f"{i}.png")
        Image.fromarray((scene.depth * 1000).astype(np.uint16)).save(folder / f"{i}.depth.png")
    info, failures, samples = run(tmp_path, f"path={folder}", "size=16", "derive=[normal,edges]", "val=0.2", "test=0.2")
    assert info.modalities == ["rgb", "depth", "normal", "edges"] and not failures
    assert "edges and normal were computed from other modalities, not measured" in info.notes
    for _, raw in everything(samples):
        assert np.array_equal(raw["edges"], canny(raw["rgb"])) and raw["edges"].max() == 255
        assert np.abs(raw["normal"] - normals(raw["depth"])).max() < 0.02
    small = [f"{m}.{o}" for m in info.modalities for o in ("width=16", "depth=1", "fit_steps=4")]
    config = tmp_path / "tiny.yaml"
    config.write_text("{}")
    chosen = [s for s in settings(name="tiny", train__steps=2) if not s.startswith("data.")]
    for command in (
        ["tokenize", *small, "--workers", 1], ["train", config, *chosen, "--device", "cpu"],
        ["generate", "--run", "tiny", "--from", f"rgb={folder / '0.png'}", "--to", "edges,normal", "--scheme", "mean"],
        ["eval", "--run", "tiny", "--probe", "loss", "--probe", "retrieval"],
    ):
        done = shell(*command, "--root", tmp_path)
        assert done.exit_code == 0, done.output
    assert np.asarray(Image.open(tmp_path / "generated" / "tiny" / "edges.png")).shape == (16, 16)
