"""MoSA: masks, draws, merging and the two passes (its spec's "What must hold"), its counts and files."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modalities.images.backbones import TimmViT
from shared.adapted import adapt
from shared.blocks.split import Split, owners, symmetric_divergence
from shared.blocks.split_adapters import SplitBottleneck
from shared.errors import RequestError, WorkError
from shared.interop.mosa import load_official, merged_state
from shared.methods import MoSA
from tests.shared.hosts import SMALL_TEXT, bert, bloom, llama, vit


class Scores:
    """A task whose outputs are class scores."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def outputs(self, batch: Tensor) -> Tensor:
        self.seen.append(self.model(batch).summary[:, :6])
        return self.seen[-1]

    def criterion(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs, torch.arange(len(outputs)))

    def loss(self, batch: Tensor) -> Tensor:
        return self.criterion(self.outputs(batch), batch)


def model(**arguments):
    torch.manual_seed(1)
    backbone, (image,), _ = vit()
    return adapt(backbone, MoSA(**{"width": 4, "dropout": 0.0, **arguments})), image


def adapters(adapted) -> list[SplitBottleneck]:
    return [a for a in adapted.bank["default"].values() if isinstance(a, SplitBottleneck)]


def draw(adapted, down: int, up: int) -> None:
    for adapter in adapters(adapted):
        adapter.drawn[:], adapter.turn = torch.tensor([down, up]), 0


def trained(adapted, image, steps: int = 4):
    optimiser = torch.optim.AdamW(adapted.trainable().values(), 0.02, weight_decay=0.1)
    task = Scores(adapted.train())
    for number in range(steps):
        adapted.step(number, seed=5)
        optimiser.zero_grad()
        adapted.loss(task, image).backward()
        optimiser.step()
    return adapted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 6), st.integers(0, 1000))
def test_masks_are_disjoint_whole_and_even(rows, columns, experts, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    masks = torch.stack([owners(scores, experts) == e for e in range(experts)])
    assert torch.equal(masks.sum(0), torch.ones(rows, columns, dtype=torch.long))
    sizes = masks.sum((1, 2))
    assert int(sizes.max() - sizes.min()) <= 1
    ordered = [scores[mask] for mask in masks if mask.any()]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(ordered))


def test_it_is_its_formula_on_the_residual_stream():
    adapted, image = model(share="none")
    trained(adapted, image)
    block, adapter = adapted.backbone.model.blocks[0], adapters(adapted)[0]
    draw(adapted, 1, 3)
    tokens = adapted.backbone.embed(image).tokens

    def expected(down, up):
        h = tokens + block.attn(block.norm1(tokens))
        with adapted.disabled():
            plain = h + block.mlp(block.norm2(h))
        return plain + 0.1 * F.linear(F.gelu(F.linear(adapter.norm(h), *down)), *up)

    def expert(layer, index):
        start = 0 if layer.start is None else layer.start
        return start + (layer.weight - start) * (layer.owner == index), layer.bias[index]

    drawn = expected(expert(adapter.down, 1), expert(adapter.up, 3))
    merged = expected(adapter.down.merged(), adapter.up.merged())
    assert torch.allclose(block(tokens), drawn, atol=1e-5)
    adapted.eval()
    assert torch.allclose(block(tokens), merged, atol=1e-5)
    assert not torch.allclose(drawn, merged, atol=1e-3)
    mean = [torch.stack([expert(adapter.down, e)[i] for e in range(4)]).mean(0) for i in (0, 1)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mean, adapter.down.merged(), strict=True))


def test_pfeiffer_is_behind_the_mlp():
    adapted, image = model(style="pfeiffer", scale=1.0)
    trained(adapted, image).eval()
    block, adapter = adapted.backbone.model.blocks[1], adapters(adapted)[1]
    x = torch.randn(2, 5, 24)
    with adapted.disabled():
        f = block.mlp(x)
    branch = F.linear(F.relu(adapter.down(adapter.norm(f))), *adapter.up.merged())
    assert torch.allclose(block.mlp(x), f + branch, atol=1e-5)


HOULSBY = {"style": "houlsby", "norm": False, "scale": 1.0}


def split_vit(**arguments):
    """A ViT whose blocks have layer scale, with two adapters a block that have trained."""
    torch.manual_seed(1)
    small = {"embed_dim": 24, "depth": 4, "num_heads": 2, "init_values": 0.5}
    backbone = TimmViT(3, name="vit_tiny_patch16_224", image_size=32, patch_size=8, weights="random", model_args=small)
    adapted = adapt(backbone, MoSA(**{"width": 4, "dropout": 0.0, **HOULSBY, **arguments}))
    return trained(adapted, torch.randn(3, 3, 32, 40))


