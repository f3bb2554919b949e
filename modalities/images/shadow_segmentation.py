"""Shadow detection: a mask of the shadows, from points that the model finds by itself; measured by balanced errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryStatScores

from modalities.images.adapter_shadow import AdapterShadow, ShadowMasks, focal_loss, weighted_cross_entropy
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.mapping import Feed, map_files
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class Shadows(NamedTuple):
    """mask, coarse_mask: bool (B, H, W), of the model and of the network that prompts it.  points: (B, G * G, 2), x and
    y in pixels.  labels: (B, G * G), 1 on a shadow."""

    mask: Tensor
    coarse_mask: Tensor
    points: Tensor
    labels: Tensor


class ShadowSegmentation(Task):
    """Trains and measures a ``SAM`` backbone with the method ``AdapterShadow``.

    model: without a head.  data: it gives two ``classes``; its batches hold ``image`` (B, 3, H, W), ``mask`` (B, H, W),
    1 in a shadow, and ``name``. Data that are normalised by the backbone's statistics are told them here; the released
    weights want mean 0 and deviation 255.
    loss: "focal" (published) or "wce", cross entropy weighted by the batch's counts. It is the sum of the loss of
    the answer and that of the network that prompts.

    Results of a split, in percent but for ``loss`` and IoU, over the pixels of all its images at their own sizes:
    ``balanced_error`` (BER), ``shadow_error`` and ``lit_error`` (the shares of either class that are missed), ``iou``;
    the same of the prompting network's map as ``coarse_…``.
    """

    monitor: ClassVar[str] = "validation/balanced_error"

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser, *, loss: Literal["focal", "wce"] = "focal"):
        super().__init__(model, optimiser)
        if not any(isinstance(method, AdapterShadow) for method in model.methods.values()):
            raise RequestError("shadow segmentation needs the method AdapterShadow, which finds the points")
        if len(data.classes) != 2:
            raise RequestError(f"classes {', '.join(data.classes)}: shadow segmentation has two, light and shadow")
        if hasattr(data, "normalise_by"):
            data.normalise_by(model.backbone)
        self.classes, self.loss_of = (
            tuple(data.classes),
            {"focal": focal_loss, "wce": weighted_cross_entropy}[loss],
        )
        self.scores = torch.nn.ModuleDict(
            {which: BinaryStatScores(validate_args=False) for which in ("fine", "coarse")}
        )
        self.mean_loss = MeanMetric(nan_strategy="error")

    def outputs(self, batch: dict[str, Any]) -> ShadowMasks:
        return self.model(batch["image"])

    def criterion(self, outputs: ShadowMasks, batch: dict[str, Any]) -> Tensor:
        truth = batch["mask"][:, None].to(outputs.logits.dtype)
        return self.loss_of(outputs.logits, truth) + self.loss_of(outputs.coarse, truth)

    def evaluate(self, batch: dict[str, Any]) -> None:
        found, truth = self.outputs(batch), batch["mask"]
        if not (torch.isfinite(found.logits).all() and torch.isfinite(found.coarse).all()):
            raise WorkError(f"the shadow scores are not finite on samples {', '.join(batch['name'])}")
        self.mean_loss.update(self.criterion(found, batch), len(truth))
        for which, logits in (("fine", found.logits), ("coarse", found.coarse)):
            self.scores[which].update(_masked(logits, tuple(truth.shape[1:])).long(), truth)  # type: ignore[operator]

    def results(self) -> dict[str, Any]:
        found = {"loss": self.mean_loss.compute().item()}
        found |= measure(self.scores["fine"].compute())  # type: ignore[operator]
        found |= {f"coarse_{name}": value for name, value in measure(self.scores["coarse"].compute()).items()}  # type: ignore[operator]
        for metric in (self.mean_loss, *self.scores.values()):
            metric.reset()  # type: ignore[operator]
        return found

    @torch.no_grad()
    def predict(self, image: Tensor, size: tuple[int, int] | None = None) -> Shadows:
        """image (B, 3, H, W), normalised, to masks at ``size`` (None: its own), with the points, in eval mode."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise RequestError(f"image of shape {tuple(image.shape)}: the model takes (B, 3, H, W)")
        training = self.training
        self.eval()
        try:
            found = self.model(image.to(self.device))
        finally:
            self.train(training)
        if not torch.isfinite(found.logits).all():
            raise WorkError("the shadow scores are not finite: the image holds NaN, or the weights do")
        size = size or (image.shape[2], image.shape[3])
        method = next(m for m in self.model.methods.values() if isinstance(m, AdapterShadow))
        points = found.points if method.order == "xy" else found.points.flip(-1)
        return Shadows(_masked(found.logits, size), _masked(found.coarse, size), points, found.labels)

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        kind: str | None = None, overwrite: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Write the shadows of images at their own sizes: a mask of 255 in a shadow and 0 elsewhere, or outlines (see
        ``object_files``). A run that was trained on rasters maps rasters (see ``shared.mapping.map_files``)."""
        if "reading" in described:
            options |= {"kind": kind, "overwrite": overwrite, "identity": identity}
            map_files(self._shares, Feed.of(described), inputs, output, **options)
            return
        from modalities.images.object_files import Job, each_file, write_objects
        from modalities.images.opening import Opener
        from modalities.images.seeing import View, boxed

        if unfit := [name for name, value in options.items() if value is not None]:
            raise RequestError(f"predict: this run was trained on whole images and has no --{unfit[0]}")
        opener = Opener(described)

        def make(job: Job, kind: str) -> str:
            opened = opener.open(job.source)
            image = torch.from_numpy(opened.image)[None]
            square = F.interpolate(image, (opener.side, opener.side), mode="bilinear", antialias=True)
            mask = self.predict(square, opened.size).mask[0].cpu().numpy()
            objects = [boxed(mask, View(0, 0, *opened.size), {"class": self.classes[1]})]
            write_objects(job, kind, opened, objects, inside=255)
            return f"{opened.size[1]} x {opened.size[0]} pixels: {self.classes[1]} {mask.mean():.1%}"

        each_file(opener, inputs, output, kind, overwrite, make)

    @torch.no_grad()
    def _shares(self, image: Tensor) -> Tensor:
        """Probabilities (B, 2, H, W) of light and shadow, of images (B, 3, H, W) normalised, in eval mode."""
        self.eval()
        logits = self.model(image.to(self.device)).logits
        shadow = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False).sigmoid()
        return torch.cat([1 - shadow, shadow], 1)

    def pictures(self, data: Any, count: int = 4) -> Any:
        """``count`` test images: the image with the points, the truth, both masks."""
        from shared.report.plots import Pictures, class_colours, paint

        samples: Any = data.test().dataset
        colours, rows = class_colours(self.classes), []
        chosen = sorted({round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)})
        for sample in (samples[index] for index in chosen):
            said = self.predict(sample["image"][None])
            truth = F.interpolate(sample["mask"][None, None].float(), sample["image"].shape[1:], mode="nearest-exact")
            maps = {"truth": truth[0, 0], "prediction": said.mask[0], "prompting network": said.coarse_mask[0]}
            painted = {k: paint(m.cpu().numpy().astype(np.int64), list(colours.values()), 255) for k, m in maps.items()}
            shown = dotted(data.display(sample["image"]), said.points[0], said.labels[0])
            rows.append((sample["name"], {"image and points": shown, **painted}))
        return Pictures(rows, {"Classes": colours, "Points": {"on a shadow": ON, "off it": OFF}})

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuses, before it reaches the device, a batch that would train or measure wrongly."""
        image, mask, names = batch["image"], batch["mask"], ", ".join(batch["name"])
        if image.ndim != 4 or image.shape[1] != 3 or mask.ndim != 3 or len(mask) != len(image):
            shapes = f"images {tuple(image.shape)} and masks {tuple(mask.shape)}"
            raise RequestError(f"samples {names}: {shapes}; three bands and one mask each are wanted")
        if not torch.isfinite(image).all():
            raise RequestError(f"samples {names}: an image holds NaN or infinity")
        if len(strange := mask[(mask != 0) & (mask != 1)]):
            raise RequestError(f"samples {names}: mask value {strange[0].item()}; a shadow is 1 and light 0")
        return batch


