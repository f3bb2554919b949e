"""Heads of CLIP: logits of classes from image and text embeddings, or from weights that start as the zero-shot ones.

Every head is called with ``(embeddings, size)``, and offers ``loss(output, label)`` and ``predict(output)``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.vision_language.backbones import Embeddings
from modalities.vision_language.zero_shot import class_weights
from shared.errors import RequestError


class SimilarityHead(nn.Module):
    """``scale * image @ class.T``: CLIP's own logits, the classes being the means of their texts; nothing trains.

    classes: number of classes.
    """

    def __init__(self, classes: int, *, objective: Literal["cross_entropy", "contrastive"] = "cross_entropy"):
        """
        Args:
            objective: of the few-shot training: "cross_entropy" over the classes, or "contrastive" (as below).
        """
        super().__init__()
        self.classes, self.objective = classes, objective

    def forward(self, embeddings: Embeddings, size: tuple[int, int]) -> Tensor:
        """Images (B, D) and texts (classes * templates, D) to logits (B, classes)."""
        if embeddings.text is None or len(embeddings.text) % self.classes:
            raise RequestError(
                f"the head takes texts of each of {self.classes} classes; use the task ClipClassification"
            )
        return logits(embeddings, class_weights(embeddings.text, self.classes))

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,) class indices."""
        if self.objective == "contrastive":
            return contrastive(output.float(), label)
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(-1)


class ZeroShotHead(nn.Module):
    """A linear classifier of image embeddings whose weights start as the zero-shot ones (Wortsman et al., 2022).

    The task fills ``zero_shot`` once (``start``); the file keeps both. ``share``: how far the weights in use are from
    the zero-shot ones (0) to the trained ones (1).

    summary_width: of the embeddings.  classes: number of classes.
    """

    zero_shot: Tensor
    started: Tensor

    def __init__(self, summary_width: int, classes: int):
        super().__init__()
        self.classes, self.share = classes, 1.0
        self.weight = nn.Parameter(torch.zeros(classes, summary_width))
        self.register_buffer("zero_shot", torch.zeros(classes, summary_width))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start(self, weights: Tensor) -> None:
        """Begin at these zero-shot weights (classes, D)."""
        for mine in (self.weight, self.zero_shot):
            mine.copy_(weights)
        self.started.fill_(True)

    def forward(self, embeddings: Embeddings, size: tuple[int, int]) -> Tensor:
        """Images (B, D) to logits (B, classes)."""
        weight = self.weight if self.share == 1 else torch.lerp(self.zero_shot, self.weight, self.share)
        return logits(embeddings, weight)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,) class indices.  Mean cross entropy."""
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(-1)


def logits(embeddings: Embeddings, weights: Tensor) -> Tensor:
    """Images (B, D) and class weights (classes, D) to logits (B, classes), in the order of open_clip's products.

    In float32 at least, also under autocast: cosines of classes differ by less than half precision tells apart.
    """
    image, scale = embeddings.image, embeddings.scale
    assert image is not None
    assert scale is not None
    wide = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        return scale.to(wide) * image.to(wide) @ weights.to(wide).T


def contrastive(logits: Tensor, label: Tensor) -> Tensor:
    """CLIP's loss over the pairs of an image and its class, logits (B, classes): mean of both directions.

    The classes of the batch count. Several images may share one; to that text all of them are equally right (Yang et
    al., 2022), so where each class comes once the loss is CLIP's own.
    """
    present, place = label.unique(return_inverse=True)
    scores = logits[:, present]
    right = F.one_hot(place, len(present)).to(scores).T
    to_text = F.cross_entropy(scores, place)
    to_image = F.cross_entropy(scores.T, right / right.sum(1, keepdim=True))
    return (to_text + to_image) / 2
