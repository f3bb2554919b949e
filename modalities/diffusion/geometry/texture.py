"""A texture from a few views of a mesh: each texel takes the colours of the views that see it well, the rest is filled.

Texture flow of MV-Adapter (Huang et al., 2024): project, blend, repaint from further views, fill, pad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.geometry.cameras import Cameras, geometry_guided
from modalities.diffusion.geometry.meshes import Mesh, library, normalised, read_mesh, save_glb, unwrapped
from modalities.diffusion.geometry.rendering import Raster, Render, render, unfolded
from shared.errors import RequestError, WorkError

Upscaler = Callable[[Tensor], Tensor]  # images (V, 3, H, W) in 0 to 1 to larger ones
FAR = 100.0  # depth of the background: a step at every silhouette
POWER = 3.0  # of the cosine in the weight of a view
POINTS = 2**20  # texels looked up at once
OVERLAP = 0.01  # of the texels, up to which UVs of a file are kept


@dataclass(frozen=True, eq=False)
class Texels:
    """The n texels of a square texture that lie on the surface. positions: (n, 3), in the world.

    nearest: (S, S) int64, for every texel of the texture the place in the n of the nearest one.
    """

    raster: Raster
    positions: Tensor
    nearest: Tensor

    def image(self, values: Tensor) -> Tensor:
        """(C, S, S): values (n, C) as a texture, around the charts that of the nearest texel (the UV padding)."""
        return values[self.nearest].permute(2, 0, 1).contiguous()

    def at(self, uv: Tensor) -> Tensor:
        """(m,) int64: the texels nearest to places (m, 2) in the unit square."""
        size = len(self.nearest)
        column, row = ((part * size).long().clamp(0, size - 1) for part in (uv[:, 0], 1 - uv[:, 1]))
        return self.nearest[row, column]


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Where a view is believed. position: greatest distance between a texel and the surface that the view shows at its
    place.  cosine: least cosine of the angle of incidence.  gradient: greatest Sobel gradient of the depth (weights 1,
    2, 1 as published: it grows with the size of pixels; 0.1 is meant for 768 to 1536 of them), after its greatest
    values were spread over ``dilation`` x ``dilation`` pixels.  mask: least value of the mask of the view.
    """

    position: float = 1e-3
    cosine: float = 0.2
    gradient: float = 0.1
    dilation: int = 5
    mask: float = 0.9

    def __post_init__(self) -> None:
        if self.dilation < 1 or self.dilation % 2 == 0:
            raise RequestError(f"dilation {self.dilation}: an odd number of pixels is wanted")


@dataclass(frozen=True, eq=False)
class Baked:
    """texture: (3, S, S) in 0 to 1, row 0 is the top.  seen, repainted, filled: shares of the surface's texels that
    come from the given views, from the inpainter, and from the nearest known texel in space; they add up to 1.
    """

    texture: Tensor
    seen: float
    repainted: float
    filled: float


def bicubic(images: Tensor) -> Tensor:
    """Images at twice the size by bicubic interpolation, where no super-resolution network is at hand."""
    return F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)


def texture_file(
    source: str | Path, target: str | Path, images: Tensor, cameras: Cameras | None = None, *,
    up: str = "+y", front: str = "+z", centre: bool = True, size: int = 4096, **settings,
) -> Baked:  # fmt: skip
    """Read a mesh, bake views of it into a texture, and write a GLB in the coordinates of the file.

    images: (V, 3, H, W) in 0 to 1, of the mesh as ``meshes.normalised`` places it.  cameras: of the images, by default
    the six of ``geometry_guided``.  size: side of the texture (published: 4096 for SDXL, 2048 for SD2.1).
    settings: further arguments of ``bake``. UVs of the file are kept where no two triangles share a texel.
    """
    mesh = with_uv(normalised(read_mesh(source), up=up, front=front, centre=centre), size)
    baked = bake(mesh, cameras or geometry_guided(), images, size=size, **settings)
    shares = {"seen": baked.seen, "repainted": baked.repainted, "filled": baked.filled}
    save_glb(target, mesh, baked.texture, {"source": Path(source).name, "views": len(images), "texels": size, **shares})
    return baked


