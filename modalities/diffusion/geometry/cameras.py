"""Cameras around one object, and the maps of rays and positions that tell a multi-view model where they stand.

World: z up, the object inside [-0.5, 0.5]^3, its front towards -y. Camera: x right, y up, it looks along -z. Pixels:
row 0 is the top, and clip space has y down, so that row and y run the same way (Huang et al., 2024, MV-Adapter).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import RequestError

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")
SIDES = ("front", "right", "back", "left", "top", "bottom")
FEWER = {6: (0, 1, 2, 3, 4, 5), 4: (0, 2, 3, 4), 3: (0, 2, 3), 2: (0, 3), 1: (0,)}  # of VIEWS, where fewer are wanted


@dataclass(frozen=True)
class Cameras:
    """V cameras. c2w: (V, 4, 4), columns right, up, backward, position.  projection: (V, 4, 4), of points in a camera
    to clip space, x and y in -1 to 1 over the image, z in -1 (near) to 1 (far).  names: of the views.
    """

    c2w: Tensor
    projection: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.names), 4, 4)
        if self.c2w.shape != shape or self.projection.shape != shape:
            have = f"{tuple(self.c2w.shape)} and {tuple(self.projection.shape)}"
            raise RequestError(f"cameras: c2w and projection must be {shape} for {len(self.names)} names, not {have}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, views: Sequence[int]) -> Cameras:
        """Some of them, by place."""
        chosen = list(views)
        return Cameras(self.c2w[chosen], self.projection[chosen], tuple(self.names[i] for i in chosen))

    def to(self, *args, **kwargs) -> Cameras:
        return dataclasses.replace(
            self, c2w=self.c2w.to(*args, **kwargs), projection=self.projection.to(*args, **kwargs)
        )

    @property
    def w2c(self) -> Tensor:
        """(V, 4, 4): world to camera."""
        turned = self.c2w[:, :3, :3].mT
        moved = torch.cat([turned, -turned @ self.c2w[:, :3, 3:]], -1)
        return torch.cat([moved, self.c2w[:, 3:]], 1)

    @property
    def mvp(self) -> Tensor:
        """(V, 4, 4): world to clip space."""
        return self.projection @ self.w2c

    @property
    def positions(self) -> Tensor:
        """(V, 3)."""
        return self.c2w[:, :3, 3]

    @property
    def forward(self) -> Tensor:
        """(V, 3): unit vectors of where they look."""
        return -self.c2w[:, :3, 2]

    @property
    def are_orthographic(self) -> bool:
        return bool((self.projection[:, 3, 3] == 1).all())

    @property
    def extent(self) -> Tensor:
        """(V, 2): width and height of what an orthographic camera sees, or a perspective one at distance 1."""
        return 2 / torch.stack([self.projection[:, 0, 0], -self.projection[:, 1, 1]], -1)


def orthographic(
    azimuths: Sequence[float],
    elevations: float | Sequence[float] = 0.0,
    *,
    distance: float = 1.8,
    scale: float = 1.1,
    near: float = 0.1,
    far: float = 100.0,
    names: Sequence[str] = (),
) -> Cameras:
    """Parallel rays; the image shows a square of side ``scale``. Angles in degrees; azimuth 0 is the front (-y), 90 +x.

    distance: of the cameras from the origin, which they look at.
    """
    c2w = _poses(azimuths, elevations, distance)
    matrix = torch.diag(torch.tensor([2 / scale, -2 / scale, -2 / (far - near), 1.0]))
    matrix[2, 3] = -(far + near) / (far - near)
    return Cameras(c2w, matrix.repeat(len(c2w), 1, 1), _named(names, len(c2w)))


def perspective(
    azimuths: Sequence[float],
    elevations: float | Sequence[float] = 0.0,
    *,
    distance: float | Sequence[float] = 1.8,
    fov: float = 40.0,
    aspect: float = 1.0,
    near: float = 0.1,
    far: float = 100.0,
    names: Sequence[str] = (),
) -> Cameras:
    """Rays from a point. fov: angle of the image's height, degrees.  aspect: its width over its height."""
    c2w = _poses(azimuths, elevations, distance)
    half = torch.tensor(fov, dtype=torch.float64).deg2rad().div(2).tan()
    matrix = torch.zeros(4, 4)
    matrix[0, 0], matrix[1, 1] = 1 / (half * aspect), -1 / half
    matrix[2, 2], matrix[2, 3] = -(far + near) / (far - near), -2 * far * near / (far - near)
    matrix[3, 2] = -1
    return Cameras(c2w, matrix.repeat(len(c2w), 1, 1), _named(names, len(c2w)))


