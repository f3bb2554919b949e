"""VL-Adapter, Compacter and Hyperformer: their spec's "What must hold".

The published case is replayed in tests/parity. LoRA (7) is in test_capabilities and its own case; visual tokens (9) are
in modalities/vision_language.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from shared import store, taxonomy
from shared.adapted import Adapted, adapt
from shared.blocks.phm import LowRankLinear, PHMLinear, PHMRule
from shared.blocks.prompt_encoder import PromptEncoder
from shared.errors import RequestError
from shared.methods import Compacter, Hyperformer, LowRankAdapter, Prompt, VLAdapter
from shared.sites import Site, Sites
from tests.shared.hosts import HOSTS
from tests.shared.test_capabilities import out, rows

TASKS = ("vqa", "gqa", "nlvr")
SMALL = {"embedding": 6, "hidden": 7, "projected": 5}


def bert(method, tasks=None):
    torch.manual_seed(1)
    backbone, inputs, sites = HOSTS["bert"]()
    return adapt(backbone.eval(), method, sites=sites, example=inputs), inputs


def noisy(model: Adapted, seed: int = 0) -> Adapted:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def bart_base() -> tuple[nn.Module, Sites]:
    """The published backbone without weights, and its sub-layers, cross-attention included."""
    from transformers import BartConfig, BartModel

    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072, vocab_size=50265,
    )  # fmt: skip
    with torch.device("meta"):
        model = BartModel(config)
    found = []
    for stack, i in itertools.product(("encoder", "decoder"), range(6)):
        names = {"self_attn.out_proj": (), "encoder_attn.out_proj": ("cross",), "fc2": ()}
        for name, tags in names.items():
            if stack == "encoder" and tags:
                continue
            path, role = f"{stack}.layers.{i}.{name}", "mlp.down" if name == "fc2" else "attention.output"
            found.append(Site(role, i, path, model.get_submodule(path), width=768, tags=(stack, *tags)))
    return model, Sites(found, "bart-base")


def test_counts_on_bart_base():
    from modalities.vision_language.visual_embedding import VisualEmbedding

    model, sites = bart_base()
    adapter = adapt(model, VLAdapter(), sites=sites).count()["adapter"]
    assert adapter == 30 * 148_320 == 4_449_600
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    visual = sum(p.numel() for p in VisualEmbedding(2048, 768).parameters())
    assert (norms, visual) == (49_152, 1_582_848)
    assert adapter + norms + visual == 6_081_600
    whole = sum(p.numel() for p in model.parameters()) + 100 * 768 + visual + adapter
    assert whole == 145_529_664
    assert round(100 * 6_081_600 / whole, 3) == 4.179


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Compacter(n=2, rank=None, shared_rule=False), 30 * (2 * (8 + 768 * 96 // 2) + 96 + 768)),
        (Compacter(), 64 + 30 * (2 * (768 + 96) + 96 + 768)),
        (Compacter(factorised_rule=True), 32 + 30 * (2 * (768 + 96) + 96 + 768)),
        (LowRankAdapter(rank=2), 30 * (5 * (768 + 96))),
        (VLAdapter(share="none", tasks=TASKS), 3 * 4_449_600),
        (VLAdapter(share="down", tasks=TASKS), 3 * 4_449_600 - 30 * 2 * (768 * 96 + 96)),
        (VLAdapter(share="up", tasks=TASKS), 3 * 4_449_600 - 30 * 2 * (96 * 768 + 768)),
        (VLAdapter(norm_before=True, norm_after=True), 4_449_600 + 30 * 4 * 768),
    ],
)
def test_counts_of_the_structured_and_the_shared(method, count):
    model, sites = bart_base()
    assert adapt(model, method, sites=sites).count()["adapter"] == count == taxonomy.count(method.record, method, sites)


@pytest.mark.parametrize("unique", [False, True])
def test_hyperformer_counts_a_network_for_each_stack(unique):
    model, sites = bart_base()
    method = Hyperformer(tasks=TASKS, projected=8, unique=unique)
    found = adapt(model, method, sites=sites)
    place = 9 * 148_320  # maps from 8 channels, with biases
    network = 6 * 512 + 128 * ((1536 if unique else 1024) + 1) + 8 * 129 + 16
    expected = 3 * 512 + 2 * network + ((1 + 1) * place + (2 + 3) * 512 if unique else (2 + 3) * place)
    assert found.count()["adapter"] == expected
    hypers = {id(a.hyper): a.hyper for a in found.bank["default"].values()}
    assert [h.places for h in hypers.values()] == [("mlp", "attention"), ("mlp", "attention", "cross_attention")]
    assert len({id(h.embeddings["vqa"].weight) for h in hypers.values()}) == 1  # tasks are shared


@pytest.mark.parametrize(
    "method",
    [
        VLAdapter(start="zero", reduction=4),
        Compacter(start="zero", n=2, reduction=4),
        LowRankAdapter(start="zero", reduction=4),
        Hyperformer(start="zero", **SMALL),
    ],
)
def test_zero_up_returns_the_input_exactly_and_the_published_start_nearly(method):
    model, inputs = bert(method)
    with model.disabled():
        bare = out(model, inputs)
    assert torch.equal(out(model, inputs), bare)
    published = dataclasses.replace(method, start=type(method).__dataclass_fields__["start"].default)
    near = out(bert(published)[0], inputs)
    assert 0 < float((near - bare).norm() / bare.norm()) < 0.3


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_a_batch_of_one_task_reaches_its_own_and_the_shared_parts(share):
    model, inputs = bert(VLAdapter(share=share, tasks=TASKS, reduction=4))
    noisy(model)
    rows(model(*inputs, context={"task": "gqa"})).square().sum().backward()
    for adapter in model.bank["default"].values():
        own, other = adapter.branches["gqa"], adapter.branches["vqa"]
        assert (own.down is other.down, own.up is other.up) == (share == "down", share == "up")
        assert all(p.grad is not None and p.grad.count_nonzero() for p in own.parameters())
        assert (other.down.weight.grad is not None) == (share == "down")
        assert (other.up.weight.grad is not None) == (share == "up")
    first = adapter.branches["gqa"].down.weight.grad.clone()
    rows(model(*inputs, context={"task": "vqa"})).square().sum().backward()
    assert torch.equal(adapter.branches["gqa"].down.weight.grad, first) != (share == "down")  # it accumulates


def test_sharing_all_is_one_module_for_every_task():
    model, inputs = bert(VLAdapter(tasks=TASKS, reduction=4))
    noisy(model)
    outputs = [out(model, inputs, context={"task": task}) for task in TASKS]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], out(model, inputs))
    assert model.count()["adapter"] == bert(VLAdapter(reduction=4))[0].count()["adapter"]


@pytest.mark.parametrize(
    "method", [VLAdapter(share="down", tasks=TASKS, reduction=4), Hyperformer(tasks=TASKS, **SMALL)]
)
def test_the_call_names_its_task(method):
    model, inputs = bert(method)
    noisy(model).eval()
    outputs = [out(model, inputs, context={"task": task}) for task in TASKS]
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(outputs, 2)) > 1e-3
    with pytest.raises(RequestError, match='names no task: give context=."task": .*, one of vqa, gqa, nlvr'):
        model(*inputs)
    with pytest.raises(RequestError, match="this call names the task 'vcr'"):
        model(*inputs, context={"task": "vcr"})


SHARING = {
    "rule": Compacter(n=2, reduction=4),
    "hypernetwork": Hyperformer(tasks=TASKS, **SMALL),
    "half": VLAdapter(share="down", tasks=TASKS, reduction=4),
}


@pytest.mark.parametrize("kind", SHARING)
def test_what_is_shared_is_counted_and_saved_once_under_a_stable_key(kind, tmp_path):
    method = SHARING[kind]
    model, inputs = bert(method)
    call = {"context": method.example()}
    expected = out(noisy(model).eval(), inputs, **call)
    assert model.count()["adapter"] == sum(p.numel() for p in model.trainable().values())
    assert len({id(p) for p in model.trainable().values()}) == len(model.trainable())
    model.save(tmp_path / "a")
    names = list(store.read_header(tmp_path / "a")["tensors"])
    assert {f"adapter.default.{n.removeprefix('adapter.')}" for n in names} == set(model.trainable())
    first = next(iter(model.bank["default"]))
    part = {"rule": ".rule.whole", "hypernetwork": ".hyper.embeddings.vqa.weight", "half": ".branches.vqa.down.weight"}[
        kind
    ]
    holders = [n for n in names if n.endswith(part)]
    assert holders[0].startswith(f"adapter.{first}.")
    assert len(holders) == (len(model.bank["default"]) if kind == "half" else 1)
    other, _ = bert(method)
    other.load(tmp_path / "a")
    assert torch.equal(out(other.eval(), inputs, **call), expected)
    with torch.no_grad():  # still shared: one place moves all
        other.trainable()["adapter.default." + holders[0].removeprefix("adapter.")].add_(1)
    shared = [dict(m.named_parameters()) for m in other.bank["default"].values()]
    moved = [p for parameters in shared for n, p in parameters.items() if f".{n}".endswith(part)]
    assert len(moved) >= len(shared)
    assert len({id(p) for p in moved}) == len(holders)


def test_two_adapters_share_nothing():
    model, inputs = bert(Compacter(n=2, reduction=4))
    model.add(Compacter(n=2, reduction=4), name="second")
    before = out(model, inputs)
    model.activate("default")
    noisy_rule = next(p for n, p in model.trainable().items() if n.endswith("rule.whole"))
    with torch.no_grad():
        noisy_rule.add_(1)
    model.activate("second")
    assert torch.equal(out(model, inputs), before)


def test_phm_of_the_identity_is_block_diagonal():
    rule = PHMRule(2)
    layer = PHMLinear(6, 4, rule)
    with torch.no_grad():
        rule.whole.copy_(torch.stack([torch.eye(2), torch.zeros(2, 2)]))
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), x @ torch.block_diag(layer.weight[0], layer.weight[0]), atol=1e-6)


@pytest.mark.parametrize(("n", "rank", "factorised"), [(1, None, False), (2, 1, True), (3, None, True), (4, 2, False)])
def test_phm_is_a_sum_of_kronecker_products(n, rank, factorised):
    rule = PHMRule(n, factorised=factorised)
    layer = PHMLinear(24, 36, rule, rank=rank)
    nn.init.normal_(layer.bias)
    weight = layer.weight if rank is None else layer.left @ layer.right
    h = sum(torch.kron(a, w) for a, w in zip(rule(), weight, strict=True))
    x = torch.randn(2, 5, 24)
    assert torch.allclose(layer(x), x @ h + layer.bias, atol=1e-5)
    size = 24 * 36 // n if rank is None else rank * (24 + 36)
    assert sum(p.numel() for p in layer.parameters()) == (2 * n**2 if factorised else n**3) + size + 36


def test_generated_tensors_depend_on_task_layer_and_place():
    torch.manual_seed(0)
    model, _ = bert(Hyperformer(tasks=TASKS, norm_before=True, norm_after=True, deviation=0.5, **SMALL))
    hyper = next(iter(model.bank["default"].values())).hyper
    base = hyper("vqa", 0, "mlp")
    assert {n: tuple(t.shape) for n, t in base.items()} == {
        "down.weight": (2, 16), "down.bias": (2,), "up.weight": (16, 2), "up.bias": (16,), "before.weight": (16,),
        "before.bias": (16,), "after.weight": (16,), "after.bias": (16,),
    }  # fmt: skip
    for other in (hyper("gqa", 0, "mlp"), hyper("vqa", 1, "mlp"), hyper("vqa", 0, "attention")):
        assert all(float((base[n] - other[n]).detach().abs().max()) > 1e-3 for n in base)


def test_a_prompt_made_by_a_network():
    encoder = PromptEncoder(3, 8, 5)
    first, last = encoder.network[0], encoder.network[2]
    expected = torch.tanh(encoder.embeddings @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert torch.allclose(encoder(), expected, atol=1e-6)
    assert sum(p.numel() for p in PromptEncoder(40, 768, 800).parameters()) == 40 * 768 + 800 * 769 + 768 * 801
    backbone, inputs, _ = HOSTS["vit"]()
    model = adapt(backbone, Prompt(count=3, hidden=5))
    method = Prompt(count=3, hidden=5)
    assert model.count()["adapter"] == taxonomy.count(method.record, method, method.sites(backbone.sites()))
    assert model.count()["adapter"] == 4 * (3 * 24 + 5 * 25 + 24 * 6)
    free = noisy(adapt(HOSTS["vit"]()[0], Prompt(count=3)))
    with torch.no_grad():
        for key, made in noisy(model).bank["default"].items():
            free.bank["default"][key].tokens.copy_(made.encoder())
    free.backbone.load_state_dict(backbone.state_dict())
    assert torch.equal(out(model, inputs), out(free, inputs))
    with pytest.raises(RequestError, match="prompt of 10 tokens, 0 channels inside"):
        adapt(HOSTS["vit"]()[0], Prompt(hidden=0))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: VLAdapter(share="half"), "VLAdapter share 'half': use all, down, up or none"),
        (lambda: VLAdapter(share="down"), "VLAdapter tasks .*: give one or more different names"),
        (lambda: VLAdapter(share="none", tasks=("a", "a")), "VLAdapter tasks"),
        (lambda: VLAdapter(share="none", tasks=("a.b",)), "VLAdapter tasks"),
        (lambda: VLAdapter(share="none", tasks=("all",)), "VLAdapter tasks .* none 'all'"),
        (lambda: bert(VLAdapter(reduction=0)), "reduction 0 at .*: its width is 16, so use 1 to 16"),
        (lambda: bert(VLAdapter(reduction=17)), "reduction 17 at .*: its width is 16, so use 1 to 16"),
        (lambda: Compacter(n=0), "Compacter n 0"),
        (lambda: bert(Compacter(n=3)), "PHM of 3 products at .*: 16 x 2 is not divisible by 3"),
        (lambda: bert(Compacter(n=2, rank=2)), "PHM rank 2 at .*: its slices are 8 x 1, so use 1 to 1 or None"),
        (lambda: bert(Compacter(reduction=17)), "reduction 17 at .*: its width is 16, so use 1 to 16"),
        (lambda: bert(LowRankAdapter(rank=3)), "rank 3 at .*: its matrix is 16 x 2, so use 1 to 2"),
        (lambda: LowRankLinear(4, 4, 0), "rank 0 at adapter"),
        (lambda: Hyperformer(tasks=()), "Hyperformer tasks"),
        (lambda: Hyperformer(hidden=0), "Hyperformer hidden 0: use at least 1"),
        (lambda: bert(Hyperformer(reduction=17)), "reduction 17 at .*: its width is 16, so use 1 to 16"),
    ],
)
def test_wrong_arguments_are_one_line(method, message):
    with pytest.raises(RequestError, match=message):
        method()


def test_hyperformer_wants_one_width():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(8, 8)])
    sites = Sites(Site("mlp.down", i, str(i), layer, width=layer.out_features) for i, layer in enumerate(layers))
    with pytest.raises(RequestError, match="have widths 4, 8: Hyperformer generates one"):
        adapt(layers, Hyperformer(reduction=2, sublayers=("mlp",)), sites=sites)


def test_track_z_is_the_mean_square_inside_over_adapters():
    model, inputs = bert(VLAdapter(share="up", tasks=TASKS, reduction=4, track_z=0.5))
    noisy(model)
    inside = []
    hooks = [a.branches["gqa"].up.register_forward_pre_hook(lambda _, x: inside.append(x[0].detach()))
             for a in model.bank["default"].values()]  # fmt: skip
    with pytest.raises(RequestError, match=r"call step\(\) before its forward pass"):
        model.penalty()
    model.step(0)
    model(*inputs, context={"task": "gqa"})
    for hook in hooks:
        hook.remove()
    penalty = model.penalty()
    expected = 0.5 * sum(float(z.square().mean()) for z in inside) / len(inside)
    assert len(inside) == len(model.bank["default"])
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for adapter in model.bank["default"].values():
        own, other = adapter.branches["gqa"], adapter.branches["vqa"]
        assert own.down.weight.grad.count_nonzero()
        assert other.down.weight.grad is None
        assert adapter.squares is None  # nothing is kept of what runs between steps
    assert float(bert(VLAdapter(reduction=4))[0].penalty()) == 0


def test_track_z_wants_a_weight():
    with pytest.raises(RequestError, match="VLAdapter track_z -1.0: use a weight of at least 0"):
        VLAdapter(track_z=-1.0)
