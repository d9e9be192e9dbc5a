"""The models. They know token specs and packed batches; no files, and no modality by name."""
