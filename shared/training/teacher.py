"""The mean teacher: an average of what a model trains, and what the model says with it (Tarvainen & Valpola, 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shared.adapted import Adapted


class Teacher(nn.Module):
    """Averages of the trained tensors of ``model``, which it does not own; the frozen ones are the model's own.

    They are buffers, so they follow the task to its device, and no optimiser sees them. It never has gradients.

    limit: share of the average that an update keeps, at most (see ``update``).
    """

    def __init__(self, model: Adapted, limit: float = 0.99):
        super().__init__()
        self.limit = limit
        for name, tensor in model.trained_state().items():
            self.register_buffer(_own(name), tensor.detach().clone())

    @torch.no_grad()
    def update(self, model: Adapted, iteration: int) -> None:
        """Take in the model after optimiser step ``iteration`` (0-based): ``alpha * mine + (1 - alpha) * model's``.

        alpha = min(1 - 1 / (iteration + 1), limit): 0 at first, so that nothing of the start is left. Buffers (running
        statistics, counts) are copied.
        """
        averaged = {name for name, _ in model.named_parameters()}
        for name, theirs in model.trained_state().items():
            mine = self.get_buffer(_own(name))
            if _place(name) in averaged:
                mine.lerp_(theirs, 1 - alpha(iteration, self.limit))
            else:
                mine.copy_(theirs)

    @torch.no_grad()
    def forward(self, model: Adapted, *args: Any, **kwargs: Any) -> Any:
        """What the model says with these tensors in place of its own, in eval mode."""
        tensors = {_place(name): self.get_buffer(_own(name)) for name in model.trained_state()}
        training = model.training
        model.eval()
        try:
            return functional_call(model, tensors, args, kwargs)
        finally:
            model.train(training)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of ``model.trained_state()``."""
        return {_theirs(name): tensor for name, tensor in self.named_buffers()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the averages from a checkpoint."""
        self.load_state_dict({_own(name): tensor for name, tensor in tensors.items()})


def alpha(iteration: int, limit: float) -> float:
    """The share of a teacher that its update after optimiser step ``iteration`` keeps."""
    return min(1 - 1 / (iteration + 1), limit)


def _own(name: str) -> str:
    """A buffer's name has no dots; those of sites have no vertical bars."""
    return name.replace(".", "|")


def _theirs(name: str) -> str:
    return name.replace("|", ".")


def _place(name: str) -> str:
    """Where a trained tensor is in the model: adapters are in its bank."""
    return f"bank.{name.removeprefix('adapter.')}" if name.startswith("adapter.") else name