def bake(
    mesh: Mesh, cameras: Cameras, images: Tensor, *, size: int = 4096, upscaler: Upscaler | None = bicubic,
    repaint: Callable[[Mesh, Texels, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    trust: Trust | None = None, masks: Tensor | None = None, view_weights: Tensor | None = None,
) -> Baked:  # fmt: skip
    """The texture of a mesh with UVs from views of it.

    images: (V, 3, H, W) in 0 to 1.  upscaler: applied to them first.  repaint: what paints texels that no view shows,
    such as a ``repainting.Repainting``; those left over take the colour of the nearest known texel in space.
    masks: (V, H, W), where the images are to be used.  view_weights: (V,), a greater one makes a view count more.

    Raises RequestError where images, cameras and UVs do not fit; WorkError where no texel is seen by any view.
    """
    images = _checked(images, cameras)
    if upscaler is not None:
        images = _checked(upscaler(images), cameras)
    for name, given in {"masks": masks, "view_weights": view_weights}.items():
        if given is not None and len(given) != len(cameras):
            raise RequestError(f"{name}: one for each of the {len(cameras)} cameras, not {len(given)}")
    if view_weights is not None and not bool((view_weights > 0).all()):
        raise RequestError("view_weights: positive numbers")
    texels = surface_texels(mesh, size)
    seen = render(mesh, cameras, (images.shape[2], images.shape[3]))
    colours, known = blended(project(texels, seen, images, trust or Trust(), masks), view_weights)
    if not known.any():
        raise WorkError("no texel is seen by any view: the images are not of this mesh's cameras, or far too small")
    colours, first = filled(texels, colours, known), known
    if repaint is not None:
        colours, known = repaint(mesh, texels, colours, known)
        colours = filled(texels, colours, known)
    share = [float(part.double().mean()) for part in (first, known & ~first, ~known)]
    return Baked(texels.image(colours), *share)


def with_uv(mesh: Mesh, size: int = 1024) -> Mesh:
    """The mesh with the UVs of its file where they can carry a texture of its own, else unwrapped anew for ``size``."""
    usable = mesh.uv is not None and _in_square(mesh.uv) and overlap(mesh) <= OVERLAP
    return mesh if usable else unwrapped(mesh, size=size)


def overlap(mesh: Mesh, size: int = 512) -> float:
    """The share of a texture's used texels that lie in more than one triangle."""
    heights = torch.arange(len(mesh.faces), dtype=torch.float64) / len(mesh.faces)
    above, below = (unfolded(mesh, size, heights=part) for part in (heights, 1 - heights))
    used = above.mask & below.mask
    within = torch.minimum(above.weights, below.weights).amin(-1) > 1e-6  # an edge belongs to both its triangles
    return float(((above.faces != below.faces) & within)[used].double().mean()) if used.any() else 0.0


def surface_texels(mesh: Mesh, size: int) -> Texels:
    """The texels of a ``size`` x ``size`` texture whose centres lie on the surface.

    Raises RequestError where the mesh has no UVs, they leave the unit square, or no texel is on the surface.
    """
    if size < 1:
        raise RequestError(f"size {size}: a texture has at least 1 texel")
    if mesh.uv is not None and not _in_square(mesh.uv):
        raise RequestError("the mesh's UVs leave the unit square (a repeated texture); unwrap it anew")
    raster = unfolded(mesh, size)
    if not raster.mask.any():
        raise RequestError(f"size {size}: no texel lies on the surface; use a larger texture, or unwrap the mesh anew")
    transform = library("scipy.ndimage").distance_transform_edt
    rows, columns = transform(~raster.mask.numpy(), return_distances=False, return_indices=True)
    place = raster.mask.flatten().cumsum(0).view(size, size) - 1
    nearest = place[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]
    return Texels(raster, raster.interpolated(mesh.vertices), nearest)


def project(
    texels: Texels, seen: Render, images: Tensor, trust: Trust, masks: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each view what the n texels take from it: colours (n, 3), and the cosine of incidence (n,), 0 where the view
    does not show the texel or is not believed there.

    images: (V, 3, H, W), of the size of ``seen``.  masks: (V, h, w).
    """
    positions, cosines, gradients = seen.positions(), seen.cosines(), depth_gradients(seen.depth(FAR), trust.dilation)
    points = F.pad(texels.positions, (0, 1), value=1.0)
    for view, matrix in enumerate(seen.cameras.mvp):
        maps = [positions[view].permute(2, 0, 1), cosines[view, None], gradients[view, None], images[view]]
        if masks is not None:
            maps.append(F.interpolate(masks[view, None, None].float(), images.shape[2:], mode="bilinear")[0])
        clip = points @ matrix.to(points).T
        found = _looked_up(torch.cat(maps), clip[:, :2] / clip[:, 3:])
        cosine = found[:, 3]
        valid = (found[:, :3] - texels.positions).norm(dim=-1) < trust.position
        valid &= (cosine > trust.cosine) & (found[:, 4] < trust.gradient)
        if masks is not None:
            valid &= found[:, 8] > trust.mask
        yield found[:, 5:8], cosine * valid


def blended(views: Iterable[tuple[Tensor, Tensor]], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean colours (n, 3) of what ``project`` gives, weighted by cosine^(3 / view weight), and which are known."""
    total, norm, known = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(False)
    for view, (colours, cosines) in enumerate(views):
        weight = cosines ** (POWER if weights is None else POWER / float(weights[view]))
        total, norm, known = total + colours * weight[:, None], norm + weight, known | (cosines > 0)
    return total / norm.clamp(min=1e-5)[:, None], known


def filled(texels: Texels, colours: Tensor, known: Tensor) -> Tensor:
    """Colours (n, 3) where those not ``known`` (n,) take the colour of the known texel nearest in space."""
    if known.all():
        return colours
    tree = library("scipy.spatial").cKDTree(texels.positions[known].numpy(), balanced_tree=False, compact_nodes=False)
    nearest = torch.from_numpy(tree.query(texels.positions[~known].numpy())[1]).long()
    out = colours.clone()
    out[~known] = colours[known][nearest]
    return out


def depth_gradients(depth: Tensor, dilation: int) -> Tensor:
    """(V, H, W): Sobel gradient of the depth, each pixel the greatest of ``dilation`` x ``dilation`` around it."""
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    both = torch.stack([across, across.T])[:, None]
    steps = F.conv2d(F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate"), both).norm(dim=1, keepdim=True)
    return F.max_pool2d(steps, dilation, stride=1, padding=dilation // 2)[:, 0]


def _looked_up(maps: Tensor, places: Tensor) -> Tensor:
    """(n, C): maps (C, H, W) at places (n, 2) in clip space, bilinear; 0 outside."""
    parts = [F.grid_sample(maps[None], part[None, None], align_corners=False) for part in places.split(POINTS)]
    return torch.cat(parts, -1)[0, :, 0].T


def _in_square(uv: Tensor) -> bool:
    return bool(uv.min() >= -1e-4) and bool(uv.max() <= 1 + 1e-4)


def _checked(images: Tensor, cameras: Cameras) -> Tensor:
    if images.ndim != 4 or images.shape[:2] != (len(cameras), 3) or not images.is_floating_point():
        raise RequestError(f"images: float ({len(cameras)}, 3, H, W) for as many cameras, not {tuple(images.shape)}")
    if not bool(images.isfinite().all()) or float(images.min()) < -0.01 or float(images.max()) > 1.01:
        raise RequestError(f"images: values in 0 to 1, not {float(images.min()):g} to {float(images.max()):g}")
    return images.detach().cpu().float().clamp(0, 1)
