"""Renders of a sphere, a box and loose triangles against formulas, and of a real mesh against published views of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from modalities.diffusion.geometry import cameras as views
from modalities.diffusion.geometry.cameras import geometry_guided, orthographic, perspective
from modalities.diffusion.geometry.meshes import Mesh, normalised, read_mesh
from modalities.diffusion.geometry.rendering import Rays, geometry_maps, render, sampled, unfolded
from shared.errors import RequestError
from tests.modalities.diffusion.shapes import box, colour, plate, sphere

BOTH = {
    "orthographic": orthographic((0, 90, 200), (0, 30, -89.99)),
    "perspective": perspective((0, 90, 200), (0, 30, -60), distance=1.6, fov=40),
}


@pytest.mark.parametrize("kind", BOTH)
def test_a_sphere_is_where_the_formula_puts_it(kind) -> None:
    """The rays meet x^2 = r^2 at eye + t d; the triangles lie at most r (1 - cos(edge / 2)) inside."""
    cameras, radius, size = BOTH[kind], 0.4, (40, 56)
    seen = render(sphere(radius, 5), cameras, size)
    c2w = cameras.c2w.double()
    x = (torch.arange(56) + 0.5) / 28 - 1
    y = 1 - (torch.arange(40) + 0.5) / 20
    y, x = torch.meshgrid(y.double(), x.double(), indexing="ij")
    eye = c2w[:, None, None, :3, 3].expand(3, 40, 56, 3)
    if kind == "orthographic":
        side = torch.stack([0.55 * x, 0.55 * y, 0 * x], -1)
        eye, ray = eye + torch.einsum("vij,hwj->vhwi", c2w[:, :3, :3], side), -c2w[:, None, None, :3, 2]
        ray = ray.expand_as(eye)
    else:
        tan = np.tan(np.deg2rad(20))
        ray = torch.einsum("vij,hwj->vhwi", c2w[:, :3, :3], torch.stack([tan * x, tan * y, -1 + 0 * x], -1))
    half, square = (eye * ray).sum(-1) / (ray**2).sum(-1), (ray**2).sum(-1)
    inside = half**2 - ((eye**2).sum(-1) - radius**2) / square
    hit = inside > 0
    assert (seen.mask != hit).double().mean() < 0.01  # the outline alone
    sure = hit & seen.mask & (inside * square > 0.004)  # away from the outline
    assert sure.double().mean() > 0.2
    t = -half - inside.clamp(min=0).sqrt()
    want = eye + t[..., None] * ray
    assert (seen.positions() - want)[sure].norm(dim=-1).max() < 2e-3
    assert (seen.depth() - t)[sure].abs().max() < 2e-3  # both rays advance 1 along the view for each unit of t
    assert (seen.normals() - want / radius)[sure].abs().max() < 5e-3
    assert (seen.normals(smooth=False) - want / radius)[sure].abs().max() < 0.05
    unit = torch.nn.functional.normalize(ray, dim=-1)
    assert (seen.cosines() + (unit * want / radius).sum(-1))[sure].abs().max() < 8e-3
    assert not seen.positions()[~seen.mask].any()
    assert not seen.cosines()[~seen.mask].any()


def test_a_box_is_exact() -> None:
    """From the front: a plane at y = -0.3, 0.8 wide and 0.6 high, in the middle of a window 1.1 wide."""
    seen = render(box(0.8, 0.6, 0.4), orthographic([0.0]), (110, 110))
    mask = torch.zeros(1, 110, 110, dtype=torch.bool)
    mask[:, 35:75, 15:95] = True
    assert torch.equal(seen.mask, mask)
    x, z = (torch.arange(110) + 0.5) / 100 - 0.55, 0.55 - (torch.arange(110) + 0.5) / 100
    want = torch.stack([x.expand(110, 110), torch.full((110, 110), -0.3), z[:, None].expand(110, 110)], -1)
    assert (seen.positions()[0] - want)[mask[0]].abs().max() < 1e-6
    assert (seen.depth()[mask] - 1.5).abs().max() < 1e-6
    assert (seen.normals()[mask] - torch.tensor([0.0, -1.0, 0.0])).abs().max() < 1e-6
    assert torch.equal(seen.depth(100.0)[~mask], torch.full((mask.logical_not().sum(),), 100.0))


@pytest.mark.parametrize("kind", BOTH)
def test_the_first_of_many_loose_triangles_is_seen(kind) -> None:
    """Against the same question asked of every triangle in turn."""
    vertices = torch.rand(3 * 40, 3, dtype=torch.float64) - 0.5
    mesh = Mesh(vertices, torch.arange(120).view(40, 3), torch.zeros(120, 3))
    seen = render(mesh, BOTH[kind], (24, 24))
    each = [render(dataclasses.replace(mesh, faces=mesh.faces[[i]]), BOTH[kind], (24, 24)) for i in range(40)]
    depths = torch.stack([one.depth(100.0) for one in each])
    want = torch.where((depths < 100).any(0), depths.argmin(0), -1)
    assert (seen.faces == want).double().mean() > 0.999
    assert seen.faces.unique().numel() > 10
    assert (seen.weights.sum(-1)[seen.mask] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", BOTH)
def test_what_is_seen_lies_under_its_pixel(kind) -> None:
    """Positions projected with the cameras' own matrices come back to the centres of their pixels."""
    cameras = BOTH[kind]
    seen = render(sphere(), cameras, (32, 48))
    for view, matrix in enumerate(cameras.mvp):
        rows, columns = seen.mask[view].nonzero().T
        clip = torch.nn.functional.pad(seen.positions()[view][rows, columns], (0, 1), value=1.0) @ matrix.T
        place = clip[:, :2] / clip[:, 3:]
        want = torch.stack([(columns + 0.5) / 24 - 1, (rows + 0.5) / 16 - 1], -1)
        assert (place - want).abs().max() < 1e-5


