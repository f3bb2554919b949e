"""Textures baked from exact renders of a known colour, and what must not reach a texel."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from modalities.diffusion.geometry.cameras import Cameras, geometry_guided, orthographic, perspective
from modalities.diffusion.geometry.meshes import Mesh, glb_metadata, normalised, read_mesh, unwrapped
from modalities.diffusion.geometry.rendering import Rays, render
from modalities.diffusion.geometry.texture import (
    Trust,
    bake,
    bicubic,
    blended,
    depth_gradients,
    filled,
    project,
    surface_texels,
    texture_file,
    with_uv,
)
from shared.errors import RequestError, WorkError
from tests.modalities.diffusion.shapes import box, colour, plate, sphere, torus, trimesh

SMALL = Trust(gradient=2.0)  # pixels of a small view are large: slopes give large steps


def exact(mesh: Mesh, cameras: Cameras, size: int) -> torch.Tensor:
    """(V, 3, size, size): views of a mesh that has ``colour`` at every point."""
    seen = render(mesh, cameras, (size, size))
    return torch.where(seen.mask[..., None], colour(seen.positions()), 0.5).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("shape", [torus, sphere, lambda: box(0.9, 0.6, 0.3)], ids=["torus", "sphere", "box"])
def test_a_texture_of_exact_views_is_the_colour_of_the_surface(shape) -> None:
    """What the views show comes back within the error of bilinear interpolation, curvature h^2 / 8."""
    mesh = unwrapped(shape(), size=128)
    texels = surface_texels(mesh, 128)
    seen = render(mesh, geometry_guided(), (128, 128))
    images = exact(mesh, geometry_guided(), 128)
    colours, known = blended(project(texels, seen, images, SMALL))
    wrong = (colours - colour(texels.positions))[known].abs()
    assert known.double().mean() > 0.75
    assert wrong.mean() < 5e-4
    assert wrong.max() < 0.01
    everywhere = (filled(texels, colours, known) - colour(texels.positions)).abs()
    assert everywhere.mean() < 0.01
    assert everywhere[known].equal(wrong)


def test_a_textured_mesh_looks_like_its_views() -> None:
    """Rendered with its new texture, from its cameras and from others between them."""
    mesh, between = unwrapped(sphere(), size=256), perspective((45, 130), (35, -35), distance=1.6)
    images = exact(mesh, geometry_guided(), 128)
    baked = bake(mesh, geometry_guided(), images, size=256, trust=SMALL)
    textured = dataclasses.replace(mesh, texture=baked.texture)
    assert baked.seen > 0.98
    assert baked.seen + baked.repainted + baked.filled == pytest.approx(1)
    for cameras in (geometry_guided(), between):
        seen = render(textured, cameras, (96, 96))
        wrong = (seen.colours() - colour(seen.positions()))[seen.mask].abs()
        assert wrong.mean() < 0.005
        assert wrong.max() < 0.06


def test_a_texel_behind_something_takes_nothing_from_it() -> None:
    """A small red plate before a large blue one: what it hides of the blue one stays unknown, and the rest is blue."""
    back, front = plate((-0.5, 0.2, -0.5), (1, 0, 0), (0, 0, 1)), plate((-0.2, -0.2, -0.2), (0.4, 0, 0), (0, 0, 0.4))
    assert front.uv is not None
    assert back.uv is not None
    mesh = Mesh(
        torch.cat([back.vertices, front.vertices]),
        torch.cat([back.faces, front.faces + 4]),
        torch.cat([back.normals, front.normals]),
        uv=torch.cat([back.uv * torch.tensor([0.5, 1]), front.uv * torch.tensor([0.5, 1]) + torch.tensor([0.5, 0])]),
    )
    texels, seen = surface_texels(mesh, 128), render(mesh, orthographic([0.0]), (110, 110))
    images = torch.where(seen.positions()[..., 1:2] > 0, torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]))
    colours, known = blended(project(texels, seen, images.permute(0, 3, 1, 2), Trust()))
    x, y, z = texels.positions.unbind(-1)
    hidden = (y > 0) & (x.abs() < 0.2) & (z.abs() < 0.2)
    assert not known[hidden].any()
    margin = (5 // 2 + 2) * 0.01  # the spread gradient, its own pixel and the lookup
    clear = (y > 0) & ((x.abs() > 0.2 + margin) | (z.abs() > 0.2 + margin)) & (torch.maximum(x.abs(), z.abs()) < 0.46)
    assert known[clear].all()
    assert (colours[clear] - torch.tensor([0.0, 0, 1])).abs().max() < 1e-6
    assert (colours[known & (y < 0)] - torch.tensor([1.0, 0, 0])).abs().max() < 1e-6
    assert known[(y < 0) & (x.abs() < 0.16) & (z.abs() < 0.16)].all()
    out = torch.maximum(x.abs(), z.abs())
    beside = (y > 0) & (out > 0.213) & (out < 0.222)  # visible, but a picture's outline may be a pixel off
    assert not known[beside].any()
    assert blended(project(texels, seen, images.permute(0, 3, 1, 2), Trust(gradient=1e9)))[1][beside].all()


def test_a_texel_is_known_where_a_ray_from_it_reaches_a_camera() -> None:
    """Visibility by comparing positions agrees with that by rays from the surface outwards."""
    mesh, cameras = unwrapped(torus(), size=128), geometry_guided()
    texels, seen = surface_texels(mesh, 128), render(mesh, cameras, (256, 256))
    normals = torch.nn.functional.normalize(texels.raster.interpolated(mesh.normals), dim=-1)
    rays, free = Rays(mesh.vertices, mesh.faces), []
    for towards in -cameras.forward:
        towards = towards.expand_as(normals)
        faces, _ = rays.first(texels.positions + 1e-4 * normals, towards)
        free.append((faces < 0) & ((normals * towards).sum(-1) > 0.2))
    views = project(texels, seen, seen.positions().permute(0, 3, 1, 2), Trust(gradient=1e9))
    for open_, (_, cosines) in zip(free, views, strict=True):
        assert 0.2 < open_.double().mean() < 0.6
        assert ((cosines > 0) != open_).double().mean() < 0.04  # the outlines, to a pixel


def test_views_count_by_the_cube_of_the_cosine() -> None:
    """A plate seen at 30 and 60 degrees from cameras that show black and white."""
    mesh = plate((-0.3, 0, -0.3), (0.6, 0, 0), (0, 0, 0.6))
    cameras = orthographic((-30, 60))
    texels, seen = surface_texels(mesh, 32), render(mesh, cameras, (64, 64))
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    middle = texels.positions.abs().amax(-1) < 0.1
    trust = Trust(gradient=1e9)
    a, b = 3**0.5 / 2, 0.5
    for weights, want in ((None, b**3 / (a**3 + b**3)), (torch.tensor([1.0, 3.0]), b / (a**3 + b))):
        colours, known = blended(project(texels, seen, images, trust), weights)
        assert known[middle].all()
        assert (colours[middle] - want).abs().max() < 1e-5
    steep = dataclasses.replace(trust, cosine=0.55)  # 60 degrees is too steep now
    colours, known = blended(project(texels, seen, images, steep))
    assert known[middle].all()
    assert not colours[middle].any()


def test_masks_keep_a_view_out() -> None:
    mesh, camera = plate((-0.5, 0, -0.5), (1, 0, 0), (0, 0, 1)), orthographic([0.0])
    images, mask = exact(mesh, camera, 110), torch.ones(1, 110, 110)
    mask[:, :, 55:] = 0
    texels = surface_texels(mesh, 50)
    _, known = blended(project(texels, render(mesh, camera, (110, 110)), images, Trust(), mask))
    x = texels.positions[:, 0]
    assert not known[x > 0.0].any()
    assert known[(x < -0.01) & (texels.positions.abs().amax(-1) < 0.46)].all()


def test_the_gradient_of_the_depth_is_sobels() -> None:
    """A ramp of 0.01 a pixel: 8 x 0.01 everywhere; a step of 1: 4, spread over the dilation."""
    ramp = (0.01 * torch.arange(12.0)).expand(1, 12, 12)
    assert (depth_gradients(ramp, 5)[:, :, 3:9] - 0.08).abs().max() < 1e-6
    step = (torch.arange(12) >= 6).float().expand(1, 12, 12)
    assert torch.equal(depth_gradients(step, 1)[0, 5], 4.0 * torch.isin(torch.arange(12), torch.tensor([5, 6])))
    assert torch.equal(depth_gradients(step.mT, 5)[0, :, 5], 4.0 * (torch.arange(12) - 5.5).abs().lt(3))


def test_the_padding_is_the_nearest_texel_and_leaves_charts_alone() -> None:
    mesh = plate((-0.5, 0, -0.5), (1, 0, 0), (0, 0, 1))
    assert mesh.uv is not None
    mesh = dataclasses.replace(mesh, uv=mesh.uv * 0.5 + 0.25)
    texels = surface_texels(mesh, 16)
    values = torch.rand(64, 3)
    image = texels.image(values)
    assert torch.equal(image[:, 4:12, 4:12], values.T.view(3, 8, 8))
    assert torch.equal(image[:, 6, :4], image[:, 6, 4:5].expand(3, 4))
    assert torch.equal(image[:, :4, :4], image[:, 4, 4][:, None, None].expand(3, 4, 4))
    assert torch.equal(texels.at(torch.tensor([[0.26, 0.74], [0.0, 1.0], [0.74, 0.26]])), torch.tensor([0, 0, 63]))


def test_bicubic_is_twice_the_size_and_within_0_to_1() -> None:
    images = torch.rand(2, 3, 8, 8).round()
    assert bicubic(images).shape == (2, 3, 16, 16)
    assert 0 <= bicubic(images).min() <= bicubic(images).max() <= 1
    assert torch.equal(bicubic(torch.full((1, 3, 4, 4), 0.25)), torch.full((1, 3, 8, 8), 0.25))


def test_what_does_not_fit_is_refused() -> None:
    mesh, cameras = plate((-0.5, 0, -0.5), (1, 0, 0), (0, 0, 1)), geometry_guided()
    good = torch.rand(6, 3, 16, 16)
    for said, images in {
        r"float \(6, 3, H, W\)": good[:5],
        "for as many cameras": good.mul(255).byte(),
        "values in 0 to 1, not -0.99": good * 2 - 1,
        "values in 0 to 1, not nan": good.clone().fill_(float("nan")),
    }.items():
        with pytest.raises(RequestError, match=said):
            bake(mesh, cameras, images, size=16)
    with pytest.raises(RequestError, match="no UVs"):
        bake(sphere(subdivisions=1), cameras, good, size=16)
    assert mesh.uv is not None
    with pytest.raises(RequestError, match="leave the unit square"):
        bake(dataclasses.replace(mesh, uv=3 * mesh.uv), cameras, good, size=16)
    with pytest.raises(RequestError, match="no texel lies on the surface"):
        bake(dataclasses.replace(mesh, uv=0 * mesh.uv), cameras, good, size=16)
    with pytest.raises(RequestError, match="at least 1 texel"):
        bake(mesh, cameras, good, size=0)
    for wrong in ({"masks": good[:5, 0]}, {"view_weights": torch.ones(5)}, {"view_weights": torch.zeros(6)}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            bake(mesh, cameras, good, size=16, **wrong)
    with pytest.raises(RequestError, match="dilation 4"):
        Trust(dilation=4)
    with pytest.raises(WorkError, match="no texel is seen by any view"):
        bake(mesh, orthographic([180.0]), good[:1], size=16)  # its back


def test_a_file_is_textured_whole_or_not_at_all(tmp_path) -> None:
    """An OBJ without UVs, off the origin and upright along its own z, comes back in its own coordinates."""
    shape = trimesh.creation.icosphere(subdivisions=3, radius=2.0)
    shape.apply_translation((5, 6, 7))
    (tmp_path / "a.obj").write_text(shape.export(file_type="obj"))
    mesh = normalised(read_mesh(tmp_path / "a.obj"), up="+z", front="-y")
    images = exact(mesh, geometry_guided(), 96)
    told = {"up": "+z", "front": "-y", "size": 128, "trust": SMALL, "upscaler": None}
    with pytest.raises(RequestError, match=r"written as \.glb"):
        texture_file(tmp_path / "a.obj", tmp_path / "b.obj", images, **told)
    with pytest.raises(ZeroDivisionError):
        texture_file(tmp_path / "a.obj", tmp_path / "b.glb", images, **{**told, "repaint": lambda *_: 1 / 0})
    assert os.listdir(tmp_path) == ["a.obj"]
    baked = texture_file(tmp_path / "a.obj", tmp_path / "b.glb", images, **told)
    assert baked.seen > 0.95
    assert glb_metadata(tmp_path / "b.glb") == {
        "source": "a.obj", "views": 6, "texels": 128, "seen": baked.seen, "repainted": 0.0, "filled": baked.filled
    }  # fmt: skip
    back = read_mesh(tmp_path / "b.glb")
    assert (back.vertices.amin(0) - torch.tensor([3, 4, 5])).abs().max() < 1e-5
    back = normalised(back, up="+z", front="-y")
    again = render(back, geometry_guided(), (96, 96))
    wrong = (again.colours().permute(0, 3, 1, 2) - images).abs() * again.mask[:, None]
    assert wrong.mean() < 0.003


def test_published_views_of_a_real_mesh_become_its_texture(materials) -> None:
    """Baked and rendered again, the figure has the colours of the views it was made of."""
    from PIL import Image

    folder = materials / "data" / "meshes_3d" / "multiview"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    sheet = np.array(Image.open(folder / "1ccd5c15_mv.png").convert("RGB").reduce(3))
    images = torch.from_numpy(sheet).float().div(255).reshape(256, 6, 256, 3).permute(1, 3, 0, 2).contiguous()
    mesh = with_uv(normalised(read_mesh(folder / "1ccd5c15.glb")), 512)
    baked = bake(mesh, geometry_guided(), images, size=512, upscaler=None, trust=Trust(gradient=1.0))
    again = render(dataclasses.replace(mesh, texture=baked.texture), geometry_guided(), (256, 256))
    inside = again.mask & (depth_gradients(again.depth(100.0), 3) < 1) & (again.cosines() > 0.3)
    wrong = (again.colours().permute(0, 3, 1, 2) - images).abs().mean(1)[inside]
    contrast = (0.5 - images).abs().mean(1)[inside].mean()
    assert inside.double().mean() > 0.08
    assert wrong.median() < 0.03
    assert wrong.mean() < 0.06 < contrast / 3
