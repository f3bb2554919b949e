"""Where adapters may go in the transformers of each family: their modules read once, as sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from shared.sites import Site, Sites, norm_sites


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of the library names its parts; paths are below the base model, those of ``parts`` below a block.

    blocks: the list of blocks.  embeddings: by tag.  norms: outside the blocks, before the first and after the last.
    attention, mlp: the modules of a block, None where there is no such module.  parts: path by role.
    norm_after: path of the norm over the residual sum that ends a block, None where blocks end without one.
    residual: roles whose module adds the residual, and where it has one after it the norm, within its own forward.
    flat: the MLP sees (batch * tokens, width), not (batch, tokens, width).  causal: a token sees none after it.
    padded: positions are counted from the padding token's index on, and padding has to be that token.
    """

    blocks: str
    embeddings: dict[str, str]
    first_norm: str | None = None
    final_norm: str | None = None
    attention: str
    mlp: str | None = None
    parts: dict[str, str]
    norm_after: str | None = None
    residual: tuple[str, ...] = ()
    flat: bool = False
    causal: bool = True
    padded: bool = False


def _projections(attention: str, query: str, key: str, value: str, output: str) -> dict[str, str]:
    names = {"query": query, "key": key, "value": value}
    inside = {f"attention.{role}": f"{attention}.{name}" for role, name in names.items()}
    return inside | {"attention.output": output}


_LLAMA = Family(
    blocks="layers",
    embeddings={"tokens": "embed_tokens"},
    final_norm="norm",
    attention="self_attn",
    mlp="mlp",
    parts=_projections("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj")
    | {"mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"},
)
_BERT = Family(
    blocks="encoder.layer",
    embeddings={
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "segments": "embeddings.token_type_embeddings",
    },
    first_norm="embeddings.LayerNorm",
    attention="attention",
    parts=_projections("attention.self", "query", "key", "value", "attention.output.dense")
    | {"mlp.up": "intermediate.dense", "mlp.down": "output.dense"},
    norm_after="output.LayerNorm",
    residual=("attention",),
    causal=False,
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gemma": _LLAMA,
    "bert": _BERT,
    "roberta": replace(_BERT, padded=True),
    "xlm-roberta": replace(_BERT, padded=True),
    "bloom": Family(
        blocks="h",
        embeddings={"tokens": "word_embeddings"},
        first_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        attention="self_attention",
        mlp="mlp",
        # One fused projection whose rows are query, key and value of head 0, then of head 1, and so on.
        parts={
            "attention.qkv": "self_attention.query_key_value",
            "attention.output": "self_attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        residual=("attention", "mlp"),
    ),
    "opt": Family(
        blocks="decoder.layers",
        embeddings={"tokens": "decoder.embed_tokens", "positions": "decoder.embed_positions"},
        final_norm="decoder.final_layer_norm",
        attention="self_attn",
        parts=_projections("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj")
        | {"mlp.up": "fc1", "mlp.down": "fc2"},
        flat=True,
    ),
    "gptj": Family(
        blocks="h",
        embeddings={"tokens": "wte"},
        final_norm="ln_f",
        attention="attn",
        mlp="mlp",  # beside the attention: both read the one norm of the block
        parts=_projections("attn", "q_proj", "k_proj", "v_proj", "attn.out_proj")
        | {"mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
    ),
}


def sites(backbone: Any) -> Sites:
    """Sites of a ``TransformersText``: itself, its embeddings, every block, the norms outside the blocks."""
    family, model, width = backbone.family, backbone.model, backbone.width
    found = [Site("model", 0, "", backbone, parameter=None, width=width)]
    for tag, path in family.embeddings.items():
        table = model.get_submodule(path)
        found.append(Site("embedding", -1, f"model.{path}", table, width=table.embedding_dim, tags=(tag,)))
    if family.first_norm is not None:
        found += norm_sites(f"model.{family.first_norm}", model.get_submodule(family.first_norm), -1)
    blocks: Any = model.get_submodule(family.blocks)
    for depth, block in enumerate(blocks):
        found += _block(f"model.{family.blocks}.{depth}", block, depth, family, width)
    if family.final_norm is not None and (norm := model.get_submodule(family.final_norm)) is not None:
        found += norm_sites(f"model.{family.final_norm}", norm, len(blocks) - 1, 0, "final")
    return Sites(found, backbone.name)


def _block(path: str, block: nn.Module, depth: int, family: Family, width: int) -> Iterator[Site]:
    """The block, its attention and MLP where they are modules, their projections, its norms."""
    yield Site("block", depth, path, block, parameter=None, width=width)
    for role, name in (("attention", family.attention), ("mlp", family.mlp)):
        if name is not None:
            tags = ("residual",) if role in family.residual else ()
            yield Site(role, depth, f"{path}.{name}", block.get_submodule(name), None, width=width, tags=tags)
    for role, name in family.parts.items():
        layer: Any = block.get_submodule(name)
        tags = ("flat",) if family.flat and role.startswith("mlp") else ()
        yield Site(role, depth, f"{path}.{name}", layer, width=layer.out_features, tags=tags)
    for name, module in block.named_modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            tags = ("block_end",) if name == family.norm_after else ()
            yield from norm_sites(f"{path}.{name}", module, depth, 0, *tags)
