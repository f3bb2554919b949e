"""What the kept prefix does to a score: aerial scenes (RSSCN7, beside the project), AerialViT, three draws of them.

``python -m tests.benchmarks.prefix_score [SEEDS]``. The ways differ in where LoRA of rank 8 acts and what is kept, and
in nothing else; the first is what HF peft's LoRA computes. Training times are of whole runs, checks included.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from shared import recipe, run
from tests.benchmarks.harness import Row
from tests.benchmarks.harness import run as told
from tests.conftest import MATERIALS

SCENES = MATERIALS / "data" / "scene_rsscn7"
LAST = ["method.depth=last 2"]
WAYS = {
    "LoRA, 6 blocks": ["method.depth=all"],
    "LoRA, last 2 of 6": LAST,
    "LoRA, last 2 of 6, float16 cache, 8 views": [*LAST, "trainer.cache={precision: float16, views: 8}"],
    "LoRA, last 2 of 6, int8 cache, 8 views": [*LAST, "trainer.cache={precision: int8, views: 8}"],
    "LoRA, last 2 of 6, float16 cache, 1 view": [*LAST, "trainer.cache={precision: float16, views: 1}"],
}


def measure() -> Iterator[Row]:
    if not SCENES.is_dir():
        raise SystemExit(f"{SCENES}: no such folder; these figures need the photographs of RSSCN7 in it")
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    first: list[float] = []
    for name, overrides in WAYS.items():
        results = [_trained(overrides, seed) for seed in seeds]
        scores, times = ([result[i] for result in results] for i in range(2))
        first = first or times
        yield Row(name, f"accuracy, {len(seeds)} draws", fmean(scores), min(scores), max(scores))
        ratios = sorted(time / reference for time, reference in zip(times, first, strict=True))
        yield Row(name, "training / LoRA, 6 blocks", fmean(ratios), ratios[0], ratios[-1])


def _trained(overrides: list[str], seed: int) -> tuple[float, float]:
    """Accuracy, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        here = [f"trainer.cache.folder={folder}/cache"] if any("cache" in each for each in overrides) else []
        given = [f"data.root={SCENES}", f"seed={seed}", "trainer.device=cpu", *overrides, *here]
        found: dict[str, Any] = run.run(recipe.load("images/scenes", given), Path(folder) / "run")
    return found["test"]["accuracy"], found["cost"]["train_seconds"]


told(__name__, measure)  # type: ignore[arg-type]
