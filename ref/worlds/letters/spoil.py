"""What can be done to a picture without drawing another one: shift, blur, blotches, noise, compression."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def spoil(images: Tensor, g: torch.Generator) -> Tensor:
    """Each of these at a strength of its own, and at none for a third of the images."""
    B = len(images)

    def strength(most: float) -> Tensor:
        """Up to `most`, and none for a third of the images."""
        drawn = most * (1.5 * torch.rand(B, 1, 1, 1, generator=g) - 0.5)
        return drawn.clamp_min(0)

    theta = torch.eye(2, 3).repeat(B, 1, 1)
    theta[:, :, 2] = 0.12 * torch.rand(B, 2, generator=g) - 0.06  # up to a pixel
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, strength(1.0))
    for side in (4, 8, 16):  # blotches of three sizes, in colour
        field = torch.randn(B, 3, side, side, generator=g)
        x = x + strength(0.08) * F.interpolate(field, x.shape[2:], mode="bicubic")
    x = x + strength(0.1) * torch.randn(x.shape, generator=g)
    return jpeg(x, strength(0.2)).clamp(0, 1)


def jpeg(images: Tensor, step: Tensor) -> Tensor:
    """JPEG's loss: the cosine transform of 8 x 8 blocks rounded to multiples of `step`, coarser in high frequencies."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * k[:, None] * (2 * k + 1) / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = images.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).transpose(3, 4)  # B 3 h w 8 8
    q = (step[..., None, None] * (1 + (k[:, None] + k) / 4)).clamp_min(1e-3)
    rounded = ((basis @ blocks @ basis.T) / q).round() * q
    return (basis.T @ rounded @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3)
