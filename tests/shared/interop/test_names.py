"""Modules found by the names that files give them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.errors import RequestError
from shared.interop.names import layers, locate


def tree() -> nn.Module:
    block = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "out": nn.ModuleList([nn.Linear(2, 2)])})
    twin = nn.ModuleDict({"fc_1": nn.Linear(2, 2)})
    return nn.ModuleDict({"layers": nn.ModuleList([block, nn.ModuleDict({"q_proj": nn.Linear(2, 2)})]),
                          "left": twin, "right": nn.ModuleDict({"fc_1": nn.Linear(2, 2)})})  # fmt: skip


TREE = tree()
PATHS = list(layers(TREE))


def test_layers_are_those_with_parameters():
    assert PATHS == ["layers.0.q_proj", "layers.0.out.0", "layers.1.q_proj", "left.fc_1", "right.fc_1"]


@given(st.lists(st.sampled_from(PATHS), min_size=1, unique=True), st.sampled_from(["", "base_model.model.", "a.b."]))
def test_any_prefix_is_taken_off(paths, prefix):
    assert locate(TREE, [prefix + p for p in paths], "x") == {prefix + p: p for p in paths}
    kohya = {("lora_unet_" + p).replace(".", "_"): p for p in paths}
    assert locate(TREE, kohya, "x", "_") == kohya


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["left.fc_1", "left.fc_1"], "x: left.fc_1 is named twice"),
        (["layers.2.q_proj"], "x: 0 of its 1 modules fit ModuleDict: layers.2.q_proj names no module"),
        (["layers.0.q_proj", "layers.0.k_proj"], "1 of its 2 modules fit.*k_proj names no module"),
        (["a.fc_1"], r"a.fc_1 names 2 modules \(left.fc_1, right.fc_1\)"),
        (["blocks.0.q_proj"], "blocks.0.q_proj names no module"),  # an index stays with its list
        (["a.layers.0.q_proj", "layers.1.q_proj"], "a.layers.0.q_proj names no module"),
        (["b.layers.0.q_proj", "a.layers.0.q_proj"], "b.layers.0.q_proj and a.layers.0.q_proj are one module"),
    ],
)
def test_what_fits_no_module_or_two(names, message):
    with pytest.raises(RequestError, match=message):
        locate(TREE, names, "x")
