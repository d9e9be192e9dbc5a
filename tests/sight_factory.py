"""Small weights in the published formats of models that see: Depth Anything, BLIP and CLIP, made when first asked for.

Fresh weights of transformers are tiny, so that a picture hardly changes what comes out: here they are of the size that keeps
variance, biases included.
"""

import functools
import json
import math
from pathlib import Path

import torch
from codec_factory import place

from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.tokenizers._pretrained import quiet_transformers

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
USUAL = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255}
WORDS = ["a", "red", "blue", "green", "cat", "dog", "cube", "on", "the", "left", "right", "##s", "##ing", "two", "big", ",", "."]


def enliven(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every matrix and bias anew, so large that pictures matter; norms stay as they are."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=g) / math.sqrt(value[0].numel()))
            elif name.endswith("bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=g))


def _saved(folder: Path, model: torch.nn.Module, preprocessor: dict) -> str:
    with quiet_transformers():
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)


@functools.cache
def depth_small(kind: str = "relative", local: bool = False) -> str:
    """Return the folder of a small Depth Anything V2; local: tokens see only their own patch."""
    ensure_torchaudio()
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False, use_mask_token=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8, depth_estimation_type=kind, **({"max_depth": 20} if kind == "metric" else {}),
    )
    model = DepthAnythingForDepthEstimation(config).eval()
    enliven(model)
    with torch.no_grad():
        model.head.conv3.bias.fill_(3.0 if kind == "relative" else 0.0)  # above what the ReLU cuts
        for layer in model.backbone.encoder.layer if local else ():
            layer.layer_scale1.lambda1.zero_()
        for layer in model.neck.fusion_stage.layers if local else ():
            for part in (layer.residual_layer1, layer.residual_layer2):
                part.convolution2.weight.zero_()
    size = {"size": {"height": 112, "width": 112}, "ensure_multiple_of": 14, "keep_aspect_ratio": True}
    settings = {**USUAL, **IMAGENET, **size, "do_pad": False, "size_divisor": None, "image_processor_type": "DPTImageProcessor"}
    folder = _saved(place() / f"depth_{kind}{local}", model, settings)
    config = json.loads(Path(folder, "config.json").read_text())  # the published one is older, and says more
    config |= {"backbone": None, "backbone_kwargs": None, "use_pretrained_backbone": False, "torch_dtype": "float32"}
    config["backbone_config"]["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    Path(folder, "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def blip_small() -> str:
    """Return the folder of a small BLIP: its text begins with an id just beyond the tokenizer's, as that of the published one."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    ensure_torchaudio()
    from transformers import BlipConfig, BlipForConditionalGeneration

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.normalizer, vocabulary.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    vocabulary.decoder = decoders.WordPiece(prefix="##")
    vocabulary.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    vocabulary.add_special_tokens(words[:5])
    text = {"vocab_size": len(words) + 2, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": len(words),
            "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    enliven(model)
    with torch.no_grad():  # a steep output, so that pictures differ in words; no marks but the end
        model.text_decoder.cls.predictions.bias[[0, 1, 2, 4]] = -1e4
        for layer in model.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(4)
    settings = {**USUAL, **OPENAI, "size": {"height": 32, "width": 32}, "size_divisor": 32,
                "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor"}
    folder = _saved(place() / "blip", model, settings)
    vocabulary.save(f"{folder}/tokenizer.json")
    return folder


@functools.cache
def clip_small() -> str:
    """Return the folder of a small CLIP with a byte-level vocabulary of single letters and a few merges."""
    ensure_torchaudio()
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz,."]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)
    end = len(words) - 1
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 24, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    enliven(model)
    settings = {**USUAL, **OPENAI, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32},
                "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}
    folder = _saved(place() / "clip", model, settings)
    vocabulary.save_pretrained(folder)
    return folder


SMALL = (0.5, 0.4, 64)  # width, depth and features of a small DSINE


@functools.cache
def dsine_small(size: tuple = SMALL) -> str:
    """Return the folder of dsine.pt with a small network's tensors; norms of the encoder know what passes through them."""
    from nano4m_cli.data.labels._dsine import DSINE

    model = DSINE(*size)
    enliven(model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)), 100.0, (64.0, 64.0))
    folder = place() / "dsine"
    folder.mkdir(exist_ok=True)
    torch.save({"model": model.state_dict()}, folder / "dsine.pt")
    return str(folder)


def dsine_of_size(patch) -> None:
    """Let pseudo-label `dsine` expect the small network, by a pytest monkeypatch."""
    from nano4m_cli.data.labels._dsine import DSINE

    patch.setattr(DSINE.__init__, "__defaults__", SMALL)


WEIGHTS = {"depth": depth_small, "caption": blip_small, "clip": clip_small, "dsine": dsine_small}
