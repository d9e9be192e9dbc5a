"""What fitting against a critic needs: hinge losses, feature matching, the adaptive weight, and two critics.

A critic returns (scores, features): lists of tensors, one score map for every scale. It is trained by the training loop,
beside the tokenizer and after each of its steps, and is not part of what is saved.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.tokenizers._base import GradientTokenizer

Judged = tuple[list[Tensor], list[Tensor]]


class AdversarialOptions(Config):
    """adversarial, feature_matching: weights of the critic's terms (both 0: no critic), from step adversarial_start on."""

    adversarial: float = Field(0.0, ge=0)
    feature_matching: float = Field(0.0, ge=0)
    adversarial_start: int = Field(200, ge=0)


@dataclass
class Trial:
    """One pass: what was real, what came back, the reconstruction loss, the other losses' sum, and figures."""

    real: Tensor
    made: Tensor
    reconstruction: Tensor
    rest: Tensor
    figures: dict[str, Tensor]


class Adversarial(GradientTokenizer):
    """A tokenizer whose options are `AdversarialOptions`; members give `trial`, `new_critic` and `last`."""

    @abstractmethod
    def trial(self, index: Tensor, step: int | None) -> Trial:
        """Return the pass over rows `index`; what is random in it is keyed by the step (None: nothing is random)."""

    @abstractmethod
    def new_critic(self) -> nn.Module: ...

    @property
    @abstractmethod
    def last(self) -> Tensor:
        """The decoder's last weight."""

    def make_critic(self) -> None:
        """Set up the critic where the options ask for one."""
        wanted = self.options.adversarial or self.options.feature_matching
        self.critic = self.new_critic() if wanted else None
        self._pair: tuple[Tensor, Tensor] | None = None

    def loss(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t = self.trial(index, None)
        return t.reconstruction + t.rest, t.figures

    def train_loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        o, t = self.options, self.trial(index, step)
        total, self._pair = t.reconstruction + t.rest, None
        if self.critic is None or step < o.adversarial_start:
            return total, t.figures
        self._pair = (t.real, t.made.detach())
        with torch.no_grad():
            _, wanted = self.critic(t.real)
        scores, features = self.critic(t.made)
        fooled = -torch.stack([s.mean() for s in scores]).mean()
        weight = adaptive_weight(t.reconstruction, fooled, self.last)
        matching = feature_distance(features, wanted)
        total = total + o.adversarial * weight * fooled + o.feature_matching * matching
        return total, {**t.figures, "fooled": fooled, "features": matching, "adaptive": weight}

    def critic_loss(self) -> Tensor | None:
        return None if self._pair is None else hinge(*(self.critic(x)[0] for x in self._pair))


def hinge(real: list[Tensor], made: list[Tensor]) -> Tensor:
    """Return the critic's loss: scores of real things above 1, of made ones below -1 (mean over scales)."""
    return torch.stack([0.5 * (F.relu(1 - r).mean() + F.relu(1 + m).mean()) for r, m in zip(real, made, strict=True)]).mean()


def feature_distance(made: list[Tensor], real: list[Tensor]) -> Tensor:
    """Return the mean over layers of |made - real| relative to |real| (as EnCodec scales it)."""
    return torch.stack([(m - r).abs().mean() / r.abs().mean().clamp_min(1e-4) for m, r in zip(made, real, strict=True)]).mean()


def adaptive_weight(reconstruction: Tensor, fooled: Tensor, last: Tensor) -> Tensor:
    """Return |gradient of reconstruction| / |gradient of fooled| at the last weight (Esser et al. 2021, eq. 7), at most 1e4."""
    wanted, got = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, fooled))
    return (wanted / (got + 1e-4)).clamp(0, 1e4).detach()


class PatchCritic(nn.Module):
    """Scores of overlapping patches of pictures (B, C, H, W) (PatchGAN, Isola et al. 2017); no batch statistics."""

    def __init__(self, channels: int, width: int = 32, layers: int = 2):
        super().__init__()
        sizes = [channels] + [width * min(2**i, 8) for i in range(layers)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(1, b) if i else nn.Identity() for i, b in enumerate(sizes[1:]))
        self.out = nn.Conv2d(sizes[-1], 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Judged:
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
            features.append(x)
        return [self.out(x)], features


class SpectralCritic(nn.Module):
    """Scores of complex spectrograms of sounds (B, N) at several windows (MS-STFT, Defossez et al. 2022), narrower."""

    def __init__(self, windows: tuple[int, ...] = (1024, 512, 256), width: int = 8):
        super().__init__()
        self.windows = windows
        norm = nn.utils.parametrizations.weight_norm
        self.scales = nn.ModuleList()
        for _ in windows:
            layers = [norm(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))]
            layers += [norm(nn.Conv2d(width, width, (3, 9), (1, 2), (d, 4), (d, 1))) for d in (1, 2, 4)]
            self.scales.append(nn.ModuleList([*layers, norm(nn.Conv2d(width, 1, 3, padding=1))]))

    def forward(self, wave_BN: Tensor) -> Judged:
        scores, features = [], []
        for window, scale in zip(self.windows, self.scales, strict=True):
            hann = torch.hann_window(window, device=wave_BN.device)
            with torch.autocast(wave_BN.device.type, enabled=False):
                wave = wave_BN.float()
                spectrum = torch.stft(
                    wave, window, window // 4, window=hann, pad_mode="constant", normalized=True, return_complex=True
                )
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, time, bins)
            for conv in scale[:-1]:
                x = F.leaky_relu(conv(x), 0.2)
                features.append(x)
            scores.append(scale[-1](x))
        return scores, features
