"""Composable sparse fine-tuning, LT-SFT: a language or a task as a sparse change of the weights (Ansell et al., 2022).

Several add up: ``activate("language", "task")`` is ``theta + phi_language + phi_task``. A task is trained on top of a
language by adding it while the language is in force and its parameters are frozen, once it is saved
(``bank["language"].requires_grad_(False)``), and serves another one by activating that in its place.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from shared import sparse_diff
from shared.adapter import WeightAdapter
from shared.errors import RequestError, WorkError
from shared.method import Method
from shared.sites import Site, Sites, every_parameter
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


class SparseDelta(WeightAdapter):
    """``weight + value`` where the mask is true; elsewhere the weight, bit for bit, and no gradient."""

    value_mask: Tensor

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))
        self.register_buffer("value_mask", torch.ones(shape, dtype=torch.bool))

    def delta(self, weight: Tensor) -> Tensor:
        return torch.where(self.value_mask, self.value, 0)


@dataclass(frozen=True, kw_only=True)
class ComposableSFT(Method):
    """Fine-tune everything, keep the entries that changed most, go back, and train those alone; the identity at first.

    The full phase happens in ``prepare``, with an AdamW without weight decay whose rate falls linearly to zero; then
    values and head are what they were, the masks (buffers) say which entries train, and the trainer's own run is
    the sparse phase, with a fresh optimiser. Its weight decay should be 0. Published runs select once, as this does.
    The frozen model stays in eval mode: its own dropout is off.

    count: entries that are kept, K (published: 7,667,712 for a language, 14,155,776 for a task), or share: of all.
    epochs: of the full phase, at least ``min_steps`` and at most ``max_steps`` optimiser steps.
    learning_rate: its peak.  clip: greatest gradient norm in it, None: any.
    full_l1, sparse_l1: weight of the mean absolute change, over all parameters of the model, in either phase
    (published: 0.1 for a language, 0 for a task).
    frozen: roles, or paths below the model, that stay as they are (published: norms, output embedding).
    """

    record: ClassVar[Record] = Record(
        categories=("selective/unstructured",), acts_on="weights", form="in place", mergeable="yes", trains="size",
        needs="labels", spec="composable_sft",
        why="the formula counts whole tensors, as in the full phase; count of their entries train in the sparse one",
    )  # fmt: skip

    count: int | None = None
    share: float = 0.01
    epochs: float = 3
    min_steps: int = 1
    max_steps: int | None = None
    learning_rate: float = 5e-5
    clip: float | None = 1.0
    full_l1: float = 0.0
    sparse_l1: float = 0.0
    frozen: Sequence[str] = ("norm", "lm_head")

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise RequestError(f"ComposableSFT count {self.count}: keep at least 1 entry")
        if not 0 < self.share <= 1:
            raise RequestError(f"ComposableSFT share {self.share:g}: use a share above 0, at most 1")
        if not 0 < self.epochs < math.inf or not 0 < self.learning_rate < math.inf:
            raise RequestError("ComposableSFT: epochs and learning_rate of the full phase are numbers above 0")
        if self.min_steps < 1 or (self.max_steps is not None and self.max_steps < self.min_steps):
            raise RequestError(
                f"ComposableSFT min_steps {self.min_steps}, max_steps {self.max_steps}: use 1 <= min <= max"
            )
        if self.full_l1 < 0 or self.sparse_l1 < 0 or (self.clip is not None and self.clip <= 0):
            raise RequestError("ComposableSFT: full_l1 and sparse_l1 may not be negative, clip must be above 0")

    def sites(self, sites: Sites) -> Sites:
        def stays(site: Site) -> bool:
            return site.role in self.frozen or any(f"{site.path}.".startswith(f"{name}.") for name in self.frozen)

        return Sites([site for site in every_parameter(sites) if not stays(site)], sites.owner)

    def build_all(self, sites: Sites) -> dict[str, SparseDelta]:
        self._kept(sum(site.weight.numel() for site in sites))
        return {site.key: SparseDelta(site.weight.shape) for site in sites}

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        deltas: list[SparseDelta] = list(model.bank[name].values())  # type: ignore[arg-type,operator]
        before = {} if model.head is None else {n: t.detach().clone() for n, t in model.head.state_dict().items()}
        training = model.training
        model.train()
        try:
            self._full_phase(model, name, batches, loss)
            kept = select([d.value.detach() for d in deltas], self._kept(sum(d.value.numel() for d in deltas)))
            with torch.no_grad():
                for delta, mask in zip(deltas, kept, strict=True):
                    delta.value_mask.copy_(mask)
        finally:
            model.train(training)
            with torch.no_grad():
                for delta in deltas:
                    delta.value.zero_()
            if model.head is not None:
                model.head.load_state_dict(before)

    def loss(self, task: Any, batch: Any) -> Tensor:
        """With the L1 term of the sparse phase."""
        model = task.model
        loss = task.loss(batch)
        return loss + self.sparse_l1 * change(model, model.active[-1]) if self.sparse_l1 else loss

    def _kept(self, total: int) -> int:
        count = max(int(self.share * total), 1) if self.count is None else self.count
        if count > total:
            raise RequestError(f"ComposableSFT count {count}: the model has {total} entries to choose from")
        return count

    def _full_phase(self, model: Adapted, name: str, batches: Iterable[Any], loss: Any) -> None:
        head = () if model.head is None else model.head.parameters()
        moving = [p for p in (*model.bank[name].parameters(), *head) if p.requires_grad]
        total = self._steps(batches)
        optimiser = torch.optim.AdamW(moving, lr=self.learning_rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
        for step, batch in enumerate(itertools.islice(_again(batches), total)):
            value = loss(batch) + (self.full_l1 * change(model, name) if self.full_l1 else 0)
            if not value.isfinite():
                raise WorkError(f"ComposableSFT: the loss of the full phase is {value.item()} at step {step}")
            for parameter, gradient in zip(moving, torch.autograd.grad(value, moving, allow_unused=True), strict=True):
                parameter.grad = gradient
            if self.clip is not None:
                nn.utils.clip_grad_norm_(moving, self.clip)
            optimiser.step()
            falling.step()
        optimiser.zero_grad()

    def _steps(self, batches: Iterable[Any]) -> int:
        count = len(batches) if hasattr(batches, "__len__") else sum(1 for _ in batches)  # type: ignore[arg-type]
        if not count:
            raise RequestError("ComposableSFT learns its selection from batches: there is none")
        steps = max(math.ceil(self.epochs * count), self.min_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def select(changes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest absolute changes of all tensors together; those equal to the last are kept too."""
    flat = torch.cat([change.abs().flatten() for change in changes])
    limit = flat.kthvalue(flat.numel() - count + 1).values
    if not limit > 0:
        moved = int(flat.count_nonzero())
        raise WorkError(f"ComposableSFT: the full phase moved {moved} entries, fewer than the {count} to keep")
    return [change.abs() >= limit for change in changes]


