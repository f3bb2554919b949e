"""How a language model sees an image: grid or region features as tokens beside the text (Sung et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RequestError


def downsample(features: Tensor, side: int) -> Tensor:
    """Tokens (B, n * n, C) of a square grid, row by row, to (B, side * side, C): each the maximum of its window."""
    n = round(features.shape[1] ** 0.5)
    if n * n != features.shape[1] or not 1 <= side <= n:
        raise RequestError(
            f"{features.shape[1]} visual tokens to {side} x {side}: wants a square grid that is as large"
        )
    grid = features.transpose(1, 2).unflatten(2, (n, n))
    return F.adaptive_max_pool2d(grid, side).flatten(2).transpose(1, 2)


class VisualEmbedding(nn.Module):
    """``norm(W_f features) + norm(W_p [box, area])`` plus an embedding of the image's and of the object's number.

    inputs: channels of the features.  width: of the language model.  images: how many one text may have.
    """

    def __init__(self, inputs: int, width: int, *, images: int = 2):
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))
        self.position = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width))
        self.image = nn.Embedding(images, width)

    def forward(
        self, features: Tensor, boxes: Tensor, words: nn.Embedding, image: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Features (B, N, C) and boxes (B, N, 4) as x1, x2, y1, y2 to tokens (B, N, width).

        words: the language model's embedding, whose last rows are those of objects 0, 1, ... from the end.
        image: number of the image of each token, broadcast to (B, N); 0 if not given.  order: number of the object;
        that of the token if not given.

        Raises RequestError where a number has no embedding.
        """
        objects = torch.arange(features.shape[1], device=features.device)[None] if order is None else order
        images = torch.zeros_like(objects) if image is None else image
        for what, numbers, table in (("image", images, self.image), ("object", objects, words)):
            if not 0 <= int(numbers.min()) <= int(numbers.max()) < table.num_embeddings:
                raise RequestError(f"{what} number {int(numbers.max())}: there are {table.num_embeddings} embeddings")
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
        seen = self.feature(features) + self.position(torch.cat([boxes, area.unsqueeze(-1)], dim=-1))
        return seen + self.image(images) + words(words.num_embeddings - 1 - objects)