def view_guided(views: int = 6) -> Cameras:
    """The published views around the object at elevation 0, or fewer of them; other numbers go round it evenly."""
    if views < 1:
        raise RequestError(f"views {views}: at least 1")
    if views in FEWER:
        return orthographic((0, 45, 90, 180, 270, 315), names=VIEWS)[FEWER[views]]
    return orthographic([360 * i / views for i in range(views)])


def geometry_guided() -> Cameras:
    """The six published sides for a known geometry: four around it, then from above and from below."""
    return orthographic((0, 90, 180, 270, 180, 180), (0, 0, 0, 0, 89.99, -89.99), names=SIDES)


def rays(cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """(V, 6, H, W): of an orthographic camera its direction and the unit vector of its position, alike in all pixels;
    of a perspective one each pixel's unit direction d, and origin x d (Plücker)."""
    height, width = size
    if cameras.are_orthographic:
        told = torch.cat([cameras.forward, F.normalize(cameras.positions, dim=-1)], -1)
        return told[..., None, None].expand(-1, -1, height, width)
    x, y = _centred(height, width, cameras, 0.5)
    inside = torch.stack(torch.broadcast_tensors(x, y, -torch.ones_like(x)), -1)
    turned = torch.einsum("vij,vhwj->vhwi", cameras.c2w[:, :3, :3], F.normalize(inside, dim=-1))
    moment = torch.cross(cameras.positions[:, None, None].expand_as(turned), turned, dim=-1)
    return torch.cat([turned, moment], -1).permute(0, 3, 1, 2)


def ray_maps(cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """(V, 6, H, W) in 0 to 1: ``rays`` as the condition encoder takes them, from -1 to 1."""
    return ((rays(cameras, size) + 1) / 2).clamp(0, 1).contiguous()


def positions_from_depth(cameras: Cameras, depth: Tensor, mask: Tensor, *, centres: bool = True) -> Tensor:
    """World positions (V, H, W, 3) of what orthographic cameras see; 0 where there is nothing.

    depth: (V, H, W), along the view from the camera.  mask: (V, H, W), 1 or True where the object is.
    centres: of pixels; False, as in the published training data: their upper left corners, half a pixel off.
    """
    if not cameras.are_orthographic:
        raise RequestError("positions_from_depth: the depth of orthographic cameras is wanted")
    height, width = depth.shape[1:]
    x, y = _centred(height, width, cameras, 0.5 if centres else 0.0)
    inside = torch.stack(torch.broadcast_tensors(x, y, -depth), -1)
    world = torch.einsum("vij,vhwj->vhwi", cameras.c2w[:, :3, :3], inside) + cameras.positions[:, None, None]
    return world * mask[..., None].to(world)


def geometry_maps(positions: Tensor, normals: Tensor) -> Tensor:
    """(V, 6, H, W) in 0 to 1, grey 0.5 where both are 0, as around the object.

    positions: (V, H, W, 3), in -0.5 to 0.5.  normals: (V, H, W, 3), unit vectors of the world.
    """
    return torch.cat([positions + 0.5, normals / 2 + 0.5], -1).clamp(0, 1).permute(0, 3, 1, 2).contiguous()


def _centred(height: int, width: int, cameras: Cameras, at: float) -> tuple[Tensor, Tensor]:
    """x (V, 1, W) to the right and y (V, H, 1) up, in the units of ``extent``; at: of the place within a pixel."""
    extent = cameras.extent[:, :, None, None]
    columns, rows = (torch.arange(n, dtype=extent.dtype, device=extent.device) for n in (width, height))
    x, y = (columns + at) / width - 0.5, 0.5 - (rows + at) / height
    return extent[:, 0] * x[None, None, :], extent[:, 1] * y[None, :, None]


def _poses(azimuths: Sequence[float], elevations: float | Sequence[float], distance: float | Sequence[float]) -> Tensor:
    """(V, 4, 4) float32: right, up, backward and position of cameras that look at the origin, right level."""
    a = torch.tensor(azimuths, dtype=torch.float64).sub(90).deg2rad()
    e = torch.as_tensor(elevations, dtype=torch.float64).deg2rad().expand_as(a)
    d = torch.as_tensor(distance, dtype=torch.float64).expand_as(a)[:, None]
    zero = torch.zeros_like(a)
    right = torch.stack([-a.sin(), a.cos(), zero], -1)
    up = torch.stack([-e.sin() * a.cos(), -e.sin() * a.sin(), e.cos()], -1)
    backward = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
    top = torch.stack([right, up, backward, d * backward], -1)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(len(a), 1, 4)
    return torch.cat([top, last], 1).float()


def _named(names: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(names) or tuple(f"view_{i}" for i in range(count))
