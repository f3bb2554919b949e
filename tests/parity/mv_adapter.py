"""Replay of MV-Adapter's attentions, condition encoders, cameras and noise schedule, for ``python -m tests.parity``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.geometry import cameras
from modalities.diffusion.multi_view.attention import ViewAttention
from modalities.diffusion.multi_view.condition import t2i_adapter
from modalities.diffusion.shifted import shifted
from shared.errors import RequestError

Tensors = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def replay(case: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Pairs:
    """Our output and the published one for every output of the case.

    meta: ``config`` with the heads and views, the encoders' arguments, ``fov_rad``, ``ortho_scale``, ``shift_scale``.
    """
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in case.items()}
    ours: Tensors = {}
    for part in (_attention, _encoders, _cameras, _schedule):
        ours |= part(tensors, meta["config"])
    return {name: (found, tensors[name]) for name, found in ours.items() if name in tensors}


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _attention(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.models.attention_processor import Attention

    width = config["query_dim"]
    attention = Attention(width, heads=config["heads"], dim_head=config["head_dim"], bias=False)
    attention.load_state_dict(_under(tensors, "sd.attn."))
    ours: Tensors = {}
    for views, prefix, number in (("row", "in.", config["num_views"]), ("row_column", "in.rowcol.", 6)):
        adapter = ViewAttention(attention, "attn1.processor", views, reference=True)
        adapter.load_state_dict(_under(tensors, "sd.proc."))
        told = {"num_views": number, "ref_hidden_states": {adapter.name: tensors[f"{prefix}ref_hidden_states"]}}
        name = views.replace("_column", "col")
        for case, more in {
            "mv_ref": {},
            "mv_only": {"use_ref": False},
            "none": {"use_ref": False, "use_mv": False},
            "scaled": _scales(tensors, config) if views == "row" else {},
        }.items():
            vars(adapter.context).clear()
            vars(adapter.context).update(told | more)
            ours[f"out.{name}.{case}"] = adapter(attention, tensors[f"{prefix}hidden_states"])
    return ours


def _scales(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, float]:
    """Those of the scaled output: as the meta says, else the two numbers (of two decimals) that the outputs leave."""
    if "mv_scale" in config:
        return {"mv_scale": config["mv_scale"], "ref_scale": config["ref_scale"]}
    none, views, both, scaled = (tensors[f"out.row.{n}"].double() for n in ("none", "mv_only", "mv_ref", "scaled"))
    parts = torch.stack([views - none, both - views], -1).flatten(0, -2)
    found = torch.linalg.lstsq(parts, (scaled - none).flatten()[:, None]).solution.flatten().tolist()
    rounded = [round(scale, 2) for scale in found]
    if max(abs(a - b) for a, b in zip(found, rounded, strict=True)) > 1e-4:
        raise RequestError(f"out.row.scaled: the scales {found} have more than two decimals, and the meta names none")
    return dict(zip(("mv_scale", "ref_scale"), rounded, strict=True))


def _encoders(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    ours: Tensors = {}
    for name in ("cond_xl", "cond_sd"):
        told = config[name]
        kind, blocks, factor = told["adapter_type"], told["num_res_blocks"], told["downscale_factor"]
        encoder = t2i_adapter(kind, list(config["cond_channels"]), blocks, factor)
        encoder.load_state_dict(_under(tensors, f"sd.{name}."))
        ours |= {f"out.{name}.{i}": f for i, f in enumerate(encoder(tensors[f"in.{name}"]))}
    return ours


def _cameras(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    azimuths, scale = tensors["in.cam.azimuth_deg"].tolist(), config["ortho_scale"]
    around = cameras.orthographic(azimuths, scale=scale)
    ours = {"out.cam.c2w": around.c2w, "out.cam.proj_mtx": around.projection, "out.cam.mvp_mtx": around.mvp}
    ours["out.plucker_ortho"] = cameras.rays(around, _size(tensors, "out.plucker_ortho"))
    sides = cameras.geometry_guided()
    ours["out.cam6.c2w"] = sides.c2w
    ours["out.cam6.plucker_ortho"] = cameras.rays(sides, _size(tensors, "out.cam6.plucker_ortho"))
    near = cameras.perspective(azimuths, fov=math.degrees(config["fov_rad"]))
    ours["out.plucker_persp"] = cameras.rays(near, _size(tensors, "out.plucker_persp"))
    turned = tensors["in.pos.extrinsics"] * torch.tensor([1.0, -1.0, -1.0, 1.0])  # OpenCV: y down, z forward
    of_depth = cameras.Cameras(turned, around.projection[:1].repeat(len(turned), 1, 1), ("",) * len(turned))
    depth, mask = tensors["in.pos.depth"][..., 0], tensors["in.pos.mask"][..., 0]
    ours["out.pos_ortho"] = cameras.positions_from_depth(of_depth, depth, mask, centres=False)
    return ours


def _size(tensors: Tensors, name: str) -> tuple[int, int]:
    height, width = tensors[name].shape[2:]
    return height, width


def _schedule(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    steps = len(tensors["out.shift.default.alphas_cumprod"])
    base = DDPMScheduler(steps, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return {
        f"out.shift.{mode}.alphas_cumprod": shifted(base, config["shift_scale"], mode).alphas_cumprod
        for mode in ("default", "interpolated")
    }