def on_stream(adapted, depth: int) -> tuple[SplitBottleneck, SplitBottleneck]:
    bank, block = adapted.bank["default"], f"model/blocks/{depth}"
    return bank[f"{block}/norm2"], bank[block]


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_houlsby_is_two_adapters_on_the_residual_stream(share):
    adapted = split_vit(share=share)
    block, x = adapted.backbone.model.blocks[1], torch.randn(2, 5, 24)
    first, second = on_stream(adapted, 1)

    def layer(split, index):
        if not isinstance(split, Split):
            return split.weight, split.bias
        if index is None:
            return split.merged()
        start = 0 if split.start is None else split.start
        return start + (split.weight - start) * (split.owner == index), split.bias[index]

    def expected(a, b):
        attention, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
        with adapted.disabled():
            x1 = x + 0.5 * attention(norms[0](x))
            x1 = x1 + F.linear(F.silu(F.linear(x1, *layer(first.down, a[0]))), *layer(first.up, a[1]))
            x2 = x1 + 0.5 * mlp(norms[1](x1))
        return x2 + F.linear(F.silu(F.linear(x2, *layer(second.down, b[0]))), *layer(second.up, b[1]))

    for adapter, drawn in ((first, [1, 3]), (second, [2, 0])):
        adapter.drawn[:], adapter.turn = torch.tensor(drawn), 0
    drawn, merged = expected((1, 3), (2, 0)), expected((None, None), (None, None))
    assert torch.allclose(block.ls1(x), 0.5 * x)
    assert torch.allclose(block(x), drawn, atol=1e-5)
    adapted.eval()
    assert torch.allclose(block(x), merged, atol=1e-5)
    assert not torch.allclose(drawn, merged, atol=1e-3)
    assert not torch.allclose(expected((0, 0), (0, 0)), drawn, atol=1e-3)


