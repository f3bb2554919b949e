"""Denoising on pixels and on latents: the loss is what it says, evaluations repeat, runs learn and resume."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.data import GeneratedShapes
from modalities.diffusion.denoising import Denoising
from modalities.diffusion.res_adapter import ResAdapter
from modalities.diffusion.shifted import shift
from shared import adapt, recipe, run
from shared.errors import RequestError
from shared.generating import Wanted
from shared.training import Engine, Optimiser, fit
from tests.modalities.diffusion.conftest import tiny
from tests.modalities.diffusion.pipelines import save_pipeline

CONFIG = {
    "sample_size": 32,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
SMALL = {"low": 16, "high": 32, "step": 8, "base": 16, "batch_size": 2, "checks": 3}


def pixels(**more) -> tuple[Denoising, GeneratedShapes]:
    data = GeneratedShapes(images=12, **SMALL)
    model = adapt(DiffusersUNet(data.bands, config=CONFIG), ResAdapter(rank=4))
    return Denoising(model, data, Optimiser(learning_rate=3e-3, **more)), data


def evaluate(task, loader):
    task.eval()
    with torch.no_grad():
        for batch in loader:
            task.evaluate(batch)
    return task.results()


def test_the_loss_is_the_error_of_the_predicted_noise():
    task, data = pixels()
    batch = next(iter(data.train()))
    torch.manual_seed(3)
    loss = task.loss(batch)
    torch.manual_seed(3)
    noise, steps = torch.randn(batch["image"].shape), torch.randint(1000, (2,))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = (1 - betas).cumprod(0)[steps][:, None, None, None]
    noisy = kept.sqrt() * batch["image"] + (1 - kept).sqrt() * noise
    with torch.no_grad():
        said = task.model.backbone.unet(noisy, steps, encoder_hidden_states=torch.zeros(2, 1, 8)).sample
    assert float(loss.detach()) == pytest.approx(float((said - noise).square().mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
def test_velocity_and_a_shifted_schedule_without_a_pipeline():
    data = GeneratedShapes(images=12, **SMALL)
    model = adapt(DiffusersUNet(data.bands, config=CONFIG), ResAdapter(rank=4))
    task = Denoising(model, data, Optimiser(), velocity=True, shift=8.0)
    batch = next(iter(data.train()))
    torch.manual_seed(3)
    loss = task.loss(batch)
    torch.manual_seed(3)
    noise, steps = torch.randn(batch["image"].shape), torch.randint(1000, (2,))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = shift((1 - betas).cumprod(0), 8.0).float()[steps][:, None, None, None]
    noisy = kept.sqrt() * batch["image"] + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * batch["image"]
    with torch.no_grad():
        said = task.model.backbone.unet(noisy, steps, encoder_hidden_states=torch.zeros(2, 1, 8)).sample
    assert float(loss.detach()) == pytest.approx(float((said - velocity).square().mean()), rel=1e-3)
    made = task.generate(Wanted(steps=2), progress=lambda *a: None)
    assert made.images[0].shape == (1, 32, 32, 3)


def test_channels_last_images_train():
    task, data = pixels()
    batch = next(iter(data.train()))
    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    task.loss(batch).backward()
    assert all(p.grad is not None for p in task.model.trainable().values())


def test_results_are_means_over_images_and_evaluations_repeat():
    task, data = pixels()
    torch.manual_seed(1)
    first = evaluate(task, data.test())
    torch.manual_seed(2)
    assert evaluate(task, data.test()) == first
    assert list(first) == ["loss", "loss/16x16", "loss/24x24", "loss/32x32"]
    assert first["loss"] == pytest.approx(sum(list(first.values())[1:]) / 3)
    only = evaluate(task, [next(iter(data.test()))])
    assert only == {"loss": pytest.approx(first["loss/16x16"]), "loss/16x16": pytest.approx(first["loss/16x16"])}


def test_a_run_learns_the_adapter_alone_and_shows_pictures(tmp_path):
    task, data = pixels(schedule="constant")
    frozen = {n: p.clone() for n, p in task.model.backbone.named_parameters()}
    before = evaluate(task, data.validation())["loss"]
    found = fit(task, data, Engine(epochs=6, device="cpu"), tmp_path)
    assert found["best"]["value"] < 0.99 * before
    assert all(torch.equal(p, frozen[n]) for n, p in task.model.backbone.named_parameters())
    rows = task.pictures(data).rows
    assert [caption.partition(":")[0] for caption, _ in rows] == ["16 x 16", "24 x 24", "32 x 32"]
    for _, images in rows:
        assert list(images) == ["image", "noisy", "denoised"]
        assert all(a.dtype == "uint8" and a.shape[2] == 3 and a.std() > 0 for a in images.values())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_is_as_if_never_interrupted(tmp_path, workers):
    def rows(folder):
        with open(folder / "metrics.csv", newline="") as file:
            return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    def small():
        data = GeneratedShapes(images=12, workers=workers, **SMALL)
        model = adapt(DiffusersUNet(3, config=CONFIG), ResAdapter(rank=4))
        return Denoising(model, data, Optimiser(learning_rate=1e-3)), data

    engine = Engine(epochs=3, device="cpu")
    torch.manual_seed(7)
    task, data = small()
    torch.manual_seed(7)
    fit(task, data, engine, tmp_path / "whole")
    torch.manual_seed(7)
    task, data = small()
    plain = task.loss

    def loss(batch):
        if task.current_epoch == 2:
            raise Interrupted
        return plain(batch)

    task.loss = loss
    torch.manual_seed(7)
    with pytest.raises(Interrupted):
        fit(task, data, engine, tmp_path / "parts")
    torch.manual_seed(99)
    task, data = small()
    fit(task, data, engine, tmp_path / "parts", resume=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def latent(request, tmp_path_factory):
    """A task on the latents of a small pipeline that is read from a folder, and its data."""
    folder = save_pipeline(tmp_path_factory.mktemp("models"), xl=request.param)
    config = "tiny_sdxl" if request.param else "tiny_sd15"
    data = GeneratedShapes(images=4, low=64, high=128, step=64, base=64, batch_size=2, checks=2)
    model = adapt(DiffusersUNet(config=config, pretrained=str(folder)), ResAdapter(rank=4))
    return Denoising(model, data, Optimiser(), pipeline=str(folder), caption_dropout=0.0), data


def test_latents_and_text_come_from_the_pipeline(latent):
    task, data = latent
    task.train()
    batch = next(iter(data.train()))
    height, width = batch["image"].shape[2:]
    assert task.encode(batch["image"]).shape == (2, 4, height // 8, width // 8)
    assert not torch.equal(task.encode(batch["image"]), task.encode(batch["image"]))  # drawn
    given = task.condition(batch, batch["caption"])
    blank = task.condition(batch, ["", ""])
    assert given["encoder_hidden_states"].shape[:2] == (2, 77)
    assert not torch.equal(given["encoder_hidden_states"], blank["encoder_hidden_states"])
    if extra := given.get("added_cond_kwargs"):
        assert extra["text_embeds"].shape == (2, 32)
        expected = [[height, width, *crop, height, width] for crop in batch["crop"].tolist()]
        assert extra["time_ids"].tolist() == expected
    task.eval()
    mode = task.encode(batch["image"])
    assert torch.equal(mode, task.encode(batch["image"]))
    vae = task.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(batch["image"]).latent_dist.mode() * vae.config.scaling_factor
        assert torch.equal(mode, expected)
        torch.testing.assert_close(task.decode(mode), vae.decode(expected / vae.config.scaling_factor).sample)


def test_gradient_stays_in_the_adapter_and_results_repeat(latent):
    task, data = latent
    task.train()
    task.loss(next(iter(data.train()))).backward()
    assert all(p.grad is not None for p in task.model.trainable().values())
    frozen = [
        *task.pipeline.vae.parameters(),
        *task.pipeline.text_encoder.parameters(),
        *task.model.backbone.parameters(),
    ]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not any(module.training for module in (task.pipeline.vae, task.pipeline.text_encoder))
    first = evaluate(task, data.validation())
    assert list(first) == ["loss", "loss/64x64", "loss/128x128"]
    assert evaluate(task, data.validation()) == first
    assert len(task.pictures(data).rows) == 2


def test_captions_are_dropped(latent):
    task, data = latent
    seen = []
    plain = task.condition
    task.condition = lambda batch, captions: seen.extend(captions) or plain(batch, captions)
    try:
        for task.caption_dropout in (1.0, 0.0):
            task.loss(next(iter(data.train())))
    finally:
        del task.condition
        task.caption_dropout = 0.0
    assert seen[:2] == ["", ""]
    assert all(seen[2:])


def test_velocity_is_the_target_where_the_schedule_says_so(latent):
    task, _ = latent
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([10, 900])
    condition = task.unet.blank(2)
    plain = task._errors(x, noise, steps, condition)
    schedule = task.schedule
    try:
        task.schedule = type(schedule).from_config(schedule.config, prediction_type="v_prediction")
        velocity = task._errors(x, noise, steps, condition)
        said = task.model(schedule.add_noise(x, noise, steps), steps, **condition).sample
    finally:
        task.schedule = schedule
    kept = schedule.alphas_cumprod[steps][:, None, None, None]
    target = kept.sqrt() * noise - (1 - kept).sqrt() * x
    torch.testing.assert_close(velocity, F.mse_loss(said, target, reduction="none").mean((1, 2, 3)))
    assert not torch.allclose(plain, velocity)


def test_what_does_not_fit_is_named(latent):
    task, data = latent
    folder = task.model.backbone.source
    model = SimpleNamespace(backbone=torch.nn.Linear(1, 1))
    with pytest.raises(RequestError, match="denoising needs a DiffusersUNet, not Linear"):
        Denoising(model, data, Optimiser())  # type: ignore[arg-type]
    wrong = adapt(tiny("tiny_sd15"), ResAdapter(rank=4))
    with pytest.raises(RequestError, match="the UNet takes 4 channels, the images have 3: give the task a pipeline"):
        Denoising(wrong, data, Optimiser())
    with pytest.raises(RequestError, match="caption_dropout 2: use a share"):
        Denoising(wrong, data, Optimiser(), caption_dropout=2)
    with pytest.raises(RequestError, match="/nowhere: no pipeline to load"):
        Denoising(wrong, data, Optimiser(), pipeline="/nowhere")
    odd = GeneratedShapes(images=4, low=12, high=24, step=12, base=12)
    with pytest.raises(RequestError, match=r"4 channels at 1/8 of the size; .* the sizes go by 12 pixels"):
        Denoising(task.model, odd, Optimiser(), pipeline=folder)
    for velocity, factor in ((True, 1.0), (False, 8.0)):
        with pytest.raises(RequestError, match="velocity, shift: the pipeline .* has what it predicts"):
            Denoising(task.model, data, Optimiser(), pipeline=folder, velocity=velocity, shift=factor)


def test_the_recipe_in_its_published_and_in_its_tiny_form(tmp_path):
    published = recipe.load("diffusion/res_adapter", files=False)
    assert run.count(published)["adapter"] == 970_240
    small = recipe.load("diffusion/res_adapter", tiny=True)
    found = run.run(small, tmp_path / "run")
    assert found["steps"] == 16
    assert found["parameters"]["adapter"] == 2992
    assert set(found["test"]) == {"loss", *(f"loss/{side}x{side}" for side in (16, 32, 48, 64))}
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    data = small.build("data")
    again = run.build(small, data)
    again.load(tmp_path / "run/adapter.safetensors")
    task = small.build("task", model=again, data=data, optimiser=small.build("optimiser"))
    assert evaluate(task, data.test()) == found["test"]
