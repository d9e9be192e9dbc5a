"""The doctor (`nano4m tokenize --check`): whole data sets pass, and each thing that is wrong is found, all at once."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_cli import run
from workspace_factory import copied, set_up, write_tokens

from nano4m_cli.data._atomic import write_json
from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.labels.edges import canny
from nano4m_cli.data.shards import Shard, npy, shard_paths, write_shard
from nano4m_cli.data.sources.scenes import Source, raw_scene
from nano4m_cli.data.workspace import DatasetFolder, Workspace
from nano4m_cli.registry import MODALITIES
from nano4m_cli.spec import TokenSpec
from nano4m_cli.train.alignment import align, edges, overlay, verdict
from nano4m_cli.train.doctor import examine
from nano4m_cli.train.tokenizing import tokenize


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes of 32 x 32 pixels; rgb by brightness levels, captions."""
    workspace = Workspace(tmp_path_factory.mktemp("doctor"))
    options = ["train=48", "val=26", "test=6", "test_novel=0", "judge=0", "size=32", "shard_size=20"]
    dataset = fetch(open_source("scenes", options, workspace), workspace, 1).dataset
    tokenize(dataset, "rgb", ["name=identity", "levels=16"], workers=1)
    tokenize(dataset, "caption", workers=1)
    return workspace


@pytest.fixture
def own(made, tmp_path):
    return copied(made, tmp_path / "own").dataset()


def rewrite(path, change):
    """Write a shard anew, each sample as `change(i, key, members)` gives it (None: left out)."""
    old = Shard(path)
    rows = [change(i, k, {m: bytes(old.read(i, m)) for m in old.index.offset}) for i, k in enumerate(old.keys)]
    write_shard(path, iter([r for r in rows if r]))


def repaint(dataset, split, modality, change):
    """Change the raw pictures of a modality of a split: change(i, raw)."""
    kind = MODALITIES.get(modality)
    for path in shard_paths(dataset.raw(split)):
        rewrite(path, lambda i, k, m: (k, {**m, kind.ext: kind.to_bytes(change(i, kind.from_bytes(m[kind.ext], "")))}))


def found(dataset, *checks, modalities=("rgb", "caption")):
    return [f for f in examine(dataset, modalities).findings if f.check in checks]


def test_a_whole_data_set_passes_and_gets_a_sheet(made):
    result = run("tokenize", "--check", "--root", made.root, "--json")
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert doc["samples"] == {s: {"caption": n, "rgb": n} for s, n in (("train", 48), ("val", 26), ("test", 6))}
    assert doc["fresh"] == {"rgb": 1.0, "caption": 1.0}
    assert [f for f in doc["findings"] if f["severity"] == "error" or f["check"] not in ("ids", "near", "repeated")] == []
    assert 0 < doc["codes"]["rgb"]["used"][0] <= 1 and list(doc["codes"]) == ["rgb"]
    lies = doc["alignment"]["train"]["rgb raw ~ rgb decoded"]
    assert abs(lies["dx"]) < 0.3 and abs(lies["dy"]) < 0.3
    sheet = np.asarray(Image.open(doc["sheet"]))
    assert sheet.shape[0] > 6 * 128 and sheet.std() > 20
    said = run("tokenize", "--check", "--root", made.root)
    assert "raw and token shards are whole and aligned" in said.stdout and "rgb raw ~ rgb decoded" in said.stdout


def test_everything_that_is_wrong_is_said_at_once(own):
    rgb = own.tokens("rgb", "train")
    rewrite(rgb / "shard-000000.tar", lambda i, k, m: None if i == 3 else (k, m))
    rewrite(own.tokens("caption", "val") / "shard-000001.tar", lambda i, k, m: (f"{k}x" if i == 2 else k, m))
    cut = own.tokens("caption", "train") / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    (own.tokens("caption", "test") / "shard-000000.tar").unlink()
    repaint(own, "test", "rgb", lambda i, raw: raw[:24] if i == 1 else raw)
    result = run("tokenize", "--check", "--root", own.path.parents[1], "--json")
    assert result.exit_code == 1 and "things are wrong" in result.stderr and "hint: " in result.stderr
    errors = [f for f in json.loads(result.stdout)["findings"] if f["severity"] == "error"]
    at = {(f["check"], f["modality"], f["split"], f["shard"]): f for f in errors}
    missing = at["keys", "rgb", "train", "shard-000000.tar"]
    assert missing["n"] == 1 and missing["keys"] == [Shard(own.raw("train") / "shard-000000.tar").keys[3]]
    assert "27 of 48 samples of train have everything" in missing["what"]  # the cut shard held twenty
    foreign = [f for f in errors if (f["check"], f["split"], f["modality"]) == ("keys", "val", "caption")]
    assert {f["what"].split(";")[0] for f in foreign} == {"samples have no tokens", "tokens of samples that are not in raw"}
    assert "cut short" in at["shards", "caption", "train", "shard-000001.tar"]["what"]
    assert ("shards", "caption", "test", "") in at
    assert "raw pictures of 24x32" in at["shape", "rgb", "test", ""]["what"]
    assert all(f["hint"] for f in errors)


