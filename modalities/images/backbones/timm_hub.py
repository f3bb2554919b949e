"""Where timm's weights of a model name lie on the hub."""

from __future__ import annotations

from modalities.images.backbones.inputs import library
from shared.errors import RequestError

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def repository(name: str) -> str:
    """The hub repository of timm's weights for a name."""
    config = library("timm").get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise RequestError(f"{name}: timm has no weights for it; give checkpoint=FILE or weights='random'")
    if not config.hf_hub_id:
        raise RequestError(f"{name}: not on the hub; download {config.url} and give it as checkpoint=FILE")
    return config.hf_hub_id
