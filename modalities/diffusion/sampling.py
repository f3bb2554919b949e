"""Images from a denoising UNet: through its pipeline with a prompt, or straight in pixels without text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import RequestError
from shared.generating import Made, Wanted

STEPS, GUIDANCE = 25, 7.5  # of the official configurations of ResAdapter, and its sampler (Lu et al., 2022)
SAMPLER = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
TOGETHER = 8  # images of pixels in one call
Progress = Callable[[int, int], None]


def check_alone(wanted: Wanted, task: str) -> None:
    """Raises RequestError where more is wanted than images, with or without a prompt."""
    options = ("views", "frames", "image", "mesh")
    if given := [f"--{name}" for name in options if getattr(wanted, name) is not None]:
        raise RequestError(f"{given[0]}: {task} makes single images from a prompt or from noise")


def check_size(size: tuple[int, int], factor: int) -> None:
    """Raises RequestError where a side (height, width) is no multiple of ``factor`` pixels, or none to make."""
    height, width = size
    if min(size) < factor or height % factor or width % factor:
        near = "x".join(str(max(factor, round(side / factor) * factor)) for side in (width, height))
        raise RequestError(f"--size {width}x{height}: sides go by {factor} pixels here, such as {near}")


def check_length(pipeline: Any, **texts: str | None) -> None:
    """Raises RequestError where a text is so long that the library would cut it."""
    for option, text in texts.items():
        most, count = pipeline.tokenizer.model_max_length, len(pipeline.tokenizer(text or "").input_ids)
        if count > most:
            raise RequestError(f"--{option}: {count} tokens, the text encoder reads {most}: shorten it")


def check_textless(wanted: Wanted) -> None:
    """Raises RequestError where text is given to a model of pixels, which has no text encoder."""
    if text := next((f"--{name}" for name in ("prompt", "negative") if getattr(wanted, name)), None):
        raise RequestError(f"{text}: this model makes pixels, without a text encoder (task.pipeline is null)")


def sampler(config: Any) -> Any:
    """ResAdapter's published sampler over the noise schedule of a scheduler's configuration."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(config, **SAMPLER)


def with_pipeline(pipeline: Any, wanted: Wanted, progress: Progress) -> Made:
    """Images of the prompt, one after the other, each with a seed of its own: ``seed``, ``seed`` + 1, …"""
    factor = pipeline.vae_scale_factor
    side = pipeline.unet.config.sample_size * factor
    height, width = size = wanted.size or (side, side)
    check_size(size, factor)
    steps, guidance = wanted.steps or STEPS, GUIDANCE if wanted.guidance is None else wanted.guidance
    check_length(pipeline, prompt=wanted.prompt, negative=wanted.negative)
    before, pipeline.scheduler = pipeline.scheduler, sampler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    try:
        for index in range(wanted.count):

            def told(pipe: Any, step: int, time: Any, values: dict[str, Any], index: int = index) -> dict[str, Any]:
                progress(index * steps + step + 1, wanted.count * steps)
                return values

            made = pipeline(
                wanted.prompt, negative_prompt=wanted.negative, height=height, width=width, num_inference_steps=steps,
                guidance_scale=guidance, generator=torch.Generator().manual_seed(wanted.seed + index),
                output_type="np", callback_on_step_end=told,
            )  # fmt: skip
            images.append(of_pipeline(made.images))
    finally:
        pipeline.scheduler = before
    settings = {"prompt": wanted.prompt, "negative": wanted.negative, "guidance": guidance}
    return Made(kind="images", images=images, settings={**settings, **_settings(wanted, size, steps)})


@torch.no_grad()
def in_pixels(predict: Callable[[Tensor, Tensor], Tensor], channels: int, side: int, factor: int, config: Any,
              device: Any, wanted: Wanted, progress: Progress) -> Made:  # fmt: skip
    """Images from noise alone.

    predict: noisy images (B, channels, H, W) and the step (1,) to the noise in them.  side: pixels where no size is
    wanted.  factor: sides are multiples of it.  config: of the noise schedule it was trained with.
    """
    check_textless(wanted)
    if wanted.guidance is not None:
        raise RequestError(f"--guidance {wanted.guidance:g}: there is no text to be guided by (task.pipeline is null)")
    height, width = size = wanted.size or (side, side)
    check_size(size, factor)
    steps, seeds = wanted.steps or STEPS, range(wanted.seed, wanted.seed + wanted.count)
    images: list[np.ndarray] = []
    parts = [seeds[start : start + TOGETHER] for start in range(0, len(seeds), TOGETHER)]
    for number, part in enumerate(parts):
        generators = [torch.Generator().manual_seed(seed) for seed in part]
        solver = sampler(config)
        solver.set_timesteps(steps, device=device)
        x = torch.cat([torch.randn(1, channels, height, width, generator=each) for each in generators]).to(device)
        x = x * solver.init_noise_sigma
        for step, time in enumerate(solver.timesteps):
            noise = predict(solver.scale_model_input(x, time), time[None])
            x = solver.step(noise, time, x, generator=generators).prev_sample
            progress(number * steps + step + 1, len(parts) * steps)
        images += [_coloured(to_bytes(finite(image[None]))) for image in x]
    return Made(kind="images", images=images, settings=_settings(wanted, size, steps))


def _settings(wanted: Wanted, size: tuple[int, int], steps: int) -> dict[str, Any]:
    name = {"sampler": "DPMSolverMultistepScheduler", **SAMPLER}
    return {"width": size[1], "height": size[0], "count": wanted.count, "seed": wanted.seed, "steps": steps, **name}


def to_bytes(images: Tensor) -> np.ndarray:
    """(*, C, H, W) in -1 to 1 as uint8 (*, H, W, C)."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).numpy()


def of_pipeline(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) in 0 to 1, as diffusers' pipelines give them, as uint8. Raises RequestError as ``finite`` does."""
    return to_bytes(finite(torch.from_numpy(images)).movedim(-1, -3) * 2 - 1)


def finite(images: Tensor) -> Tensor:
    """The same images. Raises RequestError where a value of them is none."""
    if not bool(images.isfinite().all()):
        raise RequestError("the images came out as numbers that are not finite: use fewer --steps, less --guidance")
    return images


def _coloured(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 1 or 3) as (N, H, W, 3)."""
    return images if images.shape[-1] == 3 else np.repeat(images, 3, -1)
