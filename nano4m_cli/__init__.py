"""nano4m: train small any-to-any multimodal models, from raw media to an evaluated model."""

__version__ = "0.1.0"
