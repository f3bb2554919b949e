"""Training of a model that makes several views of one object at once, and the making of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from modalities.diffusion.denoising import Denoising
from modalities.diffusion.geometry.cameras import FEWER, Cameras
from modalities.diffusion.multi_view import sampling
from modalities.diffusion.multi_view.agreement import disagreement
from modalities.diffusion.multi_view.mv_adapter import MVAdapter
from modalities.diffusion.sampling import to_bytes
from modalities.diffusion.shifted import shifted
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.generating import Made, Wanted
from shared.training.optimiser import Optimiser


class MultiViewDenoising(Denoising):
    """Mean squared error of the noise in V views of each object, told by maps and a reference (Huang et al., 2024).

    model: a ``DiffusersUNet`` with an ``MVAdapter``.  data: see ``multi_view.data``.
    pipeline, velocity: as of ``Denoising``; the schedule is shifted.
    caption_dropout, image_dropout, both_dropout: shares of objects without their caption, reference, or either.
    shift, shift_mode: of the schedule, see ``shifted``.  min_snr: weights are min(snr, this) / snr (Hang et al., 2023).
    fewer_views: train on a random choice of 6, 4, 3 or 2 views (published option).
    apart: each view attends to itself alone, in training and after it: a control with the same parameters.
    texels, up, front: of meshes that are painted, the side of the texture (published: 4096 for SDXL, 2048 for SD2.1),
    and the axes of their files (glTF's; the published script calls the front "+x").

    Results of a split: ``loss``, without weights, and ``disagreement`` from 0 to 1: how much the views, denoised at
    once from where their noise is, differ in colour at the same points of the surface, which the data know.
    """

    def __init__(
        self,
        model: Adapted,
        data: Any,
        optimiser: Optimiser,
        *,
        pipeline: str | None = None,
        velocity: bool = False,
        caption_dropout: float = 0.1,
        image_dropout: float = 0.1,
        both_dropout: float = 0.1,
        shift: float = 8.0,
        shift_mode: Literal["interpolated", "default"] = "interpolated",
        min_snr: float = 5.0,
        fewer_views: bool = False,
        apart: bool = False,
        texels: int = 4096,
        up: Literal["+x", "+y", "+z", "-x", "-y", "-z"] = "+y",
        front: Literal["+x", "+y", "+z", "-x", "-y", "-z"] = "+z",
    ):
        super().__init__(model, data, optimiser, pipeline=pipeline, velocity=velocity, caption_dropout=caption_dropout)
        for name, share in (("image_dropout", image_dropout), ("both_dropout", both_dropout)):
            if not 0 <= share <= 1:
                raise RequestError(f"{name} {share:g}: use a share from 0 to 1")
        if not min_snr > 0:
            raise RequestError(f"min_snr {min_snr:g}: use a number above 0")
        if getattr(data, "apart", False):
            raise RequestError("data.apart gives single images, for Denoising; a control of several views: task.apart")
        self.size, self.maps, self.views = data.size, data.maps, data.views
        if fewer_views and (self.maps == "geometry" or self.views != 6):
            raise RequestError("fewer_views chooses among the 6 views around an object: maps: rays, views: 6")
        if texels < 1 or up[1] == front[1]:
            raise RequestError(f"texels {texels}, up {up}, front {front}: at least 1, and two different axes")
        self.texels, self.up, self.front = texels, up, front
        self._take(model)
        self.image_dropout, self.both_dropout, self.fewer_views = image_dropout, both_dropout, fewer_views
        self.apart = apart
        self.shift, self.shift_mode, self.min_snr = shift, shift_mode, min_snr
        self.schedule = shifted(self.schedule, shift, shift_mode)
        self.points = Points()

    def _take(self, model: Adapted) -> None:
        """What the model's adapter can be told. Raises RequestError where it is for other views than the data's."""
        methods = [method for method in model.methods.values() if isinstance(method, MVAdapter)]
        if not methods:
            raise RequestError("several views at once need an MVAdapter as the method")
        if (methods[0].views == "row_column") != (self.maps == "geometry"):
            fits = {"rays": "row", "geometry": "row_column"}[self.maps]
            raise RequestError(f"the adapter has views: {methods[0].views}; maps: {self.maps} want views: {fits}")
        self.refers, self.conditioned = methods[0].reference, methods[0].condition

    def load_adapter(self, path: Path) -> None:
        super().load_adapter(path)
        try:
            self._take(self.model)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error

    def loss(self, batch: dict[str, Any]) -> Tensor:
        if self.fewer_views:
            choices = [FEWER[count] for count in (6, 4, 3, 2)]
            chosen = list(choices[int(torch.randint(len(choices), ()))])
            batch = {n: v[:, chosen] if n in ("image", "control", "noised") else v for n, v in batch.items()}
        objects = len(batch["image"])
        x = self.encode(batch["image"].flatten(0, 1))
        noise = torch.randn_like(x)
        steps = torch.randint(self.schedule.config.num_train_timesteps, (objects,), device=x.device)
        both = torch.rand(objects) < self.both_dropout
        silent = (torch.rand(objects) < self.caption_dropout) | both
        blind = (torch.rand(objects) < self.image_dropout) | both
        captions = ["" if s else c for s, c in zip(silent.tolist(), batch["caption"], strict=True)]
        noised = batch.get("noised")
        noised = None if noised is None else noised.flatten().bool()
        errors, weights, _ = self._of_views(batch, x, noise, steps, captions, blind, noised)
        if noised is not None:
            errors, weights = errors[noised], weights[noised]
        return (errors * weights).mean()

    def _of_views(
        self, batch: dict[str, Any], x: Tensor, noise: Tensor, steps: Tensor, captions: list[str], blind: Tensor | None,
        noised: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Errors (O * V,), their weights, and what is left of x without the noise. steps: (O,), one for each object.

        blind: objects (O,) without reference.  noised: views (O * V,) that have noise, others are clean; None: all.
        """
        views = len(x) // len(steps)
        repeated = steps.repeat_interleave(views)
        noisy = self.schedule.add_noise(x, noise, repeated)
        if noised is not None:
            repeated, noisy = repeated * noised, torch.where(noised[:, None, None, None], noisy, x)
        given = self._condition(batch, [c for c in captions for _ in range(views)])
        told: dict[str, Any] = {"num_views": 1 if self.apart else views}
        if self.conditioned:
            told["control"] = batch["control"].flatten(0, 1)
        if self.refers:
            told["ref_hidden_states"] = self.look(batch, captions, blind)
        said = self.model(noisy, repeated, **given, context=told).sample
        kept = self.schedule.alphas_cumprod.to(x.device)[repeated]
        snr = kept / (1 - kept)
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(x, noise, repeated) if velocity else noise
        errors = F.mse_loss(said.float(), target.float(), reduction="none").mean((1, 2, 3))
        a, b = (t.sqrt()[:, None, None, None] for t in (kept, 1 - kept))
        clean = a * noisy - b * said if velocity else (noisy - b * said) / a
        return errors, snr.clamp(max=self.min_snr) / (snr + velocity), clean.detach()

    @torch.no_grad()
    def look(self, batch: dict[str, Any], captions: list[str], blind: Tensor | None = None) -> dict[str, Tensor]:
        """What goes into the self-attentions for each object's reference, without noise at step 0; 0 for ``blind``."""
        latents = self.encode(batch["reference"])
        cache: dict[str, Tensor] = {}
        told = {"use_mv": False, "use_ref": False, "cache_hidden_states": cache}
        zero = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        self.model(latents, zero, **self._condition(batch, captions), context=told)
        if blind is None:
            return cache
        return {n: t.masked_fill(blind.to(t.device)[:, None, None], 0.0) for n, t in cache.items()}

    def _condition(self, batch: dict[str, Any], captions: list[str]) -> dict[str, Any]:
        """The UNet's text, and SDXL's sizes: whole views."""
        crop = torch.zeros(len(captions), 2, dtype=torch.long, device=batch["image"].device)
        return self.condition({"image": batch["image"][:, 0], "crop": crop}, captions)

    def evaluate(self, batch: dict[str, Any]) -> None:
        objects, views = batch["image"].shape[:2]
        x = self.encode(batch["image"].flatten(0, 1))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])).to(x)
        total = self.schedule.config.num_train_timesteps
        steps = ((torch.arange(objects, device=x.device) + 0.5) * total / objects).long()
        errors, _, clean = self._of_views(batch, x, noise, steps, batch["caption"], None)
        self.errors.update(0, errors)
        shown = (self.decode(clean).float().clamp(-1, 1) / 2).unflatten(0, (objects, views))
        for i in range(objects):
            around = Cameras(batch["c2w"][i], batch["projection"][i], ("",) * views)
            tolerance = 2 * float(around.extent[0, 0]) / shown.shape[-1]  # two pixels: slopes seen from the side
            self.points.update(*disagreement(shown[i], around, batch["positions"][i], batch["alpha"][i], tolerance))

    def results(self) -> dict[str, Any]:
        total, count = self.points.compute().tolist()
        self.points.reset()
        loss = super().results()["loss"]
        return {"loss": loss, "disagreement": total / count if count else None}

    @torch.no_grad()
    def pictures(self, data: Any) -> Any:
        """A test object: its views, half noised, and denoised at once."""
        from shared.report.plots import Pictures

        self.eval()
        batch: dict[str, Any] = {n: v[:1] for n, v in data.test().dataset[0].items()}
        batch = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        x = self.encode(batch["image"][0])
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        half = torch.tensor([self.schedule.config.num_train_timesteps // 2], device=self.device)
        _, _, clean = self._of_views(batch, x, noise, half, batch["caption"], None)
        noisy = self.schedule.add_noise(x, noise, half.expand(len(x)))
        shown = {"views": batch["image"][0], "noisy": self.decode(noisy), "denoised": self.decode(clean)}
        rows = {n: to_bytes(torch.cat(list(v), -1)) for n, v in shown.items()}
        return Pictures([(str(batch["caption"][0]), rows)], {})

    def generate(self, wanted: Wanted, *, progress: Callable[[int, int], None]) -> Made:
        """Views around an object of a prompt, a reference image with alpha, or both; of maps of geometry, the sides of
        ``wanted.mesh``, with the mesh painted so as a GLB file. Published: 50 steps, guidance 7 of text, 3 of a
        reference; bicubic interpolation stands in for the super-resolution of views before they are baked."""
        self.eval()
        return sampling.views(self, wanted, progress)


class Points(Metric):
    """The sum of differences at points of a surface and their number (2,), over all processes."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("table", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        self.table += torch.stack([total, count]).to(self.table)

    def compute(self) -> Tensor:
        return self.table
