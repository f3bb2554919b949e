"""Whether costs are what was predicted: predicted over measured, of the recipes' small trial settings.

``python -m tests.benchmarks.planning [RECIPE ...]``. Each recipe is planned by its run, trained, and planned again by
``omniadapt plan``; told is the geometric mean of both over what the run measured, and both.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row, run

LONGER = "trainer.epochs=null", "trainer.steps=60", "trainer.check_every=1"
CASES: dict[str, tuple[str, ...]] = {
    "quickstart": ("data.count=64",),
    "images/quickstart_images": (),
    "language/quickstart_text": (),
    "images/s2a": ("data.count=30",),
    "remote_sensing/cloud_adapter": (),
    "language/bert_bottleneck": (),
}
FIELDS = ("trainable", "step_seconds", "train_seconds", "peak_memory_bytes")
NEAR = 1.2


def measure(names: list[str]) -> list[Row]:
    from shared import forecast, recipe
    from shared.run import run as train

    rows: list[Row] = []
    for name in names:
        chosen = recipe.load(name, (*CASES.get(name, ()), *LONGER), tiny=True)
        with tempfile.TemporaryDirectory() as folder:
            found = train(chosen, Path(folder) / "run")
        plans = [found["predicted"], forecast.forecast(chosen)]
        real: dict[str, Any] = {**found["cost"], "trainable": found["parameters"]["trainable"]}
        for field in FIELDS:
            ratios = sorted(plan[field] / real[field] for plan in plans)
            told = math.sqrt(ratios[0] * ratios[1]), ratios[0], ratios[1]
            for target, below in ((NEAR, True), (1 / NEAR, False)):
                note = f"measured {real[field]:.4g}"
                rows.append(Row(f"{name}: {field}", "predicted / measured", *told, target, below, note))
    return rows


if __name__ == "__main__":
    asked = sys.argv[1:] or list(CASES)
    run(__name__, lambda: measure(asked))
