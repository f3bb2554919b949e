"""The adapter file holds what trained and nothing else, is written whole or not at all, and is refused when unfit."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from shared import LoRA, RequestError, WorkError, adapt, store
from shared.methods import Full

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Head(nn.Module):
    """A linear head with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x, size):
        return self.out(x)


def model_of(seed: int = 0, method=None, head: bool = True):
    torch.manual_seed(seed)
    host = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return adapt(host, method or LoRA(rank=2, roles="linear"), head=Head() if head else None)


def saved(tmp_path, **more):
    model = model_of(**more)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.normal_()
    model.save(tmp_path / "a.safetensors", metrics={"miou": 0.5}, extra={"classes": ["a", "b"]})
    return model, tmp_path / "a.safetensors"


def test_it_holds_the_adapter_the_head_and_the_facts(tmp_path) -> None:
    model, path = saved(tmp_path)
    header = store.read_header(path)
    assert list(header["tensors"]) == sorted(
        ["head.out.bias", "head.out.weight", "head.seen", *(f"adapter.{k}.{t}" for k in "02" for t in ("down", "up"))]
    )
    assert header["tensors"]["adapter.0.down"] == {"dtype": "F32", "shape": (2, 6)}
    assert header["method"]["type"] == "LoRA"
    assert header["method"]["arguments"]["rank"] == 2
    assert header["backbone"] == {"name": "Sequential", "fingerprint": model.fingerprint}
    assert header["sites"] == ["0", "2"]
    assert header["metrics"] == {"miou": 0.5}
    assert header["extra"] == {"classes": ["a", "b"]}
    assert path.stat().st_size < 4096
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_head_comes_back(tmp_path) -> None:
    model, path = saved(tmp_path)
    other = model_of()
    other.load(path)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_the_name_of_an_adapter_is_not_in_its_file(tmp_path) -> None:
    _, path = saved(tmp_path, head=False)
    other = model_of(head=False)
    other.add(LoRA(rank=2, roles="linear"), name="second")
    untouched = {n: t.clone() for n, t in other.bank["default"].state_dict().items()}
    other.load(path)
    assert torch.equal(other.bank["second"]["0"].down, store.read(path)[0]["adapter.0.down"])
    assert all(torch.equal(untouched[n], t) for n, t in other.bank["default"].state_dict().items())


def test_full_fine_tuning_saves_the_backbone(tmp_path) -> None:
    model, path = saved(tmp_path, method=Full())
    assert {"backbone.0.weight", "backbone.2.bias"} <= set(store.read_header(path)["tensors"])
    other = model_of(method=Full())
    other.load(path)  # the fingerprint is that of the weights before they trained
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_another_backbone_is_refused_with_both_fingerprints(tmp_path) -> None:
    model, path = saved(tmp_path)
    other = model_of(seed=1)
    before = {n: t.clone() for n, t in other.trained_state().items()}
    with pytest.raises(RequestError) as error:
        other.load(path)
    assert model.fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    assert all(torch.equal(before[n], t) for n, t in other.trained_state().items())
    other.load(path, other_backbone=True)
    assert torch.equal(other.head.out.weight, model.head.out.weight)


def test_another_method_or_shape_is_refused(tmp_path) -> None:
    _, path = saved(tmp_path)
    with pytest.raises(RequestError, match="an adapter of method LoRA; the active one is Full"):
        model_of(method=Full()).load(path)
    with pytest.raises(RequestError, match="4 of another shape .first: adapter.default.0.down"):
        model_of(method=LoRA(rank=3, roles="linear")).load(path)
    with pytest.raises(RequestError, match="3 unexpected .first: head.out.bias"):
        model_of(head=False).load(path)


def test_every_cut_is_noticed(tmp_path) -> None:
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, 40, 7), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(RequestError, match="cut short|does not parse"):
            store.read_header(cut)
        with pytest.raises(RequestError, match="cut short|does not parse"):
            model_of().load(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(RequestError, match="promises"):
        store.read_header(cut)


def test_foreign_files_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RequestError, match="not an omniadapt adapter"):
        store.read_header(tmp_path / "foreign.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "new.safetensors", metadata={"omniadapt": json.dumps({"format": 9})})
    with pytest.raises(RequestError, match="adapter format 9; this version reads format 1"):
        store.read_header(tmp_path / "new.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(RequestError, match="not a safetensors file|cut short"):
        store.read_header(tmp_path / "noise.safetensors")
    with pytest.raises(RequestError, match="no such file"):
        store.read_header(tmp_path / "absent.safetensors")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    model, path = saved(tmp_path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="a.safetensors: cannot be written: No space left"):
        model.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_nothing_to_save_and_merged_weights_are_refused(tmp_path) -> None:
    model = model_of(head=False)
    model.activate()
    with pytest.raises(RequestError, match="one adapter a file; active are none"):
        model.save(tmp_path / "b.safetensors")
    other = model_of()
    other.merge()
    with pytest.raises(RequestError, match="unmerge.. before"):
        other.save(tmp_path / "b.safetensors")
    with pytest.raises(RequestError, match="nothing to save"):
        store.save(tmp_path / "b.safetensors", {}, {})
    assert not os.listdir(tmp_path)


def test_a_frozen_adapter_is_saved_whole(tmp_path) -> None:
    model = model_of(head=False)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter)
        parameter.requires_grad_(False)
    model.save(tmp_path / "a.safetensors")
    other = model_of(head=False)
    other.load(tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
