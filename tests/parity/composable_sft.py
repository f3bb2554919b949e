"""LT-SFT: the selection after a full phase, the encoding of a sparse difference, and the sum of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared import sparse_diff
from shared.adapted import adapt
from shared.methods.composable_sft import ComposableSFT, select
from shared.sites import Site, Sites


def tree(tensors: dict[str, Tensor]) -> nn.Module:
    """A module that holds these tensors under their dotted names, and does nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    def given(part: str) -> dict[str, Tensor]:
        return {n.split("/", 1)[1]: torch.as_tensor(t) for n, t in case.items() if n.startswith(f"in.{part}/")}

    start, full, sparse, language = (given(part) for part in ("theta0", "theta_full", "theta_sparse", "lang"))
    names = [n.split("/", 1)[1] for n in case if n.startswith("out.mask/")]  # all but the head
    chosen = select([full[n] - start[n] for n in names], meta["config"]["k"])
    pairs = {f"out.mask/{n}": (mask, case[f"out.mask/{n}"]) for n, mask in zip(names, chosen, strict=True)}
    for name in names:
        entry = sparse_diff.encode(sparse[name] - start[name])
        ours = {"size": torch.tensor(entry["size"]), "index_steps": torch.tensor(entry["index_steps"])}
        for part, tensor in {**ours, "values": entry["values"]}.items():
            pairs[f"out.enc/{name}/{part}"] = (tensor, case[f"out.enc/{name}/{part}"])

    root = tree({name: start[name] for name in names})
    model = adapt(root, ComposableSFT(share=1.0), name="language", sites=Sites([Site("model", 0, "", root, None)]))
    model.add(ComposableSFT(share=1.0), name="task")
    for adapter, diffs in (("language", language), ("task", {n: sparse[n] - start[n] for n in names})):
        for name in names:
            key = name.replace(".", "/").removesuffix("/weight") if name.endswith(".weight") else None
            key = key or ":".join(name.replace(".", "/").rsplit("/", 1))
            delta: Any = model.bank[adapter][key]  # type: ignore[index]
            delta.value_mask.copy_(diffs[name] != 0)
            delta.value.data.copy_(diffs[name])
    model.activate("language", "task")
    for name in names:
        path, _, last = name.rpartition(".")
        pairs[f"out.composed/{name}"] = (getattr(root.get_submodule(path), last), case[f"out.composed/{name}"])
    return pairs
