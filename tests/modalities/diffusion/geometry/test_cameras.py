"""Cameras look where they say, project as they back-project, and tell it in maps."""

from __future__ import annotations

import math

import pytest
import torch

from modalities.diffusion.geometry.cameras import (
    SIDES,
    VIEWS,
    Cameras,
    geometry_guided,
    geometry_maps,
    orthographic,
    perspective,
    positions_from_depth,
    ray_maps,
    rays,
    view_guided,
)
from shared.errors import RequestError


def test_the_front_camera():
    front = view_guided()[[0]]
    assert front.names == ("front",)
    torch.testing.assert_close(front.positions, torch.tensor([[0.0, -1.8, 0.0]]))
    torch.testing.assert_close(rays(front, (2, 3))[0, :, 1, 2], torch.tensor([0.0, 1, 0, 0, -1, 0]))
    torch.testing.assert_close(ray_maps(front, (2, 3))[0, :, 0, 0], torch.tensor([0.5, 1, 0.5, 0.5, 0, 0.5]))
    right = torch.tensor([0.275, 0.0, 0.275, 1.0])  # seen at half way to the right and half way up
    torch.testing.assert_close((front.mvp @ right)[0, :2], torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("cameras", [view_guided(), geometry_guided(), perspective((10, 200), (30, -60), distance=1.2)])
def test_forward_is_minus_the_position_and_axes_are_a_right_handed_frame(cameras):
    torch.testing.assert_close(cameras.forward, -torch.nn.functional.normalize(cameras.positions, dim=-1))
    turned = cameras.c2w[:, :3, :3]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand_as(turned), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(len(cameras)))
    torch.testing.assert_close(cameras.w2c @ cameras.c2w, torch.eye(4).expand(len(cameras), 4, 4), atol=1e-6, rtol=0)


def test_published_views_and_fewer_of_them():
    assert (view_guided().names, geometry_guided().names) == (VIEWS, SIDES)
    assert view_guided(4).names == ("front", "right", "back", "left")
    assert view_guided(2).names == ("front", "back")
    twelve = view_guided(12)
    torch.testing.assert_close(twelve.positions[3], view_guided()[[2]].positions[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(geometry_guided()[[4, 5]].forward[:, 2], torch.tensor([-1.0, 1.0]))
    with pytest.raises(RequestError, match="views 0: at least 1"):
        view_guided(0)
    with pytest.raises(RequestError, match=r"must be \(1, 4, 4\) for 1 names"):
        Cameras(twelve.c2w, twelve.projection, ("one",))


def test_perspective_rays_hit_the_pixels_they_come_from():
    cameras = perspective((20, 130), (10, -40), distance=(1.2, 2.0), fov=40, aspect=1.5)
    height, width = 4, 6
    told = rays(cameras, (height, width)).permute(0, 2, 3, 1)
    direction, moment = told.split(3, -1)
    origin = cameras.positions[:, None, None].expand_as(direction)
    torch.testing.assert_close(moment, torch.cross(origin, direction, dim=-1))
    points = torch.cat([origin + 0.9 * direction, torch.ones(2, height, width, 1)], -1)
    clip = torch.einsum("vij,vhwj->vhwi", cameras.mvp, points)
    x, y = (clip[..., :2] / clip[..., 3:]).unbind(-1)
    torch.testing.assert_close(x[1, 2], (torch.arange(6) + 0.5) / 3 - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(y[0, :, 3], (torch.arange(4) + 0.5) / 2 - 1, atol=1e-5, rtol=0)
    focal = 0.5 * height / math.tan(math.radians(20))
    assert math.isclose(-float(cameras.projection[0, 1, 1]) * height / 2, focal, rel_tol=1e-6)


def test_positions_from_depth_project_back_to_their_pixels():
    cameras = geometry_guided()
    depth = 1.3 + torch.rand(6, 5, 5)
    mask = torch.ones(6, 5, 5, dtype=torch.bool)
    mask[:, 0] = False
    positions = positions_from_depth(cameras, depth, mask)
    assert not positions[:, 0].any()
    clip = torch.einsum("vij,vhwj->vhwi", cameras.mvp, torch.cat([positions, torch.ones(6, 5, 5, 1)], -1))
    torch.testing.assert_close(clip[0, 3, :, 0], (torch.arange(5) + 0.5) / 2.5 - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(clip[5, 1:, 2, 1], (torch.arange(1, 5) + 0.5) / 2.5 - 1, atol=1e-6, rtol=0)
    corners = positions_from_depth(cameras, depth, mask, centres=False)
    torch.testing.assert_close((corners - positions)[0, 1, 0], torch.tensor([-0.11, 0.0, 0.11]), atol=1e-6, rtol=0)
    with pytest.raises(RequestError, match="orthographic"):
        positions_from_depth(perspective((0,)), depth[:1], mask[:1])


def test_geometry_maps_are_grey_where_there_is_nothing():
    positions, normals = torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 3)
    positions[0, 0, 1], normals[0, 0, 1] = torch.tensor([0.25, -0.5, 0.7]), torch.tensor([0.0, 0.6, -0.8])
    maps = geometry_maps(positions, normals)
    torch.testing.assert_close(maps[0, :, 0, 1], torch.tensor([0.75, 0.0, 1.0, 0.5, 0.8, 0.1]))
    assert (maps[1] == 0.5).all()


def test_orthographic_images_of_other_sizes():
    wide = orthographic((0,), scale=2.0)
    torch.testing.assert_close(wide.extent, torch.tensor([[2.0, 2.0]]))
    assert wide.are_orthographic
    assert not perspective((0,)).are_orthographic
