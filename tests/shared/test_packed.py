"""Packed files: the authors' released ones, byte for byte, and ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from modalities.images.backbones import TimmViT
from modalities.images.heads import BinaryHead, LinearHead
from shared.adapted import Adapted, adapt
from shared.blocks.quantised import QuantisedLinear
from shared.errors import RequestError
from shared.methods import BinaryAdaptFormer, BinaryLoRA, LoRA
from shared.packed import load_packed, packed_size, save_packed
from tests.shared.hosts import HOSTS

RELEASED = {"adaptformer": BinaryAdaptFormer(scale=0.1), "lora": BinaryLoRA(scale=0.1)}


@pytest.fixture(scope="module")
def wide():
    """The sites of a ViT-B/16 (12 blocks of width 768) around small MLPs."""
    name, small = "vit_base_patch16_224", {"mlp_ratio": 0.02}
    return TimmViT(3, name=name, weights="random", image_size=32, model_args=small)


def matrices(model: Adapted) -> list[QuantisedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantisedLinear)]


@pytest.mark.parametrize("kind", RELEASED)
def test_a_released_file_loads_and_packs_again_to_the_same_bytes(kind, wide, materials, tmp_path):
    (file,) = (materials / "data/official_weights/binary_adapter" / kind).glob("*.bin")
    model = adapt(wide, RELEASED[kind], head=LinearHead(768, 100))
    try:
        load_packed(model, file, official=True)
        data, at, stored = file.read_bytes(), 0, []
        for one in matrices(model):  # the layout read by hand
            size = one.weight.numel() // 8
            signs = np.unpackbits(np.frombuffer(data, np.uint8, size, at), bitorder="little").astype(np.float32) * 2 - 1
            mean, deviation = np.frombuffer(data, "<f4", 2, at + size)
            stored.append(torch.from_numpy(signs * np.float32(0.6744898) * deviation + mean).reshape(one.weight.shape))
            at += size + 8
        assert all(torch.allclose(m.quantised(), s, rtol=1e-6) for m, s in zip(matrices(model), stored, strict=True))
        assert all(torch.equal(m.quantised(), m.weight) for m in matrices(model))
        head = torch.from_numpy(np.frombuffer(data, "<f4", offset=at).copy())
        assert torch.equal(torch.cat([p.flatten() for p in model.head.parameters()]), head)
        save_packed(model, tmp_path / "again.bin", official=True)
        assert (tmp_path / "again.bin").read_bytes() == data
        assert packed_size(model)["total"] == len(data) == {"adaptformer": 381_520, "lora": 455_440}[kind]
        assert bool(wide.eval()(torch.randn(1, 3, 32, 32)).summary.isfinite().all())
    finally:
        model.remove()


@pytest.mark.parametrize(
    ("method", "head", "size"),
    [
        (BinaryAdaptFormer(), None, 73_920),
        (BinaryLoRA(), None, 147_840),
        (BinaryAdaptFormer(width=1), None, 2_496),
        (BinaryLoRA(width=1), None, 4_992),
        (BinaryAdaptFormer(width=1), 1, 12_104),
        (BinaryAdaptFormer(bits=4), None, 294_912 + 192),
    ],
)
def test_sizes_follow_the_formula(method, head, size, wide, tmp_path):
    model = adapt(wide, method, head=None if head is None else BinaryHead(768, 100, bits=head))
    try:
        told = packed_size(model)
        assert told["total"] == told["codes"] + told["statistics"] + told["plain"] == size
        save_packed(model, tmp_path / "a.bin", official=True)
        assert (tmp_path / "a.bin").stat().st_size == size
        assert told["float"] == 4 * model.count()["trainable"]
    finally:
        model.remove()


def small(method, head: nn.Module | None = None) -> Adapted:
    torch.manual_seed(5)
    return adapt(HOSTS["vit"]()[0], method, head=head).eval()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("official", [True, False])
def test_a_file_gives_the_model_back(bits, official, tmp_path):
    image, path = torch.randn(2, 3, 32, 40), tmp_path / "a"
    model = small(BinaryAdaptFormer(bits=bits, width=3), LinearHead(24, 5, norm="layer"))
    save_packed(model, path, official=official)
    other = small(BinaryAdaptFormer(bits=bits, width=3), LinearHead(24, 5, norm="layer"))
    for one in matrices(other):
        nn.init.normal_(one.weight)
    load_packed(other, path, official=official)
    with torch.no_grad():
        assert torch.allclose(other(image), model(image), atol=1e-6)
    save_packed(other, tmp_path / "b", official=official)
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_ours_takes_matrices_that_do_not_fill_bytes(tmp_path):
    odd = adapt(HOSTS["vit"]()[0], BinaryLoRA(width=3), head=BinaryHead(25, 5))  # 125 codes
    save_packed(odd, tmp_path / "odd")
    load_packed(odd, tmp_path / "odd")
    assert packed_size(odd)["codes"] == 8 * 2 * 24 * 3 // 8 + 16
    with pytest.raises(RequestError, match="head.classify.weight: 125 codes of 1 bits do not fill whole bytes"):
        save_packed(odd, tmp_path / "refused", official=True)
    assert not (tmp_path / "refused").exists()


def test_a_loaded_adapter_trains_on(tmp_path):
    model = small(BinaryAdaptFormer(width=3))
    save_packed(model, tmp_path / "a")
    load_packed(model, tmp_path / "a")
    before = [m.quantised().detach().clone() for m in matrices(model)]
    optimiser = torch.optim.SGD(model.trainable().values(), 100.0)
    model.train()(torch.randn(2, 3, 32, 32)).summary.square().sum().backward()
    optimiser.step()
    assert any(not torch.equal(m.quantised(), b) for m, b in zip(matrices(model), before, strict=True))


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model = small(BinaryAdaptFormer(width=4))
    save_packed(model, tmp_path / "ours")
    save_packed(model, tmp_path / "theirs", official=True)
    data = bytearray((tmp_path / "theirs").read_bytes())
    (tmp_path / "short").write_bytes(data[:-1])
    (tmp_path / "long").write_bytes(data + b"\0")
    broken = data.copy()
    broken[12:20] = np.array([np.nan, 1], "<f4").tobytes()  # after the 96 codes of the first matrix
    (tmp_path / "nan").write_bytes(broken)
    for one in matrices(model):
        nn.init.normal_(one.weight)
    before = {n: t.clone() for n, t in model.trained_state().items()}
    size = len(data)
    for name, official, message in (
        ("short", True, f"short: {size - 1} bytes where this adapter and head take {size}"),
        ("long", True, f"long: {size + 1} bytes where"),
        ("nan", True, "nan: adapter.model/blocks/0/mlp.branch.down.weight has mean nan"),
        ("absent", True, "no such file"),
        ("theirs", False, "not a safetensors file"),
    ):
        with pytest.raises(RequestError, match=message):
            load_packed(model, tmp_path / name, official=official)
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())
    with pytest.raises(RequestError, match="packed in their bits"):  # as many bytes, other matrices
        load_packed(small(BinaryAdaptFormer(width=2, bits=2)), tmp_path / "ours")
    with pytest.raises(RequestError, match="an adapter of method BinaryAdaptFormer"):
        load_packed(small(BinaryLoRA()), tmp_path / "ours")
    with pytest.raises(RequestError, match="no quantised matrix to pack"):
        save_packed(small(LoRA()), tmp_path / "never")
    constant = small(BinaryAdaptFormer(width=4))
    nn.init.constant_(matrices(constant)[0].weight, 2.0)
    with pytest.raises(RequestError, match="deviation 0 cannot be packed"):
        save_packed(constant, tmp_path / "never")
    assert not (tmp_path / "never").exists()
