"""What frames start from, and the colours they take on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalities.diffusion.video.colour import match_colours, matched, to_lab, to_rgb
from modalities.diffusion.video.image_to_video import sampled
from modalities.diffusion.video.starts import blurred, degraded, related, started
from shared.errors import RequestError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_prior_differs_from_the_image_only_where_the_mask_is_zero():
    z = torch.randn(2, 4, 1, 9, 12, generator=generator()).expand(-1, -1, 5, -1, -1)
    mask = (torch.rand(z.shape, generator=generator(1)) >= 0.5).float()
    found = degraded(z, mask)
    assert torch.equal(found[:, :, 0], z[:, :, 0])
    later, kept = found[:, :, 1:], mask[:, :, 1:] == 1
    assert torch.equal(later[kept], z[:, :, 1:][kept])
    assert torch.equal(later[~kept], blurred(z)[:, :, 1:][~kept])
    assert bool((later != z[:, :, 1:])[~kept].all())
    assert torch.equal(degraded(z, torch.ones_like(mask)), z)


def test_the_blur_of_a_constant_is_the_constant():
    z = torch.full((1, 2, 3, 8, 9), 1.75)
    torch.testing.assert_close(blurred(z), z)
    point = torch.zeros(1, 1, 1, 19, 19)
    point[..., 9, 9] = 1
    spread = blurred(point)[0, 0, 0]
    assert int((spread > 0).sum()) == 81
    torch.testing.assert_close(spread[9, 9] / spread[9, 13], torch.tensor(float(np.exp(16 / (2 * 18**2)))))
    with pytest.raises(RequestError, match="latents of 4 x 9: the prior's blur of 9 x 9 needs at least 5"):
        blurred(torch.zeros(1, 1, 1, 4, 9))


@pytest.mark.parametrize(
    ("kind", "variance", "to_first", "to_before"),
    [
        ("iid", 1, 0, 0),
        ("mixed", 1, 0.5**0.5, 0.5),
        ("progressive", 1, 0.8**1.5, 0.8**0.5),
        ("lamp", 0.68, 0.2 / 0.68**0.5, 0.04 / 0.68),
    ],
)
def test_related_noise_has_the_published_correlations(kind, variance, to_first, to_before):
    noise = torch.randn(4, 4, 4, 64, 64, generator=generator(2))
    found = related(noise, kind)
    frames = found.unbind(2)
    assert torch.equal(frames[0], noise[:, :, 0])
    assert float(frames[3].var()) == pytest.approx(variance, abs=0.02)
    for i, wanted in ((0, to_first), (2, to_before)):
        assert float(torch.corrcoef(torch.stack([frames[3].flatten(), frames[i].flatten()]))[0, 1]) == pytest.approx(
            wanted, abs=0.02
        )


def test_all_starts_keep_the_first_frame_clean():
    first = torch.randn(2, 4, 8, 8, generator=generator())
    sampler, times = sampled(10)
    for start in ("prior", "iid", "mixed", "progressive", "lamp"):
        found = started(first, 5, sampler, int(times[0]), generator(1), start=start)
        assert found.shape == (2, 4, 5, 8, 8)
        assert torch.equal(found[:, :, 0], first)
        assert float(found[:, :, 1:].std()) > 0.5
        assert torch.equal(found, started(first, 5, sampler, int(times[0]), generator(1), start=start))


def test_an_earlier_start_and_a_smaller_mask_stay_nearer_to_the_image():
    first = torch.randn(1, 4, 8, 8, generator=generator())
    still = first[:, :, None].expand(-1, -1, 5, -1, -1)

    def distance(prior_t: int | None, mask_p: float) -> float:
        sampler, times = sampled(25, prior_t)
        found = started(first, 5, sampler, int(times[0]), generator(1), mask_p=mask_p)
        return float((found - still)[:, :, 1:].norm())

    assert distance(100, 0.5) < distance(500, 0.5) < distance(None, 0.5)
    assert distance(1, 0) < distance(1, 0.5) < distance(1, 1)


def test_the_sampler_is_the_published_one():
    sampler, times = sampled(25)
    assert times.tolist() == [1 + 40 * i for i in range(25)][::-1]
    betas = torch.linspace(0.00085, 0.012, 1000)
    torch.testing.assert_close(sampler.betas, betas)
    assert not sampler.config.clip_sample
    assert sampled(25, 500)[1].tolist() == [1 + 40 * i for i in range(13)][::-1]
    with pytest.raises(RequestError, match="prior_t 0: the last of 25 steps is at 1"):
        sampled(25, 0)
    with pytest.raises(RequestError, match="1000 steps: use 1 to 999"):
        sampled(1000)


# -- colours -----------------------------------------------------------------------------------------------------------


def test_colours_in_lab_are_the_standards_and_come_back():
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 128, 0], [10, 20, 200]], np.uint8)
    lab = to_lab(rgb)
    np.testing.assert_allclose(lab[:2], [[100, 0, 0], [0, 0, 0]], atol=1e-3)
    np.testing.assert_allclose(lab[2], [53.24, 80.09, 67.20], atol=0.02)  # CIE's red primary of sRGB
    np.testing.assert_allclose(lab[3], [46.23, -51.70, 49.90], atol=0.02)
    every = np.random.default_rng(0).integers(0, 256, (4000, 3)).astype(np.uint8)
    assert np.array_equal(to_rgb(to_lab(every)), every)


def test_equal_frames_stay_and_others_keep_their_lightness():
    random = np.random.default_rng(1)
    frame = random.integers(0, 256, (12, 10, 3)).astype(np.uint8)
    assert np.array_equal(match_colours(np.stack([frame] * 3)), np.stack([frame] * 3))
    other = random.integers(60, 190, (12, 10, 3)).astype(np.uint8)
    lab = to_lab(np.stack([frame, other]))
    found = matched(lab)
    assert np.array_equal(found[..., 0], lab[..., 0])
    assert np.array_equal(found[0], lab[0])
    for channel in (1, 2):  # every value differs, so the distributions become equal
        np.testing.assert_allclose(np.sort(found[1, ..., channel].ravel()), np.sort(lab[0, ..., channel].ravel()))
        order = np.argsort(lab[1, ..., channel].ravel())
        assert (np.diff(found[1, ..., channel].ravel()[order]) >= 0).all()


def test_a_tint_is_taken_back():
    random = np.random.default_rng(2)
    lab = np.stack([random.uniform(40, 60, (16, 16)), *random.uniform(-15, 15, (2, 16, 16))], axis=-1)
    tinted = lab + np.array([0, 10, -12])
    frames = to_rgb(np.stack([lab, tinted]))
    gap = np.abs(match_colours(frames).astype(int) - frames[:1])
    assert gap.max() <= 2 < np.abs(frames[1].astype(int) - frames[0]).max()
