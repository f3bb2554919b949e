"""Rendered solids are exact: where their points are, what they look like from all sides, how far views agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalities.diffusion.geometry.cameras import geometry_guided, positions_from_depth, view_guided
from modalities.diffusion.multi_view.agreement import disagreement
from modalities.diffusion.multi_view.solids import COLOURS, Solid, draw, render

BOX = Solid("box", (0.0, 0.0, 0.0), (0.2, 0.3, 0.4), 0.0, ("red", "blue"))
BALL = Solid("ball", (0.1, 0.0, 0.0), (0.3, 0.3, 0.3), 0.0, ("red", "blue"))


def test_a_box_from_its_six_sides():
    seen = render([BOX], geometry_guided(), (44, 44))  # a pixel is 0.025 wide
    assert seen.alpha.sum((1, 2)).div(44 * 44).mul(1.1**2).tolist() == pytest.approx(
        [0.32, 0.48, 0.32, 0.48, 0.24, 0.24], abs=0.02
    )
    middle = seen.colour[:, :, 22, 22]
    assert torch.equal(middle[0], torch.tensor(COLOURS["red"]))
    assert torch.equal(middle[2], torch.tensor(COLOURS["blue"]))
    normals = seen.normals[:, 22, 22]
    expected = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1]]).float()
    torch.testing.assert_close(normals, expected)
    assert seen.positions[0, 22, 22, 1].item() == pytest.approx(-0.3)
    assert not seen.positions[0, 0, 0].any()
    assert seen.alpha[0, 0, 0] == 0


def test_points_of_a_ball_are_on_it_and_normals_point_outwards():
    seen = render([BALL], view_guided(), (32, 32))
    there = seen.alpha > 0
    away = seen.positions[there] - torch.tensor(BALL.centre)
    torch.testing.assert_close(away.norm(dim=-1), torch.full((len(away),), 0.3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.normals[there], away / 0.3, atol=1e-4, rtol=0)


def test_what_is_nearer_hides_what_is_behind():
    near, far = (Solid("box", (0.0, y, 0.0), (0.1, 0.1, 0.1), 0.0, (c, c)) for y, c in ((-0.2, "red"), (0.2, "blue")))
    for order in ([near, far], [far, near]):
        seen = render(order, view_guided(), (16, 16))
        assert torch.equal(seen.colour[0, :, 8, 8], torch.tensor(COLOURS["red"]))
        assert torch.equal(seen.colour[3, :, 8, 8], torch.tensor(COLOURS["blue"]))


def test_positions_are_those_that_depth_gives():
    cameras = view_guided()
    seen = render([BOX, BALL], cameras, (16, 16))
    depth = torch.einsum("vhwi,vi->vhw", seen.positions - cameras.positions[:, None, None], cameras.forward)
    found = positions_from_depth(cameras, depth, seen.alpha)
    torch.testing.assert_close(found, seen.positions, atol=1e-5, rtol=0)


def test_drawn_solids_fit_the_window_and_their_caption():
    for seed in range(5):
        solids, caption = draw(np.random.default_rng(seed))
        seen = render(solids, geometry_guided(), (24, 24))
        edge = torch.cat([seen.alpha[:, 0], seen.alpha[:, -1], seen.alpha[:, :, 0], seen.alpha[:, :, -1]], 1)
        assert not edge.any()
        assert seen.alpha.sum() > 0
        assert caption.count(" and ") == len(solids)
        assert all(name in caption for solid in solids for name in (solid.kind, *solid.colours))


def test_plain_solids_have_one_colour():
    found = set()
    for seed in range(12):
        solids, caption = draw(np.random.default_rng(seed), plain=True)
        seen = render(solids, geometry_guided(), (12, 12))
        colours = seen.colour.movedim(1, -1)[seen.alpha > 0].unique(dim=0)
        assert len(solids) == len(colours) == 1
        name = solids[0].colours[0]
        torch.testing.assert_close(colours[0], torch.tensor(COLOURS[name]))
        assert caption == f"a {name} {solids[0].kind}"
        found.add((name, solids[0].kind))
    assert len(found) > 4


def test_true_views_agree_and_others_do_not():
    cameras = view_guided()
    balls = [Solid("ball", (0.0, 0.0, 0.0), (0.3, 0.3, 0.3), 0.0, (c, c)) for c in ("red", "blue")]
    one, other = (render([ball], cameras, (32, 32)) for ball in balls)
    total, count = disagreement(one.colour, cameras, one.positions, one.alpha, 0.05)
    assert (float(total), float(count) > 500) == (0.0, True)
    mixed = torch.cat([one.colour[:1], other.colour[1:]])
    total, count = disagreement(mixed, cameras, one.positions, one.alpha, 0.05)
    between = (torch.tensor(COLOURS["red"]) - torch.tensor(COLOURS["blue"])).abs().mean()
    assert 0.1 * float(between) < float(total / count) < float(between)


def test_points_that_no_two_views_see_do_not_count():
    cameras = view_guided()[[0, 3]]  # front and back
    seen = render([BOX], cameras, (32, 32))
    total, count = disagreement(torch.rand(2, 3, 32, 32), cameras, seen.positions, seen.alpha)
    assert (float(total), float(count)) == (0.0, 0.0)
