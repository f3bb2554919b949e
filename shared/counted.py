"""What one training step computes and keeps, counted, and what its parts take: the ground of advice before training.

The limit of a step with a frozen backbone is its forward pass and the backward pass down to the lowest adapter, without
a gradient of any weight. Full fine-tuning computes as much again for the gradients of all weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.memory import saved_bytes

if TYPE_CHECKING:
    from shared.adapted import Adapted
    from shared.training.engine import Engine
    from shared.training.task import Task

TURNS = 3  # after one that warms up


class Counted(NamedTuple):
    """forward_flops, backward_flops: of products, convolutions and attention in one batch.  saved_bytes: kept for
    backward, parameters apart.  blocks: of the backbone, and those from the lowest adapted one up (0: none is adapted).

    Seconds, which are told for their ratios, taken in turns and the fastest: own_seconds: of a step, its optimiser
    included.  forward_seconds: of the bare model without gradients.  limit_seconds: of the limit of this step.
    full_seconds: of full fine-tuning, predicted from its products and an optimiser of that size.
    """

    forward_flops: int
    backward_flops: int
    saved_bytes: int
    blocks: tuple[int, int]
    own_seconds: float
    forward_seconds: float
    limit_seconds: float
    full_seconds: float


def counted(task: Task, batch: Any, engine: Engine) -> Counted:
    """Count and time steps of ``task`` on ``batch``, on whose device the task is. Gradients are made and dropped;
    adapters note what they note in training."""
    model: Adapted = task.model
    task.train()

    def loss() -> Tensor:
        with _precision(engine, batch):
            return model.loss(task, batch)

    def step() -> None:
        model.step(0, 0)
        found = loss()
        found = found + model.penalty()
        if found.requires_grad:
            found.backward()
        task.zero_grad()

    def bare(depth: int | None) -> None:
        with model.disabled(), _frozen(model), _vector(model, depth):
            step()

    def forward() -> None:
        with model.disabled(), torch.no_grad():
            loss()

    blocks = _blocks(model)
    model.step(0, 0)
    flops, whole, kept = _flops(model, loss)
    lowest = blocks[0] - blocks[1] if blocks[1] else None
    own, ahead, limit, deepest = _fastest(step, forward, lambda: bare(lowest), lambda: bare(0))
    trained, every = model.count()["trainable"], sum(p.numel() for p in model.parameters())
    # The gradients of weights are as many products as those of what flows through.
    full = deepest + max(deepest - ahead, 0.0) + _optimiser(every, model)
    return Counted(flops, whole - flops, kept, blocks, own + _optimiser(trained, model), ahead, limit, full)


def _flops(model: Adapted, loss: Callable[[], Tensor]) -> tuple[int, int, int]:
    """FLOPs of a forward pass, of that and a backward pass, and the bytes kept between them."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten  # torch knows the formulas, but not that its kernel for CPUs has them
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        with saved_bytes(model) as kept:
            found = loss()
        forward = counter.get_total_flops()
        if found.requires_grad:
            found.backward()
        return forward, counter.get_total_flops(), sum(kept.values())


def _blocks(model: Adapted) -> tuple[int, int]:
    """How many blocks there are, and how many from the lowest that holds an adapter up."""
    sites = model.sites()
    depths = {site.depth for site in sites if site.role == "block"}
    keys = {key for name in model.active for key in model.bank[name]}  # type: ignore[union-attr]
    adapted = [site.depth for site in sites if site.key in keys]
    if not depths or not adapted:
        return len(depths), 0
    return len(depths), len(depths) - max(min(adapted), 0)


@contextlib.contextmanager
def _frozen(model: Adapted) -> Iterator[None]:
    """Within it no weight of the backbone takes a gradient."""
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _vector(model: Adapted, depth: int | None) -> Iterator[None]:
    """Within it a trainable vector is added at the input of block ``depth``, or of the backbone's first layer where it
    describes no blocks: the least that makes backward go down there. None: nothing is."""
    if depth is None:
        yield
        return
    found = [site.module for site in model.sites() if site.role == "block" and site.depth == depth]
    module = found[0] if found else next(m for m in model.backbone.modules() if list(m.parameters(recurse=False)))
    vector = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def add(_: nn.Module, args: tuple) -> tuple:
        return tuple(a + vector if isinstance(a, Tensor) and a.is_floating_point() and not i else a
                     for i, a in enumerate(args))  # fmt: skip

    hook = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _precision(engine: Engine, batch: Any) -> contextlib.AbstractContextManager[Any]:
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(engine.precision)
    device = next((v.device.type for v in batch.values() if isinstance(v, Tensor)), "cpu")
    return torch.autocast(device, dtype=dtype) if dtype else contextlib.nullcontext()


def _fastest(*runs: Callable[[], Any]) -> list[float]:
    """Seconds of each, the least of several turns: what a busy machine adds is never negative."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(TURNS + 1):
        for run, taken in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return [min(taken[1:]) for taken in times]


def _optimiser(parameters: int, model: Adapted, most: int = 2**20) -> float:
    """Seconds that AdamW takes for so many parameters, in proportion to those for fewer."""
    few = min(parameters, most)
    dummy = nn.Parameter(torch.zeros(few, device=next(model.parameters()).device))
    dummy.grad, optimiser = torch.ones_like(dummy), torch.optim.AdamW([dummy])
    return _fastest(optimiser.step)[0] * parameters / few if few else 0.0
