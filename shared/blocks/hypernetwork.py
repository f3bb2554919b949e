"""A hypernetwork: bottlenecks generated from what they are for (Hyperformer, Mahabadi et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attaching import Bank
from shared.blocks.tasks import ByTask


class HyperNetwork(nn.Module):
    """From a task, a layer and a place to the tensors of a bottleneck of ``width`` channels, ``inner`` inside.

    ``e = norm(project([task; layer]))``, and from e one linear map for each tensor: ``down.weight`` (inner, width),
    ``down.bias``, ``up.weight`` (width, inner), ``up.bias`` and, where ``norms`` names "before" or "after", their
    weight and bias. Each place has maps of its own, unless one set serves all (``unique``): then the place is embedded
    too.

    embeddings: (1, C) by task, normal; hypernetworks may share them.  hidden, projected: widths of ``project``.
    deviation: of all linear maps; biases zero.  zero: what gives ``up`` starts at zero.
    """

    def __init__(
        self, embeddings: ByTask, layers: int, places: Sequence[str], width: int, inner: int, *,
        hidden: int = 128, projected: int = 64, unique: bool = False, norms: Sequence[str] = (),
        deviation: float = 0.01, zero: bool = False,
    ):  # fmt: skip
        super().__init__()
        first: Any = next(iter(embeddings.values()))
        self.places, self.unique, size = tuple(places), unique, first.embedding_dim
        self.embeddings: Any = embeddings
        self.layers = nn.Embedding(layers, size)
        self.kinds = nn.Embedding(len(places), size) if unique else None
        self.project = nn.Sequential(
            nn.Linear((3 if unique else 2) * size, hidden), nn.ReLU(), nn.Linear(hidden, projected)
        )
        self.norm = nn.LayerNorm(projected, eps=1e-6)
        self.shapes = {
            "down.weight": (inner, width),
            "down.bias": (inner,),
            "up.weight": (width, inner),
            "up.bias": (width,),
        }
        self.shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
        self.generators = Bank({place: self._maps(projected) for place in (("all",) if unique else self.places)})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation)
                nn.init.zeros_(module.bias)
        if zero:
            maps: Any
            for maps in self.generators.values():
                nn.init.zeros_(maps["up/weight"].weight)
                nn.init.zeros_(maps["up/bias"].weight)

    def _maps(self, projected: int) -> Bank:
        sizes = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        return Bank({name.replace(".", "/"): nn.Linear(projected, size) for name, size in sizes.items()})

    def forward(self, task: str, layer: int, place: str) -> dict[str, Tensor]:
        """The tensors by name. layer: its index."""
        parts = [self.embeddings[task].weight[0], self.layers.weight[layer]]
        if self.kinds is not None:
            parts.append(self.kinds.weight[self.places.index(place)])
        e = self.norm(self.project(torch.cat(parts)))
        maps: Any = self.generators["all" if self.unique else place]
        return {name: maps[name.replace(".", "/")](e).reshape(shape) for name, shape in self.shapes.items()}


def bottleneck(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    """``after(up(gelu(down(before(x)))))`` with generated tensors; GELU in its tanh form."""
    if "before.weight" in given:
        x = F.layer_norm(x, x.shape[-1:], given["before.weight"], given["before.bias"])
    h = F.gelu(F.linear(x, given["down.weight"], given["down.bias"]), approximate="tanh")
    y = F.linear(h, given["up.weight"], given["up.bias"])
    return F.layer_norm(y, y.shape[-1:], given["after.weight"], given["after.bias"]) if "after.weight" in given else y
