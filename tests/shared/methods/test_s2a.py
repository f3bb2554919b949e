"""S2A: what trains, what stays, and how little a training step keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones import TimmViT
from shared.adapted import adapt
from shared.blocks.side import Border, Side
from shared.errors import RequestError
from shared.memory import saved_bytes
from shared.methods import S2A, AdaptFormer, LoRA
from shared.sites import Site, Sites
from tests.shared.hosts import HOSTS
from tests.shared.methods.test_family import vit_base

SMALL = {"reduction": 6, "prompt_rank": 2}
LADDER = {"side": "ladder", "bias": False, "prompts": 0, "reduction": 8}


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (S2A(), 823_296),
        (S2A(prompts=0, side=None), 102_912),
        (S2A(bias=False, side=None), 37_248),
        (S2A(bias=False, side=None, prompt_rank=None), 73_728),
        (S2A(bias=False, prompts=0), 683_136),
    ],
)
def test_counts_on_vit_base(method, count):
    assert adapt(vit_base(), method).count()["adapter"] == count


def vit(**arguments):
    backbone, (image,), _ = HOSTS["vit"]()
    backbone.eval()
    bare = backbone(image).summary.detach()
    return adapt(backbone, S2A(**(SMALL | arguments))), image, bare


def test_identity_at_the_start_but_for_the_prompts():
    for arguments in ({"prompts": 0}, LADDER):
        model, image, bare = vit(**arguments)
        assert torch.equal(model.eval()(image).summary, bare)
    model, image, bare = vit(prompts=4)
    assert not torch.allclose(model.eval()(image).summary, bare, atol=1e-4)


def test_a_block_with_all_its_parts_is_the_written_out_computation():
    model, _, _ = vit(prompts=3, bias=False)
    around = model.bank["default"]["model/blocks/1"]
    for parameter in around.parameters():
        nn.init.normal_(parameter, std=0.3)
    block, x = model.backbone.model.blocks[1], torch.randn(2, 1 + 24, 24)
    model.context.grid = (4, 6)
    with torch.no_grad():
        y = block(x)
        prompts = (around.prompts.A @ around.prompts.B).expand(2, -1, -1)
        with model.disabled():
            plain = block(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        plain = torch.cat([plain[:, :1], plain[:, 4:]], dim=1)
        maps = x[:, 1:].transpose(1, 2).reshape(2, 24, 4, 6)
        pooled = F.avg_pool2d(maps, 2)
        side = around.side
        first = torch.cat(
            [side.conv1.weight[i * 2 : i * 2 + 2, :, 0, 0] @ pooled.reshape(2, 2, 12, 6)[:, i] for i in (0, 1)], 1
        )
        h = F.layer_norm(first.transpose(1, 2), (4,), side.norm1.weight, side.norm1.bias).relu()
        h = F.layer_norm(h @ side.conv2.weight[:, :, 0, 0].T, (24,), side.norm2.weight, side.norm2.bias)
        h = F.interpolate(h.transpose(1, 2).reshape(2, 24, 2, 3), scale_factor=2, mode="bilinear")
        expected = plain + F.pad(h.flatten(2).transpose(1, 2), (0, 0, 1, 0))
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(y[:, 0], plain[:, 0], atol=1e-6)  # the class token passes the side path by


def test_the_pool_of_odd_sides_keeps_the_mean_of_a_constant():
    side = Side(8, 2, kernel=1, batch=False, where="here")
    nn.init.ones_(side.norm2.weight)
    y = side(torch.ones(1, 8, 5, 7))
    assert y.shape == (1, 8, 5, 7)
    assert float((y - y[..., :1, :1]).abs().max().detach()) < 1e-6


def test_no_weight_of_the_backbone_gets_a_gradient():
    model, image, _ = vit(prompts=3)
    model.train()(image).summary.square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    trained = model.trainable()
    assert {n.rpartition(".")[2] for n in trained if ":bias" in n} == {"value"}
    assert sum(":bias" in n for n in trained) == 4 * 6 + 2


def test_coded_activations_change_gradients_alone():
    model, image, _ = vit(prompts=3)
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = torch.randn(3, 24)

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        y = model.train()(image).summary
        (y * weights).sum().backward()
        return y.detach(), torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None])

    coded, close = step()
    model.methods["default"] = S2A(**SMALL, prompts=3, bits=None)
    y, exact = step()
    assert torch.equal(coded, y)
    assert 0 < float((close - exact).norm()) < 0.15 * float(exact.norm())


def test_a_step_keeps_a_third_of_what_others_keep():
    """On three blocks of ViT-B/16 at 224 pixels: all blocks but the first keep alike."""
    name, few = "vit_base_patch16_224", {"depth": 3}
    backbone = TimmViT(3, name=name, weights="random", image_size=224, depths=[2], model_args=few)
    image, kept = torch.randn(1, 3, 224, 224), {}
    for key, method in {
        "S2A": S2A(), "kernel": S2A(attention=False), "AdaptFormer": AdaptFormer(), "LoRA": LoRA()
    }.items():  # fmt: skip
        model = adapt(backbone, method).train()
        with saved_bytes(model) as told:
            model(image)
        kept[key] = sum(told.values())
        model.remove()
    assert kept["S2A"] < kept["AdaptFormer"] / 3
    assert kept["S2A"] < kept["LoRA"] / 4
    # with attention left to its fused kernel, which is most of what remains, only about half
    assert kept["LoRA"] / 3 < kept["kernel"] < 0.6 * kept["LoRA"]


def test_nothing_of_the_backbone_is_in_the_graph_of_a_ladder():
    model, image, _ = vit(**LADDER)
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    frozen = {t.untyped_storage().data_ptr() for t in model.backbone.parameters()}
    met = []

    def keep(tensor: Tensor) -> Tensor:
        met.append(tensor.untyped_storage().data_ptr() in frozen)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model.train()(image).summary
    assert len(met) > 20
    assert not any(met)
    y.sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_the_ladder_is_its_recursion():
    model, image, bare = vit(**LADDER)
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    bank, tokens = model.bank["default"], model.backbone.embed(image).tokens
    state: Tensor | float = 0.0
    with torch.no_grad():
        y = model.eval()(image).summary
        with model.disabled():
            for depth, block in enumerate(model.backbone.blocks):
                tokens, rung = block(tokens), bank[f"model/blocks/{depth}"]
                gate = torch.sigmoid(rung.alpha / 0.1)
                h = gate * state + (1 - gate) * rung.down(tokens)
                state = h + rung.step(h)
        expected = bare + bank["model/norm"].up(state[:, 0])  # type: ignore[index]
    assert torch.allclose(y, expected, atol=1e-5)


class Stage(nn.Module):
    """A residual block on maps, with a norm that has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def test_on_maps_it_has_a_border_and_grouped_convolutions():
    stage, x = Stage().eval(), torch.randn(2, 8, 6, 7)
    sites = Sites([
        Site("block", 0, "", stage, None, layout="BCHW", width=8),
        Site("conv", 0, "conv", stage.conv, layout="BCHW", width=8),
        Site("norm", 0, "norm", stage.norm, layout="BCHW", width=8),
    ])  # fmt: skip
    bare = stage(x).detach()
    model = adapt(stage, S2A(prompts=2, reduction=2, kernel=5), sites=sites, example=(x,))
    around = model.bank["default"]["model"]
    assert isinstance(around.prompts, Border)
    assert around.side.conv1.weight.shape == (4, 4, 5, 5)
    assert isinstance(around.side.norm1, nn.BatchNorm2d)
    assert set(model.bank["default"]) == {"model", "norm:bias", "conv"}
    assert torch.equal(model.eval()(x), bare)
    assert model.count()["adapter"] == 8 + 8 + 4 * 8 * 2 + 4 * 4 * 25 + 8 + 32 + 16
    with torch.no_grad():
        around.prompts.sides[0].fill_(1.0)  # top
        framed = around.prompts(x) - x
    assert torch.allclose(framed[:, :, :2], torch.ones(2, 8, 2, 7), atol=1e-6)
    assert float(framed[:, :, 2:].abs().max()) < 1e-6
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())


