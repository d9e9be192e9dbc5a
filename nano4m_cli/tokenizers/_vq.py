"""Vector quantisation with codebooks kept as moving averages, dead codes revived; and residual quantisation of Q of them.

The codebook is online k-means, not a parameter (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1, as EnCodec and
SoundStream do): it follows the encoder at a rate of its own, whatever optimizer, weight decay and schedule do to the rest,
and a revived code has no stale momentum to shake off. All of its state is in buffers, and what is random is keyed by the
number of updates so far, so that a resumed run is the same run.
Legend: N vectors, D channels, K codes, Q codebooks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.rng import uniform

RECENT = 100  # updates: what a code was used in counts as its use now
ENOUGH = 0.2  # share of the codes; below it a codebook is called dead


class VectorQuantizer(nn.Module):
    """The nearest of K codes for every vector; the gradient passes straight through.

    Args:
        decay: of the moving averages. revive: updates that a code may go unused before it is moved (0: never).
        cosine: codes and vectors lie on the unit sphere (Yu et al. 2022, arXiv:2110.04627).
        commitment, entropy: weights in the loss. Entropy (Yu et al. 2023, arXiv:2310.05737) wants each vector sure of its
            code and the codes used evenly. stream: names this codebook's randomness.

    While training every `forward` is an update; the first takes as many codes as it can from the vectors it sees.
    """

    def __init__(self, codes: int, dim: int, decay: float = 0.99, revive: int = 20, cosine: bool = False,
                 commitment: float = 0.25, entropy: float = 0.0, stream: str = "vq"):
        super().__init__()
        self.decay, self.revive, self.cosine, self.stream = decay, revive, cosine, stream
        self.commitment, self.entropy = commitment, entropy
        self.register_buffer("book", self.placed(torch.randn(codes, dim)))
        self.register_buffer("count", torch.zeros(codes))  # the average's weight: vectors per update
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))  # updates since the code was used or moved
        self.register_buffer("use", torch.zeros(codes))  # moving average of use alone: being moved is no use
        self.register_buffer("seen", torch.full((codes,), -RECENT))  # the update that used the code last
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def placed(self, x: Tensor) -> Tensor:
        """Return vectors where codes lie."""
        return F.normalize(x, dim=-1) if self.cosine else x

    def distances(self, z_ND: Tensor) -> Tensor:
        """Return squared distances (N, K) less what does not depend on the code."""
        with torch.autocast(z_ND.device.type, enabled=False):  # neighbours in bf16 are other neighbours
            book_KD = self.book.clone() if torch.is_grad_enabled() else self.book  # an update is no part of the gradient
            return book_KD.square().sum(-1) - 2 * z_ND @ book_KD.T

    def encode(self, z: Tensor) -> Tensor:
        """Return codes (int64) of (..., D)."""
        z_ND = self.placed(z.float().flatten(0, -2))
        return self.distances(z_ND).argmin(-1).view(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Return (..., D) of codes."""
        return F.embedding(codes, self.book)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantised (..., D) with straight-through gradient, codes (...), loss) of (..., D)."""
        z_ND = self.placed(z.float().flatten(0, -2))
        with torch.no_grad():
            codes_N = self.distances(z_ND).argmin(-1)
        quantised_ND = self.decode(codes_N)
        loss = self.commitment * F.mse_loss(z_ND, quantised_ND)
        if self.entropy:
            loss = loss + self.entropy * entropy_gap(self.distances(z_ND))
        out_ND = z_ND + (quantised_ND - z_ND).detach()
        if self.training:
            self.update(z_ND.detach(), codes_N, (z_ND - quantised_ND).detach().square().sum(-1))
        return out_ND.view(z.shape), codes_N.view(z.shape[:-1]), loss

    @torch.no_grad()
    def update(self, z_ND: Tensor, codes_N: Tensor, error_N: Tensor) -> None:
        """Move the codes that were chosen towards their vectors, and dead ones onto vectors that were served badly.

        count <- decay * count + (1 - decay) * n and the like for the sums of vectors, of which the codes are the quotient;
        written as a step of the code itself, which needs no second table and leaves unused codes where they are.
        """
        n_K = torch.zeros_like(self.count).index_add_(0, codes_N, torch.ones_like(error_N))
        if self.updates > 0:
            sum_KD = torch.zeros_like(self.book).index_add_(0, codes_N, z_ND)
            self.count.mul_(self.decay).add_(n_K, alpha=1 - self.decay)
            step_KD = (sum_KD - n_K[:, None] * self.book) * (1 - self.decay) / self.count.clamp_min(1e-12)[:, None]
            self.book.copy_(self.placed(self.book + step_KD))
            self.idle.add_(1).masked_fill_(n_K > 0, 0)
            dead_K = self.idle >= self.revive if self.revive else torch.zeros_like(n_K, dtype=torch.bool)
        else:
            dead_K = torch.ones_like(n_K, dtype=torch.bool)
        if dead_K.any():
            self._reseed(torch.nonzero(dead_K)[:, 0], z_ND, error_N)
        self.use.mul_(self.decay).add_(n_K, alpha=1 - self.decay)
        self.updates += 1
        self.seen.masked_fill_(n_K > 0, int(self.updates))

    def _reseed(self, dead: Tensor, z_ND: Tensor, error_N: Tensor) -> None:
        """Put dead codes on different vectors, drawn in proportion to their error (k-means++, Arthur and Vassilvitskii 2007).

        Such draws without replacement are the largest of log error + Gumbel noise. Where the vectors are fewer than the
        dead, the rest waits for the next update.
        """
        draw = uniform(0, f"{self.stream}/revive", int(self.updates), np.arange(len(z_ND)))
        gumbel_N = torch.from_numpy(-np.log(-np.log(draw))).to(error_N)
        chosen = (error_N.clamp_min(1e-30).log() + gumbel_N).topk(min(len(dead), len(z_ND))).indices
        dead = dead[: len(chosen)]
        self.book[dead] = z_ND[chosen]
        self.count[dead] = len(z_ND) / len(self.book)  # an average code's: one batch does not carry it off
        self.idle[dead] = 0

    def usage(self) -> dict[str, float]:
        """Return the share of codes used in the last `RECENT` updates, and the perplexity of the average use."""
        p = self.use.double() / self.use.double().sum().clamp_min(1e-12)
        used = self.updates - self.seen < RECENT
        return {"codes_used": float(used.float().mean()), "perplexity": math.exp(float(-torch.xlogy(p, p).sum()))}


class ResidualVQ(nn.Module):
    """Q quantisers, each of what those before it left over (SoundStream, Zeghidour et al. 2021, arXiv:2107.03312, alg. 1).

    `options` are those of `VectorQuantizer`. The sum passes its gradient straight through; every level has its loss.
    """

    def __init__(self, books: int, codes: int, dim: int, **options):
        super().__init__()
        self.books = nn.ModuleList(VectorQuantizer(codes, dim, stream=f"vq{q}", **options) for q in range(books))

    def encode(self, z: Tensor) -> Tensor:
        """Return codes (..., Q) of (..., D)."""
        rest, codes = z.float(), []
        for book in self.books:
            codes.append(book.encode(rest))
            rest = rest - book.decode(codes[-1])
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return (..., D) of codes (..., Q)."""
        return sum(book.decode(codes[..., q]) for q, book in enumerate(self.books))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (quantised (..., D) with straight-through gradient, codes (..., Q), the levels' mean loss)."""
        rest, codes, losses = z.float(), [], []
        for book in self.books:
            quantised, code, loss = book(rest)
            rest = rest - quantised.detach()  # a constant less: every level's loss reaches z
            codes.append(code)
            losses.append(loss)
        return z.float() - rest.detach(), torch.stack(codes, -1), torch.stack(losses).mean()

    def usage(self) -> dict[str, float]:
        """Return the means over the codebooks."""
        each = [book.usage() for book in self.books]
        return {k: sum(u[k] for u in each) / len(each) for k in each[0]}


def entropy_gap(distance_NK: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the mean entropy of soft choices less the entropy of the mean choice, in nats (least: sure and even)."""
    log_NK = F.log_softmax(-distance_NK / temperature, -1)
    mean_K = log_NK.exp().mean(0)
    return (mean_K * mean_K.clamp_min(1e-12).log()).sum() - (log_NK.exp() * log_NK).sum(-1).mean()


def dead_notice(modality: str, usage: dict[str, float]) -> str | None:
    """Return what to say of a codebook that is hardly used (None: it is used)."""
    if usage["codes_used"] >= ENOUGH:
        return None
    return (
        f"the {modality} codebook is nearly dead: {usage['codes_used']:.1%} of its codes are in use (perplexity "
        f"{usage['perplexity']:.1f}); train longer, set tokenizer.options.revive, or take fewer codes"
    )
