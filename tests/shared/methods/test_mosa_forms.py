"""MoSA's further published forms: on LoRA (MoSL), in Swin, and with a whole copy for each expert."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modalities.images.backbones import TimmViT
from shared.adapted import Adapted, adapt
from shared.blocks.split import Split
from shared.blocks.split_adapters import SplitLowRank
from shared.errors import RequestError, WorkError
from shared.interop import export_adapter, import_adapter
from shared.interop.mosa import load_official, merged_state
from shared.methods import Imported, LoRA, MoSA, MoSL
from shared.sites import Site, Sites
from shared.training import Optimiser
from tests.shared.hosts import vit
from tests.shared.methods.test_mosa import Scores, model, trained


def mosl(**arguments):
    torch.manual_seed(1)
    backbone, (image,), _ = vit()
    return adapt(backbone, MoSL(**{"rank": 4, **arguments})), image


def changes(adapted) -> dict[str, SplitLowRank]:
    return dict(adapted.bank["default"].items())


def draw(adapted, down: int, up: int) -> None:
    for change in changes(adapted).values():
        change.drawn[:], change.turn = torch.tensor([down, up]), 0


# -- MoSL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_mosl_is_its_formula_on_query_and_value(share):
    adapted, image = mosl(share=share, scale=0.5)
    trained(adapted, image)
    draw(adapted, 1, 3)
    qkv, x = adapted.backbone.model.blocks[1].attn.qkv, torch.randn(2, 5, 24)

    def matrix(layer, index):
        if not isinstance(layer, Split):
            return layer.weight
        start = torch.zeros(()) if layer.start is None else layer.start
        experts = torch.stack([start + (layer.weight - start) * (layer.owner == e) for e in range(4)])
        return experts.mean(0) if index is None else experts[index]

    def expected(down, up):
        with adapted.disabled():
            y = qkv(x)
        for rows, name in ((slice(0, 24), "query"), (slice(48, 72), "value")):
            change = changes(adapted)[f"model/blocks/1/attn/qkv:{name}"]
            y[..., rows] += 0.5 * x @ matrix(change.down, down).t() @ matrix(change.up, up)
        return y

    drawn, merged = expected(1, 3), expected(None, None)
    assert torch.allclose(qkv(x), drawn, atol=1e-6)
    adapted.eval()
    assert torch.allclose(qkv(x), merged, atol=1e-6)
    assert not torch.allclose(drawn, merged, atol=1e-3)
    adapted.merge()
    assert torch.allclose(F.linear(x, qkv._parameters["weight"], qkv.bias), merged, atol=1e-6)


def test_mosl_is_a_lora_of_its_count_on_vit_base():
    with torch.device("meta"):
        backbone = TimmViT(3, name="vit_base_patch16_224", weights="random", image_size=224)
    adapted = adapt(backbone, MoSL())
    assert adapted.count()["adapter"] == 12 * 2 * 16 * (768 + 768) == 589_824
    adapted.remove()
    adapted.add(LoRA(rank=16))
    assert adapted.count()["adapter"] == 589_824
    adapted.remove()
    adapted.add(MoSL(share="none", copies=True))
    assert adapted.count()["adapter"] == 4 * 589_824


def test_entries_of_others_stay_zero_and_the_mean_over_draws_is_the_merged_change():
    adapted, image = mosl()
    trained(adapted, image, 16)
    for change in changes(adapted).values():
        for e in range(4):
            own = change.up.matrix(torch.tensor(e))
            assert own[change.up.owner != e].abs().max() == 0
            assert own[change.up.owner == e].abs().max() > 0
    change, weight, deltas = changes(adapted)["model/blocks/0/attn/qkv:value"], torch.zeros(24, 24), []
    for e in range(4):
        draw(adapted, 0, e)
        deltas.append(change.delta(weight))
    adapted.eval()
    assert torch.allclose(torch.stack(deltas).mean(0), change.delta(weight), atol=1e-7)


def test_mosl_draws_for_each_projection_and_pass_and_trains_on_both_passes():
    adapted, image = mosl(share="none", consistency=0.7)
    seen = []
    for number in range(60):
        adapted.step(number, seed=3)
        seen.append(torch.stack([c.drawn for c in changes(adapted).values()]))
    draws = torch.stack(seen).flatten(1).float()  # (60 steps, 8 projections x 2 passes x 2 factors)
    assert set(draws.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert (torch.corrcoef(draws.t()) - torch.eye(32)).abs().max() < 0.55
    task = Scores(trained(adapted, image))
    adapted.step(9)
    loss = adapted.loss(task, image)
    p, q = (scores.log_softmax(1) for scores in task.seen)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(1).mean()
    assert loss.item() == pytest.approx((task.criterion(p, image) + 0.35 * divergence).item(), rel=1e-5)
    assert divergence > 1e-6
    with pytest.raises(WorkError, match="runs in training mode after both passes of its step"):
        adapted(image)


def test_gradient_of_mosl_reaches_the_drawn_entries_alone():
    adapted, image = mosl(share="none", consistency=0.0)
    with torch.no_grad():
        for change in changes(adapted).values():
            change.up.weight.normal_()
    draw(adapted.train(), 1, 2)
    Scores(adapted).loss(image).backward()
    for change in changes(adapted).values():
        for layer, e in ((change.down, 1), (change.up, 2)):
            assert layer.weight.grad[layer.owner != e].abs().max() == 0
            assert layer.weight.grad[layer.owner == e].abs().max() > 0


def test_what_leaves_for_other_libraries_is_the_merged_change_also_in_training(tmp_path):
    adapted, image = mosl()
    trained(adapted, image)
    assert adapted.bank.training
    export_adapter(adapted, tmp_path, format="peft")
    merged = adapted.eval()(image).summary
    other = Adapted(vit()[0])
    other.backbone.load_state_dict(adapted.backbone.state_dict())
    import_adapter(other, tmp_path)
    assert torch.allclose(other.eval()(image).summary, merged, atol=1e-6)
    assert isinstance(other.methods["default"], Imported)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank 0 at model/blocks/0/attn/qkv:query: its matrix is 24 x 24, so use 1 to 24"),
        ({"rank": 25}, "rank 25 at model/blocks/0/attn/qkv:query"),
        ({"experts": 1}, "1 experts at model/blocks/0/attn/qkv:query"),
        ({"dropout": 1.0}, "MoSL dropout 1.0: use a probability"),
        ({"consistency": -1.0}, "MoSL consistency -1.0: use a weight"),
        ({"roles": ("attention.keys",)}, "has no site with role 'attention.keys'"),
    ],
)
def test_wrong_arguments_of_mosl_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        mosl(**arguments)


def test_mosl_has_no_official_file():
    with pytest.raises(RequestError, match="'default' has method MoSL: the official files name one MoSA adapter"):
        merged_state(mosl()[0])


# -- copies ------------------------------------------------------------------------------------------------------------


def published(layer: Split, x: torch.Tensor, drawn: list[int]) -> list[nn.Linear]:
    """Experts as the published code trains them: whole layers, masked gradients, all of them in every step."""
    experts = [nn.Linear(layer.weight.shape[-1], layer.weight.shape[-2]) for _ in range(layer.experts)]
    first = layer.weight[0] if layer.copies else layer.weight
    for e, expert in enumerate(experts):
        with torch.no_grad():
            expert.weight.copy_(first)
            expert.bias.copy_(layer.bias[e])
    weights, biases = [e.weight for e in experts], [e.bias for e in experts]
    groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, 0.02)
    for e in drawn:
        for parameter in (*weights, *biases):
            parameter.grad = torch.zeros_like(parameter)
        experts[e](x).square().sum().backward()
        for i, weight in enumerate(weights):
            weight.grad.mul_(layer.owner == i)
        optimiser.step()
    return experts


@pytest.mark.parametrize("copies", [True, False])
def test_copies_train_as_the_published_experts_do(copies):
    torch.manual_seed(0)
    layer, x, drawn = Split(6, 5, 3, start="kaiming", copies=copies), torch.randn(7, 6), [0, 2, 2, 1, 0]
    start = layer.weight.detach().clone()
    experts = published(copy.deepcopy(layer), x, drawn)
    groups = [{"params": [layer.weight], "weight_decay": 0.3}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, 0.02)
    for e in drawn:
        optimiser.zero_grad()
        layer(x, torch.tensor(e)).square().sum().backward()
        optimiser.step()
    if not copies:
        for e, expert in enumerate(experts):
            ours, own = layer.matrix(torch.tensor(e)), layer.owner == e
            assert torch.equal(ours[~own], start[~own])
            assert not torch.allclose(ours[~own], expert.weight[~own], atol=1e-4)
        return
    for e, expert in enumerate(experts):
        ours, own = layer.matrix(torch.tensor(e)), layer.owner == e
        assert torch.allclose(layer.bias[e], expert.bias, atol=1e-6)
        assert torch.allclose(ours, expert.weight, atol=1e-6)
        assert torch.allclose(ours[~own], start[e][~own] * (1 - 0.02 * 0.3) ** 5, atol=1e-6)
    theirs = torch.stack([expert.weight for expert in experts])
    assert torch.allclose(layer.merged()[0], theirs.mean(0), atol=1e-6)
    layer.merge = "union"
    assert torch.allclose(layer.merged()[0], theirs.gather(0, layer.owner.long()[None])[0], atol=1e-6)


@pytest.mark.parametrize("kind", [model, mosl])
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_without_decay_copies_change_nothing(kind, share):
    outputs = []
    for copies in (False, True):
        adapted, image = kind(share=share, copies=copies)
        optimiser, task = torch.optim.AdamW(adapted.trainable().values(), 0.02, weight_decay=0.0), Scores(adapted)
        adapted.train()
        for number in range(3):
            adapted.step(number)
            optimiser.zero_grad()
            adapted.loss(task, image).backward()
            optimiser.step()
        outputs.append(adapted.eval()(image).summary)
    assert torch.allclose(*outputs, atol=1e-5)


def test_counts_with_copies_and_what_a_file_of_the_official_code_cannot_fill():
    adapted, _ = model(share="up", copies=True)
    assert adapted.count()["adapter"] == 4 * (4 * 4 * 24 + 4 * 4 + 4 * 24 + 24 + 2 * 24)
    assert sum(t.numel() for t in merged_state(adapted).values()) == 4 * (2 * 4 * 24 + 4 + 24 + 2 * 24)
    with pytest.raises(RequestError, match="'default' has copies: the official files are read into one without"):
        load_official(adapted, "official.pth")


def test_biases_of_experts_do_not_decay():
    adapted, _ = model(share="none", copies=True)
    names = {id(p): n for n, p in adapted.trainable().items()}
    optimiser, _ = Optimiser(weight_decay=0.01).build(adapted, 10)
    decay = {names[id(p)]: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert {n.rpartition(".")[2] for n, d in decay.items() if d} == {"weight"}
    assert all(not d for n, d in decay.items() if n.endswith("bias") or ".norm." in n)
    assert all(decay[n] == 0.01 for n in decay if n.endswith(("down.weight", "up.weight")))


# -- Swin --------------------------------------------------------------------------------------------------------------

SWIN = {"style": "adaptformer", "norm": False}


def swin(*, meta: bool = False, **more):
    """A timm Swin with its MLPs described, blocks counted through its stages."""
    import timm

    with torch.device("meta" if meta else "cpu"):
        backbone = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **more)
    mlps = [(path, block.mlp) for path, block in backbone.named_modules() if hasattr(block, "attn")]
    sites = [
        Site("mlp", depth, f"{path}.mlp", mlp, None, layout="BHWC", width=mlp.fc2.out_features)
        for depth, (path, mlp) in enumerate(mlps)
    ]
    return backbone, Sites(sites, "swin")


def test_in_swin_it_reads_what_the_mlp_reads():
    torch.manual_seed(0)
    backbone, sites = swin(img_size=28, window_size=7, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
    image = torch.randn(2, 3, 28, 28)
    adapted = adapt(backbone, MoSA(width=4, dropout=0.0, **SWIN), sites=sites, example=(image,))
    block, adapter = backbone.layers[1].blocks[1], adapted.bank["default"]["layers/1/blocks/1/mlp"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 7, 7, 16)
    z = x + block._attn(block.norm1(x))
    with adapted.disabled():
        plain = z + block.mlp(block.norm2(z))
    branch = F.linear(F.gelu(adapter.down(block.norm2(z))), *adapter.up.merged())
    adapted.eval()
    assert torch.allclose(block(x), plain + 0.1 * branch, atol=1e-5)
    assert not torch.allclose(block(x), plain, atol=1e-3)
    assert isinstance(adapter.norm, nn.Identity)


def test_counts_on_swin_base_are_those_of_its_stages_without_norms():
    backbone, sites = swin(meta=True)
    adapted = adapt(backbone, MoSA(width=64, **SWIN), sites=sites)
    widths = [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
    assert [site.width for site in sites] == widths
    assert adapted.count()["adapter"] == sum(2 * 64 * w + 64 + 4 * w for w in widths)
    assert sum(t.numel() for t in merged_state(adapted).values()) == sum(2 * 64 * w + 64 + w for w in widths)
