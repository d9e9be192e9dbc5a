"""The network of DSINE (Bae and Davison 2024, arXiv:2403.00712), with the tensor names of its checkpoint dsine.pt.

EfficientNet-B5 (Tan and Le 2019, TensorFlow's padding), a decoder that knows the direction of each pixel's ray, and five rounds
in which each pixel gathers the normals of its neighbours, turned about axes that lie in their planes.
Its axes: x right, y down, z away from the camera; normals point away too, so that a wall straight ahead has (0, 0, 1).
Legend: B pictures, C channels, H W pixels, h w pixels of the grid of one eighth, K neighbours of a pixel (5 x 5).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, AROUND, ROUNDS = 8, 5, 5
WIDTH, DEPTH, FEATURES = 1.6, 2.2, 2048  # EfficientNet's multipliers for B5, and the decoder's channels
LEAST = 0.01  # cosine of a normal and its ray
# Blocks of a stage, kernel, stride, expansion, channels: of B0.
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Same(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "same": by what is needed, more of it right and below."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inner, outer, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        lacks = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n in (x.shape[-1], x.shape[-2])]
        return super().forward(F.pad(x, [side for n in lacks for side in (n // 2, n - n // 2)]))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Squeeze(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv_expand(F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """An inverted residual; without expansion its last convolution bears another name."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expand: int):
        super().__init__()
        wide = inner * expand
        norms = iter(("bn1", "bn2", "bn3"))
        self.order: list[tuple[str, str, bool]] = []  # convolution, norm, whether an activation follows

        def add(name: str, conv: nn.Module, act: bool) -> None:
            self.order.append((name, next(norms), act))
            setattr(self, name, conv)
            setattr(self, self.order[-1][1], norm(conv.out_channels))

        if expand > 1:
            add("conv_pw", Same(inner, wide, 1), True)
        add("conv_dw", Same(wide, wide, kernel, stride, groups=wide), True)
        self.se = Squeeze(wide, max(1, int(inner * 0.25 + 0.5)))
        add("conv_pwl" if expand > 1 else "conv_pw", Same(wide, outer, 1), False)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, bn, act in self.order:
            y = getattr(self, bn)(getattr(self, conv)(y))
            y = F.silu(y) if act else y
            y = self.se(y) if conv == "conv_dw" else y
        return x + y if self.residual else y


class EfficientNet(nn.Module):
    """Channels of 1/8, 1/16 and 1/32: the outputs of stages 2 and 4, and of the head before its norm."""

    def __init__(self, width: float, depth: float):
        super().__init__()
        size = lambda c: _multiple_of_8(c * width)  # noqa: E731
        inner = size(32)
        self.conv_stem, self.bn1 = Same(3, inner, 3, 2), norm(inner)
        stages = []
        for blocks, kernel, stride, expand, channels in STAGES:
            stage = []
            for i in range(math.ceil(blocks * depth)):
                stage.append(Block(inner, size(channels), kernel, stride if i == 0 else 1, expand))
                inner = size(channels)
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = Same(inner, size(1280), 1), norm(size(1280))  # the checkpoint holds bn2; nothing reads it
        self.channels = (size(40), size(112), size(1280))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.silu(self.bn1(self.conv_stem(x)))
        out = []
        for stage in self.blocks:
            x = stage(x)
            out.append(x)
        return [out[2], out[4], self.conv_head(x)]


def _multiple_of_8(channels: float) -> int:
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


