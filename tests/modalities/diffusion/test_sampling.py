"""Images of a task: what the pipeline or the sampler itself makes with the same settings, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.data import GeneratedShapes
from modalities.diffusion.denoising import Denoising
from modalities.diffusion.res_adapter import ResAdapter, save_official
from modalities.diffusion.sampling import sampler
from shared import LoRA, adapt
from shared.errors import RequestError
from shared.generating import Wanted
from shared.training import Optimiser
from tests.modalities.diffusion.conftest import shake
from tests.modalities.diffusion.pipelines import save_pipeline
from tests.modalities.diffusion.test_denoising import pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def make(task, **wanted):
    told = []
    made = task.generate(Wanted(**wanted), progress=lambda done, total: told.append((done, total)))
    return made, told


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def latent(request, tmp_path_factory):
    folder = save_pipeline(tmp_path_factory.mktemp("models"), xl=request.param)
    data = GeneratedShapes(images=4, low=64, high=128, step=64, base=64, batch_size=2, checks=2)
    model = adapt(
        DiffusersUNet(config="tiny_sdxl" if request.param else "tiny_sd15", pretrained=str(folder)), ResAdapter(rank=4)
    )
    shake(model, "default")
    return Denoising(model, data, Optimiser(), pipeline=str(folder))


def test_a_prompt_gives_the_pipelines_own_images(latent):
    before = latent.pipeline.scheduler
    made, told = make(latent, prompt="a cat", negative="a dog", size=(64, 96), count=2, steps=2, guidance=3.0, seed=7)
    assert latent.pipeline.scheduler is before
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [image.shape for image in made.images] == [(1, 64, 96, 3)] * 2
    pipe = type(latent.pipeline)(**{**latent.pipeline.components, "scheduler": sampler(before.config)})
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat", negative_prompt="a dog", height=64, width=96, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(8), output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(made.images[1], (expected * 255).round().astype(np.uint8))
    assert made.settings | {"prompt": "", "seed": 0} == {
        "prompt": "", "negative": "a dog", "guidance": 3.0, "width": 96, "height": 64, "count": 2, "seed": 0,
        "steps": 2, "sampler": "DPMSolverMultistepScheduler", "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
    }  # fmt: skip


def test_the_adapter_and_the_prompt_are_in_force(latent):
    one, _ = make(latent, prompt="a cat", size=(64, 64), steps=1)
    other, _ = make(latent, prompt="a dog", size=(64, 64), steps=1)
    with latent.model.disabled():
        bare, _ = make(latent, prompt="a cat", size=(64, 64), steps=1)
    assert not np.array_equal(one.images[0], other.images[0])
    assert not np.array_equal(one.images[0], bare.images[0])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"size": (64, 60)}, "--size 60x64: sides go by 8 pixels here, such as 64x64"),
        ({"prompt": "cat " * 80}, "--prompt: .* tokens, the text encoder reads 77: shorten it"),
        ({"negative": "cat " * 80}, "--negative: "),
        ({"views": 6}, "--views: Denoising makes single images"),
        ({"frames": 16}, "--frames: Denoising makes"),
    ],
)
def test_what_it_does_not_make_is_named(latent, wanted, message):
    with pytest.raises(RequestError, match=message):
        make(latent, **wanted)


def test_pixels_are_the_samplers_and_each_image_has_its_seed():
    task, _ = pixels()
    shake(task.model, "default")
    made, told = make(task, size=(16, 24), count=9, steps=3, seed=5)
    assert told == [(n, 6) for n in range(1, 7)]
    assert [image.shape for image in made.images] == [(1, 16, 24, 3)] * 9
    alone, _ = make(task, size=(16, 24), steps=3, seed=7)
    difference = made.images[2].astype(int) - alone.images[0].astype(int)
    assert abs(difference).max() <= 1
    solver, generator = sampler(task.schedule.config), torch.Generator().manual_seed(13)
    solver.set_timesteps(3)
    x = torch.randn(1, 3, 16, 24, generator=generator) * solver.init_noise_sigma
    with torch.no_grad():
        for step in solver.timesteps:
            said = task.model(x, step[None], encoder_hidden_states=torch.zeros(1, 1, 8)).sample
            x = solver.step(said, step, x, generator=generator).prev_sample
    expected = ((x[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(made.images[8][0] - expected).max() <= 1
    default, _ = make(task, steps=1)
    assert default.images[0].shape == (1, 32, 32, 3)
    assert (default.settings["width"], default.settings["steps"]) == (32, 1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"prompt": "a cat"}, "--prompt: this model makes pixels, without a text encoder"),
        ({"negative": "a cat"}, "--negative: this model"),
        ({"guidance": 2.0}, "--guidance 2: there is no text to be guided by"),
        ({"size": (15, 16)}, "--size 16x15: sides go by 2 pixels"),
        ({"mesh": "a.obj"}, "--mesh: Denoising makes"),
    ],
)
def test_pixels_take_no_text(wanted, message):
    with pytest.raises(RequestError, match=message):
        make(pixels()[0], **wanted)


def test_an_adapter_takes_the_place_of_what_there_is(tmp_path):
    task, data = pixels()
    shake(task.model, "default")
    expected, _ = make(task, steps=2)
    task.model.save(tmp_path / "own.safetensors")
    save_official(task.model, tmp_path / "official")
    fresh = Denoising(adapt(DiffusersUNet(3, config=task.unet.unet.config), LoRA(rank=1)), data, Optimiser())
    for file, limit in (("own.safetensors", 0), ("official", 4)):  # released files hold half precision
        fresh.load_adapter(tmp_path / file)
        found, _ = make(fresh, steps=2)
        assert np.abs(found.images[0].astype(int) - expected.images[0]).max() <= limit
    other = Denoising(adapt(DiffusersUNet(3, config=task.unet.unet.config, seed=1), LoRA(rank=1)), data, Optimiser())
    with pytest.raises(RequestError, match="own.safetensors: made for backbone .* with fingerprint"):
        other.load_adapter(tmp_path / "own.safetensors")