def change(model: Adapted, name: str) -> Tensor:
    """The absolute changes of one sparse fine-tuning, summed, over the number of parameters of backbone and head."""
    deltas: Any = model.bank[name]
    total = sum(p.numel() for part in (model.backbone, model.head) if part is not None for p in part.parameters())
    return torch.stack([delta.delta(delta.value).abs().sum() for delta in deltas.values()]).sum() / total


# -- the published files -----------------------------------------------------------------------------------------------


def load_official(model: Adapted, path: str | os.PathLike, *, name: str = "default", with_head: bool = True) -> None:
    """Add a published sparse fine-tuning (``pytorch_diff.bin``, or its folder) as adapter ``name``, in force then.

    with_head: also set the head to the file's whole tensors. Leave a language's: they are of its own task.

    Raises RequestError where a tensor of the file has no place in the model, or another shape there; the model is
    unchanged then.
    """
    diffs, whole = sparse_diff.read(path)
    method = ComposableSFT(count=max(sum(int(d.count_nonzero()) for d in diffs.values()), 1))
    shapes = {_own(site): site.weight.shape for site in method.sites(model.sites())}
    placed = {_place(theirs, diff, shapes, f"{path}: {theirs}"): diff for theirs, diff in diffs.items()}
    mine = dict(model.head.named_parameters()) if with_head and model.head is not None else {}
    head = {_place_in_head(n, t, mine, f"{path}: {n}"): t for n, t in whole.items()} if with_head else {}
    model.add(method, name=name)
    bank: Any = model.bank[name]
    with torch.no_grad():
        for site in method.sites(model.sites()):
            delta, diff = bank[site.key], placed.get(_own(site))
            delta.value_mask.copy_(torch.zeros_like(delta.value_mask) if diff is None else diff != 0)
            delta.value.copy_(torch.zeros_like(delta.value) if diff is None else diff)
        for own, tensor in head.items():
            mine[own].copy_(tensor)
    model.prepared.add(name)


def save_official(model: Adapted, path: str | os.PathLike, *, name: str = "default", prefix: str = "") -> None:
    """Write a sparse fine-tuning as the published code reads it, with the head, if there is one, as whole tensors.

    prefix: of the names there, in place of our "model." ("bert.", "roberta."); those of the head are its own.
    """
    method = model.methods.get(name)
    if not isinstance(method, ComposableSFT):
        raise RequestError(f"save_official: no ComposableSFT is called {name!r}; loaded: {', '.join(model.methods)}")
    bank: Any = model.bank[name]
    found: dict[str, SparseDelta] = {_own(s): bank[s.key] for s in method.sites(model.sites())}
    diffs = {prefix + own.removeprefix("model."): delta.delta(delta.value) for own, delta in found.items()}
    sparse_diff.write(path, diffs, dict(model.head.named_parameters()) if model.head is not None else {})


def _own(site: Site) -> str:
    return f"{site.path}.{site.parameter}".lstrip(".")


def _place(name: str, tensor: Tensor, shapes: Mapping[str, torch.Size], where: str) -> str:
    """Our parameter for a published name: the one that ends like it, the library's own prefix apart."""
    for tail in (name, name.partition(".")[2]):
        found = [own for own in shapes if tail and f".{own}".endswith(f".{tail}")]
        if len(found) == 1:
            if shapes[found[0]] != tensor.shape:
                raise RequestError(
                    f"{where}: shape {tuple(tensor.shape)} where the model has {tuple(shapes[found[0]])}"
                )
            return found[0]
    raise RequestError(f"{where}: the model has no such parameter to change")


def _place_in_head(name: str, tensor: Tensor, mine: Mapping[str, Tensor], where: str) -> str:
    """The head's parameter for one of the file: of the same last name and shape."""
    last = name.rpartition(".")[2]
    found = [own for own, t in mine.items() if own.rpartition(".")[2] == last and t.shape == tensor.shape]
    if len(found) != 1:
        raise RequestError(
            f"{where} {tuple(tensor.shape)}: the head has no one place for it; with_head=False leaves it"
        )
    return found[0]