class Standardised(nn.Conv2d):
    """A 3 x 3 convolution whose weights have mean 0 and deviation 1 per output (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1).reshape(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


class Up(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        part = lambda c: (Standardised(c, outer, 3), nn.GroupNorm(8, outer), nn.LeakyReLU())  # noqa: E731
        self._net = nn.Sequential(*part(inner), *part(outer))

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return self._net(torch.cat([F.interpolate(x, beside.shape[2:], mode="bilinear", align_corners=False), beside], 1))


def head(inner: int, hidden: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, outer, 1)
    )


class Encoder(nn.Module):
    def __init__(self, width: float, depth: float):
        super().__init__()
        self.original_model = EfficientNet(width, depth)


class Decoder(nn.Module):
    def __init__(self, channels: tuple[int, int, int], features: int):
        super().__init__()
        self.conv2 = nn.Conv2d(channels[2] + 2, features, 1)
        self.up1 = Up(features + channels[1] + 2, features // 2)
        self.up2 = Up(features // 2 + channels[0] + 2, features // 4)
        self.normal_head, self.feature_head, self.hidden_head = (head(features // 4 + 2, 128, n) for n in (3, 64, 64))

    def forward(self, seen: list[Tensor], rays: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = self.conv2(torch.cat([seen[2], rays[2]], 1))
        x = self.up1(x, torch.cat([seen[1], rays[1]], 1))
        x = torch.cat([self.up2(x, torch.cat([seen[0], rays[0]], 1)), rays[0]], 1)
        return F.normalize(self.normal_head(x), dim=1), self.feature_head(x), self.hidden_head(x)


class GRU(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(hidden + inner, hidden, AROUND, padding=AROUND // 2) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([h, x], 1)
        z, r = torch.sigmoid(self.convz(both)), torch.sigmoid(self.convr(both))
        return (1 - z) * h + z * torch.tanh(self.convq(torch.cat([r * h, x], 1)))


class DSINE(nn.Module):
    def __init__(self, width: float = WIDTH, depth: float = DEPTH, features: int = FEATURES):
        super().__init__()
        self.encoder = Encoder(width, depth)
        self.decoder = Decoder(self.encoder.original_model.channels, features)
        self.gru = GRU(64, 66)
        k = AROUND**2
        self.prob_head, self.xy_head, self.angle_head = (head(66, 64, n) for n in (k, 2 * k, k))
        self.up_prob_head = head(66, 64, 9 * DOWN**2)

    def forward(self, picture: Tensor, focal: float, centre: tuple[float, float]) -> Tensor:
        """Return normals (B, 3, H, W).

        Args:
            picture: (B, 3, H, W), normalised as ImageNet's; H and W are multiples of 32.
            focal, centre: of the camera in pixels of the picture; centre (x, y) from its left upper corner.
        """
        rays = [ray_slopes(picture.shape[2:], d, focal, centre).expand(len(picture), -1, -1, -1) for d in (8, 16, 32)]
        normal, features, h = self.decoder(self.encoder.original_model(picture), rays)
        ray = F.normalize(F.pad(rays[0], (0, 0, 0, 0, 0, 1), value=1.0), dim=1)
        normal = facing(normal, ray)
        for _ in range(ROUNDS):
            h = self.gru(h, torch.cat([features, rays[0]], 1))
            x = torch.cat([h, rays[0]], 1)
            normal = gather(normal, self.prob_head(x), self.xy_head(x), self.angle_head(x), rays[0], ray, focal / DOWN)
        return F.normalize(enlarge(normal, self.up_prob_head(x)), dim=1)


def ray_slopes(size: torch.Size, down: int, focal: float, centre: tuple[float, float]) -> Tensor:
    """Return (2, h, w): how far right and down the ray of each pixel of a grid `down` times coarser goes per unit of depth."""
    at = lambda n, c: ((torch.arange(n // down) + 0.5) * down - c) / focal  # noqa: E731
    y, x = torch.meshgrid(at(size[0], centre[1]), at(size[1], centre[0]), indexing="ij")
    return torch.stack([x, y])


def facing(normal: Tensor, ray: Tensor) -> Tensor:
    """Return normals (B, 3, ..., h, w) of which none is turned the other way: cosine with the ray at least LEAST."""
    cosine = (normal * ray).sum(1, keepdim=True)
    return F.normalize(normal + ray * (cosine.clamp_min(LEAST) - cosine), dim=1)


def neighbours(x: Tensor, side: int) -> Tensor:
    """Return (B, C, side * side, h, w): the pixels around each one; beyond the border those on it."""
    b, c, h, w = x.shape
    edge = side // 2
    return F.unfold(F.pad(x, [edge] * 4, mode="replicate"), side).reshape(b, c, side * side, h, w)


def gather(normal: Tensor, share: Tensor, step: Tensor, angle: Tensor, slopes: Tensor, ray: Tensor, focal: float) -> Tensor:
    """Return normals (B, 3, h, w): the sum over neighbours of their normals, each turned about an axis in its plane.

    Args:
        share, angle: (B, K, h, w), before the sigmoid. step: (B, 2 K, h, w), where on the neighbour's surface the axis
            leads, as directions in the picture (all x, then all y). slopes, ray: of each pixel. focal: in pixels of the grid.
    """
    n = neighbours(normal, AROUND)
    b, _, k, h, w = n.shape
    u = F.normalize(step.reshape(b, 2, k, h, w), dim=1) / focal
    to = neighbours(slopes, AROUND) + u  # where one pixel further in that direction looks
    below = to[:, 0] * n[:, 0] + to[:, 1] * n[:, 1] + n[:, 2]
    below = torch.where(below.abs() < 1e-8, 1e-8 * below.sign(), below)
    deeper = -(u[:, 0] * n[:, 0] + u[:, 1] * n[:, 1]) / below  # so much, that the step stays in the plane
    axis = F.normalize(torch.stack([u[:, 0] + deeper * to[:, 0], u[:, 1] + deeper * to[:, 1], deeper], 1), dim=1)
    valid = axis.isfinite().all(1, keepdim=True)
    axis, by = torch.where(valid, axis, 0.0), torch.where(valid, torch.sigmoid(angle)[:, None] * math.pi, 0.0)
    along = (axis * n).sum(1, keepdim=True)
    turned = n * by.cos() + torch.cross(axis, n, dim=1) * by.sin() + axis * along * (1 - by.cos())  # Rodrigues
    turned = facing(F.normalize(turned, dim=1), ray[:, :, None])
    return F.normalize((torch.sigmoid(share)[:, None] * turned).sum(2), dim=1)


def enlarge(x: Tensor, mask: Tensor) -> Tensor:
    """Return (B, C, 8 h, 8 w): a fine pixel is a mean of the nine coarse ones there, by softmax of mask (B, 9 * 64, h, w)."""
    b, c, h, w = x.shape
    share = mask.reshape(b, 1, 9, DOWN, DOWN, h, w).softmax(2)
    fine = (share * neighbours(x, 3).reshape(b, c, 9, 1, 1, h, w)).sum(2)  # (B, C, 8, 8, h, w)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(b, c, DOWN * h, DOWN * w)
