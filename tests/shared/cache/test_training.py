"""Training through the cache: bit for bit what it is without, resumed, with workers and in several processes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.images.classification import Classification
from modalities.remote_sensing.segmentation import Segmentation
from shared import methods, plan, recipe, run
from shared.errors import RequestError
from shared.method import Method
from shared.training import Engine, Optimiser, fit
from tests.shared.cache.models import Count
from tests.shared.cache.training import CHECK, EPOCHS, TRAIN, data, engine, task, train
from tests.shared.training.test_fit import Interrupted, interrupt, rows_of
from tests.shared.training.test_resume import checkpoint, same


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without a cache."""
    output = tmp_path_factory.mktemp("plain")
    train(output, None)
    return output


def check_same(ours: Path, theirs: Path) -> None:
    for name in ("last", "best"):
        a, b = checkpoint(ours, name), checkpoint(theirs, name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(a[part], b[part]), (name, part)
    assert (ours / "metrics.csv").read_text() == (theirs / "metrics.csv").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_training_is_bit_for_bit_training_without_it(plain: Path, tmp_path: Path, caplog, workers: int) -> None:
    caplog.set_level(logging.INFO, "omniadapt")
    train(tmp_path / "run", tmp_path / "cache", given=data(workers=workers))
    check_same(tmp_path / "run", plain)
    assert "2 of 4 blocks lie below the lowest adapter" in caplog.text
    assert f"cache: {TRAIN + CHECK} images were computed, {(EPOCHS - 1) * (TRAIN + CHECK)} came from it" in caplog.text
    caplog.clear()
    train(tmp_path / "again", tmp_path / "cache", given=data(workers=workers))
    check_same(tmp_path / "again", plain)
    assert f"cache: 0 images were computed, {EPOCHS * (TRAIN + CHECK)} came from it" in caplog.text


def test_frozen_blocks_rest_after_the_first_epoch(tmp_path: Path) -> None:
    """Of the training; the test at the end runs the whole model, as it will be used."""
    watched, given = task(), data()
    count, epochs = Count(watched.model.backbone.blocks[0].attn), []  # type: ignore[index]
    plain = watched.on_train_batch_start

    def start(batch: Any, number: int) -> None:
        if number == 0:
            epochs.append(count.samples)
        plain(batch, number)

    watched.on_train_batch_start = start  # type: ignore[method-assign]
    fit(watched, given, engine(tmp_path / "cache"), tmp_path / "run")
    known = 4  # the images that the prefix is known by, together and alone
    assert epochs == [0, *[TRAIN + CHECK + known] * (EPOCHS - 1)]
    assert count.samples == TRAIN + CHECK + known + 3
    assert watched.model.cache is None


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_rounded_training_stays_near(plain: Path, tmp_path: Path, precision: str) -> None:
    train(tmp_path / "run", tmp_path / "cache", precision)
    ours, theirs = (
        [float(row["validation/loss"]) for row in rows_of(path) if row["validation/loss"]][-1]
        for path in (tmp_path / "run", plain)
    )
    off = abs(ours - theirs) / theirs
    assert 0 < off < {"float16": 1e-3, "int8": 2e-2}[precision]


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, precision: str) -> None:
    """Stopped within an epoch; resumed with the cache as it was left, and with an empty one."""
    train(tmp_path / "whole", tmp_path / "a", precision, save_every=1)
    for cache in ("b", "c"):
        output = tmp_path / f"run {cache}"
        torch.manual_seed(11)
        with pytest.raises(Interrupted):
            fit(interrupt(task(), epoch=1, batch=2), data(), engine(tmp_path / "b", precision, save_every=1), output)  # type: ignore[arg-type]
        fit(task(), data(), engine(tmp_path / cache, precision, save_every=1), output, resume=True)
        check_same(output, tmp_path / "whole")


def test_views_take_turns_and_are_each_kept_once(tmp_path: Path, caplog) -> None:
    """Random crops, of which each image has two; the weights are those of the same views without room for any."""
    caplog.set_level(logging.INFO, "omniadapt")
    given = data(crop=0.3)
    seen: list[list[torch.Tensor]] = []

    class Seen(Classification):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen.append([])
            seen[-1] += list(batch["image"])
            super().on_train_batch_start(batch, batch_idx)

    for name, room in (("room", 1.0), ("none", 1e-9)):
        torch.manual_seed(11)
        watched = Seen(task(given=given).model, given, Optimiser(learning_rate=1e-2, schedule="cosine"))
        settings = {"precision": "float16", "views": 2, "gigabytes": room, "folder": str(tmp_path / name)}
        fit(watched, given, replace(engine(None), cache=settings), tmp_path / f"run {name}")
    check_same(tmp_path / "run room", tmp_path / "run none")
    epochs = [sorted(hash(image.numpy().tobytes()) for image in images) for images in seen[:EPOCHS]]
    assert epochs[0] == epochs[2] != epochs[1] == epochs[3]
    assert not set(epochs[0]) & set(epochs[1])
    orders = [[hash(image.numpy().tobytes()) for image in images] for images in seen[:EPOCHS]]
    assert orders[0] != orders[2], "the order is another in every epoch"
    assert f"cache: {2 * TRAIN + CHECK} images were computed" in caplog.text


