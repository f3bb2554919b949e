"""The heads of text classification: the states of a text pooled to one vector, and a linear classifier, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.language.backbones import Hidden
from shared.blocks.tasks import ByTask, task_of
from shared.context import Context
from shared.errors import RequestError

POOLINGS = ("mean", "first", "last", "pooler")


class TextHead(nn.Module):
    """One vector for a text, and class scores from it.

    channels: of the backbone's states, the last counts.  classes: number of classes.
    pooling: "mean" of the tokens, the "first" (BERT, RoBERTa), the "last" (what a causal model has read all for), or
        the backbone's own "pooler" (backbone.pooler=true).
    dropout: probability on the pooled vector, in training.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, *, pooling: Literal["mean", "first", "last", "pooler"] = "mean",
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if not 0 <= dropout < 1:
            raise RequestError(f"head.dropout {dropout}: use a probability from 0 to below 1")
        self.classes, self.pooling, self.dropout = classes, pooling, dropout
        self.classify = nn.Linear(channels[-1], classes)

    def forward(self, hidden: Hidden, size: tuple[int, ...] = ()) -> Tensor:
        """States (B, N, C) of texts to logits (B, classes)."""
        pooled = pool(hidden, self.pooling).to(self.classify.weight.dtype)
        return self.classify(F.dropout(pooled, self.dropout, self.training))

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,).  Cross entropy."""
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(1)


class TextHeads(nn.Module):
    """A ``TextHead`` for each task, of which a call's own is used: ``model(..., context={"task": "sentiment"})``.

    channels: of the backbone's states, the last counts.  tasks: number of classes by task.
    pooling, dropout: those of ``TextHead``.
    """

    def __init__(
        self, channels: Sequence[int], tasks: Mapping[str, int], *,
        pooling: Literal["mean", "first", "last", "pooler"] = "mean", dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.context, self.classes = Context(), dict(tasks)
        self.heads = ByTask(
            {task: TextHead(channels, classes, pooling=pooling, dropout=dropout) for task, classes in tasks.items()}
        )

    def forward(self, hidden: Hidden, size: tuple[int, ...] = ()) -> Tensor:
        """States (B, N, C) of one task's texts to its logits (B, classes)."""
        return self.heads[task_of(self.context, self.heads)](hidden)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,).  Cross entropy."""
        return F.cross_entropy(output.float(), label)

    def predict(self, output: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(1)


def pool(hidden: Hidden, how: str) -> Tensor:
    """States (B, N, C) to vectors (B, C), whatever stands at padding. See ``TextHead``."""
    states, mask, pooled = hidden
    if how == "pooler":
        if pooled is None:
            raise RequestError("head.pooling 'pooler': the backbone gives no pooled vector; set backbone.pooler=true")
        return pooled
    if how == "first":
        return states[:, 0]
    if how == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
    shown = torch.where(mask[:, :, None], states, 0)
    return shown.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(states.dtype)
