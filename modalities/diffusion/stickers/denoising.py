"""RDTF: training a small video diffusion model from scratch by dual masks and an adaptive curriculum (2025)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.denoising import ErrorBySize
from modalities.diffusion.masks import FAMILIES, TASKS, Condition, condition, masked_condition, masked_loss
from modalities.diffusion.sampling import to_bytes
from modalities.diffusion.stickers.clip_encoders import Latents, Texts
from modalities.diffusion.stickers.sampling import Sampler, generate
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.generating import Made, Wanted
from shared.training.curriculum import Curriculum
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class StickerDenoising(Task):
    """Masked error of the noise in short clips, told by text, by some of their frames, or both (arXiv 2503.17735).

    model: its backbone takes cat(noisy, condition) (B, 2 C, F, h, w), timesteps, ``encoder_hidden_states`` and perhaps
    ``t5_hidden_states``, and says ``latent_channels``, ``text_width`` and ``frames``: a ``DFGN``, or any such UNet.
    data: it gives ``bands``, ``size``, ``frames`` and ``rate``; its batches hold ``clip`` (B, bands, F, H, W) in -1 to
    1, ``frame_mask`` (B, F), ``caption`` and ``name``.
    autoencoder, text_encoder, t5: frozen, see ``stickers.clip_encoders``; None: pixels; words as fixed
    vectors; no T5.
    tasks: those trained.  evaluated: those evaluated, None: the same.
    schedule, adaptive: of the curriculum (``shared.training.curriculum``).
    curriculum_share: part of the training after which its weights by step stay.
    masked_words: share of words of training captions replaced by "#" (published: 0.2).
    betas: of the noise: "scaled_linear" (released config) or "linear" (paper).  guidance, eta: of the sampler (script:
    9.0 and 0; paper: 7.5 and 1).  negative: what is not wanted, unless said otherwise.

    Results of a split: ``loss``, the mean over clips and tasks, and ``loss/<task>``. An evaluation draws the same noise
    and masks every time, at steps spread evenly over the schedule.
    """

    def __init__(
        self,
        model: Adapted,
        data: Any,
        optimiser: Optimiser,
        *,
        autoencoder: str | None = None,
        text_encoder: str | None = None,
        t5: str | None = None,
        tasks: tuple[str, ...] = TASKS,
        evaluated: tuple[str, ...] | None = None,
        schedule: Literal["anchors", "cosine", "none"] = "anchors",
        adaptive: bool = True,
        curriculum_share: float = 1.0,
        masked_words: float = 0.2,
        betas: Literal["scaled_linear", "linear"] = "scaled_linear",
        guidance: float = 9.0,
        eta: float = 0.0,
        negative: str = "",
    ):
        super().__init__(model, optimiser)
        checked = tuple(tasks if evaluated is None else evaluated)
        if unknown := [task for task in (*tasks, *checked) if task not in FAMILIES]:
            raise RequestError(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
        if not (0 < curriculum_share <= 1 and 0 <= masked_words <= 1):
            raise RequestError("curriculum_share and masked_words are shares: above 0 to 1, and from 0 to 1")
        unet: Any = model.backbone
        self.share, self.masked_words, self.evaluated = curriculum_share, masked_words, checked
        self.bands, self.frames, self.size, self.rate = (
            int(data.bands),
            int(data.frames),
            int(data.size),
            float(data.rate),
        )
        self.latents = Latents(autoencoder)
        self._check(data)
        self.texts = Texts(text_encoder, t5, (unet.text_width, getattr(unet, "t5_width", None)))
        self.sampler = Sampler(betas=betas, guidance=guidance, eta=eta, negative=negative)
        self.schedule = self.sampler.training()
        self.curriculum = Curriculum({task: FAMILIES[task] for task in tasks}, 1, schedule=schedule, adaptive=adaptive)
        self.errors = ErrorBySize(len(checked))

    def _check(self, data: Any) -> None:
        """The data's clips must fit what the UNet takes."""
        unet: Any = self.model.backbone
        if not hasattr(unet, "latent_channels"):
            raise RequestError(f"clips need a video UNet that takes noisy and given frames, not {type(unet).__name__}")
        channels = data.bands if self.latents.channels is None else self.latents.channels
        if channels != unet.latent_channels or self.frames != unet.frames:
            raise RequestError(
                f"the UNet takes {unet.latent_channels} channels and {unet.frames} frames, the clips have {channels} "
                f"and {self.frames}"
            )
        vae = self.latents.vae
        if vae is not None and (data.bands != vae.config.in_channels or self.size % self.latents.factor):
            raise RequestError(
                f"the autoencoder takes {vae.config.in_channels} channels, sides by {self.latents.factor} pixels; the "
                f"clips have {data.bands} channels and {self.size} pixels a side"
            )

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.curriculum.end = max(1, round(self.share * self.total_steps))
        super().on_fit_start()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        real = batch["frame_mask"]
        x = self.latents.encode(batch["clip"], real, draw=True)
        task = self.curriculum.draw(self.global_step)
        told = condition(task, int(real.sum(1).min()), self.frames)
        text = self.tell([hidden(caption, self.masked_words) for caption in batch["caption"]], told.text)
        steps = torch.randint(self.schedule.config.num_train_timesteps, (len(x),), device=x.device)
        return self.compare(x, torch.randn_like(x), steps, real, told, text).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The curriculum learns from the loss of the whole batch, the same in every process."""
        self.curriculum.note(float(self.trainer.strategy.reduce(self._last[0], reduce_op="mean")))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["curriculum"] = self.curriculum.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.curriculum.load_state_dict(checkpoint["curriculum"])

    def compare(
        self, x: Tensor, noise: Tensor, steps: Tensor, real: Tensor, told: Condition, text: dict[str, Tensor]
    ) -> Tensor:
        """The masked error (B,) of the noise predicted in clips x (B, C, F, h, w) at steps (B,)."""
        noisy: Any = self.schedule.add_noise(x, noise, steps)  # type: ignore[arg-type]
        given = masked_condition(x, torch.tensor(told.given), real)
        predicted = self.model(torch.cat([noisy, given], dim=1), steps, **text).sample
        return masked_loss(predicted.float(), noise.float(), real)

    def tell(self, captions: Sequence[str], text: bool) -> dict[str, Tensor]:
        """The UNet's tokens of captions; zeros in their place where the text is not told."""
        found = self.texts(captions, self.device)
        return found if text else {name: torch.zeros_like(tokens) for name, tokens in found.items()}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, batch: dict[str, Any]) -> None:
        real = batch["frame_mask"]
        x = self.latents.encode(batch["clip"], real, draw=False)
        total = self.schedule.config.num_train_timesteps
        for place, task in enumerate(self.evaluated):
            seed = zlib.crc32("|".join([task, *batch["name"]]).encode())
            told = condition(task, int(real.sum(1).min()), self.frames, random.Random(seed))
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
            steps = ((torch.arange(len(x), device=x.device) + 0.5) * total / len(x)).long()
            text = self.tell(batch["caption"], told.text)
            self.errors.update(place, self.compare(x, noise, steps, real, told, text))

    def results(self) -> dict[str, Any]:
        sums, counts = self.errors.compute().tolist()
        self.errors.reset()
        each = {f"loss/{task}": s / n for task, s, n in zip(self.evaluated, sums, counts, strict=True) if n}
        return {"loss": sum(sums) / sum(counts), **each}

    @torch.no_grad()
    def pictures(self, data: Any) -> Any:
        """Up to three test clips: as they are, what is given of them, and half noised, then denoised at once."""
        from shared.report.plots import Pictures

        self.eval()
        dataset, rows = data.test().dataset, []
        half = torch.tensor([self.schedule.config.num_train_timesteps // 2], device=self.device)
        for index, task in zip(range(min(3, len(dataset))), self.evaluated[::-1], strict=False):
            one = dataset[index]
            clip, real = one["clip"][None].to(self.device), one["frame_mask"][None].to(self.device)
            x = self.latents.encode(clip, real, draw=False)
            told = condition(task, int(real.sum()), self.frames, random.Random(index))
            given = masked_condition(x, torch.tensor(told.given), real)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index)).to(x)
            noisy: Any = self.schedule.add_noise(x, noise, half)  # type: ignore[arg-type]
            said = self.model(torch.cat([noisy, given], 1), half, **self.tell([one["caption"]], told.text)).sample
            clean = self.schedule.step(said, int(half), noisy).pred_original_sample
            count, known = int(real.sum()), masked_condition(clip, torch.tensor(told.given), real)
            shown = {"clip": clip, "given": known, "noisy": self.latents.decode(noisy)}
            shown["denoised"] = self.latents.decode(clean)
            rows.append((f"{one['caption']} ({task})", {n: _strip(v[0, :, :count]) for n, v in shown.items()}))
        return Pictures(rows, {})

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(self, wanted: Wanted, *, progress: Callable[[int, int], None]) -> Made:
        """Clips from a prompt, from frames (``wanted.image``), or both; see ``modalities.diffusion.stickers.sampling``.

        An image stands first; the frames of an animated one come first, the rest is predicted; of a folder, the number
        in a picture's name is its place from 0, so that any frames can be given and the others are made between, before
        or after them. Frames beyond ``wanted.frames`` are padding and left out.
        """
        return generate(self, wanted, progress)


def hidden(caption: str, share: float, draws: Any = random) -> str:
    """A caption with a share of its words, drawn, replaced by "#"."""
    return " ".join("#" if draws.random() < share else word for word in caption.split())


def _strip(clip: Tensor) -> np.ndarray:
    """(C, F, H, W) in -1 to 1 as one picture uint8 (H, F * W, 3), frames side by side, on white."""
    frames = to_bytes(clip.transpose(0, 1))
    if frames.shape[-1] == 4:
        from modalities.diffusion.frames import over_white

        frames = over_white(frames)
    return np.concatenate(list(frames), axis=1)
