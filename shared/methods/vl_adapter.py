"""VL-Adapter: bottlenecks after both sub-layers, kept apart, half shared or shared among tasks (Sung et al., 2021).

Its Compacter and Hyperformer are methods of their own; a LoRA or a prompt for each task is an adapter for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from shared.blocks.bottleneck import Bottleneck, reduced
from shared.blocks.placement import sublayers
from shared.blocks.tasks import ALL, AfterByTask, check_tasks
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class VLAdapter(Method):
    """``y + up(gelu(down(y)))`` on what each sub-layer adds to the stream; GELU in its tanh form.

    A call names its task: ``model(..., context={"task": "vqa"})``.
    share: what all tasks have in common: "all" (published: one adapter, which needs no ``tasks``), "down" or "up"
    (half-shared: that projection), "none" (an adapter a task).  tasks: their names.
    reduction: width over channels inside (published: 8).  activation: see ``Bottleneck``.
    start: "normal" (published: deviation 0.02, nearly the identity) or "zero" (up starts at zero: the identity).
    norm_before, norm_after: layer norms of the branch's input and output, shared by all tasks (published: neither).
    sublayers: which.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter", "additive/multi-task"), acts_on="activations", form="sequential",
        mergeable="no", spec="vl_adapter",
        trains="site.width // reduction * (site.width + 1) * (len(tasks) if share in ('none', 'up') else 1)"
        " + (site.width // reduction + 1) * site.width * (len(tasks) if share in ('none', 'down') else 1)"
        " + 2 * site.width * (norm_before + norm_after)",
    )  # fmt: skip

    share: Literal["all", "down", "up", "none"] = "all"
    tasks: Sequence[str] = ()
    reduction: int = 8
    activation: str = "gelu_tanh"
    start: Literal["normal", "zero"] = "normal"
    norm_before: bool = False
    norm_after: bool = False
    sublayers: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp")
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.share not in ("all", "down", "up", "none"):
            raise RequestError(f"VLAdapter share {self.share!r}: use all, down, up or none")
        if self.share != "all" or self.tasks:
            check_tasks("VLAdapter", self.tasks)

    def sites(self, sites: Sites) -> Sites:
        return sublayers(sites, self.depth, tuple(self.sublayers))

    def example(self) -> dict[str, Any]:
        return {"task": self.tasks[0]} if self.tasks else {}

    def build(self, site: Site) -> AfterByTask:
        branches: dict[str, Bottleneck] = {}
        for task in self.tasks if self.share != "all" else (ALL,):
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
        return AfterByTask(branches, *norms)
