"""Filters and pseudo-labels with weights: what they say, against transformers used as its documentation does, and in a fetch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sight_factory import SMALL, blip_small, clip_small, depth_small, dsine_of_size, dsine_small
from test_cli import fails
from test_cli import run as shell
from test_folder import everything, run

from nano4m_cli.data.filters.clip import Filter as Clip
from nano4m_cli.data.labels import _dsine
from nano4m_cli.data.labels.caption import Label as Caption
from nano4m_cli.data.labels.depth import Label as Depth
from nano4m_cli.data.labels.dsine import Label as Dsine
from nano4m_cli.data.labels.normal import normals
from nano4m_cli.data.sources import folder as folder_source
from nano4m_cli.data.sources._folder_clips import labels_for, square
from nano4m_cli.errors import ConfigError, WeightsError
from nano4m_cli.media_compat import ensure_torchaudio

ensure_torchaudio()  # before anything of transformers is imported


def picture(seed: int, h: int = 48, w: int = 48) -> np.ndarray:
    """Patches of colour over a gradient: uint8 (h, w, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    coarse = rng.integers(0, 160, (-(-h // 12), -(-w // 12), 3)).repeat(12, 0).repeat(12, 1)[:h, :w]
    return (coarse + (60 * x / w + 30 * y / h)[..., None]).astype(np.uint8)


PICTURES = [picture(0), picture(1, 40, 60), picture(2, 64, 64)]


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_depth_is_what_transformers_says(kind):
    from transformers import AutoModelForDepthEstimation, DPTImageProcessorPil

    processor, model = (c.from_pretrained(depth_small(kind)) for c in (DPTImageProcessorPil, AutoModelForDepthEstimation))
    label = Depth(Depth.Options(weights=depth_small(kind)))
    for rgb in PICTURES:
        image = Image.fromarray(rgb)
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        post = processor.post_process_depth_estimation(outputs, target_sizes=[(image.height, image.width)])
        said, made = post[0]["predicted_depth"].numpy(), label.make({"rgb": rgb})
        assert made.dtype == np.float32 and made.shape == rgb.shape[:2] and said.std() > 0.1
        if kind == "metric":
            assert np.abs(made - said).max() < 1e-3 and made.min() > 0 and made.max() <= 20
            continue
        assert made.min() == pytest.approx(1) and made.max() == pytest.approx(10)
        wanted = 0.1 + 0.9 * (said - said.min()) / (said.max() - said.min())
        assert np.abs(1 / made - wanted).max() < 1e-4, "inverse depth, but for scale and shift"
    assert ("relative, not metric" if kind == "relative" else "estimated metres") in label.note()


def test_a_picture_without_depth_is_far_everywhere():
    from nano4m_cli.data.labels.depth import from_relative

    assert np.allclose(from_relative(np.full((4, 4), 3.0, np.float32)), 10)


def test_captions_are_what_transformers_says():
    from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    model, processor = (c.from_pretrained(blip_small()) for c in (BlipForConditionalGeneration, BlipImageProcessorPil))
    words = BertTokenizer(tokenizer_file=f"{blip_small()}/tokenizer.json")
    label = Caption(Caption.Options(weights=blip_small(), tokens=8))
    said = []
    for rgb in PICTURES:
        out = model.generate(**processor(images=Image.fromarray(rgb), return_tensors="pt"), max_new_tokens=8)
        said.append(words.decode(out[0], skip_special_tokens=True))
    made = [label.make({"rgb": rgb}) for rgb in PICTURES]
    assert [m.split() for m in made] == [s.split() for s in said] and len(set(made)) > 1 and all(made)


LONG = "a red cat, a red cat. " * 9


def test_similarity_is_what_transformers_says():
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, processor, words = (c.from_pretrained(clip_small()) for c in (CLIPModel, CLIPImageProcessorPil, CLIPTokenizer))
    clip = Clip(Clip.Options(weights=clip_small()))
    for caption in ("A red cat", "a dog on the left.", LONG):
        text = words([caption], truncation=True, max_length=24, return_tensors="pt")
        pixels = processor(images=[Image.fromarray(p) for p in PICTURES], return_tensors="pt")
        with torch.no_grad():
            logits = model(**text, **pixels).logits_per_image / model.logit_scale.exp()
        made = clip.similarity(PICTURES, caption)
        assert made == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
        assert np.ptp(made) > 0.01 and clip.score(PICTURES, caption) == pytest.approx(np.mean(made))
    assert clip.score(PICTURES, "a red cat") != pytest.approx(clip.score(PICTURES, "a dog"), abs=1e-3)


# -- DSINE, against the same thing said plainly -----------------------------------------------------------------------


def small_dsine():
    net = _dsine.DSINE(*SMALL)
    net.load_state_dict(torch.load(dsine_small() + "/dsine.pt", weights_only=True)["model"])
    return net.eval()


def test_the_encoder_is_efficientnet():
    """As transformers has it, which pads by other code; and B5 is of the published size."""
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(width_coefficient=SMALL[0], depth_coefficient=SMALL[1], hidden_dim=round(1280 * SMALL[0]))
    other, net = EfficientNetModel(config).eval(), small_dsine().encoder.original_model
    names = {"conv_dw": "depthwise_conv.depthwise_conv", "se.conv_reduce": "squeeze_excite.reduce",
             "se.conv_expand": "squeeze_excite.expand"}
    state, mine = {}, net.state_dict()

    def take(theirs: str, ours: str):
        state.update({f"{theirs}.{k[len(ours) + 1 :]}": v for k, v in mine.items() if k.startswith(ours + ".")})

    take("embeddings.convolution", "conv_stem"), take("embeddings.batchnorm", "bn1")
    take("encoder.top_conv", "conv_head"), take("encoder.top_bn", "bn2")
    blocks = [(f"blocks.{s}.{i}", b) for s, stage in enumerate(net.blocks) for i, b in enumerate(stage)]
    for n, (ours, block) in enumerate(blocks):
        place, parts = f"encoder.blocks.{n}", [c for c, _, _ in block.order]
        for theirs, (conv, bn) in {
            **({"expansion": ("conv_pw", "bn1")} if len(parts) == 3 else {}),
            "projection": (parts[-1], block.order[-1][1]),
        }.items():
            stem = "expand" if theirs == "expansion" else "project"
            take(f"{place}.{theirs}.{stem}_conv", f"{ours}.{conv}"), take(f"{place}.{theirs}.{stem}_bn", f"{ours}.{bn}")
        take(f"{place}.depthwise_conv.depthwise_norm", f"{ours}.{block.order[-2][1]}")
        for mine_, theirs in names.items():
            take(f"{place}.{theirs}", f"{ours}.{mine_}")
    other.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    heads = []
    other.encoder.top_conv.register_forward_hook(lambda m, i, o: heads.append(o))
    with torch.no_grad():
        hidden = other(x, output_hidden_states=True).hidden_states
        ends = np.cumsum([len(stage) for stage in net.blocks])
        for a, b in zip(net(x), [hidden[ends[2]], hidden[ends[4]], heads[0]], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            assert float(a.std()) > 0.01
    with torch.device("meta"):
        b5 = EfficientNetModel(EfficientNetConfig(width_coefficient=1.6, depth_coefficient=2.2, hidden_dim=2048))
        full = _dsine.DSINE()
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(full.encoder) == count(b5) and len(full.state_dict()) == 918


def plain_dsine(state: dict, x: torch.Tensor, seen: list, focal: float, cx: float, cy: float) -> np.ndarray:
    """Return normals (H, W, 3): the decoder and the refinement pixel by pixel, from the tensors of the checkpoint by name."""
    conv = lambda v, n, pad=0: F.conv2d(v, state[f"{n}.weight"], state[f"{n}.bias"], padding=pad)  # noqa: E731
    head = lambda v, n: conv(F.relu(conv(F.relu(conv(v, f"{n}.0", 1)), f"{n}.2")), f"{n}.4")  # noqa: E731

    def standard(v, n):
        w = state[f"{n}.weight"]
        w = torch.stack([(o - o.mean()) / ((o - o.mean()).std() + 1e-5) for o in w])
        return F.conv2d(v, w, state[f"{n}.bias"], padding=1)

    def up(v, beside, n):
        v = torch.cat([F.interpolate(v, beside.shape[-2:], mode="bilinear"), beside], 1)
        for i in (0, 3):
            v = F.leaky_relu(F.group_norm(standard(v, f"{n}.{i}"), 8, state[f"{n}.{i + 1}.weight"], state[f"{n}.{i + 1}.bias"]))
        return v

    def uv(down):
        h, w = x.shape[-2] // down, x.shape[-1] // down
        f = focal / down
        right, down_ = ([(i + 0.5 - c / down) / f for i in range(n)] for n, c in ((w, cx), (h, cy)))
        return torch.tensor([[right] * h, [[y] * w for y in down_]])[None]

    uv8 = uv(8)
    d = conv(torch.cat([seen[2], uv(32)], 1), "decoder.conv2")
    d = up(up(d, torch.cat([seen[1], uv(16)], 1), "decoder.up1._net"), torch.cat([seen[0], uv8], 1), "decoder.up2._net")
    d = torch.cat([d, uv8], 1)
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    h, w = uv8.shape[-2:]
    ray = [[unit(np.array([*uv8[0, :, r, c].double().numpy(), 1.0])) for c in range(w)] for r in range(h)]

    def turn_back(n, r):
        cosine = float(n @ r)
        return unit(n + r * (max(cosine, 0.01) - cosine))

    start = head(d, "decoder.normal_head")[0].double().numpy()
    normal = np.array([[turn_back(unit(start[:, r, c]), ray[r][c]) for c in range(w)] for r in range(h)])
    feature, hidden = head(d, "decoder.feature_head"), head(d, "decoder.hidden_head")
    for _ in range(5):
        both = torch.cat([hidden, feature, uv8], 1)
        z, q = torch.sigmoid(conv(both, "gru.convz", 2)), torch.sigmoid(conv(both, "gru.convr", 2))
        new = torch.tanh(conv(torch.cat([q * hidden, feature, uv8], 1), "gru.convq", 2))
        hidden = (1 - z) * hidden + z * new
        context = torch.cat([hidden, uv8], 1)
        share, angle = (torch.sigmoid(head(context, n))[0].numpy() for n in ("prob_head", "angle_head"))
        xy = head(context, "xy_head")[0].numpy().astype(np.float64)
        before, f = normal.copy(), focal / 8
        for r in range(h):
            for c in range(w):
                total = np.zeros(3)
                for k in range(25):
                    rr, cc = min(max(r + k // 5 - 2, 0), h - 1), min(max(c + k % 5 - 2, 0), w - 1)
                    n = before[rr, cc]
                    dx, dy = unit(np.array([xy[k, r, c], xy[25 + k, r, c]]))
                    u, v = (cc + 0.5 + dx - cx / 8) / f, (rr + 0.5 + dy - cy / 8) / f
                    dz = -(dx / f * n[0] + dy / f * n[1]) / (u * n[0] + v * n[1] + n[2])
                    axis = unit(np.array([dx / f + dz * u, dy / f + dz * v, dz]))
                    assert abs(axis @ n) < 1e-6, "the axis lies in the neighbour's plane"
                    (a, b, e), by = axis, math.pi * angle[k, r, c]
                    cross = np.array([[0, -e, b], [e, 0, -a], [-b, a, 0]])
                    turned = (np.eye(3) + math.sin(by) * cross + (1 - math.cos(by)) * cross @ cross) @ n
                    total += share[k, r, c] * turn_back(unit(turned), ray[r][c])
                normal[r, c] = unit(total)
    mask = head(context, "up_prob_head")[0].reshape(9, 8, 8, h, w).softmax(0).double().numpy()
    out = np.zeros((8 * h, 8 * w, 3))
    for y in range(8 * h):
        for s in range(8 * w):
            r, c = y // 8, s // 8
            total = sum(mask[k, y % 8, s % 8, r, c] * normal[min(max(r + k // 3 - 1, 0), h - 1), min(max(c + k % 3 - 1, 0), w - 1)]
                        for k in range(9))
            out[y, s] = unit(total)
    return out


def test_dsine_is_what_it_says_plainly(monkeypatch):
    """Of a picture that needs no padding, and of one that does; and in the axes of the modality."""
    dsine_of_size(monkeypatch)
    label, net = Dsine(Dsine.Options(weights=dsine_small(), side=32)), small_dsine()
    for rgb in (picture(4, 32, 64), picture(5, 45, 40)):
        h, w = rgb.shape[:2]
        tall, wide = -(-h // 32) * 32, -(-w // 32) * 32
        top, left = (tall - h) // 2, (wide - w) // 2
        x = torch.zeros(1, 3, tall, wide)
        x[:, :, top : top + h, left : left + w] = torch.from_numpy(rgb).permute(2, 0, 1) / 255
        x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        focal = max(h, w) / 2 / math.tan(math.radians(30))
        with torch.no_grad():
            seen = net.encoder.original_model(x)
            said = plain_dsine(net.state_dict(), x, seen, focal, left + w / 2, top + h / 2)[top : top + h, left : left + w]
        made = label.make({"rgb": rgb})
        assert made.dtype == np.float32 and np.allclose(np.linalg.norm(made, axis=-1), 1, atol=1e-5)
        assert made.std((0, 1)).min() > 0.02
        assert np.abs(made - said * (-1, 1, 1)).max() < 1e-3


def test_dsine_enlarges_small_pictures_and_gives_their_size_back(monkeypatch):
    dsine_of_size(monkeypatch)
    small, large = (Dsine(Dsine.Options(weights=dsine_small(), side=s)) for s in (64, 32))
    rgb = picture(6, 32, 32)
    twice = large.make({"rgb": np.asarray(Image.fromarray(rgb).resize((64, 64), Image.Resampling.BICUBIC))})
    assert np.array_equal(small.make({"rgb": rgb}), twice[1::2, 1::2])


# -- in a fetch -------------------------------------------------------------------------------------------------------

class Here:
    """A pool of processes that is this process: each new one would import transformers."""

    def __init__(self, *args): ...

    def __enter__(self):
        return self

    def __exit__(self, *err): ...

    def map(self, function, *lists, chunksize=1):
        return map(function, *lists)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(folder_source, "ProcessPoolExecutor", Here)


ASPECTS = [(60, 200), (200, 60), (97, 101), (48, 48), (131, 77), (64, 150)]


@pytest.fixture
def folder(tmp_path):
    """Pictures of odd shapes; two have captions of their own, one its own depth."""
    place = tmp_path / "mine"
    place.mkdir()
    for i, (h, w) in enumerate(ASPECTS * 2):
        Image.fromarray(picture(10 + i, h, w)).save(place / f"{i:02d}.png")
    (place / "00.txt").write_text("a red cat")
    (place / "01.txt").write_text("a dog on the left")
    Image.fromarray(np.full((30, 90), 2500, np.uint16)).save(place / "02.depth.png")
    return place


def weights(*names: str) -> list[str]:
    made = {"depth": depth_small, "caption": blip_small, "clip": clip_small, "dsine": dsine_small}
    return [f"{n}.weights={made[n]()}" for n in names]


def test_labels_are_of_exactly_the_pixels_that_rgb_keeps(folder, here, tmp_path):
    info, failures, samples = run(tmp_path, f"path={folder}", "size=48", "val=0.2", "test=0.2",
                                  "derive=[depth,normal,edges,caption]", *weights("depth", "caption"), "caption.tokens=6")
    assert not failures and info.modalities == ["rgb", "depth", "normal", "caption", "edges"] and sum(info.splits.values()) == 12
    depth = Depth(Depth.Options(weights=depth_small()))
    caption = Caption(Caption.Options(weights=blip_small(), tokens=6))
    for labels, raw in everything(samples):
        whole = picture(10 + int(labels["item"]), *ASPECTS[int(labels["item"]) % 6])
        assert np.array_equal(raw["rgb"], square(whole, 48))
        wanted = np.full((48, 48), 2.5) if labels["item"] == "02" else depth.make(raw)
        assert np.abs(raw["depth"] - wanted).max() <= 5.1e-4
        assert np.abs(raw["normal"] - normals(wanted.astype(np.float32))).max() < 0.02, "chained: from the depth that was made"
        own = {"00": "a red cat", "01": "a dog on the left"}
        assert raw["caption"] == own.get(labels["item"], caption.make(raw))
    hashes = info.options["weights_sha256"]
    assert hashes == {"caption": caption.hashes(), "depth": depth.hashes()} and len(hashes["depth"]["model.safetensors"]) == 64
    assert depth_small() not in json.dumps(info.model_dump(mode="json")), "not where weights lie, but which"
    for said in ("depth is relative, not metric", "caption were computed from other modalities, not measured for 10 of the items",
                 "depth were computed from other modalities, not measured for 11 of the items"):
        assert said in info.notes, info.notes


def test_a_mark_in_the_picture_is_at_the_same_place_in_its_labels(here, tmp_path):
    """Pictures of odd shapes have a mark in a quarter of their middle square; what changes in the labels by it is there too.

    This Depth Anything sees little more than its own patch, so that a mark cannot be felt far away.
    """
    place, marks = tmp_path / "marked", {}
    place.mkdir()
    for i, (h, w, down, right) in enumerate([(40, 160, 0, 0), (150, 50, 0, 1), (83, 121, 1, 0), (90, 333, 1, 1), (301, 64, 1, 1)]):
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        plain = np.full((h, w, 3), 90, np.uint8)
        marked = plain.copy()
        y, x = (round((c * 0.5 + 0.15) * side) for c in (down, right))
        marked[top + y : top + y + side // 5, left + x : left + x + side // 5] = (255, 230, 10)
        marks[i] = np.array([y + side // 5 / 2, x + side // 5 / 2]) / side
        Image.fromarray(plain).save(place / f"{i}p.png")
        Image.fromarray(marked).save(place / f"{i}m.png")
    local = depth_small("metric", local=True)
    _, _, samples = run(tmp_path, f"path={place}", "size=112", "val=0", "test=0", "derive=[depth,edges]", f"depth.weights={local}")
    found = {labels["item"]: raw for labels, raw in everything(samples)}
    for i, mark in marks.items():
        for modality, near in (("rgb", 2), ("edges", 2), ("depth", 8)):
            a, b = (found[f"{i}{kind}"][modality].astype(np.float64).reshape(112, 112, -1) for kind in "pm")
            change = np.abs(a - b).sum(-1)
            centre = (np.indices((112, 112)) * change).sum((1, 2)) / change.sum()
            assert np.abs(centre - mark * 112).max() < near, (i, modality, centre, mark * 112)


def test_what_is_made_does_not_depend_on_threads_or_shards(folder, tmp_path, here):
    asked = [f"path={folder}", "size=32", "derive=[depth,caption]", *weights("depth", "caption", "clip"), "filter=[clip]",
             "thresholds.clip=-1", "val=0", "test=0"]
    _, _, parts = run(tmp_path / "parts", *asked, "shard_size=5")
    torch.set_num_threads(2)
    _, _, whole = run(tmp_path / "whole", *asked)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert list(parts["train"]) == list(whole["train"])
    for key, (labels, raw) in whole["train"].items():
        other, same = parts["train"][key]
        assert labels == other and all(np.array_equal(raw[m], same[m]) for m in raw)


@pytest.mark.slow  # each process imports transformers
def test_shards_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    asked = [f"path={folder}", "size=32", "derive=[depth,caption]", *weights("depth", "caption", "clip"), "filter=[clip]",
             "thresholds.clip=-1", "val=0", "test=0", "shard_size=4"]
    made = []
    for n in (1, 2):
        done = shell("fetch", "folder", *asked, "--workers", n, "--root", tmp_path / str(n))
        assert done.exit_code == 0, done.output
        made.append([p.read_bytes() for p in sorted((tmp_path / str(n)).glob("data/mine/raw/train/*.tar"))])
    assert len(made[0]) == 3 and made[0] == made[1]


def test_clips_that_do_not_fit_their_caption_are_left_out_with_their_scores(folder, here, tmp_path):
    for i in range(2, 12):
        (folder / f"{i:02d}.txt").write_text(["a blue cube, big", "two dogs", "a cat"][i % 3])
    (folder / "05.txt").unlink()
    clip = Clip(Clip.Options(weights=clip_small()))
    scores = {}
    for i in range(12):
        if i != 5:
            whole = picture(10 + i, *ASPECTS[i % 6])
            scores[f"{i:02d}"] = clip.score([square(whole, 224)], (folder / f"{i:02d}.txt").read_text())
    limit = sorted(scores.values())[4]
    asked = [f"path={folder}", "size=16", "filter=[clip]", *weights("clip"), "val=0", "test=0", "modalities=[rgb]"]
    info, failures, samples = run(tmp_path, *asked, f"thresholds.clip={limit - 1e-4}")
    kept = {labels["item"]: labels["scores"] for labels, _ in everything(samples)}
    assert set(kept) == {"05"} | {n for n, s in scores.items() if s >= limit} and kept["05"] == {} and len(kept) == 8
    left = json.loads((tmp_path / "data" / "mine" / "raw" / "left_out.json").read_text())
    assert {one["file"][-6:-4] for one in left} == set(scores) - set(kept) and all(one["by"] == ["clip"] for one in left)
    for one in [*({"file": f"{n}.png", "scores": s} for n, s in kept.items() if s), *left]:
        assert one["scores"]["clip"] == pytest.approx(scores[one["file"][-6:-4]], abs=1e-6)
    assert list(info.options["weights_sha256"]) == ["clip"]
    for text in folder.glob("*.txt"):
        text.unlink()
    info, _, samples = run(tmp_path, *asked, "thresholds.clip=0.99", "name=silent")
    assert len(everything(samples)) == 12, "without captions there is nothing to fit"


def test_normals_by_dsine_go_into_the_data_set(folder, here, tmp_path, monkeypatch):
    dsine_of_size(monkeypatch)  # in this process only: one worker
    info, _, samples = run(tmp_path, f"path={folder}", "size=32", "derive=[dsine]", *weights("dsine"), "dsine.side=64")
    assert info.modalities == ["rgb", "normal"] and "normal were computed" in info.notes
    assert list(info.options["weights_sha256"]["dsine"]) == ["dsine.pt"] and info.options["settings"] == {"dsine": {"side": 64}}
    label = Dsine(Dsine.Options(weights=dsine_small(), side=64))
    for _, raw in everything(samples):
        assert np.abs(raw["normal"] - label.make(raw)).max() < 0.02


def test_a_template_captions_what_has_labels_and_a_model_the_rest(folder, tmp_path, here):
    (folder / "03.json").write_text('{"class": "Dog"}')
    info, _, samples = run(tmp_path, f"path={folder}", "size=32", "derive=[caption]", "caption=a picture of a {class}",
                           f"settings.caption.weights={blip_small()}", "settings.caption.tokens=4")
    said = {labels["item"]: raw["caption"] for labels, raw in everything(samples)}
    assert said["00"] == "a red cat" and said["03"] == "a picture of a dog" and all(said.values()) and len(said) == 12
    assert "for 9 of the items" in info.notes


def test_labels_find_what_they_need_in_any_order():
    assert labels_for({"rgb"}, ["normal", "edges", "depth"]) == ["edges", "depth", "normal"]
    assert labels_for({"rgb", "depth", "caption"}, ["caption", "depth", "dsine"]) == ["dsine"]
    assert labels_for({"audio"}, ["caption", "depth", "normal"]) == []


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_missing_weights_are_told_of_before_anything_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, option, files in (
        ("depth", "derive", "config.json and preprocessor_config.json and model.safetensors"), ("dsine", "derive", "dsine.pt"),
        ("clip", "filter", "tokenizer.json and model.safetensors"), ("caption", "derive", "tokenizer.json and model.safetensors"),
    ):
        done = shell("fetch", "folder", f"path={folder}", f"{option}=[{name}]", "--root", tmp_path)
        fails(done, 1, f"no weights of '{name}'", files, f"give {name}.weights=DIR")
        (tmp_path / "none").mkdir(exist_ok=True)
        done = shell("fetch", "folder", f"path={folder}", f"{option}=[{name}]", f"{name}.weights={tmp_path}/none",
                     "--root", tmp_path)
        fails(done, 1, f"no weights of '{name}'", "holds no", f"give {name}.weights=DIR")
    assert not list((tmp_path / "data").glob("*/raw/*"))


def damaged(source: str, place, name: str, text: str | None = None, change=None) -> str:
    """Return a copy of a folder of weights with one file replaced, or its tensors changed."""
    from safetensors.torch import load_file, save_file

    place.mkdir()
    for file in Path(source).iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    if change:
        state = load_file(place / name)
        save_file(change(state) or state, place / name, {"format": "pt"})
    else:
        (place / name).write_text(text)
    return str(place)


def nan(state):
    return {k: torch.full_like(v, math.nan) if k.endswith("bias") else v for k, v in state.items()}


def fewer(state):
    return {k: v for k, v in state.items() if "conv1" not in k and "cls" not in k and "visual_projection" not in k}


RAW = {"rgb": PICTURES[0]}
USE = {
    "depth": lambda w: Depth(Depth.Options(weights=w)).make(RAW),
    "caption": lambda w: Caption(Caption.Options(weights=w)).make(RAW),
    "clip": lambda w: Clip(Clip.Options(weights=w)).score([PICTURES[0]], "a cat"),
}
SOURCE = {"depth": depth_small, "caption": blip_small, "clip": clip_small}


@pytest.mark.parametrize("name", USE)
def test_weights_that_cannot_be_used_are_named(name, tmp_path):
    source, said = SOURCE[name](), f"the weights of '{name}', "
    for number, (file, how, why) in enumerate([
        ("config.json", {"text": '{"model_type": "vit"}'}, "type 'vit', '.*' is needed"),
        ("config.json", {"text": "{"}, "is damaged"),
        ("model.safetensors", {"text": "no tensors"}, ""), ("model.safetensors", {"change": fewer}, "tensors are missing, e.g. "),
        ("preprocessor_config.json", {"text": "{"}, "preprocessor_config.json"),
        ("tokenizer.json", {"text": "{}"}, "tokenizer.json"),
        *([("model.safetensors", {"change": nan}, "no number")] if name != "caption" else []),
    ]):
        if file == "tokenizer.json" and name == "depth":
            continue
        with pytest.raises(WeightsError, match=f"{said}.*{why}"):
            USE[name](damaged(source, tmp_path / str(number), file, **how))


def test_another_dsine_is_no_dsine(tmp_path, monkeypatch):
    use = lambda w: Dsine(Dsine.Options(weights=str(w), side=32)).make(RAW)  # noqa: E731
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "dsine.pt").write_bytes((Path(dsine_small()) / "dsine.pt").read_bytes())
    with pytest.raises(WeightsError, match="the weights of 'dsine'.*(size mismatch|Missing|Unexpected)"):
        use(tmp_path / "small")  # B5 is needed
    dsine_of_size(monkeypatch)
    for number, content in enumerate([{"model": {"x": torch.zeros(1)}}, [1], {"state": 1}]):
        (tmp_path / str(number)).mkdir()
        torch.save(content, tmp_path / str(number) / "dsine.pt")
        with pytest.raises(WeightsError, match="the weights of 'dsine'"):
            use(tmp_path / str(number))
    state = torch.load(dsine_small() + "/dsine.pt", weights_only=True)
    state["model"]["prob_head.4.bias"] = torch.full((25,), math.nan)
    (tmp_path / "nan").mkdir()
    torch.save(state, tmp_path / "nan" / "dsine.pt")
    with pytest.raises(WeightsError, match="no numbers"):
        use(tmp_path / "nan")


def test_wrong_options_are_config_errors(folder, tmp_path):
    for options, said in (
        (["derive=[dsine,normal]"], "'dsine' and 'normal' both make normal"), (["depth.weights=x"], "settings of 'depth'"),
        (["derive=[depth]", "depth.size=3"], "unknown key"), (["derive=[caption]", "caption.tokens=0"], "tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(tmp_path, f"path={folder}", *options)
