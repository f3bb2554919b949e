"""What no view shows is painted from further cameras, by whichever inpainter is given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from modalities.diffusion.geometry.cameras import orthographic
from modalities.diffusion.geometry.meshes import Mesh, unwrapped
from modalities.diffusion.geometry.repainting import Repainting, pull_push
from modalities.diffusion.geometry.texture import Trust, bake, surface_texels
from shared.errors import RequestError, WorkError
from tests.modalities.diffusion.shapes import sphere

FEW = Repainting(
    elevations=(-60, 0, 60), azimuths=(0, 90, 180, 270), size=128, search=32, trust=Trust(cosine=0.1, gradient=2.0)
)
LEFT, RIGHT = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.9, 0.1, 0.3])


def red(image: torch.Tensor, holes: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Paints what it must and spoils all else, which must not be taken."""
    return torch.where(holes, torch.tensor([1.0, 0.0, 0.0])[:, None, None], torch.rand_like(image))


@pytest.fixture(scope="module")
def ball() -> Mesh:
    return unwrapped(sphere(0.4, 3), size=128)


def baked(mesh: Mesh, repaint: Repainting | None, colour: torch.Tensor = LEFT):
    """A ball of which only the front was seen, in one colour."""
    images = colour[None, :, None, None].expand(1, 3, 128, 128)
    settings = {"size": 128, "upscaler": None, "trust": Trust(gradient=2.0)}
    return bake(mesh, orthographic([0.0]), images, repaint=repaint, **settings)


def test_the_unseen_is_painted_and_the_seen_stays(ball) -> None:
    plain, ours = baked(ball, None), baked(ball, dataclasses.replace(FEW, inpainter=red))
    assert plain.repainted == 0
    assert 0.25 < plain.seen < 0.4  # half the ball, less what is steeper than a cosine of 0.2, less the outline
    assert ours.seen == plain.seen
    assert ours.filled < 0.02
    assert ours.repainted == pytest.approx(1 - ours.seen - ours.filled)
    texels = surface_texels(ball, 128)
    values = ours.texture.permute(1, 2, 0)[texels.raster.mask]
    painted = (values - torch.tensor([1.0, 0, 0])).abs().amax(-1) < 1e-5
    kept = (values - LEFT).abs().amax(-1) < 1e-5
    assert (painted | kept).double().mean() > 0.97  # nothing of the spoilt pixels but in mixtures at the seam
    y = texels.positions[:, 1]
    assert painted[y > 0.05].double().mean() > 0.98
    assert kept[y < -0.2].double().mean() > 0.98


def test_the_default_inpainter_carries_the_surface_on(ball) -> None:
    ours = baked(ball, FEW)
    texels = surface_texels(ball, 128)
    values = ours.texture.permute(1, 2, 0)[texels.raster.mask]
    assert ours.repainted > 0.5
    assert (values - LEFT).abs().max() < 1e-4  # and nothing of the background


def test_rounds_end_when_nothing_is_left(ball) -> None:
    calls = []

    def counted(image, holes, inside):
        calls.append(int(holes.sum()))
        return red(image, holes, inside)

    enough = dataclasses.replace(FEW, inpainter=counted)
    baked(ball, enough)
    assert 4 <= len(calls) <= 8
    calls.clear()
    baked(ball, dataclasses.replace(enough, least=0, most=2))
    assert len(calls) == 2
    calls.clear()
    baked(ball, dataclasses.replace(enough, least=0, enough=1.0))
    assert calls == []
    texels = surface_texels(ball, 128)
    everything = torch.ones(len(texels.positions), dtype=torch.bool)
    colours = torch.rand(len(everything), 3)
    same, known = enough(ball, texels, colours, everything)
    assert calls == []
    assert known.all()
    assert torch.equal(same, colours)


def test_the_first_camera_is_the_one_that_sees_most_of_the_unseen(ball) -> None:
    seen = []

    def looked(image, holes, inside):
        seen.append((holes & inside).sum() / inside.sum())
        return image

    baked(ball, dataclasses.replace(FEW, inpainter=looked, least=0, most=1))
    assert seen[0] > 0.95  # from behind, all of it is unseen


def test_the_published_cameras() -> None:
    cameras = Repainting().cameras()
    assert len(cameras) == 108
    assert (cameras.positions.norm(dim=-1) - 1.2).abs().max() < 1e-6
    assert torch.allclose(cameras.extent, 2 * torch.tensor(20.0).deg2rad().tan())


def test_what_an_inpainter_may_not_do(ball) -> None:
    for bad in (lambda i, h, o: i[:, ::2, ::2], lambda i, h, o: i * float("nan")):
        with pytest.raises(WorkError, match=r"a finite image \(3, 128, 128\)"):
            baked(ball, dataclasses.replace(FEW, inpainter=bad))
    for wrong in ({"least": 3, "most": 2}, {"elevations": ()}, {"size": 0}):
        with pytest.raises(RequestError, match="repainting: "):
            Repainting(**wrong)


def test_pull_push_keeps_the_known_and_fills_smoothly() -> None:
    """Halves of two colours with a hole across: between them, near each its own, nothing of the background."""
    image = torch.zeros(3, 37, 50)
    image[:, :, :25], image[:, :, 25:] = LEFT[:, None, None], RIGHT[:, None, None]
    inside = torch.zeros(37, 50, dtype=torch.bool)
    inside[3:30, 4:46] = True
    image[:, ~inside] = 77.0
    holes = torch.zeros(37, 50, dtype=torch.bool)
    holes[10:20, 8:42] = True
    image[:, holes] = -5.0
    ours = pull_push(image, holes, inside)
    assert torch.equal(ours[:, ~holes], image[:, ~holes])
    low, high = torch.minimum(LEFT, RIGHT)[:, None], torch.maximum(LEFT, RIGHT)[:, None]
    assert ((ours[:, holes] >= low - 1e-5) & (ours[:, holes] <= high + 1e-5)).all()
    assert (ours[:, 15, 9] - LEFT).abs().max() < 0.02
    assert (ours[:, 15, 41] - RIGHT).abs().max() < 0.02
    one = torch.full((3, 16, 16), 0.3)
    assert (pull_push(one, torch.rand(16, 16) > 0.1, torch.ones(16, 16).bool()) - 0.3).abs().max() < 1e-6
    nothing = torch.ones(16, 16).bool()
    assert torch.equal(pull_push(one, nothing, nothing), one)
