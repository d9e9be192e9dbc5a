"""What the tests share: one thread, and one small layout that holds a modality of every kind."""

import numpy as np
import pytest
import torch

from nano4m_cli.spec import Layout, TokenSpec

torch.set_num_threads(1)  # tests are many and small: spreading one over cores costs more than it saves


@pytest.fixture(scope="session")
def specs() -> list[TokenSpec]:
    """A picture with levels, sound with two codebooks, text, a video without levels."""
    return [
        TokenSpec(modality="pic", kind="grid", shape=(3, 4), vocab_size=12, levels=(4, 3)),
        TokenSpec(modality="snd", kind="codes", shape=(5, 2), vocab_size=7),
        TokenSpec(modality="txt", kind="sequence", shape=(6,), vocab_size=11, eos=3),
        TokenSpec(modality="vid", kind="grid", shape=(2, 2, 2), vocab_size=9),
    ]


@pytest.fixture(scope="session")
def layout(specs) -> Layout:
    return Layout(specs)


@pytest.fixture(scope="session")
def sample(layout):
    """A function (n, seed) -> (ids (n, C), length (n, M), shown (n, C), asked (n, C)), made by plain loops.

    Text is of true length and ends in EOS; its shown part is a beginning and its asked part follows.
    """

    def make(n: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        ids = np.zeros((n, layout.columns), dtype=np.int64)
        shown, asked = np.zeros_like(ids, dtype=bool), np.zeros_like(ids, dtype=bool)
        length = np.zeros((n, len(layout.specs)), dtype=np.int64)
        for i in range(n):
            for m, spec in enumerate(layout.specs):
                here = layout.slice(spec.modality)
                size = spec.slots if spec.kind != "sequence" else int(rng.integers(2, spec.slots + 1))
                length[i, m] = size
                row = rng.integers(0, spec.vocab_size, spec.slots)
                if spec.kind == "sequence":
                    row[row == spec.eos] = 0
                    row[size - 1], row[size:] = spec.eos, 0
                    order = np.arange(size)
                else:
                    order = rng.permutation(size)
                ids[i, here] = row
                a = int(rng.integers(0, size))
                b = int(rng.integers(a + 1, size + 1))
                shown[i, here.start + order[:a]] = True
                asked[i, here.start + order[a:b]] = True
        return ids, length, shown, asked

    return make
