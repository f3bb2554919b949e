"""The frozen prefix in use: the blocks below the lowest adapter run for an image that was not met yet, and no more."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from shared.backbone import Embedded
from shared.cache import codec, identity
from shared.cache.settings import Cache
from shared.cache.span import Span, span
from shared.cache.store import Store
from shared.errors import RequestError, WorkError
from shared.store import _version, write_atomically

if TYPE_CHECKING:
    from shared.adapted import Adapted

_log = logging.getLogger("omniadapt")


class _Open(NamedTuple):
    """The records of one prefix. stamp: the state of its frozen tensors when its identity was found."""

    store: Store
    stamp: list[tuple[int, int]]
    salt: Any


class FrozenPrefix:
    """Runs the blocks of an adapted model's backbone with its frozen prefix kept (``shared.cache.span``).

    A record's key is a hash of the image's very numbers and of all that acts on them (``shared.cache.identity``), so a
    record of other weights, another transform, file, dtype or version of the code is not found. What the blocks above
    are given is always what a record would hold, whether it was found, is new or did not fit any more.

    read, computed: images that were found, and not.
    """

    def __init__(self, model: Adapted, settings: Cache):
        self.model, self.settings = model, settings
        self.read = self.computed = 0
        self._thread: ThreadPoolExecutor | None = None
        self.forget()

    def forget(self) -> None:
        """Find out anew what is frozen and what it is, as after a change of the model."""
        self._spans: dict[Any, Span | None] = {}
        self._opened: dict[Any, _Open] = {}
        self._empty: dict[Any, Embedded] = {}
        self._last: _Open | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def root(self) -> Path:
        return Path(self.settings.folder)

    def __call__(self, image: Tensor) -> Any:
        """What comes of the backbone's blocks for images (B, bands, H, W)."""
        backbone: Any = self.model.backbone
        found = self._span()
        if found is None or image.requires_grad:  # something in front of the backbone trains
            return backbone.onward(backbone.embed(image))
        opened = self._last = self._open(found, image)
        outputs = codec.decode(self._records(opened, found, image), self.settings.precision, image.device)
        if found.finished:
            return backbone.rest(outputs[:, 0])
        empty, grid, extras = self._embedded(image)
        known = {depth: _laid(each, empty) for depth, each in zip(found.kept, outputs.unbind(1), strict=True)}
        start = Embedded(known[found.start - 1], grid, extras)
        return backbone.onward(start, found.start, known, maps=found.maps)

    def expect(self, batch: Any) -> None:
        """Have what a coming batch needs read ahead, while others work."""
        image = batch.get("image") if isinstance(batch, Mapping) else None
        if self._last is None or not isinstance(image, Tensor):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "prefetch")
        self._thread.submit(_ahead, self._last, image)

    def close(self) -> None:
        """End what reads ahead."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    # -- records ---------------------------------------------------------------------------------------------------

    def _records(self, opened: _Open, found: Span, image: Tensor) -> list[bytes]:
        store, names = opened.store, keys(opened.salt, image)
        records = [store.read(key) for key in names]
        if any(record is None for record in records):
            store.refresh()
            records = [
                store.read(key) if record is None else record for key, record in zip(names, records, strict=True)
            ]
        missing = [i for i, record in enumerate(records) if record is None]
        if missing:
            outputs = self._run(found, image if len(missing) == len(image) else image[missing])
            made = codec.encode(outputs, self.settings.precision)
            store.write({names[i]: record for i, record in zip(missing, made, strict=True)})
            for i, record in zip(missing, made, strict=True):
                records[i] = record
        self.read += len(image) - len(missing)
        self.computed += len(missing)
        return records  # type: ignore[return-value]

    @torch.no_grad()
    def _run(self, found: Span, image: Tensor) -> Tensor:
        """The frozen prefix: the tokens (B, depths, ..., C), or (B, 1, ..., C) what ``finish`` makes of the last."""
        backbone: Any = self.model.backbone
        with self.model.disabled():  # what acts here only reads, and will be shown these outputs
            embedded = self._embedded(image, backbone.embed(image))
            tokens, outputs = embedded.tokens, []
            for depth, block in zip(range(found.start), backbone.blocks, strict=False):
                tokens = block(tokens, **embedded.extras)
                outputs += [tokens] if depth in found.kept else []
            return backbone.finish(tokens)[:, None] if found.finished else torch.stack(outputs, 1)

    @torch.no_grad()
    def _embedded(self, image: Tensor, new: Embedded | None = None) -> Embedded:
        """The grid and what every block is also given, which are those of all images of this size."""
        size = (*image.shape[1:], image.dtype, image.device, _autocast(image))
        before = self._empty.get(size)
        if new is None and before is not None:
            return before
        backbone: Any = self.model.backbone
        if new is None:
            with self.model.disabled():
                new = backbone.embed(image[:1])
        found: Any = new
        if before is not None and not (found.grid == before.grid and _equal(found.extras, before.extras)):
            raise RequestError(f"{backbone.name}: what its blocks get beside the tokens differs between images of one "
                               "size, so its prefix cannot be kept")  # fmt: skip
        self._empty[size] = found._replace(tokens=found.tokens[:0])
        return found

    # -- what is frozen --------------------------------------------------------------------------------------------

    def _span(self) -> Span | None:
        state, modules = self.model.state, list(self.model.backbone.modules())
        trains = [id(p) for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
        key = (state.active, state.merged, sum(m.training for m in modules), *trains)
        if key not in self._spans:
            try:
                self._spans[key] = span(self.model)
            except RequestError as error:
                self._spans[key] = None
                _log.warning("the cache is left out with the adapters %s: %s", ", ".join(self.model.active), error)
        return self._spans[key]

    def _open(self, found: Span, image: Tensor) -> _Open:
        key = (found, image.dtype, image.device, _autocast(image))
        frozen = identity.tensors(identity.modules(self.model.backbone, found.start))  # type: ignore[arg-type]
        stamp = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for _, tensor in frozen]
        opened = self._opened.get(key)
        if opened is None or opened.stamp != stamp:
            opened = self._opened[key] = self._identified(found, image, stamp)
        return opened

    def _identified(self, found: Span, image: Tensor, stamp: list[tuple[int, int]]) -> _Open:
        settings = self.settings
        facts = {
            "omniadapt": _version(),
            "prefix": {"start": found.start, "kept": found.kept},
            "precision": settings.precision,
            "computed": str(_autocast(image)),
            "threads": torch.get_num_threads() if settings.precision == "exact" else None,
        }
        self._empty.clear()
        described = identity.describe(self.model.backbone, found.start, facts, self._outcome(found, image))  # type: ignore[arg-type]
        name = identity.digest(described)
        folder = self.root / name.hex()[:32]
        with suppress(WorkError):  # for the reader: what the folder is of
            write_atomically(folder / "identity.json", json.dumps(described, indent=1).encode())
        return _Open(Store(folder, self.root, int(settings.gigabytes * 1e9)), stamp, hashlib.sha256(name))

    def _outcome(self, found: Span, image: Tensor) -> Tensor:
        """What the prefix makes of the backbone's example.

        Raises RequestError where an image's outputs depend on the others in its batch.
        """
        backbone: Any = self.model.backbone
        example = (backbone.example() or (None,))[0]
        if example is None:
            raise RequestError(f"{self.model.backbone_name}: it brings no example(), which its prefix is known by")
        example = example.to(image)
        whole = self._run(found, example)
        alone = torch.cat([self._run(found, example[i : i + 1]) for i in range(len(example))])
        if float((whole - alone).float().norm()) > 0.05 * float(whole.float().norm()):
            raise RequestError(f"{self.model.backbone_name}: what it makes of an image depends on the others of its "
                               "batch, so its prefix cannot be kept")  # fmt: skip
        return whole


def keys(salt: Any, image: Tensor) -> list[bytes]:
    """A key of 32 bytes for each image of a batch (B, ...), from its shape, dtype and every bit of it."""
    rows = image.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    head = f"{tuple(image.shape[1:])}:{image.dtype}".encode()
    found = []
    for row in rows:
        each = salt.copy()
        each.update(head)
        each.update(row)
        found.append(each.digest())
    return found


def _ahead(opened: _Open, image: Tensor) -> None:
    opened.store.prefetch(keys(opened.salt, image))


def _laid(tokens: Tensor, like: Tensor) -> Tensor:
    """The tokens with their axes in memory in the order of ``like``: products of another order round differently."""
    order = sorted(range(like.ndim), key=lambda axis: -like.stride(axis))
    if order == sorted(order):
        return tokens
    return tokens.permute(order).contiguous().permute([order.index(axis) for axis in range(like.ndim)])


def _autocast(image: Tensor) -> torch.dtype | None:
    kind = image.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _equal(extras: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    (leaves, spec), (more, other) = tree_flatten(dict(extras)), tree_flatten(dict(others))
    same = (
        torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b for a, b in zip(leaves, more, strict=False)
    )
    return spec == other and all(same)
