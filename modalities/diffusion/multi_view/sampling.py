"""Views of an object or of a mesh made by a multi-view model: through its pipeline, or without one in pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.geometry import cameras
from modalities.diffusion.multi_view import texturing
from modalities.diffusion.multi_view.data import on_grey
from modalities.diffusion.sampling import check_length, check_size, check_textless, finite, of_pipeline, to_bytes
from modalities.diffusion.shifted import shifted
from shared.errors import RequestError
from shared.generating import Made, Wanted

NEGATIVE = "watermark, ugly, deformed, noisy, blurry, low contrast"
RATE = 2.0  # views a second, where they follow each other


def views(task: Any, wanted: Wanted, progress: Callable[[int, int], None]) -> Made:
    """What a ``MultiViewDenoising`` makes of what is wanted. Raises RequestError where it does not make that."""
    _check(task, wanted)
    count = task.views if wanted.views is None else wanted.views
    size = wanted.size or (task.size, task.size)
    settings = _settings(task, wanted, count, size)
    mesh, control = None, None
    if wanted.mesh is not None:
        mesh = texturing.prepared(wanted.mesh, up=task.up, front=task.front, texels=task.texels)
        around, control = cameras.geometry_guided(), texturing.seen(mesh, size)
    else:
        around = cameras.view_guided(count)
        control = cameras.ray_maps(around, (1, 1)) if task.conditioned else None
    control = None if control is None else control.to(task.device)
    reference = None if wanted.image is None else read_reference(wanted.image, size).to(task.device)[None]
    make = in_pixels if task.pipeline is None else with_pipeline
    total, found = settings["steps"] * wanted.count, []
    for i in range(wanted.count):

        def told(step: int, before: int = i * settings["steps"]) -> None:
            progress(before + step, total)

        found.append(make(task, settings | {"seed": wanted.seed + i}, control, reference, told))
    files: dict[str, bytes] = {}
    for i, images in enumerate(found):
        if mesh is not None and wanted.mesh is not None:
            facts = {n: v for n, v in settings.items() if v is not None} | {"seed": wanted.seed + i}
            name = f"{wanted.mesh.stem}.glb" if wanted.count == 1 else f"{i:03}/{wanted.mesh.stem}.glb"
            files[name] = texturing.painted(mesh, images, task.texels, facts)
    return Made(kind="views", images=found, settings=settings, names=around.names, files=files, rate=RATE)


def _check(task: Any, wanted: Wanted) -> None:
    if wanted.frames is not None:
        raise RequestError("--frames: this makes views, no video")
    if wanted.mesh is not None and task.maps != "geometry":
        raise RequestError(
            "--mesh: this model is told where cameras stand, not the geometry of a mesh: use one of data.maps: "
            "geometry, such as diffusion/mv_texture"
        )
    if task.maps == "geometry":
        if wanted.mesh is None:
            raise RequestError("this model paints the mesh it is told: give --mesh, with --prompt or --image")
        if wanted.views not in (None, 6):
            raise RequestError(f"--views {wanted.views}: a mesh is painted from its 6 sides")
        if not task.conditioned:
            raise RequestError("--mesh: this adapter has no encoder of maps: train one with method.condition: true")
    if wanted.image is not None and not task.refers:
        raise RequestError("this adapter has no branch for a reference image: give none, or train with reference: true")
    if task.pipeline is not None:
        check_size(wanted.size or (task.size, task.size), task.pipeline.vae_scale_factor)
        if wanted.image is None and not wanted.prompt:
            raise RequestError("give a prompt, a reference image, or both")
        check_length(task.pipeline, prompt=wanted.prompt, negative=wanted.negative)
        return
    check_textless(wanted)
    if wanted.image is None and wanted.guidance is not None:
        raise RequestError(f"--guidance {wanted.guidance:g}: there is neither text nor --image to be guided by")


def _settings(task: Any, wanted: Wanted, count: int, size: tuple[int, int]) -> dict[str, Any]:
    """All that makes the views, None for what does not count; the published steps, guidance and negative prompt."""
    usual = 7.0 if wanted.image is None else 3.0
    guided, told = wanted.image is not None or task.pipeline is not None, task.pipeline is not None
    paint = {"mesh": str(wanted.mesh), "texels": task.texels, "up": task.up, "front": task.front}
    return {
        "prompt": wanted.prompt or None,
        "negative": (NEGATIVE if wanted.negative is None else wanted.negative) if told else None,
        "image": None if wanted.image is None else str(wanted.image),
        "width": size[1],
        "height": size[0],
        "views": count,
        "count": wanted.count,
        "steps": 50 if wanted.steps is None else wanted.steps,
        "guidance": (usual if wanted.guidance is None else wanted.guidance) if guided else None,
        "seed": wanted.seed,
        "shift": task.shift,
        "shift_mode": task.shift_mode,
        **(paint if wanted.mesh is not None else {}),
    }


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
        pipeline.scheduler = shifted(before, settings["shift"], settings["shift_mode"])
        images = pipeline(
            settings["prompt"] or "",
            negative_prompt=settings["negative"],
            height=settings["height"],
            width=settings["width"],
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
    return of_pipeline(images)


@torch.no_grad()
def in_pixels(
    task: Any, settings: dict[str, Any], control: Tensor | None, reference: Tensor | None, told: Callable[[int], None]
) -> np.ndarray:
    """The same without a pipeline, by DDIM (Song et al., 2021); guidance is that of the reference.

    A model of the velocity starts at the step of most noise, where noise alone belongs (Lin et al., 2023). There one of
    the noise has next to nothing to say of the image, and its errors are multiplied: it starts a little below.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    count, height, width = (settings[name] for name in ("views", "height", "width"))
    config = task.schedule.config
    spacing = "trailing" if config.prediction_type == "v_prediction" else "leading"
    scheduler: Any = DDIMScheduler.from_config(config, set_alpha_to_one=False, timestep_spacing=spacing)
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
    return to_bytes(finite(x))


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