def test_geometry_maps_agree_with_the_depth_and_are_grey_around() -> None:
    cameras, mesh = geometry_guided(), sphere()
    maps, seen = geometry_maps(mesh, cameras, (48, 48)), render(mesh, cameras, (48, 48))
    assert maps.shape == (6, 6, 48, 48)
    assert 0 <= maps.min() <= maps.max() <= 1
    around = (~seen.mask)[:, None].expand_as(maps)
    assert torch.equal(maps[around], torch.full((around.sum(),), 0.5))
    from_depth = views.positions_from_depth(cameras, seen.depth(), seen.mask)
    assert (maps[:, :3] - 0.5 - from_depth.permute(0, 3, 1, 2)).abs().max() < 1e-5
    centre = maps[:, :, 23:25, 23:25].mean((2, 3))  # front, right, back, left, top, bottom
    sides = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1]])
    assert (centre[:, :3] - (0.5 + 0.4 * sides)).abs().max() < 2e-3
    assert (centre[:, 3:] - (0.5 + 0.5 * sides)).abs().max() < 1e-3


def test_normals_are_smooth_or_those_of_the_triangles() -> None:
    mesh, camera = sphere(subdivisions=1), orthographic([10.0])
    flat, smooth = geometry_maps(mesh, camera, (32, 32), smooth=False), geometry_maps(mesh, camera, (32, 32))
    assert flat[0, 3:].flatten(1).T.unique(dim=0).shape[0] < 60  # one for each of the triangles in view
    assert smooth[0, 3:].flatten(1).T.unique(dim=0).shape[0] > 300


def test_colours_of_vertices_and_of_a_texture() -> None:
    camera = orthographic([0.0])
    linear = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.9, 0.8, 0.3], [0.1, 0.8, 0.3]])
    mesh = plate((-0.55, 0, -0.55), (1.1, 0, 0), (0, 0, 1.1), colours=linear)
    at = (torch.arange(16) + 0.5) / 16
    want = torch.stack([(0.1 + 0.8 * at).expand(16, 16), (0.8 - 0.6 * at)[:, None].expand(16, 16)], -1)
    got = render(mesh, camera, (16, 16)).colours()[0]
    assert (got[..., :2] - want).abs().max() < 1e-6
    picture = torch.rand(3, 16, 16)
    textured = dataclasses.replace(mesh, texture=picture)
    got = render(textured, camera, (16, 16)).colours()[0]
    assert (got.permute(2, 0, 1) - picture).abs().max() < 1e-5  # a pixel on every texel, upright, not mirrored
    with pytest.raises(RequestError, match="neither a texture nor colours"):
        render(sphere(), camera, (4, 4)).colours()


def test_a_texture_repeats_beyond_its_border() -> None:
    picture = torch.arange(8.0).view(1, 2, 4)
    uv = torch.tensor([[0.125, 0.75], [0.25, 0.75], [1.125, 0.75], [0.125, -0.25], [0.0, 0.75], [0.125, 0.5]])
    assert torch.allclose(sampled(picture, uv)[:, 0], torch.tensor([0.0, 0.5, 0.0, 0.0, 1.5, 2.0]), atol=1e-5)


def test_an_unfolded_mesh_is_its_triangles_in_the_texture() -> None:
    mesh = plate((-0.5, 0, -0.5), (1, 0, 0), (0, 0, 1))
    raster = unfolded(mesh, 8)
    assert raster.mask.all()
    at = (torch.arange(8) + 0.5) / 8 - 0.5
    assert (raster.positions()[..., 0] - at).abs().max() < 1e-6
    assert (raster.positions()[..., 2] + at[:, None]).abs().max() < 1e-6  # row 0 is the top
    with pytest.raises(RequestError, match="no UVs"):
        unfolded(sphere(), 8)


def test_rays_that_miss_and_rays_from_inside() -> None:
    mesh = box()
    rays = Rays(mesh.vertices, mesh.faces)
    start = torch.zeros(2, 3)
    start[1, 0] = 3.0
    faces, weights = rays.first(start, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    assert faces[1] == -1
    assert not weights[1].any()
    assert (weights[0] @ mesh.vertices[mesh.faces[faces[0]]].float() - torch.tensor([0.5, 0, 0])).abs().max() < 1e-6


def test_published_views_of_a_real_mesh_have_its_outline(materials) -> None:
    """Six views that the published model made of this mesh: each has the outline of its own camera and of no other
    (but that front and back of this figure mirror each other)."""
    from PIL import Image

    folder = materials / "data" / "meshes_3d" / "multiview"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    sheet = np.array(Image.open(folder / "1ccd5c15_mv.png").convert("RGB").reduce(3))
    pictures = torch.from_numpy(sheet).float().div(255).reshape(256, 6, 256, 3).transpose(0, 1)
    drawn = (pictures - pictures[:, :4, :4].mean((1, 2), keepdim=True)).abs().amax(-1) > 0.06
    seen = render(normalised(read_mesh(folder / "1ccd5c15.glb")), geometry_guided(), (256, 256)).mask
    alike = [[float((a & b).sum() / (a | b).sum()) for b in drawn] for a in seen]
    assert min(alike[i][i] for i in range(6)) > 0.94
    assert max(alike[i][j] for i in range(6) for j in range(6) if i != j and {i, j} != {0, 2}) < 0.7


def test_colour_is_a_colour() -> None:
    assert 0 <= colour(torch.rand(1000, 3) - 0.5).min() <= colour(torch.rand(1000, 3) - 0.5).max() <= 1
