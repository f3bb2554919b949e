"""Mesh files of every common kind, broken ones included; the frame of the cameras, new UVs, and GLB files."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from modalities.diffusion.geometry import meshes
from modalities.diffusion.geometry.meshes import Mesh, normalised, read_mesh, save_glb, unwrapped
from modalities.diffusion.geometry.texture import overlap, with_uv
from shared.errors import RequestError, WorkError
from tests.modalities.diffusion.shapes import box, plate, sphere, torus, trimesh

KINDS = ("obj", "ply", "stl", "off", "glb")


def triangles(mesh: Mesh) -> torch.Tensor:
    """(F, 9) in an order that does not depend on how the file orders them."""
    corners = mesh.vertices[mesh.faces]
    first = torch.tensor([np.lexsort(face.T.numpy()[::-1])[0] for face in corners.mul(1e4).round()])
    turned = torch.stack([corners[i].roll(-int(k), 0) for i, k in enumerate(first)]).flatten(1)
    return turned[torch.from_numpy(np.lexsort(turned.mul(1e4).round().T.numpy()[::-1]).copy())]


def written(path, shape) -> None:
    path.write_bytes(data if isinstance(data := shape.export(file_type=path.suffix[1:]), bytes) else data.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_triangles(kind, tmp_path) -> None:
    shape = trimesh.creation.box(
        extents=(1.0, 2.0, 3.0), transform=trimesh.transformations.rotation_matrix(1, (1, 2, 3))
    )
    written(tmp_path / f"a.{kind}", shape)
    mesh = read_mesh(tmp_path / f"a.{kind}")
    want = Mesh(torch.from_numpy(shape.vertices.copy()), torch.from_numpy(shape.faces.copy()), torch.zeros(8, 3))
    assert (triangles(mesh) - triangles(want)).abs().max() < 1e-5
    assert mesh.areas.sum().item() == pytest.approx(22, rel=1e-5)
    assert (mesh.normals.norm(dim=-1) - 1).abs().max() < 1e-5
    outwards = (mesh.face_normals * mesh.vertices[mesh.faces].mean(1)).sum(-1)
    assert outwards.min() > 0


def test_the_parts_of_a_scene_stand_where_it_puts_them(tmp_path) -> None:
    """One is moved, one turned, mirrored and stretched: normals stay outward, at right angles to the sides."""
    scene = trimesh.Scene()
    shape = trimesh.creation.box()
    shape.unmerge_vertices()
    moved, mirrored = np.eye(4), np.diag([-1.0, 3.0, 1.0, 1.0])
    moved[:3, 3], mirrored[:3, 3] = (4, 0, 0), (-4, 0, 0)
    mirrored = mirrored @ trimesh.transformations.rotation_matrix(np.pi / 4, (0, 0, 1))
    scene.add_geometry(shape, geom_name="box", node_name="a", transform=moved)
    scene.add_geometry(shape, geom_name="box", node_name="b", transform=mirrored)
    written(tmp_path / "a.glb", scene)
    mesh = read_mesh(tmp_path / "a.glb")
    assert len(mesh.faces) == 24
    assert (mesh.vertices.amin(0) - torch.tensor([-4.70711, -2.12132, -0.5])).abs().max() < 1e-5
    assert (mesh.vertices.amax(0) - torch.tensor([4.5, 2.12132, 0.5])).abs().max() < 1e-5
    assert mesh.areas.sum().item() == pytest.approx(6 + 6 + 4 * 5**0.5)
    assert (mesh.normals[mesh.faces] - mesh.face_normals[:, None]).abs().max() < 1e-5
    corners = mesh.vertices[mesh.faces].mean(1)
    centre = torch.where(corners[:, :1] > 0, 4.0, -4.0) * torch.tensor([1.0, 0, 0])
    assert ((corners - centre) * mesh.face_normals).sum(-1).min() > 0.4


def test_colours_of_vertices_triangles_and_materials(tmp_path) -> None:
    shape = trimesh.creation.box()
    rgba = np.random.default_rng(0).integers(0, 255, (12, 4), dtype=np.uint8)
    shape.visual.vertex_colors = rgba[:8]
    written(tmp_path / "v.ply", shape)
    mesh = read_mesh(tmp_path / "v.ply")
    assert mesh.colours is not None
    assert np.allclose(mesh.colours.numpy() * 255, rgba[:8, :3], atol=1e-3)
    shape = trimesh.creation.box()
    shape.visual.face_colors = rgba
    written(tmp_path / "f.ply", shape)
    mesh = read_mesh(tmp_path / "f.ply")
    assert mesh.colours is not None
    for corner in range(3):
        assert np.allclose(mesh.colours[mesh.faces[:, corner]].numpy() * 255, rgba[:, :3], atol=1e-3)
    assert (mesh.normals * mesh.vertices).sum(-1).min() > 0.5  # each vertex kept its own


def test_a_material_tints_its_texture(tmp_path) -> None:
    from PIL import Image

    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[255, 51, 0, 255], baseColorTexture=Image.new("RGB", (4, 4), (100, 100, 100))
    )
    shape = trimesh.creation.box()
    shape.visual = trimesh.visual.TextureVisuals(uv=np.full((8, 2), 0.5), material=material)
    written(tmp_path / "a.glb", shape)
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.texture is not None
    want = torch.tensor([100, 20, 0]) / 255
    assert (mesh.texture - want[:, None, None]).abs().max() < 1e-6
    material.baseColorTexture = None
    written(tmp_path / "a.glb", shape)
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.texture is None
    assert mesh.colours is not None
    assert (mesh.colours - torch.tensor([1, 0.2, 0])).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "gltf", "xyz", "txt"])
@pytest.mark.parametrize("content", [b"", b"hello\n" * 20, b"\x00" * 200, b"glTF\x02\x00\x00\x00" + b"\xff" * 99])
def test_what_is_no_mesh_is_refused_in_one_line(kind, content, tmp_path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    with pytest.raises(RequestError) as told:
        read_mesh(path)
    assert str(told.value).startswith(f"{path}: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["glb", "stl", "ply"])
def test_a_truncated_file_is_refused(kind, tmp_path) -> None:
    path = tmp_path / f"a.{kind}"
    written(path, trimesh.creation.icosphere(subdivisions=2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(RequestError, match="truncated"):
        read_mesh(path)


def test_bad_meshes_are_refused_with_what_is_wrong(tmp_path) -> None:
    cases = {
        "no triangles": "v 0 0 0\nv 1 0 0\nv 0 1 0\n",
        "2 of 4 vertices are not finite, the first is number 1": (
            "v 0 0 0\nv nan 0 0\nv 0 1 0\nv 0 inf 1\nf 1 2 3\nf 1 3 4\n"
        ),
        "none of its 1 triangles has an area": "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n",
    }
    for number, (said, text) in enumerate(cases.items()):
        (tmp_path / f"{number}.obj").write_text(text)
        with pytest.raises(RequestError, match=said):
            read_mesh(tmp_path / f"{number}.obj")
    (tmp_path / "index.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n")
    with pytest.raises(RequestError, match="index.obj: "):
        read_mesh(tmp_path / "index.obj")
    with pytest.raises(RequestError, match="no such file"):
        read_mesh(tmp_path / "none.obj")
    with pytest.raises(RequestError, match="a folder, not a file"):
        read_mesh(tmp_path)


def test_normalised_turns_moves_and_scales_and_knows_the_way_back() -> None:
    mesh = dataclasses.replace(box(1.0, 2.0, 4.0))
    mesh = dataclasses.replace(mesh, vertices=mesh.vertices + torch.tensor([5.0, 0.0, 0.0]))
    for up, front in (("+y", "+z"), ("+z", "-y"), ("-x", "+y"), ("+z", "+x")):
        ours = normalised(mesh, up=up, front=front)
        assert ours.vertices.abs().max() == 0.5
        assert (ours.vertices.amin(0) + ours.vertices.amax(0)).abs().max() < 1e-12
        back = ours.vertices @ ours.to_file[:3, :3].T + ours.to_file[:3, 3]
        assert (back - mesh.vertices).abs().max() < 1e-12
        assert (ours.normals[ours.faces] - ours.face_normals[:, None]).abs().max() < 1e-6  # turned, not mirrored
    moved = normalised(mesh, centre=False)
    assert moved.vertices[:, 0].min() > 0.4  # its origin stays
    assert moved.vertices.abs().max() == 0.5
    points = dataclasses.replace(mesh, vertices=torch.tensor([[0.0, 1, 0], [0, 0, 2], [0, -1, -2]]).double())
    turned = normalised(points).vertices
    assert torch.allclose(turned, torch.tensor([[0.0, 0, 0.25], [0, -0.5, 0], [0, 0.5, -0.25]]).double())
    for wrong in ({"up": "y"}, {"up": "+y", "front": "-y"}):
        with pytest.raises(RequestError):
            normalised(mesh, **wrong)


@pytest.mark.parametrize("shape", [torus, sphere, box])
def test_new_uvs_lie_in_the_square_apart_from_each_other(shape) -> None:
    mesh = shape()
    ours = unwrapped(mesh, size=256)
    assert ours.uv is not None
    assert 0 <= ours.uv.min() <= ours.uv.max() <= 1
    assert torch.equal(ours.vertices[ours.faces], mesh.vertices[mesh.faces])  # the same triangles in their order
    assert torch.equal(ours.normals[ours.faces], mesh.normals[mesh.faces])
    assert overlap(ours, 256) < 1e-3
    again = unwrapped(mesh, size=256)
    assert torch.equal(again.uv, ours.uv)


def test_uvs_that_cannot_carry_a_texture_are_renewed() -> None:
    good = plate((-0.5, 0, -0.5), (1, 0, 0), (0, 0, 1))
    assert with_uv(good) is good
    assert overlap(good, 64) == 0
    stacked = dataclasses.replace(
        good, uv=torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.2]])
    )  # both triangles below the diagonal
    assert overlap(stacked, 256) == pytest.approx(0.8, abs=0.01)
    repeated = dataclasses.replace(good, uv=2 * good.uv)
    for mesh in (stacked, repeated, sphere(subdivisions=1)):
        ours = with_uv(mesh, 128)
        assert ours is not mesh
        assert overlap(ours, 256) < 0.01


def test_a_glb_holds_the_mesh_in_the_coordinates_of_its_file(tmp_path) -> None:
    mesh = box(1.0, 2.0, 4.0)
    mesh = dataclasses.replace(mesh, vertices=mesh.vertices + torch.tensor([5.0, -7.0, 0.0]))
    ours = unwrapped(normalised(mesh), size=64)
    picture = torch.rand(3, 64, 64)
    save_glb(tmp_path / "a.glb", ours, picture, {"views": 6, "source": "ü.obj"})
    assert meshes.glb_metadata(tmp_path / "a.glb") == {"views": 6, "source": "ü.obj"}
    written(tmp_path / "other.glb", trimesh.creation.box())
    assert meshes.glb_metadata(tmp_path / "other.glb") == {}
    (tmp_path / "none.glb").write_bytes(b"glTF")
    with pytest.raises(RequestError, match="not a GLB file"):
        meshes.glb_metadata(tmp_path / "none.glb")
    back = read_mesh(tmp_path / "a.glb")
    assert (triangles(back) - triangles(mesh)).abs().max() < 1e-5
    assert (back.normals[back.faces] - back.face_normals[:, None]).abs().max() < 1e-5
    assert back.texture is not None
    assert back.uv is not None
    assert ours.uv is not None
    assert (back.texture - picture).abs().max() <= 0.5 / 255 + 1e-6
    assert (back.uv - ours.uv).abs().max() < 1e-6


def test_nothing_half_written(tmp_path, monkeypatch) -> None:
    mesh, picture = plate((0, 0, 0), (1, 0, 0), (0, 0, 1)), torch.rand(3, 8, 8)
    with pytest.raises(RequestError, match="unwrap it first"):
        save_glb(tmp_path / "a.glb", sphere(subdivisions=1), picture)
    with pytest.raises(RequestError, match="written as .glb"):
        save_glb(tmp_path / "a.obj", mesh, picture)
    export = trimesh.Trimesh.export

    def damaged(self, **kwargs):
        self.vertices[0] += 0.01
        return export(self, **kwargs)

    monkeypatch.setattr(trimesh.Trimesh, "export", damaged)
    with pytest.raises(WorkError, match="does not read back"):
        save_glb(tmp_path / "a.glb", mesh, picture)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkError, match="cannot be written"):
        save_glb(tmp_path / "file" / "a.glb", mesh, picture)


def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0\n")
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(RequestError, match=r"meshes need trimesh: pip install 'omniadapt\[diffusion\]'"):
        read_mesh(tmp_path / "a.obj")
    assert meshes.AXES["-y"].tolist() == [0, -1, 0]


REAL = {
    "BoxTextured.glb": (12, True), "Duck.glb": (4212, True), "alligator.obj": (5981, False), "cow.obj": (5804, False),
    "cube.OBJ": (12, False), "rabbit.obj": (1252, False), "suzanne.ply": (968, True), "unit_sphere.STL": (1280, False),
    "multiview/1ccd5c15.glb": (7311, True),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files(name, materials) -> None:
    path = materials / "data" / "meshes_3d" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    faces, textured = REAL[name]
    mesh = normalised(read_mesh(path))
    assert (len(mesh.faces), mesh.texture is not None) == (faces, textured)
    assert mesh.vertices.abs().max().item() == pytest.approx(0.5, abs=1e-12)
    flat = mesh.face_normals.float()
    agree = (mesh.normals[mesh.faces].mean(1) * flat).sum(-1)[mesh.areas > 1e-9]
    assert (agree > 0).double().mean() > 0.98
    with pytest.raises(RequestError, match="no triangles"):
        read_mesh(materials / "data" / "meshes_3d" / "points_ascii.ply")
