"""Coloured solids seen by orthographic cameras, by casting a ray for every pixel: exact colours, positions, normals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.data.images import COLOURS
from modalities.diffusion.geometry.cameras import Cameras


@dataclass(frozen=True)
class Solid:
    """A box or an ellipsoid. centre, half: of its extent (3).  turn: about the vertical, radians.

    colours: of the half towards its own -y (its front) and of the other one, names of ``COLOURS``.
    """

    kind: Literal["box", "ball"]
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: float
    colours: tuple[str, str]


class Seen(NamedTuple):
    """What V cameras see. colour: (V, 3, H, W) in 0 to 1.  alpha: (V, H, W).  positions, normals: (V, H, W, 3), of the
    world; all 0 where there is nothing."""

    colour: Tensor
    alpha: Tensor
    positions: Tensor
    normals: Tensor


def draw(random: np.random.Generator, plain: bool = False) -> tuple[list[Solid], str]:
    """One or two solids, one on top of the other, inside the window, and their names; plain: one of one colour."""
    count = 1 if plain else int(random.integers(1, 3))
    turn, solids, names = float(random.uniform(0, 2 * np.pi)), [], []
    height = 0.4 / count
    for i in range(count):
        kind: Literal["box", "ball"] = "box" if random.random() < 0.5 else "ball"
        front, back = random.choice(list(COLOURS), 2, replace=False).tolist()
        back = front if plain else back
        half = (float(random.uniform(0.15, 0.33)), float(random.uniform(0.15, 0.33)), height)
        solids.append(Solid(kind, (0.0, 0.0, (2 * i + 1) * height - 0.4), half, turn, (front, back)))
        names.append(f"{front} {kind}" if plain else f"{front} and {back} {kind}")
    return solids, " under a ".join(["a " + names[0], *names[1:]])


def render(solids: Sequence[Solid], cameras: Cameras, size: tuple[int, int]) -> Seen:
    """What orthographic cameras see of solids at ``size`` (height, width), each pixel through its centre."""
    height, width = size
    extent = cameras.extent
    x = ((torch.arange(width) + 0.5) / width - 0.5) * extent[:, :1]
    y = (0.5 - (torch.arange(height) + 0.5) / height) * extent[:, 1:]
    right, up = cameras.c2w[:, :3, 0], cameras.c2w[:, :3, 1]
    across = torch.einsum("vw,vi->vwi", x, right)[:, None] + torch.einsum("vh,vi->vhi", y, up)[:, :, None]
    origins = cameras.positions[:, None, None] + across
    along = cameras.forward[:, None, None].expand_as(origins)
    depth = torch.full(origins.shape[:3], torch.inf)
    colour, normals = torch.zeros_like(origins), torch.zeros_like(origins)
    for solid in solids:
        found, facing, tint = _cast(solid, origins, along)
        nearer = found < depth
        depth = torch.where(nearer, found, depth)
        colour = torch.where(nearer[..., None], tint, colour)
        normals = torch.where(nearer[..., None], facing, normals)
    hit = depth.isfinite()
    positions = torch.where(hit[..., None], origins + along * depth.where(hit, depth.new_zeros(()))[..., None], 0.0)
    return Seen(colour.permute(0, 3, 1, 2), hit.float(), positions, normals)


def _cast(solid: Solid, origins: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance along each ray (infinite where it misses), the normal and the colour there."""
    cosine, sine = float(np.cos(solid.turn)), float(np.sin(solid.turn))
    turned = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    half = torch.tensor(solid.half)
    o, d = (origins - torch.tensor(solid.centre)) @ turned / half, along @ turned / half  # the unit cube or ball
    d = torch.where(d.abs() < 1e-6, 1e-6, d)
    if solid.kind == "box":
        near = ((-1 - o) / d).minimum((1 - o) / d)
        far = ((-1 - o) / d).maximum((1 - o) / d)
        first, axis = near.max(-1)
        misses = first > far.min(-1).values
        local = torch.nn.functional.one_hot(axis, 3) * -d.sign()
    else:
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
        root = b * b - a * c
        misses, first = root < 0, (-b - root.clamp(min=0).sqrt()) / a
        local = o + first[..., None] * d
    at = o + first[..., None] * d
    facing = torch.nn.functional.normalize(local / half, dim=-1) @ turned.mT
    front, back = (torch.tensor(COLOURS[name]) for name in solid.colours)
    return first.masked_fill(misses, torch.inf), facing, torch.where(at[..., 1:2] < 0, front, back)
