"""Meshes seen by cameras, without a display: rays cast on the CPU (Embree), one through the centre of each pixel."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.geometry import cameras as views
from modalities.diffusion.geometry.cameras import Cameras
from modalities.diffusion.geometry.meshes import Mesh, library
from shared.errors import RequestError

RAYS = 2**19  # cast at once: bounds the memory of a large image


@dataclass(frozen=True, eq=False)
class Raster:
    """Which triangle of a mesh lies at each pixel, and where in it.

    faces: (*, H, W) int64, -1 where there is none.  weights: (*, H, W, 3) float32, barycentric, 0 where there is none.
    """

    mesh: Mesh
    faces: Tensor
    weights: Tensor

    @functools.cached_property
    def mask(self) -> Tensor:
        """(*, H, W) bool: where there is a triangle."""
        return self.faces >= 0

    @functools.cached_property
    def _hit(self) -> tuple[Tensor, Tensor, Tensor]:
        """The n pixels with a triangle: their places (n,) in the flat raster, triangles (n,), weights (n, 3)."""
        where = self.mask.flatten().nonzero()[:, 0]
        return where, self.faces.flatten()[where], self.weights.flatten(0, -2)[where]

    def interpolated(self, values: Tensor) -> Tensor:
        """(n, C): values (N, C) of the vertices at the n pixels of ``mask``, in their order."""
        _, faces, weights = self._hit
        corners = self.mesh.faces[faces]
        values = values.to(weights)
        return sum(weights[:, k, None] * values[corners[:, k]] for k in range(3))  # type: ignore[return-value]

    def spread(self, values: Tensor, background: float = 0.0) -> Tensor:
        """(*, H, W, C): values (n, C) of the pixels of ``mask``, the others ``background``."""
        out = values.new_full((self.faces.numel(), values.shape[-1]), background)
        out[self._hit[0]] = values
        return out.reshape(*self.faces.shape, -1)

    def positions(self, background: float = 0.0) -> Tensor:
        """(*, H, W, 3) float32: where in the world the surface is."""
        return self.spread(self.interpolated(self.mesh.vertices), background)

    def normals(self, smooth: bool = True, background: float = 0.0) -> Tensor:
        """(*, H, W, 3) float32: unit normals; smooth: between those of the vertices, else of the flat triangles."""
        return self.spread(self._normals(smooth), background)

    def colours(self, background: float = 0.5, texture: Tensor | None = None) -> Tensor:
        """(*, H, W, 3) float32: of ``texture`` (3, height, width) or else the mesh's own, or its vertices' colours.

        Raises RequestError where the mesh has none.
        """
        texture = self.mesh.texture if texture is None else texture
        if texture is not None:
            return self.spread(sampled(texture, self.uv), background)
        if self.mesh.colours is None:
            raise RequestError("the mesh has neither a texture nor colours of its vertices")
        return self.spread(self.interpolated(self.mesh.colours), background)

    @property
    def uv(self) -> Tensor:
        """(n, 2): at the pixels of ``mask``. Raises RequestError where the mesh has no UVs."""
        if self.mesh.uv is None:
            raise RequestError("the mesh has no UVs; unwrap it first")
        return self.interpolated(self.mesh.uv)

    def _normals(self, smooth: bool) -> Tensor:
        if smooth:
            return F.normalize(self.interpolated(self.mesh.normals), dim=-1)
        return self.mesh.face_normals.float()[self._hit[1]]


@dataclass(frozen=True, eq=False)
class Render(Raster):
    """What V cameras see of a mesh: a raster of shape (V, H, W)."""

    cameras: Cameras

    def depth(self, background: float = 0.0) -> Tensor:
        """(V, H, W) float32: distance from the camera along its view, not along the ray."""
        away = self.interpolated(self.mesh.vertices) - self._of_view(self.cameras.positions)
        return self.spread((away * self._of_view(self.cameras.forward)).sum(-1, keepdim=True), background)[..., 0]

    def cosines(self, smooth: bool = True) -> Tensor:
        """(V, H, W) float32: of the angle between the normal and the direction to the camera; 0 behind and outside."""
        if self.cameras.are_orthographic:
            towards = -self._of_view(self.cameras.forward)
        else:
            towards = self._of_view(self.cameras.positions) - self.interpolated(self.mesh.vertices)
        cosine = (self._normals(smooth) * F.normalize(towards, dim=-1)).sum(-1, keepdim=True)
        return self.spread(cosine.clamp(min=0))[..., 0]

    def _of_view(self, values: Tensor) -> Tensor:
        """(n, C): values (V, C) of the cameras at the pixels of ``mask``."""
        return values.float()[self._hit[0] // self.faces[0].numel()]


class Rays:
    """Triangles laid out once, to cast rays at.

    Raises RequestError where the library is absent.
    """

    def __init__(self, vertices: Tensor, faces: Tensor):
        self.scene = library("embreex.rtcore_scene").EmbreeScene()
        corners = vertices.float().contiguous().numpy(), faces.numpy().astype(np.int32)
        library("embreex.mesh_construction").TriangleMesh(self.scene, *corners)
        self.origin, self.one, self.two = _edges(vertices[faces])

    def first(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The first triangle (n,) int64 that each ray meets, -1 for none, and the barycentric weights (n, 3) float32.

        origins, directions: (n, 3). Triangles are seen from both sides.
        """
        parts = [self._cast(*part) for part in zip(origins.split(RAYS), directions.split(RAYS), strict=True)]
        return torch.cat([faces for faces, _ in parts]), torch.cat([weights for _, weights in parts])

    def _cast(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        asked = (part.float().contiguous().numpy() for part in (origins, directions))
        faces = torch.from_numpy(self.scene.run(*asked).astype(np.int64))
        hit = faces.ge(0).nonzero()[:, 0]
        weights = torch.zeros(len(faces), 3)
        weights[hit] = self._weights(faces[hit], origins[hit].double(), directions[hit].double())
        return faces, weights

    def _weights(self, faces: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
        """Where rays meet the planes of triangles (Möller and Trumbore, 1997), in double precision."""
        one, two, from_corner = self.one[faces], self.two[faces], origins - self.origin[faces]
        across = torch.cross(directions, two, dim=-1)
        turned = torch.cross(from_corner, one, dim=-1)
        volume = (one * across).sum(-1)
        b = (from_corner * across).sum(-1) / volume
        c = (directions * turned).sum(-1) / volume
        weights = torch.stack([1 - b - c, b, c], -1).nan_to_num(1 / 3, 1 / 3, 1 / 3).clamp(0, 1)
        return (weights / weights.sum(-1, keepdim=True)).float()


def render(mesh: Mesh, cameras: Cameras, size: tuple[int, int], rays: Rays | None = None) -> Render:
    """What cameras see, at ``size`` (height, width) pixels.

    rays: of this mesh, where many views are wanted one after another.
    """
    rays = rays or Rays(mesh.vertices, mesh.faces)
    faces, weights = rays.first(*(part.reshape(-1, 3) for part in _pixel_rays(cameras, size)))
    shape = (len(cameras), *size)
    return Render(mesh, faces.view(shape), weights.view(*shape, 3), cameras)


def geometry_maps(mesh: Mesh, cameras: Cameras, size: tuple[int, int], *, smooth: bool = True) -> Tensor:
    """(V, 6, H, W) in 0 to 1: position + 0.5 and world normal / 2 + 0.5, grey 0.5 around the object.

    mesh: inside [-0.5, 0.5]^3, see ``meshes.normalised``.  smooth: normals between those of the vertices.
    """
    seen = render(mesh, cameras, size)
    return views.geometry_maps(seen.positions(), seen.normals(smooth))


def unfolded(mesh: Mesh, size: int, *, heights: Tensor | None = None) -> Raster:
    """Which triangle lies at the centre of each texel of a texture of ``size`` x ``size``: (S, S), row 0 is the top.

    heights: (F,) in 0 to 1, which of several triangles on one texel is taken: the highest; without, any.
    """
    if mesh.uv is None:
        raise RequestError("the mesh has no UVs; unwrap it first")
    corners = mesh.uv.double()[mesh.faces]
    height = torch.zeros(len(corners), dtype=torch.float64) if heights is None else heights.double()
    flat = torch.cat([corners, height[:, None, None].expand(-1, 3, 1)], -1).reshape(-1, 3)
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    origins = torch.cartesian_prod(1 - at, at).flip(-1)  # rows from the top
    origins = torch.cat([origins, torch.full_like(origins[:, :1], 2.0)], -1)
    down = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand_as(origins)
    faces, weights = Rays(flat, torch.arange(len(flat)).view(-1, 3)).first(origins, down)
    return Raster(mesh, faces.view(size, size), weights.view(size, size, 3))


def sampled(image: Tensor, uv: Tensor) -> Tensor:
    """(n, C): an image (C, height, width) at places (n, 2), bilinear, repeated beyond the unit square."""
    size = torch.tensor(image.shape[:0:-1], dtype=torch.float64)
    place = (uv.double() * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0])).remainder(1) * size + 1
    around = F.pad(image[None], (1, 1, 1, 1), mode="circular")
    grid = (2 * place / (size + 2) - 1).to(image)
    return F.grid_sample(around, grid[None, None], align_corners=False)[0, :, 0].T


def _pixel_rays(cameras: Cameras, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Origins and directions (V, H, W, 3) float64, through the centres of the pixels."""
    height, width = size
    c2w, extent = cameras.c2w.double(), cameras.extent.double()
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width - 0.5
    y = 0.5 - (torch.arange(height, dtype=torch.float64) + 0.5) / height
    y, x = torch.meshgrid(y, x, indexing="ij")
    inside = torch.stack([x, y], -1) * extent[:, None, None]
    side = torch.einsum("vij,vhwj->vhwi", c2w[:, :3, :2], inside)
    eye, forward = c2w[:, None, None, :3, 3].expand_as(side), -c2w[:, None, None, :3, 2].expand_as(side)
    return (eye + side, forward) if cameras.are_orthographic else (eye, forward + side)


def _edges(corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One corner of each triangle (F, 3, 3), and the edges from it to the two others."""
    corners = corners.double()
    return corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
