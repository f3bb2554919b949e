"""What inference costs in each form of an adapter: the bare model, separate branches, folded, merged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shared.adapted import Adapted
from shared.errors import RequestError

FORMS = ("bare", "separate", "folded", "merged")


def latency(task: Any, batch: dict[str, Any], *, rounds: int = 5, calls: int = 3) -> dict[str, float]:
    """Seconds of ``task.outputs(batch)`` by form, without gradients; "merged" only where that can be done.

    "bare" is the frozen model with the head, "separate" every adapter beside its layer, "folded" what inference uses.
    The forms take turns, each round from another one on, and before each turn one call warms up. The fastest call
    counts: what a busy machine adds is never negative.
    """
    model: Adapted = task.model
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    was_training = task.training
    task.eval()
    try:
        with torch.no_grad():
            for number in range(rounds):
                for form in (*FORMS[number % len(FORMS) :], *FORMS[: number % len(FORMS)]):
                    times = taken[form]
                    with _as(model, form) as possible:
                        for call in range(calls + 1 if possible else 0):
                            seconds = _timed(task, batch)
                            times += [seconds] if call else []
    finally:
        task.train(was_training)
    return {form: min(times) for form, times in taken.items() if times}


def first(batch: dict[str, Any], count: int = 1) -> dict[str, Any]:
    """The first samples of a batch, whose values are tensors or lists with a sample each."""
    return {key: value[:count] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}


@contextlib.contextmanager
def _as(model: Adapted, form: str) -> Iterator[bool]:
    """The model in a form within the block; False where it has none such."""
    before = model.state.form
    try:
        if form == "bare":
            with model.disabled():
                yield True
            return
        model.state.form = "separate" if form == "separate" else "auto"
        if form == "merged":
            try:
                model.merge()
            except RequestError:  # it acts on activations
                yield False
                return
        yield True
    finally:
        model.state.form = before
        model.unmerge()


def _timed(task: Any, batch: dict[str, Any]) -> float:
    device = next(task.parameters()).device
    began = time.perf_counter()
    task.outputs(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