def test_samples_in_another_order(own):
    rows = []
    path = own.tokens("rgb", "train") / "shard-000001.tar"
    rewrite(path, lambda i, k, m: rows.append((k, m)))
    write_shard(path, iter([rows[1], rows[0], *rows[2:]]))
    (wrong,) = found(own, "keys")
    assert wrong.n == 2 and wrong.shard == path.name and "another order" in wrong.what


def test_missing_shards_and_specs(own):
    (own.raw("val") / "shard-000000.tar").unlink()
    own.spec_path("caption").write_text("{")
    got = found(own, "shards")
    assert [(f.modality, f.split, f.shard) for f in got] == [("caption", "", ""), ("raw", "val", "shard-000000.tar")]
    assert "not valid JSON" in got[0].what


def test_tokens_of_another_tokenizer(own):
    foreign = own.tokens("rgb", "train") / "shard-000001.tar"
    rewrite(foreign, lambda i, k, m: (k, {"rgb.npy": npy(np.full((1, 1024), i, "<u2") % 16)}))
    (wrong,) = found(own, "fresh")
    assert (wrong.severity, wrong.modality, wrong.split, wrong.shard) == ("error", "rgb", "train", foreign.name)
    shutil.rmtree(own.tokenizer("caption"))
    wrong = found(own, "fresh")
    assert [f.modality for f in wrong] == ["caption", "rgb"] and "no tokenizer at" in wrong[0].what
    spec = json.loads(own.spec_path("rgb").read_text())
    write_json(own.spec_path("rgb"), {**spec, "tokenizer": {**spec["tokenizer"], "weights_sha256": "0" * 64}})
    assert any("spec.json is of another tokenizer" in f.what for f in found(own, "fresh", modalities=["rgb"]))


def test_raw_members_that_cannot_be_read(own):
    path = own.raw("val") / "shard-000000.tar"
    rewrite(path, lambda i, k, m: (k, {**m, "rgb.png": m["rgb.png"][:60]} if i == 0 else m))
    wrong = found(own, "raw")
    assert {(f.severity, f.modality, f.split) for f in wrong} == {("error", "rgb", "val")}
    assert "no readable picture" in wrong[0].what


# -- repeated media -------------------------------------------------------------------------------------------------------


def test_media_that_stand_in_two_splits(own):
    train, test = Shard(own.raw("train") / "shard-000001.tar"), own.raw("test") / "shard-000000.tar"
    squeezed = io.BytesIO()
    Image.open(io.BytesIO(train.read(5, "rgb.png"))).resize((128, 128), Image.Resampling.LANCZOS).save(squeezed, "JPEG", quality=85)
    again = np.asarray(Image.open(squeezed).resize((32, 32), Image.Resampling.LANCZOS))
    swap = {2: bytes(train.read(3, "rgb.png")), 4: MODALITIES.get("rgb").to_bytes(again)}
    rewrite(test, lambda i, k, m: (k, {**m, "rgb.png": swap.get(i, m["rgb.png"])}))
    keys = Shard(test).keys
    got = [f for f in found(own, "repeated", "near") if f.modality == "rgb" and f.split == "test" and "in train" in f.what]
    assert [(f.check, f.n, f.keys) for f in got] == [("repeated", 1, [keys[2]]), ("near", 1, [keys[4]])]
    assert {f.severity for f in got} == {"notice"}
    said = run("tokenize", "--check", "--root", own.path.parents[1], "-m", "caption")
    assert said.exit_code == 0 and "byte for byte" in said.stdout, "a notice is no error"


