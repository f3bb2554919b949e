"""Prompts for Segment Anything and the masks it answers with, in batches: as many objects in each image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.errors import RequestError


class Prompts(NamedTuple):
    """What is asked about P objects in each of B images, in pixels of the image, x to the right before y downwards.

    points: (B, P, N, 2).  labels: (B, P, N), 1 on the object, 0 off it, -1 for a point that says nothing.
    boxes: (B, P, 4), x and y of the upper left, then of the lower right corner.
    masks: (B, P, 1, 4 h, 4 w), logits on a grid four times as fine as the embedding's (h, w).
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None


class Masks(NamedTuple):
    """logits: (B, P, M, 4 h, 4 w), M masks for each object.  iou: (B, P, M), what the model thinks theirs is."""

    logits: Tensor
    iou: Tensor


def check_prompts(prompts: Prompts, pixels: tuple[int, int], grid: tuple[int, int], batch: int) -> None:
    """Raises RequestError where prompts lie outside the image of ``pixels`` (height, width) or are no such tensors."""
    points, labels, boxes, masks = prompts
    if (points is None) != (labels is None):
        raise RequestError("prompts: points need labels, and labels points")
    objects = {tuple(each.shape[:2]) for each in prompts if each is not None}
    if len(objects) > 1 or any(count != batch for count, _ in objects):
        shapes = ", ".join(str(tuple(each.shape)) for each in prompts if each is not None)
        raise RequestError(
            f"prompts of shapes {shapes}: they want the batch of {batch} images and one count of objects"
        )
    corners = None if boxes is None else boxes.unflatten(-1, (2, 2))
    for what, places in (("point", None if points is None else points[labels >= 0]), ("box corner", corners)):  # type: ignore[operator]
        if places is not None:
            _inside(what, places, pixels)
    if boxes is not None and bool((boxes[..., 2:] < boxes[..., :2]).any()):
        raise RequestError("prompts: a box ends before it begins; give x and y of its upper left, then lower right")
    if masks is not None and tuple(masks.shape[2:]) != (1, 4 * grid[0], 4 * grid[1]):
        wanted = f"1 x {4 * grid[0]} x {4 * grid[1]}"
        raise RequestError(
            f"prompts: masks {' x '.join(map(str, masks.shape[2:]))}, for this image {wanted} are wanted"
        )


def _inside(what: str, places: Tensor, pixels: tuple[int, int]) -> None:
    """Raise where one of the (..., 2) places x, y is not within the image."""
    height, width = pixels
    limit = torch.tensor([width, height], device=places.device)
    outside = places[((places < 0) | (places > limit) | ~places.isfinite()).any(-1)]
    if len(outside):
        x, y = outside.flatten(0, -2)[0].tolist()
        raise RequestError(f"{what} ({x:g}, {y:g}) lies outside the image, {width} pixels wide and {height} high")


@contextlib.contextmanager
def sized(prompt_encoder: Any, grid: tuple[int, int], pixels: tuple[int, int]) -> Iterator[None]:
    """Within the block prompts are encoded for an image of this size."""
    before = prompt_encoder.image_embedding_size, prompt_encoder.input_image_size
    prompt_encoder.image_embedding_size, prompt_encoder.input_image_size = grid, pixels
    try:
        yield
    finally:
        prompt_encoder.image_embedding_size, prompt_encoder.input_image_size = before
