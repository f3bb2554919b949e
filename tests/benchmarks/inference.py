"""What an adapter costs at inference: folded, from the first batch and after it, against the bare model and peft.

``python -m tests.benchmarks.inference``. Random weights; LoRA of rank 8 on every linear layer of the blocks,
of which ViT-S/16 has four here (ratios do not depend on their number).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.harness import Row, ratios, run, seconds, spread

LAYERS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
REPEATS = 15


def measure() -> Iterator[Row]:
    import timm
    import torch

    cases = {
        "ViT-S/16, batch 1": (timm.create_model("vit_small_patch16_224", depth=4), torch.randn(1, 3, 224, 224)),
        "ViT-S/16, batch 8": (timm.create_model("vit_small_patch16_224", depth=4), torch.randn(8, 3, 224, 224)),
        "ViT of width 64, 17 tokens, batch 1": (
            timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2),
            torch.randn(1, 3, 64, 64),
        ),
    }
    with torch.no_grad():
        for case, (bare, image) in cases.items():
            yield from _one(case, bare.eval(), image)


def _one(case: str, bare: Any, image: Any) -> list[Row]:
    from peft import LoraConfig, get_peft_model

    from shared import LoRA, adapt
    from shared.sites import Sites, describe

    backbone = copy.deepcopy(bare)
    sites = Sites([s for s in describe(backbone) if re.fullmatch(LAYERS, s.path)], "ViT")
    assert len(sites) == 4 * len(bare.blocks)
    ours = _noisy(adapt(backbone, LoRA(rank=8, roles="linear"), sites=sites)).eval()
    theirs = _noisy(get_peft_model(copy.deepcopy(bare), LoraConfig(r=8, target_modules=LAYERS))).eval()
    merged = copy.deepcopy(theirs)
    merged.merge_adapter()
    same = copy.deepcopy(bare)
    runs: dict[str, tuple[Callable[[], Any], float | None, str]] = {
        "folded": (lambda: ours(image), 1.01, ""),
        "another copy of the bare model": (lambda: same(image), None, "what the noise is"),
        "peft": (lambda: theirs(image), None, ""),
        "peft, merged": (lambda: merged(image), None, ""),
    }
    found = ratios({name: each[0] for name, each in runs.items()}, lambda: bare(image), repeats=REPEATS)
    rows = [
        Row(f"{case}: {name}", "call / bare", *found[name], target=target, note=note)
        for name, (_, target, note) in runs.items()
    ]
    first, folding = [], []
    for turn in range(REPEATS):
        ours.train()
        folding.append(seconds(ours.eval))
        pair = [seconds(each) for each in ((lambda: bare(image)), (lambda: ours(image)))[:: 1 if turn % 2 else -1]]
        first.append(pair[1] / pair[0] if turn % 2 else pair[0] / pair[1])
        folding[-1] /= pair[0] if turn % 2 else pair[1]
    rows.append(Row(f"{case}: first batch after eval()", "call / bare", *spread(first), target=1.01))
    rows.append(Row(f"{case}: eval() itself", "folding / bare call", *spread(folding)))
    return rows


def _noisy(model: Any) -> Any:
    """With adapters that change something."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(".up"):
                parameter.normal_(std=0.02)
    return model


run(__name__, measure)
