"""VL-Adapter: bottlenecks after both sub-layers, kept apart, half shared or shared among tasks (Sung et al., 2021).

Its Compacter and Hyperformer are methods of their own; a LoRA or a prompt for each task is an adapter for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from shared.blocks.bottleneck import Bottleneck, reduced
from shared.blocks.placement import sublayers
from shared.blocks.tasks import ALL, AfterByTask, check_further, check_tasks, freeze, start_from
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


@dataclass(frozen=True, kw_only=True)
class VLAdapter(Method):
    """``y + up(gelu(down(y)))`` on what each sub-layer adds to the stream; GELU in its tanh form.

    A call names its task: ``model(..., context={"task": "vqa"})``.
    share: what all tasks have in common: "all" (published: one adapter, which needs no ``tasks``), "down" or "up"
    (half-shared: that projection), "none" (an adapter a task).  tasks: their names.
    further: tasks added to those of ``earlier``, the adapter file of a run on ``tasks``: all that the tasks have, heads
    included, is taken from it and stays frozen, so their outputs stay bit for bit what they were.
    reduction: width over channels inside (published: 8).  activation: see ``Bottleneck``.
    start: "normal" (published: deviation 0.02, nearly the identity) or "zero" (up starts at zero: the identity).
    norm_before, norm_after: layer norms of the branch's input and output, shared by all tasks (published: neither).
    track_z: weight of an extra loss, the mean over adapters of the mean square of what their bottleneck holds after its
    activation (published code's ``--track_z``: 0.001; its scripts leave it out: 0).
    sublayers: which.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter", "additive/multi-task"), acts_on="activations", form="sequential",
        mergeable="no", spec="vl_adapter",
        trains="site.width // reduction * (site.width + 1) * (len(further or tasks) if share in ('none', 'up')"
        " else not further) + (site.width // reduction + 1) * site.width * (len(further or tasks)"
        " if share in ('none', 'down') else not further) + 2 * site.width * (norm_before + norm_after) * (not further)",
    )  # fmt: skip

    share: Literal["all", "down", "up", "none"] = "all"
    tasks: Sequence[str] = ()
    further: Sequence[str] = ()
    earlier: Path | None = None
    reduction: int = 8
    activation: str = "gelu_tanh"
    start: Literal["normal", "zero"] = "normal"
    norm_before: bool = False
    norm_after: bool = False
    track_z: float = 0.0
    sublayers: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.share not in ("all", "down", "up", "none"):
            raise RequestError(f"VLAdapter share {self.share!r}: use all, down, up or none")
        if self.share != "all" or self.tasks:
            check_tasks("VLAdapter", (*self.tasks, *self.further))
        check_further("VLAdapter", self.tasks, self.further, self.earlier)
        if self.further and self.share == "all":
            raise RequestError("VLAdapter share 'all': a further task has nothing of its own; use down, up or none")
        if not 0 <= self.track_z < float("inf"):
            raise RequestError(f"VLAdapter track_z {self.track_z}: use a weight of at least 0")

    def sites(self, sites: Sites) -> Sites:
        return sublayers(sites, self.depth, tuple(self.sublayers))

    def example(self) -> dict[str, Any]:
        return {"task": [*self.tasks, *self.further][-1]} if self.tasks else {}

    def build(self, site: Site) -> AfterByTask:
        branches: dict[str, Bottleneck] = {}
        for task in (*self.tasks, *self.further) if self.share != "all" else (ALL,):
            branches[task] = branch = Bottleneck(
                site.width, site.width, reduced(site.width, self.reduction, site.key), activation=self.activation,
                start=self.start, where=site.key,
            )  # fmt: skip
            first = next(iter(branches.values()))
            if self.share == "down":
                branch.down = first.down
            elif self.share == "up":
                branch.up = first.up
        norms = [nn.LayerNorm(site.width) if wanted else None for wanted in (self.norm_before, self.norm_after)]
        return AfterByTask(branches, *norms, axis=site.axis)

    def connect(self, model: Adapted, modules: Mapping[str, nn.Module]) -> None:
        freeze(nn.ModuleList(modules.values()), self.further)
        freeze(model.head, self.further)

    def starts_from_data(self) -> bool:
        return bool(self.further)

    def prepare(self, model: Adapted, name: str, batches: Any, loss: Any) -> None:
        if self.earlier is not None:
            start_from(model, name, self, self.earlier)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"earlier": self.earlier and str(self.earlier)}

    def step(self, adapters: Mapping[str, Any], number: int, generator: Generator) -> None:
        if self.track_z:
            for adapter in adapters.values():
                adapter.squares = []

    def penalty(self, adapters: Mapping[str, Any]) -> Tensor | None:
        """``track_z`` times the mean over the adapters that ran since ``step``."""
        if not self.track_z:
            return None
        squares = [square for adapter in adapters.values() for square in adapter.squares or ()]
        if not squares:
            raise RequestError("VLAdapter's track_z is of one training step: call step() before its forward pass")
        for adapter in adapters.values():
            adapter.squares = None
        return self.track_z * torch.stack(squares).mean()
