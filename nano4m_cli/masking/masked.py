"""A share of all slots is asked, every other slot is shown: what a model that sees whole samples (maskgit) is trained on."""

from __future__ import annotations

from typing import Literal

import numpy as np

from nano4m_cli.config import Config
from nano4m_cli.masking._base import Component as Base
from nano4m_cli.masking._base import Key
from nano4m_cli.rng import uniform


class Component(Base):
    """The slots are a uniform choice among those of all modalities."""

    class Options(Config):
        """schedule: how the share depends on a uniform draw u. uniform: each number of slots from 1 to all is as likely as
        any other; cosine: cos(pi u / 2), mostly large shares (Chang et al. 2022, arXiv:2202.04200); arccos:
        2 arccos(u) / pi, of density that grows towards large shares more gently (Chang et al. 2023, arXiv:2301.00704)."""

        weight: float = 1.0
        schedule: Literal["uniform", "cosine", "arccos"] = "uniform"

    text = "random"

    def counts(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        total = length_BM.sum(1)
        u = uniform(key.seed, key.stream + "/share", key.counter_B)
        share = {"uniform": lambda: u, "cosine": lambda: np.cos(np.pi / 2 * u), "arccos": lambda: np.arccos(u) / (np.pi / 2)}
        asked = np.clip(np.ceil(share[self.options.schedule]() * total), 1, total).astype(np.int64)
        # Which modality the asked slots fall on: the first so many of a random order of all slots.
        slot = np.arange(int(total.max(initial=0)))
        noise = uniform(key.seed, key.stream + "/order", key.counter_B[:, None], slot)
        rank = np.argsort(np.argsort(np.where(slot < total[:, None], noise, np.inf), axis=1, kind="stable"), axis=1)
        taken = (rank < asked[:, None]) & (slot < total[:, None])
        ends = length_BM.cumsum(1)
        so_far = np.concatenate([np.zeros((len(taken), 1), np.int64), taken.cumsum(1)], 1)
        upto = np.take_along_axis(so_far, ends, 1)
        counts = np.diff(np.concatenate([np.zeros((len(taken), 1), np.int64), upto], 1), axis=1)
        return length_BM - counts, counts
