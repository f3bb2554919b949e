"""Domain generalisation and self-training: schedule, teacher, mixing, no leak of labels, exact resume, both metrics."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modalities.remote_sensing.adaptation import DomainGeneralisation, SelfTraining, pasted_classes
from modalities.remote_sensing.data.domains import Domains
from modalities.remote_sensing.data.scenes import Scenes
from modalities.remote_sensing.heads import LightDecoder
from modalities.remote_sensing.segmentation import measure
from shared.adapted import adapt
from shared.backbone import Features
from shared.errors import RequestError
from shared.methods import LoRA
from shared.sites import describe
from shared.training import Engine, Optimiser, fit, launch
from shared.training.teacher import alpha
from tests.shared.training.test_fit import Interrupted
from tests.shared.training.test_resume import checkpoint, same

CLASSES = ("water", "field", "town")


class Blocks:
    """Rasters of 16 x 16 whose brightest band is the class of a block of 8 pixels; shift: brighter by so much.

    labels: "true", or "garbage" in the rasters that train, drawn with no regard to the image.
    """

    def __init__(self, count: int, seed: int, shift: float, labels: str = "true"):
        self.band_names: tuple[str, ...] = ("a", "b", "c")
        self.file_bands: tuple[str, ...] = self.band_names
        self.reading = {"bands": [1, 2, 3]}
        random = torch.Generator().manual_seed(seed)
        self.masks = torch.randint(0, 3, (count, 2, 2), generator=random)
        self.masks = self.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        self.images = nn.functional.one_hot(self.masks, 3).movedim(-1, 1).float() + shift
        self.images += 0.2 * torch.randn(self.images.shape, generator=random)
        self.names, self.sizes = [f"s{seed}_{i}" for i in range(count)], [(16, 16)] * count
        if labels == "garbage":
            self.masks[: count - 4] = torch.randint(0, 3, (count - 4, 16, 16), generator=random)

    def read(self, index: int, window: Any) -> Any:
        return self.images[index].numpy(), torch.ones(16, 16).bool().numpy(), self.masks[index].numpy().copy()


def domains(labels: str = "true", pairs: bool = True) -> Domains:
    found: list[Scenes] = []
    for seed, shift, kind in ((1, 0.0, "true"), (2, 0.8, labels)):
        source = Blocks(10, seed, shift, kind)
        names = tuple(source.names)
        found.append(
            Scenes(
                source, names, CLASSES, validation=names[6:8], test=names[8:], tile=None, overlap=0,
                normalisation={"mean": [0.3] * 3, "std": [0.5] * 3}, batch_size=2, workers=0, seed=0, augment=True,
            )
        )  # fmt: skip
    source, target = found
    return Domains(source, target, pairs)


class Patches(nn.Module):
    """A frozen backbone of stride 4 with two maps."""

    channels = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image: Tensor) -> Features:
        first = self.first(image).tanh()
        second = self.second(first).tanh()
        return Features((first, second), second.mean((2, 3)))


def task(data: Domains, kind: type = SelfTraining, method: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    backbone = Patches()
    head = LightDecoder(backbone.channels, 3, width=8)
    model = adapt(backbone, method or LoRA(rank=2, roles=("conv",)), head=head, sites=describe(backbone))
    return kind(model, data, Optimiser(learning_rate=1e-2), **settings)


def train(one: Any, data: Domains, output: Path, steps: int = 9, seed: int = 5, **more: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    resume = more.pop("resume", False)
    return fit(one, data, Engine(steps=steps, device="cpu", **more), output, resume=resume)


def batch_of(data: Domains) -> dict[str, Any]:
    return next(iter(DataLoader(data.train().dataset, 2)))


# -- the schedule and the loss -----------------------------------------------------------------------------------------


def test_until_the_start_the_loss_is_the_source_alone_then_half_of_the_mixed_one_more(monkeypatch) -> None:
    data = domains()
    one, batch = task(data), batch_of(data)
    supervised = one.head.loss(one.model(batch["image"]), batch["mask"]).item()
    for iteration in (0, 3999, 4000):
        monkeypatch.setattr(SelfTraining, "global_step", iteration)
        assert one.loss(batch).item() == supervised
    monkeypatch.setattr(SelfTraining, "global_step", 4001)
    torch.manual_seed(7)
    total = one.loss(batch).item()
    torch.manual_seed(7)
    mixed = one.mixed(batch)
    extra = one.head.loss(one.model(mixed["image"]), mixed["mask"]).item()
    assert total == pytest.approx(supervised + 0.5 * extra, rel=1e-6)


def test_a_training_mixes_from_the_step_after_the_start(tmp_path) -> None:
    data, mixed = domains(), []
    one = task(data, start=4)
    plain = one.mixed
    one.mixed = lambda batch: mixed.append(one.global_step) or plain(batch)
    train(one, data, tmp_path)
    assert mixed == [5, 6, 7, 8]


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_alpha() -> None:
    assert alpha(0, 0.99) == 0
    assert alpha(1, 0.99) == 0.5
    assert alpha(99, 0.99) == pytest.approx(0.99)
    assert alpha(98, 0.99) < 0.99 == alpha(5000, 0.99)


def test_the_teacher_is_the_average_of_the_students_and_trains_nothing(tmp_path) -> None:
    data = domains()
    one = task(data, start=2)
    seen: list[dict[str, Tensor]] = []
    plain = one.teacher.__class__.update

    def update(self: Any, model: Any, iteration: int) -> None:
        assert iteration == len(seen)
        seen.append({n: t.clone() for n, t in model.trained_state().items()})
        plain(self, model, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.teacher.__class__, "update", update)
        train(one, data, tmp_path, steps=7)
    expected = seen[0]
    for iteration, student in enumerate(seen[1:], 1):
        a = 1 - 1 / (iteration + 1)
        expected = {n: a * expected[n] + (1 - a) * student[n] for n in expected}
    kept = {n: t for n, t in checkpoint(tmp_path)["state_dict"].items() if n.startswith("teacher.")}
    assert kept.keys() == {f"teacher.{n}" for n in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[f"teacher.{name}"], tensor)
    assert not list(one.teacher.parameters())
    assert not any(buffer.requires_grad for buffer in one.teacher.buffers())
    optimised = {id(p) for g in one.optimiser.build(one.model, 5)[0].param_groups for p in g["params"]}
    assert optimised == {id(p) for p in one.model.trainable().values()}


def test_with_accumulated_gradients_the_teacher_moves_once_a_step(tmp_path) -> None:
    data, iterations = domains(), []
    one = task(data, start=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.teacher.__class__, "update", lambda self, model, iteration: iterations.append(iteration))
        train(one, data, tmp_path, steps=4, accumulate=2)
    assert iterations == [0, 1, 2, 3]


def test_the_teacher_answers_with_its_own_tensors_and_without_gradient() -> None:
    data = domains()
    one, image = task(data), batch_of(data)["target"]
    with torch.no_grad():
        first = one.model.eval()(image)
        one.model.train()
        for parameter in one.model.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    answer = one.teacher(one.model, image)
    assert torch.equal(answer, first)
    assert not answer.requires_grad
    assert one.model.head.training
    assert not torch.allclose(one.model(image).detach(), first, atol=1e-3)
    one.teacher.update(one.model, 0)
    with torch.no_grad():
        assert torch.equal(one.teacher(one.model, image), one.model.eval()(image))


# -- mixing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_half_of_the_classes_rounded_up_are_pasted(count) -> None:
    mask = torch.randint(0, count, (1, 32, 32))
    mask[:, :2] = 255
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pasted = pasted_classes(mask, 255)
        classes = mask[pasted].unique().tolist()
        assert len(classes) == math.ceil(count / 2)
        assert torch.equal(pasted, torch.isin(mask, torch.tensor(classes)))
        assert not pasted[:, :2].any()
        drawn.add(tuple(classes))
    assert len(drawn) == min(math.comb(count, math.ceil(count / 2)), len(drawn)) > (count > 1)


def test_samples_are_pasted_by_themselves_and_one_without_labels_not_at_all() -> None:
    mask = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 2.0), torch.full((4, 4), 255.0)]).long()
    assert pasted_classes(mask, 255).flatten(1).all(1).tolist() == [True, True, False]
    assert not pasted_classes(mask, 255)[2].any()


def test_mixed_images_and_labels_are_the_sources_exactly_where_pasted() -> None:
    data = domains()
    one, batch = task(data), batch_of(data)
    batch["target_valid"][:, 0] = False
    torch.manual_seed(3)
    pasted = pasted_classes(batch["mask"], 255)
    torch.manual_seed(3)
    mixed = one.mixed(batch)
    pseudo = one.teacher(one.model, batch["target"]).softmax(1).argmax(1)
    pseudo[:, 0] = 255  # no data there
    assert 0 < pasted.float().mean() < 1
    assert torch.equal(mixed["mask"][pasted], batch["mask"][pasted])
    assert torch.equal(mixed["mask"][~pasted], pseudo[~pasted])
    for c in range(3):
        assert torch.equal(mixed["image"][:, c][pasted], batch["image"][:, c][pasted])
        assert torch.equal(mixed["image"][:, c][~pasted], batch["target"][:, c][~pasted])


# -- what must not happen ----------------------------------------------------------------------------------------------


def test_garbage_for_labels_of_the_target_changes_nothing_in_training(tmp_path) -> None:
    for labels in ("true", "garbage"):
        data = domains(labels)
        train(task(data, start=1), data, tmp_path / labels)
    assert not torch.equal(domains().target._source.masks, domains("garbage").target._source.masks)  # type: ignore[attr-defined]
    ours, theirs = (checkpoint(tmp_path / labels) for labels in ("true", "garbage"))
    for part in ("state_dict", "optimizer_states"):
        assert same(ours[part], theirs[part])
    assert (tmp_path / "true/metrics.csv").read_text() == (tmp_path / "garbage/metrics.csv").read_text()


def test_the_comparison_above_is_sharp(tmp_path) -> None:
    """Images of the target do change training, from the first mixed step on."""
    states = []
    for number, start in enumerate((1, 1, 100, 100)):
        data = domains()
        if number % 2:
            data.target._source.images.add_(0.3)  # type: ignore[attr-defined]
        train(task(data, start=start), data, tmp_path / str(number))
        states.append(checkpoint(tmp_path / str(number))["state_dict"])
    assert not same(states[0], states[1])
    assert same(states[2], states[3])


# -- resuming ----------------------------------------------------------------------------------------------------------


def stopping(one: Any, step: int) -> Any:
    plain = one.on_train_batch_start

    def start(batch: Any, index: int) -> None:
        if one.global_step == step:
            raise Interrupted
        plain(batch, index)

    one.on_train_batch_start = start
    return one


@pytest.mark.parametrize("settings", [{}, {"save_every": 2, "accumulate": 2}])
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path, settings) -> None:
    data = domains()
    train(task(data, start=2), data, tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        train(stopping(task(data, start=2), 5), data, tmp_path / "cut", **settings)
    train(task(data, start=2), data, tmp_path / "cut", seed=99, resume=True, **settings)
    for name in ("last", "best"):
        ours, theirs = (checkpoint(tmp_path / which, name) for which in ("cut", "whole"))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "self_training"):
            assert same(ours[part], theirs[part]), (name, part)
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_a_lost_teacher_shows(tmp_path) -> None:
    data = domains()
    train(task(data, start=2), data, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(stopping(task(data, start=2), 5), data, tmp_path / "cut")
    path, state = tmp_path / "cut/checkpoints/last.ckpt", checkpoint(tmp_path / "cut")
    for name in [n for n in state["state_dict"] if n.startswith("teacher.")]:
        state["state_dict"][name] = state["state_dict"][name.removeprefix("teacher.")]
    torch.save(state, path)
    train(task(data, start=2), data, tmp_path / "cut", seed=99, resume=True)
    assert not same(checkpoint(tmp_path / "cut")["state_dict"], checkpoint(tmp_path / "whole")["state_dict"])


def test_other_settings_or_another_task_cannot_go_on(tmp_path) -> None:
    data = domains()
    train(task(data, start=2), data, tmp_path, steps=3)
    with pytest.raises(RequestError, match=r"self-training with \{'start': 2, .*\}, not with \{'start': 3"):
        train(task(data, start=3), data, tmp_path, steps=6, resume=True)
    train(task(data, DomainGeneralisation), data, tmp_path / "other", steps=3)
    with pytest.raises(RequestError, match="none of this task's"):
        task(data).load_state_dict(checkpoint(tmp_path / "other")["state_dict"])


# -- processes ---------------------------------------------------------------------------------------------------------


def _in_each(output: Path) -> None:
    for name, start in (("plain", 100), ("mixed", 1)):
        data = domains()
        found = train(task(data, start=start), data, output / name, steps=4, devices=2)
        assert all(isinstance(found["test"][score], float) for score in ("miou", "source_miou", "loss", "source_loss"))
    with pytest.raises(RequestError, match="fsdp divides the model"):
        train(task(data, start=1), data, output / "fsdp", steps=4, devices=2, strategy="fsdp")


def test_two_processes_have_one_teacher(tmp_path) -> None:
    """Without mixing, which each draws for itself, training is that of one process; with it, it goes to its end."""
    launch(2, partial(_in_each, tmp_path))
    data = domains()
    train(task(data, start=100), data, tmp_path / "alone", steps=4)
    ours, theirs = (checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "alone"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    mixed = checkpoint(tmp_path / "mixed")["state_dict"]
    assert any(not torch.allclose(mixed[name], theirs[name], atol=1e-3) for name in theirs)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DomainGeneralisation, SelfTraining])
def test_both_domains_are_measured_each_by_its_own_labels(tmp_path, kind) -> None:
    data = domains()
    one = task(data, kind)
    found = train(one, data, tmp_path)
    assert found["best"]["monitor"] == "validation/miou"
    one.eval()
    for prefix, domain in (("", data.target), ("source_", data.source)):
        counts = torch.zeros(3, 3, dtype=torch.int64)
        for batch in domain.test():
            said = one.predict(batch["image"])
            counts += torch.bincount((batch["mask"] * 3 + said).flatten(), minlength=9).view(3, 3)
        expected = measure(counts, CLASSES)
        assert found["test"][f"{prefix}miou"] == pytest.approx(expected["miou"])
        assert found["test"][f"{prefix}confusion"] == expected["confusion"]
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert {"validation/miou", "validation/source_miou", "validation/source_loss"} <= set(header.split(","))


def test_the_best_state_can_be_chosen_without_labels_of_the_target(tmp_path) -> None:
    data = domains()
    found = train(task(data, start=2), data, tmp_path, monitor="validation/source_miou")
    assert found["best"]["monitor"] == "validation/source_miou"


def test_generalisation_trains_on_the_source_alone(tmp_path) -> None:
    states = []
    for pairs in (True, False):
        data = domains(pairs=pairs)
        train(task(data, DomainGeneralisation), data, tmp_path / str(pairs))
        states.append(checkpoint(tmp_path / str(pairs))["state_dict"])
    assert same(*states)


def test_splits_are_pooled_by_domain() -> None:
    one = {"loss": 1.0, **measure(torch.tensor([[3, 1], [0, 4]]), ("a", "b"))}
    other = {"loss": 2.0, **measure(torch.tensor([[9, 0], [5, 2]]), ("a", "b"))}
    results = [{**r, **{f"source_{n}": v for n, v in s.items()}} for r, s in ((one, other), (other, one))]
    found = DomainGeneralisation.pooled(results)
    assert found["confusion"] == found["source_confusion"] == [[12, 1], [5, 6]]
    assert found["miou"] == found["source_miou"] == pytest.approx((12 / 18 + 6 / 12) / 2)


def test_adaptation_helps_where_only_the_light_differs(tmp_path) -> None:
    """The target is 1.6 deviations brighter: self-training gains on it over the source alone, by the same steps."""
    found = {}
    for kind, settings in ((DomainGeneralisation, {}), (SelfTraining, {"start": 30})):
        data = domains()
        found[kind] = train(task(data, kind, **settings), data, tmp_path / kind.__name__, steps=90, check_every=30)
    gain = found[SelfTraining]["test"]["miou"] - found[DomainGeneralisation]["test"]["miou"]
    assert gain > 0.1


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    data = domains()
    bad: list[dict[str, Any]] = [{"start": -1}, {"mixed_weight": 0.0}, {"limit": 1.0}]
    for settings in bad:
        with pytest.raises(RequestError, match="task: start"):
            task(data, **settings)
    with pytest.raises(RequestError, match="set data.pairs: true"):
        task(domains(pairs=False))
    with pytest.raises(RequestError, match="FolderDomains or GeneratedDomains"):
        task(data.source, DomainGeneralisation)  # type: ignore[arg-type]
    one, batch = task(data), batch_of(data)
    with pytest.raises(RequestError, match=r"a target image of its own size; set data.tile"):
        one.on_before_batch_transfer({**batch, "target": batch["target"][:, :, :8]}, 0)
    batch["target"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RequestError, match="an image holds NaN"):
        one.on_before_batch_transfer(batch, 0)
    both = {**batch, "domain": torch.tensor([0, 1])}
    with pytest.raises(RequestError, match="a batch is of one domain"):
        one.evaluate(both)


def test_a_method_with_passes_of_its_own_is_refused() -> None:
    class Twice(LoRA):
        def loss(self, task: Any, batch: Any) -> Tensor:
            return task.loss(batch)

    with pytest.raises(RequestError, match="Twice trains in passes of its own"):
        task(domains(), method=Twice(rank=2, roles=("conv",)))
