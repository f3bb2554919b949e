"""Published language models: the settings of their configurations, so that counting them needs no network."""

from __future__ import annotations

from typing import Any

from shared.catalog import nearest

_LLAMA: dict[str, Any] = {"vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32,
}  # fmt: skip
_13B: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
_8B: dict[str, Any] = _7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
_BERT: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
_ROBERTA: dict[str, Any] = _BERT | {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip


def _bloom(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "bloom", {"vocab_size": 250880, "hidden_size": width, "n_layer": layers, "n_head": heads}


def _opt(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    more = {"vocab_size": 50272, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "max_position_embeddings": 2048}
    return "opt", shape | more


# Hub repository: (family, settings).
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "huggyllama/llama-7b": ("llama", _LLAMA | _7B),
    "huggyllama/llama-13b": ("llama", _LLAMA | _13B),
    "meta-llama/Llama-2-7b-hf": ("llama", _LLAMA_2 | _7B),
    "meta-llama/Llama-2-13b-hf": ("llama", _LLAMA_2 | _13B),
    "meta-llama/Meta-Llama-3-8B": (
        "llama", _8B | {"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral", _8B | {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
                          "sliding_window": 4096},
    ),
    "bigscience/bloom-560m": _bloom(1024, 24, 16),
    "bigscience/bloom-7b1": _bloom(4096, 30, 32),
    "bigscience/bloomz-7b1": _bloom(4096, 30, 32),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "EleutherAI/gpt-j-6b": (
        "gptj", {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
                 "n_positions": 2048},
    ),
    "google-bert/bert-base-uncased": ("bert", _BERT),
    "google-bert/bert-large-uncased": ("bert", _BERT | _LARGE),
    "google-bert/bert-base-multilingual-cased": ("bert", _BERT | {"vocab_size": 119547}),
    "FacebookAI/roberta-base": ("roberta", _ROBERTA),
    "FacebookAI/roberta-large": ("roberta", _ROBERTA | _LARGE),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", _ROBERTA | {"vocab_size": 250002}),
}  # fmt: skip


def find(name: str) -> str | None:
    """The repository of a published name, given whole or by its last part ("roberta-base"); None where there is none.

    Older names of the Hub without an owner ("gpt-j-6B") are found too.
    """
    wanted = name.casefold()
    return next((r for r in PUBLISHED if wanted in (r.casefold(), r.rpartition("/")[2].casefold())), None)


def hint(name: str) -> str:
    """The end of an error message: the published name nearest to ``name``, or all of them."""
    short = [repository.rpartition("/")[2] for repository in PUBLISHED]
    return nearest(name.rpartition("/")[2], short) or f"; known here: {', '.join(short)}"
