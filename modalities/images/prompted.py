"""Prompted segmentation: a mask of what a point, a box or a rough mask shows, as Segment Anything answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryJaccardIndex

from modalities.images.backbones import SAM, Masks, Prompts
from modalities.images.prompting import Kind, Objects, central_prompts, clicked, draw_prompts, drawn, found, passes
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class Answered(NamedTuple):
    """What the model said of which objects, in each pass."""

    passes: tuple[Masks, ...]
    objects: Objects


class PromptedSegmentation(Task):
    """Trains and measures an adapted ``SAM`` on objects of labelled images, with prompts drawn from the truth.

    model: without a head.  data: it gives ``classes``, ``bands`` and ``ignore_index``; its batches hold ``image``
    (B, bands, H, W), ``mask`` (B, h, w) of class indices and ``name``. One of another size is resized.
    prompts: of these kinds one is drawn for each training step, and each is measured by itself.
    instances: an object is a connected "component" of a class, or a "class" as a whole.
    background: the class that is no object, None for the first.  smallest: pixels of the least object.
    objects: of each image in a training step, drawn with replacement.  points: most points of a training prompt.
    clicks: further points of a training step, each where the last answer is wrong, asked with that answer as a mask
    (paper: 8); each is a pass of the decoder, and so are two without a point; 0 for the first prompt alone.
    multimask: a single point, which may mean a part or the whole, is answered by three masks in training, of which the
    best counts (and at measuring the one that the model itself thinks best).
    measured: of each image, the largest objects.
    focal_weight, dice_weight, iou_weight: of the three losses (paper: 20, 1, 1).

    Results of a split: ``loss``; for each kind of prompt ``iou/<kind>``, the mean over objects, and
    ``pixel_iou/<kind>``, of the pixels of all of them; ``iou``, the mean over kinds. Prompts at measuring are always
    the same: the middle of the object, its exact box, its mask at a quarter of the resolution.
    """

    monitor: ClassVar[str] = "validation/iou"
    promptable: ClassVar[bool] = True  # predict_files takes prompts and settings of the generator

    def __init__(
        self,
        model: Adapted,
        data: Any,
        optimiser: Optimiser,
        *,
        prompts: Sequence[Literal["points", "box", "mask"]] = ("points", "box", "mask"),
        instances: Literal["component", "class"] = "component",
        background: str | None = None,
        smallest: int = 16,
        objects: int = 4,
        points: int = 3,
        clicks: int = 3,
        multimask: bool = True,
        measured: int = 16,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
    ):
        super().__init__(model, optimiser)
        if not isinstance(model.backbone, SAM):
            raise RequestError(f"prompted segmentation is for the backbone SAM, not {model.backbone_name}")
        model.backbone.check_halves()
        if not prompts or len(set(prompts)) < len(prompts):
            raise RequestError(f"task.prompts {list(prompts)}: one or more of points, box, mask, each once")
        if min(smallest, objects, points, measured) < 1 or min(clicks, focal_weight, dice_weight, iou_weight) < 0:
            raise RequestError("task: smallest, objects, points, measured at least 1, clicks and weights at least 0")
        self.classes, self.bands, self.ignore_index = tuple(data.classes), data.bands, data.ignore_index
        if background is not None and background not in self.classes:
            raise RequestError(f"task.background {background!r}: the classes are {', '.join(self.classes)}")
        if hasattr(data, "normalise_by"):
            data.normalise_by(model.backbone)
        self.kinds: tuple[Kind, ...] = tuple(prompts)
        self.background = 0 if background is None else self.classes.index(background)
        self.instances: Literal["component", "class"] = instances
        self.smallest, self.most, self.points, self.clicks = smallest, objects, points, clicks
        self.multimask, self.measured = multimask, measured
        self.weights = (focal_weight, dice_weight, iou_weight)
        self.stride = model.backbone.patch_size[0] // 4
        self.mean_loss = MeanMetric(nan_strategy="error")
        self.object_iou = torch.nn.ModuleDict({kind: MeanMetric(nan_strategy="error") for kind in self.kinds})
        # One number over all pixels; those without a label count as background in truth and prediction alike.
        self.pixel_iou = torch.nn.ModuleDict({kind: BinaryJaccardIndex(validate_args=False) for kind in self.kinds})

    # -- training --------------------------------------------------------------------------------------------------

    def outputs(self, batch: dict[str, Any]) -> Answered:
        """Draws objects and prompts from torch's random state, which the engine seeds anew for every step."""
        objects = drawn(self._objects(batch), self.most, self._fitting(batch), self.ignore_index)
        kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
        points = int(torch.randint(self.points, ())) + 1
        asked = draw_prompts(objects, kind, points, self.stride)
        embedding = self.embed(batch["image"])  # once for all passes
        multimask = self.multimask and kind == "points" and points == 1
        said = [self.model(embedding, asked, multimask, part="decoder")]
        for click in passes(self.clicks):
            logits = best(said[-1]).detach()
            asked = asked._replace(masks=logits[:, :, None])
            asked = clicked(asked, logits, objects) if click else asked
            said.append(self.model(embedding, asked, False, part="decoder"))
        return Answered(tuple(said), objects)

    def criterion(self, outputs: Answered, batch: dict[str, Any]) -> Tensor:
        """The loss of the best mask of each object, mean over objects and passes; 0 where no image has one."""
        losses = [mask_loss(masks, outputs.objects, self.weights) for masks in outputs.passes]
        return torch.stack(losses).mean() + self._untouched()

    def _untouched(self) -> Tensor | float:
        """0, on which all of SAM depends where all of it trains: no kind of prompt uses every part."""
        trained = [p for p in self.model.backbone.parameters() if p.requires_grad]
        return sum((0 * p.sum() for p in trained), torch.zeros((), device=self.device)) if trained else 0.0

    def _fitting(self, batch: dict[str, Any]) -> Tensor:
        """The mask at the size of its image."""
        mask, size = batch["mask"], batch["image"].shape[2:]
        if mask.shape[1:] == size:
            return mask
        return F.interpolate(mask[:, None].float(), size, mode="nearest-exact")[:, 0].long()

    def _objects(self, batch: dict[str, Any]) -> list[list[np.ndarray]]:
        masks = self._fitting(batch).cpu().numpy()
        return [found(one, len(self.classes), self.background, self.instances, self.smallest) for one in masks]

    # -- measuring -------------------------------------------------------------------------------------------------

    def evaluate(self, batch: dict[str, Any]) -> None:
        counts = self._fitting(batch) != self.ignore_index
        embedding = self.embed(batch["image"])  # once for all prompts
        for one, objects in enumerate(self._objects(batch)):
            if not objects:
                continue
            truth = torch.from_numpy(np.stack(objects[: self.measured]))[None].to(embedding.device)
            asked_of = Objects(truth, torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device), counts[[one]])
            for kind in self.kinds:
                masks = self.decode(embedding[[one]], central_prompts(truth, kind, self.stride), kind)
                if not torch.isfinite(masks.logits).all():
                    raise WorkError(f"the mask scores are not finite on sample {batch['name'][one]}")
                self.mean_loss.update(mask_loss(masks, asked_of, self.weights), truth.shape[1])
                self._score(kind, best(masks), asked_of)

    def _score(self, kind: str, logits: Tensor, objects: Objects) -> None:
        """logits: (1, P, h, w), the chosen mask of each object."""
        counts = objects.counts[:, None]
        said = (F.interpolate(logits, objects.masks.shape[2:], mode="bilinear") > 0) & counts
        self.pixel_iou[kind].update(said.long(), objects.masks.long())  # type: ignore[operator]
        for each, truth in zip(said[0], objects.masks[0], strict=True):
            both, either = (each & truth).sum(), (each | truth).sum()
            self.object_iou[kind].update(both / either)  # type: ignore[operator]

    def embed(self, image: Tensor) -> Tensor:
        """The embedding of images, with the active adapters: the half that does not depend on prompts."""
        return self.model(image, part="encoder")

    def decode(self, embedding: Tensor, prompts: Prompts, kind: str = "") -> Masks:
        """The masks of prompts on embeddings, with the active adapters; three where the kind is one point."""
        return self.model(embedding, prompts, self.multimask and kind == "points", part="decoder")

    def results(self) -> dict[str, Any]:
        empty = not float(self.mean_loss.weight)
        each = {kind: metric.compute().item() for kind, metric in self.object_iou.items() if not empty}  # type: ignore[operator]
        pixels = {kind: metric.compute().item() for kind, metric in self.pixel_iou.items() if not empty}  # type: ignore[operator]
        found = {
            "loss": None if empty else self.mean_loss.compute().item(),
            "iou": None if empty else sum(each.values()) / len(each),
            **{f"iou/{kind}": each.get(kind) for kind in self.kinds},
            **{f"pixel_iou/{kind}": pixels.get(kind) for kind in self.kinds},
        }
        for metric in (self.mean_loss, *self.object_iou.values(), *self.pixel_iou.values()):
            metric.reset()  # type: ignore[operator]
        return found

    @torch.no_grad()
    def predict(self, image: Tensor, prompts: Prompts) -> Tensor:
        """image (B, bands, H, W), normalised, with prompts for P objects each, to masks bool (B, P, H, W)."""
        if image.ndim != 4 or image.shape[1] != self.bands:
            raise RequestError(f"image of shape {tuple(image.shape)}: the model takes (B, {self.bands}, H, W)")
        single = prompts.points is not None and prompts.points.shape[2] == 1 and prompts.masks is None
        training = self.training
        self.eval()
        try:
            masks = self.model(image, prompts, self.multimask and single)
        finally:
            self.train(training)
        return F.interpolate(best(masks), image.shape[2:], mode="bilinear") > 0

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        overlap: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Write the objects of images. options: those of ``finding.find_files``, such as ``prompts`` and ``kind``."""
        from modalities.images.finding import find_files

        if overlap is not None:
            raise RequestError("--overlap: the views of Segment Anything overlap by half, as objects need")
        self.eval()
        find_files(self.model, self.multimask, self.device, described, inputs, output, **options)

    def pictures(self, data: Any, count: int = 4) -> Any:
        """``count`` test images: the largest object of each, and what every kind of prompt makes of it."""
        from shared.report.plots import Pictures, paint

        colours, rows = {"object": "#e69f00", "rest": "#0072b2"}, []
        samples: Any = data.test().dataset
        for index in sorted({round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)}):
            sample = samples[index]
            batch = {"image": sample["image"][None].to(self.device), "mask": sample["mask"][None]}
            objects = self._objects(batch)[0]
            if not objects:
                continue
            truth = torch.from_numpy(objects[0])[None, None].to(self.device)
            maps = {"truth": truth[0, 0]}
            for kind in self.kinds:
                maps[kind] = self.predict(batch["image"], central_prompts(truth, kind, self.stride))[0, 0]
            painted = {k: paint(1 - m.long().cpu().numpy(), list(colours.values()), 255) for k, m in maps.items()}
            rows.append((sample["name"], {"image": data.display(sample["image"]), **painted}))
        return Pictures(rows, {"Masks": colours})

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuses, before it reaches the device, a batch that would train or measure wrongly."""
        image, mask, names = batch["image"], batch["mask"], ", ".join(batch["name"])
        if image.ndim != 4 or image.shape[1] != self.bands or mask.ndim != 3 or len(mask) != len(image):
            shapes = f"images {tuple(image.shape)} and masks {tuple(mask.shape)}"
            raise RequestError(f"samples {names}: {shapes} do not fit {self.bands} bands and each other")
        if not torch.isfinite(image).all():
            raise RequestError(f"samples {names}: an image holds NaN or infinity")
        strange = mask[((mask < 0) | (mask >= len(self.classes))) & (mask != self.ignore_index)]
        if len(strange):
            values = f"0 to {len(self.classes) - 1} and {self.ignore_index} (ignored)"
            raise RequestError(f"samples {names}: mask value {strange[0].item()}; this data set has {values}")
        return batch


