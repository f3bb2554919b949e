"""Statistics of what frozen linear layers are fed, over a user's batches: for methods that start from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shared.blocks.placement import take
from shared.errors import RequestError, WorkError
from shared.sites import Site


class Statistic:
    """Something summed over the inputs of one layer. Subclasses give ``add``.

    samples, tokens: how many were added, padding apart.
    """

    samples, tokens = 0, 0

    def add(self, x: Tensor, mask: Tensor) -> None:
        """x float32 (B, N, C), zero where mask (B, N), true at tokens, is not."""
        raise NotImplementedError


class SecondMoment(Statistic):
    """The uncentred second moment, ``total = sum of x x^T`` over all tokens: (C, C), float32; not divided by anything.

    normalised: divide the tokens of a sample by ``|max|`` of them before, the signed maximum as CorDA has it (Yang et
    al., 2024); where that is below a thousandth of the largest magnitude, by the latter (``guarded`` such samples).
    """

    def __init__(self, *, normalised: bool = False):
        self.normalised, self.guarded = normalised, 0
        self.total: Tensor | None = None

    def add(self, x: Tensor, mask: Tensor) -> None:
        if self.normalised:
            x = x / self._size(x, mask)[:, None, None]
        rows = x.flatten(0, 1)
        moment = rows.t() @ rows
        self.total = moment if self.total is None else self.total.add_(moment)

    def _size(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B,), above zero."""
        signed = x.masked_fill(~mask[..., None], -torch.inf).amax((1, 2)).abs()
        largest = x.abs().amax((1, 2))
        tiny = (signed < 1e-3 * largest) & (largest > 0)
        self.guarded += int(tiny.sum())
        size = torch.where(tiny, largest, signed)
        return torch.where((largest == 0) | ~size.isfinite(), torch.ones_like(size), size)


S = TypeVar("S", bound=Statistic)


def collect(
    model: Any, sites: Sequence[Site], batches: Iterable[Any], run: Callable[[Any], Any], make: Callable[[], S], *,
    samples: int | None = None, at_a_time: int | None = None,
) -> Iterator[tuple[Site, S]]:  # fmt: skip
    """Each site with the statistic of its layer's inputs, in order; the layers of one fused projection share one.

    The adapted model runs as it is (``with model.disabled():`` for the bare backbone), in eval mode, without gradients;
    its modes are put back before anything is given. Where the backbone writes ``context.token_mask`` (B, N), padding is
    left out. The first axis of what a layer is fed counts as samples.

    run: runs the model on a batch, such as the task's loss.  make: a new statistic.  samples: stop after so many.
    at_a_time: layers in one pass over the batches (None: all at once); the next pass starts when the next site is asked
    for, so a layer may be changed before those after it are measured. ``batches`` must be iterable anew for each pass.

    Raises RequestError where a site is no linear layer that is called, or the batches are empty; WorkError where an
    input is not finite, does not fit the token mask, or never comes.
    """
    layers: dict[str, list[Site]] = {}
    for site in sites:
        _check(site)
        layers.setdefault(site.path, []).append(site)
    paths = list(layers)
    step = max(len(paths), 1) if at_a_time is None else at_a_time
    if step < 1 or (samples is not None and samples < 1):
        raise RequestError(f"calibration: samples {samples}, {at_a_time} layers at a time: use at least 1")
    for start in range(0, len(paths), step):
        found = {path: make() for path in paths[start : start + step]}
        with _listening(model, {path: layers[path][0].module for path in found}, found, samples):
            _pass(batches, run, found, samples)
        for path in list(found):
            statistic = found.pop(path)
            yield from ((site, statistic) for site in layers[path])


def _check(site: Site) -> None:
    called = isinstance(site.module, nn.Linear) and not isinstance(
        site.module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    if not called or site.parameter != "weight":
        raise RequestError(
            f"calibration: site {site.key} ({site.role}) is {site.parameter} of {type(site.module).__name__}; only "
            "inputs of linear layers that are called can be measured"
        )


def _pass(batches: Iterable[Any], run: Callable[[Any], Any], found: dict[str, S], samples: int | None) -> None:
    count = 0
    for batch in batches:
        run(batch)
        count += 1
        if samples is not None and all(statistic.samples >= samples for statistic in found.values()):
            break
    if not count:
        raise RequestError("calibration: there is no batch (an iterator serves one pass only; give a list or loader)")
    for path, statistic in found.items():
        if not statistic.tokens:
            raise WorkError(f"calibration: {path or 'the model'} was fed no token in {count} batches")


@contextmanager
def _listening(model: nn.Module, modules: dict[str, nn.Module], found: dict[str, S], samples: int | None):
    """The model in eval mode without gradients, every input of ``modules`` added to what is found."""

    def hook(path: str):
        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            mask = getattr(model.context, "token_mask", None)
            _add(found[path], path or "the model", take(args, kwargs)[0], mask, samples)

        return listen

    modes = {module: module.training for module in model.modules()}
    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in modules.items()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _add(statistic: Statistic, where: str, x: Tensor, mask: Tensor | None, samples: int | None) -> None:
    x, mask = _arranged(x, mask, where)
    if samples is not None:
        x, mask = x[: samples - statistic.samples], mask[: samples - statistic.samples]
    if not len(x):
        return
    x = x.detach().float().masked_fill(~mask[..., None], 0.0)
    if not x.isfinite().all():
        raise WorkError(
            f"calibration: the input of {where} is not finite within samples {statistic.samples} to "
            f"{statistic.samples + len(x) - 1}; look at these samples, or at the precision of the backbone"
        )
    with torch.autocast(x.device.type, enabled=False):
        statistic.add(x, mask)
    statistic.samples += len(x)
    statistic.tokens += int(mask.sum())


def _arranged(x: Tensor, mask: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    """x as (B, N, C) and its mask (B, N)."""
    if mask is None or x.shape[:-1] == mask.shape[:1]:  # no tokens, or one vector for each sample
        x = x.reshape(len(x), -1, x.shape[-1])
        return x, x.new_ones(x.shape[:-1], dtype=torch.bool)
    if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise WorkError(
            f"calibration: {where} is fed {tuple(x.shape)}, which does not fit the token mask {tuple(mask.shape)}"
        )
    return x.reshape(*mask.shape, x.shape[-1]), mask.to(x.device, torch.bool)
