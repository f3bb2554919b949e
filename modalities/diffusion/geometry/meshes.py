"""Triangle meshes: read from any common file, brought into the frame of the cameras, unwrapped, written as GLB."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import RequestError, WorkError
from shared.store import check_readable, write_atomically

AXES = {sign + axis: (1 - 2 * (sign == "-")) * torch.eye(3)[i] for i, axis in enumerate("xyz") for sign in "+-"}
HALF = 0.5  # the greatest |coordinate| of a normalised mesh (Huang et al., 2024, MV-Adapter)


@dataclass(frozen=True, eq=False)
class Mesh:
    """N vertices and F triangles, on the CPU.

    vertices: (N, 3) float64.  faces: (F, 3) int64, counter-clockwise seen from outside.  normals: (N, 3), unit vectors.
    uv: (N, 2), (0, 0) is the lower left corner of the texture, or None.  colours: (N, 3) in 0 to 1, or None.
    texture: (3, height, width) in 0 to 1, row 0 is the top, or None.  to_file: (4, 4), from the coordinates here to
    those of the file.
    """

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    uv: Tensor | None = None
    colours: Tensor | None = None
    texture: Tensor | None = None
    to_file: Tensor = dataclasses.field(default_factory=lambda: torch.eye(4, dtype=torch.float64))

    @property
    def face_normals(self) -> Tensor:
        """(F, 3) float64: unit vectors, 0 for a triangle without area."""
        return torch.nn.functional.normalize(self._doubled(), dim=-1)

    @property
    def areas(self) -> Tensor:
        """(F,) float64."""
        return self._doubled().norm(dim=-1) / 2

    def _doubled(self) -> Tensor:
        a, b, c = self.vertices[self.faces].unbind(1)
        return torch.cross(b - a, c - a, dim=-1)


def read_mesh(path: str | Path) -> Mesh:
    """A mesh file (OBJ, GLB, glTF, PLY, STL, OFF …); the parts of a scene become one mesh, where the scene puts them.

    Normals are the file's; where it has none, the mean over the triangles that share the vertex. Textures of several
    materials become one.

    Raises RequestError where the file is missing, of another kind, broken, or holds no triangle with an area.
    """
    path = Path(path)
    check_readable(path)
    kind, known = path.suffix[1:].lower(), trimesh().available_formats()
    if kind not in known:
        raise RequestError(f"{path}: no mesh file by its name; read are {', '.join(sorted(known))}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parsers, about files that they then refuse
            parts = _parts(trimesh().load_scene(path, process=False))
            whole = trimesh().util.concatenate([part for part, _ in parts]) if parts else None
    except Exception as error:  # the parsers raise whatever a broken file makes them raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{path}: not a readable {kind.upper()} mesh, or truncated ({said[:200]})") from error
    if whole is None or not len(whole.faces):
        raise RequestError(f"{path}: no triangles in it (empty, or points or lines only)")
    return _checked(path, whole, np.concatenate([normals for _, normals in parts]))


def normalised(mesh: Mesh, *, up: str = "+y", front: str = "+z", centre: bool = True) -> Mesh:
    """The mesh in the frame of the cameras: up becomes +z, the front faces -y, and the greatest |coordinate| is 0.5.

    up, front: axes of the file; the defaults are those of glTF. The published texture script calls the front "+x".
    centre: the middle of the bounding box goes to the origin; False, as published: the origin stays where it is.
    """
    for name, axis in {"up": up, "front": front}.items():
        if axis not in AXES:
            raise RequestError(f"{name} {axis!r}: use {', '.join(AXES)}")
    if up[1] == front[1]:
        raise RequestError(f"up {up} and front {front}: two different axes are wanted")
    y, z = -AXES[front].double(), AXES[up].double()
    turn = torch.stack([torch.linalg.cross(y, z), y, z])
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    middle = (low + high) / 2 if centre else torch.zeros_like(low)
    moved = (mesh.vertices - middle) @ turn.T
    scale = HALF / moved.abs().max()
    back = torch.eye(4, dtype=torch.float64)
    back[:3, :3], back[:3, 3] = turn.T / scale, middle
    normals = (mesh.normals.double() @ turn.T).to(mesh.normals)
    return dataclasses.replace(mesh, vertices=moved * scale, normals=normals, to_file=mesh.to_file @ back)


def unwrapped(mesh: Mesh, *, size: int = 1024, padding: int = 4) -> Mesh:
    """The mesh with new UVs: charts without overlap, packed into the unit square (xatlas). Vertices on seams double.

    size: side of the texture they are packed for, texels.  padding: between charts, texels.

    Raises WorkError where a triangle gets no place (its area is 0 throughout, or the mesh is broken).
    """
    atlas, options = library("xatlas").Atlas(), library("xatlas").PackOptions()
    atlas.add_mesh(mesh.vertices.float().numpy(), mesh.faces.numpy().astype(np.uint32))
    options.resolution, options.padding = size, padding
    atlas.generate(pack_options=options)
    if not len(atlas) or not atlas.width:
        raise WorkError("unwrapping: no triangle of the mesh could be laid out")
    origins, faces, uv = (torch.from_numpy(part.astype(np.float64)) for part in atlas[0])
    kept = origins.long()
    return Mesh(
        vertices=mesh.vertices[kept],
        faces=faces.long(),
        normals=mesh.normals[kept],
        uv=uv.float(),
        colours=None if mesh.colours is None else mesh.colours[kept],
        to_file=mesh.to_file,
    )


def save_glb(path: str | Path, mesh: Mesh, texture: Tensor, metadata: Mapping[str, Any] | None = None) -> None:
    """Write what ``glb`` makes; the file is whole or not there."""
    path = Path(path)
    if path.suffix.lower() != ".glb":
        raise RequestError(f"{path}: textured meshes are written as .glb")
    try:
        data = glb(mesh, texture, metadata)
    except (RequestError, WorkError) as error:
        raise type(error)(f"{path}: {error}") from error
    write_atomically(path, data)


def glb(mesh: Mesh, texture: Tensor, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A GLB file of a mesh with its texture (3, height, width), in the coordinates of the file the mesh came from.

    metadata: JSON values about how it was made, kept in the file, see ``glb_metadata``.

    Raises RequestError where the mesh has no UVs, and WorkError where the bytes, read back, do not hold the mesh.
    """
    if mesh.uv is None:
        raise RequestError("a mesh without UVs cannot carry a texture; unwrap it first")
    turn, move = mesh.to_file[:3, :3], mesh.to_file[:3, 3]
    normals = torch.nn.functional.normalize(mesh.normals.double() @ turn.inverse(), dim=-1)
    image = (texture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    visual = trimesh().visual
    material = visual.material.PBRMaterial(
        baseColorFactor=[255, 255, 255, 255],
        baseColorTexture=library("PIL.Image").fromarray(image),
        metallicFactor=0.0,
        roughnessFactor=0.9,
    )

    def signed(tree: dict[str, Any]) -> None:
        tree["asset"] |= {"generator": "omniadapt", "extras": dict(metadata or {})}

    whole = trimesh().Trimesh(
        vertices=(mesh.vertices @ turn.T + move).numpy(),
        faces=mesh.faces.numpy(),
        vertex_normals=normals.numpy(),
        visual=visual.TextureVisuals(uv=mesh.uv.numpy(), material=material),
        process=False,
    )
    data = whole.export(file_type="glb", include_normals=True, tree_postprocessor=signed)
    _check_written(data, mesh, image)
    return data


def glb_metadata(path: str | Path) -> dict[str, Any]:
    """What ``save_glb`` was told of how a file was made; empty for the files of others."""
    check_readable(Path(path))
    data = Path(path).read_bytes()
    try:
        asset = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])["asset"]
        return dict(asset.get("extras", {})) if asset.get("generator") == "omniadapt" else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not a GLB file") from error


