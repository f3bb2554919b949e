"""AdapterDrop: what rests, what that saves, how many are drawn, and where it is refused."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modalities.images.backbones import TimmViT
from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.interop import export_adapter
from shared.methods import (
    S2A,
    AdaptFormer,
    Compacter,
    LoRA,
    MoLA,
    MoSA,
    ParallelAdapter,
    Pfeiffer,
    Prefix,
    Probe,
    Prompt,
    SeriesAdapter,
)
from tests.shared.hosts import HOSTS, vit
from tests.shared.test_capabilities import out, rows

WAYS = {
    "AdaptFormer": AdaptFormer(width=4, dropout=0.0),
    "series": SeriesAdapter(width=4),
    "parallel": ParallelAdapter(width=4),
    "Pfeiffer": Pfeiffer(reduction=4),
    "LoRA": LoRA(rank=2),
    "Compacter": Compacter(reduction=4, n=2, shared_rule=False),
    "prefix": Prefix(count=2),
    "MoSA on the stream": MoSA(width=4, style="houlsby", norm=False, scale=1.0, dropout=0.0),
}


def made(method, host: str = "vit") -> tuple[Adapted, tuple[Tensor, ...]]:
    """A model whose adapters do something."""
    torch.manual_seed(0)
    backbone, inputs, sites = HOSTS[host]()
    model = adapt(backbone.eval(), method, sites=sites, example=inputs)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model, inputs


def blocks(model: Adapted, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What each block of the ViT gives."""
    found: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, y: found.append(y)) for b in model.backbone.model.blocks]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_dropped_blocks_are_the_bare_ones_and_no_gradient_enters_them(way, training):
    model, inputs = made(WAYS[way])
    model.train(training).step(0)
    with model.disabled():
        bare = blocks(model, inputs)
    whole = blocks(model, inputs)
    model.drop(2)
    dropped = blocks(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(dropped[:2], bare[:2], strict=True))
    assert not torch.allclose(dropped[2], bare[2], atol=1e-3)
    assert not torch.allclose(dropped[3], whole[3], atol=1e-3)
    assert [y.requires_grad for y in dropped] == [False, False, True, True]
    rows(model(*inputs)).square().mean().backward()
    reached = {
        n.split("/")[2].partition(".")[0] for n, p in model.trainable().items() if p.grad is not None and "/" in n
    }
    assert reached == {"2", "3"}
    model.drop(0)
    assert torch.equal(blocks(model, inputs)[3], whole[3])


def test_the_lowest_dropped_is_a_method_that_begins_higher():
    model, inputs = made(AdaptFormer(width=4))
    model.drop(3)
    other, _ = made(AdaptFormer(width=4, depth="last 1"))
    other.backbone.load_state_dict(model.backbone.state_dict())
    for (key, theirs), ours in zip(
        other.bank["default"].items(), [model.bank["default"]["model/blocks/3/mlp"]], strict=True
    ):
        assert key == "model/blocks/3/mlp"
        theirs.load_state_dict(ours.state_dict())
    assert torch.equal(out(model.eval(), inputs), out(other.eval(), inputs))


def test_what_a_step_saves_counted():
    """In units of one frozen block's forward pass: 1 forward, 1 for the gradient of its input, 0 where none enters."""
    torch.manual_seed(0)
    backbone, inputs, _ = vit()
    model = adapt(backbone, LoRA(rank=1, roles=("mlp.down",))).train()

    def flops(lowest: int) -> int:
        model.drop(lowest)
        output = rows(model(*inputs)).sum()
        with FlopCounterMode(display=False) as counter:
            output.backward()
        return counter.get_total_flops()

    found = [flops(n) for n in range(4)]
    steps = [a - b for a, b in itertools.pairwise(found)]
    assert max(steps) == min(steps) > 0  # every block dropped saves the same
    assert found[3] < 0.3 * found[0]