# -- ids ------------------------------------------------------------------------------------------------------------------


def by_hand(root, spec, ids_of, n=24):
    """A data set of nothing but brought tokens, whose raw shards hold labels alone."""
    dataset = DatasetFolder(root / "data" / "hand")
    write_json(dataset.info_path, {"name": "hand", "source": "tokens", "options": {}, "version": 1, "modalities": [spec.modality],
                                   "brought": [spec.modality], "splits": {"train": n, "val": 4}})
    for split, count in (("train", n), ("val", 4)):
        write_tokens(dataset, split, count, spec, lambda i, split=split: ids_of(split, i))
        for path in shard_paths(dataset.tokens(spec.modality, split)):
            write_shard(dataset.raw(split) / path.name, ((k, {"labels.json": b"{}"}) for k in Shard(path).keys))
    return dataset


def draw(split, i, size, top):
    return np.random.default_rng([i, len(split)]).integers(0, top, size)


CODES = TokenSpec(modality="audio", kind="codes", shape=(40, 3), vocab_size=16)
GRID = TokenSpec(modality="rgb", kind="grid", shape=(4, 4), vocab_size=9)
TEXT = TokenSpec(modality="caption", kind="sequence", shape=(6,), vocab_size=9, eos=0)


def peculiar(split, i):
    """Three codebooks that each have their own habits."""
    low = draw(split, i, (40, 3), 16)
    return np.minimum(low // [1, 2, 5] + [0, 8, 0], 15).reshape(-1)


def test_codebooks_that_are_well(tmp_path):
    dataset = by_hand(tmp_path, CODES, peculiar)
    report = examine(dataset, ["audio"])
    assert report.findings == [] and report.codes["audio"]["used"] == [1.0, 0.5, 0.25]
    perplexity = report.codes["audio"]["perplexity"]
    assert 15 < perplexity[0] <= 16 and 7 < perplexity[1] <= 8 and 3 < perplexity[2] <= 4
    assert report.sheet is None and report.alignment == {}


def changed(column, values):
    def ids_of(split, i):
        ids = peculiar(split, i).reshape(40, 3)
        ids[:, column] = values(ids)
        return ids.reshape(-1)

    return ids_of


@pytest.mark.parametrize(
    "ids_of, severity, said",
    [
        (changed(1, lambda ids: 7), "error", "codebook 1 is stuck: it only ever says 7"),
        (changed(2, lambda ids: ids[:, 0]), "error", "codebooks 0 and 2 say the same everywhere"),
        (lambda s, i: peculiar(s, i).reshape(40, 3).T.reshape(-1), "notice", "codebooks 0 and 1 use their ids alike"),
    ],
)
def test_codebooks_that_are_not(tmp_path, ids_of, severity, said):
    got = [f for f in examine(by_hand(tmp_path, CODES, ids_of), ["audio"]).findings if f.check == "codes"]
    assert got and said in got[0].what and {f.severity for f in got} == {severity}


@pytest.mark.parametrize(
    "spec, bad, check, said",
    [
        (GRID, npy(np.array([[9] + [0] * 15], "<u2")), "range", "ids outside the vocabulary of 9, up to 9"),
        (GRID, npy(np.zeros((1, 15), "<u2")), "shape", "ids of shape (1, 15), (1, 16) expected"),
        (GRID, npy(np.zeros(16, "<u2")), "shape", "ids of shape (16,), (1, 16) expected"),
        (GRID, npy(np.zeros((1, 16), "<i4")), "shape", "ids stored as <i4, <u2 expected"),
        (GRID, npy(np.zeros((1, 16), "<u2"))[:-3], "shape", "a cut npy file"),
        (GRID, b"no ids at all", "shape", "no npy file"),
        (TEXT, npy(np.array([3, 4], "<u2")), "shape", "does not end in its only end mark (0)"),
        (TEXT, npy(np.array([3, 0, 4, 0], "<u2")), "shape", "does not end in its only end mark (0)"),
        (TEXT, npy(np.array([1, 2, 3, 4, 5, 6, 0], "<u2")), "shape", "ids of shape (7,), (1 to 6,) expected"),
    ],
)
def test_ids_of_the_wrong_form(tmp_path, spec, bad, check, said):
    good = (lambda s, i: draw(s, i, 16, 9)) if spec is GRID else (lambda s, i: np.append(draw(s, i, 4, 8) + 1, 0))
    dataset = by_hand(tmp_path, spec, good)
    assert [f for f in examine(dataset, [spec.modality]).findings if f.severity == "error"] == []
    path = dataset.tokens(spec.modality, "train") / "shard-000001.tar"
    rewrite(path, lambda i, k, m: (k, {f"{spec.modality}.npy": bad} if i in (2, 5) else m))
    (wrong,) = [f for f in examine(dataset, [spec.modality]).findings if f.severity == "error"]
    assert (wrong.check, wrong.shard, wrong.n) == (check, path.name, 2) and said in wrong.what
    assert wrong.keys == ["train-00000018", "train-00000021"]


def test_ids_that_repeat_and_say_nothing(tmp_path):
    rows = {3: 1, 7: 1}  # samples 3 and 7 are sample 1 again
    one_id = lambda s, i: np.full(16, 4) if (s, i) == ("train", 9) else draw(s, rows.get(i, i), 16, 9)  # noqa: E731
    dataset = by_hand(tmp_path / "a", GRID, one_id)
    got = {(f.check, f.split, f.what): f.keys for f in examine(dataset, ["rgb"]).findings}
    assert got["ids", "train", "samples have the ids of another sample of this split"] == ["train-00000003", "train-00000007"]
    assert got["ids", "train", "samples have one id in every slot"] == ["train-00000009"]
    across = by_hand(tmp_path / "b", GRID, lambda s, i: draw("x", i if s == "train" else 3 * i, 16, 9))
    (notice,) = examine(across, ["rgb"]).findings
    assert (notice.check, notice.severity, notice.split, notice.n) == ("repeated", "notice", "val", 4)
    nothing = by_hand(tmp_path / "c", GRID, lambda s, i: draw("x", 0, 16, 9))
    assert any(f.severity == "error" and f.what == "all samples have the same ids" for f in examine(nothing, ["rgb"]).findings)


def test_variants_that_do_not_vary(tmp_path):
    two = GRID.model_copy(update={"variants": 2})
    dataset = by_hand(tmp_path, GRID, lambda s, i: draw(s, i, 16, 9))
    for split in ("train", "val"):
        for path in shard_paths(dataset.tokens("rgb", split)):
            double = lambda i, k, m: (k, {"rgb.npy": npy(np.repeat(np.load(io.BytesIO(m["rgb.npy"])), 2, 0))})  # noqa: E731
            rewrite(path, double)
    write_json(dataset.spec_path("rgb"), two.model_dump(mode="json"))
    (notice,) = examine(dataset, ["rgb"]).findings
    assert notice.split == "train" and "all 2 variants of each sample are equal" in notice.what


# -- alignment ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    options = Source.Options(size=48)
    raws = [raw_scene(options, "train", i) for i in range(32)]
    return {m: [getattr(r, m) for r in raws] for m in ("rgb", "depth", "normal")}


def closer(raw, share=0.8):
    n = raw.shape[0]
    at = ((np.arange(n) + 0.5) * share + n * (1 - share) / 2).astype(int)
    return raw[at][:, at]


@pytest.mark.parametrize("modality", ["depth", "normal"])
def test_alignment_in_pixels(scenes, modality):
    rgb, other = scenes["rgb"], scenes[modality]
    plain = align(rgb, other)
    assert plain.pixels < 0.6 and verdict(plain) is None and plain.n == 32
    for right, down in ((3, 0), (-2, 4), (0, -6)):
        moved = align(rgb, [np.roll(x, (down, right), (0, 1)) for x in other])
        assert moved.shift == pytest.approx((right, down), abs=0.6) and moved.sure
        assert verdict(moved)[0] == "error" and "shifted by" in verdict(moved)[1]
    wrong = {"mirrored left to right": (rgb, [x[:, ::-1] for x in other]), "a closer crop": (rgb, [closer(x) for x in other]),
             "a wider crop": ([closer(x) for x in rgb], other)}
    for what, pictures in wrong.items():
        found = verdict(align(*pictures))
        if modality == "normal":
            assert found is not None and found[0] == "error" and what in found[1], found
        elif "crop" not in what:  # half of depth's edges are the floor's, the same in every scene: less is told of it
            assert found is not None and found[0] == "error", what
    assert "of another scene" in verdict(align(rgb, other[5:] + other[:5]))[1]
    assert align(rgb[:3], other[:3]) is None, "three samples tell nothing"
    few = align([r[:32, :32] for r in rgb[:10]], [canny(r[:32, :32]) for r in rgb[:10]])
    assert verdict(few) is None, "edges lie where they were found, however few the samples"
    assert align(rgb, [np.ones((48, 48), np.float32)] * 32) is None, "what is flat has no edges"


def test_correlation_is_that_of_moved_pictures(scenes):
    """Against plain loops over shifts."""
    from nano4m_cli.train.alignment import correlate

    a = np.stack([edges(x)[:24, :20] for x in scenes["rgb"][:2]])
    b = np.stack([edges(x)[:24, :20] for x in scenes["normal"][:2]])
    got = correlate(a, b)
    taper = np.sqrt(np.outer(np.hanning(26)[1:-1], np.hanning(22)[1:-1]))
    for n in range(2):
        x, y = ((p - p.mean()) * taper for p in (a[n], b[n]))
        for down in range(-5, 6):
            for right in range(-5, 6):
                total = sum(
                    x[i, j] * y[i - down, j - right] for i in range(24) for j in range(20)
                    if 0 <= i - down < 24 and 0 <= j - right < 20
                )
                assert got[n, down + 5, right + 5] == pytest.approx(total / np.sqrt((x**2).sum() * (y**2).sum()), abs=1e-6)


def test_unknown_depth_has_no_edges():
    depth = np.full((16, 16), 2.0, np.float32)
    depth[4:8, 4:8] = 0
    assert edges(depth).max() == 0
    depth[:, 12:] = 3.0
    steep = edges(depth)
    assert steep[10, 11] > 0.5 and steep[6, 6] == 0
    painted = overlay(np.zeros((16, 16, 3), np.uint8), depth)
    assert painted.shape == (128, 128, 3) and painted[84, 90, 0] > 150 and painted[84, 20, 0] == 0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda i, raw: np.roll(raw, 4, 1), "normal raw is to rgb raw shifted by 4 px right"),
        (lambda i, raw: raw[:, ::-1].copy(), "mirrored left to right"),
        (lambda i, raw: np.roll(raw, (7 * i, 11 * i), (0, 1)), "of another scene"),
    ],
)
def test_misaligned_modalities_are_an_error(own, change, said):
    repaint(own, "train", "normal", change)
    root = own.path.parents[1]
    shutil.rmtree(own.path / "tokens")
    shutil.rmtree(own.path / "tokenizers")
    result = run("tokenize", "--check", "--root", root, "--json")
    wrong = [f for f in json.loads(result.stdout)["findings"] if f["severity"] == "error"]
    assert result.exit_code == 1 and [(f["check"], f["modality"], f["split"]) for f in wrong] == [("alignment", "normal", "train")]
    assert said in wrong[0]["what"] and (own.path / "tokens" / "check.png").is_file()


def test_tokens_of_another_crop(made, tmp_path):
    """The raw pictures were changed after tokenizing: what the tokens decode to lies elsewhere."""
    dataset = copied(made, tmp_path / "own").dataset()
    repaint(dataset, "val", "rgb", lambda i, raw: np.roll(raw, 5, 1))
    wrong = [f for f in examine(dataset, ["rgb"]).errors if f.check == "alignment"]
    assert [(f.modality, f.split) for f in wrong] == [("rgb", "val")]
    assert "rgb decoded is to rgb raw shifted by 5 px left" in wrong[0].what


def test_the_doctor_takes_any_fitted_tokenizers(made, tmp_path):
    """Untrained ones too: their pictures are mush, their ids are still what encoding gives."""
    dataset = copied(made, tmp_path / "own").dataset()
    options = {"patch": 8, "width": 16, "depth": 1}
    set_up(dataset, "depth", **options)
    tokenize(dataset, "depth", workers=1)
    report = examine(dataset, ["rgb", "depth", "caption"])
    assert report.fresh == {"rgb": 1.0, "depth": 1.0, "caption": 1.0}
    assert "rgb raw ~ depth raw" in report.alignment["train"] and "rgb decoded ~ depth decoded" in report.alignment["train"]