def _check_written(data: bytes, mesh: Mesh, image: np.ndarray) -> None:
    """Raises WorkError where the bytes of a GLB do not give back the mesh, its UVs and its texture."""
    assert mesh.uv is not None
    [(back, _)] = _parts(trimesh().load_scene(io.BytesIO(data), file_type="glb", process=False))
    want = (mesh.vertices @ mesh.to_file[:3, :3].T + mesh.to_file[:3, 3]).numpy()
    near = 1e-5 * np.abs(want).max()
    same = (
        back.vertices.shape == want.shape
        and np.array_equal(back.faces, mesh.faces.numpy())
        and np.abs(back.vertices - want).max() <= near
        and np.abs(back.visual.uv - mesh.uv.numpy()).max() <= 1e-5
        and np.array_equal(np.asarray(back.visual.material.baseColorTexture.convert("RGB")), image)
    )
    if not same:
        raise WorkError("the GLB does not read back as the mesh it was made of")


def _parts(scene: Any) -> list[tuple[Any, np.ndarray]]:
    """Every mesh of a scene in its place, with its normals there (trimesh would recompute them)."""
    parts = []
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        part = scene.geometry[name]
        if not isinstance(part, trimesh().Trimesh) or not len(part.faces):
            continue
        normals = part.vertex_normals @ np.linalg.inv(matrix[:3, :3])
        part = part.copy().apply_transform(matrix)
        if part.visual.kind == "face":  # a vertex has one colour here: each triangle gets vertices of its own
            normals = normals[part.faces.reshape(-1)]
            part.unmerge_vertices()
        parts.append((part, normals))
    return parts


