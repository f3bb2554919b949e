"""What an adapter costs in a step of denoising: kept beside its layers, and folded, against the bare UNet.

``python -m tests.benchmarks.denoising_step``. Random weights in the shape of Stable Diffusion 1.5 with a fifth of its
channels, latents of a guided pair (a batch of 2), square and at four times the width, and as a clip of 8 frames through
the same UNet with AnimateDiff's motion modules. Systems that act on activations have no folded form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.benchmarks.harness import Row, ratios, run

CONFIG = {"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 768}
MOTION = {"block_out_channels": CONFIG["block_out_channels"], "use_motion_mid_block": False}
SIZES = {"256 x 256": (32, 32), "1024 x 256": (32, 128)}  # pixels, and (height, width) of the latents
CLIPS = {"8 frames of 128 x 128": (8, 16, 16)}
REPEATS = 7


def _res_adapter() -> Any:
    from modalities.diffusion.res_adapter import ResAdapter

    return ResAdapter(rank=16, alpha=8.0)


def _mv_adapter() -> Any:
    from modalities.diffusion.multi_view.mv_adapter import MVAdapter

    return MVAdapter(condition=False)


def _i2v_adapter() -> Any:
    from modalities.diffusion.video.i2v_adapter import I2VAdapter

    return I2VAdapter()


# System -> its method, and whether it folds into the weights.
Systems = dict[str, tuple[Callable[[], Any], bool]]
IMAGES: Systems = {"ResAdapter": (_res_adapter, True), "MV-Adapter, view attention": (_mv_adapter, False)}
VIDEOS: Systems = {"I2V-Adapter": (_i2v_adapter, False), "ResAdapter": (_res_adapter, True)}


def measure() -> Iterator[Row]:
    from modalities.diffusion.backbones.motion import MotionUNet
    from modalities.diffusion.backbones.unet import DiffusersUNet

    config = {**CONFIG, "in_channels": 4, "out_channels": 4}
    yield from _steps(DiffusersUNet(config=config), IMAGES, SIZES)
    yield from _steps(MotionUNet(config=config, motion_config=MOTION), VIDEOS, CLIPS)


def _steps(bare: Any, systems: Systems, sizes: dict[str, tuple[int, ...]]) -> Iterator[Row]:
    import torch

    bare = bare.eval()
    runs = {"another copy of the bare UNet": copy.deepcopy(bare)}
    for name, (method, folds) in systems.items():
        runs |= {f"{name}, {form}": _adapted(bare, method(), form) for form in ("separate", "folded")[: 1 + folds]}
    with torch.no_grad():
        for size, shape in sizes.items():
            given = (torch.randn(2, 4, *shape), torch.tensor([500]), torch.randn(2, 77, 768))
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
