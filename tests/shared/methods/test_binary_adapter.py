"""Binary adapters: the codebook, the rounding, both placements, and what trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shared.adapted import adapt
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.packing import pack, unpack
from shared.blocks.quantised import QuantisedLinear, codebook, quantise
from shared.errors import RequestError
from shared.methods import BinaryAdaptFormer, BinaryLoRA
from shared.methods.binary_adapter import QuantisedBranch
from tests.shared.hosts import HOSTS
from tests.shared.methods.test_family import vit_base


def test_the_codebook_is_the_published_one():
    assert codebook(1) == pytest.approx((-0.67449, 0.67449), abs=5e-6)
    assert codebook(2) == pytest.approx((-1.2657, -0.3778, 0.3778, 1.2657), abs=5e-5)
    borders = [(a + b) / 2 for a, b in zip(codebook(2), codebook(2)[1:], strict=False)]
    assert borders == pytest.approx((-0.8217, 0, 0.8217), abs=5e-5)
    upper = (0.1056, 0.3190, 0.5401, 0.7752, 1.0340, 1.3331, 1.7077, 2.2655)
    assert codebook(4)[8:] == pytest.approx(upper, abs=5e-5)
    assert len(set(codebook(8))) == 256
    assert codebook(8) == pytest.approx([-v for v in reversed(codebook(8))])


def layer(bits: int, shape: tuple[int, int] = (12, 20)) -> QuantisedLinear:
    return QuantisedLinear(shape[1], shape[0], bits)


def test_the_worked_example():
    one = layer(1, (1, 2))
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[1.0, 3.0]]))
    assert torch.allclose(one.quantised(), torch.tensor([[1.04613, 2.95387]]), atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_rounded_weight_takes_the_codebooks_values(bits):
    one = layer(bits).requires_grad_(False)
    values = one.quantised()
    mean, deviation, _ = one.statistics()
    assert values.unique().numel() <= 2**bits
    levels = (values - mean) / deviation
    assert float((levels[..., None] - one.levels).abs().amin(-1).max()) < 1e-5
    # each value is the nearest one there is, but for the 1e-5 on the deviation
    grid = one.levels * deviation + mean
    assert float(((one.weight - values).abs() - (one.weight[..., None] - grid).abs().amin(-1)).max()) < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scaling_and_shifting_the_weight_does_so_to_the_rounded_one(bits):
    one, other = layer(bits), layer(bits)
    with torch.no_grad():
        one.weight.normal_()
        other.weight.copy_(3 * one.weight + 0.5)
    moved = other.codes().int() - one.codes().int()  # the 1e-5 on the deviation may move one at a border
    assert moved.abs().sum() <= 1
    here = moved == 0
    assert torch.allclose(other.quantised()[here], (3 * one.quantised() + 0.5)[here], atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_packed_weight_unpacks_to_itself_and_stays_there(bits):
    one, again = layer(bits), layer(bits)
    mean, deviation, _ = (t.detach() for t in one.statistics())
    codes = unpack(pack(one.codes(), bits), bits, one.weight.shape)
    assert torch.equal(codes, one.codes())
    again.hold(codes, mean, deviation)
    assert torch.allclose(again.weight, one.quantised(), rtol=1e-6, atol=0)
    assert torch.equal(again.quantised(), again.weight)
    assert torch.equal(again.codes(), codes)


def test_the_gradient_goes_straight_through_and_through_the_statistics():
    one = layer(1).double()
    torch.manual_seed(3)
    upstream = torch.randn(12, 20, dtype=torch.float64)
    (one.quantised() * upstream).sum().backward()
    w = one.weight.detach().clone().requires_grad_()
    mean, deviation = w.mean(), w.std()
    u = (w - mean) / (deviation + 1e-5)
    rounded = torch.where(u >= 0, 1.0, -1.0).double() * codebook(1)[1]
    gap = (rounded - u).detach()
    (((u + gap) * deviation + mean) * upstream).sum().backward()
    assert w.grad is not None
    assert one.weight.grad is not None
    assert torch.allclose(one.weight.grad, w.grad, atol=1e-7)
    assert not torch.allclose(one.weight.grad, upstream, atol=1e-3)


def test_codes_are_packed_with_the_first_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8), 2).tolist() == [1 + 2 * 4 + 3 * 16, 3]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [129, 1]
    for bits in (1, 2, 4, 8):
        for count in range(20):
            codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
            assert torch.equal(unpack(pack(codes, bits), bits, (count,)), codes)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (BinaryAdaptFormer(), 589_824),
        (BinaryAdaptFormer(width=1), 18_432),
        (BinaryLoRA(), 1_179_648),
        (BinaryLoRA(width=1, dropout=0.0), 36_864),
        (BinaryLoRA(bits=32), 1_179_648),
    ],
)
def test_counts_on_vit_base(method, count):
    assert adapt(vit_base(), method).count()["adapter"] == count


def test_bi_adaptformer_reads_the_stream_in_front_of_the_norm():
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, BinaryAdaptFormer(width=3, scale=0.5, depth=1), example=(image,)).eval()
    block, branch = backbone.model.blocks[1], model.bank["default"]["model/blocks/1/mlp"].branch
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        branch.up.weight.normal_()
        h = x + block.attn(block.norm1(x))
        with model.disabled():
            plain = h + block.mlp(block.norm2(h))
        beside = torch.relu(h @ branch.down.quantised().T) @ branch.up.quantised().T
        assert torch.allclose(block(x), plain + 0.5 * beside, atol=1e-5)


def test_bi_lora_adds_to_query_and_value():
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, BinaryLoRA(width=3, scale=2.0, depth=0), example=(image,)).eval()
    qkv, x = backbone.model.blocks[0].attn.qkv, torch.randn(2, 5, 24)
    with model.disabled():
        expected = qkv(x).detach().clone()
    for name, start in (("query", 0), ("value", 48)):
        branch = model.bank["default"][f"model/blocks/0/attn/qkv:{name}"].branch
        nn.init.normal_(branch.up.weight)
        expected[..., start : start + 24] += 2.0 * x @ branch.down.quantised().T @ branch.up.quantised().T
    assert torch.allclose(qkv(x), expected, atol=1e-5)
    model.train()
    assert not torch.allclose(qkv(x), qkv(x))  # dropout between the projections


def test_one_trained_with_dropout_merges_once_loaded_without(tmp_path):
    torch.manual_seed(1)
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, BinaryLoRA(width=3)).eval()
    for module in model.bank.modules():
        if isinstance(module, QuantisedLinear):
            nn.init.normal_(module.weight, std=0.3)
    expected = model(image).summary
    model.save(tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="cannot be merged"):
        model.merge()
    model.remove()
    other = adapt(backbone, BinaryLoRA(width=3, dropout=0.0)).eval()
    other.load(tmp_path / "a.safetensors")
    other.merge()
    assert torch.allclose(other(image).summary, expected, atol=1e-5)


def test_at_32_bits_the_layers_are_linear_and_the_start_is_the_identity():
    branch = QuantisedBranch(8, 8, 4, bits=32, scale=1.0, dropout=0.0, relu=True, where="here")
    assert type(branch.down) is type(branch.up) is nn.Linear
    for method in (BinaryAdaptFormer(bits=32), BinaryLoRA(bits=32)):
        backbone, (image,), _ = HOSTS["vit"]()
        bare = backbone.eval()(image).summary
        assert torch.equal(adapt(backbone, method).eval()(image).summary, bare)


def test_below_32_bits_the_start_is_near_the_identity():
    branch = QuantisedBranch(64, 64, 64, bits=1, scale=1.0, dropout=0.0, relu=True, where="here")
    # deviation 0.001 cut at two of them is 0.00088; times the level 0.6745
    assert float(branch.up.quantised().detach().abs().mean()) == pytest.approx(0.00088 * 0.6745, rel=0.1)


def test_only_master_weights_train():
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, BinaryAdaptFormer(width=4), head=None).train()
    trained = model.trainable()
    assert {n.rpartition(".")[2] for n in trained} == {"weight"}
    optimiser = torch.optim.AdamW(trained.values())
    model(image).summary.square().sum().backward()
    optimiser.step()
    assert len(optimiser.state) == len(trained) == 8
    assert all(p.grad is None for p in backbone.parameters())


def test_any_adapter_can_be_quantised_and_keeps_its_biases():
    branch = Bottleneck(6, 6, 4)
    nn.init.normal_(branch.up.weight)
    names = list(branch.state_dict())
    quantise(branch, 2)
    assert set(names) < set(branch.state_dict())
    assert isinstance(branch.down, QuantisedLinear)
    assert branch.down.bias is not None
    x = torch.randn(3, 6)
    h = torch.relu(x @ branch.down.quantised().T + branch.down.bias)
    assert torch.allclose(branch(x), h @ branch.up.quantised().T + branch.up.bias, atol=1e-6)


def accuracy(seed: int, bits: int) -> tuple[float, float]:
    """A frozen network and a low-rank change of it that makes the labels: accuracy of an adapter trained at ``bits``,
    and of one trained in float and then rounded to them."""
    torch.manual_seed(seed)
    base, inner = nn.Linear(16, 10), 0.375 * torch.randn(10, 4) @ torch.randn(4, 16)
    x = torch.randn(1500, 16)
    labels = (base(x) + x @ inner.T).argmax(1)
    base.requires_grad_(False)

    def trained(at: int) -> QuantisedBranch:
        branch = QuantisedBranch(16, 10, 32, bits=at, scale=1.0, dropout=0.0, relu=False, where="toy")
        optimiser = torch.optim.Adam(branch.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 150)
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(base(x[:1000]) + branch(x[:1000]), labels[:1000]).backward()
            optimiser.step()
            schedule.step()
        return branch

    def score(branch: nn.Module) -> float:
        return float(((base(x) + branch(x)).argmax(1) == labels)[1000:].float().mean())

    aware, after = trained(bits), trained(32)
    quantise(after, bits)
    return score(aware), score(after)


def test_rounding_after_training_costs_more_than_training_with_it():
    gains = [aware - after for aware, after in (accuracy(seed, 1) for seed in range(3))]
    assert min(gains) > 0.03


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: BinaryAdaptFormer(bits=3), "BinaryAdaptFormer bits 3: use 1, 2, 4, 8 or 32"),
        (lambda: BinaryLoRA(dropout=-0.1), "BinaryLoRA dropout -0.1"),
        (lambda: adapt(vit_base(), BinaryAdaptFormer(width=0)), "width 0 at model/blocks/0/mlp"),
        (lambda: adapt(HOSTS["clip"]()[0], BinaryLoRA()), "dropout 0.1 cannot act on MultiheadAttention"),
        (lambda: adapt(HOSTS["llama"]()[0], BinaryAdaptFormer()), "no site .* role 'norm' .* tags"),
        (lambda: QuantisedLinear(1, 1, 1), "one element has no deviation"),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 2, (4,)), "3 bytes hold no 4 codes of 2 bits"),
        (lambda: pack(torch.zeros(3, dtype=torch.uint8), 3), "codes of 3 bits"),
    ],
)
def test_wrong_arguments_are_one_line(method, message):
    with pytest.raises(RequestError, match=message):
        method()


def test_levels_are_not_saved():
    model = adapt(HOSTS["vit"]()[0], BinaryAdaptFormer(width=4, bits=8))
    assert {n.rpartition(".")[2] for n in model.trained_state()} == {"weight", "held"}
    assert not math.isnan(float(model.trained_state()["adapter.default.model/blocks/0/mlp.branch.up.held"].sum()))
