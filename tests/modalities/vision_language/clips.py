"""A small CLIP for the tests, ours and open_clip's own of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch

from modalities.vision_language.backbones import OpenClip

VISION = {"width": 48, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"width": 32, "layers": 2, "heads": 2, "context_length": 20}
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
