"""Visual tokens: the published grid and the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from modalities.vision_language.visual_embedding import VisualEmbedding, downsample
from shared.errors import RequestError


def test_each_token_is_the_maximum_of_its_window_row_by_row():
    grid = torch.randn(2, 49, 3)
    small = downsample(grid, 6)
    square = grid.reshape(2, 7, 7, 3)
    for i in range(6):
        for j in range(6):
            window = square[:, i * 7 // 6 : -(-(i + 1) * 7 // 6), j * 7 // 6 : -(-(j + 1) * 7 // 6)]
            assert torch.equal(small[:, i * 6 + j], window.amax((1, 2)))
    assert torch.equal(downsample(torch.arange(64.0).reshape(1, 64, 1), 8)[0, :, 0], torch.arange(64.0))
    for features, side in ((torch.randn(1, 50, 3), 6), (torch.randn(1, 49, 3), 8), (torch.randn(1, 49, 3), 0)):
        with pytest.raises(RequestError, match=r"visual tokens to \d x \d: wants a square grid"):
            downsample(features, side)


def test_the_embedding_is_the_formula():
    embedding, words = VisualEmbedding(8, 6), nn.Embedding(20, 6)
    features, boxes = torch.randn(2, 4, 8), torch.rand(2, 4, 4)
    order, image = torch.tensor([[3, 1, 0, 2]]), torch.tensor([[0, 0, 1, 1]])
    area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
    seen = layer_norm(embedding.feature[0](features), (6,))
    seen = seen + layer_norm(embedding.position[0](torch.cat([boxes, area[..., None]], -1)), (6,))
    expected = seen + embedding.image.weight[image] + words.weight[19 - order]
    assert torch.allclose(embedding(features, boxes, words, image, order), expected, atol=1e-6)
    plain = seen + embedding.image.weight[0] + words.weight[[19, 18, 17, 16]]
    assert torch.allclose(embedding(features, boxes, words), plain, atol=1e-6)


def test_numbers_without_an_embedding_are_one_line():
    embedding, words = VisualEmbedding(8, 6), nn.Embedding(3, 6)
    with pytest.raises(RequestError, match="object number 3: there are 3 embeddings"):
        embedding(torch.randn(1, 4, 8), torch.rand(1, 4, 4), words)
    with pytest.raises(RequestError, match="image number 2: there are 2 embeddings"):
        embedding(torch.randn(1, 2, 8), torch.rand(1, 2, 4), words, torch.tensor([[0, 2]]))
