"""The cache in use: every bit as without it, no frozen block twice, and never a record of something else."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modalities.images.data import ImageFolders
from modalities.remote_sensing.cloud_adapter import CloudAdapter
from shared import catalog, methods
from shared.adapted import Adapted, adapt
from shared.cache import span
from shared.cache.store import _Shard
from shared.errors import RequestError
from tests.shared.cache.models import BLOCKS, Count, cached, images, model, outcome, same, vit
from tests.shared.cache.test_span import LADDER
from tests.shared.hosts import clip

CASES = {
    "probe": lambda: methods.Probe(),
    "lora": lambda: methods.LoRA(rank=2, depth="last 2"),
    "prompt": lambda: methods.Prompt(count=2, depth="last 1"),
    "cloud": lambda: CloudAdapter(width=4, stages=1, depth="last 2"),
    "ladder": lambda: LADDER,
    "final norm": lambda: methods.NormTuning(tags=("final",)),
}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_without_it_bit_for_bit(tmp_path: Path, case: str, maps: bool) -> None:
    """The first time, when all is computed, when half is, and when nothing is."""
    ours, theirs = (model(CASES[case](), maps=maps) for _ in range(2))
    image = images(6)
    cache = cached(ours, tmp_path)
    for part in (image[:4], image, image.flip(0)):
        assert same(outcome(ours, part), outcome(theirs, part))
    assert (cache.computed, cache.read) == (6, 10)


def test_every_method_with_a_depth_is_bit_for_bit_what_it_was(tmp_path: Path) -> None:
    """Whatever it does around the blocks above: those that find no site in the last two blocks, or act around
    the whole model too, are left out."""
    done = []
    for entry in catalog.entries("method"):
        kind = entry.load()
        if not any(argument.name == "depth" for argument in entry.arguments):
            continue
        torch.manual_seed(0)
        try:
            ours = model(kind(depth="last 2"), maps=True)
            span(ours)
        except (RequestError, TypeError):
            continue
        if ours.unprepared():
            continue
        theirs = copy.deepcopy(ours)
        cache = cached(ours, tmp_path / entry.name)
        for _ in range(2):
            results = []
            for each in (ours, theirs):
                torch.manual_seed(5)
                results.append(outcome(each, images()))
            assert same(*results), entry.name
        assert cache.read == 5, entry.name
        done.append(entry.name)
    assert len(done) >= 8, done


def test_other_towers_and_extras_of_blocks_go_through_it_too(tmp_path: Path) -> None:
    """open_clip's, whose attention is read without calls; EVA's, whose blocks are also given rotary positions."""
    method = methods.LoRA(rank=2, depth="last 2", roles=("attention.value",))
    for make in (lambda: clip()[0], lambda: vit(name="eva02_tiny_patch14_224", embed_dim=32)):
        ours, theirs = (adapt(make(), method) for _ in range(2))
        image = images(size=ours.backbone.image_size[0])  # type: ignore[index]
        for read in (0, 5):
            cache = cached(ours, tmp_path)
            (a_maps, a), (b_maps, b) = ours(image), theirs(image)
            assert same([a, *a_maps], [b, *b_maps])
            assert cache.read == read


def test_frozen_blocks_run_once_for_each_image(tmp_path: Path) -> None:
    made, image = model(), images(6)
    cached(made, tmp_path)
    made(image[:1])  # and what the prefix is known by
    counts = [Count(block) for block in made.backbone.blocks]  # type: ignore[union-attr]
    made.cache.forget()  # hooks are part of what a backbone is
    made(image[:1])
    for count in counts:
        count.calls = count.samples = 0
    for part in (image[:4], image[2:], image, image.flip(0), image):
        made(part)
    assert [count.samples for count in counts] == [5, 5, 26, 26]
    for count in counts:
        count.calls = 0
    made(image)
    assert [count.calls for count in counts] == [0, 0, 1, 1]


@pytest.mark.parametrize("case", ["probe", "ladder"])
def test_a_probe_and_a_side_network_need_no_block_at_all(tmp_path: Path, case: str) -> None:
    made, image = model(CASES[case]()), images(6)
    counts = [Count(block.attn) for block in made.backbone.blocks]  # type: ignore[union-attr]
    cached(made, tmp_path)
    made(image)
    for count in counts:
        count.calls = 0
    outcome(made, image)
    assert [count.calls for count in counts] == [0] * BLOCKS


def test_another_process_finds_what_one_has_kept(tmp_path: Path) -> None:
    for precision in ("exact", "float16", "int8"):
        for computed in (5, 0):
            cache = cached(made := model(), tmp_path, precision)
            made(images())
            assert (cache.computed, cache.read) == (computed, 5 - computed)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_the_later_blocks_are_given_does_not_depend_on_what_was_kept(tmp_path: Path, precision: str) -> None:
    """Found, new, and left out for want of room: the same bits; and near the exact ones."""
    exact = outcome(model(), images())
    results = []
    for folder, room in ((tmp_path / "a", 20.0), (tmp_path / "a", 20.0), (tmp_path / "b", 1e-9)):
        made = model()
        cached(made, folder, precision, gigabytes=room)
        results.append(outcome(made, images()))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert not list((tmp_path / "b").glob("*/*.data"))
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(results[0], exact, strict=True))
    assert 0 < off < {"float16": 2e-3, "int8": 6e-2}[precision]


def weights(made: Adapted) -> None:
    with torch.no_grad():
        made.backbone.model.blocks[1].mlp.fc1.weight[3, 4] += 1e-3  # type: ignore[union-attr]


def positions(made: Adapted) -> None:
    with torch.no_grad():
        made.backbone.model.pos_embed[0, 1, 0] += 1e-3  # type: ignore[union-attr]


def swapped(made: Adapted) -> None:
    layer: Any = made.backbone.model.blocks[0].mlp.fc1  # type: ignore[union-attr]
    layer.weight = nn.Parameter(layer.weight * 1.01, requires_grad=False)


def setting(made: Adapted) -> None:
    made.backbone.model.blocks[0].norm1.eps = 1e-2  # type: ignore[union-attr]


def hooked(made: Adapted) -> None:
    made.backbone.blocks[0].register_forward_hook(lambda module, args, output: output * 1.01)  # type: ignore[index]


def replaced(made: Adapted) -> None:
    block: Any = made.backbone.blocks[0]  # type: ignore[index]
    block.mlp.act = nn.SiLU().eval()


def patched(made: Adapted) -> None:
    block: Any = made.backbone.blocks[1]  # type: ignore[index]
    plain = block.mlp.forward
    block.mlp.forward = lambda x: plain(x) * 1.01


CHANGES: dict[str, Callable[[Adapted], None]] = {
    "weights": weights, "positions": positions, "swapped": swapped, "setting": setting, "hooked": hooked,
    "replaced": replaced, "patched": patched,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "in_use"),
    [*((change, False) for change in CHANGES), ("weights", True), ("positions", True), ("swapped", True)],
)
def test_a_backbone_that_computes_something_else_finds_nothing(tmp_path: Path, change: str, in_use: bool) -> None:
    """Changed before the cache is opened; where tensors change, also while it is in use."""
    before = model()
    cached(before, tmp_path)
    plain = outcome(before, images())
    made = before if in_use else model()
    CHANGES[change](made)
    cache = made.cache or cached(made, tmp_path)
    cache.computed = cache.read = 0
    ours = outcome(made, images())
    assert (cache.computed, cache.read) == (5, 0)
    made.cache = None
    assert same(ours, outcome(made, images()))
    assert not same(ours, plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: model(backbone=vit(num_heads=2)), lambda: model(backbone=vit(num_heads=4))),  # equal tensors
        (lambda: model(backbone=vit(seed=0)), lambda: model(backbone=vit(seed=1))),
        (lambda: model(methods.LoRA(depth="last 2")), lambda: model(methods.LoRA(depth="last 1"))),
        (lambda: model(), lambda: model(maps=True)),
        (lambda: model(), lambda: model().double()),
    ],
    ids=["heads", "seed", "depth", "maps", "dtype"],
)  # fmt: skip
def test_another_model_finds_nothing(tmp_path: Path, one: Any, other: Any) -> None:
    for make in (one, other, one, other):
        made, plain = make(), make()
        image = images().to(next(made.parameters()).dtype)
        cached(made, tmp_path)
        assert same(outcome(made, image), outcome(plain, image))
    assert len(list(tmp_path.glob("*/*.data"))) == 2


def test_other_precisions_and_computations_are_kept_apart(tmp_path: Path) -> None:
    made = model()
    for precision in ("exact", "float16", "int8"):
        cache = cached(made, tmp_path, precision)
        made(images())
        assert cache.computed == 5
    cache = cached(made, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        ours = [made(images()).detach()]
        assert cache.computed == 5
        made.cache = None
        assert same(ours, [made(images()).detach()])
    assert len(list(tmp_path.glob("*/*.data"))) == 4


def test_images_that_differ_in_one_bit_in_size_or_in_dtype_are_others(tmp_path: Path) -> None:
    made, image = model(), images(1)
    cache = cached(made, tmp_path)
    nearly, zero, negative = image.clone(), torch.zeros_like(image), -torch.zeros_like(image)
    nearly.view(torch.int32)[0, 0, 0, 0] ^= 1
    wide, high = images(1, size=32)[:, :, :16], images(1, size=32)[:, :, :, :16]  # as many numbers
    for each in (image, nearly, zero, negative, wide, high.reshape(wide.shape), high):
        made(each)
    assert (cache.computed, cache.read) == (7, 0)
    made(image)
    assert cache.read == 1


def test_another_file_of_the_same_name_and_another_transform_find_nothing(tmp_path: Path) -> None:
    """Which files, names, sizes and dates there are is not asked: only what the model is given counts."""
    for label in ("a", "b"):
        (tmp_path / "root" / label).mkdir(parents=True)
        for number in range(4):
            _photograph(tmp_path / "root" / label / f"{number}.png", seed=number + 10 * (label == "b"))
    computed = []
    for change in (None, None, "file", "size", "normalisation", "crop", None):
        for number in range(4 if change == "file" else 0):
            _photograph(tmp_path / "root" / "a" / f"{number}.png", seed=90 + number)
        settings: dict[str, Any] = {"size": 16, "crop": 1.0, "normalisation": {"mean": [120] * 3, "std": [60] * 3}}
        settings |= {"size": 32} if change == "size" else {}
        settings |= {"normalisation": {"mean": [121] * 3, "std": [60] * 3}} if change == "normalisation" else {}
        settings |= {"crop": 0.3} if change == "crop" else {}
        folders = ImageFolders(root=tmp_path / "root", flip=None, batch_size=8, **settings)
        made = model()
        cache = cached(made, tmp_path / "cache")
        (batch,) = folders.train()
        made(batch["image"])
        computed.append(cache.computed)
    assert len(batch["image"]) == 4
    assert computed == [4, 0, 2, 4, 4, 4, 0]


def _photograph(path: Path, seed: int) -> None:
    """Noise of 40 x 40 pixels; the date is always the same."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    os.utime(path, (1e9, 1e9))


