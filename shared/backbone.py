"""Backbones: a library's frozen model behind one face, with its sites described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.context import Context
from shared.errors import RequestError
from shared.host import shown
from shared.sites import Sites


class Features(NamedTuple):
    """What a vision backbone returns.

    maps: one tensor (B, C, h, w) for each chosen depth, shallow to deep.
    summary: (B, C), the class token or, where there is none, the mean of the last tokens.
    """

    maps: tuple[Tensor, ...]
    summary: Tensor


class Backbone(nn.Module):
    """A frozen model with a name and described sites. Subclasses give ``sites`` and ``forward``.

    name: what an adapter file records.  context: what one call tells the adapters (see ``shared.context``).
    keys: (blocks, channels of the keys of one) where it takes ``context.prefix`` (n, blocks, 2, channels), keys and
    values that its attentions see in front of the tokens' own; None where it takes none.
    prompted: whether it takes ``context.prompt`` (n, width): tokens in front of its own, which its output has not.
    differentiable: whether its output has a gradient towards its input; what trains before one without it needs SPSA.
    """

    name: str
    differentiable: bool = True
    keys: tuple[int, int] | None = None
    prompted: bool = False

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.context = Context()

    def sites(self) -> Sites:
        """The described sites, paths relative to this module."""
        raise NotImplementedError(f"{type(self).__name__} describes no sites")

    def own_state(self) -> dict[str, Tensor]:
        """The weights that the fingerprint is of: without what other libraries may have put into the model."""
        return self.state_dict()

    def example(self) -> tuple[Tensor, ...] | None:
        """Small inputs for the proof of effect at attach time; None where the backbone has none."""
        return None


class Embedded(NamedTuple):
    """Tokens before the first block: (B, prefix + h*w, C), their grid (h, w), and what every block is also given, which
    follows from the size of the images alone."""

    tokens: Tensor
    grid: tuple[int, int]
    extras: dict[str, Any]


class BlockBackbone(Backbone):
    """A backbone that begins with blocks over image tokens, one after another, and can be split at any of them.

    depths: blocks (0-based) whose output is read too.  mapped: whether what it gives holds feature maps.  later:
    modules that see nothing of the image but ``finish``'s result, such as a decoder.
    Subclasses give ``blocks`` (iterable of modules), ``embed``, ``ended``, ``finish`` and ``rest``.
    """

    blocks: Iterable[nn.Module]
    depths: tuple[int, ...] = ()
    mapped: bool = True

    @property
    def later(self) -> Iterable[nn.Module]:
        return ()

    def embed(self, image: Tensor) -> Embedded:
        """image (B, bands, H, W) to tokens with positions."""
        raise NotImplementedError

    def ended(self, outputs: Sequence[Tensor], tokens: Tensor, grid: tuple[int, int]) -> Any:
        """What comes of the tokens of the last block and of the ``outputs`` of the blocks ``depths``."""
        raise NotImplementedError

    def finish(self, tokens: Tensor) -> Tensor:
        """(B, ..., C) of the last block's tokens: all of them that is read where nobody reads ``depths``."""
        raise NotImplementedError

    def rest(self, finished: Tensor) -> Any:
        """What ``ended`` gives without outputs, of what ``finish`` gave."""
        raise NotImplementedError

    def onward(
        self, embedded: Embedded, start: int = 0, outputs: Mapping[int, Tensor] = {}, *, maps: bool = True
    ) -> Any:
        """The blocks from ``start`` on, and what comes of their tokens.

        embedded: what goes into block ``start``.  outputs: of blocks before it, by depth, for feature maps and for
        adapters that read them; that of block ``start - 1`` at least.  maps: whether anybody reads the maps.
        """
        tokens, grid, extras = embedded
        self.context.grid = grid
        found = []
        for depth, block in enumerate(self.blocks):
            if depth >= start:
                tokens = block(tokens, **extras)
            elif depth in outputs:
                tokens = shown(block, outputs[depth])
            if maps and depth in self.depths and (depth >= start or depth in outputs):
                found.append(tokens)
        return self.ended(found, tokens, grid)

    def from_image(self, image: Tensor) -> Any:
        """``onward`` of an image from the first block, or from where the call's cache keeps it (``shared.cache``)."""
        cached = vars(self.context).get("cached")
        return self.onward(self.embed(image)) if cached is None else cached(image)


class TokenBackbone(BlockBackbone):
    """A transformer over image tokens that gives feature maps and a summary.

    depths: blocks (0-based) whose output becomes a feature map.  prefix: class and register tokens in front.
    normed: apply the final norm to every map (the summary always has it).
    Subclasses give ``blocks``, ``embed(image)`` and ``final(tokens)``.
    """

    def __init__(self, name: str, *, depths: Sequence[int], total: int, width: int, prefix: int, normed: bool):
        super().__init__(name)
        if bad := [d for d in depths if not -total <= d < total]:
            raise RequestError(f"depths {bad} of {name}: it has blocks 0 to {total - 1}")
        self.depths = tuple(sorted({d % total for d in depths}))
        self.width, self.prefix, self.normed = width, prefix, normed
        self.channels = (width,) * len(self.depths)

    def final(self, tokens: Tensor) -> Tensor:
        """The norm after the last block."""
        raise NotImplementedError

    def summarise(self, tokens: Tensor) -> Tensor:
        """(B, C) of the last block's tokens: the normed class token, or the mean over the grid where there is none."""
        tokens = self.final(tokens)
        return tokens[:, 0] if self.prefix else tokens.mean(1)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to feature maps (B, width, h, w) at ``depths`` and a summary (B, width)."""
        return self.from_image(image)

    def ended(self, outputs: Sequence[Tensor], tokens: Tensor, grid: tuple[int, int]) -> Features:
        maps = [self._as_map(self.final(each) if self.normed else each, grid) for each in outputs]
        return Features(tuple(maps), self.summarise(tokens))

    def finish(self, tokens: Tensor) -> Tensor:
        return self.summarise(tokens)

    def rest(self, finished: Tensor) -> Features:
        return Features((), finished)

    def _as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid)


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's frozen weights: names, shapes and values (read exactly, whatever the dtype)."""
    import hashlib

    digest = hashlib.sha256()
    state = model.own_state() if isinstance(model, Backbone) else model.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
