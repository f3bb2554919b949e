"""Segment Anything through the cache: the image encoder runs once for each image, and every bit is as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.images.adapter_shadow import AdapterShadow
from modalities.images.backbones import SAM, Prompts, SAMEncoder
from modalities.images.prompted import PromptedSegmentation
from modalities.remote_sensing.data import GeneratedScenes
from modalities.remote_sensing.heads import LightDecoder
from shared import LoRA, RequestError, adapt
from shared.adapted import Adapted
from shared.cache import Cache, FrozenPrefix, span
from shared.methods.norm_tuning import NormTuning
from shared.methods.ssf import SSF
from shared.training import Engine, Optimiser, fit
from tests.shared.cache.models import Count, cached, same

TRAIN, CHECK, TEST = 3, 1, 1  # images
BOX = Prompts(boxes=torch.tensor([4.0, 6, 20, 30]).expand(4, 1, 4))


def sam(method: Any, part: Any, **more: Any) -> Adapted:
    torch.manual_seed(8)
    model = adapt(SAM(3, size="tiny", weights="random", part=part), method)
    for parameter in model.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.train()


def image(count: int = 4, height: int = 40, width: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def outcome(model: Adapted, given: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    found = model(given, BOX._replace(boxes=BOX.boxes[: len(given)]))  # type: ignore[index]
    (found.logits.square().mean() + found.iou.square().mean()).backward()
    return [found.logits.detach(), *(p.grad.clone() for p in model.trainable().values() if p.grad is not None)]


CASES = {
    "decoder": (LoRA(rank=2), "decoder", (4, ())),
    "last blocks": (LoRA(rank=2, depth=[2, 3]), "encoder", (2, (1,))),
    "last block and decoder": (LoRA(rank=2, depth="last 3"), "both", (3, (2,))),
    "neck": (NormTuning(tags=("neck",)), "encoder", (4, (3,))),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_without_it_bit_for_bit(case: str, tmp_path: Path) -> None:
    method, part, (start, kept) = CASES[case]
    ours, theirs = sam(method, part), sam(method, part)
    found = span(ours)
    assert (found.start, found.kept, found.finished) == (start, kept, not kept)
    cache, given = cached(ours, tmp_path), image()
    for images in (given[:3], given[:3], given[:3].flip(0)):
        assert same(outcome(ours, images), outcome(theirs, images))
    assert (cache.computed, cache.read) == (3, 6)
    for one, other in zip(outcome(ours, given), outcome(theirs, given), strict=True):  # the fourth is computed alone
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (cache.computed, cache.read) == (4, 9)


def scenes(**more: Any) -> GeneratedScenes:
    """One image a batch: the encoder rounds an image alone and among others differently, with or without a cache."""
    return GeneratedScenes(
        count=5, size=48, bands=("red", "green", "blue"), batch_size=1, validation=0.2, test=0.2, augment=False, **more
    )


def train(folder: Path, cache: Path | None, epochs: int = 3) -> tuple[list[float], int, dict[str, Any]]:
    """The losses of all steps, and how many images were encoded in training and checks."""
    torch.manual_seed(0)
    data = scenes()
    task = PromptedSegmentation(sam(LoRA(rank=2), "decoder"), data, Optimiser(learning_rate=1e-2), measured=2)
    count, losses, ran, plain = Count(task.model.backbone.sam.image_encoder.neck), [], [], task.criterion  # type: ignore[union-attr]

    def criterion(outputs: Any, batch: Any) -> torch.Tensor:
        loss = plain(outputs, batch)
        losses.append(loss.item())
        return loss

    task.criterion = criterion  # type: ignore[method-assign]
    task.on_test_start = lambda: ran.append(count.samples)  # type: ignore[method-assign]
    settings = None if cache is None else {"precision": "exact", "folder": str(cache)}
    found = fit(task, data, Engine(epochs=epochs, device="cpu", cache=settings), folder)
    return losses, ran[0], found["test"]


def test_training_the_decoder_gives_the_same_losses_and_encodes_each_image_once(tmp_path: Path) -> None:
    plain, without, scores = train(tmp_path / "plain", None)
    ours, once, again = train(tmp_path / "ours", tmp_path / "cache")
    assert len(plain) == 3 * TRAIN
    assert ours == plain
    assert again == scores
    known = 4  # images that the prefix is known by: two together, and each alone
    assert (without, once) == (3 * (TRAIN + CHECK), TRAIN + CHECK + known)
    kept, later, _ = train(tmp_path / "later", tmp_path / "cache")
    assert kept == plain
    assert later == known


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_rounded_embeddings_stay_near(tmp_path: Path, precision: str) -> None:
    ours, theirs = sam(LoRA(rank=2), "decoder"), sam(LoRA(rank=2), "decoder")
    ours.cache = FrozenPrefix(ours, Cache(precision=precision, folder=str(tmp_path)))  # type: ignore[arg-type]
    off = (outcome(ours, image())[0] - (plain := outcome(theirs, image())[0])).norm() / plain.norm()
    assert 0 < off < {"float16": 2e-3, "int8": 4e-2}[precision]


def test_the_encoder_alone_is_kept_too(tmp_path: Path) -> None:
    """With a head of dense prediction that reads maps from below and above the split."""

    def made() -> Adapted:
        backbone = SAMEncoder(3, size="tiny", weights="random", depths=[0, 3])
        torch.manual_seed(7)
        model = adapt(backbone, LoRA(rank=2, depth=[3]), head=LightDecoder(backbone.channels, 4, width=8))
        for parameter in model.trainable().values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.train()
        model.head.eval()  # type: ignore[union-attr]
        return model

    def outcome(model: Adapted, given: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        found = model.head.predict(model(given), (40, 48))  # type: ignore[union-attr]
        found.square().mean().backward()
        return [found.detach(), *(p.grad.clone() for p in model.trainable().values() if p.grad is not None)]

    ours, theirs = made(), made()
    assert span(ours).kept == (0, 2)
    cache = cached(ours, tmp_path)
    for images in (image(3), image(4)):
        assert same(outcome(ours, images), outcome(theirs, images))
    assert (cache.computed, cache.read) == (4, 3)


def test_what_leaves_nothing_to_keep_says_why(tmp_path: Path) -> None:
    shadow = AdapterShadow(grid=4, detector="test_efficientnet", detector_weights="random")
    cases = [
        (LoRA(rank=2), "encoder", r"LoRA acts in block 0 \(sam.image_encoder.blocks.0.attn.qkv\)"),
        (SSF(), "both", "SSF acts at sam.image_encoder.patch_embed.proj, before the blocks"),
        (shadow, "both", "AdapterShadow acts around the whole backbone"),
    ]
    for method, part, why in cases:
        with pytest.raises(RequestError, match=f"no frozen prefix: {why}"):
            span(sam(method, part))
    task = PromptedSegmentation(sam(LoRA(rank=2), "encoder"), scenes(), Optimiser())
    with pytest.raises(RequestError, match="trainer.cache: no frozen prefix: LoRA acts in block 0"):
        fit(task, scenes(), Engine(epochs=1, device="cpu", cache={"folder": str(tmp_path / "c")}), tmp_path / "run")
    assert not list(tmp_path.iterdir())
