"""Noise schedules shifted to more noise, which sizes above the base's and several views of one object need."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import RequestError

Mode = Literal["interpolated", "default"]


def shifted(scheduler: Any, scale: float = 8.0, mode: Mode = "interpolated", kind: type | None = None) -> Any:
    """A scheduler of diffusers with the signal-to-noise ratio divided by ``scale``, all else as it is.

    mode: "default" divides it at every step; "interpolated" (MV-Adapter; Huang et al., 2024) in the logarithm from not
    at all at step 0 to fully at the last.  kind: another class of scheduler to make.

    Raises RequestError where the scale is not positive, or the scheduler has no such schedule.
    """
    if not scale > 0:
        raise RequestError(f"shift {scale:g}: use a number above 0")
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        raise RequestError(f"{type(scheduler).__name__} has no schedule of noise variances to shift")
    betas = betas_of(shift(kept, scale, mode)).float()
    return (kind or type(scheduler)).from_config(scheduler.config, trained_betas=betas.tolist())


def shift(kept: Tensor, scale: float = 8.0, mode: Mode = "interpolated") -> Tensor:
    """kept: (T,), the share of signal variance left at each step. Returns it shifted, float64."""
    kept = kept.double().cpu()
    snr = (kept / (1 - kept)).log()
    weight = torch.linspace(0, 1, len(kept), dtype=torch.float64) if mode == "interpolated" else torch.ones_like(kept)
    return (snr - weight * torch.tensor(scale, dtype=torch.float64).log()).sigmoid()


def betas_of(kept: Tensor) -> Tensor:
    """The variance (T,) that each step adds."""
    return 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
