"""What backward needs, recomputed or moved: the same gradients bit for bit, whatever happens between the two runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared import recompute
from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.memory import Saving, saved_bytes
from shared.methods import LoRA, MoSA
from shared.recompute import offloaded
from shared.training import Engine, fit
from tests.shared.hosts import HOSTS
from tests.shared.training import in_processes
from tests.shared.training.problem import Data
from tests.shared.training.test_fit import Interrupted, interrupt


def vit(method=None) -> tuple[Adapted, Tensor]:
    torch.manual_seed(1)
    backbone, (image,), _ = HOSTS["vit"]()
    model = adapt(backbone, method or LoRA(rank=2, dropout=0.2)).train()
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, image


def gradients(model: Adapted, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss().backward()
    return {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}


def check_same(model: Adapted, loss: Callable[[], Tensor]) -> None:
    kept = gradients(model, loss)
    model.recompute = True
    again = gradients(model, loss)
    assert kept.keys() == again.keys()
    assert kept
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_blocks_run_twice_and_only_their_inputs_are_kept():
    model, image = vit()
    calls, model.recompute = [], True
    for site in model.sites().select("attention", "all"):
        site.module.register_forward_hook(lambda *_: calls.append(1))
    count = len(model.sites().select("attention", "all"))
    with saved_bytes(model) as kept:
        loss = model(image).summary.sum()
    assert len(calls) == count
    loss.backward()
    assert len(calls) == 2 * count
    assert not any("forward" in m.__dict__ for m in model.backbone.modules())
    model.recompute = False
    with saved_bytes(model) as before:
        model(image)
    assert sum(kept.values()) < 0.3 * sum(before.values())


def test_without_gradients_nothing_is_wrapped():
    model, image = vit()
    model.eval().recompute = True
    with torch.no_grad():
        assert torch.equal(model(image).summary, model(image).summary)


def test_an_error_in_a_block_leaves_the_model_as_it_was():
    model, image = vit()
    model.recompute = True
    hook = model.sites().select("mlp", "all")[0].module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(image)
    hook.remove()
    assert not any("forward" in m.__dict__ for m in model.backbone.modules())
    model(image).summary.sum().backward()


def test_two_passes_with_different_draws_before_one_backward():
    model, image = vit(MoSA(width=4, dropout=0.3))
    model.step(3)

    def loss() -> Tensor:
        outputs = []
        for turn in (0, 1, None):
            for adapter in model.bank.modules():
                if hasattr(adapter, "turn"):
                    vars(adapter)["turn"] = turn
            outputs += [model(image).summary] if turn is not None else []
        assert not torch.equal(*outputs)
        return (outputs[0] * outputs[1].detach() + outputs[1].square()).sum()

    check_same(model, loss)


def test_other_adapters_and_another_context_at_the_time_of_backward():
    model, image = vit()
    model.add(LoRA(rank=3), name="other")
    nn.init.normal_(next(model.bank["other"].parameters()))
    model.activate("default", "other")

    def loss() -> Tensor:
        both = model(image, adapters=["other", "default", None]).summary
        model.activate("default", "other")
        return both.square().sum() + model(image).summary.sum()

    check_same(model, loss)


class Noting(nn.Module):
    """Blocks that write to the context and to a list of a caller, and read what the last one wrote."""

    def __init__(self, model: nn.Module, context):
        super().__init__()
        self.inner, self.context = model, context

    def forward(self, x: Tensor) -> Tensor:
        told = vars(self.context)
        told.setdefault("notes", []).append(1)
        told["scale"] = told.get("scale", 1.0) * 1.5
        return torch.tanh(self.inner(x)) * told["scale"] * len(told["notes"])


def test_what_blocks_tell_each_other_is_told_once():
    from shared.sites import Site, Sites, describe

    torch.manual_seed(0)
    backbone = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    model = Adapted(backbone)
    for i, layer in enumerate(backbone):
        backbone[i] = Noting(layer, model.context)
    blocks = [Site("block", i, str(i), layer, parameter=None) for i, layer in enumerate(backbone)]
    model = Adapted(backbone, sites=Sites([*describe(backbone), *blocks], "blocks"))
    for block in backbone:
        vars(block)["context"] = model.context
    model.add(LoRA(rank=2, roles=("linear",), dropout=0.1))
    nn.init.normal_(next(model.bank.parameters()))
    model.train()
    x = torch.randn(5, 6)
    check_same(model, lambda: model(x).square().sum())


@pytest.mark.parametrize("saving", [Saving(), Saving(attention=True)])
def test_codes_and_recomputing_go_together(saving):
    model, image = vit()
    model.saving = saving
    check_same(model, lambda: model(image).summary.square().sum())


def test_a_backbone_without_blocks_is_refused():
    backbone, inputs, sites = HOSTS["convolutions"]()
    model = adapt(backbone, LoRA(rank=2, roles=("conv",)), sites=sites, example=inputs)
    with pytest.raises(RequestError, match="describes no blocks that could be recomputed"):
        Engine(epochs=1, recompute=True).economise(model)
    assert not model.recompute


def test_offloading_leaves_parameters_where_they_are_and_changes_nothing():
    model, image = vit()
    before = gradients(model, lambda: model(image).summary.square().sum())
    model.offload = True
    after = gradients(model, lambda: model(image).summary.square().sum())
    assert all(torch.equal(before[n], after[n]) for n in before)
    moved = []
    plain = recompute.saved_tensors_hooks
    with contextlib.ExitStack() as stack:
        recompute.saved_tensors_hooks = lambda away, back: plain(lambda t: moved.append(away(t)) or moved[-1], back)
        stack.callback(setattr, recompute, "saved_tensors_hooks", plain)
        with offloaded(model):
            model.backbone(image)
    assert moved
    assert all(tensor.device == device for device, tensor in moved)


def test_on_a_cpu_offloading_is_refused_in_one_line(tmp_path):
    with pytest.raises(RequestError, match=r"trainer\.offload moves a GPU's activations .* trains on the CPU"):
        fit(in_processes.line(), Data(), Engine(epochs=1, device="cpu", offload=True), tmp_path)
    with pytest.raises(RequestError, match=r"trainer\.saved_attention: give saved_bits too"):
        Engine(epochs=1, saved_attention=True)


def test_a_run_that_recomputes_is_one_that_does_not_and_bit_for_bit_itself_resumed(tmp_path):
    def trained(name: str, stop: bool = False, resume: bool = False, **how) -> dict[str, Tensor]:
        task = in_processes.line()
        torch.manual_seed(11)
        engine = Engine(epochs=4, device="cpu", **how)
        if stop:
            with contextlib.suppress(Interrupted):
                fit(interrupt(task, epoch=2, batch=1), Data(noisy=True), engine, tmp_path / name)
            return {}
        fit(task, Data(noisy=True), engine, tmp_path / name, resume=resume)
        return {n: t.clone() for n, t in task.state_dict().items()}

    plain, again = trained("plain"), trained("again", recompute=True)
    trained("stopped", stop=True, recompute=True)
    resumed = trained("stopped", resume=True, recompute=True)
    assert all(torch.equal(again[n], resumed[n]) for n in plain)
    for name in plain:  # kept, an input behind a norm is made again from what the norm keeps, which rounds otherwise
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)


def test_a_copy_recomputes_its_own_blocks():
    model, image = vit()
    model.recompute = True
    twin = copy.deepcopy(model)
    for parameter in twin.bank.parameters():
        nn.init.zeros_(parameter)
    loss = twin(image).summary.sum()
    assert torch.equal(loss, copy.deepcopy(twin)(image).summary.sum())
