"""AdapterBias against the formula written out (its spec's "What must hold")."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import LoRA
from shared.methods.adapter_bias import AdapterBias, token_weights
from shared.sites import Site, Sites
from tests.parity.__main__ import difference
from tests.shared.hosts import HOSTS


class Largest(nn.Linear):
    """Classifies a text by its states' maximum."""

    def forward(self, hidden, size) -> Tensor:  # type: ignore[override]
        return super().forward(hidden.states.amax(1))


def layer(inputs: int = 2, outputs: int = 3, bias: bool = True):
    linear = nn.Linear(inputs, outputs, bias=bias)
    sites = Sites([Site("mlp.down", 0, "", linear)])
    return linear, adapt(linear, AdapterBias(norms=False), sites=sites, example=(torch.randn(2, inputs),))


def bert(method: AdapterBias, **more):
    backbone, inputs, _ = HOSTS["bert"]()
    return backbone, adapt(backbone, method, **more), inputs


def randomise(model) -> None:
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def published(name: str):
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        return TransformersText(name=name, weights="random")


def test_the_published_layers_come_out(materials):
    assert difference(materials / "golden" / "adapter_bias.npz") <= 1e-6


def test_the_worked_example():
    _, model = layer()
    change, offset = model.bank["default"]["model"], model.bank["default"]["model:bias"]
    with torch.no_grad():
        change.down.copy_(torch.tensor([[0.5, -1.0]]))
        change.up.copy_(torch.tensor([[2.0, 0.0, 4.0]]))
        offset.constant.fill_(0.25)
    u = torch.tensor([[1.0, 2.0]])
    assert token_weights(model, u)["model"].tolist() == [-1.25]
    with model.disabled():
        bare = model(u)
    assert torch.allclose(model(u) - bare, torch.tensor([[-2.5, 0.0, -5.0]]), atol=1e-6)


def test_it_starts_as_the_frozen_model_and_shifts_by_rank_one():
    _, model = layer(20, 12)
    u = torch.randn(9, 20)
    with model.disabled():
        bare = model(u)
    assert torch.equal(model(u), bare)
    randomise(model)
    shift = (model(u) - bare).detach()
    assert shift.norm() > 1
    assert torch.linalg.svdvals(shift)[1] < 1e-5 * torch.linalg.svdvals(shift)[0]
    alpha, v = token_weights(model, u)["model"], model.bank["default"]["model"].up[0].detach()
    assert torch.allclose(shift, alpha[:, None] * v, atol=1e-5)


def test_it_merges_as_the_outer_product():
    linear, model = layer(20, 12)
    randomise(model)
    change, constant = model.bank["default"]["model"], model.bank["default"]["model:bias"].constant
    weight = linear._parameters["weight"] + torch.outer(change.up[0], change.down[0])
    bias = linear._parameters["bias"] + constant * change.up[0]
    u = torch.randn(5, 20)
    folded = model(u)
    model.merge()
    assert torch.allclose(linear._parameters["weight"], weight, atol=1e-6)
    assert torch.allclose(linear._parameters["bias"], bias, atol=1e-6)
    assert torch.allclose(model(u), folded, atol=1e-5)
    assert torch.allclose(nn.functional.linear(u, weight, bias), folded, atol=1e-5)


def test_a_layer_without_bias_has_an_alpha_without_constant():
    _, model = layer(bias=False)
    assert model.count()["adapter"] == 2 + 3
    randomise(model)
    u = torch.randn(4, 2)
    assert torch.allclose(token_weights(model, u)["model"], u @ model.bank["default"]["model"].down[0].detach())


def test_a_shared_alpha_is_one_object_whose_gradient_is_the_sum_over_layers():
    torch.manual_seed(5)
    _, shared, inputs = bert(AdapterBias(share_alpha=True))
    torch.manual_seed(5)
    _, own, _ = bert(AdapterBias())
    bank, other = shared.bank["default"], own.bank["default"]
    keys = [k for k in bank if k.endswith("output/dense")]
    assert len(keys) == 2
    assert bank[keys[0]].down is bank[keys[1]].down
    assert bank[f"{keys[0]}:bias"].constant is bank[f"{keys[1]}:bias"].constant
    randomise(shared)
    with torch.no_grad():
        for name, tensor in bank.state_dict().items():
            other.get_parameter(name).copy_(tensor)
    for model in (shared, own):
        model(*inputs).states.square().sum().backward()
    total = sum(other[k].down.grad for k in keys)
    assert torch.allclose(bank[keys[0]].down.grad, total, rtol=1e-4, atol=1e-6)
    total = sum(other[f"{k}:bias"].constant.grad for k in keys)
    assert torch.allclose(bank[f"{keys[0]}:bias"].constant.grad, total, rtol=1e-4, atol=1e-6)


