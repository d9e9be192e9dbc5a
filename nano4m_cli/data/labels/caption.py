"""Captions of pictures by BLIP (Li et al. 2022), for those that have none; greedy, so that the same picture says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from nano4m_cli.data import _models
from nano4m_cli.data.labels import _base


class Label(_models.Model, _base.Label):
    class Options(_models.Model.Options):
        """tokens: of a caption, at most."""

        weights: str = "Salesforce/blip-image-captioning-base"
        tokens: int = Field(20, ge=1)

    needs = ("rgb",)
    model_class, model_type = "BlipForConditionalGeneration", "blip"
    files = ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors")

    def open(self, found: dict[str, Path]) -> tuple[Any, Any, Any]:
        return super().open(found), self.processor("BlipImageProcessorPil", found), self.vocabulary(found)

    def make(self, raw: dict) -> str:
        net, processor, vocabulary = self.model
        with _models.steadily():
            given = processor(images=Image.fromarray(raw["rgb"]), return_tensors="pt")
            ids = net.generate(**given, do_sample=False, num_beams=1, min_new_tokens=1, max_new_tokens=self.options.tokens)
        said = " ".join(vocabulary.decode(ids[0].tolist(), skip_special_tokens=True).split())
        if not said:
            raise self.wrong("they say nothing of a picture")
        return said
