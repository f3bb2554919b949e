"""What an adapter costs in a step of denoising: kept beside its layers, and folded, against the bare UNet.

``python -m tests.benchmarks.denoising_step``. Random weights in the shape of Stable Diffusion 1.5 with a fifth of its
channels, latents of a guided pair (a batch of 2), square and at four times the width. Systems that act on activations
have no folded form; they are one entry of ``SYSTEMS`` each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.benchmarks.harness import Row, ratios, run

CONFIG = {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 768}
SIZES = {"256 x 256": (32, 32), "1024 x 256": (32, 128)}  # pixels, and (height, width) of the latents
REPEATS = 7


def _res_adapter() -> Any:
    from modalities.diffusion.res_adapter import ResAdapter

    return ResAdapter(rank=16, alpha=8.0)


def _mv_adapter() -> Any:
    from modalities.diffusion.multi_view.mv_adapter import MVAdapter

    return MVAdapter(condition=False)


# System -> its method, and whether it folds into the weights.
SYSTEMS: dict[str, tuple[Callable[[], Any], bool]] = {
    "ResAdapter": (_res_adapter, True),
    "MV-Adapter, view attention": (_mv_adapter, False),
}


def measure() -> Iterator[Row]:
    import torch

    from modalities.diffusion.backbones.unet import DiffusersUNet

    bare = DiffusersUNet(config={**CONFIG, "in_channels": 4, "out_channels": 4}).eval()
    runs = {"another copy of the bare UNet": copy.deepcopy(bare)}
    for name, (method, folds) in SYSTEMS.items():
        runs |= {f"{name}, {form}": _adapted(bare, method(), form) for form in ("separate", "folded")[: 1 + folds]}
    with torch.no_grad():
        for size, (height, width) in SIZES.items():
            given = (torch.randn(2, 4, height, width), torch.tensor([500]), torch.randn(2, 77, 768))
            found = ratios(
                {n: partial(each, *given) for n, each in runs.items()}, partial(bare, *given), repeats=REPEATS
            )
            for name, (value, low, high) in found.items():
                note = "what the noise is" if name.startswith("another") else ""
                yield Row(f"{size}: {name}", "step / bare", value, low, high, note=note)


def _adapted(bare: Any, method: Any, form: str) -> Any:
    """A copy with an adapter that changes something."""
    import torch

    from shared import adapt

    model = adapt(copy.deepcopy(bare), method)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.state.form = "separate" if form == "separate" else model.state.form
    return model.eval()


run(__name__, measure)