def best(masks: Masks) -> Tensor:
    """Of each object the mask (B, P, h, w) that the model itself thinks best."""
    choice = masks.iou.argmax(2)[:, :, None, None, None].expand(-1, -1, 1, *masks.logits.shape[3:])
    return masks.logits.gather(2, choice)[:, :, 0]


def mask_loss(masks: Masks, objects: Objects, weights: tuple[float, float, float]) -> Tensor:
    """Focal (Lin et al., 2017) and Dice loss of masks, and the squared error of the IoU the model expects of them.

    masks: M for each object, of which the one with the least of the first two losses counts.  weights: of the three.
    All are taken on the masks' own grid, against the share of each of its cells that the object covers, and over what
    has a label. The mean over valid objects; 0, with zero gradients, where there is none.
    """
    from torchvision.ops import sigmoid_focal_loss

    logits, size = masks.logits.float(), masks.logits.shape[3:]
    truth = F.interpolate(objects.masks.float(), size, mode="area")[:, :, None].expand_as(logits)
    counts = F.interpolate(objects.counts[:, None].float(), size, mode="area")[:, :, None]
    area = counts.sum((3, 4)).clamp(min=1)
    focal = (sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2.0) * counts).sum((3, 4)) / area
    share = logits.sigmoid() * counts
    dice = 1 - (2 * (share * truth).sum((3, 4)) + 1) / (share.sum((3, 4)) + truth.sum((3, 4)) + 1)
    loss, choice = (weights[0] * focal + weights[1] * dice).min(2)
    said, there = (logits > 0) & (counts > 0), truth > 0.5
    reached = (said & there).sum((3, 4)) / (said | there).sum((3, 4)).clamp(min=1)
    error = (masks.iou.float() - reached.detach()).square().gather(2, choice[..., None])[..., 0]
    each = (loss + weights[2] * error) * objects.valid
    return each.sum() / objects.valid.sum().clamp(min=1)
