"""Methods: a published way to adapt, as where it acts and what it puts there."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

from torch import Generator, Tensor, nn

from shared.adapter import Adapter, WeightAdapter
from shared.errors import RequestError
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted
    from shared.memory import Saving


@dataclass(frozen=True, kw_only=True)
class Method:
    """The life of a method; a subclass is a frozen dataclass whose fields are its whole configuration.

    Only ``sites`` and ``build`` (or ``build_all``) are needed. ``adapters`` below are the modules of one attached
    adapter, by site key.
    """

    trains_backbone: ClassVar[bool] = False
    record: ClassVar[Record]

    def sites(self, sites: Sites) -> Sites | None:
        """Where to act; None says "nowhere, on purpose" (an empty selection is an error)."""
        raise NotImplementedError(f"{type(self).__name__} selects no sites")

    def build(self, site: Site) -> Adapter | WeightAdapter:
        """The module for one site."""
        raise NotImplementedError(f"{type(self).__name__} builds nothing")

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        """The modules of all sites by key; override it where sites share modules or depend on their order."""
        return {site.key: self.build(site) for site in sites}

    def connect(self, model: Adapted, modules: Mapping[str, nn.Module]) -> None:
        """Called once the modules are built, before they act: takes what they need of the model's other adapters.

        Those of ``uses`` that are not there it may add; they are taken off again where attaching fails.
        """

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of other adapters of the model that this one works through: they cannot be removed before it."""
        return ()

    def digests(self, model: Adapted) -> dict[str, str]:
        """What those of ``uses`` are, by name: a file records it and is refused where they are others."""
        return {}

    @property
    def by_block(self) -> bool:
        """Whether the adapters of a block do without those of the blocks below, so that these can be dropped."""
        return True

    def example(self) -> dict[str, Any]:
        """What the proof of effect tells the adapters, where a call has to (such as its task)."""
        return {}

    def starts_from_data(self) -> bool:
        """Whether ``prepare`` must have been called before training."""
        return type(self).prepare is not Method.prepare

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Called once before training, where an adapter starts from data: statistics, scores, a phase of its own.

        batches: training batches, iterable more than once.  loss: the task's loss of a batch. What it finds out lives
        in the parameters and buffers of the adapters, made in ``build`` with their final shapes.
        """

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        """Called before each training step, for schedules and for what is drawn once a step.

        generator: seeded by the run and the step's number, alike in every process.
        """

    def loss(self, task: Any, batch: Any) -> Tensor:
        """The training loss of a batch; a method that trains on more than one pass runs ``task.outputs`` itself."""
        return task.loss(batch)

    def penalty(self, adapters: Mapping[str, nn.Module]) -> Tensor | None:
        """An extra loss of the step, or None."""

    def saving(self) -> Saving | None:
        """How it keeps the backbone's activations for backward; None: as torch does."""

    def arguments(self) -> dict[str, Any]:
        """The configuration, JSON-able: what an adapter file records."""
        return dataclasses.asdict(self)


def check_choices(method: Method) -> None:
    """Raises RequestError where a setting that takes one of a few words (a ``Literal``) has another."""
    closed = [field.name for field in dataclasses.fields(method) if "Literal" in str(field.type)]
    hints = typing.get_type_hints(type(method)) if closed else {}
    for name in closed:
        value, hint = getattr(method, name), hints[name]
        many = typing.get_origin(hint) is Sequence
        inner = typing.get_args(hint)[0] if many else hint
        options = typing.get_args(inner) if typing.get_origin(inner) in (Union, UnionType) else (inner,)
        words = [word for o in options if typing.get_origin(o) is Literal for word in typing.get_args(o)]
        for one in value if many else (value,):
            if isinstance(one, str) and one not in words:
                number = "a number or " if {int, float} & set(options) else ""
                have = ", ".join(map(str, words))
                raise RequestError(f"{type(method).__name__} {name} {one!r}: use {number}{have}")