ON, OFF = "#e69f00", "#0072b2"


def dotted(picture: np.ndarray, points: Tensor, labels: Tensor) -> np.ndarray:
    """A picture (H, W, 3) uint8 with a small square at each point (N, 2)."""
    whole, half = picture.copy(), max(1, picture.shape[0] // 128)
    for (x, y), label in zip(points.round().long().tolist(), labels.tolist(), strict=True):
        colour = ON if label > 0 else OFF
        whole[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = [
            int(colour[i : i + 2], 16) for i in (1, 3, 5)
        ]
    return whole


def _masked(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the probability at ``size`` exceeds a half: bool (B, *size) of logits (B, 1, h, w)."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0] > 0


def measure(counts: Tensor) -> dict[str, float | None]:
    """What true and false positives and negatives (tp, fp, tn, fn, …) say; None where a class does not occur."""
    tp, fp, tn, fn = counts.double().tolist()[:4]
    shadow = 100 * fn / (tp + fn) if tp + fn else None
    lit = 100 * fp / (tn + fp) if tn + fp else None
    return {
        "balanced_error": None if shadow is None or lit is None else (shadow + lit) / 2,
        "shadow_error": shadow,
        "lit_error": lit,
        "iou": tp / (tp + fp + fn) if tp + fp + fn else None,
    }
