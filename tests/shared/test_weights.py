"""Reading weights: every file that is no plain mapping of names to finite tensors is refused in one line."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared import weights
from shared.errors import RequestError


class Harmful:
    """Runs a command when unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(path) -> str:
    with pytest.raises(RequestError) as caught:
        weights.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt", "x.bin", "x.ckpt"])
@pytest.mark.parametrize("content", [b"", b"garbage garbage garbage", b"PK\x03\x04garbage", b"\x80\x02garbage"])
def test_damaged_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_cut_files_are_refused(name, tmp_path):
    path, state = tmp_path / name, {"a": torch.randn(500)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert torch.equal(weights.read(path)["a"], state["a"])
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        refused(path)


def test_nothing_is_unpickled_but_tensors(tmp_path):
    torch.save({"a": torch.ones(1), "b": Harmful(f"touch {tmp_path}/harm")}, tmp_path / "x.pth")
    assert "holds more than tensors" in refused(tmp_path / "x.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{}, {"a": 1}, torch.ones(3), [torch.ones(3)], {"state_dict": {"a": "b"}}, None])
def test_what_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert "it holds no state dict" in refused(tmp_path / "x.pt")


def test_missing_and_foreign_files_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "a folder, not a file" in refused(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert ".safetensors" in refused(tmp_path / "x.npz")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value, tmp_path):
    torch.save({"model": {"module.a": torch.ones(2), "module.b": torch.tensor([1.0, value])}}, tmp_path / "x.pth")
    assert "tensor b holds numbers that are not finite" in refused(tmp_path / "x.pth")


def test_a_prefix_goes_only_where_all_names_have_it():
    one = torch.ones(1)
    assert set(weights.clean({"module.backbone.a": one, "module.backbone.b": one}, "x")) == {"a", "b"}
    assert set(weights.clean({"backbone.a": one, "head.b": one}, "x")) == {"backbone.a", "head.b"}


def test_filling_changes_nothing_where_something_does_not_fit():
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(RequestError, match=r"1 of the 2 tensors of layer are there; 1 missing \(bias\)"):
        weights.fill(layer, {"weight": torch.zeros(2, 3)}, "layer", "x")
    assert torch.equal(layer.weight, before)
    weights.fill(
        layer, {"weight": torch.zeros(2, 3), "bias": torch.ones(2), "head.weight": torch.ones(1)}, "layer", "x"
    )
    assert layer.weight.count_nonzero() == 0


def test_a_seed_gives_the_same_weights_and_keeps_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = (weights.build(lambda: nn.Linear(4, 4), 7) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.weight, second.weight)
    with torch.device("meta"):
        assert weights.build(lambda: nn.Linear(4, 4), 7).weight.is_meta