def test_the_code_that_computes_is_part_of_what_a_record_is_of(tmp_path: Path, monkeypatch) -> None:
    """The same module, its file changed."""
    source = "from modalities.images.backbones import TimmViT\n\nclass Own(TimmViT):\n    pass\n"
    found = []
    for text in (source, source, source.replace("pass", "scale = 1")):
        (tmp_path / "own_backbone.py").write_text(text)
        spec = importlib.util.spec_from_file_location("own_backbone", tmp_path / "own_backbone.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_backbone", module)
        spec.loader.exec_module(module)
        backbone = module.Own(3, name="vit_tiny_patch16_224", image_size=16, patch_size=8, weights="random",
                              model_args={"embed_dim": 24, "depth": 4, "num_heads": 2})  # fmt: skip
        cache = cached(made := model(backbone=backbone), tmp_path / "cache")
        made(images())
        found.append(cache.computed)
    assert found == [5, 0, 5]
    monkeypatch.delitem(sys.modules, "own_backbone")
    cached(made, tmp_path / "cache")
    with pytest.raises(RequestError, match="no source file of own_backbone"):
        made(images())


def test_damaged_files_are_computed_again(tmp_path: Path) -> None:
    made, plain = model(), model()
    cached(made, tmp_path)
    made(images())
    for damage in (lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), lambda b: b[::-1]):
        for path in tmp_path.glob("*/*.data"):
            path.write_bytes(damage(path.read_bytes()))
        cache = cached(made, tmp_path)
        assert same(outcome(made, images()), outcome(plain, images()))
        assert cache.computed > 0
        assert same(outcome(made, images()), outcome(plain, images()))


