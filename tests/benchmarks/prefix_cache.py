"""What the kept prefix saves: epochs with last-4 adapters, a probe's and a ladder's later epochs, and bytes an image.

``python -m tests.benchmarks.prefix_cache``. ViT-S/16 at 224 pixels with random weights, batches of 8; epochs of
``IMAGES`` images with forward, backward and AdamW, reading the cache included, loading and decoding of images left out
(all ways pay for those alike). The peer is HF peft's LoRA of rank 8 in all 12 blocks, on the layers that ours adapts in
the last 4: the attention's, or all.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from modalities.images.backbones import TimmViT
from modalities.images.heads import LinearHead
from shared import LoRA, adapt
from shared.cache import Cache, FrozenPrefix
from shared.methods import S2A, Probe
from tests.benchmarks.harness import Row, ratios, run

IMAGES, BATCH, CLASSES = 8, 8, 10
ATTENTION = ("attention.qkv", "attention.output")
LAYERS = {
    "attention": (ATTENTION, r".*\.attn\.(qkv|proj)"),
    "all linear layers": ((*ATTENTION, "mlp.up", "mlp.down"), r".*\.(attn\.(qkv|proj)|mlp\.fc[12])"),
}
LADDER = {"bias": False, "prompts": 0, "side": "ladder", "reduction": 8, "bits": None}
PRECISIONS = ("exact", "float16", "int8")


def backbone() -> TimmViT:
    torch.manual_seed(0)
    return TimmViT(3, name="vit_small_patch16_224", weights="random", depths=[11])


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    count = IMAGES // BATCH
    return [(torch.randn(BATCH, 3, 224, 224), torch.randint(CLASSES, (BATCH,))) for _ in range(count)]


def epoch(model: Any, parameters: list[Any]) -> Callable[[], None]:
    """One pass over all images, as a function without arguments."""
    optimiser, data = torch.optim.AdamW(parameters, lr=1e-4), batches()

    def pass_over() -> None:
        for image, label in data:
            loss = F.cross_entropy(model(image), label)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return pass_over


def ours(method: Any, folder: str | None = None, precision: Any = "float16") -> Callable[[], None]:
    model = adapt(backbone(), method, head=LinearHead(384, CLASSES)).train()
    if folder is not None:
        model.cache = FrozenPrefix(model, Cache(precision=precision, folder=f"{folder}/{precision}"))
    return epoch(model, list(model.trainable().values()))


def peers(layers: str) -> Callable[[], None]:
    """peft on the same backbone, at the layers of a pattern."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(backbone().model, LoraConfig(r=8, lora_alpha=8, target_modules=layers))  # type: ignore[arg-type]
    head = torch.nn.Linear(384, CLASSES)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    return epoch(lambda image: head(model(image)), trained)


def measure() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for layers, (roles, pattern) in LAYERS.items():
            last = functools.partial(LoRA, rank=8, roles=roles, depth="last 4")
            below = f"{folder}/{layers}"
            yield from _against(
                f"peft LoRA, 12 blocks, {layers}",
                peers(pattern),
                {
                    **{f"LoRA, last 4 of 12, {p} cache": (ours(last(), below, p), 0.30) for p in PRECISIONS},
                    "LoRA, last 4 of 12, no cache": (ours(last()), None),
                },
            )
        yield from _against("probe, no cache", ours(Probe()), {"probe, later epochs": (ours(Probe(), folder), 0.10)})
        ladder = ours(S2A(**LADDER))
        yield from _against("ladder, no cache", ladder, {"ladder, later epochs": (ours(S2A(**LADDER), folder), None)})
        yield from _sizes()


def _against(name: str, reference: Any, cases: dict[str, tuple[Any, float | None]]) -> Iterator[Row]:
    """The first epoch, which fills the cache, is one of those that warm up."""
    found = ratios({case: each for case, (each, _) in cases.items()}, reference, repeats=5, warmup=1)
    for case, (middle, low, high) in found.items():
        yield Row(case, f"epoch / {name}", middle, low, high, cases[case][1])


def _sizes() -> Iterator[Row]:
    """Of what is kept of an image, and how far off it is after all later blocks."""
    image = batches()[0][0]
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            model = adapt(backbone(), LoRA(roles=ATTENTION, depth="last 4"), head=LinearHead(384, CLASSES)).eval()
            with torch.no_grad():
                exact = model(image)
                model.cache = FrozenPrefix(model, Cache(precision=precision, folder=folder))
                off = float((model(image) - exact).abs().max() / exact.std())
            kept = sum(path.stat().st_size for path in model.cache.root.glob("*/*.data")) / len(image)
        yield Row(f"last 4 of 12, {precision} cache", "kB an image", kept / 1e3, kept / 1e3, kept / 1e3)
        yield Row(f"last 4 of 12, {precision} cache", "logits off / their deviation", off, off, off)


run(__name__, measure)  # type: ignore[arg-type]
