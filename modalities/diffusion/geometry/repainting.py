"""Parts of a texture that no view shows: painted from the cameras that see most of them, one after another.

View inpainting of MV-Adapter (Huang et al., 2024), with any inpainter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.geometry.cameras import Cameras, perspective
from modalities.diffusion.geometry.meshes import Mesh
from modalities.diffusion.geometry.rendering import Rays, render
from modalities.diffusion.geometry.texture import FAR, Texels, Trust, depth_gradients, project
from shared.errors import RequestError, WorkError

# image (3, H, W), holes (H, W) bool, object (H, W) bool -> image (3, H, W) with the holes painted
Inpainter = Callable[[Tensor, Tensor, Tensor], Tensor]
GAIN = 0.3  # by how much the cosine of a view must exceed that of the best one before


def pull_push(image: Tensor, holes: Tensor, inside: Tensor) -> Tensor:
    """Holes filled smoothly from what is known of the object around them, where no inpainting network is at hand:
    means over ever coarser pixels, taken where nothing finer is known (Gortler et al., 1996, The Lumigraph)."""
    known = (inside & ~holes).to(image)[None]
    return torch.where(holes, _pull_push(image * known, known), image) if known.any() else image


def _pull_push(sums: Tensor, weights: Tensor) -> Tensor:
    """(3, H, W): sums (3, H, W) / weights (1, H, W) as far as the weight goes, up to 1; the rest from half the size."""
    own = sums / weights.clamp(min=1e-8)
    if max(weights.shape) == 1 or bool((weights >= 1).all()):
        return own
    four = 4 * F.avg_pool2d(torch.cat([sums, weights])[None], 2, ceil_mode=True)[0]
    less = four[3:].clamp(max=1) / four[3:].clamp(min=1e-8)
    coarse = _pull_push(four[:3] * less, four[3:] * less)
    coarse = F.interpolate(coarse[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
    return weights * own + (1 - weights) * coarse[:, : own.shape[1], : own.shape[2]]


@dataclass(frozen=True, kw_only=True)
class Repainting:
    """Which cameras, how large, how often; a call is the ``repaint`` of ``texture.bake``.

    inpainter: (image (3, H, W), holes (H, W), object (H, W)) to an image; LaMa in the publication.
    elevations, azimuths: degrees, every pair is a candidate at ``distance`` with ``fov`` degrees.
    size: pixels of the view that is painted.  search: pixels of the views that are compared.
    least, most: rounds.  enough: the share of a view that may be left unseen, after ``least`` rounds.
    shrink, grow: radii by which the holes lose their seams and then gain a margin, pixels.
    """

    inpainter: Inpainter = pull_push
    elevations: tuple[float, ...] = (-60, -45, -30, -15, 0, 15, 30, 45, 60)
    azimuths: tuple[float, ...] = tuple(range(0, 360, 30))
    distance: float = 1.2
    fov: float = 40.0
    size: int = 1024
    search: int = 256
    least: int = 4
    most: int = 8
    enough: float = 0.02
    shrink: int = 3
    grow: int = 5
    trust: Trust = dataclasses.field(default_factory=lambda: Trust(cosine=0.1, dilation=3))

    def __post_init__(self) -> None:
        if not self.elevations or not self.azimuths or min(self.size, self.search) < 1:
            raise RequestError("repainting: at least one elevation and azimuth, and sizes of at least 1 pixel")
        if not 0 <= self.least <= self.most:
            raise RequestError(f"repainting: {self.least} to {self.most} rounds; the least comes first, from 0")

    def __call__(self, mesh: Mesh, texels: Texels, colours: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (n, 3) and known (n,) of the texels after the rounds; it ends early where nothing can be gained."""
        rays = Rays(mesh.vertices, mesh.faces)
        candidates = self.cameras()
        looks = [self._look(mesh, texels, candidates[[i]], rays) for i in range(len(candidates))]
        score = known.float()  # the best cosine a texel was painted at, 1 for the given views
        spent: set[int] = set()
        for turn in range(self.most):
            gains = [0.0 if i in spent else self._gain(look, score) for i, look in enumerate(looks)]
            best = max(range(len(gains)), key=gains.__getitem__)
            if gains[best] == 0 or (turn >= self.least and gains[best] <= self.enough):
                break
            colours, cosines = self._painted(mesh, texels, colours, score, candidates[[best]], rays)
            if not bool((cosines > score).any()):
                spent.add(best)  # its holes are slivers; others may still show more
            known, score = known | (cosines > 0), torch.maximum(score, cosines)
        return colours, known

    def cameras(self) -> Cameras:
        """All candidates, elevation by elevation."""
        elevations, azimuths = zip(*itertools.product(self.elevations, self.azimuths), strict=True)
        return perspective(azimuths, elevations, distance=self.distance, fov=self.fov)

    def _look(self, mesh: Mesh, texels: Texels, camera: Cameras, rays: Rays) -> tuple[Tensor, Tensor]:
        """What a candidate shows: the texel (m,) and the cosine (m,) at each of its pixels on the object."""
        seen = render(mesh, camera, (self.search, self.search), rays)
        return texels.at(seen.uv).int(), seen.cosines()[seen.mask]

    def _gain(self, look: tuple[Tensor, Tensor], score: Tensor) -> float:
        """The share of a view that is unseen, plus what the others would gain in cosine beyond ``GAIN``."""
        score, cosines = score[look[0]], look[1]
        unseen = score < 1e-3
        better = torch.where(unseen, 1.0, (cosines - score - GAIN).clamp(min=0))
        return float(better[cosines > self.trust.cosine].sum()) / self.search**2

    def _painted(
        self, mesh: Mesh, texels: Texels, colours: Tensor, score: Tensor, camera: Cameras, rays: Rays
    ) -> tuple[Tensor, Tensor]:
        """The colours after one view was painted, and the cosines (n,) at which it painted each texel, 0 for none."""
        seen = render(mesh, camera, (self.size, self.size), rays)
        image = seen.colours(texture=texels.image(colours))[0].permute(2, 0, 1)
        before = seen.spread(score[texels.at(seen.uv)][:, None], 1.0)[0, ..., 0]
        holes = (before < 1e-3) | (seen.cosines()[0] - before > GAIN)
        holes = _grown(~_grown(~holes, self.shrink), self.grow)
        holes &= depth_gradients(seen.depth(FAR), 1)[0] <= self.trust.gradient
        painted = self.inpainter(image, holes, seen.mask[0])
        if painted.shape != image.shape or not bool(painted.isfinite().all()):
            raise WorkError(f"inpainter: it must give a finite image {tuple(image.shape)}, not {tuple(painted.shape)}")
        [(new, cosines)] = project(texels, seen, painted.clamp(0, 1)[None], self.trust, holes[None])
        return torch.where((cosines > 0)[:, None], new, colours), cosines


def _grown(mask: Tensor, radius: int) -> Tensor:
    """(H, W) bool: every pixel within ``radius`` (a square) of one in the mask."""
    return F.max_pool2d(mask[None].float(), 2 * radius + 1, stride=1, padding=radius)[0].bool()
