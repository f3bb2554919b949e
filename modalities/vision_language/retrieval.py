"""Retrieval: texts found by images and images by texts, as recall among the first k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.errors import RequestError


def recall_at(image: Tensor, text: Tensor, image_of: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The share of images one of whose texts is among the k most similar texts, and of texts likewise.

    image: (N, D).  text: (M, D), both of length 1, as an ``OpenClip`` gives them, adapted or not.
    image_of: (M,), the image that each text describes.
    Gives "image_to_text/recall@k" and "text_to_image/recall@k". Where similarities are equal the wrong one counts as
    the more similar, so that embeddings that have all become alike find nothing.

    Raises RequestError where a set is empty, numbers are not finite, or an image is out of range or without a text.
    """
    if not len(image) or not len(text):
        raise RequestError(f"retrieval among {len(image)} images and {len(text)} texts: both sets need at least one")
    if image_of.shape != text.shape[:1] or int(image_of.min()) < 0 or int(image_of.max()) >= len(image):
        raise RequestError(f"image_of {tuple(image_of.shape)}: wants one of {len(image)} images for each of the texts")
    if not ks or min(ks) < 1:
        raise RequestError(f"recall at {', '.join(map(str, ks)) or 'nothing'}: use counts of at least 1")
    similarity = image.double() @ text.double().T
    if not similarity.isfinite().all():
        raise RequestError("retrieval: the embeddings hold NaN or infinity")
    right = image_of[None] == torch.arange(len(image), device=image_of.device)[:, None]
    if not right.any(1).all():
        raise RequestError(f"image {int(right.any(1).long().argmin())} has no text, so nothing it could find")
    found: dict[str, float] = {}
    for way, scores, truth in (("image_to_text", similarity, right), ("text_to_image", similarity.T, right.T)):
        rank = _rank(scores, truth)
        found |= {f"{way}/recall@{k}": (rank < k).double().mean().item() for k in ks}
    return found


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong ones are at least as similar as the best right one, for each row."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