def test_draws_are_even_from_none_to_all_asked_for_and_evaluation_runs_all():
    model, inputs = made(AdaptFormer(width=2))
    whole = out(model.eval(), inputs)
    model.drop(0, drawn=3)
    seen = []
    for number in range(400):
        model.step(number, seed=7)
        seen.append(model.state.drawn)
    counts = collections.Counter(seen)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) - min(counts.values()) < 50  # 100 of each, 9 the standard deviation
    model.step(17, seed=7)
    assert model.state.drawn == seen[17]
    other = [(model.step(n, seed=8), model.state.drawn)[1] for n in range(400)]
    assert other != seen
    model.step(seen.index(2), seed=7)
    assert [y.requires_grad for y in blocks(model.train(), inputs)] == [False, False, True, True]
    assert torch.equal(out(model.eval(), inputs), whole)
    model.drop(1, drawn=3)
    model.step(seen.index(0), seed=7)
    assert [y.requires_grad for y in blocks(model.train(), inputs)] == [False, True, True, True]


def test_draws_of_the_methods_stay_as_they_were():
    draws = []
    for most in (0, 3):
        model, _ = made(MoSA(width=2))
        model.drop(0, drawn=most)
        model.step(5, seed=1)
        draws.append(torch.stack([a.drawn for a in model.bank["default"].values() if hasattr(a, "drawn")]))
    assert torch.equal(*draws)


def test_a_loss_of_the_method_is_of_the_blocks_that_run():
    model, inputs = made(MoLA(rank=2, experts="32", balance=0.1, roles=("mlp.up",)))
    model.train().drop(0, drawn=3)
    for number in range(6):
        model.zero_grad()
        model.step(number, seed=2)
        (rows(model(*inputs)).mean() + model.penalty()).backward()


def test_merging_and_exporting_leave_out_what_rests(tmp_path):
    model, inputs = made(LoRA(rank=2))
    before = {n: t.clone() for n, t in model.backbone.state_dict().items()}
    model.eval().drop(2)
    expected = out(model, inputs)
    model.merge()
    changed = {n for n, t in model.backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"model.blocks.{i}.attn.qkv.weight" for i in (2, 3)}
    assert torch.equal(out(model, inputs), expected)
    with pytest.raises(RequestError, match="merged into the weights; unmerge"):
        model.drop(1)
    model.unmerge()
    from safetensors import safe_open

    export_adapter(model, tmp_path, format="peft")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {n.split("blocks.")[1][0] for n in file.keys()} == {"2", "3"}  # noqa: SIM118


def test_adapters_that_are_added_are_proved_with_all_blocks():
    model, _ = made(LoRA(rank=2))
    model.drop(1)
    with pytest.raises(RequestError, match=r"dropped; drop\(0\) before adding another"):
        model.add(LoRA(rank=2), name="b")
    model.remove()
    model.add(LoRA(rank=2), name="b")
    assert model.state.lowest == 0


@pytest.mark.parametrize(
    ("method", "host", "lowest", "message"),
    [
        (LoRA(rank=2), "vit", -1, "AdapterDrop of -1 blocks: use 0 or more"),
        (LoRA(rank=2), "vit", 4, "AdapterDrop of 4 blocks: LoRA 'default' acts in blocks 0 to 3: use 1 to 3"),
        (LoRA(rank=2, depth="last 2"), "vit", 2, "acts in blocks 2 to 3: use 3 to 3"),
        (LoRA(rank=2, depth=1), "vit", 1, "acts in blocks 1 to 1: there is but one"),
        (Prefix(count=2), "llama", 1, "Prefix 'default' acts in no block"),
        (Prompt(count=2, deep=False), "vit", 1, "Prompt 'default' goes from block to block"),
        (S2A(side="ladder", bias=False, prompts=0), "vit", 1, "S2A 'default' goes from block to block"),
        (Probe(), "vit", 1, "Probe 'default' acts in no block"),
    ],
)
def test_where_it_makes_no_sense_is_one_line(method, host, lowest, message):
    model, _ = made(method, host)
    with pytest.raises(RequestError, match=message):
        model.drop(lowest)
    with pytest.raises(RequestError, match=message):
        model.drop(0, drawn=lowest)
    assert model.state.lowest == model.state.most == 0


def test_on_the_published_backbone_ten_of_twelve_blocks_can_rest():
    with torch.device("meta"):
        backbone = TimmViT(3, name="vit_base_patch16_224", weights="random", image_size=224)
    model = adapt(backbone, Pfeiffer())
    model.drop(0, drawn=10)
    assert {(model.step(n), model.state.drawn)[1] for n in range(200)} == set(range(11))
