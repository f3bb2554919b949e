"""Prompts as a user would give them, drawn from the truth: objects of a mask, points on and off them, boxes, masks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.images.backbones import Prompts

Kind = Literal["points", "box", "mask"]
SURE = 10.0  # logit of a mask prompt where it is certain


class Objects(NamedTuple):
    """masks: bool (B, P, H, W).  valid: bool (B, P), false for what only fills up.  counts: bool (B, H, W), pixels with
    a label."""

    masks: Tensor
    valid: Tensor
    counts: Tensor


def found(
    mask: np.ndarray, classes: int, background: int, instances: Literal["component", "class"], smallest: int
) -> list[np.ndarray]:
    """The objects of a mask (H, W) of class indices, bool (H, W) each, the largest first.

    They are the connected parts (with diagonals) of each class but ``background``, or those classes as wholes; those
    under ``smallest`` pixels are left out, and so are values outside 0 to ``classes`` - 1.
    """
    from scipy import ndimage

    objects: list[np.ndarray] = []
    for index in range(classes):
        if index == background:
            continue
        whole = mask == index
        if instances == "class":
            objects.append(whole)
            continue
        parts: Any = ndimage.label(whole, structure=np.ones((3, 3)))[0]  # type: ignore[index]
        for number, window in enumerate(ndimage.find_objects(parts), 1):
            one = np.zeros_like(whole)
            one[window] = parts[window] == number
            objects.append(one)
    sized = [(int(one.sum()), one) for one in objects]
    return [one for size, one in sorted(sized, key=lambda pair: -pair[0]) if size >= smallest]


def drawn(lists: list[list[np.ndarray]], count: int, mask: Tensor, ignore: int) -> Objects:
    """``count`` objects of each image, drawn with replacement from torch's global random state.

    lists: the objects of each image.  mask: (B, H, W), of class indices and ``ignore``.
    """
    chosen, valid = [], []
    for objects in lists:
        picks = torch.randint(len(objects), (count,)).tolist() if objects else []
        empty = np.zeros(tuple(mask.shape[1:]), bool)
        chosen.append(np.stack([objects[pick] for pick in picks] if objects else [empty] * count))
        valid.append([bool(objects)] * count)
    masks = torch.from_numpy(np.stack(chosen)).to(mask.device)
    return Objects(masks, torch.tensor(valid, device=mask.device), mask != ignore)


def draw_prompts(objects: Objects, kind: Kind, points: int, stride: int) -> Prompts:
    """Prompts of one kind for objects, from torch's global random state, as Kirillov et al. (2023) train.

    points: how many; the first lies on the object, each further one on or off it.  stride: pixels of the mask prompt's
    grid.  A box is jittered by a tenth of its sides, at most 20 pixels; a mask is the truth at an eighth to all of the
    grid's resolution, and a point comes with it.
    """
    masks, _, counts = objects
    size = torch.tensor([masks.shape[3], masks.shape[2]], device=masks.device)
    if kind == "box":
        boxes = bounds(masks)
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        noise = (torch.randn(boxes.shape) * 0.1).to(boxes) * sides
        jittered = (boxes + noise.clamp(-20, 20)).unflatten(-1, (2, 2)).clamp(min=0).minimum(size)
        return Prompts(boxes=torch.cat([jittered.amin(2), jittered.amax(2)], -1))
    on = torch.ones(points if kind == "points" else 1, dtype=torch.bool)
    on[1:] = torch.rand(len(on) - 1) < 0.5
    places, labels = [], []
    for positive in on.tolist():
        allowed = masks if positive else ~masks & counts[:, None]
        place, there = _random_pixels(allowed)
        places.append(place)
        labels.append(torch.where(there, int(positive), -1))
    asked = Prompts(torch.stack(places, 2), torch.stack(labels, 2))
    return asked if kind == "points" else asked._replace(masks=rough(masks, stride, 2 ** int(torch.randint(4, ()))))


def passes(clicks: int) -> list[bool]:
    """What follows the first answer to an object in a training step: True asks again with one more point.

    After Kirillov et al. (2023, appendix): ``clicks`` points, one pass without a new one at a place among them that is
    drawn from torch's global random state, and one at the end; in these the model sees its own last mask alone anew.
    """
    if not clicks:
        return []
    place = int(torch.randint(clicks, ()))
    return [*[True] * place, False, *[True] * (clicks - place), False]


def clicked(asked: Prompts, logits: Tensor, objects: Objects) -> Prompts:
    """The prompts with one more point, drawn from torch's global random state where the last answer is wrong, evenly.

    logits: (B, P, h, w), of that answer. The point is on the object where the answer misses it and off it where the
    answer goes beyond; it says nothing where no pixel with a label is wrong.
    """
    said = F.interpolate(logits.float(), objects.masks.shape[2:], mode="bilinear") > 0
    place, there = _random_pixels((said ^ objects.masks) & objects.counts[:, None])
    index = (place[..., 1] * objects.masks.shape[3] + place[..., 0]).long()
    missed = objects.masks.flatten(2).gather(2, index[..., None])[..., 0]
    points, labels = place[:, :, None], torch.where(there, missed.long(), -1)[:, :, None]
    if asked.points is not None and asked.labels is not None:
        points, labels = torch.cat([asked.points, points], 2), torch.cat([asked.labels, labels], 2)
    return asked._replace(points=points, labels=labels)


def central_prompts(masks: Tensor, kind: Kind, stride: int) -> Prompts:
    """The same prompts every time, to measure by: a point in the middle, the exact box, the mask at a quarter.

    masks: bool (B, P, H, W), none empty. The middle is the pixel farthest from what is not the object.
    """
    from scipy.ndimage import distance_transform_edt

    if kind == "box":
        return Prompts(boxes=bounds(masks))
    places = []
    for one in masks.flatten(0, 1).cpu().numpy():
        depth = np.asarray(distance_transform_edt(np.pad(one, 1)))[1:-1, 1:-1]
        row, column = divmod(int(depth.argmax()), one.shape[1])
        places.append((float(column), float(row)))
    points = torch.tensor(places, device=masks.device).view(*masks.shape[:2], 1, 2)
    labels = torch.ones(points.shape[:3], dtype=torch.long, device=masks.device)
    return Prompts(points, labels, masks=rough(masks, stride, 4) if kind == "mask" else None)


def bounds(masks: Tensor) -> Tensor:
    """x and y of the first and the last pixel of each mask: (B, P, 4) float of bool (B, P, H, W); of an empty one 0."""
    sides = []
    for rest in (2, 3):  # columns, then rows
        there = masks.any(rest).long()
        last = there.shape[-1] - 1 - there.flip(-1).argmax(-1)
        sides.append((there.argmax(-1), torch.where(there.any(-1), last, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], -1).float()


def rough(masks: Tensor, stride: int, coarser: int) -> Tensor:
    """Mask prompts (B, P, 1, H / stride, W / stride), logits, of a resolution ``coarser`` times lower than that."""
    fine = tuple(side // stride for side in masks.shape[2:])
    share = F.interpolate(masks.float(), tuple(max(1, side // coarser) for side in fine), mode="area")
    return ((2 * F.interpolate(share, fine, mode="nearest-exact") - 1) * SURE).unsqueeze(2)


def _random_pixels(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """One pixel x, y (B, P, 2) of each bool map (B, P, H, W), uniformly, and whether there is one (B, P)."""
    flat = allowed.flatten(2)
    total = flat.sum(-1)
    pick = (torch.rand(total.shape).to(total.device) * total).long().clamp(max=total.clamp(min=1) - 1)
    index = (flat.cumsum(-1) > pick[..., None]).int().argmax(-1)
    width = allowed.shape[3]
    return torch.stack([index % width, index // width], -1).float(), total > 0
