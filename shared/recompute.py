"""What backward needs, recomputed block by block (gradient checkpointing; Chen et al., 2016) or kept in main memory.

Recomputing runs a block's forward a second time in backward, with what its first run found: the call's context, the
active adapters, what adapters hold beside their tensors (such as the experts drawn for a pass), random numbers,
precision and codes. So gradients are those of keeping everything, bit for bit but where that saves a layer's input by
making it again (``shared.sources``), and what adapters note down while they run is noted once. Torch's non-reentrant
form is used, which does not ask that a block's input takes gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from shared.errors import RequestError
from shared.memory import compressed

if TYPE_CHECKING:
    from shared.adapted import Adapted

TENSORS = ("_parameters", "_buffers", "_modules")


def blocks(model: Adapted) -> list[nn.Module]:
    """The backbone's blocks. Raises RequestError where it describes none."""
    found = list(dict.fromkeys(site.module for site in model.sites() if site.role == "block"))
    if not found:
        raise RequestError(f"{model.backbone_name} describes no blocks that could be recomputed")
    return found


@contextlib.contextmanager
def keeping(model: Adapted) -> Iterator[None]:
    """Within it, what the backbone keeps for backward is kept as the model says; codes also as an active method does.

    A compiled model is left to its compiler, which plans by itself what to keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    wanted = [model.saving, *(model.methods[name].saving() for name in model.active)]
    codes = next((partial(compressed, each) for each in wanted if each is not None), contextlib.nullcontext)
    with (
        offloaded(model) if model.offload else contextlib.nullcontext(),
        _recomputed(model, codes) if model.recompute else contextlib.nullcontext(),
        codes(),
    ):
        yield


@contextlib.contextmanager
def _recomputed(model: Adapted, codes: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within it every block's own forward is a checkpoint."""
    found = [block for block in blocks(model) if "forward" not in block.__dict__]
    try:
        for block in found:
            block.__dict__["forward"] = partial(_checkpoint, model, block, codes)
        yield
    finally:
        for block in found:
            del block.__dict__["forward"]


def _checkpoint(model: Adapted, block: nn.Module, codes: Callable, *args: Any, **kwargs: Any) -> Any:
    told, active, adapters = _copied(vars(model.context)), model.state.active, _held(model.bank)
    others = _apart((args, kwargs))  # a cache of keys, say, to which the first run appends
    second = False

    def run(*args: Any, **kwargs: Any) -> Any:
        if second:
            mine, named = _apart(others)
            args = tuple(a if isinstance(a, Tensor) else m for a, m in zip(args, mine, strict=True))
            kwargs = {key: a if isinstance(a, Tensor) else named[key] for key, a in kwargs.items()}
        return type(block).forward(block, *args, **kwargs)

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        nonlocal second
        before = _copied(vars(model.context)), model.state.active, _held(model.bank)
        buffers = [(module, dict(module._buffers)) for module in model.bank.modules() if module._buffers]
        second = True
        try:
            for module, own in buffers:  # what a second run counts, such as means of a batch, is thrown away
                module._buffers = {name: None if b is None else b.clone() for name, b in own.items()}
            _put_back(model, told, active, adapters)
            with codes():
                yield
        finally:
            for module, own in buffers:
                module._buffers = own
            _put_back(model, *before)
            second = False

    return checkpoint(
        run, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()), **kwargs
    )  # fmt: skip


def _apart(value: Any) -> Any:
    """A copy of all that is made of other things, with the same tensors, modules and functions in it."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_apart, value))
    if type(value) is dict:
        return {key: _apart(each) for key, each in value.items()}
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return value
    twin = copy.copy(value)
    twin.__dict__.update({key: _apart(each) for key, each in vars(value).items()})
    return twin


def _held(bank: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What each adapter holds beside its tensors."""
    return [(module, _copied({k: v for k, v in vars(module).items() if k not in TENSORS})) for module in bank.modules()]


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """The values, where lists and dictionaries are copies: who appends to them does so once."""
    return {key: value.copy() if isinstance(value, (list, dict)) else value for key, value in values.items()}


def _put_back(model: Adapted, told: dict[str, Any], active: Any, adapters: list[tuple[nn.Module, dict]]) -> None:
    model.context.clear()
    vars(model.context).update(_copied(told))
    model.state.active = active
    for module, held in adapters:
        vars(module).update(_copied(held))


def offloaded(model: Adapted) -> contextlib.AbstractContextManager[Any]:
    """Within it, tensors kept for backward lie in main memory and come back when backward asks; parameters and buffers,
    which are there anyway, stay where they are. On a CPU nothing is copied."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def away(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.device.type == "cpu" or tensor.untyped_storage().data_ptr() in there:
            return tensor.device, tensor
        kept = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor)

    return saved_tensors_hooks(away, lambda kept: kept[1].to(kept[0], non_blocking=kept[1].is_pinned()))
