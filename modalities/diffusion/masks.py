"""The dual masks of RDTF (2025, arXiv 2503.17735): which frames of a clip are real, and which of them are given.

Nothing here knows of images: the sequence is the third axis of (B, C, F, ...), of a video's frames as of audio's or a
time series' steps. Draws come from Python's ``random`` or an own ``random.Random``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.errors import RequestError

# The six tasks in the order of the released code, and the family each is weighed with.
FAMILIES = {
    "i2v": "generation",
    "t2v": "generation",
    "it2v": "generation",
    "interpolation": "interpolation",
    "pre_frame_prediction": "prediction",
    "post_frame_prediction": "prediction",
}
TASKS = tuple(FAMILIES)


class Condition(NamedTuple):
    """What one batch is told.

    given: which of the F frames, 1 or 0.  text: whether the text is told too.
    """

    given: tuple[int, ...]
    text: bool


def interpolations(frames: int) -> tuple[tuple[int, ...], ...]:
    """The three masks of interpolation: every second frame, the others, every third."""
    return (
        tuple(int(i % 2 == 0) for i in range(frames)),
        tuple(int(i % 2 == 1) for i in range(frames)),
        tuple(int(i % 3 == 0) for i in range(frames)),
    )


def condition(task: str, real: int, frames: int = 8, draws: Any = random) -> Condition:
    """A condition of a task, drawn.

    real: the least number of real frames in the batch, 2 to ``frames``.  draws: gives ``randint`` and ``choice``.

    Raises RequestError for another task or number.
    """
    if not 2 <= real <= frames:
        raise RequestError(f"clips of {real} real frames: from 2 to {frames}")
    if task == "t2v":
        return Condition((0,) * frames, True)
    if task in ("i2v", "it2v"):
        place = draws.randint(0, real - 1)
        return Condition(tuple(int(i == place) for i in range(frames)), task == "it2v")
    if task == "interpolation":
        return Condition(draws.choice(interpolations(frames)), True)
    if task == "pre_frame_prediction":
        start = draws.randint(1, real // 2 + 1)
        return Condition(tuple(int(i >= start) for i in range(frames)), True)
    if task == "post_frame_prediction":
        end = draws.randint(real // 2, real - 1)
        return Condition(tuple(int(i < end) for i in range(frames)), True)
    raise RequestError(f"no task {task!r}; there are {', '.join(TASKS)}")


def frame_mask(real: int | Sequence[int], frames: int = 8) -> Tensor:
    """float32 (F,) of one clip or (B, F) of several: 1 for its real frames, 0 for the padding after them."""
    counts = torch.as_tensor(real)
    return (torch.arange(frames) < counts[..., None]).float()


def masked_condition(x: Tensor, given: Tensor, real: Tensor) -> Tensor:
    """Clips (B, C, F, ...) with zeros wherever a frame is not given, (F,) or (B, F), or not real, (B, F)."""
    return x * _spread(given.to(x), x) * _spread(real.to(x), x)


def masked_loss(predicted: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """The squared error (B,) of each clip (B, C, F, ...), padding counting as zeros in the mean over all elements.

    real: (B, F). Frames that were given count like the others, as published.
    """
    error = _spread(real.to(predicted), predicted) * (predicted - target)
    return error.square().flatten(1).mean(1)


def _spread(mask: Tensor, x: Tensor) -> Tensor:
    """(F,) or (B, F) to the axes of x (B, C, F, ...)."""
    mask = mask if mask.ndim == 2 else mask[None]
    return mask.reshape(mask.shape[0], 1, mask.shape[1], *(1,) * (x.ndim - 3))
