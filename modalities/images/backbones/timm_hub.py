"""Where timm's weights of a model name lie on the hub, and how a model is filled with them or with a file's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from modalities.images.backbones.inputs import fit_bands, library
from shared import weights as w
from shared.errors import RequestError

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load(
    model: Any, name: str, bands: int, checkpoint: str | None, *, entry: str,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> str:  # fmt: skip
    """Fill the model from a file or the hub and say which; on the meta device nothing is read.

    entry: the kernel that takes the image's bands.  renamed: brings a file's tensors under the model's names.
    """
    source = f"file: {checkpoint}" if checkpoint is not None else f"timm hub: {repository(name)}"
    if w.is_meta(model):
        return f"{source} (not loaded: meta device)"
    state = renamed(w.read(checkpoint if checkpoint is not None else w.fetch(name, repository(name), HUB_FILES)))
    if entry in state:
        state[entry] = fit_bands(state[entry], bands, source)
    w.fill(model, state, name, source)
    return source


def repository(name: str) -> str:
    """The hub repository of timm's weights for a name."""
    config = library("timm").get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise RequestError(f"{name}: timm has no weights for it; give checkpoint=FILE or weights='random'")
    if not config.hf_hub_id:
        raise RequestError(f"{name}: not on the hub; download {config.url} and give it as checkpoint=FILE")
    return config.hf_hub_id
