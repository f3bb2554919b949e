"""Image to video: a video model learns to tell the noise of all frames but the first, and animates images so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.backbones.motion import MotionUNet
from modalities.diffusion.data.images import read_picture
from modalities.diffusion.denoising import Denoising
from modalities.diffusion.sampling import check_length, check_size, check_textless, finite, to_bytes
from modalities.diffusion.video.colour import match_colours
from modalities.diffusion.video.starts import started
from modalities.diffusion.video.vision import Vision
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.generating import Made, Wanted
from shared.training.optimiser import Optimiser


class ImageToVideoDenoising(Denoising):
    """Mean squared error of the noise that is predicted for frames 1 on, beside a clean frame 0 (Guo et al., 2023).

    model: its backbone is a ``MotionUNet``.  data: as of ``Denoising``, with ``frames``; batches hold ``clip``
    (B, bands, F, H, W) in place of ``image``.  pipeline: of a Stable Diffusion or AnimateDiff pipeline.
    caption_dropout: share of training clips whose text, and image where there is a content branch, is left out, for
    guidance; the first frame never is.
    image_encoder: where the backbone has a content branch and the pipeline no image encoder, the folder or Hugging Face
    name of a CLIP vision model ("h94/IP-Adapter/models/image_encoder").
    start: what generated frames start from, the frame similarity ``prior`` or noise (``video.starts``).
    prior_t: the timestep to start at, of 1000; None is the sampler's first. Fewer keep more of the image.
    mask_p: of the prior, the share of blurred elements.  match_colours: whether generated frames take the colours of
    the first (``video.colour``).
    """

    steps: ClassVar[int] = 25
    guidance: ClassVar[float] = 7.5
    negative: ClassVar[str] = (
        "worst quality, low quality, normal quality, lowres, bad anatomy, bad hands, watermark, moles"
    )

    def __init__(
        self,
        model: Adapted,
        data: Any,
        optimiser: Optimiser,
        *,
        pipeline: str | None = None,
        caption_dropout: float = 0.1,
        image_encoder: str | None = None,
        start: Literal["prior", "iid", "mixed", "progressive", "lamp"] = "prior",
        prior_t: int | None = None,
        mask_p: float = 0.5,
        match_colours: bool = True,
    ):
        if not isinstance(model.backbone, MotionUNet):
            raise RequestError(f"image to video needs a MotionUNet, not {type(model.backbone).__name__}")
        if not 0 <= mask_p <= 1 or not (prior_t is None or 0 <= prior_t < 1000):
            raise RequestError(f"mask_p {mask_p:g}, prior_t {prior_t}: use a share from 0 to 1, and a step of 0 to 999")
        super().__init__(model, data, optimiser, pipeline=pipeline, caption_dropout=caption_dropout)
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        # AnimateDiff's noise, another than Stable Diffusion's.
        self.schedule: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False
        )
        self.vision = None if model.backbone.content is None else Vision(self.pipeline, image_encoder)
        self.step, self.frames = getattr(data, "step", 64), getattr(data, "frames", 16)
        self.start = start
        self.prior_t, self.mask_p, self.match_colours = prior_t, mask_p, match_colours

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> Tensor:
        clip = batch["clip"]
        x = self.encode(clip)
        steps = torch.randint(self.schedule.config.num_train_timesteps, (len(x),), device=x.device)
        dropped = (torch.rand(len(x)) < self.caption_dropout).tolist()
        captions = ["" if d else c for d, c in zip(dropped, batch["caption"], strict=True)]
        told = self.told(captions, clip[:, :, 0], dropped)
        return self._errors(x, torch.randn_like(x), steps, told).mean()

    def evaluate(self, batch: dict[str, Any]) -> None:
        clip = batch["clip"]
        height, width = clip.shape[3:]
        x = self.encode(clip)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(height * 65_536 + width)).to(x)
        total = self.schedule.config.num_train_timesteps
        steps = ((torch.arange(len(x), device=x.device) + 0.5) * total / len(x)).long()
        errors = self._errors(x, noise, steps, self.told(batch["caption"], clip[:, :, 0]))
        self.errors.update(self.sizes.index((height, width)), errors)

    def _errors(self, x: Tensor, noise: Tensor, steps: Tensor, condition: dict[str, Any]) -> Tensor:
        """The mean squared error of each clip (B,), over all frames but the first, which is given clean."""
        predicted = self.model(self._noised(x, noise, steps), steps, **condition).sample
        return F.mse_loss(predicted[:, :, 1:].float(), noise[:, :, 1:].float(), reduction="none").mean((1, 2, 3, 4))

    def _noised(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1], self.schedule.add_noise(x, noise, steps)[:, :, 1:]], dim=2)

    def told(self, captions: Sequence[str], images: Tensor, dropped: Sequence[bool] = ()) -> dict[str, Any]:
        """What the UNet is told of each video: its text, and its image (B, 3, H, W) where it has a content branch."""
        given = self.unet.blank(len(captions))
        if self.pipeline is not None:
            found = self._frozen().encode_prompt(list(captions), self.device, 1, False)
            given["encoder_hidden_states"] = found[0]
        if self.vision is not None:
            given["added_cond_kwargs"] = {"image_embeds": [self.vision(images, dropped)]}
        return given

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) or clips (B, 3, F, H, W) to latents, frame by frame."""
        if image.ndim == 4 or self.pipeline is None:
            return super().encode(image)
        return torch.stack([super(ImageToVideoDenoising, self).encode(frame) for frame in image.unbind(2)], dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if latents.ndim == 4 or self.pipeline is None:
            return super().decode(latents)
        return torch.stack([super(ImageToVideoDenoising, self).decode(frame) for frame in latents.unbind(2)], dim=2)

    @torch.no_grad()
    def pictures(self, data: Any) -> Any:
        """Of a test clip at each size: the first frame, the last one as it is, half noised, and denoised at once."""
        from shared.report.plots import Pictures

        self.eval()
        half = torch.tensor([self.schedule.config.num_train_timesteps // 2], device=self.device)
        rows = []
        for batch in data.test():
            clip = batch["clip"][:1].to(self.device)
            x = self.encode(clip)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            noisy = self._noised(x, noise, half)
            said = self.model(noisy, half, **self.told(batch["caption"][:1], clip[:, :, 0])).sample
            clean = self.schedule.step(said, half.item(), noisy).pred_original_sample
            shown = {"first": x[:, :, 0], "last": x[:, :, -1], "noisy": noisy[:, :, -1], "denoised": clean[:, :, -1]}
            name = f"{clip.shape[4]} x {clip.shape[3]}: {batch['caption'][0]}"
            rows.append((name, {key: to_bytes(self.decode(value)[0]) for key, value in shown.items()}))
        return Pictures(rows, {})

    # -- generating ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, wanted: Wanted, *, progress: Callable[[int, int], None]) -> Made:
        """Animate ``wanted.image``, which is the first frame of what comes of it.

        The image is resized to cover ``wanted.size`` and cropped in the middle; None: resized so that its shorter side
        is the data's, or the UNet's own, both sides multiples of the data's step.
        """
        self._check_wanted(wanted)
        self.eval()
        steps = self.steps if wanted.steps is None else wanted.steps
        frames = self.frames if wanted.frames is None else wanted.frames
        if frames < 2:
            raise RequestError(f"{frames} frames: a video has at least 2, of which the image is the first")
        # Without a pipeline there is nothing to be guided by: neither text nor features of the image.
        guidance = 1 if self.pipeline is None else self.guidance if wanted.guidance is None else wanted.guidance
        negative = self.negative if wanted.negative is None else wanted.negative
        image = first_frame(wanted.image, wanted.size or min(self._size()), self.step).to(self.device)
        latents = self.encode(image)
        if guidance == 1:  # nothing is asked of the negative prompt
            told = self.told([wanted.prompt], image)
        else:
            told = self.told([negative, wanted.prompt], image.expand(2, -1, -1, -1), [True, False])
        videos = []
        for number in range(wanted.count):
            generator = torch.Generator().manual_seed(wanted.seed + number)
            sampler, times = sampled(steps, self.prior_t)
            x = started(latents, frames, sampler, int(times[0]), generator, start=self.start, mask_p=self.mask_p)
            for done, time in enumerate(times):
                x = denoised(self.model, sampler, x, time, told, guidance)
                progress(number * len(times) + done + 1, wanted.count * len(times))
            video = to_bytes(finite(self.decode(x)[0]).transpose(0, 1))
            videos.append(match_colours(video) if self.match_colours else video)
        settings = {
            "prompt": wanted.prompt or None, "negative": None if guidance == 1 else negative,
            "image": str(wanted.image), "steps": steps, "guidance": None if self.pipeline is None else guidance,
            "frames": frames, "width": image.shape[3], "height": image.shape[2], "seed": wanted.seed,
            "count": wanted.count, "start": self.start, "prior_t": self.prior_t, "mask_p": self.mask_p,
            "match_colours": self.match_colours,
        }  # fmt: skip
        return Made(kind="frames", images=videos, settings=settings)

    def _check_wanted(self, wanted: Wanted) -> None:
        if wanted.image is None:
            raise RequestError("image to video needs an image to animate: give --image")
        if wanted.views is not None or wanted.mesh is not None:
            raise RequestError("image to video makes frames, no views of an object or mesh")
        if wanted.size is not None:
            check_size(wanted.size, self.step)
        if self.pipeline is not None:
            check_length(self.pipeline, prompt=wanted.prompt, negative=wanted.negative)
            return
        check_textless(wanted)
        if wanted.guidance is not None:
            raise RequestError(f"--guidance {wanted.guidance:g}: there is no text to guide (task.pipeline is null)")

    def _size(self) -> tuple[int, int]:
        """(height, width) where nothing else is asked: the data's first size, or the UNet's own."""
        side = self.unet.unet.config.sample_size * (1 if self.pipeline is None else self.pipeline.vae_scale_factor)
        return self.sizes[0] if self.sizes else (side, side)  # type: ignore[return-value]


def sampled(steps: int, prior_t: int | None = None) -> tuple[Any, Tensor]:
    """I2V-Adapter's sampler, DDIM on AnimateDiff's noise, and its timesteps, from ``prior_t`` down.

    Raises RequestError where no timestep is left.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    sampler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    if not 1 <= steps < 1000:
        raise RequestError(f"{steps} steps: use 1 to 999")
    sampler.set_timesteps(steps)
    times = sampler.timesteps if prior_t is None else sampler.timesteps[sampler.timesteps <= prior_t]
    if not len(times):
        raise RequestError(f"prior_t {prior_t}: the last of {steps} steps is at {int(sampler.timesteps[-1])}")
    return sampler, times


def denoised(model: Any, sampler: Any, x: Tensor, time: Tensor, told: dict[str, Any], guidance: float) -> Tensor:
    """One step of the sampler on the frames behind the first, which stays as it is.

    x: (B, C, F, h, w).  told: keyword arguments of the UNet, for the videos without and with what is wanted, one after
    the other; with guidance 1 for those with it alone.
    """
    noise = model(x if guidance == 1 else torch.cat([x, x]), time.to(x.device), **told).sample
    if guidance != 1:
        without, with_it = noise.chunk(2)
        noise = without + guidance * (with_it - without)
    return torch.cat([x[:, :, :1], sampler.step(noise[:, :, 1:], time, x[:, :, 1:]).prev_sample], dim=2)


def keep_first_frame(first: Tensor) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """``callback_on_step_end`` for an AnimateDiff pipeline of diffusers: puts ``first`` (B, C, h, w) back in each step.

    Give the pipeline ``latents=started(first, ...)`` too.
    """

    def put_back(pipeline: Any, step: int, time: Any, held: dict[str, Any]) -> dict[str, Any]:
        latents = held["latents"]
        return {"latents": torch.cat([first[:, :, None].to(latents), latents[:, :, 1:]], dim=2)}

    return put_back


def first_frame(path: Any, size: int | tuple[int, int], step: int) -> Tensor:
    """An image (1, 3, H, W) in -1 to 1.

    size: (height, width), covered by it and cropped in the middle; a number: its shorter side has about as many pixels,
    and both are multiples of ``step``.
    """
    from PIL import Image, ImageOps

    picture, how = read_picture(path), Image.Resampling.BICUBIC
    if isinstance(size, tuple):
        pixels = np.array(ImageOps.fit(picture, (size[1], size[0]), how))
    else:
        sides = [max(step, round(side * size / min(picture.size) / step) * step) for side in picture.size]
        pixels = np.array(picture.resize((sides[0], sides[1]), how))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