def test_what_trains_and_how_it_decays():
    _, model, _ = bert(AdapterBias(), head=Largest(16, 2))
    names = [n.removeprefix("adapter.default.model/") for n in model.trainable()]
    ends = [n for i in range(2) for n in (f"encoder/layer/{i}/output/dense.down", f"encoder/layer/{i}/output/dense.up",
                                          f"encoder/layer/{i}/output/dense:bias.constant")]  # fmt: skip
    norms = [f"{p}/LayerNorm{b}.value" for p in ("embeddings", "encoder/layer/0/output", "encoder/layer/1/output")
             for b in ("", ":bias")]  # fmt: skip
    assert names == [*ends, *norms, "head.weight", "head.bias"]

    from shared.training import Optimiser

    optimiser, _ = Optimiser(weight_decay=0.01).build(model, 10)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in model.trainable().items() if id(p) in decayed} == {
        n for n in model.trainable() if n.endswith((".down", ".up", "head.weight"))
    }


@pytest.mark.parametrize(
    ("name", "share", "count", "norms"),
    [
        ("bert-base-uncased", False, 46_092, 19_968),
        ("bert-large-uncased", False, 122_904, 51_200),
        ("bert-base-uncased", True, 12_289, 19_968),
        ("bert-large-uncased", True, 28_673, 51_200),
        ("roberta-base", False, 46_092, 19_968),
    ],
)
def test_counts_of_the_published_sizes(name, share, count, norms):
    assert adapt(published(name), AdapterBias(share_alpha=share, norms=False)).count()["adapter"] == count
    assert adapt(published(name), AdapterBias(share_alpha=share)).count()["adapter"] == count + norms


def test_the_first_step_moves_the_vector_alone():
    _, model, inputs = bert(AdapterBias())
    model(*inputs).states.square().sum().backward()
    for name, parameter in model.trainable().items():
        if name.endswith((".down", ".constant")):
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.any(), name


def test_in_a_vision_transformer_it_is_added_to_the_mlp_before_the_residual():
    backbone, _, _ = HOSTS["vit"]()
    model = adapt(backbone, AdapterBias(norms=False, depth=1))
    randomise(model)
    block, x = backbone.model.blocks[1], torch.randn(2, 21, 24)
    change = model.bank["default"]["model/blocks/1/mlp/fc2"]
    constant = model.bank["default"]["model/blocks/1/mlp/fc2:bias"].constant
    hidden: list[Tensor] = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with_shift = block(x)
    handle.remove()
    with model.disabled():
        bare = block(x)
    alpha = hidden[0] @ change.down[0] + constant
    assert torch.allclose(with_shift, bare + alpha[..., None] * change.up[0], atol=1e-5)


def test_the_token_that_decides_gets_the_largest_alpha():
    """Labels say whether token 7 is in the text; the transformer is random and frozen.

    It has no bias here: with a constant, "all but token 7" is as good an answer as "token 7", and is often learnt.
    """
    torch.manual_seed(0)
    backbone, _, _ = HOSTS["llama"]()
    nn.init.normal_(backbone.model.embed_tokens.weight)
    model = adapt(backbone, AdapterBias(norms=False), head=Largest(16, 2))
    tokens = torch.randint(8, 50, (256, 6))
    label = torch.arange(256) % 2
    tokens[label == 1, torch.randint(0, 6, (128,))] = 7
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=2e-2)
    for step in range(150):
        part = torch.arange(64) + 64 * (step % 4)
        loss = nn.functional.cross_entropy(model(tokens[part]), label[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    alpha = torch.stack(list(token_weights(model, tokens).values())).abs().mean(0)
    by_type = {int(token): alpha[tokens == token].mean().item() for token in tokens.unique()}
    assert loss.item() < 0.1
    assert max(by_type, key=by_type.__getitem__) == 7
    assert by_type[7] > 2 * alpha[tokens != 7].mean().item()


def test_wrong_requests_are_one_line():
    _, model = layer()
    with pytest.raises(RequestError, match="no AdapterBias is called 'other'; loaded: default"):
        token_weights(model, torch.randn(1, 2), name="other")
    model.add(LoRA(rank=1, roles=("mlp.down",)), name="other")
    with pytest.raises(RequestError, match="no AdapterBias is called 'other'; loaded: default, other"):
        token_weights(model, torch.randn(1, 2), name="other")
    convolutions, _, sites = HOSTS["convolutions"]()
    with pytest.raises(RequestError, match="no site with role 'mlp.down'"):
        adapt(convolutions, AdapterBias(), sites=sites)
    two = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    uneven = Sites([Site("mlp.down", i, str(i), two[i]) for i in range(2)])
    with pytest.raises(RequestError, match="share_alpha: the MLPs of model differ in width"):
        adapt(two, AdapterBias(share_alpha=True, norms=False), sites=uneven)
