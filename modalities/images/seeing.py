"""Images of any size as a trained Segment Anything sees them: in views, each in a square as it was trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.images.asking import Asked
from modalities.images.backbones import Masks, Prompts
from modalities.images.prompting import rough
from modalities.images.sam_tools import mask_generator
from shared.adapted import Adapted
from shared.errors import WorkError


class View(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Of (..., H, W)."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def room(self, places: np.ndarray) -> float:
        """The least distance of places x, y (N, 2) from its edges, negative where one lies outside."""
        inner = places - (self.left, self.top)
        return float(np.minimum(inner, (self.width - 1, self.height - 1) - inner).min())


class Found(NamedTuple):
    """An object. mask: bool (h, w), within its box.  at: row and column of the box.  facts: JSON-able."""

    mask: np.ndarray
    at: tuple[int, int]
    facts: dict[str, Any]


def views(size: tuple[int, int], side: int) -> list[View]:
    """The whole image and, where it is larger than ``side``, squares of that side which overlap by half or more."""
    whole = View(0, 0, *size)
    if max(size) <= side:
        return [whole]
    rows, columns = (_starts(length, side) for length in size)
    return [whole, *(View(y, x, min(side, size[0]), min(side, size[1])) for y in rows for x in columns)]


def _starts(length: int, side: int) -> list[int]:
    count = 1 + max(0, -(-2 * (length - side) // side))
    return np.linspace(0, max(0, length - side), count).round().astype(int).tolist()


class Seer:
    """Answers prompts about one view at a time; what it offers is what SamAutomaticMaskGenerator asks of a predictor.

    side, stretched: as of ``Opener``.  multimask: a single point is answered by the best of three masks.
    """

    def __init__(self, model: Adapted, side: int, stretched: bool, multimask: bool, device: torch.device):
        self.adapted, self._side, self._stretched, self._multimask = model, side, stretched, multimask
        self.device, self.transform, self.model = device, self, SimpleNamespace(mask_threshold=0.0)
        self._backbone: Any = model.backbone

    @torch.no_grad()
    def look(self, image: np.ndarray) -> None:
        """What is asked from now on is about this view: float32 (bands, H, W), normalised."""
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None].to(self.device)
        self._size, side = (image.shape[1], image.shape[2]), self._side
        self._inside = (side, side) if self._stretched else self.bounded(self._size)
        if self._inside != self._size:
            pixels = F.interpolate(pixels, self._inside, mode="bilinear", antialias=True)
        pixels = F.pad(pixels, (0, side - self._inside[1], 0, side - self._inside[0]))
        self._embedding = self.adapted(pixels, part="encoder")

    def set_image(self, image: np.ndarray) -> None:
        """Answer at the size of this (H, W, ...), about the view that was looked at."""
        self._size = (image.shape[0], image.shape[1])

    def reset_image(self) -> None:
        """Nothing: one view is looked at once for all that is asked."""

    def bounded(self, size: tuple[int, int]) -> tuple[int, int]:
        """A size (height, width) of the same shape that is no larger than what the model sees."""
        share = min(1.0, self._side / max(size))
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))

    def apply_coords(self, places: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """x, y (..., 2) of the view to those of the square."""
        scale = np.array([inside / own for inside, own in zip(self._inside[::-1], size[::-1], strict=True)])
        return (places * scale).astype(np.float32)

    @torch.no_grad()
    def predict_torch(
        self, points: Tensor, labels: Tensor, multimask_output: bool = True, return_logits: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One mask, or three, of each of P points (P, 1, 2) of the square: logits (P, M, H, W), IoU, coarse logits."""
        masks = self.adapted(self._embedding, Prompts(points[None], labels[None]), multimask_output, part="decoder")
        return self._own_size(masks)[0], masks.iou[0], masks.logits[0]

    @torch.no_grad()
    def answer(self, asked: Asked, view: View) -> tuple[np.ndarray, float]:
        """The mask bool (H, W) of the view, and the IoU that the model expects of it."""
        offset, scaled = np.array([view.left, view.top]), {}
        if len(asked.points):
            places = self.apply_coords(asked.points - offset, self._size)
            scaled["points"] = torch.from_numpy(places)[None, None].to(self.device)
            scaled["labels"] = torch.from_numpy(asked.labels)[None, None].to(self.device)
        if asked.box is not None:
            box = self.apply_coords(np.array(asked.box).reshape(2, 2) - offset, self._size)
            scaled["boxes"] = torch.from_numpy(box.reshape(1, 1, 4)).to(self.device)
        if asked.mask is not None:
            scaled["masks"] = self._rough(view.cut(asked.mask))
        single = len(asked.points) == 1 and asked.box is None and asked.mask is None
        masks = self.adapted(self._embedding, Prompts(**scaled), self._multimask and single, part="decoder")
        if not torch.isfinite(masks.logits).all():
            raise WorkError("the mask scores are not finite: the image holds NaN, or the weights do")
        choice = int(masks.iou[0, 0].argmax())
        return (self._own_size(masks)[0, 0, choice] > 0).cpu().numpy(), float(masks.iou[0, 0, choice])

    def _rough(self, mask: np.ndarray) -> Tensor:
        """A mask (H, W) of the view as a prompt."""
        share = F.interpolate(torch.from_numpy(mask)[None, None].float(), self._inside, mode="area")
        square = F.pad(share, (0, self._side - self._inside[1], 0, self._side - self._inside[0])) > 0.5
        return rough(square, self._backbone.patch_size[0] // 4, 1).to(self.device)

    def _own_size(self, masks: Masks) -> Tensor:
        """Logits (B, P, M, H, W) at the size of the view."""
        logits = masks.logits.flatten(0, 1).float()
        square = F.interpolate(logits, (self._side, self._side), mode="bilinear")
        inside = square[..., : self._inside[0], : self._inside[1]]
        return F.interpolate(inside, self._size, mode="bilinear").unflatten(0, masks.logits.shape[:2])


def everything(seer: Seer, image: np.ndarray, valid: np.ndarray, parts: list[View], settings: Any) -> list[Found]:
    """The objects of an image (bands, H, W), the largest first, by the library's generator in each view.

    An object that a view cuts is left to another view, the whole image at last; of two whose boxes overlap by more than
    0.7 the one seen closer is kept. Masks of a view that is larger than what the model sees are made at that size and
    enlarged, so that memory is bounded.  settings: of ``mask_generator``.
    """
    from torchvision.ops import nms

    generator = mask_generator(seer.adapted, **settings)
    generator.predictor = seer
    found, boxes, scores = [], [], []
    for number, view in enumerate(parts):
        seer.look(view.cut(image))
        size = seer.bounded((view.height, view.width))
        for record in generator.generate(np.empty((*size, 1), np.uint8)):
            mask = _enlarged(record["segmentation"], view) & view.cut(valid)
            if not mask.any() or _is_cut(mask, view, valid.shape):
                continue
            x, y = (np.array(record["point_coords"][0]) * (view.width / size[1], view.height / size[0])).tolist()
            facts = {"predicted_iou": record["predicted_iou"], "stability_score": record["stability_score"]}
            one = boxed(mask, view, {**facts, "point": [x + view.left, y + view.top]})
            found.append(one)
            boxes.append([one.at[1], one.at[0], one.at[1] + one.mask.shape[1], one.at[0] + one.mask.shape[0]])
            scores.append(record["predicted_iou"] + (1e3 if number else 0.0))
    if len(parts) > 1 and found:
        found = [found[i] for i in nms(torch.tensor(boxes).float(), torch.tensor(scores), 0.7).tolist()]
    return sorted(found, key=lambda one: -int(one.mask.sum()))


def asked_for(seer: Seer, image: np.ndarray, valid: np.ndarray, parts: list[View], asked: list[Asked]) -> list[Found]:
    """The objects that were asked about, in their order, each seen in the square whose edges its prompts keep farthest
    from, or in the whole image where no square holds them. A mask may be empty."""
    closer = {}
    for number, one in enumerate(asked):
        room = [view.room(one.places) for view in parts[1:]]
        closer[number] = 1 + int(np.argmax(room)) if room and max(room) >= 0 else 0
    answers: dict[int, Found] = {}
    for place in sorted(set(closer.values())):
        view = parts[place]
        seer.look(view.cut(image))
        for number in (n for n, chosen in closer.items() if chosen == place):
            mask, iou = seer.answer(asked[number], view)
            answers[number] = boxed(mask & view.cut(valid), view, {"name": asked[number].name, "predicted_iou": iou})
    return [answers[number] for number in range(len(asked))]


def _enlarged(mask: np.ndarray, view: View) -> np.ndarray:
    """A mask bool at the size of its view."""
    if mask.shape == (view.height, view.width):
        return mask
    share = torch.from_numpy(mask)[None, None].float()
    return (F.interpolate(share, (view.height, view.width), mode="bilinear") > 0.5)[0, 0].numpy()


def _is_cut(mask: np.ndarray, view: View, size: tuple[int, ...]) -> bool:
    """Whether a mask of the view reaches an edge that is none of the image."""
    edges = [
        (view.top > 0, mask[0]), (view.left > 0, mask[:, 0]),
        (view.top + view.height < size[0], mask[-1]), (view.left + view.width < size[1], mask[:, -1]),
    ]  # fmt: skip
    return any(inner and bool(edge.any()) for inner, edge in edges)


def boxed(mask: np.ndarray, view: View, facts: dict[str, Any]) -> Found:
    """The object of a mask bool (H, W) of a view; one without a pixel has a mask of none."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return Found(mask[:0, :0], (view.top, view.left), facts)
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Found(part, (view.top + int(rows[0]), view.left + int(columns[0])), facts)