def classes(seed: int, bits: int | None) -> float:
    """Accuracy on unseen images of four orientations of stripes, after 40 steps on a frozen random ViT."""
    torch.manual_seed(seed)
    small = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    backbone = TimmViT(3, name="vit_tiny_patch16_224", image_size=16, patch_size=4, weights="random", model_args=small)
    label = torch.arange(900) % 4
    angle, phase = label * torch.pi / 4, torch.rand(900) * 6.3
    at = torch.arange(16.0)
    wave = at[None, None] * angle.cos()[:, None, None] + at[None, :, None] * angle.sin()[:, None, None]
    image = (wave + phase[:, None, None]).sin()[:, None].expand(-1, 3, -1, -1) + 0.5 * torch.randn(900, 3, 16, 16)
    model, head = adapt(backbone, S2A(bits=bits, prompts=4, reduction=4)).train(), nn.Linear(48, 4)
    optimiser = torch.optim.AdamW([*model.trainable().values(), *head.parameters()], 3e-3)
    for step in range(40):
        batch = slice(step % 8 * 32, step % 8 * 32 + 32)
        optimiser.zero_grad()
        F.cross_entropy(head(model(image[batch]).summary), label[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        return float((head(model.eval()(image[256:]).summary).argmax(1) == label[256:]).float().mean())


def test_training_with_codes_stays_within_a_point():
    exact, coded = classes(0, None), classes(0, 4)
    assert exact > 0.5  # chance is 0.25
    assert coded > exact - 0.01


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: S2A(bias=False, prompts=0, side=None), "neither bias, prompts nor side"),
        (lambda: S2A(prompts=-1), "S2A prompts -1"),
        (lambda: S2A(kernel=4), "kernel 4: use"),
        (lambda: S2A(bits=5), "codes of 5 bits"),
        (lambda: S2A(side="ladder"), "use bias=False, prompts=0"),
        (lambda: adapt(vit_base(), S2A(prompt_rank=9)), "prompt rank 9 at model/blocks/0: use 1 to 8"),
        (lambda: adapt(vit_base(), S2A(reduction=512)), "make 1; both must fall into 2 groups"),
        (lambda: Border(4, 5)(torch.zeros(1, 4, 3, 8)), "a border of 5 pixels on maps of 3 x 8"),
    ],
)
def test_wrong_arguments_are_one_line(method, message):
    with pytest.raises(RequestError, match=message):
        method()
