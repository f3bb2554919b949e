"""MoLA against its formulas written out (its spec's "What must hold"), its counts, and its balance loss's channel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.adapted import adapt
from shared.blocks.experts import Experts, balance_loss
from shared.errors import RequestError
from shared.methods import LoRA, MoLA
from shared.methods.mola import allocation, load_official
from shared.sites import Site, Sites
from tests.shared.hosts import llama

X = torch.randn(2, 5, 6)


def model(experts=3, top_k: int = 2, **more):
    """One adapted layer of 6 inputs and 7 outputs, its experts no longer zero."""
    torch.manual_seed(3)
    linear = nn.Linear(6, 7)
    experts = [experts] if isinstance(experts, int) else experts
    method = MoLA(**{"experts": experts, "top_k": top_k, "rank": 2, "alpha": 3.0, "dropout": 0.0, **more})
    adapted = adapt(linear, method, sites=Sites([Site("mlp.up", 0, "", linear)]), example=(X,))
    adapter = adapted.bank["default"]["model"]
    with torch.no_grad():
        adapter.up.normal_()
    return adapted, adapter


def written_out(adapter: Experts, linear: nn.Linear, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = (adapter.router @ token).softmax(0)
        chosen = p.argsort(descending=True)[: adapter.top_k].tolist()
        y = linear.weight @ token + linear.bias
        for e in chosen:
            y = y + p[e] / sum(p[c] for c in chosen) * 1.5 * adapter.up[e] @ (adapter.down[e] @ token)
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 2), (4, 4), (5, 3)])
def test_it_is_its_formula_for_any_leading_shape(experts, top_k):
    adapted, adapter = model(experts, top_k)
    for x in (X, X[0], X[0, 0], X[:, :, None]):
        assert torch.allclose(adapted(x), written_out(adapter, adapted.backbone, x), atol=1e-5)
    assert adapted(X[:0]).shape == (0, 5, 7)


def test_at_the_start_it_is_the_base_exactly():
    linear = nn.Linear(6, 7)
    adapted = adapt(linear, MoLA(experts="3", rank=2), sites=Sites([Site("mlp.up", 0, "", linear)]), example=(X,))
    with adapted.disabled():
        bare = adapted(X)
    assert torch.equal(adapted.train()(X), bare)
    assert torch.equal(adapted.eval()(X), bare)


def test_one_expert_is_lora_and_merges():
    _, single = model(1, 1)
    assert type(single).__name__ == "LowRank"
    adapted, single = model(1, 1)
    linear = nn.Linear(6, 7)
    linear.load_state_dict(adapted.backbone.state_dict())
    lora = adapt(linear, LoRA(rank=2, alpha=3.0, roles="mlp.up"), sites=Sites([Site("mlp.up", 0, "", linear)]))
    lora.load_trained_state(adapted.trained_state())
    assert torch.equal(adapted(X), lora(X))
    assert adapted.count()["adapter"] == lora.count()["adapter"] == 2 * 13
    with torch.no_grad():
        before = adapted(X)
        adapted.merge()
        assert torch.equal(adapted(X), before)
    with pytest.raises(RequestError, match="cannot be merged"):
        model(2)[0].merge()


def test_gates_sum_to_one_and_k_experts_contribute():
    _, adapter = model(5, 3)
    seen = {}
    adapter.sparse = lambda tokens, gates, chosen: seen.update(g=gates, c=chosen) or tokens.new_zeros(len(tokens), 7)
    adapter(lambda x: torch.zeros(2, 5, 7), X)
    assert torch.allclose(seen["g"].sum(1), torch.ones(10), atol=1e-6)
    assert all(len(set(row.tolist())) == 3 for row in seen["c"])


def test_permuted_experts_give_the_same():
    adapted, adapter = model(4, 2)
    before, order = adapted(X), [2, 0, 3, 1]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter[order].clone())
    assert torch.allclose(adapted(X), before, atol=1e-6)


def test_a_token_depends_on_no_other():
    adapted, _ = model(4, 2)
    assert torch.allclose(adapted(X)[1, 3], adapted(X[1, 3]), atol=1e-6)
    assert torch.allclose(adapted(torch.cat([X, 100 * X]))[:2], adapted(X), atol=1e-6)


def test_sparse_and_dense_agree_forward_and_backward():
    _, adapter = model(4, 2)
    tokens, trained = X.flatten(0, 1).requires_grad_(), (adapter.down, adapter.up)
    values, chosen = torch.randn(10, 4).softmax(1).topk(2)
    outputs = [mixed(tokens, values, chosen) for mixed in (adapter.sparse, adapter.dense)]
    grads = [torch.autograd.grad(output.square().sum(), (tokens, *trained)) for output in outputs]
    assert torch.allclose(*outputs, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(*grads, strict=True))


def test_an_expert_without_tokens_has_no_gradient():
    adapted, adapter = model(3, 1)
    with torch.no_grad():
        adapter.router.copy_(torch.stack([X[0, 0], -X[0, 0], torch.zeros(6)]))
    adapted(X[0, 0]).sum().backward()
    assert adapter.up.grad[0].abs().max() > 0
    assert adapter.up.grad[1:].abs().max() == adapter.down.grad[1:].abs().max() == 0
    assert all(p.grad is None for p in adapted.backbone.parameters())


def test_dropout_is_drawn_for_each_expert_and_not_in_inference():
    adapted, adapter = model(2, 2, dropout=0.5)
    with torch.no_grad():
        adapter.up[1] = adapter.up[0]
        adapter.down[1] = adapter.down[0]
    bare = adapted.eval()(X)
    assert torch.equal(bare, adapted(X))
    noisy = adapted.train()(X)
    assert not torch.allclose(noisy, bare)
    with torch.no_grad():  # were the two drawn alike, the gate would not matter
        adapter.router.zero_()
    torch.manual_seed(1)
    even = adapted(X)
    with torch.no_grad():
        adapter.router[0] = 100 * X[0, 0]
    torch.manual_seed(1)
    assert not torch.allclose(adapted(X)[0, 0], even[0, 0])


# -- the balance loss --------------------------------------------------------------------------------------------------


def test_balance_is_one_where_even_and_the_number_of_experts_where_one_has_all():
    even = torch.eye(4).repeat(3, 1) * 1e-6  # each expert is chosen three times, at probability 1/4
    assert balance_loss(even, 1).item() == pytest.approx(1, abs=1e-5)
    assert balance_loss(torch.tensor([[100.0, 0, 0, 0]] * 5), 1).item() == pytest.approx(4)
    assert balance_loss(torch.empty(0, 4), 1).item() == 0


def test_the_loss_of_a_block_is_over_all_its_layers_and_tokens_and_the_sum_over_blocks():
    backbone, (tokens, mask), sites = llama()
    adapted = adapt(backbone, MoLA(experts="23", rank=2, balance=0.1), example=(tokens, mask)).train()
    adapted.step(0)
    adapted(tokens, mask)
    kept = {key: adapter._logits for key, adapter in adapted.bank["default"].items()}
    assert all(len(logits) == 1 and len(logits[0]) == int(mask.sum()) < mask.numel() for logits in kept.values())
    expected = 0
    for depth in (0, 1):
        rows = torch.cat([kept[site.key][0] for site in sites if site.key in kept and site.depth == depth])
        expected = expected + balance_loss(rows, 2)
    loss = adapted.penalty()
    assert loss.item() == pytest.approx(0.1 * expected.item())
    loss.backward()
    assert all(bool(a.router.grad.count_nonzero()) for a in adapted.bank["default"].values())


def test_padding_does_not_change_the_loss():
    backbone, (tokens, mask), _ = llama()
    adapted = adapt(backbone, MoLA(experts="2", rank=2, balance=1.0), example=(tokens, mask)).train()
    losses = []
    for padding in (0, 7):
        adapted.step(0)
        adapted(tokens.masked_fill(~mask, padding), mask)
        losses.append(adapted.penalty().item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_checkpointing_changes_no_loss_and_no_gradient():
    found = []
    for again in (False, True):
        adapted, adapter = model(4, 2, balance=0.5)
        adapted.train().step(0)
        y = checkpoint(adapted, X, use_reentrant=False) if again else adapted(X)
        penalty = adapted.penalty()
        (y.square().mean() + penalty).backward()
        found.append([penalty.detach(), *(p.grad for p in adapter.parameters())])
        assert adapter._logits is None  # what was computed again in the backward pass is not kept
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_leaks_from_one_step_into_another():
    adapted, _ = model(4, 2, balance=0.5)
    adapted.train().step(0)
    adapted(X)
    first = adapted.penalty()
    with pytest.raises(RequestError, match=r"of one training step: call step\(\) before its forward pass"):
        adapted.penalty()
    adapted(3 * X)  # of no step
    adapted.step(1)
    adapted.eval()(3 * X)  # an evaluation
    assert adapted.penalty() == 0
    adapted.train().step(2)
    adapted(X)
    assert torch.equal(adapted.penalty(), first)


def test_two_passes_of_one_step_count_together():
    adapted, _ = model(4, 2, balance=1.0)
    adapted.train().step(0)
    adapted(X[:1])
    adapted(X[1:])
    apart = adapted.penalty()
    adapted.step(1)
    adapted(X)
    assert torch.allclose(adapted.penalty(), apart)


def test_a_model_within_a_step_is_copied_without_its_logits():
    adapted, adapter = model(2, 1, balance=1.0)
    adapted.train().step(0)
    adapted(X)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert twin.bank["default"]["model"]._logits is None
        assert torch.equal(twin(X), adapted(X))
    assert len(adapter.take()) == 3


def test_without_balance_nothing_is_kept():
    adapted, adapter = model(2, 1)
    adapted.train().step(0)
    adapted(X)
    assert adapter.take() == []
    assert adapted.penalty() == 0


# -- allocation, counts, files -----------------------------------------------------------------------------------------


def test_allocation_over_depth():
    assert allocation("2468", 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert {sum(allocation(shape, 32)) for shape in ("2468", "8642", "8228", "5555")} == {160}
    assert allocation([5], 3) == [5, 5, 5]
    assert allocation([1, 12, 3], 3) == [1, 12, 3]
    assert allocation("2468", 6) == [2, 2, 4, 6, 6, 8]  # floor(j * 4 / 6)


def llama_7b():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        return TransformersText(name="meta-llama/Llama-2-7b-hf", weights="random")


@pytest.mark.parametrize(
    ("experts", "count"), [("2468", 105_635_840), ("5555", 105_635_840), ("8888", 169_017_344), ("1", 32 * 624_640)]
)
def test_counts_on_llama_7b(experts, count):
    method = MoLA(experts=experts, top_k=min(2, int(experts[0])))
    assert adapt(llama_7b(), method).count()["adapter"] == count


def test_official_files_load(tmp_path):
    backbone, (tokens, mask), _ = llama()
    adapted = adapt(backbone, MoLA(experts="23", top_k=2, rank=2, alpha=3.0), example=(tokens, mask))
    state = {}
    for key, adapter in adapted.bank["default"].items():
        layer = f"base_model.model.{key.replace('/', '.')}"
        state[f"{layer}.router.router.weight"] = torch.randn_like(adapter.router)
        for e in range(len(adapter.router)):
            state[f"{layer}.lora_A.default_{e}.weight"] = torch.randn_like(adapter.down[e])
            state[f"{layer}.lora_B.default_{e}.weight"] = torch.randn_like(adapter.up[e])
    torch.save(state, tmp_path / "adapter_model.bin")
    load_official(adapted, tmp_path / "adapter_model.bin")
    assert len(state) == 7 * (2 * 2 + 1) + 7 * (2 * 3 + 1)
    q = adapted.bank["default"]["model/layers/1/self_attn/q_proj"]
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    assert torch.equal(q.down[2], state[f"{layer}.lora_A.default_2.weight"])
    assert torch.equal(q.up[1], state[f"{layer}.lora_B.default_1.weight"])
    assert torch.equal(q.router, state[f"{layer}.router.router.weight"])
    before = adapted.trained_state()["adapter.default.model/layers/1/self_attn/q_proj.down"].clone()
    for spoil, message in (
        (lambda s: s.pop(f"{layer}.lora_A.default_1.weight"), "of another shape"),
        (lambda s: s.pop(f"{layer}.router.router.weight"), "1 missing"),
        (lambda s: s.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight belongs to no layer this MoLA adapts"),
        (lambda s: s.update({f"{layer}.lora_A.default_0.weight": torch.ones(3, 3)}), "are not of one shape"),
    ):
        spoilt = {n: 2 * t for n, t in state.items()}
        spoil(spoilt)
        torch.save(spoilt, tmp_path / "spoilt.bin")
        with pytest.raises(RequestError, match=message):
            load_official(adapted, tmp_path / "spoilt.bin")
    assert torch.equal(q.down, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank 0 at model: its matrix is 7 x 6, so use 1 to 6"),
        ({"rank": 7}, "rank 7 at model"),
        ({"top_k": 4}, "4 of 3 experts a token at model: use 1 to 3"),
        ({"top_k": 0}, "whole numbers of at least 1"),
        ({"experts": [0]}, "whole numbers of at least 1"),
        ({"experts": "2-4"}, "whole numbers of at least 1"),
        ({"experts": []}, "whole numbers of at least 1"),
        ({"experts": "24"}, "2 groups for 1 adapted blocks; use fewer groups"),
        ({"dropout": 1.0}, "MoLA dropout 1.0: use a probability"),
        ({"balance": -1.0}, "MoLA balance -1.0: use a weight of at least 0"),
        ({"balance": float("nan")}, "MoLA balance nan"),
        ({"roles": ("conv",)}, "no site with role 'conv'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        model(**arguments)
