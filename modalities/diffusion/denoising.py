"""Denoising: a UNet learns to tell the noise in an image, the training of text-to-image diffusion models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from modalities.diffusion import pipelines, sampling
from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.shifted import shifted
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.generating import Made, Wanted
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class Denoising(Task):
    """Mean squared error of the predicted noise (Ho et al., 2020), on the latents of a pipeline or on the pixels.

    model: its backbone is a ``DiffusersUNet``.  data: it gives ``bands``, ``step`` (pixels) and ``checked_sizes()``, of
    which ``generate`` needs the first alone; its batches hold ``image`` (B, bands, H, W) in -1 to 1, of one size, with
    ``caption``, ``crop`` and ``name``.
    pipeline: a folder or Hugging Face name of a Stable Diffusion (XL) pipeline, whose autoencoder, text encoders and
    noise schedule are used, frozen; None means pixels, no text, and Stable Diffusion's schedule.
    velocity, shift: without a pipeline, whether the velocity is predicted in place of the noise (Salimans and Ho,
    2022), and by how much the schedule is ``shifted`` to more noise.
    caption_dropout: share of training captions left empty, for guidance.

    Results of a split: ``loss``, the mean over images, and ``loss/<width>x<height>`` for each size. An evaluation draws
    the same noise every time, at steps spread evenly over the schedule.
    """

    def __init__(
        self,
        model: Adapted,
        data: Any,
        optimiser: Optimiser,
        *,
        pipeline: str | None = None,
        velocity: bool = False,
        shift: float = 1.0,
        caption_dropout: float = 0.1,
    ):
        super().__init__(model, optimiser)
        if not isinstance(model.backbone, DiffusersUNet):
            raise RequestError(f"denoising needs a DiffusersUNet, not {type(model.backbone).__name__}")
        if not 0 <= caption_dropout <= 1:
            raise RequestError(f"caption_dropout {caption_dropout:g}: use a share from 0 to 1")
        self.caption_dropout = caption_dropout
        self.pipeline = None if pipeline is None else _pipeline(pipeline, model.backbone.unet)
        if pipeline is not None and (velocity or shift != 1):
            raise RequestError(f"velocity, shift: the pipeline {pipeline} has what it predicts and its schedule")
        self.schedule = _schedule(self.pipeline, velocity)
        if shift != 1:
            self.schedule = shifted(self.schedule, shift)
        self._check(data)
        checked = getattr(data, "checked_sizes", list)
        self.sizes = [tuple(size) for size in checked()]
        self.errors = ErrorBySize(len(self.sizes))

    @property
    def unet(self) -> DiffusersUNet:
        return self.model.backbone  # type: ignore[return-value]

    def _check(self, data: Any) -> None:
        """The data's images must fit what the UNet takes."""
        channels = self.unet.unet.config.in_channels
        if self.pipeline is None:
            if channels != data.bands:
                raise RequestError(
                    f"the UNet takes {channels} channels, the images have {data.bands}: give the task a pipeline with "
                    "an autoencoder, or the backbone a config with other in_channels and out_channels"
                )
            return
        latent, factor = self.pipeline.vae.config.latent_channels, self.pipeline.vae_scale_factor
        step = getattr(data, "step", factor)
        if channels != latent or step % factor:
            raise RequestError(
                f"the pipeline's autoencoder makes {latent} channels at 1/{factor} of the size; the UNet takes "
                f"{channels} channels, and the sizes go by {step} pixels"
            )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        x = self.encode(batch["image"])
        noise = torch.randn_like(x)
        steps = torch.randint(self.schedule.config.num_train_timesteps, (len(x),), device=x.device)
        dropped = torch.rand(len(x)) < self.caption_dropout
        captions = ["" if d else c for d, c in zip(dropped.tolist(), batch["caption"], strict=True)]
        return self._errors(x, noise, steps, self.condition(batch, captions)).mean()

    def evaluate(self, batch: dict[str, Any]) -> None:
        height, width = batch["image"].shape[2:]
        x = self.encode(batch["image"])
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(height * 65_536 + width)).to(x)
        total = self.schedule.config.num_train_timesteps
        steps = ((torch.arange(len(x), device=x.device) + 0.5) * total / len(x)).long()
        errors = self._errors(x, noise, steps, self.condition(batch, batch["caption"]))
        self.errors.update(self.sizes.index((height, width)), errors)

    def results(self) -> dict[str, Any]:
        sums, counts = self.errors.compute().tolist()
        self.errors.reset()
        each = {f"loss/{w}x{h}": s / n for (h, w), s, n in zip(self.sizes, sums, counts, strict=True) if n}
        return {"loss": sum(sums) / sum(counts), **each}

    @torch.no_grad()
    def pictures(self, data: Any) -> Any:
        """A test image at the smallest, a middle and the largest size: as it is, half noised, denoised at once."""
        from shared.report.plots import Pictures

        self.eval()
        batches, rows = data.test().dataset, []
        half = torch.tensor([self.schedule.config.num_train_timesteps // 2], device=self.device)
        for index in sorted({0, len(batches) // 2, len(batches) - 1}):
            batch: dict[str, Any] = {key: value[:1] for key, value in batches[index].items()}
            batch["image"] = batch["image"].to(self.device)
            x = self.encode(batch["image"])
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index)).to(x)
            noisy = self.schedule.add_noise(x, noise, half)
            said = self.model(noisy, half, **self.condition(batch, batch["caption"])).sample
            clean = self.schedule.step(said, half.item(), noisy).pred_original_sample
            shown = {"image": batch["image"], "noisy": self.decode(noisy), "denoised": self.decode(clean)}
            height, width = batch["image"].shape[2:]
            shown = {name: sampling.to_bytes(value[0]) for name, value in shown.items()}
            rows.append((f"{width} x {height}: {batch['caption'][0]}", shown))
        return Pictures(rows, {})

    def load_adapter(self, path: Path) -> None:
        """A file of ours, a released ResAdapter, or a LoRA of other libraries, in the place of what there is."""
        for name in list(self.model.methods)[::-1]:
            self.model.remove(name)
        self.model = Adapted(self.unet)
        pipelines.load(self.model, path)

    def generate(self, wanted: Wanted, *, progress: Callable[[int, int], None]) -> Made:
        """Images of a prompt through the pipeline, or without one pixels from noise, by ResAdapter's published sampler
        (SDE-DPM-Solver++, Karras noise levels, 25 steps, guidance 7.5); without a size, at what the UNet was made for.
        """
        sampling.check_alone(wanted, type(self).__name__)
        self.eval()
        if self.pipeline is not None:
            return sampling.with_pipeline(self._frozen(), wanted, progress)
        config, schedule = self.unet.unet.config, self.schedule.config

        def predict(noisy: Tensor, step: Tensor) -> Tensor:
            return self.model(noisy, step, **self.unet.blank(len(noisy))).sample

        factor = 2 ** (len(config.block_out_channels) - 1)
        side = config.sample_size or 8 * factor
        return sampling.in_pixels(predict, config.in_channels, side, factor, schedule, self.device, wanted, progress)

    def _errors(self, x: Tensor, noise: Tensor, steps: Tensor, condition: dict[str, Any]) -> Tensor:
        """The mean squared error of each sample (B,): of the noise, or of the velocity where the schedule says so."""
        noisy = self.schedule.add_noise(x, noise, steps)
        predicted = self.model(noisy, steps, **condition).sample
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(x, noise, steps) if velocity else noise
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) to latents (B, C, H / f, W / f): drawn in training, their mode in evaluation."""
        # Contiguous: on a CPU, torch crashes in the backward of a trained norm over a channels-last input without one.
        if self.pipeline is None:
            return image.contiguous()
        vae = self._frozen().vae
        found = vae.encode(image.to(vae.dtype)).latent_dist
        latents = found.sample() if self.training else found.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * vae.config.scaling_factor).to(image.dtype).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The image (B, 3, H, W) of latents (B, C, H / f, W / f)."""
        if self.pipeline is None:
            return latents
        vae = self._frozen().vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample

    @torch.no_grad()
    def condition(self, batch: dict[str, Any], captions: list[str]) -> dict[str, Any]:
        """The UNet's text, and SDXL's pooled text and sizes: original and target (height, width) around the crop."""
        count, (height, width) = len(captions), batch["image"].shape[2:]
        given = self.unet.blank(count)
        extra = given.get("added_cond_kwargs")
        if self.pipeline is not None:
            found = self._frozen().encode_prompt(
                captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            given["encoder_hidden_states"] = found[0]
            if extra is not None:
                extra["text_embeds"] = found[2]
        if extra is not None:
            size = torch.tensor([height, width]).expand(count, 2).to(batch["crop"])
            extra["time_ids"] = torch.cat([size, batch["crop"], size], dim=1).to(extra["time_ids"])
        return given

    def _frozen(self) -> Any:
        """The pipeline, where the task is, in eval mode."""
        pipeline: Any = self.pipeline
        if pipeline.vae.device != self.device:
            pipeline.to(self.device)
        return pipeline


class ErrorBySize(Metric):
    """Sums of errors and numbers of images (2, sizes), over all processes."""

    table: Tensor

    def __init__(self, sizes: int):
        super().__init__()
        self.add_state("table", torch.zeros(2, sizes), dist_reduce_fx="sum")

    def update(self, size: int, errors: Tensor) -> None:
        """errors: (B,), of images of one size, given by its place."""
        self.table[:, size] += torch.stack([errors.sum(), torch.tensor(len(errors)).to(errors)])

    def compute(self) -> Tensor:
        return self.table


def _pipeline(name: str, unet: nn.Module) -> Any:
    """The library's pipeline around our UNet; its own is not loaded."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(name, unet=unet, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: no pipeline to load: {' '.join(str(error).split())[:200]}") from error
    for part in ("vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def _schedule(pipeline: Any, velocity: bool = False) -> Any:
    """The noise of training: the pipeline's, or Stable Diffusion's (Rombach et al., 2022)."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if pipeline is not None:
        return DDPMScheduler.from_config(pipeline.scheduler.config)
    return DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction" if velocity else "epsilon",
    )  # fmt: skip
