"""Masked tensors in a file: only what they keep, read back exactly; a damaged one is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared import masks, store
from shared.errors import RequestError

HEADER = {"method": {}, "backbone": {}, "sites": [], "metrics": {}, "version": "0", "extra": {}}


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(0, 2**31), st.floats(0, 1))
def test_what_is_kept_comes_back_bit_for_bit(shape, seed, density):
    random = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=random)
    mask = torch.rand(shape, generator=random) < density
    packed, shapes = masks.pack({"a.x": value, "a.x_mask": mask, "b": value})
    assert packed["a.x"].shape == (int(mask.sum()),)
    assert packed["a.x_mask"].numel() == -(-mask.numel() // 8)
    assert torch.equal(packed["b"], value)
    whole = masks.unpack(packed, shapes, "file")
    assert torch.equal(whole["a.x_mask"], mask)
    assert torch.equal(whole["a.x"], torch.where(mask, value, 0))


def test_only_a_bool_mask_of_the_tensors_shape_counts():
    given = {"x": torch.ones(3), "x_mask": torch.ones(3), "y": torch.ones(3), "y_mask": torch.ones(2).bool()}
    packed, shapes = masks.pack(given)
    assert not shapes
    assert all(packed[name] is tensor for name, tensor in given.items())


def file(tmp_path) -> tuple[dict[str, Tensor], str]:
    mask = torch.arange(1000).reshape(10, 100) % 20 == 0
    tensors = {"adapter.s.x": torch.randn(10, 100), "adapter.s.x_mask": mask}
    store.save(tmp_path / "a.safetensors", tensors, HEADER)
    return tensors, str(tmp_path / "a.safetensors")


def test_the_file_holds_values_and_bits(tmp_path):
    tensors, path = file(tmp_path)
    header = store.read_header(path)
    assert header["tensors"]["adapter.s.x"] == {"dtype": "F32", "shape": (50,)}
    assert header["tensors"]["adapter.s.x_mask"] == {"dtype": "U8", "shape": (125,)}
    found, _ = store.read(path)
    assert torch.equal(found["adapter.s.x_mask"], tensors["adapter.s.x_mask"])
    assert torch.equal(found["adapter.s.x"], torch.where(tensors["adapter.s.x_mask"], tensors["adapter.s.x"], 0))


@pytest.mark.parametrize(
    "spoil",
    [
        {"x": torch.ones(3)}, {"x_mask": torch.ones(2, dtype=torch.uint8)}, {"x_mask": None}, {"x": None},
        {"x_mask": torch.ones(1)}, {"x": torch.ones(())},
    ],
)  # fmt: skip
def test_a_damaged_one_is_one_line(spoil):
    packed, shapes = masks.pack({"x": torch.arange(6.0), "x_mask": torch.arange(6) > 3})
    packed = {name: tensor for name, tensor in {**packed, **spoil}.items() if tensor is not None}
    with pytest.raises(RequestError, match="file: masked tensor x: its values do not fit its mask"):
        masks.unpack(packed, shapes, "file")
    with pytest.raises(RequestError, match="does not read"):
        masks.unpack(packed, 3, "file")
    with pytest.raises(RequestError, match="do not fit"):
        masks.unpack(packed, {"x": [10**12]}, "file")
