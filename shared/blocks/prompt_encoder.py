"""Prompt tokens made by a small network, which trains more steadily than free ones (Li and Liang, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.errors import RequestError


class PromptEncoder(nn.Module):
    """``W2 tanh(W1 E + b1) + b2``: (count, width) tokens from as many embeddings.

    hidden: width inside. Raises RequestError where a size is below 1.
    """

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        if count < 1 or hidden < 1:
            raise RequestError(f"prompt of {count} tokens, {hidden} channels inside: use at least 1 of each")
        self.embeddings = nn.Parameter(torch.randn(count, width))
        self.network = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self) -> Tensor:
        return self.network(self.embeddings)
