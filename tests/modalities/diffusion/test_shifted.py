"""Shifted schedules: more noise everywhere, by how much it is asked, in any scheduler of diffusers."""

from __future__ import annotations

import pytest
import torch

from modalities.diffusion.multi_view.condition import control_factor
from modalities.diffusion.shifted import betas_of, shift, shifted
from shared.errors import RequestError

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def snr(kept):
    return kept.double() / (1 - kept.double())


@pytest.mark.parametrize("mode", ["interpolated", "default"])
def test_noise_grows_everywhere(mode):
    from diffusers import DDPMScheduler

    base = DDPMScheduler(1000, **BASE)
    moved = shifted(base, 8.0, mode)
    assert type(moved) is DDPMScheduler
    assert bool((moved.alphas_cumprod <= base.alphas_cumprod + 1e-6).all())
    ratio = snr(base.alphas_cumprod) / snr(moved.alphas_cumprod)
    assert float(ratio[-1]) == pytest.approx(8, rel=1e-3)
    assert float(ratio[0]) == pytest.approx(1 if mode == "interpolated" else 8, rel=1e-3)
    assert bool((moved.betas > 0).all() and (moved.betas < 1).all())
    assert (base.config.trained_betas, moved.config.num_train_timesteps) == (None, 1000)


def test_halfway_the_interpolated_one_is_the_geometric_mean():
    kept = torch.linspace(0.99, 0.01, 5, dtype=torch.float64)
    middle = shift(kept, 8.0)[2]
    assert float(snr(kept)[2] / snr(middle)) == pytest.approx(8**0.5)
    torch.testing.assert_close((1 - betas_of(kept)).cumprod(0), kept)


def test_other_samplers_take_it_and_keep_their_settings():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    euler = shifted(EulerDiscreteScheduler(**BASE, steps_offset=1))
    assert (type(euler), euler.config.steps_offset) == (EulerDiscreteScheduler, 1)
    ddim = shifted(euler, kind=DDIMScheduler)  # what is shifted already is shifted again
    assert type(ddim) is DDIMScheduler
    assert float(snr(euler.alphas_cumprod[-1]) / snr(ddim.alphas_cumprod[-1])) == pytest.approx(8, rel=1e-3)
    with pytest.raises(RequestError, match="shift -1: use a number above 0"):
        shifted(euler, -1.0)
    with pytest.raises(RequestError, match="has no schedule of noise variances"):
        shifted(object())


def test_the_share_of_steps_that_get_control():
    timesteps = torch.tensor([999.0, 700.0, 650.0, 30.0, 10.0])
    for share, count in ((1.0, 5), (0.7, 3), (0.6, 3), (0.2, 1), (0.1, 0)):
        factor = control_factor(timesteps, share)
        assert int((timesteps >= 1000 * (1 - factor)).sum()) == count
    evenly = torch.arange(980, -1, -20)
    assert int((evenly >= 1000 * (1 - 0.5)).sum()) == 25
