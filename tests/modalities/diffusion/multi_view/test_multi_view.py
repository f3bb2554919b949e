"""Training of several views at once: the loss step by step, drops, weights, views in agreement, and generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.multi_view import sampling
from modalities.diffusion.multi_view.data import GeneratedSolids
from modalities.diffusion.multi_view.denoising import MultiViewDenoising
from modalities.diffusion.multi_view.mv_adapter import MVAdapter
from modalities.diffusion.res_adapter import ResAdapter
from modalities.diffusion.shifted import shift
from shared import adapt
from shared.errors import RequestError
from shared.generating import Wanted
from shared.training import Engine, Optimiser, fit
from tests.modalities.diffusion.conftest import shake, tiny
from tests.modalities.diffusion.pipelines import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
CONFIG = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}


def pixels(data: Any = None, *, moved: bool = True, method: Any = None, **settings: Any) -> MultiViewDenoising:
    data = data or GeneratedSolids(size=16, views=4, objects=6, batch_size=2, checks=2)
    torch.manual_seed(2)
    method = method or MVAdapter(vae_factor=1, reference=True, views="row_column" if data.maps == "geometry" else "row")
    model = adapt(DiffusersUNet(3, config=CONFIG), method)
    if moved:
        shake(model, "default", 0.05)
    never = {"caption_dropout": 0.0, "image_dropout": 0.0, "both_dropout": 0.0}
    return MultiViewDenoising(model, data, Optimiser(learning_rate=3e-3, schedule="constant"), **never | settings)


def batch_of(data: GeneratedSolids) -> dict[str, Any]:
    return next(iter(data.train()))


DATA = GeneratedSolids(size=16, views=4, objects=6, batch_size=2, checks=2)


@pytest.mark.parametrize("noised", [False, True])
def test_the_loss_step_by_step(noised):
    task, batch = pixels(), batch_of(DATA)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    torch.manual_seed(3)
    loss = task.loss({**batch, "noised": mask} if noised else batch)
    torch.manual_seed(3)
    x = batch["image"].flatten(0, 1)
    noise, steps = torch.randn(x.shape), torch.randint(1000, (2,)).repeat_interleave(4)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = shift((1 - betas).cumprod(0)).float()[steps]
    a = kept[:, None, None, None]
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    if noised:
        noisy = torch.where(mask.flatten()[:, None, None, None], noisy, x)
        steps = steps * mask.flatten()
    text, cache = torch.zeros(8, 1, 8), {}
    look = {"use_mv": False, "use_ref": False, "cache_hidden_states": cache}
    with torch.no_grad():
        unet = task.model.backbone.unet
        unet(batch["reference"], 0, encoder_hidden_states=text[:2], cross_attention_kwargs=look)
        told = {"num_views": 4, "control": batch["control"].flatten(0, 1), "ref_hidden_states": cache}
        said = unet(noisy, steps, encoder_hidden_states=text, cross_attention_kwargs=told).sample
    snr = kept / (1 - kept)
    errors = (said - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr
    expected = errors[mask.flatten()].mean() if noised else errors.mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-3)


def test_weights_where_the_base_predicts_velocity():
    task, batch = pixels(), batch_of(DATA)
    x = batch["image"].flatten(0, 1)
    noise, steps = torch.randn_like(x), torch.tensor([100, 900])
    kept = task.schedule.alphas_cumprod[steps.repeat_interleave(4)]
    snr = kept / (1 - kept)
    _, weights, _ = task._of_views(batch, x, noise, steps, ["", ""], None)
    torch.testing.assert_close(weights, snr.clamp(max=5) / snr)
    task.schedule.register_to_config(prediction_type="v_prediction")
    _, weights, clean = task._of_views(batch, x, noise, steps, ["", ""], None)
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1))
    assert clean.shape == x.shape


def test_dropped_references_are_zeros_and_dropped_captions_empty(monkeypatch):
    seen: list[tuple[list[str], torch.Tensor]] = []
    task, batch = pixels(caption_dropout=0.3, image_dropout=0.2, both_dropout=0.1), batch_of(DATA)

    def spy(batch, x, noise, steps, captions, blind, noised=None):
        seen.append((captions, blind))
        return torch.ones(len(x)), torch.ones(len(x)), x

    real, task._of_views = task._of_views, spy
    for _ in range(600):
        task.loss(batch)
    silent = [caption == "" for captions, _ in seen for caption in captions]
    blind = [bool(b) for _, mask in seen for b in mask]
    both = [s and b for s, b in zip(silent, blind, strict=True)]
    assert np.mean(silent) == pytest.approx(0.37, abs=0.05)  # 1 - 0.7 * 0.9
    assert np.mean(blind) == pytest.approx(0.28, abs=0.05)
    assert np.mean(both) == pytest.approx(0.1 + 0.9 * 0.06, abs=0.04)
    task._of_views = real
    states = task.look(batch, ["", ""], torch.tensor([True, False]))
    assert all(not t[0].any() and bool(t[1].any()) for t in states.values())


def test_one_timestep_for_an_object_and_fewer_views_by_choice():
    data = GeneratedSolids(size=16, objects=4, batch_size=2)
    task, seen = pixels(data, fewer_views=True), []

    def spy(batch, x, noise, steps, *others):
        seen.append((len(x) // len(steps), batch["control"].shape[1]))
        return torch.ones(len(x)), torch.ones(len(x)), x

    task._of_views = spy
    batch = batch_of(data)
    for _ in range(40):
        task.loss(batch)
    assert {views for views, _ in seen} == {2, 3, 4, 6}
    assert all(views == maps for views, maps in seen)


@pytest.mark.parametrize("maps", ["rays", "geometry"])
def test_views_apart_do_not_see_each_other(maps, picture):
    data = GeneratedSolids(size=16, maps=maps, views=6, objects=2, batch_size=2)
    batch = batch_of(data)
    x = batch["image"].flatten(0, 1)
    noise, steps = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)), torch.tensor([300, 700])
    other = noise.clone()
    other[0] = -other[0]
    for apart in (False, True):
        task = pixels(data, apart=apart)
        with torch.no_grad():
            one, two = (task._of_views(batch, x, n, steps, ["", ""], None)[2] for n in (noise, other))
        moved = (one - two).abs().amax((1, 2, 3)) > 1e-5
        assert moved.tolist() == [True, *[not apart] * 5, *[False] * 6]
    if maps == "rays":
        wanted = Wanted(steps=2, seed=5, image=picture)
        one, two = (pixels(data, apart=a).generate(wanted, progress=lambda *a: None).images[0] for a in (False, True))
        assert one.shape == two.shape
        assert not np.array_equal(one, two)


def test_a_run_trains_the_adapter_alone_and_shows_pictures(tmp_path):
    data = GeneratedSolids(size=16, maps="geometry", objects=8, batch_size=2, checks=2)
    task = pixels(data, moved=False)
    frozen = {n: p.clone() for n, p in task.model.backbone.named_parameters()}
    before = evaluated(task, data)
    fit(task, data, Engine(epochs=3, check_every=3, device="cpu"), tmp_path)
    after = evaluated(task, data)
    assert after["loss"] < 0.99 * before["loss"]
    assert 0 < after["disagreement"] < 1
    assert all(torch.equal(p, frozen[n]) for n, p in task.model.backbone.named_parameters())
    assert evaluated(task, data) == after
    ((_, images),) = task.pictures(data).rows
    assert [a.shape for a in images.values()] == [(16, 16 * 6, 3)] * 3


def test_views_that_are_given_away_agree():
    """With a UNet that tells the noise exactly, what is left is the true views; with one that says 0 it is noise."""
    data = GeneratedSolids(size=32, views=4, objects=2, batch_size=1, checks=2)
    task = pixels(data)
    batch = next(iter(data.test()))
    x = batch["image"].flatten(0, 1)
    found = {}
    for name, right in (("true", 1.0), ("noise", 0.0)):

        def told(batch, x, noise, steps, *others, right=right):
            kept = task.schedule.alphas_cumprod[steps][:, None, None, None]
            noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
            clean = (noisy - right * (1 - kept).sqrt() * noise) / kept.sqrt()
            return torch.ones(len(x)), torch.ones(len(x)), clean

        task._of_views = told
        found[name] = evaluated(task, data)["disagreement"]
    assert x.shape == (4, 3, 32, 32)
    assert found["true"] < 0.05 < 0.2 < found["noise"]


def evaluated(task, data):
    task.eval()
    with torch.no_grad():
        for batch in data.test():
            task.evaluate(batch)
    return task.results()


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[5:15, 4:9] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "object.png")
    return tmp_path / "object.png"


def test_a_reference_is_cut_centred_and_put_on_grey(picture):
    from PIL import Image

    found = sampling.read_reference(picture, (40, 40))
    red = (found[0] > 0.9) & (found[1] < -0.9)
    rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
    assert (rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()) == (2, 37, 11, 28)  # 36 by 18
    assert not found[:, 0].any()
    Image.new("RGB", (8, 8)).save(picture)
    with pytest.raises(RequestError, match="no pixel is transparent: give the object alone"):
        sampling.read_reference(picture, (40, 40))
    Image.new("RGBA", (8, 8)).save(picture)
    with pytest.raises(RequestError, match="nothing is left"):
        sampling.read_reference(picture, (40, 40))
    picture.write_bytes(b"")
    with pytest.raises(RequestError, match="not a readable image"):
        sampling.read_reference(picture, (40, 40))


def test_pixels_are_made_without_a_pipeline(picture):
    task, steps = pixels(), []
    made = task.generate(Wanted(steps=3, count=2, seed=5, image=picture), progress=lambda *a: steps.append(a))
    assert (made.kind, made.names) == ("views", ("front", "right", "back", "left"))
    assert [a.shape for a in made.images] == [(4, 16, 16, 3)] * 2
    assert not np.array_equal(*made.images)
    assert steps == [(i + 1, 6) for i in range(6)]
    again = task.generate(Wanted(steps=3, seed=6, image=picture), progress=lambda *a: None)
    assert np.array_equal(again.images[0], made.images[1])
    assert (made.settings["guidance"], made.settings["steps"]) == (3.0, 3)
    without = task.generate(Wanted(steps=3, seed=5, views=6), progress=lambda *a: None)
    assert without.images[0].shape == (6, 16, 16, 3)
    assert len(without.names) == 6


@pytest.mark.parametrize("xl", [False, True])
def test_latents_are_trained_and_made_through_a_pipeline(tmp_path, picture, xl):
    folder = save_pipeline(tmp_path, xl=xl)
    data = GeneratedSolids(size=64, views=3, objects=2, batch_size=1)
    model = adapt(tiny("tiny_sdxl" if xl else "tiny_sd15"), MVAdapter(reference=True))
    shake(model, "default", 0.05)
    task = MultiViewDenoising(model, data, Optimiser(), pipeline=str(folder))
    task.train()
    loss = task.loss(batch_of(data))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert sum(p.grad is not None for p in model.trainable().values()) > 100
    before = task.pipeline.scheduler
    made = task.generate(Wanted(prompt="a cat", steps=2, image=picture), progress=lambda *a: None)
    assert made.images[0].shape == (3, 64, 64, 3)
    assert made.images[0].std() > 0
    assert task.pipeline.scheduler is before
    again = task.generate(Wanted(prompt="a cat", steps=2, image=picture), progress=lambda *a: None)
    assert np.array_equal(again.images[0], made.images[0])
    other = task.generate(Wanted(prompt="a cat", steps=2), progress=lambda *a: None)
    assert other.settings["guidance"] == 7.0
    assert not np.array_equal(other.images[0], made.images[0])
    with pytest.raises(RequestError, match="give a prompt, a reference image, or both"):
        task.generate(Wanted(), progress=lambda *a: None)


def test_what_is_not_made_is_said(picture):
    task = pixels(method=MVAdapter(vae_factor=1))
    for wanted, message in (
        (Wanted(mesh=picture), "told where cameras stand, not the geometry of a mesh: .*such as diffusion/mv_texture"),
        (Wanted(prompt="a cat"), "--prompt: this model makes pixels, without a text encoder"),
        (Wanted(guidance=2.0), "--guidance 2: there is neither text nor --image"),
        (Wanted(frames=3), "--frames: this makes views"),
        (Wanted(image=picture), "no branch for a reference"),
        (Wanted(views=0), "views 0|at least 1"),
    ):
        with pytest.raises(RequestError, match=message):
            task.generate(wanted, progress=lambda *a: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_dropout": 1.5}, "image_dropout 1.5: use a share"),
        ({"min_snr": 0.0}, "min_snr 0: use a number above 0"),
        ({"fewer_views": True}, "chooses among the 6 views"),
        ({"shift": 0.0}, "shift 0: use a number above 0"),
        ({"data": GeneratedSolids(size=16, apart=True)}, "data.apart gives single images"),
        ({"method": MVAdapter(vae_factor=1, views="row_column")}, "views: row_column; maps: rays want views: row"),
        ({"method": ResAdapter(rank=2)}, "several views at once need an MVAdapter"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(RequestError, match=message):
        pixels(**settings)


@pytest.mark.parametrize(("velocity", "first"), [(True, 999), (False, 500)])
def test_only_a_model_of_the_velocity_starts_at_the_step_of_most_noise(velocity, first):
    task, seen = pixels(velocity=velocity), []
    task.unet.register_forward_pre_hook(lambda module, args: seen.append(int(torch.as_tensor(args[1]).max())))
    task.generate(Wanted(steps=2, seed=5, views=4), progress=lambda *a: None)
    assert seen[0] == first
