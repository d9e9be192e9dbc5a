"""What a modality is: one file each, named as everywhere else (`rgb`, `depth`, ...)."""