def test_switching_adapters_switches_what_is_frozen(tmp_path: Path, caplog) -> None:
    made = model()
    cache = cached(made, tmp_path)
    made(images())
    made.add(methods.LoRA(rank=2, depth="last 1"), name="top")
    made.add(methods.LoRA(rank=2), name="everywhere")
    image = images()
    for names in (("default",), ("top",), ("everywhere",), ()):
        made.activate(*names)
        ours = made(image)
        made.cache, kept = None, made.cache
        assert torch.equal(ours, made(image))
        made.cache = kept
    assert (cache.computed, cache.read) == (15, 5)
    assert caplog.text.count("the cache is left out with the adapters everywhere") == 1
    rows = made(image, adapters=["default", "top", None, "top", "everywhere"])
    made.cache = None
    assert torch.equal(rows, made(image, adapters=["default", "top", None, "top", "everywhere"]))


def test_an_adapter_put_in_anothers_place_is_seen(tmp_path: Path) -> None:
    made = model()
    cached(made, tmp_path)
    made(images())
    made.remove()
    made.add(methods.LoRA(rank=2))
    for parameter in made.trainable().values():
        parameter.data += 0.1
    ours = outcome(made, images())
    made.cache = None
    assert same(ours, outcome(made, images()))


def test_an_image_that_takes_a_gradient_goes_around_it(tmp_path: Path) -> None:
    made, image = model(), images().requires_grad_(True)
    cache = cached(made, tmp_path)
    made(image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert cache.computed == 0


def test_copies_of_a_model_have_a_cache_of_their_own_model(tmp_path: Path) -> None:
    made = model()
    cached(made, tmp_path)
    made(images())
    other = copy.deepcopy(made)
    assert other.cache is not None
    assert other.cache.model is other
    assert torch.equal(other(images()), made(images()))
    assert (other.cache.computed, other.cache.read) == (0, 5)


def test_what_is_measured_before_training_runs_the_whole_model(tmp_path: Path) -> None:
    made = model()
    count = Count(made.backbone.blocks[0])  # type: ignore[index]
    cache = cached(made, tmp_path)
    made.methods["default"] = Measuring(rank=2, depth="last 2")
    made.prepare([images()], lambda batch: made(batch).sum())
    assert (cache.computed, count.samples) == (0, 5)
    assert made.cache is cache


class Measuring(methods.LoRA):
    def prepare(self, model: Any, name: str, batches: Any, loss: Any) -> None:
        for batch in batches:
            loss(batch)


def test_a_backbone_that_mixes_the_images_of_a_batch_is_refused(tmp_path: Path) -> None:
    made = model()
    made.backbone.blocks[0].register_forward_hook(mixed)  # type: ignore[index]
    cached(made, tmp_path)
    with pytest.raises(RequestError, match="depends on the others of its batch, so its prefix cannot be kept"):
        made(images())


def mixed(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + output.mean(0, keepdim=True)


def test_what_blocks_get_beside_tokens_must_follow_from_the_size(tmp_path: Path) -> None:
    made = adapt(vit(name="eva02_tiny_patch14_224", embed_dim=32), methods.LoRA(rank=2, depth="last 2"))
    cached(made, tmp_path)
    made(images())
    plain = made.backbone.embed
    made.backbone.embed = lambda image: plain(image)._replace(extras={"rope": image.mean()})  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="differs between images of one size"):
        made(images(seed=9))


def test_a_coming_batch_is_read_ahead(tmp_path: Path, monkeypatch) -> None:
    """Only what is there, and only once the model has said what it needs; a batch without images is none."""
    made, asked = model(), []
    cache = cached(made, tmp_path)
    cache.expect({"image": images()})
    made(images())
    monkeypatch.setattr(_Shard, "expect", lambda shard, offset, length: asked.append((offset, length)))
    cache.expect({"image": torch.cat([images(), images(3, seed=9)])})
    cache.expect({"text": images()})
    cache.expect([images()])
    cache.close()
    length = 16 + 4 * (1 + 4) * 24
    assert asked == [(i * length, length) for i in range(5)]
    cache.close()


def test_a_tuned_model_is_spanned_where_it_says(tmp_path: Path) -> None:
    """``span`` is what the calls go by."""
    made = model(methods.LoRA(rank=2, depth=[3]))
    cached(made, tmp_path)
    made(images())
    (path,) = tmp_path.glob("*/*.data")
    assert span(made).kept == (2,)
    assert path.stat().st_size == 5 * (16 + 4 * (1 + 4) * 24)
