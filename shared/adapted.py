"""The adapted model: a frozen backbone, the bank of its adapters, and an optional head."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared import attaching, half, store, trained
from shared.backbone import Backbone, fingerprint
from shared.context import Context
from shared.dropping import draw, drop
from shared.errors import RequestError
from shared.host import Port
from shared.memory import Saving
from shared.merge import merge, unmerge
from shared.method import Method
from shared.recompute import keeping
from shared.rows import run_by_rows
from shared.sites import Sites, describe
from shared.state import State

if TYPE_CHECKING:
    from shared.cache import FrozenPrefix


def adapt(
    backbone: nn.Module,
    method: Method,
    *,
    head: nn.Module | None = None,
    name: str = "default",
    sites: Sites | None = None,
    example: Sequence[Any] | None = None,
) -> Adapted:
    """Freeze ``backbone``, attach ``method`` to its sites under ``name``, and give the model to train.

    sites: described places where the backbone is no ``Backbone``; read from the module types if not given.
    example: positional inputs for the proof of effect (see ``shared.proof``); a ``Backbone`` brings its own.

    Raises RequestError where the method finds no site, and WorkError where an adapter has no effect on the output.
    """
    model = Adapted(backbone, head=head, sites=sites)
    model.add(method, name=name, example=example)
    return model


class Adapted(nn.Module):
    """A backbone with named adapters. Calling it is calling the backbone, then the head where there is one.

    How the backbone's activations are kept for backward, with any method: ``saving``, as codes (``shared.memory``);
    ``recompute``, computed again block by block, and ``offload``, in main memory (``shared.recompute``).  ``cache``
    (``shared.cache``): where what is frozen below the lowest adapter is kept, so that it runs once for each image. A
    compiled model keeps what its compiler chooses, and does without a cache.
    The backbone is changed in place (its hosts know their adapters) and restored bit for bit by ``remove``; its
    state-dict keys stay as they were. Frozen means frozen: it stays in eval mode while adapters and head train, unless
    the method trains it.
    """

    def __init__(self, backbone: nn.Module, *, head: nn.Module | None = None, sites: Sites | None = None):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.bank = attaching.Bank()
        self.methods: dict[str, Method] = {}
        self.prepared: set[str] = set()
        self.state = State()
        self.context: Context = backbone.context if isinstance(backbone, Backbone) else Context()
        if isinstance(getattr(head, "context", None), Context):
            head.context = self.context  # type: ignore[union-attr]
        self.saving: Saving | None = None
        self.recompute = self.offload = False
        self.cache: FrozenPrefix | None = None
        self._sites = sites
        self._fingerprint: str | None = None
        self._frozen = {n: p.requires_grad for n, p in backbone.named_parameters()}
        backbone.requires_grad_(False)
        backbone.eval()

    # -- attaching -------------------------------------------------------------------------------------------------

    def sites(self) -> Sites:
        """The places of the backbone where adapters may go."""
        if self._sites is not None:
            return self._sites
        return self.backbone.sites() if isinstance(self.backbone, Backbone) else describe(self.backbone)

    def add(self, method: Method, *, name: str = "default", example: Sequence[Any] | None = None) -> None:
        """Attach one more adapter and make it the active one; the model is unchanged where any step of it fails."""
        attaching.add(self, method, name, example)

    def remove(self, name: str = "default") -> None:
        """Take an adapter off; the last one gone, the backbone is bit for bit what it was."""
        attaching.remove(self, name)

    def hosts(self) -> dict[str, Port]:
        """The ports of the backbone's hosts, by module path."""
        return {path: m.__dict__["_port"] for path, m in self.backbone.named_modules() if "_port" in m.__dict__}

    # -- switching -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in force."""
        return tuple(name for name, _ in self.state.active)

    def activate(self, *names: str, strength: float | Mapping[str, float] = 1.0) -> None:
        """Put these adapters in force, in this order (none: the bare model); constant time whatever is loaded."""
        self.known(*names)
        if isinstance(strength, Mapping):
            self.state.active = tuple((name, float(strength.get(name, 1.0))) for name in names)
        else:
            self.state.active = tuple((name, float(strength)) for name in names)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model within a ``with`` block, merged or not."""
        before, self.state.active = self.state.active, ()
        try:
            yield
        finally:
            self.state.active = before

    def drop(self, lowest: int, *, drawn: int = 0) -> None:
        """AdapterDrop: from now on the active adapters of the ``lowest`` blocks rest, in training and in inference.

        So those blocks are the frozen ones, and no gradient enters them. In training mode, a number of them from 0 to
        ``drawn`` is drawn with each ``step``, and at least that many rest until the next. 0 ends either.

        Raises RequestError where an active adapter acts in none of these blocks, in no other one, or across blocks.
        """
        drop(self, lowest, drawn)
        if not self.training:
            self.fold()

    def known(self, *names: str) -> None:
        """Raises RequestError where an adapter is not loaded."""
        for name in names:
            if name not in self.methods:
                raise RequestError(f"no adapter {name!r}; loaded: {', '.join(self.methods) or 'none'}")

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        adapters: Sequence[str | None] | None = None,
        context: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the backbone and the head.

        adapters: one adapter name (or None) for each sample of the batch, in place of the active ones; in one forward
        where ``shared.rows`` can.
        context: named values for this call's adapters, and for a head that has a ``context``. The head gets the
        backbone's output and the spatial size of the first input.
        """
        if adapters is not None:
            return run_by_rows(self, adapters, args, {**kwargs, "context": context})
        try:
            self.context.__dict__.update(context or {})
            if self.cache is not None and self.state.rows is None and not torch.compiler.is_compiling():
                self.context.cached = self.cache
            with half.computing(self), keeping(self):
                output = self.backbone(*args, **kwargs)
            output = output if self.state.half is None else half.full(output)
            return output if self.head is None else self.head(output, tuple(args[0].shape[2:]))
        finally:
            self.context.clear()

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if not any(method.trains_backbone for method in self.methods.values()):
            self.backbone.eval()
        self.state.folds.clear()
        return self if mode else self.fold()

    def fold(self) -> Adapted:
        """Fold the active adapters now, as ``eval`` does, so that the next call without gradients is a fast one.

        Inference folds by itself: adapters switched to run beside their layers until that has cost what folding does
        (a few samples), and the folds of those used last are kept (``shared.folds``). Frozen weights never change.
        """
        state = self.state
        whole = all(type(p) is nn.Parameter for p in self.bank.parameters())  # not divided among processes
        if whole and state.form == "auto" and state.active != state.merged:
            state.folds.earn()
            with torch.no_grad():
                for path, port in self.hosts().items():
                    host = self.backbone.get_submodule(path)
                    for parameter in port.on:
                        port.read(host, parameter)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.state.folds.clear()  # of tensors that now move or change their type
        super()._apply(*args, **kwargs)
        return self if self.training else self.fold()

    # -- training --------------------------------------------------------------------------------------------------

    def unprepared(self) -> list[str]:
        """Active adapters that start from data and were neither prepared nor loaded."""
        return [name for name in self.active if self.methods[name].starts_from_data() and name not in self.prepared]

    def prepare(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Let the active methods that start from data see them (see ``Method.prepare``); each only once."""
        cache, self.cache = self.cache, None  # what it measures may lie anywhere
        try:
            for name in self.unprepared():
                self.methods[name].prepare(self, name, batches, loss)
                self.prepared.add(name)
        finally:
            self.cache = cache

    def step(self, number: int, seed: int = 0) -> None:
        """Tell the active methods which training step comes next; ``seed`` is the run's."""
        generator = torch.Generator().manual_seed(hash((seed, number)) & 0xFFFF_FFFF_FFFF)
        if self.state.most:
            self.state.drawn = draw(self.state.most, number, seed)
            self.state.folds.clear()
        for name in self.active:
            self.methods[name].step(self.bank[name], number, generator)  # type: ignore[arg-type]

    def loss(self, task: Any, batch: Any) -> Tensor:
        """The task's training loss of a batch, as the active method wants it computed."""
        return self.methods[self.active[-1]].loss(task, batch) if self.active else task.loss(batch)

    def penalty(self) -> Tensor:
        """The sum of the active methods' extra losses; 0 where there are none."""
        losses = [self.methods[name].penalty(self.bank[name]) for name in self.active]  # type: ignore[arg-type]
        anchor = next(self.parameters())
        return sum((loss for loss in losses if loss is not None), torch.zeros((), device=anchor.device))

    # -- merging ---------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Write the active adapters into the stored weights; ``unmerge`` restores them bit for bit.

        Raises RequestError where one acts on activations and has no merged form.
        """
        merge(self)

    def unmerge(self) -> None:
        """Put the frozen weights back from their copies."""
        unmerge(self)

    # -- what trains -----------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Exactly what trains: ``adapter.<name>.<site>.<tensor>``, ``head.<tensor>``, ``backbone.<tensor>``.

        Raises RequestError where an active adapter starts from data and was not prepared.
        """
        if waiting := self.unprepared():
            raise RequestError(
                f"adapter {waiting[0]!r} ({type(self.methods[waiting[0]]).__name__}) starts from data: call "
                "prepare(batches, loss) before training it"
            )
        return trained.parameters(self)

    def groups(self) -> list[dict[str, Any]]:
        """The trainable parameters by role, for an optimiser: dictionaries with ``role``, ``names`` and ``params``."""
        return trained.groups(self)

    def count(self) -> dict[str, int]:
        """Numbers of parameters: trainable, of them adapter and head, and frozen."""
        return trained.count(self)

    def trained_state(self) -> dict[str, Tensor]:
        """Trained tensors and the buffers of active adapters and head, by the names of ``trainable``."""
        return trained.state(self)

    def load_trained_state(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Copy tensors in; every name and shape must fit, and nothing is changed where one does not."""
        trained.load(self, state, source)
        self.prepared |= set(self.active)
        if not self.training:
            self.fold()

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def backbone_name(self) -> str:
        return self.backbone.name if isinstance(self.backbone, Backbone) else type(self.backbone).__name__

    @property
    def dtype(self) -> torch.dtype:
        """What inputs come in: the precision of the weights, and float32 where some are stored in half of it."""
        return torch.float32 if self.state.half is not None else next(self.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        """A hash of the frozen weights, taken once."""
        if self._fingerprint is None:
            if self.state.merged:
                raise RequestError("the weights are merged; unmerge() before saving or loading")
            self._fingerprint = fingerprint(self.backbone)
        return self._fingerprint

    def save(
        self,
        path: str | os.PathLike,
        *,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the active adapter and the head to one adapter file, with metrics and further JSON-able facts."""
        store.save_adapter(self, path, metrics or {}, extra or {})

    def load(self, path: str | os.PathLike, *, other_backbone: bool = False, head: bool = True) -> dict[str, Any]:
        """Fill the active adapter and the head from a file or ``hf://owner/name``, strictly, and return its header.

        head: whether the file's head is taken too; if not, the model's own stays as it is.

        Raises RequestError where the file is for another backbone (unless asked for), another method, or does not fit.
        """
        return store.load_adapter(self, path, other_backbone, head)


def trainable(model: Adapted) -> dict[str, nn.Parameter]:
    """Exactly what trains in an adapted model, by name."""
    return model.trainable()
