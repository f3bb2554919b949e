"""Classification heads: from a backbone's summary to class scores of images.

Every head is called with ``(features, size)``, and offers ``loss(output, label)`` and ``predict(output)``.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from shared.backbone import Features
from shared.blocks.quantised import QuantisedLinear
from shared.errors import RequestError


class LinearHead(nn.Module):
    """One linear layer on the summary, after a norm and dropout where wanted: the linear probe and its relatives.

    summary_width: channels of the backbone's summary.  classes: number of classes.
    """

    summary_only = True  # it reads no feature maps: a cache need not keep any (see shared.cache)

    def __init__(
        self, summary_width: int, classes: int, *, norm: Literal["batch", "layer"] | None = None, dropout: float = 0.0
    ):
        """
        Args:
            norm: "batch" (without weights of its own, as for linear probes: He et al., 2022), "layer" or none.
            dropout: probability.
        """
        super().__init__()
        if not 0 <= dropout < 1:
            raise RequestError(f"head.dropout {dropout}: use a probability from 0 to below 1")
        self.summary_width, self.classes = summary_width, classes
        self.norm = nn.LayerNorm(summary_width) if norm == "layer" else nn.Identity()
        if norm == "batch":
            self.norm = nn.BatchNorm1d(summary_width, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(summary_width, classes)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Summary (B, summary_width) to logits (B, classes). Raises RequestError where it has another width."""
        if (got := features.summary.shape[-1]) != self.summary_width:
            raise RequestError(f"the head takes summaries of width {self.summary_width}, the backbone's have {got}")
        return self.classify(self.dropout(self.norm(features.summary)))

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,) class indices.  Mean cross entropy."""
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(-1)


class Logits(nn.Module):
    """The backbone's summary as it is, for one that gives class scores itself, such as ``BlackBox``; nothing trains.

    summary_width, classes: the number of scores and of classes, which must agree.
    """

    def __init__(self, summary_width: int, classes: int):
        super().__init__()
        if summary_width != classes:
            raise RequestError(f"the backbone gives {summary_width} class scores, the data have {classes} classes")
        self.classes = classes

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Summary (B, classes), logits as they are."""
        return features.summary

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(-1)


class BinaryHead(LinearHead):
    """A linear head whose weights take 2^bits values each, without a bias: Bi-Head (Jie et al., 2023)."""

    def __init__(
        self, summary_width: int, classes: int, *, bits: int = 1, norm: Literal["batch", "layer"] | None = None,
        dropout: float = 0.0,
    ):  # fmt: skip
        """
        Args:
            bits: of a weight: 1 (paper), 2, 4 or 8.
            norm, dropout: as ``LinearHead`` takes them.
        """
        super().__init__(summary_width, classes, norm=norm, dropout=dropout)
        self.classify = QuantisedLinear(summary_width, classes, bits, where="the head")
