"""What the settings that save memory or time cost and give: step time, bytes kept, and peak, each against none of them.

``python -m tests.benchmarks.side_memory [--depth N] [--batch N]``. Times are alternating pairs in one process; each
peak is of a process of its own, above what it held before the step (forward, backward, AdamW), on a random ViT-B/16.
``trainer.offload`` is for a GPU, whose peak it lowers; on a CPU it is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.harness import Row, fresh, peak, ratios, run

METHODS = {
    "LoRA": "LoRA()",
    "LoRA, all linear": "LoRA(roles=('attention.query', 'attention.key', 'attention.value', 'attention.output', "
    "'mlp.up', 'mlp.down'))",
    "AdaptFormer": "AdaptFormer()",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "frozen: bfloat16": {"frozen": "bfloat16"},
    "recompute": {"recompute": True},
    "saved_bits: 4": {"saved_bits": 4},
    "saved_bits: 4, saved_attention": {"saved_bits": 4, "saved_attention": True},
    "recompute, saved_bits: 4": {"recompute": True, "saved_bits": 4},
    "frozen: bfloat16, recompute": {"frozen": "bfloat16", "recompute": True},
    "precision: bf16-mixed": {"precision": "bf16-mixed"},
}
S2A = {"S2A, exact": "S2A(bits=None)", "S2A, 4 bits": "S2A(attention=False)", "S2A, 4 bits, attention": "S2A()"}


def build(method: str, settings: dict[str, Any], batch: int, depth: int) -> tuple[Any, Callable[[], Any]]:
    """The model and a step of its training."""
    import torch

    from modalities.images.backbones import TimmViT
    from shared import methods
    from shared.adapted import adapt
    from shared.training import Engine

    torch.manual_seed(0)
    small = {"depth": depth}
    backbone = TimmViT(
        3, name="vit_base_patch16_224", weights="random", image_size=224, depths=[depth - 1], model_args=small
    )
    model = adapt(backbone, eval(method, dict(vars(methods)))).train()  # our own source
    engine = Engine(epochs=1, **settings)
    engine.economise(model)
    optimiser = torch.optim.AdamW(model.trainable().values())
    image = torch.randn(batch, 3, 224, 224)

    def step(count: int = batch) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16-mixed"):
            summary = model(image[:count]).summary
        summary.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return model, step


def sizes(method: str, settings: dict[str, Any], batch: int, depth: int) -> dict[str, float]:
    """MiB of one step in this process: kept for backward, and the peak above what was there before."""
    from shared.memory import saved_bytes

    model, step = build(method, settings, batch, depth)
    with saved_bytes(model) as kept:  # one image: tables are made and code is warm before the step is measured
        step(1)  # type: ignore[call-arg]
    weights = sum(p.nbytes for p in model.backbone.parameters()) / 2**20
    before = peak()
    step()
    return {"kept": sum(kept.values()) * batch / 2**20, "peak": peak() - before, "weights": weights}


def measure(batch: int = 8, depth: int = 4, repeats: int = 7, methods: dict[str, str] | None = None) -> Iterator[Row]:
    for name, method in (METHODS if methods is None else methods).items():
        steps = {label: build(method, settings, batch, depth)[1] for label, settings in SETTINGS.items()}
        times = ratios({k: s for k, s in steps.items() if k != "nothing"}, steps["nothing"], repeats=repeats)
        for label, spread in times.items():
            yield Row(f"{name}: {label}", "step time / without", *spread)
        yield from _sizes(name, {label: (method, settings) for label, settings in SETTINGS.items()}, batch, depth)
    if methods is None:
        yield from _sizes("S2A", {label: (method, {}) for label, method in S2A.items()}, batch, depth)


def _sizes(name: str, cases: dict[str, tuple[str, dict]], batch: int, depth: int) -> Iterator[Row]:
    first = None
    for label, (method, settings) in cases.items():
        here = json.dumps([method, settings, batch, depth])
        found = fresh("tests.benchmarks.side_memory", "--here", here)
        first = first or found
        for what in ("kept", "peak", "weights"):
            value, note = found[what] / max(first[what], 1.0), f"{found[what]:.0f} MiB"
            yield Row(f"{name}: {label}", f"{what} / first", value, value, value, note=note)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory and time of the settings that trade one for the other")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=METHODS, help="one method")
    parser.add_argument("--here", help="measure one case in this process")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(sizes(*json.loads(given.here))))
        sys.exit()
    chosen = {given.only: METHODS[given.only]} if given.only else None
    run("__main__", lambda: measure(given.batch, given.depth, given.repeats, chosen))