def test_houlsby_starts_as_the_identity_and_draws_four_times_a_block_and_pass():
    adapted, image = model(share="none", **HOULSBY)
    with adapted.disabled():
        bare = adapted(image).summary
    for training in (True, False):
        adapted.train(training).step(0)
        assert torch.equal(adapted(image).summary, bare)
    seen = []
    for number in range(80):
        adapted.step(number, seed=3)
        seen.append(torch.stack([a.drawn for a in on_stream(adapted, 2)]))
    draws = torch.stack(seen).flatten(1).float()  # (80 steps, 2 adapters x 2 passes x 2 projections)
    assert set(draws.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert (torch.corrcoef(draws.t()) - torch.eye(8)).abs().max() < 0.5


@pytest.mark.parametrize("adapter", [0, 1])
def test_the_mean_over_draws_of_each_houlsby_adapter_is_its_merged_output(adapter):
    adapted = split_vit()
    one, h, outputs = on_stream(adapted, 3)[adapter], torch.randn(3, 24), []
    for e in range(4):
        one.drawn[:], one.turn = torch.tensor([0, e]), 0
        outputs.append(one.branch(h))
    adapted.eval()
    assert torch.allclose(torch.stack(outputs).mean(0), one.branch(h), atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_houlsby_counts_and_has_no_official_file():
    adapted = adapt(vit_base(), MoSA(width=64, **HOULSBY))
    assert adapted.count()["adapter"] == 12 * 2 * (2 * 64 * 768 + 64 + 4 * 768)
    with pytest.raises(
        RequestError, match="'default' has style houlsby: the official files name one MoSA adapter a block"
    ):
        merged_state(adapted)


@pytest.mark.parametrize("block", ["post", "parallel"])
def test_houlsby_refuses_blocks_it_would_be_wrong_for(block):
    from timm.models.vision_transformer import ResPostBlock

    if block == "parallel":
        from modalities.language.backbones import TransformersText

        backbone = TransformersText(
            name="gptj", weights="random", config={**SMALL_TEXT, "rotary_dim": 4, "n_inner": 24}
        )
        inputs = backbone.example()
    else:
        small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "block_fn": ResPostBlock}
        backbone = TimmViT(3, name="vit_tiny_patch16_224", image_size=32, weights="random", model_args=small)
        inputs = backbone.example()
    with pytest.raises(RequestError, match="houlsby needs blocks whose MLP follows the attention"):
        adapt(backbone, MoSA(width=2, **HOULSBY), example=inputs)


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_the_start_is_the_identity_in_both_modes(share):
    adapted, image = model(share=share)
    with adapted.disabled():
        bare = adapted(image).summary
    for training in (True, False):
        adapted.train(training).step(0)
        assert torch.equal(adapted(image).summary, bare)


def test_entries_of_others_stay_zero_through_adamw_with_decay():
    adapted, image = model()
    trained(adapted, image, 6)
    for adapter in adapters(adapted):
        for e in range(4):
            own = adapter.up._moved(adapter.up.owner == e)
            assert own[adapter.up.owner != e].abs().max() == 0
            assert own[adapter.up.owner == e].abs().max() > 0


def test_the_mean_over_draws_is_the_merged_output():
    adapted, image = model()
    trained(adapted, image)
    adapter, h = adapters(adapted)[0], torch.randn(3, 24)
    outputs = []
    for e in range(4):
        draw(adapted, 0, e)
        outputs.append(adapter.branch(h))
    adapted.eval()
    assert torch.allclose(torch.stack(outputs).mean(0), adapter.branch(h), atol=1e-6)


def test_merging_is_of_the_experts_every_time():
    split = Split(2, 1, 2)
    with torch.no_grad():
        split.owner.copy_(torch.tensor([[0, 1]]))
        split.weight.copy_(torch.tensor([[0.8, -0.4]]))
    for _ in range(2):
        assert torch.equal(split.merged()[0], torch.tensor([[0.4, -0.2]]))
    split.merge = "union"
    assert torch.equal(split.merged()[0], torch.tensor([[0.8, -0.4]]))


def test_draws_are_of_the_step_for_each_block_and_pass():
    adapted, _ = model(share="none")
    seen = []
    for number in range(60):
        adapted.step(number, seed=3)
        seen.append(torch.stack([a.drawn for a in adapters(adapted)]))
    draws = torch.stack(seen).flatten(1).float()  # (60 steps, 4 blocks x 2 passes x 2 projections)
    assert set(draws.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    together = torch.corrcoef(draws.t()) - torch.eye(16)
    assert together.abs().max() < 0.5
    other, _ = model(share="none")
    other.step(17, seed=3)
    assert torch.equal(torch.stack([a.drawn for a in adapters(other)]), seen[17])
    assert any(n.endswith("drawn") for n in adapted.trained_state())


def test_gradient_reaches_the_drawn_experts_alone():
    adapted, image = model(share="none", consistency=0.0)
    with torch.no_grad():
        for adapter in adapters(adapted):
            adapter.up.weight.normal_()
    draw(adapted.train(), 1, 2)
    Scores(adapted).loss(image).backward()
    for adapter in adapters(adapted):
        for layer, e in ((adapter.down, 1), (adapter.up, 2)):
            assert layer.weight.grad[layer.owner != e].abs().max() == 0
            assert layer.weight.grad[layer.owner == e].abs().max() > 0
            assert layer.bias.grad.abs().amax(1).nonzero().flatten().tolist() == [e]
    assert all(p.grad is None for p in adapted.backbone.parameters())


def test_the_loss_is_of_two_passes_with_their_own_experts():
    adapted, image = model(consistency=0.7)
    task = Scores(trained(adapted, image))
    adapted.step(9)
    loss = adapted.loss(task, image)
    p, q = task.seen
    assert not torch.allclose(p, q)
    divergence = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    divergence += (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
    expected = task.criterion(p, image) + 0.7 * 0.5 * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for adapter in adapters(adapted):
        adapter.drawn[1], adapter.turn = adapter.drawn[0].clone(), 0
    assert torch.allclose(adapted.loss(task, image), task.criterion(task.seen[-2], image), atol=1e-6)


def test_the_divergence_of_equal_scores_is_zero_and_targets_have_no_gradient():
    p, q = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    assert symmetric_divergence(p, p).item() == pytest.approx(0, abs=1e-7)
    symmetric_divergence(p, q).backward()
    assert torch.allclose(p.grad, 0.5 * (p.softmax(1) - q.softmax(1)).detach() / 4, atol=1e-6)


def again_and_again(adapted) -> None:
    """The first block computes its activations again in the backward pass."""
    block = adapted.backbone.model.blocks[0]
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


@pytest.mark.parametrize("style", [{}, HOULSBY])
def test_checkpointing_is_right_with_one_pass_and_refused_with_two(style):
    grads = []
    for again in (False, True):
        adapted, image = model(consistency=0.0, **style)
        task = Scores(trained(adapted, image))
        adapted.zero_grad()
        adapted.step(4)
        if again:
            again_and_again(adapted)
        adapted.loss(task, image).backward()
        grads.append(adapters(adapted)[0].up.weight.grad)
        assert all(a.seen is None for a in adapted.bank["default"].values() if not isinstance(a, SplitBottleneck))
    assert torch.equal(*grads)
    adapted, image = model(**style)
    adapted.train().step(0)
    again_and_again(adapted)
    with pytest.raises(WorkError, match="runs in training mode after both passes of its step"):
        adapted.loss(Scores(adapted), image).backward()


def vit_base():
    with torch.device("meta"):
        return TimmViT(3, name="vit_base_patch16_224", weights="random", image_size=224)


# Published numbers are of the stored, merged adapter; in training each expert has a bias of its own.
@pytest.mark.parametrize(("width", "count"), [(64, 1_208_064), (16, 322_752)])
def test_counts_on_vit_base(width, count):
    adapted = adapt(vit_base(), MoSA(width=width))
    assert sum(t.numel() for t in merged_state(adapted).values()) == count
    assert adapted.count()["adapter"] == count + 12 * 3 * 768


def test_the_exported_adapter_is_the_merged_one():
    adapted, image = model(share="none")
    trained(adapted, image).eval()
    state, adapter = merged_state(adapted), adapters(adapted)[2]
    own = {n.removeprefix("enc.transformer.encoder.layer.2.adapter_"): t for n, t in state.items() if ".2." in n}
    h = torch.randn(3, 24)
    y = F.layer_norm(h, (24,), own["norm.weight"], own["norm.bias"], 1e-6)
    y = F.linear(F.gelu(F.linear(y, own["down_merge.weight"], own["down_merge.bias"])), own["up_merge.weight"])
    assert torch.allclose(0.1 * (y + own["up_merge.bias"]), adapter.branch(h), atol=1e-6)
    plain = 2 * 24 + 2 * 4 * 24 + 4 + 24
    assert sum(t.numel() for t in state.values()) == 4 * plain


def test_official_files_load(tmp_path):
    adapted, image = model()
    trained(adapted, image).eval()
    state = {"head.last_layer.weight": torch.ones(2, 24)}
    for depth, adapter in enumerate(adapters(adapted)):
        prefix = f"enc.transformer.encoder.layer.{depth}.adapter_"
        for part in ("norm", "down"):
            state |= {f"{prefix}{part}.{n}": p.detach() for n, p in getattr(adapter, part).named_parameters()}
        for e in range(4):
            state[f"{prefix}up.{e}.weight"] = (adapter.up.weight * (adapter.up.owner == e)).detach()
            state[f"{prefix}up.{e}.bias"] = adapter.up.bias[e].detach()
        state[f"{prefix}up_merge.weight"] = adapter.up.merged()[0].detach()
    torch.save({"model": state}, tmp_path / "official.pth")
    other, _ = model()
    load_official(other, tmp_path / "official.pth")
    assert torch.equal(other.eval()(image).summary, adapted(image).summary)
    same = [torch.equal(a.up.weight, b.up.weight) for a, b in zip(adapters(other), adapters(adapted), strict=True)]
    assert all(same)
    for spoil, message in (
        (lambda s: s.pop(f"{prefix}up.0.weight"), r"has experts \[1, 2, 3\], of one shape; this MoSA has 4"),
        (lambda s: s.pop(f"{prefix}norm.bias"), "1 missing"),
        (lambda s: s.update({"enc.layer.9.adapter_up.0.bias": torch.ones(1)}), "belongs to no block this MoSA adapts"),
        (lambda s: s.update({f"{prefix}down.0.weight": torch.ones(1)}), "a split down projection without its masks"),
    ):
        spoilt = dict(state)
        spoil(spoilt)
        torch.save(spoilt, tmp_path / "spoilt.pth")
        with pytest.raises(RequestError, match=message):
            load_official(other, tmp_path / "spoilt.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "MoSA width 0: use at least 1"),
        ({"experts": 1}, "1 experts at model/blocks/0/mlp: split 24 x 4 among 2 to 96"),
        ({"experts": 97}, "97 experts at model/blocks/0/mlp"),
        ({"dropout": -0.1}, "MoSA dropout -0.1"),
        ({"consistency": float("inf")}, "MoSA consistency inf: use a weight"),
        ({"depth": "last 9"}, "depth 'last 9' of"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        model(**arguments)


def test_backbones_it_does_not_fit_say_so():
    with pytest.raises(RequestError, match="has no site with role 'mlp'"):
        adapt(bert()[0], MoSA())
    with pytest.raises(RequestError, match=r"model\.h\.0\.mlp adds the residual itself: use style=adaptformer"):
        adapt(bloom()[0], MoSA(style="pfeiffer"))
    with pytest.raises(RequestError, match=r"model\.h\.0\.mlp adds the residual itself: use style=adaptformer"):
        adapt(bloom()[0], MoSA(**HOULSBY))
    backbone, inputs, _ = llama()
    adapted = adapt(backbone, MoSA(width=2), example=inputs).train()

    class Tokens(Scores):
        def outputs(self, batch):
            return self.model(*batch).states

    with pytest.raises(RequestError, match=r"compares class scores \(B, classes\) of two passes; for this task consi"):
        adapted.loss(Tokens(adapted), inputs)


def test_a_missing_norm_is_named():
    from shared.sites import Site, Sites

    mlp = nn.Linear(4, 4)
    with pytest.raises(RequestError, match="no norm stands beside"):
        adapt(mlp, MoSA(width=2), sites=Sites([Site("mlp", 0, "mlp", mlp, None, width=4)]))
