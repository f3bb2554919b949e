"""Packed files: an adapter and its head as the codes of its quantised matrices (``shared.blocks.quantised``).

A stream of bytes in module order. Every quantised matrix gives its codes, row-major, 8 / b in a byte, the first in the
lowest bits, then its mean and deviation as float32 (little-endian); all other trained tensors and buffers give their
own bytes. Alone this is the authors' format (JieShibo/PETL-ViT, ``binary_adapter/models_bin``); a file of ours has it
as one tensor of an adapter file, behind a header that says what it belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared import store
from shared.adapted import Adapted
from shared.blocks.packing import pack, unpack
from shared.blocks.quantised import QuantisedLinear
from shared.errors import RequestError

STATISTICS = 8  # bytes of a mean and a deviation


class _Part(NamedTuple):
    """One piece of the stream: a quantised matrix, or a plain tensor."""

    name: str
    matrix: QuantisedLinear | None
    tensor: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        if self.matrix is None:
            return self.tensor.numel() * self.tensor.element_size()
        return -(-self.tensor.numel() * self.matrix.bits // 8) + STATISTICS


def save_packed(model: Adapted, path: str | os.PathLike, *, official: bool = False) -> None:
    """Write the one active adapter and the head.

    official: the bare stream, as the authors release it; every matrix must then fill whole bytes.
    A master weight is training state and is lost: a loaded adapter trains on from its rounded weights.

    Raises RequestError where nothing is quantised, or a matrix does not fit the format.
    """
    parts = _parts(model, path)
    stream = b"".join(_bytes(part, official) for part in parts)
    if official:
        store.write_atomically(Path(path), stream)
        return
    packed = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    store.save(path, {"packed": packed}, store.header(model, path, {}, {"layout": _layout(parts)}))


def load_packed(
    model: Adapted, path: str | os.PathLike, *, official: bool = False, other_backbone: bool = False
) -> None:
    """Fill the one active adapter and the head from a packed file, whole or not at all.

    Raises RequestError where the file is for another backbone (unless asked for), another method or other sizes, where
    it is longer or shorter than the model takes, or where a number in it is not finite.
    """
    parts = _parts(model, path)
    if official:
        store.check_readable(Path(path))
        stream = Path(path).read_bytes()
    else:
        tensors, header = store.read(path)
        store.check_belongs(model, header, path, other_backbone)
        if tensors.keys() != {"packed"} or header["extra"].get("layout") != _layout(parts):
            raise RequestError(f"{path}: it does not hold the matrices of this adapter and head, packed in their bits")
        stream = tensors["packed"].numpy().tobytes()
    if len(stream) != (wanted := sum(part.size for part in parts)):
        raise RequestError(f"{path}: {len(stream)} bytes where this adapter and head take {wanted}")
    values, at = [], 0
    for part in parts:
        values.append(_read(part, stream[at : at + part.size], path))
        at += part.size
    with torch.no_grad():
        for part, value in zip(parts, values, strict=True):
            if part.matrix is not None:
                part.matrix.hold(*value)
            else:
                part.tensor.copy_(value[0])
    model.prepared |= set(model.active)


def packed_size(model: Adapted) -> dict[str, int]:
    """Bytes of a packed stream: ``codes``, ``statistics``, ``plain`` (what is not quantised), ``total``; and ``float``,
    what the same tensors take in float32."""
    parts = _parts(model, "packed_size")
    matrices = [part for part in parts if part.matrix is not None]
    total, statistics = sum(part.size for part in parts), STATISTICS * len(matrices)
    codes = sum(part.size for part in matrices) - statistics
    plain = total - codes - statistics
    return {
        "codes": codes, "statistics": statistics, "plain": plain, "total": total,
        "float": 4 * sum(part.tensor.numel() for part in parts),
    }  # fmt: skip


def _parts(model: Adapted, path: str | os.PathLike) -> list[_Part]:
    """The pieces of the stream in order: the adapter's modules by site, then the head's."""
    roots: list[tuple[str, Any]] = [("adapter", model.bank[store.only_active(model, path)])]
    if model.head is not None:
        roots.append(("head", model.head))
    parts = [part for name, root in roots for part in _below(name, root)]
    if not any(part.matrix is not None for part in parts):
        raise RequestError(f"{path}: the adapter has no quantised matrix to pack; save it as an adapter file")
    return parts


def _below(prefix: str, root: nn.Module) -> Iterator[_Part]:
    for path, module in root.named_modules():
        own = f"{prefix}.{path}".rstrip(".")
        quantised = isinstance(module, QuantisedLinear)
        if quantised:
            yield _Part(f"{own}.weight", module, module.weight.detach())
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if quantised and name in ("weight", "held", "levels"):
                continue
            if name not in module._non_persistent_buffers_set:
                yield _Part(f"{own}.{name}", None, tensor.detach())


def _layout(parts: list[_Part]) -> str:
    """A short hash of names, shapes and bits: other matrices can fill as many bytes."""
    import hashlib

    told = [(p.name, tuple(p.tensor.shape), p.matrix.bits if p.matrix else str(p.tensor.dtype)) for p in parts]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _bytes(part: _Part, official: bool) -> bytes:
    if part.matrix is None:
        return part.tensor.cpu().contiguous().numpy().tobytes()
    count, bits = part.tensor.numel(), part.matrix.bits
    if official and count * bits % 8:
        raise RequestError(f"{part.name}: {count} codes of {bits} bits do not fill whole bytes; the format wants that")
    statistics = torch.stack(part.matrix.statistics()[:2]).detach().cpu()
    if not bool(statistics.isfinite().all()) or not float(statistics[1]) > 0:
        mean, deviation = statistics.tolist()
        raise RequestError(f"{part.name}: mean {mean:g} and deviation {deviation:g} cannot be packed")
    return pack(part.matrix.codes().cpu(), bits).numpy().tobytes() + statistics.numpy().tobytes()


def _read(part: _Part, data: bytes, path: str | os.PathLike) -> tuple[Tensor, ...]:
    """The codes, mean and deviation of a matrix, or the values of a plain tensor."""
    if part.matrix is None:
        value = torch.frombuffer(bytearray(data), dtype=part.tensor.dtype).reshape(part.tensor.shape)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RequestError(f"{path}: {part.name} holds numbers that are not finite")
        return (value.to(part.tensor.device),)
    codes, statistics = data[:-STATISTICS], torch.frombuffer(bytearray(data[-STATISTICS:]), dtype=torch.float32)
    if not bool(statistics.isfinite().all()) or not float(statistics[1]) > 0:
        raise RequestError(f"{path}: {part.name} has mean {float(statistics[0])}, deviation {float(statistics[1])}")
    device = part.tensor.device
    packed = torch.frombuffer(bytearray(codes), dtype=torch.uint8)
    return (unpack(packed, part.matrix.bits, part.tensor.shape).to(device), *statistics.to(device))