def _checked(path: Path, whole: Any, normals: np.ndarray) -> Mesh:
    vertices, faces = np.asarray(whole.vertices, np.float64), np.asarray(whole.faces, np.int64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise RequestError(f"{path}: a triangle names vertex {faces.max()}, and there are {len(vertices)}")
    if not np.isfinite(vertices).all():
        bad = ~np.isfinite(vertices).all(axis=1, keepdims=True)
        raise RequestError(
            f"{path}: {bad.sum()} of {len(vertices)} vertices are not finite, the first is number {bad.argmax()}"
        )
    colours, texture, uv = _appearance(whole.visual)
    mesh = Mesh(
        vertices=torch.from_numpy(vertices.copy()),
        faces=torch.from_numpy(faces.copy()),
        normals=torch.nn.functional.normalize(torch.from_numpy(np.nan_to_num(normals)).float(), dim=-1),
        uv=uv,
        colours=colours,
        texture=texture,
    )
    if not bool((mesh.areas > 0).any()):
        raise RequestError(f"{path}: none of its {len(faces)} triangles has an area")
    return mesh


def _appearance(visual: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Colours (N, 3), texture (3, height, width) and UVs (N, 2) of what trimesh read, each where it is there."""
    if visual.kind != "texture" or visual.uv is None or not np.isfinite(visual.uv).all():
        has = visual.kind in ("vertex", "face")
        return (torch.from_numpy(visual.vertex_colors[:, :3] / np.float32(255)) if has else None), None, None
    uv, material = torch.from_numpy(np.asarray(visual.uv, np.float32).copy()), visual.material
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    factor = getattr(material, "baseColorFactor", None)
    factor = np.ones(3, np.float32) if factor is None else np.asarray(factor)[:3] / np.float32(255)
    if image is None:
        return torch.from_numpy(factor).expand(len(uv), 3), None, uv
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255 * factor
    return None, torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), uv


def library(name: str) -> Any:
    """One of the libraries of meshes. Raises RequestError that says how to install it, where it is absent."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"meshes need {name}: pip install 'omniadapt[diffusion]'") from error


def trimesh() -> Any:
    """The library that reads and writes the files."""
    return library("trimesh")
