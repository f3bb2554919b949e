"""Replay of AdapterShadow: a windowed and a global block, the grid of points, their tokens, both losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.images.adapter_shadow import AdapterShadow, focal_loss, grid_points, weighted_cross_entropy
from shared import Site
from shared.adapted import Adapted
from shared.attaching import attach


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Pairs (ours, published)."""
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in case.items()}
    config = meta["config"]
    truth, coarse = given["in.gt"], given["in.mask_logits"]
    method = AdapterShadow(
        ratio=config["adapter_ratio"], scale=config["mlp_adapter_scale"], grid=config["grid_out_size"],
        threshold=config["grid_thres"], order="rc",
        padding="norm",
    )  # fmt: skip
    window, whole = blocks(method, config, given)
    with torch.no_grad():
        after_window = window(given["in.tokens"])
        after_global = whole(after_window)
        places, labels, values = grid_points(coarse, method.grid, method.threshold)
        sparse, _ = prompt_encoder(config, given)(points=(places, labels), boxes=None, masks=None)
    ours = {
        "out.after_window_block": after_window,
        "out.after_global_block": after_global,
        "out.point_coords": places,
        "out.point_labels": labels,
        "out.grid_values": values,
        "out.sparse_embeddings": sparse,
        "out.focal_loss": focal_loss(coarse, truth, config["focal_alpha"], config["focal_gamma"]),
        "out.weighted_ce_loss": weighted_cross_entropy(coarse, truth),
    }
    return {name: (tensor, case[name]) for name, tensor in ours.items()}


def blocks(method: AdapterShadow, config: dict[str, Any], given: dict[str, Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """The windowed and the global block of the library, adapted by the method, with the case's weights."""
    from segment_anything.modeling.image_encoder import Block

    found, grid = nn.ModuleList(), tuple(config["grid"])
    for prefix, window in (("sd.win.", config["window_size"]), ("sd.glo.", 0)):
        state = {name.removeprefix(prefix): t for name, t in given.items() if name.startswith(prefix)}
        block = Block(
            config["dim"], config["num_heads"], config["mlp_ratio"], use_rel_pos=True, window_size=window,
            input_size=grid,
        )  # fmt: skip
        block.load_state_dict({name: t for name, t in state.items() if "_Adapter." not in name})
        model = Adapted(block)
        model.context.grid = grid
        for name, part in (("attn", "Space_Adapter"), ("mlp", "MLP_Adapter")):
            role = "attention" if name == "attn" else name
            site = Site(role, 0, name, getattr(block, name), None, layout="BHWC", width=config["dim"])
            adapter: Any = method.build(site, block)
            adapter.context = model.context
            for layer, theirs in ((adapter.branch.down, "D_fc1"), (adapter.branch.up, "D_fc2")):
                layer.load_state_dict({n: state[f"{part}.{theirs}.{n}"] for n in ("weight", "bias")})
            attach(site, adapter, "default", model.state)
        model.state.active = (("default", 1.0),)
        found.append(block)
    return list(found)


def prompt_encoder(config: dict[str, Any], given: dict[str, Tensor]) -> nn.Module:
    from segment_anything.modeling import PromptEncoder

    prefix, size = "sd.prompt_encoder.", tuple(config["input_image_size"])
    encoder = PromptEncoder(config["prompt_embed_dim"], tuple(config["grid"]), size, 16)
    mine = encoder.state_dict()
    state = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    encoder.load_state_dict({**{n: t for n, t in mine.items() if n.startswith("mask_downscaling.")}, **state})
    return encoder
