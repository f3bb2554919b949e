"""Replay of RDTF's layers, masks, tasks and curriculum, for ``python -m tests.parity``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.backbones.sti import STI
from modalities.diffusion.masks import FAMILIES, condition, masked_condition, masked_loss
from shared.errors import RequestError
from shared.training.curriculum import LEVELS, Curriculum


def replay(case: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our output and the published one for every output of the case.

    meta: ``seed``, and in ``config`` the sizes of STI, ``num_frames``, ``tasks`` and ``curriculum_end``.
    """
    config = meta["config"]
    if unknown := [task for task in config["tasks"] if task not in FAMILIES]:
        raise RequestError(f"tasks {', '.join(unknown)}: known are {', '.join(FAMILIES)}")
    given = {name: torch.from_numpy(np.array(array)) for name, array in case.items()}
    parts = {
        "sti": _sti, "enc": _encoder, "mask": _mask, "loss": _loss, "conditions": _conditions,
        "curriculum": _curriculum, "pid": _signals,
    }  # fmt: skip
    there = {name.split(".")[1] for name in given if name.startswith("out.")}
    if unknown := there - parts.keys():
        raise RequestError(f"out.{', out.'.join(sorted(unknown))}: known are out.{', out.'.join(parts)}")
    with torch.no_grad():
        found = {name: ours for part in there for name, ours in parts[part](given, config, int(meta["seed"])).items()}
    return {name: (ours, given[name]) for name, ours in found.items() if name in given}


def _state(given: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"sd.{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}


def _sti(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    layer = STI(
        config["dim"], frames=config["num_frames"], heads=config["heads"], head_width=config["dim_head"],
        groups=config["norm_num_groups"],
    )  # fmt: skip
    start = torch.cat([layer.w1, layer.w2])
    layer.load_state_dict(_state(given, "sti"), strict=True)
    return {"out.sti": layer(given["in.sti.hidden_states"], config["num_frames"]), "out.sti.init_w": start}


def _encoder(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    from modalities.diffusion.backbones.dfgn import temporal_encoder

    state = _state(given, "enc")
    encoder = temporal_encoder(len(state["norm1.weight"]))
    encoder.load_state_dict(state, strict=True)
    return {"out.enc": encoder(given["in.enc"])}


def _mask(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    masks = given["in.mask.task_mask"], given["in.mask.frame_mask"]
    return {"out.mask.condition": masked_condition(given["in.mask.latents"], *masks)}


def _loss(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    loss = masked_loss(given["in.loss.pred"], given["in.loss.target"], given["in.mask.frame_mask"])
    return {"out.loss": loss.mean()}


def _conditions(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Rows of task, real frames, text dropped, mask: drawn one after the other from one seed."""
    draws, rows = random.Random(seed), []
    for index, real, *_ in given["out.conditions"].int().tolist():
        found = condition(config["tasks"][index], real, config["num_frames"], draws)
        rows.append([index, real, int(not found.text), *found.given])
    return {"out.conditions": torch.tensor(rows, dtype=torch.float32)}


def _curriculum(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    families = {task: FAMILIES[task] for task in config["tasks"]}
    steps = [int(step) for step in given["in.curriculum.steps"]]
    found = {}
    for name, schedule in (("static", "anchors"), ("cosine", "cosine")):
        curriculum = Curriculum(families, config["curriculum_end"], schedule=schedule)  # type: ignore[arg-type]
        found[f"out.curriculum.{name}"] = _table(curriculum.by_step(step) for step in steps)
    curriculum = Curriculum(families, config["curriculum_end"])
    levels = range(len(LEVELS["generation"]))
    return found | {"out.curriculum.table": _table(curriculum.by_level(level) for level in levels)}


def _table(rows: Any) -> Tensor:
    return torch.tensor([list(row.values()) for row in rows], dtype=torch.float32)


def _signals(given: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    curriculum = Curriculum(FAMILIES, config["curriculum_end"])
    found = [curriculum.note(float(loss)) for loss in given["in.pid.losses"]]
    return {"out.pid.P_a": torch.tensor(found[1:], dtype=torch.float32)}
