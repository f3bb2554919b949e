"""Image to video: what the loss is of, what stays the image, and the same frames from diffusers' own pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from modalities.diffusion.backbones.motion import MotionUNet
from modalities.diffusion.video.i2v_adapter import I2VAdapter
from modalities.diffusion.video.image_to_video import ImageToVideoDenoising, first_frame, keep_first_frame, sampled
from modalities.diffusion.video.starts import started
from modalities.diffusion.video.vision import Vision
from shared import Adapted, adapt
from shared.errors import RequestError
from shared.generating import Wanted
from shared.training.optimiser import Optimiser
from tests.modalities.diffusion.conftest import shake, tiny
from tests.modalities.diffusion.test_interop import ip_adapter
from tests.modalities.diffusion.test_motion import plus, write
from tests.modalities.diffusion.videos import animate_diff, moving

PIXELS = {
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 8, "attention_head_dim": 4,
}  # fmt: skip
MOTION = {
    "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4,
    "motion_num_attention_heads": 2, "use_motion_mid_block": False,
}  # fmt: skip


def pixels(bands: int = 3) -> MotionUNet:
    return MotionUNet(bands, config=PIXELS, motion_config=MOTION)


def data(side: int = 16, **settings: Any) -> Any:
    return SimpleNamespace(bands=3, step=16, frames=4, checked_sizes=lambda: [(side, side)], **settings)


def task_of(backbone: MotionUNet | None = None, side: int = 16, **settings: Any) -> ImageToVideoDenoising:
    model = adapt(pixels() if backbone is None else backbone, I2VAdapter(), name="i2v")
    shake(model, "i2v")
    return ImageToVideoDenoising(model, data(side), Optimiser(), **settings).eval()


def clip(count: int = 2, frames: int = 4, side: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(count, 3, frames, side, side, generator=generator) * 2 - 1
    return {"clip": images, "caption": ["a cat", "a dog"][:count], "name": ["0", "1"][:count]}


def picture(folder: Path, size: tuple[int, int] = (40, 24)) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(values).save(folder / "image.png")
    return folder / "image.png"


def quiet(done: int, total: int) -> None:
    return None


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_first_frame_goes_in_clean_and_counts_for_nothing():
    task = task_of()
    seen: list[Tensor] = []
    task.model.backbone.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    batch = clip()
    x, noise = task.encode(batch["clip"]), torch.randn(2, 3, 4, 16, 16)
    steps = torch.tensor([700, 300])
    with torch.no_grad():
        errors = task._errors(x, noise, steps, task.told(batch["caption"], batch["clip"][:, :, 0]))
        assert torch.equal(seen[0][:, :, 0], x[:, :, 0])
        signal = task.schedule.alphas_cumprod[steps].view(2, 1, 1, 1, 1)
        torch.testing.assert_close(seen[0][:, :, 1:], (signal.sqrt() * x + (1 - signal).sqrt() * noise)[:, :, 1:])
        noise[:, :, 0] += 100
        assert torch.equal(errors, task._errors(x, noise, steps, task.told(batch["caption"], batch["clip"][:, :, 0])))
        said = task.model(seen[0], steps, **task.told(batch["caption"], x[:, :, 0])).sample
    torch.testing.assert_close(errors, ((said - noise) ** 2)[:, :, 1:].flatten(1).mean(1))


def test_training_reaches_the_adapter_alone_and_lowers_the_loss():
    task = task_of().train()
    optimiser = torch.optim.AdamW(task.model.trainable().values(), 2e-2)
    batch, losses = clip(), []
    for number in range(12):
        torch.manual_seed(number % 2)
        loss = task.loss(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] + losses[-2] < 0.98 * (losses[0] + losses[1])
    assert all(p.grad is None for p in task.model.backbone.parameters())


def test_an_evaluation_is_the_same_each_time_and_told_by_size():
    task = task_of()
    found = []
    for _ in range(2):
        with torch.no_grad():
            task.evaluate(clip())
        found.append(task.results())
    assert found[0] == found[1]
    assert found[0]["loss"] == pytest.approx(found[0]["loss/16x16"])
    assert found[0]["loss"] > 0


def test_what_does_not_fit_is_named():
    from modalities.diffusion.backbones.unet import DiffusersUNet

    with pytest.raises(RequestError, match="image to video needs a MotionUNet, not DiffusersUNet"):
        ImageToVideoDenoising(Adapted(DiffusersUNet(config="tiny_sd15")), data(), Optimiser())
    with pytest.raises(RequestError, match="the UNet takes 4 channels, the images have 3"):
        task_of(MotionUNet(config="tiny_sd15"))
    with pytest.raises(RequestError, match="mask_p 2, prior_t None"):
        task_of(mask_p=2)
    with pytest.raises(RequestError, match="mask_p 0.5, prior_t 1000"):
        task_of(prior_t=1000)


# -- generating on pixels ----------------------------------------------------------------------------------------------


def test_an_image_becomes_the_first_frame_and_others_follow(tmp_path):
    task, told = task_of(match_colours=False), []
    path = picture(tmp_path)
    wanted = Wanted(image=path, steps=3, count=2, seed=5)
    made = task.generate(wanted, progress=lambda done, total: told.append((done, total)))
    assert (made.kind, len(made.images), made.images[0].shape, made.images[0].dtype) == (
        "frames",
        2,
        (4, 16, 32, 3),
        np.uint8,
    )
    wanted_first = np.array(Image.open(path).resize((32, 16), Image.Resampling.BICUBIC))
    for video in made.images:
        assert np.array_equal(video[0], wanted_first)
        assert all((video[i] != video[0]).any() for i in range(1, 4))
    assert not np.array_equal(made.images[0], made.images[1])
    assert told == [(i, 6) for i in range(1, 7)]
    again = task.generate(wanted, progress=quiet)
    assert all(np.array_equal(a, b) for a, b in zip(made.images, again.images, strict=True))
    second = task.generate(Wanted(image=path, steps=3, seed=6), progress=quiet)
    assert np.array_equal(second.images[0], made.images[1])
    assert made.settings["guidance"] is made.settings["negative"] is None
    assert made.rate == 8


def test_frames_size_start_and_guidance_are_as_wanted(tmp_path):
    task = task_of(start="mixed")
    path = picture(tmp_path)
    made = task.generate(Wanted(image=path, frames=3, size=(48, 32), steps=2), progress=quiet)
    assert made.images[0].shape == (3, 48, 32, 3)
    with pytest.raises(RequestError, match="needs an image to animate"):
        task.generate(Wanted(prompt="x"), progress=quiet)
    with pytest.raises(RequestError, match="1 frames: a video has at least 2"):
        task.generate(Wanted(image=path, frames=1), progress=quiet)
    with pytest.raises(RequestError, match="makes frames, no views"):
        task.generate(Wanted(image=path, views=4), progress=quiet)
    with pytest.raises(RequestError, match="--prompt: this model makes pixels, without a text encoder"):
        task.generate(Wanted(image=path, prompt="it moves"), progress=quiet)
    with pytest.raises(RequestError, match="--guidance 2: there is no text to guide"):
        task.generate(Wanted(image=path, guidance=2), progress=quiet)
    with pytest.raises(RequestError, match="--size 32x24: sides go by 16 pixels here"):
        task.generate(Wanted(image=path, size=(24, 32)), progress=quiet)


def test_the_later_frames_take_the_first_ones_colours(tmp_path):
    from modalities.diffusion.video.colour import match_colours

    path = picture(tmp_path)
    wanted = Wanted(image=path, steps=2, seed=1)
    plain = task_of(match_colours=False).generate(wanted, progress=quiet).images[0]
    matched = task_of().generate(wanted, progress=quiet).images[0]
    assert np.array_equal(matched, match_colours(plain))
    assert not np.array_equal(matched, plain)


def test_the_short_side_is_as_asked_and_both_are_multiples(tmp_path):
    for size, short, wanted in (((40, 24), 32, (32, 48)), ((24, 40), 32, (48, 32)), ((100, 30), 16, (16, 48))):
        image = first_frame(picture(tmp_path, size), short, 16)
        assert image.shape == (1, 3, *wanted)
        assert -1 <= float(image.min()) < float(image.max()) <= 1
    path = tmp_path / "halves.png"
    Image.fromarray(np.repeat(np.uint8([[0] * 8 + [255] * 8]), 8, axis=0)).save(path)
    image = first_frame(path, (16, 16), 16)  # of a picture of 8 x 16 the middle: half of it black, half white
    assert image.shape == (1, 3, 16, 16)
    assert (float(image[..., :6].max()), float(image[..., 10:].min())) == (-1, 1)


# -- with a pipeline ---------------------------------------------------------------------------------------------------


def test_latents_of_every_step_keep_the_first_frame_and_diffusers_agrees(tmp_path):
    """Our loop and AnimateDiffPipeline around the same UNet, unmodified but for a callback."""
    backbone = moving()
    pipe = animate_diff(tmp_path, backbone.unet)
    pipe.save_pretrained(tmp_path / "pipeline")
    task = task_of(backbone, 64, pipeline=str(tmp_path / "pipeline"), match_colours=False)
    seen: list[Tensor] = []
    task.model.backbone.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    path = picture(tmp_path, (64, 64))
    made = task.generate(Wanted(image=path, prompt="a cat", negative="bad", steps=3, seed=2), progress=quiet)
    latents = task.encode(first_frame(path, 64, 16))
    assert len(seen) == 3
    for x in seen:
        assert torch.equal(x[:, :, 0], latents.expand(2, -1, -1, -1))
    assert float((seen[2] - seen[1])[:, :, 1:].abs().max()) > 1e-3
    sampler, times = sampled(3)
    start = started(latents, 4, sampler, int(times[0]), torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = pipe(
            "a cat", num_frames=4, height=64, width=64, num_inference_steps=3, negative_prompt="bad", latents=start,
            guidance_scale=7.5, callback_on_step_end=keep_first_frame(latents), output_type="np",
        ).frames[0]  # fmt: skip
    assert np.abs(made.images[0].astype(float) - theirs * 255).max() <= 1.5
    decoded = ((task.decode(latents)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(made.images[0][0] - decoded).max() <= 1
    with task.model.disabled():
        bare = task.generate(Wanted(image=path, prompt="a cat", negative="bad", steps=3, seed=2), progress=quiet)
    assert not np.array_equal(bare.images[0], made.images[0])


def test_a_content_branch_sees_the_image_and_training_leaves_it_out_with_the_text(tmp_path):
    content = write(plus(tiny("tiny_sd15").unet), tmp_path / "ip.bin")
    backbone = moving(content=content)
    pipe = animate_diff(tmp_path, backbone.unet, sees=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    task = task_of(backbone, 64, pipeline=str(tmp_path / "pipeline"))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    told = task.told(["a", "b"], images)["added_cond_kwargs"]["image_embeds"][0]
    assert told.shape == (2, 1, 17, 12)
    nothing = task.told(["", "b"], images, [True, False])["added_cond_kwargs"]["image_embeds"][0]
    assert torch.equal(nothing[1], told[1])
    with torch.no_grad():
        zero = task.pipeline.image_encoder(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(nothing[0], zero)
    seen: list[Any] = []
    task.vision = lambda images, dropped=(): seen.append(list(dropped)) or told  # type: ignore[assignment,func-returns-value]
    task.caption_dropout = 1.0
    task.loss(clip(2, 4, 64)).backward()
    assert seen == [[True, True]]
    assert all(p.grad is not None for p in task.model.trainable().values())
    other = task_of(
        moving(content=content),
        64,
        pipeline=str(_without_eyes(pipe, tmp_path)),
        image_encoder=str(tmp_path / "encoder"),
    )
    again = other.told(["a", "b"], images)["added_cond_kwargs"]["image_embeds"][0]
    torch.testing.assert_close(again, told)
    with pytest.raises(RequestError, match="the pipeline no image encoder: give image_encoder"):
        task_of(moving(content=content), 64, pipeline=str(tmp_path / "blind"))
    made = task_of(moving(content=content), 64, pipeline=str(tmp_path / "pipeline")).generate(
        Wanted(image=picture(tmp_path), prompt="a cat", steps=1, frames=2), progress=quiet
    )
    assert made.images[0].shape == (2, 64, 112, 3)


def test_a_content_branch_of_summaries_is_told_them(tmp_path):
    """The first IP-Adapter: one vector an image, and zeros for none."""
    backbone = moving(content=write(ip_adapter(tiny("tiny_sd15").unet), tmp_path / "ip.bin"))
    pipe = animate_diff(tmp_path, backbone.unet, sees=True)
    told = Vision(pipe, None)(torch.rand(2, 3, 64, 64) * 2 - 1, [True, False])
    assert told.shape == backbone.blank(2)["added_cond_kwargs"]["image_embeds"][0].shape == (2, 1, 16)
    assert not told[0].any()
    call = (torch.randn(2, 4, 2, 8, 8), torch.tensor(300), torch.randn(2, 5, 32))
    with torch.no_grad():
        seen, blank = (
            backbone(*call, added_cond_kwargs={"image_embeds": [t]}).sample for t in (told, told[:1].expand(2, -1, -1))
        )
    assert torch.equal(seen[0], blank[0])
    assert float((seen[1] - blank[1]).abs().max()) > 1e-4


def _without_eyes(pipe: Any, folder: Path) -> Path:
    blind = copy.copy(pipe)
    blind.register_modules(image_encoder=None, feature_extractor=None)
    blind.save_pretrained(folder / "blind")
    return folder / "blind"
