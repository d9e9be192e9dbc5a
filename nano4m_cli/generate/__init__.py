"""The one sampler, and what `nano4m generate` does with it."""
