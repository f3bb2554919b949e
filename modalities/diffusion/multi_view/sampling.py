"""Views of an object made by a multi-view model: through its pipeline, or without one in pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion import cameras
from modalities.diffusion.multi_view.data import on_grey
from modalities.diffusion.shifted import shifted
from shared.errors import RequestError
from shared.generating import Made, Wanted

NEGATIVE = "watermark, ugly, deformed, noisy, blurry, low contrast"


def views(task: Any, wanted: Wanted, progress: Callable[[int, int], None]) -> Made:
    """What a ``MultiViewDenoising`` makes of what is wanted. Raises RequestError where it does not make that."""
    if wanted.mesh is not None or task.maps == "geometry":
        raise RequestError(
            "this makes views from text or an image; a model of geometry wants maps rendered from a mesh"
        )
    if wanted.frames is not None:
        raise RequestError("this makes views, no video: give no frames")
    if wanted.image is not None and not task.refers:
        raise RequestError("this adapter has no branch for a reference image: give none, or train with reference: true")
    if wanted.image is None and not wanted.prompt and task.pipeline is not None:
        raise RequestError("give a prompt, a reference image, or both")
    count = task.views if wanted.views is None else wanted.views
    around, size = cameras.view_guided(count), wanted.size or (task.size, task.size)
    control = cameras.ray_maps(around, (1, 1)).to(task.device) if task.conditioned else None
    reference = None if wanted.image is None else read_reference(wanted.image, size).to(task.device)[None]
    settings = {
        "prompt": wanted.prompt, "negative": NEGATIVE if wanted.negative is None else wanted.negative,
        "size": list(size), "views": count, "steps": 50 if wanted.steps is None else wanted.steps, "seed": wanted.seed,
        "guidance": (7.0 if reference is None else 3.0) if wanted.guidance is None else wanted.guidance,
        "image": None if wanted.image is None else str(wanted.image), "shift": task.shift, "mode": task.shift_mode,
    }  # fmt: skip
    make = in_pixels if task.pipeline is None else with_pipeline
    total, found = settings["steps"] * wanted.count, []
    for i in range(wanted.count):

        def told(step: int, before: int = i * settings["steps"]) -> None:
            progress(before + step, total)

        found.append(make(task, settings | {"seed": wanted.seed + i}, control, reference, told))
    return Made(kind="views", images=found, settings=settings | {"count": wanted.count}, names=around.names)


def with_pipeline(
    task: Any, settings: dict[str, Any], control: Tensor | None, reference: Tensor | None, told: Callable[[int], None]
) -> np.ndarray:
    """V views (V, H, W, 3), uint8. control: (V, 6, ...) in 0 to 1.  reference: (1, 3, H, W) in -1 to 1."""
    pipeline = task._frozen()
    wanted: dict[str, Any] = {"num_views": 1 if task.apart else settings["views"]}
    if control is not None:
        wanted["control"] = control
    if reference is not None:
        found = task.encode(reference)
        wanted["ref_latents"] = found.expand(settings["views"], -1, -1, -1) if task.apart else found

    def stepped(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        told(index + 1)
        return given

    before = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline.scheduler = shifted(before, settings["shift"], settings["mode"])
        images = pipeline(
            settings["prompt"],
            negative_prompt=settings["negative"],
            height=settings["size"][0],
            width=settings["size"][1],
            num_images_per_prompt=settings["views"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            cross_attention_kwargs=wanted,
            callback_on_step_end=stepped,
            output_type="np",
        ).images
    finally:
        pipeline.scheduler = before
    return (images * 255).round().clip(0, 255).astype(np.uint8)


@torch.no_grad()
def in_pixels(
    task: Any, settings: dict[str, Any], control: Tensor | None, reference: Tensor | None, told: Callable[[int], None]
) -> np.ndarray:
    """The same without a pipeline, by DDIM (Song et al., 2021); guidance is that of the reference."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    count, (height, width) = settings["views"], settings["size"]
    scheduler: Any = DDIMScheduler.from_config(task.schedule.config, set_alpha_to_one=False)
    scheduler.set_timesteps(settings["steps"])
    generator = torch.Generator().manual_seed(settings["seed"])
    x = torch.randn(count, task.unet.unet.config.in_channels, height, width, generator=generator).to(task.device)
    guided = reference is not None and settings["guidance"] != 1
    if task.apart and reference is not None:
        reference = reference.expand(count, -1, -1, -1)
    wanted = {"num_views": 1 if task.apart else count, "control": control, "ref_latents": reference}
    given = task.unet.blank(2 * count if guided else count)
    for i, step in enumerate(scheduler.timesteps):
        said = task.model(torch.cat([x, x]) if guided else x, step, **given, context=wanted).sample
        if guided:
            without, with_it = said.chunk(2)
            said = without + settings["guidance"] * (with_it - without)
        x = scheduler.step(said, step, x).prev_sample
        told(i + 1)
    return pixels(x)


def pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in -1 to 1 as uint8 (N, H, W, 3)."""
    return ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def read_reference(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture of an object with alpha as the published models take it, (3, H, W) in -1 to 1.

    Raises RequestError where it is no picture, or has no alpha: what removes a background is not part of this.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path}: not a readable image ({error})") from error
    return placed(picture, size, str(path))


def placed(picture: Any, size: tuple[int, int], name: str = "reference") -> Tensor:
    """An RGBA picture cut to its object, in the middle of ``size`` on grey, the longer side at 0.9 of it."""
    box = picture.getchannel("A").getbbox()
    if box is None or picture.getchannel("A").getextrema()[0] == 255:
        what = "nothing is left" if box is None else "no pixel is transparent"
        raise RequestError(f"{name}: {what}: give the object alone, with its background removed")
    height, width = size
    cut = picture.crop(box)
    scale = 0.9 * min(width / cut.width, height / cut.height)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))))
    whole = torch.zeros(4, height, width)
    top, left = (height - cut.height) // 2, (width - cut.width) // 2
    whole[:, top : top + cut.height, left : left + cut.width] = (
        torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
    )
    return on_grey(whole[:3], whole[3:])
