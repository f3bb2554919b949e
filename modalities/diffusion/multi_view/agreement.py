"""How far views of one object agree: the colours that they give to the same points of its surface."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.geometry.cameras import Cameras


def disagreement(
    images: Tensor, cameras: Cameras, positions: Tensor, alpha: Tensor, tolerance: float = 0.02
) -> tuple[Tensor, Tensor]:
    """The sum over points seen by two views of the mean absolute difference of their colours, and their number.

    images: (V, 3, H, W).  positions: (V, H, W, 3) of the world, as these cameras see them.  alpha: (V, H, W), 1 where
    the object is.  tolerance: how near what another view sees at a point's pixel must be to the point.

    Each pixel of each view is projected into each other view; pixels are compared with the nearest pixel there. The
    surface is known, so 0 is what views of one object give, up to the width of a pixel at the edges of colours.
    """
    views, _, height, width = images.shape
    total, count = images.new_zeros(()), images.new_zeros(())
    seen = torch.cat([positions, alpha[..., None]], -1).permute(0, 3, 1, 2).to(images)
    points = positions.flatten(1, 2).to(images)
    whole = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    for other in range(views):
        clip = whole @ cameras.mvp[other].to(images).T
        grid = (clip[..., :2] / clip[..., 3:]).view(views, height, width, 2)
        there = F.grid_sample(
            torch.cat([images[other], seen[other]])[None].expand(views, -1, -1, -1), grid, "nearest", "zeros", False
        )
        same = (there[:, 3:6].movedim(1, -1) - positions.to(images)).norm(dim=-1) < tolerance
        same &= (there[:, 6] > 0.5) & (alpha.to(images) > 0.5)
        same[other] = False
        total = total + (there[:, :3] - images).abs().mean(1)[same].sum()
        count = count + same.sum()
    return total, count
