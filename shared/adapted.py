"""The adapted model: a frozen backbone, the bank of its adapters, and an optional head."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared import store, trained
from shared.backbone import Backbone, fingerprint
from shared.context import Context
from shared.errors import RequestError
from shared.host import Port, State, attach, detach
from shared.memory import Saving, compressed
from shared.merge import merge, unmerge
from shared.method import Method, check_choices
from shared.proof import prove
from shared.rows import run_by_rows
from shared.sites import Sites, describe

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


class Bank(nn.ModuleDict):
    """Modules by name, where any name without a dot will do ("forward", "type", "lora")."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Adapted(nn.Module):
    """A backbone with named adapters. Calling it is calling the backbone, then the head where there is one.

    ``saving`` (``shared.memory``): how the backbone's activations are kept for backward, with any method; a compiled
    model keeps what its compiler chooses. ``cache`` (``shared.cache``): where what is frozen below the lowest adapter
    is kept, so that it runs once for each image; a compiled model does without.
    The backbone is changed in place (its hosts know their adapters) and restored bit for bit by ``remove``; its
    state-dict keys stay as they were. Frozen means frozen: it stays in eval mode while adapters and head train, unless
    the method trains it.
    """

    def __init__(self, backbone: nn.Module, *, head: nn.Module | None = None, sites: Sites | None = None):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.bank = Bank()
        self.methods: dict[str, Method] = {}
        self.prepared: set[str] = set()
        self.state = State()
        self.context: Context = backbone.context if isinstance(backbone, Backbone) else Context()
        self.saving: Saving | None = None
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
        if not name or "." in name or name in self.methods:
            raise RequestError(
                f"adapter name {name!r}: " + ("it is taken" if name in self.methods else "use a name without dots")
            )
        if self.state.merged:
            raise RequestError("adapters are merged into the weights; unmerge() before adding another")
        check_choices(method)
        self._forget()
        chosen = method.sites(self.sites())
        if chosen is not None and not len(chosen):
            raise RequestError(f"{type(method).__name__} attaches to zero sites of {self.backbone_name}")
        modules = self._build(method, chosen)
        before, known = self.state.active, tuple(self.methods)
        if not known:  # the last one that was removed left the backbone as it had come
            self.backbone.requires_grad_(False)
        try:
            method.connect(self, modules)
            self.bank[name] = Bank(modules)
            self.methods[name] = method
            for site in chosen or ():
                attach(site, modules[site.key], name, self.state)
            self.activate(name)
            if example is None and modules and isinstance(self.backbone, Backbone):
                example = self.backbone.example()
            if example is not None and modules:
                prove(self, name, example)
                for port in self.hosts().values():
                    port.folded.clear()  # copies of whole weights, made only for the proof
        except Exception:
            for added in [n for n in self.methods if n not in known][::-1]:
                self.remove(added)
            self.state.active = before
            raise
        if method.trains_backbone:
            self.fingerprint  # noqa: B018  of the weights before they train
            self.backbone.requires_grad_(True)
            self.train(self.training)

    def _build(self, method: Method, chosen: Sites | None) -> dict[str, Any]:
        if chosen is None:
            return {}
        device = next((s.module._parameters[s.parameter].device for s in chosen if s.parameter), None)  # type: ignore[union-attr,index]
        device = device or next((p.device for p in self.backbone.parameters()), torch.device("cpu"))
        with torch.device(device):
            modules = method.build_all(chosen)
        if set(modules) != {site.key for site in chosen}:
            raise RequestError(f"{type(method).__name__} built {len(modules)} modules for {len(chosen)} sites")
        for module in modules.values():
            module.context = self.context
        return modules

    def remove(self, name: str = "default") -> None:
        """Take an adapter off; the last one gone, the backbone is bit for bit what it was."""
        self._known(name)
        if users := [user for user, method in self.methods.items() if name in method.uses]:
            raise RequestError(f"adapter {name!r} is in use: {users[0]!r} works through it; remove that one first")
        self.unmerge()
        self._forget()
        for host in self.backbone.modules():
            if "_port" in host.__dict__:
                detach(host, name)
        del self.bank[name], self.methods[name]
        self.prepared.discard(name)
        self.state.active = tuple(pair for pair in self.state.active if pair[0] != name)
        if not self.methods:
            for parameter_name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_(self._frozen.get(parameter_name, True))

    def _forget(self) -> None:
        if self.cache is not None:
            self.cache.forget()

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
        for name in names:
            self._known(name)
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

    def _known(self, name: str) -> None:
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

        adapters: one adapter name (or None) for each sample of the batch, in place of the active ones.
        context: named values for this call's adapters. The head gets the backbone's output and the spatial size of
        the first input.
        """
        if adapters is not None:
            return run_by_rows(self, adapters, args, {**kwargs, "context": context})
        try:
            self.context.__dict__.update(context or {})
            if self.cache is not None and not torch.compiler.is_compiling():
                self.context.cached = self.cache
            with self._saving():
                output = self.backbone(*args, **kwargs)
            return output if self.head is None else self.head(output, tuple(args[0].shape[2:]))
        finally:
            self.context.clear()

    def _saving(self) -> contextlib.AbstractContextManager[Any]:
        """How activations of the backbone are kept for backward: as the model says, else as an active method does.

        A compiled model is left to its compiler, which plans by itself what to keep.
        """
        if torch.compiler.is_compiling():
            return contextlib.nullcontext()
        wanted = [self.saving, *(self.methods[name].saving() for name in self.active)]
        return next((compressed(each) for each in wanted if each is not None), contextlib.nullcontext())

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if not any(method.trains_backbone for method in self.methods.values()):
            self.backbone.eval()
        return self

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

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def backbone_name(self) -> str:
        return self.backbone.name if isinstance(self.backbone, Backbone) else type(self.backbone).__name__

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
