"""Proof of effect: an adapter that is never run, or whose run changes nothing, is an error that names its site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from shared import half
from shared.errors import WorkError

DRAWS = 8  # of the noise, at most, until a gradient has reached every adapter


def prove(model: Any, name: str, example: Sequence[Any]) -> None:
    """Run the backbone on ``example`` with the adapter perturbed, in training and in inference mode.

    Every site's adapter must run and receive a gradient that is not zero in training, must run in inference, and both
    modes must agree: a fused kernel that bypasses an adapter disagrees. Where the backbone gives no gradient, noise on
    each adapter's own parameters must change the output instead. Parameters, buffers and random state are put
    back exactly. Nothing is run on the meta device.

    Raises WorkError naming the sites that fail.
    """
    modules: dict[str, nn.Module] = dict(model.bank[name].items())
    tensors = [t for t in tree_flatten(tuple(example))[0] if isinstance(t, Tensor)]
    if any(t.device.type == "meta" for t in (*tensors, *model.parameters())):
        return
    with _perturbed(model, modules), half.computing(model):
        vars(model.context).update(model.methods[name].example())
        for module in modules.values():
            module.train()
        with torch.enable_grad():
            _forget(model)
            output = model.backbone(*example)
            _fail(_silent(model, modules), name, "never ran in training mode")
            if getattr(model.backbone, "differentiable", True):
                _check_gradients(model, modules, example, output, name)
            else:
                _check_changes(model, modules, example, output, name)
        for module in modules.values():
            module.eval()
        with torch.enable_grad():
            trained = _flat(model.backbone(*example)).detach()
        with torch.no_grad():
            _forget(model)
            inferred = _flat(model.backbone(*example))
            _fail(_silent(model, modules), name, "never ran in inference mode (a fused kernel may bypass its module)")
            with model.disabled():
                bare = _flat(model.backbone(*example))
        # What an adapter adds, such as queries, stands behind; one around the whole model may give another kind.
        alike = trained[: len(bare)]
        changed = alike - bare if alike.shape == bare.shape else trained
        effect, difference = float(changed.norm()), float((trained - inferred).norm())
        rounding = 4 * max(torch.finfo(t.dtype).eps for t in tensors_of(model)) * float(bare.norm())
        if difference > 0.1 * effect + rounding:
            raise WorkError(
                f"adapter {name!r} acts differently in training and in inference mode: outputs differ by "
                f"{difference:.3g} where the adapter itself changes them by {effect:.3g}"
            )


def _check_gradients(model: Any, modules: dict[str, nn.Module], example: Sequence[Any], output: Any, name: str) -> None:
    unreached = _unreached(modules, _total(output))
    for seed in range(1, DRAWS):  # a narrow rectified branch may be off everywhere by chance
        if unreached:
            _shake(modules, seed)
            again = _unreached(modules, _total(model.backbone(*example)))
            unreached = [key for key in unreached if key in again]
    _fail(unreached, name, "received no gradient: its output is not used")


def _check_changes(model: Any, modules: dict[str, nn.Module], example: Sequence[Any], output: Any, name: str) -> None:
    """Each adapter that has parameters must change the output when they alone move."""
    before, idle = _flat(output), []
    for key, module in modules.items():
        if any(True for _ in module.parameters()):
            _shake({key: module}, 1)
            after = _flat(model.backbone(*example))
            idle += [key] if torch.equal(before, after) else []
            before = after
    _fail(idle, name, "does not change the output, which gives no gradient either")


def _shake(modules: dict[str, nn.Module], seed: int) -> None:
    """Add noise to every parameter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                scale = 0.1 * float(parameter.float().std(unbiased=False)) + 0.02
                parameter.add_(torch.randn(parameter.shape).to(parameter) * scale)


def _fail(keys: list[str], name: str, what: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise WorkError(f"adapter {name!r} {what} at {', '.join(keys[:3])}{more}")


def tensors_of(model: Any) -> list[Tensor]:
    """The floating-point parameters of the model."""
    return [p for p in model.parameters() if p.is_floating_point()]


def _silent(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    ran = set().union(*(port.ran for port in model.hosts().values()))
    return [key for key, module in modules.items() if id(module) not in ran]


def _unreached(modules: dict[str, nn.Module], output: Tensor) -> list[str]:
    """Keys of the modules none of whose parameters has a gradient other than zero; frozen ones need none."""
    parameters = list({id(p): p for module in modules.values() for p in _trained(module)}.values())
    if not parameters or not output.requires_grad:
        return [key for key, module in modules.items() if _trained(module)]
    gradients = torch.autograd.grad(output, parameters, allow_unused=True)
    by_id = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
    return [key for key, module in modules.items() if _trained(module) and not _reached(module, by_id)]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _reached(module: nn.Module, gradients: Mapping[int, Tensor | None]) -> bool:
    found = [gradients.get(id(p)) for p in module.parameters()]
    return any(g is not None and bool(g.count_nonzero()) for g in found)


def _flat(output: Any) -> Tensor:
    """Every number of the output, in one float vector."""
    leaves = [t.float().flatten() for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    if not leaves:
        raise WorkError("the backbone's output holds no floating-point tensor to prove the adapters' effect on")
    return torch.cat(leaves)


def _total(output: Any) -> Tensor:
    """A scalar that depends on every number of the output, with weights that no symmetry cancels."""
    flat = _flat(output)
    return flat @ torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat.device)


def _forget(model: Any) -> None:
    model.state.folds.clear()
    for port in model.hosts().values():
        port.ran.clear()


@contextmanager
def _perturbed(model: Any, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Noise on every adapter tensor within the block; everything is restored bit for bit after it."""
    states = {key: {n: t.detach().clone() for n, t in module.state_dict().items()} for key, module in modules.items()}
    modes, context = {key: module.training for key, module in modules.items()}, dict(model.context.__dict__)
    try:
        with torch.random.fork_rng(devices=[]):
            _shake(modules, 0)
            yield
    finally:
        for key, module in modules.items():
            module.load_state_dict(states[key])
            module.train(modes[key])
        model.context.clear()
        model.context.__dict__.update(context)
