"""What a training step of LoRA costs: its time over the limit's and its memory over peft's, the same for peft itself.

``python -m tests.benchmarks.training_step``. The limit is the same frozen model with one trained vector behind its
first layer: nothing that trains the first block can cost less. Models have random weights and batches of 8; a step is
forward, backward and AdamW. Adapters are float32 whatever the model's type. Memory is that of three steps in a process
of its own above what it held before, as Linux counts it. ``--only r64 resnet`` runs the cases whose names hold one of
these and writes no file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.harness import Row, fresh, line, ratios, run

SCRIPT = "tests.benchmarks.training_step"
BATCH, CLASSES, MEMORY = 8, 10, 0.60
WAYS = ("limit", "ours", "peft")
# (timm's model, the module whose output the limit's vector is added to, pattern of the adapted layers)
PARTS = {
    "attention": ("vit_small_patch16_224", "patch_embed", r"blocks\.\d+\.attn\.(qkv|proj)"),
    "linears": ("vit_small_patch16_224", "patch_embed", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)"),
    "resnet50": ("resnet50", "conv1", r"(layer.*\.)?(conv\d|downsample\.0)"),
}
# step time over the limit's: convolutions are asked what all linears are
TARGETS = {
    ("attention", 8): 1.03, ("attention", 64): 1.08, ("linears", 8): 1.08, ("linears", 64): 1.20,
    ("resnet50", 8): 1.08, ("resnet50", 64): 1.20,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Which layers of which model are adapted, at what rank, in which type."""

    part: str
    rank: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.part} r{self.rank} {self.dtype}"


CASES = [Case(part, rank, dtype) for dtype in ("float32", "bfloat16") for part, rank in TARGETS]


def step(case: Case, way: str) -> Callable[[], None]:
    """A training step as a function; the model is built here."""
    import timm

    name, first, pattern = PARTS[case.part]
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    bare = timm.create_model(name, num_classes=CLASSES).to(dtype).requires_grad_(False).eval()
    model, trained = globals()[f"_{way}"](bare, case.rank, pattern, first)
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    image, labels = torch.randn(BATCH, 3, 224, 224, dtype=dtype), torch.arange(BATCH) % CLASSES

    def once() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(image).float(), labels).backward()
        optimiser.step()

    return once


def _limit(model: nn.Module, rank: int, pattern: str, first: str) -> tuple[nn.Module, list[Tensor]]:
    layer: Any = model.get_submodule(first)
    like = next(layer.parameters())
    vector = nn.Parameter(torch.zeros(len(like)))
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    layer.register_forward_hook(lambda layer, inputs, output: output + vector.to(like.dtype).reshape(shape))
    return model, [vector]


def _ours(model: nn.Module, rank: int, pattern: str, first: str) -> tuple[nn.Module, list[Tensor]]:
    from shared import LoRA, adapt
    from shared.sites import Sites, describe

    sites = Sites([site for site in describe(model) if re.fullmatch(pattern, site.path) and site.rows is None])
    adapted = adapt(model, LoRA(rank=rank, roles=sites.roles), sites=sites).train()
    return adapted, list(adapted.trainable().values())


def _peft(model: nn.Module, rank: int, pattern: str, first: str) -> tuple[nn.Module, list[Tensor]]:
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern))  # type: ignore[arg-type]
    for layer in adapted.modules():
        layer.train(isinstance(layer, peft.tuners.lora.LoraLayer))
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def times(case: Case, pairs: int) -> list[Row]:
    steps = {way: step(case, way) for way in WAYS}
    found = ratios({way: steps[way] for way in WAYS[1:]}, steps["limit"], repeats=pairs)
    target = {"ours": TARGETS[case.part, case.rank]}
    return [
        Row(f"{case.name}: {way}", "step time / limit", *values, target=target.get(way))
        for way, values in found.items()
    ]


def memory(case: Case) -> list[Row]:
    """Peaks over peft's, each of one process."""
    held = {way: fresh(SCRIPT, "--here", way, case.part, str(case.rank), case.dtype) for way in WAYS}
    note = ", ".join(f"{way} {size:.0f} MiB" for way, size in held.items())
    rows = []
    for way, target in (("ours", MEMORY), ("limit", None)):
        share = held[way] / held["peft"]
        rows.append(Row(f"{case.name}: {way}", "peak memory / peft", share, share, share, target, note=note))
    return rows


def _held(case: Case, way: str) -> float:
    """MiB of three steps above what the process held before."""
    once = step(case, way)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on, without that of building the model
    before = _status("VmRSS")
    for _ in range(3):
        once()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """A field of the process's own memory in MiB; what getrusage tells starts at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a training step")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--what", nargs="*", default=["times", "memory"], choices=["times", "memory"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--here", nargs=4, metavar=("WAY", "PART", "RANK", "DTYPE"), help="memory in this process")
    given = parser.parse_args()
    if given.here:
        way, part, rank, dtype = given.here
        print(json.dumps(_held(Case(part, int(rank), dtype), way)))
        return
    chosen = [case for case in CASES if not given.only or any(part in case.name for part in given.only)]

    def measure():
        for case in chosen:
            yield from times(case, given.pairs) if "times" in given.what else ()
            yield from memory(case) if "memory" in given.what else ()

    if len(chosen) == len(CASES) and len(given.what) == 2:
        run("__main__", lambda: measure())  # type: ignore[arg-type]
    else:
        for row in measure():
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
