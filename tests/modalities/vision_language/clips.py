"""A small CLIP for the tests, ours and open_clip's own of the same weights, and tasks on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from modalities.images.data import GeneratedImages
from modalities.vision_language.backbones import OpenClip
from modalities.vision_language.classification import ClipClassification
from modalities.vision_language.heads import SimilarityHead
from shared import adapt
from shared.methods import LoRA
from shared.training import Optimiser

VISION = {"width": 48, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"width": 32, "layers": 2, "heads": 2, "context_length": 20}
NAMES = ("disc", "stripes", "checks")
TEMPLATES = ("a photo of a {}.", "a drawing of {}, seen from above", "{}")
ROLES = ("attention.query", "attention.value", "attention.output", "mlp.up")
SMALL: dict[str, Any] = {
    "name": "ViT-B-32",
    "pretrained": "random",
    "image_size": 32,
    "model_args": {"embed_dim": 24, **{key: value for key, value in VISION.items() if key != "image_size"}},
    "text_args": TEXT,
}


def clip(**options: Any) -> OpenClip:
    return OpenClip(3, **{**SMALL, **options}).eval()


def written(folder: Path) -> tuple[Any, dict[str, Any]]:
    """open_clip's own model, known to it as "tiny-both", and the settings that give ours of the same weights."""
    (folder / "tiny-both.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(folder / "tiny-both.json")
    torch.manual_seed(5)
    theirs: Any = open_clip.create_model("tiny-both").eval()
    theirs.logit_scale.data.fill_(2.5)
    torch.save(theirs.state_dict(), folder / "clip.pth")
    return theirs, {"name": "tiny-both", "checkpoint": str(folder / "clip.pth")}


def images(**changes: Any) -> GeneratedImages:
    return GeneratedImages(**{"count": 10, "classes": NAMES, "side": 32, "crop": 1.0, "batch_size": 8, **changes})


def task(method: Any = None, head: nn.Module | None = None, backbone: Any = None, **options: Any) -> ClipClassification:
    torch.manual_seed(0)
    model = adapt(backbone or clip(), method or LoRA(rank=2, roles=ROLES), head=head or SimilarityHead(3))
    optimiser = options.pop("optimiser", Optimiser(learning_rate=1e-2))
    return ClipClassification(model, images(), optimiser, **options).eval()


def tuned(found: ClipClassification) -> ClipClassification:
    """As if it had trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return found


def fed(found: ClipClassification) -> GeneratedImages:
    """Its data, normalised for its backbone."""
    data = images()
    data.normalise_by(found.model.backbone)
    return data
