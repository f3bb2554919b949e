"""Pretraining: dropped patches are never seen, the losses say what they claim, and a tiny run learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalities.remote_sensing.backbones import AerialViT
from modalities.remote_sensing.data.archive import GeneratedTextures
from modalities.remote_sensing.export_weights import export_weights
from modalities.remote_sensing.heads.pretraining import PretrainingHead, positions
from modalities.remote_sensing.pretraining import Pretraining
from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import Full, Probe
from shared.training import Engine, Optimiser, fit


def make(method=None, **settings) -> tuple[Pretraining, GeneratedTextures]:
    data = GeneratedTextures(count=6, batch_size=8)
    backbone = AerialViT(3, weights="random")
    head = PretrainingHead(backbone.channels, len(data.classes), width=32)
    return Pretraining(adapt(backbone, method or Full(), head=head), data, Optimiser(), **settings), data


def test_a_run_learns_and_its_backbone_can_be_exported(tmp_path):
    torch.manual_seed(0)
    task, data = make(label_weight=0.0)
    task.optimiser = Optimiser(learning_rate=2e-3, schedule="cosine", warmup=4)
    image = next(iter(data.test()))["image"]
    with torch.no_grad():
        before = task._head.reconstruction_loss(*_rebuilt(task, image))
    results = fit(task, data, Engine(steps=16, clip=1.0, device="cpu"), tmp_path)
    assert results["steps"] == 16
    with torch.no_grad():
        assert task._head.reconstruction_loss(*_rebuilt(task, image)) < 0.95 * before

    task.model.save(tmp_path / "adapter.safetensors", metrics={"accuracy": 0.5}, extra={"recipe": {"seed": 0}})
    size = export_weights(tmp_path / "adapter.safetensors", tmp_path / "weights.safetensors")
    assert size == (tmp_path / "weights.safetensors").stat().st_size < 6e6
    loaded = AerialViT(3, checkpoint=str(tmp_path / "weights.safetensors")).eval()
    with torch.no_grad():
        ours, theirs = loaded(image).summary, task.model.backbone.eval()(image).summary
    assert torch.allclose(ours, theirs, atol=2e-2)
    assert (ours - theirs).abs().max() > 0  # half precision


def _rebuilt(task: Pretraining, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    task.eval()
    tokens, seen, hidden, grid = task._encode(image, torch.Generator().manual_seed(2))
    return task._head.reconstruct(task._backbone.final(tokens), seen, hidden, grid), image, hidden


def test_a_run_that_trained_no_backbone_cannot_be_exported(tmp_path):
    task, _ = make(Probe())
    task.model.save(tmp_path / "adapter.safetensors")
    with pytest.raises(RequestError, match="no trained backbone"):
        export_weights(tmp_path / "adapter.safetensors", tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def test_patches_that_were_dropped_do_not_reach_the_tokens():
    task, data = make(keep=0.25, rebuild=0.5)
    task.eval()
    image = next(iter(data.test()))["image"][:2]
    with torch.no_grad():
        tokens, seen, hidden, grid = task._encode(image, torch.Generator().manual_seed(1))
        assert tokens.shape == (2, 4, 192)
        assert grid == (4, 4)
        assert hidden.shape == (2, 8)
        assert all(not set(a) & set(b) for a, b in zip(seen.tolist(), hidden.tolist(), strict=True))
        shown = torch.zeros(2, 16).scatter(1, seen, 1.0).view(2, 1, 4, 4)
        shown = shown.repeat_interleave(8, 2).repeat_interleave(8, 3)
        hidden_changed = image + 3 * (1 - shown)
        assert torch.equal(task._encode(hidden_changed, torch.Generator().manual_seed(1))[0], tokens)
        assert not torch.equal(task._encode(image + shown, torch.Generator().manual_seed(1))[0], tokens)


def test_with_every_patch_the_summary_is_the_backbones():
    task, data = make(keep=0.99, rebuild=0.01)
    task.eval()
    image = next(iter(data.test()))["image"][:2]
    with torch.no_grad():
        tokens, seen, *_ = task._encode(image)
        assert seen.shape == (2, 16)
        assert torch.allclose(task._backbone.summarise(tokens), task._backbone(image).summary, atol=1e-5)


def test_the_reconstruction_loss_compares_each_hidden_patch_with_itself():
    head = PretrainingHead((192,), 4, width=32)
    image = torch.randn(2, 3, 16, 16)
    patches = torch.stack([image[..., y : y + 8, x : x + 8].reshape(2, -1) for y in (0, 8) for x in (0, 8)], 1)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-2).sqrt()
    hidden = torch.tensor([[2, 0], [3, 1]])
    values = torch.stack([target[0, [2, 0]], target[1, [3, 1]]])
    assert head.reconstruction_loss(values, image, hidden) == pytest.approx(0, abs=1e-6)
    values[0, 1] += 2.0  # an error of 4 on one of four patches
    assert head.reconstruction_loss(values, image, hidden) == pytest.approx(1, rel=1e-4)


def test_the_decoder_gets_every_token_at_its_place():
    head = PretrainingHead((192,), 4, width=32)
    head.blocks = nn.Identity()  # type: ignore[assignment]
    head.leave = nn.Identity()  # type: ignore[assignment]
    entered = []
    head.blocks.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    tokens, seen, hidden, table = (
        torch.randn(1, 2, 192),
        torch.tensor([[5, 2]]),
        torch.tensor([[0]]),
        positions((2, 3), 32),
    )
    values = head.reconstruct(tokens, seen, hidden, (2, 3))
    assert torch.allclose(values[0, 0], head.unseen_token + table[0], atol=1e-5)
    assert torch.allclose(entered[0][0, :2], head.enter(tokens[0]) + table[[5, 2]], atol=1e-5)


def test_positions_differ_everywhere():
    table = positions((3, 5), 32)
    assert table.shape == (15, 32)
    assert torch.cdist(table, table).add(torch.eye(15)).min() > 0.1


@pytest.mark.parametrize(("labels", "pixels"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.5)])
def test_a_weight_of_zero_leaves_its_part_of_the_head_frozen(labels, pixels):
    task, data = make(label_weight=labels, pixel_weight=pixels)
    task.loss(next(iter(data.train()))).backward()
    trained = task.model.trainable()
    assert all(p.grad is not None for p in trained.values())
    assert any(n.startswith("head.classify") for n in trained) == (labels > 0)
    assert any(n.startswith("head.leave") for n in trained) == (pixels > 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.0},
        {"keep": 0.5, "rebuild": 0.6},
        {"rebuild": 0.0},
        {"label_weight": 0.0, "pixel_weight": 0.0},
        {"pixel_weight": -1.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(RequestError, match="task: (keep|label_weight)"):
        make(**settings)