def test_without_a_cache_every_epoch_draws_its_own(tmp_path: Path) -> None:
    given = data(crop=0.3)
    watched, seen = task(given=given), []
    plain = watched.on_train_batch_start
    watched.on_train_batch_start = lambda batch, number: (seen.extend(batch["image"]), plain(batch, number))[1]  # type: ignore[method-assign]
    fit(watched, given, engine(None), tmp_path)
    assert len({image.numpy().tobytes() for image in seen}) >= EPOCHS * TRAIN - 3  # small crops may fall together


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (methods.Full(), "trainer.cache: no frozen prefix: weights of the backbone train at model"),
        (methods.LoRA(rank=2), r"trainer.cache: no frozen prefix: LoRA acts in block 0 \(model.blocks.0.attn.qkv\)"),
    ],
    ids=["full", "all blocks"],
)  # fmt: skip
def test_a_cache_that_is_asked_for_in_vain_is_an_error_before_anything_is_written(
    tmp_path: Path, method: Method, why: str
) -> None:
    with pytest.raises(RequestError, match=why):
        fit(task(method), data(), engine(tmp_path / "cache"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_task_that_redraws_its_images_is_refused(tmp_path: Path) -> None:
    class Redrawing(Classification):
        exposure = 0.5
        redraws = Segmentation.redraws

    made = Redrawing(task().model, data(), Optimiser())
    with pytest.raises(RequestError, match="changes the images at random in every step.*: set task.exposure to 0"):
        fit(made, data(), engine(tmp_path), tmp_path / "run")
    Redrawing.exposure = 0.0
    assert made.redraws == ""


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        ({"precison": "int8"}, "trainer.cache.precison: no such setting; nearest: 'precision'"),
        ({"size": 3}, r"trainer.cache.size: no such setting \(it has: precision, views, gigabytes, folder\)"),
        ({"precision": "int4"}, "trainer.cache.precision 'int4': use exact, float16, int8"),
        ({"views": 0}, "trainer.cache.views 0: use a whole number"),
        ({"gigabytes": -1}, "trainer.cache.gigabytes -1: use a number above 0"),
        ({"folder": 3}, "trainer.cache.folder 3: give the path"),
    ],
)
def test_a_wrong_setting_is_one_line(cache: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        Engine(epochs=1, cache=cache)


def test_divided_models_have_no_cache() -> None:
    with pytest.raises(RequestError, match="under 'fsdp' every process has to run every block"):
        Engine(epochs=1, devices=2, strategy="fsdp", cache={})


SMALL = """
task: {type: Classification}
data: {type: GeneratedImages, count: 5, classes: [disc, checks], side: 32, size: 32, crop: 1, flip: null, batch_size: 4}
backbone: {type: AerialViT}
method: {type: LoRA, rank: 2, depth: last 2}
head: {type: LinearHead}
trainer: {epochs: 3, device: cpu, cache: {precision: int8, folder: FOLDER}}
"""


def small(tmp_path: Path, *overrides: str) -> recipe.Recipe:
    (tmp_path / "small.yaml").write_text(SMALL.replace("FOLDER", str(tmp_path / "cache")))
    return recipe.load(str(tmp_path / "small.yaml"), overrides)


def test_a_recipe_says_it_in_one_place(tmp_path: Path) -> None:
    found = run.run(small(tmp_path), tmp_path / "run")
    assert found["predicted"] is not None
    assert "cache: 8 images were computed" in (tmp_path / "run" / "log.txt").read_text()
    (other,) = tmp_path.glob("cache/*/identity.json")
    assert '"precision": "int8"' in other.read_text()


def test_a_recipe_whose_method_leaves_nothing_is_refused_before_its_directory_exists(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"trainer.cache: no frozen prefix: LoRA acts in block 0"):
        run.run(small(tmp_path, "method.depth=all"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_another_folder_and_size_but_no_other_precision(tmp_path: Path) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(small(tmp_path).text())
    run.check_same(small(tmp_path, "trainer.cache.folder=elsewhere", "trainer.cache.gigabytes=3"), written)
    for change in ("precision=exact", "views=2"):
        with pytest.raises(RequestError, match=r"trainer.cache.\w+ was .*, now"):
            run.check_same(small(tmp_path, f"trainer.cache.{change}"), written)


def test_a_prediction_tells_first_epochs_from_later_ones() -> None:
    watch = plan._Watch(cached=True)
    watch.steps, watch.waits = [9.0, 5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 1.0], [3.0, *[0.5] * 7]
    watch.checks, watch.after = [[20.0, 24.0, 28.0], [40.0, 41.0, 42.0]], 4.0
    assert watch.step == 1.0
    chosen = Engine(epochs=6, check_every=2, cache={"views": 2})
    # The loader's start; 59 waits; 60 batches of 1, of which 20 take 4 more; 3 checks of 4 and 8 more validation
    # batches of 1, and the first check 3 more for each of 10.
    expected = 3 + 59 * 0.5 + 60 + 20 * 4 + 3 * (4 + 8) + 3 * 10
    assert watch.training(chosen, batches=10, validation=10) == expected
