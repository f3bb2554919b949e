"""What a recipe will cost: counts that follow from shapes, sentences that follow from numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared import forecast
from shared.adapted import adapt
from shared.counted import counted
from shared.methods import Full, LoRA, Probe
from shared.training import Engine, Optimiser
from tests.shared.hosts import HOSTS
from tests.shared.training.problem import Line

DEPTH, TOKENS, WIDTH = 4, 17, 12


class Sum(nn.Module):
    """A head that trains one number and needs the sum of the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features, size) -> torch.Tensor:
        return self.scale * features.summary.sum(1, keepdim=True)


def task(method) -> tuple[Line, dict]:
    torch.manual_seed(0)
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, method, head=Sum())
    return Line(model, Optimiser(learning_rate=1e-2)), {"x": image, "y": torch.zeros(len(image), 1), "name": [""]}


def test_backward_counts_what_goes_down_to_the_lowest_adapter():
    found = {}
    for name, method in (
        ("probe", Probe()),
        ("last", LoRA(rank=2, depth="last 1")),
        ("all", LoRA(rank=2)),
        ("full", Full()),
    ):
        line, batch = task(method)
        state = {n: t.clone() for n, t in line.model.named_parameters()}
        found[name] = counted(line, batch, Engine(epochs=1))
        assert all(torch.equal(t, state[n]) for n, t in line.model.named_parameters())
        assert all(p.grad is None for p in line.model.parameters())
    blocks = found["all"].blocks[0]
    assert [found[name].blocks for name in ("probe", "last", "all")] == [(blocks, 0), (blocks, 1), (blocks, blocks)]
    assert found["probe"].backward_flops == 0 < found["last"].backward_flops < found["all"].backward_flops
    assert found["all"].backward_flops < found["full"].backward_flops
    # All products have a gradient of their input and of their weight; the first, of the patches, has the latter alone.
    assert 1.8 < found["full"].backward_flops / found["full"].forward_flops < 2.6
    assert found["probe"].saved_bytes < found["last"].saved_bytes < found["all"].saved_bytes
    assert all(each.full_seconds > 0 < each.limit_seconds for each in found.values())


def test_products_and_attention_are_counted_exactly():
    line, batch = task(Probe())
    model = line.model
    expected = 0

    def add(module: nn.Module, args, output) -> None:
        nonlocal expected
        if isinstance(module, nn.Linear):
            expected += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            expected += 2 * output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.backbone.modules()]
    with torch.no_grad():
        model(batch["x"])
    for hook in hooks:
        hook.remove()
    blocks = [site.module for site in model.sites() if site.role == "block"]
    tokens, width = 16, blocks[0].attn.qkv.in_features  # type: ignore[union-attr]
    seen = []
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    counts = counted(line, batch, Engine(epochs=1)).forward_flops
    samples, tokens, width = seen[0]
    attention = len(blocks) * 2 * 2 * samples * tokens * tokens * width  # scores, and their products with values
    assert counts == expected + attention


BASE = {
    "step_seconds": 0.1, "own_seconds": 0.1, "limit_seconds": 0.08, "full_seconds": 0.15, "forward_seconds": 0.04,
    "blocks": (12, 12), "trained_backbone": False, "wait_share": 0.01, "workers": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said", "unsaid"),
    [
        ({}, ["1.25 of its limit (80.0 ms", "0.67 of a step of full fine-tuning, 150 ms",
              "last 4 of 12 blocks alone it would take 60.0 ms, and 33.3 ms"], ["not faster", "waits"]),
        ({"full_seconds": 0.1}, ["not faster than full fine-tuning, 100 ms a step: it takes 1.00 of that"], []),
        ({"own_seconds": 0.05}, ["0.62 of its limit (160 ms"], []),  # a slower moment: ratios hold, seconds follow
        ({"blocks": (12, 4)}, ["1.25 of its limit"], ["blocks alone"]),
        ({"blocks": (12, 0)}, ["Nothing in the backbone trains"], ["blocks alone"]),
        ({"trained_backbone": True}, ["The backbone trains; without gradients of its weights"], ["full fine-tuning"]),
        ({"wait_share": 0.2}, ["waits for data 20% of its time: data.workers=1"], []),
        ({"wait_share": 0.2, "workers": 2}, [], ["waits"]),
    ],
)  # fmt: skip
def test_advice_follows_from_the_numbers(changed, said, unsaid):
    text = " ".join(forecast.advice(BASE | changed))
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)
