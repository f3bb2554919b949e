"""AdapterFusion over adapters of one model: its spec's "What must hold", files and removal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared import store
from shared.adapted import Adapted, adapt
from shared.errors import RequestError, WorkError
from shared.methods import AdapterFusion, LoRA, Pfeiffer
from shared.methods.adapter_fusion import distance, from_adapter_hub, frozen
from shared.sites import Site, Sites
from tests.shared.hosts import HOSTS
from tests.shared.test_capabilities import out, rows

MEMBERS = {"a": None, "b": None, "c": None}


def noisy(model: Adapted, name: str, seed: int, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.bank[name].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def with_members(host: str, names=("a", "b", "c"), scale: float = 0.2, **pfeiffer):
    """A model with finished adapters."""
    torch.manual_seed(1)
    backbone, inputs, sites = HOSTS[host]()
    model = Adapted(backbone.eval(), sites=sites)
    for seed, name in enumerate(names):
        model.add(Pfeiffer(**{"reduction": 4, **pfeiffer}), name=name)
        noisy(model, name, seed, scale)
    return model, inputs


def block(width: int = 8, count: int = 3, **fusion):
    """One norm that ends a block, with ``count`` members and a fusion."""
    torch.manual_seed(2)
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight)
    model = Adapted(norm, sites=Sites([Site("norm", 0, "", norm, width=width, tags=("block_end",))]))
    names = [f"m{i}" for i in range(count)]
    for i, name in enumerate(names):
        model.add(Pfeiffer(reduction=2), name=name)
        noisy(model, name, i, 0.4)
    model.add(AdapterFusion(members=dict.fromkeys(names), dropout=0.0, **fusion), name="fusion")
    noisy(model, "fusion", 9, 0.3)
    return model, model.bank["fusion"]["model"], torch.randn(2, 5, width)


def test_an_adapter_is_after_the_norm_of_the_sum_and_the_norm_runs_twice():
    model, _, s = block()
    model.activate("m1")
    norm, branch = model.backbone, model.bank["m1"]["model"].branch
    z = nn.functional.layer_norm(s, (8,), norm.weight, norm.bias)
    a = torch.relu(z @ branch.down.weight.T + branch.down.bias) @ branch.up.weight.T + branch.up.bias
    assert torch.allclose(model(s), nn.functional.layer_norm(s + a, (8,), norm.weight, norm.bias), atol=1e-6)


def test_without_a_norm_it_is_after_the_block():
    model, _ = with_members("vit", ("a",))
    blocks = model.backbone.model.blocks
    key = "model/blocks/1"
    branch, x = model.bank["a"][key].branch, torch.randn(2, 21, 24)
    with model.disabled():
        plain = blocks[1](x)
    assert torch.allclose(blocks[1](x), plain + branch(plain), atol=1e-6)
    assert all(key.endswith("output/LayerNorm") for key in with_members("bert", ("a",))[0].bank["a"])


def test_shares_sum_to_one_and_follow_the_order_of_the_members():
    _, fusion, _ = block()
    z, members = torch.randn(2, 5, 8), fusion.members
    outputs = torch.stack([frozen(m, z) for m in members], -2)
    p, change = fusion.attention(z, outputs), fusion.change(z)
    assert torch.allclose(p.sum(-1), torch.ones(2, 5), atol=1e-6)
    assert p.std(-1).max() > 0.01  # they differ
    order = [2, 0, 1]
    fusion.__dict__["members"] = tuple(members[i] for i in order)
    assert torch.allclose(fusion.attention(z, outputs[:, :, order]), p[..., order], atol=1e-6)
    assert torch.allclose(fusion.change(z), change, atol=1e-6)


def test_equal_members_give_that_member_through_the_value():
    _, fusion, _ = block()
    fusion.__dict__["members"] = fusion.members[:1] * 4
    z = torch.randn(3, 2, 8)
    assert torch.allclose(fusion.change(z), fusion.value(fusion.members[0](z)), atol=1e-5)


def test_members_with_zero_up_leave_the_backbone_exactly():
    model, inputs = with_members("bert")
    with model.disabled():
        bare = out(model, inputs)
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    assert not torch.allclose(out(model.eval(), inputs), bare, atol=1e-3)
    with torch.no_grad():
        for name in MEMBERS:
            for adapter in model.bank[name].values():
                for parameter in adapter.branch.up.parameters():
                    parameter.zero_()
    assert torch.equal(out(model, inputs), bare)


def test_members_that_do_nothing_are_noticed():
    """Attaching proves the effect: untrained members give the fusion nothing to mix."""
    model, inputs = with_members("bert", scale=0.0, start="zero")
    with pytest.raises(WorkError, match="adapter 'fusion' received no gradient: its output is not used"):
        model.add(AdapterFusion(members=MEMBERS), name="fusion", example=inputs)
    assert set(model.methods) == set(MEMBERS)


def test_only_the_fusion_learns():
    model, inputs = with_members("bert")
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    kept = {n: t.clone() for name in MEMBERS for n, t in model.bank[name].state_dict(prefix=f"{name}.").items()}
    model.train()
    trained = model.trainable()
    assert {n.split(".")[1] for n in trained} == {"fusion"}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    (rows(model(*inputs)).square().sum() + model.penalty()).backward()
    assert all(p.grad is None for name in MEMBERS for p in model.bank[name].parameters())
    assert all(p.grad is None for p in model.backbone.parameters())
    optimiser.step()
    assert all(not torch.equal(p, before[n]) for n, p in trained.items() if not n.endswith("key.bias"))
    after = {n: t for name in MEMBERS for n, t in model.bank[name].state_dict(prefix=f"{name}.").items()}
    assert all(torch.equal(after[n], t) for n, t in kept.items())


def test_the_extra_loss_is_the_distance_of_the_value_from_the_identity():
    model, fusion, _ = block(width=12, regularisation=0.25)
    value = torch.randn(12, 12)
    with torch.no_grad():
        fusion.value.weight.copy_(value)
    assert float(model.penalty().detach()) == pytest.approx(
        0.25 * float((torch.eye(12) - value).square().sum()), rel=1e-5
    )
    assert float(distance(torch.eye(7))) == 0
    start = AdapterFusion(members=MEMBERS).build(Site("block", 0, "", nn.Identity(), None, width=9)).value
    assert float(distance(start.weight.detach())) == pytest.approx(
        9 * 8 * 1e-12, rel=1e-3
    )  # 1e-6 squared, off the diagonal
    assert block(value=False)[0].penalty() == block(regularisation=0.0)[0].penalty() == 0


def test_counts_on_bert_base_whatever_the_number_of_members():
    from modalities.language.backbones import TransformersText

    for count in (2, 5):
        with torch.device("meta"):
            backbone = TransformersText(name="bert-base-uncased")
        names = [f"m{i}" for i in range(count)]
        model = adapt(backbone, Pfeiffer(), name="m0")
        assert model.count()["adapter"] == 894_528
        model.add(AdapterFusion(members=dict.fromkeys(names)), name="fusion")
        assert model.count()["adapter"] == 21_252_096 == 12 * (2 * (768**2 + 768) + 768**2)
    model.add(AdapterFusion(members=dict.fromkeys(names), value=False), name="static")
    assert model.count()["adapter"] == 12 * 2 * (768**2 + 768)


def test_every_member_runs_once_a_block():
    model, inputs = with_members("bert")
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    calls: list[str] = []
    for name in MEMBERS:
        for adapter in model.bank[name].values():
            adapter.branch.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    out(model, inputs)
    assert sorted(calls) == sorted([*MEMBERS] * 2)  # two blocks


def test_its_file_holds_the_fusion_alone_and_members_come_from_theirs(tmp_path):
    model, inputs = with_members("bert")
    for name in MEMBERS:
        model.activate(name)
        model.save(tmp_path / f"{name}.safetensors")
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    noisy(model, "fusion", 5)
    expected = out(model.eval(), inputs)
    model.save(tmp_path / "fusion.safetensors")
    tensors = store.read_header(tmp_path / "fusion.safetensors")["tensors"]
    assert {n.split(".", 2)[2] for n in tensors} == {
        "query.weight", "query.bias", "key.weight", "key.bias", "value.weight",
    }  # fmt: skip

    torch.manual_seed(1)
    backbone, _, sites = HOSTS["bert"]()
    head = nn.Linear(16, 2)  # the members' files have none: the model keeps its own
    members = {name: tmp_path / f"{name}.safetensors" for name in MEMBERS}
    other = adapt(backbone, AdapterFusion(members=members), sites=sites, name="mine", head=head)
    assert set(other.methods) == {"a", "b", "c", "mine"}
    assert other.active == ("mine",)
    other.head = None
    header = other.load(tmp_path / "fusion.safetensors")
    assert header["method"]["arguments"]["members"] == {"a": None, "b": None, "c": None}
    assert torch.equal(out(other.eval(), inputs), expected)


def test_a_member_that_changed_since_is_noticed(tmp_path):
    model, inputs = with_members("bert")
    for name in MEMBERS:
        model.activate(name)
        model.save(tmp_path / name)
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    noisy(model, "fusion", 5)
    model.save(tmp_path / "fusion")
    digests = store.read_header(tmp_path / "fusion")["method"]["digests"]
    assert list(digests) == list(MEMBERS)
    assert len(set(digests.values())) == 3
    expected = out(model.eval(), inputs)

    def again(**names) -> Adapted:
        torch.manual_seed(1)
        backbone, _, sites = HOSTS["bert"]()
        members = {name: tmp_path / file for name, file in names.items()}
        return adapt(backbone, AdapterFusion(members=members), sites=sites, name="fusion")

    same = again(x="c", y="a", z="b")  # names and order are free
    same.load(tmp_path / "fusion")
    assert torch.allclose(out(same.eval(), inputs), expected, atol=1e-6)
    model.activate("b")
    noisy(model, "b", 3, 1e-6)
    model.save(tmp_path / "b")
    changed = again(a="a", b="b", c="c")
    before = {n: t.clone() for n, t in changed.trained_state().items()}
    for fusion, message in (
        (changed, "made with other adapters: b of this AdapterFusion changed since or was not among them, b of theirs"),
        (again(a="a", c="c"), "made with other adapters: none of this AdapterFusion .*, b of theirs is not here"),
    ):
        with pytest.raises(RequestError, match=message):
            fusion.load(tmp_path / "fusion")
    assert all(torch.equal(t, before[n]) for n, t in changed.trained_state().items())
    model.activate("b")
    model.save(tmp_path / "b", metrics={"accuracy": 0.5})  # the same weights again, told otherwise
    model.activate("fusion")
    model.save(tmp_path / "fusion")
    again(a="a", b="b", c="c").load(tmp_path / "fusion")


def test_an_activation_that_changed_is_noticed(tmp_path):
    model, _ = with_members("bert")
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    model.save(tmp_path / "fusion")
    other, _ = with_members("bert", activation="gelu")
    other.add(AdapterFusion(members=MEMBERS), name="fusion")
    with pytest.raises(RequestError, match="made with other adapters: a, b, c of this"):
        other.load(tmp_path / "fusion")


def test_a_member_with_a_head_of_its_own_is_taken_without_it(tmp_path):
    torch.manual_seed(1)
    backbone, _, sites = HOSTS["bert"]()
    for name, classes in (("a", 3), ("b", 5)):
        one = adapt(backbone, Pfeiffer(reduction=4), head=nn.Linear(16, classes), sites=sites, name=name)
        noisy(one, name, classes)
        one.save(tmp_path / name)
        one.remove(name)
    head = nn.Linear(16, 2)
    kept = head.weight.detach().clone()
    members = {name: tmp_path / name for name in ("a", "b")}
    model = adapt(backbone, AdapterFusion(members=members), head=head, sites=sites)
    assert torch.equal(head.weight, kept)
    for name in ("a", "b"):
        tensors = store.read(tmp_path / name)[0]
        assert {"head.weight", "head.bias"} <= tensors.keys()
        mine = {f"adapter.{n}": p for n, p in model.bank[name].named_parameters()}
        assert all(torch.equal(p, tensors[n]) for n, p in mine.items())


def test_removal_one_after_the_other():
    model, inputs = with_members("bert")
    model.add(AdapterFusion(members=MEMBERS), name="fusion")
    with pytest.raises(RequestError, match="adapter 'b' is in use: 'fusion' works through it; remove that one first"):
        model.remove("b")
    assert set(model.methods) == {"a", "b", "c", "fusion"}
    model.activate("b")
    alone = out(model, inputs)
    model.remove("fusion")
    assert torch.equal(out(model, inputs), alone)
    for name in MEMBERS:
        model.remove(name)
    assert not any("_port" in m.__dict__ for m in model.backbone.modules())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a": None}, "AdapterFusion members .a.: name two or more"),
        ({}, "AdapterFusion members .none.: name two or more"),
        ({"a": None, "z": None}, "no adapter 'z' to fuse; loaded: a, wide, low, last, other; give its file"),
        ({"a": None, "wide": None}, "adapters 'a' and 'wide' cannot be fused: reduction is 4 and 2"),
        ({"a": None, "other": None}, "cannot be fused: activation is relu and tanh"),
        ({"a": None, "low": None}, "adapter 'low' is LoRA; AdapterFusion fuses Pfeiffer"),
        (
            {"a": None, "last": None},
            "adapter 'last' is on other sites: the fusion acts at .*/0/output/LayerNorm",
        ),
        ({"a": None, "b": "absent.safetensors"}, "absent.safetensors: no such file"),
    ],
)
def test_wrong_members_are_one_line_and_change_nothing(members, message):
    model, _ = with_members("bert", ("a",))
    model.add(Pfeiffer(reduction=2), name="wide")
    model.add(LoRA(rank=2), name="low")
    model.add(Pfeiffer(reduction=4, depth="last 1"), name="last")
    model.add(Pfeiffer(reduction=4, activation="tanh"), name="other")
    before = dict(model.methods)
    with pytest.raises(RequestError, match=message):
        model.add(AdapterFusion(members=members), name="fusion")
    assert model.methods == before
    assert model.active == ("other",)


def test_wrong_files_are_one_line_and_leave_no_member_behind(tmp_path):
    model, _ = with_members("bert", ("a",))
    model.save(tmp_path / "a")
    model.add(LoRA(rank=2), name="low")
    model.save(tmp_path / "low")
    other, _ = with_members("bert", ("x",))
    with torch.no_grad():
        other.backbone.model.embeddings.word_embeddings.weight.add_(1)
    for second, message in (("low", "an adapter of method LoRA"), ("gone", "no such file")):
        with pytest.raises(RequestError, match=message):
            model.add(AdapterFusion(members={"m": tmp_path / "a", "n": tmp_path / second}), name="f")
        assert set(model.methods) == {"a", "low"}
    with pytest.raises(RequestError, match="made for backbone"):
        other.add(AdapterFusion(members={"m": tmp_path / "a", "n": tmp_path / "a"}), name="f")
    assert set(other.methods) == {"x"}
    with pytest.raises(RequestError, match="adapter name 'a': it is taken"):
        model.add(AdapterFusion(members={"a": tmp_path / "a", "low": None}), name="f")


@pytest.mark.parametrize("setting", [{"dropout": 1.0}, {"regularisation": -1.0}, {"regularisation": float("nan")}])
def test_wrong_settings_are_one_line(setting):
    with pytest.raises(RequestError, match=f"AdapterFusion {next(iter(setting))}"):
        AdapterFusion(members=MEMBERS, **setting)
    for reduction in (0, 17):
        with pytest.raises(RequestError, match=f"reduction {reduction} at .*: its width is 16, so use 1 to 16"):
            with_members("bert", ("a",), reduction=reduction)


def test_names_of_adapter_hub_are_ours():
    model, _ = with_members("bert", ("a", "b"))
    model.add(AdapterFusion(members={"a": None, "b": None}), name="fusion")
    theirs = [
        f"bert.encoder.layer.{i}.output.adapters.sst.{part}.{tensor}"
        for i in range(2) for part in ("adapter_down.0", "adapter_up") for tensor in ("weight", "bias")
    ]  # fmt: skip
    keys = list(model.bank["a"])
    assert {from_adapter_hub(n, keys) for n in theirs} == {n for n, _ in model.bank["a"].named_parameters()}
    theirs = [
        f"bert.encoder.layer.{i}.output.adapter_fusion_layer.a,b.{part}"
        for i in range(2) for part in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    ]  # fmt: skip
    assert {from_adapter_hub(n, keys) for n in theirs} == {n for n, _ in model.bank["fusion"].named_parameters()}
    assert from_adapter_hub("bert.encoder.layer.0.output.dense.weight", keys) is None
    with pytest.raises(RequestError, match="the adapter has 2 sites, no layer 7"):
        from_adapter_hub("bert.encoder.layer.7.output.adapters.sst.adapter_up.bias", keys)
