"""Retrieval: texts found by images and images by texts, as recall among the first k and median rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.errors import RequestError

KS = (1, 5, 10)
ROWS = 1024  # compared at once


def recall_at(image: Tensor, text: Tensor, image_of: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
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
    right = image_of[None] == torch.arange(len(image), device=image_of.device)[:, None]
    return {name: value for name, value in measure(image, text, right, ks).items() if "recall" in name}


def measure(image: Tensor, text: Tensor, right: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recalls as of ``recall_at``, and "image_to_text/median_rank" and "text_to_image/median_rank": of the best right
    one, 1 where it is the most similar.

    right: bool (N, M), whether a text describes an image.

    Raises RequestError as ``recall_at`` does.
    """
    if not ks or min(ks) < 1:
        raise RequestError(f"recall at {', '.join(map(str, ks)) or 'nothing'}: use counts of at least 1")
    for what, truth in (("image", right.any(1)), ("text", right.any(0))):
        if not truth.all():
            other = "text" if what == "image" else "image"
            raise RequestError(f"{what} {int(truth.long().argmin())} has no {other}, so nothing it could find")
    found: dict[str, float] = {}
    for way, queries, others, truth in (("image_to_text", image, text, right), ("text_to_image", text, image, right.T)):
        rank = ranks(queries, others, truth)
        found |= {f"{way}/recall@{k}": (rank <= k).double().mean().item() for k in ks}
        found[f"{way}/median_rank"] = rank.double().quantile(0.5).item()
    return found


def ranks(queries: Tensor, others: Tensor, right: Tensor) -> Tensor:
    """The rank, from 1, of the best right one of ``others`` (M, D) for each of ``queries`` (N, D); right: bool (N, M).

    Similarities are compared in float64, some rows at a time. Raises RequestError where they are not finite.
    """
    parts = []
    for start in range(0, len(queries), ROWS):
        scores, truth = queries[start : start + ROWS].double() @ others.double().T, right[start : start + ROWS]
        if not scores.isfinite().all():
            raise RequestError("retrieval: the embeddings hold NaN or infinity")
        best = scores.masked_fill(~truth, -torch.inf).amax(1, keepdim=True)
        parts.append(1 + ((scores >= best) & ~truth).sum(1))
    return torch.cat(parts)
