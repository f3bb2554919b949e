"""A mesh painted by a multi-view model: it sees maps of the six sides, and its views are baked into a texture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.geometry.cameras import geometry_guided
from modalities.diffusion.geometry.meshes import Mesh, glb, normalised, read_mesh
from modalities.diffusion.geometry.rendering import geometry_maps
from modalities.diffusion.geometry.texture import Trust, bake, with_uv
from shared.errors import RequestError

SHARP = 768  # pixels of a side for which the published limit of the depth's gradient is meant


def prepared(path: Path, *, up: str, front: str, texels: int) -> Mesh:
    """The mesh of a file where the cameras look, with UVs that can carry a texture of ``texels`` a side.

    Raises RequestError as ``read_mesh`` does, and WorkError where it cannot be unwrapped.
    """
    return with_uv(normalised(read_mesh(path), up=up, front=front), texels)


def seen(mesh: Mesh, size: tuple[int, int]) -> Tensor:
    """Maps (6, 6, H, W) in 0 to 1 of the sides, what the model is told."""
    if size[0] != size[1]:
        raise RequestError(f"--size {size[1]}x{size[0]}: a mesh is seen in squares")
    return geometry_maps(mesh, geometry_guided(), size)


def painted(mesh: Mesh, views: np.ndarray, texels: int, told: Mapping[str, Any]) -> bytes:
    """The mesh as a GLB file, with what the views (6, H, W, 3), uint8, show of it as its texture.

    told: kept in the file, with the shares of the texture that views show and that are filled in.
    """
    images = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255
    coarse = max(1.0, SHARP / (2 * images.shape[-1]))  # a depth's step grows with the pixels; they are doubled first
    baked = bake(mesh, geometry_guided(), images, size=texels, trust=Trust(gradient=Trust.gradient * coarse))
    facts = {"seen": baked.seen, "filled": baked.filled, "texels": texels}
    return glb(mesh, baked.texture, {**told, **facts})
