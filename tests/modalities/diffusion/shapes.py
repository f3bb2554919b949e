"""Meshes whose renders are known by formula, and a colour for every point of space."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from modalities.diffusion.geometry.meshes import Mesh

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")
pytest.importorskip("xatlas")


def mesh_of(shape: Any) -> Mesh:
    """What trimesh made, with its own normals."""
    vertices, faces, normals = (torch.from_numpy(a.copy()) for a in (shape.vertices, shape.faces, shape.vertex_normals))
    return Mesh(vertices=vertices.double(), faces=faces.long(), normals=normals.float())


def sphere(radius: float = 0.4, subdivisions: int = 4) -> Mesh:
    """With exact normals."""
    mesh = mesh_of(trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius))
    return dataclasses.replace(mesh, normals=torch.nn.functional.normalize(mesh.vertices, dim=-1).float())


def box(*sides: float) -> Mesh:
    """Its triangles share no vertex, so that its normals are those of its sides."""
    shape = trimesh.creation.box(extents=sides or (1.0, 1.0, 1.0))
    shape.unmerge_vertices()
    return mesh_of(shape)


def torus() -> Mesh:
    """Around the z axis: it hides parts of itself."""
    return mesh_of(trimesh.creation.torus(major_radius=0.3, minor_radius=0.15, major_sections=48, minor_sections=24))


def plate(corner: tuple[float, float, float], across: tuple[float, ...], up: tuple[float, ...], **more: Tensor) -> Mesh:
    """A flat parallelogram whose texture is upright when seen from where across x up points to."""
    a, b, c = (torch.tensor(part, dtype=torch.float64) for part in (corner, across, up))
    normal = torch.nn.functional.normalize(torch.linalg.cross(b, c), dim=0).float()
    return Mesh(
        vertices=torch.stack([a, a + b, a + b + c, a + c]),
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
        normals=normal.expand(4, 3),
        uv=torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
        **more,
    )


def colour(points: Tensor) -> Tensor:
    """(*, 3) in 0 to 1: a smooth colour of every point of space."""
    x, y, z = points.unbind(-1)
    waves = [(9 * x).sin() + (7 * y).cos(), (8 * y + 1).sin() + (5 * z).cos(), (6 * z).sin() + (8 * x).cos()]
    return 0.5 + 0.25 * torch.stack(waves, -1)
