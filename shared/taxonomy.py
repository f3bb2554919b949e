"""Where a method stands on the map of the field, as plain data that is read without importing the method.

Families and categories are those of the survey of Han et al. (2024), with four of ours where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import RequestError

CATEGORIES = (
    "additive/adapter", "additive/multi-task", "additive/soft prompt", "additive/prompt speed-up", "additive/other",
    "selective/unstructured", "selective/structured",
    "reparameterised/low-rank", "reparameterised/dynamic rank", "reparameterised/LoRA improvement",
    "reparameterised/multiple LoRA",
    "hybrid",
    "efficient/pruning", "efficient/quantisation", "efficient/memory",
    "system/serving", "system/off-site", "system/privacy",
    "beyond/test-time", "beyond/generated",
    "reference",
)  # fmt: skip
ACTS_ON = ("weights", "activations", "inputs", "attention states", "nothing")
FORMS = ("parallel", "sequential", "in place", "none")
MERGEABLE = ("yes", "no", "conditional")
NEEDS = ("nothing", "samples", "gradients", "labels")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One method's place, from the closed lists above.

    categories: the first is the main one.  acts_on: what it changes.  form: how it stands to the frozen computation.
    mergeable: into the frozen weights, with no cost afterwards ("conditional": for some of its settings).
    trains: the number of its parameters at one site, as a Python expression in ``rows`` and ``columns`` of the adapted
    matrix, ``size`` of the tensor, ``site``, ``block`` of ``blocks`` (those adapted, counted from 0), the method's own
    arguments, and ``largest_divisor``.
    once: the same for what all sites share, in ``sites``, ``depths`` and ``places`` (how many there are, of roles for
    the last), the ``first`` site, and the arguments.
    needs: what it looks at before training.  backward: whether a training step goes back through the frozen model.
    modality: the package it is for, "any" for all.  spec: its system, empty where it has none.
    why: one sentence where the placement is debatable.
    """

    categories: tuple[str, ...]
    acts_on: str
    form: str
    mergeable: str
    trains: str
    once: str = "0"
    needs: str = "nothing"
    backward: bool = True
    modality: str = "any"
    spec: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        closed = (
            *((category, CATEGORIES) for category in self.categories),
            (self.acts_on, ACTS_ON), (self.form, FORMS), (self.mergeable, MERGEABLE), (self.needs, NEEDS),
        )  # fmt: skip
        for value, known in closed:
            if value not in known:
                raise RequestError(f"a method's record says {value!r}; known are {', '.join(known)}")
        if not self.categories:
            raise RequestError("a method's record names no category")

    @property
    def family(self) -> str:
        return self.categories[0].partition("/")[0]

    @property
    def latency(self) -> str:
        """What inference costs beside the frozen model."""
        return {"yes": "none once merged", "no": "always", "conditional": "none where merged"}[self.mergeable]

    def row(self) -> dict[str, Any]:
        """The record as JSON-able data, with what follows from it."""
        return {**vars(self), "categories": list(self.categories), "family": self.family, "latency": self.latency}


def count(record: Record, method: Any, sites: Any) -> int:
    """The number of parameters that the record's formulas give for ``method`` at the selected ``sites``."""
    import math

    from shared.blocks.kronecker import largest_divisor

    allowed = {"__builtins__": {}, "min": min, "max": max, "int": int, "len": len, "str": str, "ceil": math.ceil}
    allowed["largest_divisor"] = largest_divisor
    arguments = {name: getattr(method, name) for name in method.__dataclass_fields__}
    shared = {"sites": len(sites), "depths": len({site.depth for site in sites}), "places": len(sites.roles)}
    shared |= {"first": sites[0]} if len(sites) else {}
    total = eval(record.once, allowed, arguments | shared)  # our own source, not a user's
    depths = sorted({site.depth for site in sites})
    for site in sites:
        shape = site.weight.shape if site.parameter else (0,)
        facts = {"rows": shape[0], "columns": math.prod(shape[1:]), "size": math.prod(shape)}
        facts |= {"site": site, "block": depths.index(site.depth), "blocks": len(depths)}
        total += eval(record.trains, allowed, {**arguments, **facts})
    return int(total)
