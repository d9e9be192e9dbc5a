"""Pictures that their caption does not fit: CLIP's cosine of the two (Radford et al. 2021), the mean over key frames.

The mean, since every key frame becomes a sample with that caption. LAION-400M kept pairs from 0.3 on and LAION-5B from 0.28,
with the ViT-B/32 of OpenAI; models differ: look at the recorded scores before choosing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nano4m_cli.data import _models
from nano4m_cli.data.filters import _base


class Filter(_models.Model, _base.Filter):
    class Options(_models.Model.Options):
        weights: str = "openai/clip-vit-large-patch14"

    looks_at, side, reads_caption, threshold, unit = "rgb", 224, True, 0.2, "cosine of picture and caption, -1 to 1"
    model_class, model_type = "CLIPModel", "clip"
    files = ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors")

    def open(self, found: dict[str, Path]) -> tuple[Any, Any, Any]:
        net, vocabulary = super().open(found), self.vocabulary(found)
        vocabulary.enable_truncation(net.config.text_config.max_position_embeddings)
        return net, self.processor("CLIPImageProcessorPil", found), vocabulary

    def score(self, raws: list[np.ndarray], caption: str = "") -> float:
        return float(np.mean(self.similarity(raws, caption)))

    def similarity(self, pictures: Sequence[np.ndarray], caption: str) -> list[float]:
        """Return the cosine of each picture, uint8 (H, W, 3), and the caption."""
        import torch

        net, processor, vocabulary = self.model
        with _models.steadily():
            ids = torch.tensor([vocabulary.encode(caption).ids])
            text = net.get_text_features(input_ids=ids).pooler_output[0]
            seen = [net.get_image_features(**processor(images=Image.fromarray(p), return_tensors="pt")).pooler_output[0]
                    for p in pictures]
            out = [float(torch.cosine_similarity(one, text, dim=0)) for one in seen]
        if not np.isfinite(out).all():
            raise self.wrong("they give a similarity that is no number")
        return out
