"""Whether costs are what was predicted: predicted over measured, of small trial settings and of ViT-S at 224 pixels.

``python -m tests.benchmarks.planning [CASE ...]``. Each recipe is planned by its run, trained, and planned again by
``omniadapt plan``, in a process of its own; told is the geometric mean of both over what the run measured, and both.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row, fresh, run

LONGER = "trainer.epochs=null", "trainer.steps=60", "trainer.check_every=1"
VIT_S = (
    "backbone={image_size: 224, patch_size: 16, model_args: null}",
    "data={type: GeneratedImages, count: 32, side: 64, size: 224, batch_size: 8}",
    "trainer.steps=12",
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("quickstart", ("data.count=64",)),
    "images/quickstart_images": ("images/quickstart_images", ()),
    "language/quickstart_text": ("language/quickstart_text", ()),
    "images/s2a": ("images/s2a", ("data.count=30",)),
    "remote_sensing/cloud_adapter": ("remote_sensing/cloud_adapter", ()),
    "language/bert_bottleneck": ("language/bert_bottleneck", ()),
    "ViT-S, LoRA": ("images/quickstart_images", VIT_S),
    "ViT-S, LoRA, recomputed": ("images/quickstart_images", (*VIT_S, "trainer.recompute=true")),
    "ViT-S, full fine-tuning": ("images/quickstart_images", (*VIT_S, "method={type: Full}")),
}
FIELDS = ("trainable", "step_seconds", "train_seconds", "peak_memory_bytes")
NEAR = 1.2


def trial(name: str) -> dict[str, list[float]]:
    """By field, what was measured and both predictions of it."""
    from shared import forecast, recipe
    from shared.run import run as train

    path, overrides = CASES[name]
    chosen = recipe.load(path, (*LONGER, *overrides), tiny=True)
    with tempfile.TemporaryDirectory() as folder:
        found = train(chosen, Path(folder) / "run")
    plans = [found["predicted"], forecast.forecast(chosen)]
    real: dict[str, Any] = {**found["cost"], "trainable": found["parameters"]["trainable"]}
    return {field: [real[field], *(plan[field] for plan in plans)] for field in FIELDS}


def measure(names: list[str]) -> Iterator[Row]:
    for name in names:
        for field, (real, *plans) in fresh("tests.benchmarks.planning", "--here", name).items():
            ratios = sorted(plan / real for plan in plans)
            told = math.sqrt(ratios[0] * ratios[1]), ratios[0], ratios[1]
            for target, below in ((NEAR, True), (1 / NEAR, False)):
                yield Row(f"{name}: {field}", "predicted / measured", *told, target, below, note=f"measured {real:.4g}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        print(json.dumps(trial(sys.argv[2])))
        sys.exit()
    asked = sys.argv[1:] or list(CASES)
    run(__name__, lambda: measure(asked))
