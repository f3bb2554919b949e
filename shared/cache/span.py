"""How far up a model is frozen, found from where its active adapters, its head and its trained tensors act."""

from __future__ import annotations

from typing import Any, NamedTuple

from shared.backbone import BlockBackbone
from shared.errors import RequestError


class Span(NamedTuple):
    """The frozen prefix of a backbone of blocks.

    start: the first block that has to run; the number of blocks where none has.
    kept: depths below ``start`` whose outputs (before the final norm) the rest of the model reads, that of block
    ``start - 1`` among them; none where it is ``finished``: then nothing but the head or the decoder is left to run,
    and what is kept is all that they read.
    maps: whether the head reads feature maps.
    """

    start: int
    kept: tuple[int, ...]
    maps: bool

    @property
    def finished(self) -> bool:
        return not self.kept


def span(model: Any) -> Span:
    """What of an ``Adapted`` need not run twice, with its active adapters.

    Raises RequestError that says what stands in the way.
    """
    backbone = model.backbone
    if not isinstance(backbone, BlockBackbone):
        raise RequestError(f"{model.backbone_name} has no frozen prefix to keep: its run cannot be split at a block")
    if model.state.merged:
        raise RequestError("no frozen prefix while adapters are merged: unmerge() first")
    blocks = list(backbone.blocks)
    places = {id(m): depth for depth in reversed(range(len(blocks))) for m in blocks[depth].modules()}
    later = {id(m) for part in backbone.later for m in part.modules()}
    start, behind, observed = len(blocks), False, set()
    for path, module, why, reads in _acting(model):
        if id(module) in later:
            continue
        if reads and (module is backbone or any(module is block for block in blocks)):
            observed |= {places[id(module)]} if id(module) in places else set()
        elif (depth := places.get(id(module))) is not None:
            if not depth:
                raise RequestError(f"no frozen prefix: {why} in block 0 ({path}); leave the first blocks frozen, such "
                                   "as with method.depth='last 4'")  # fmt: skip
            start = min(start, depth)
        elif _is_final(model, path, len(blocks)):
            behind = True
        else:
            where = f"at {path}, before the blocks" if path else "around the whole backbone"
            raise RequestError(f"no frozen prefix: {why} {where}")
    maps = backbone.mapped and not getattr(model.head, "summary_only", False)
    observed = {depth for depth in observed if depth < start}
    if start == len(blocks) and not (maps or behind or observed):
        return Span(start, (), maps)
    read = {depth for depth in backbone.depths if maps and depth < start}
    return Span(start, tuple(sorted({start - 1} | read | observed)), maps)


def _acting(model: Any) -> Any:
    """Modules of the backbone that are not what they are when frozen: path, module, why, and whether it only reads."""
    for path, port in model.hosts().items():
        module = model.backbone.get_submodule(path)
        for name in model.active:
            kind = type(model.methods[name]).__name__
            around = port.around.get(name, ())
            if any(name in by_name for by_name in port.on.values()) or any(not a.observes for a in around):
                yield path, module, f"{kind} acts", False
            elif around:
                yield path, module, f"{kind} reads", True
    modules = list(model.backbone.named_modules())
    for path, module in modules:
        if any(p is not None and p.requires_grad for p in module._parameters.values()):
            yield path, module, "weights of the backbone train", False
    for path, module in modules:
        if module.training:
            yield path, module, "the backbone is in training mode", False


def _is_final(model: Any, path: str, blocks: int) -> bool:
    """Whether a module outside the blocks acts on what the last one gives, as the backbone's sites say."""
    depths = {site.depth for site in model.sites() if site.path == path and site.role != "model"}
    return depths == {blocks - 1}
