"""The backbone that comes with the package: a small causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from modalities.language.backbones.transformers_text import TransformersText

WEIGHTS = Path(__file__).parents[1] / "weights" / "small_lm.safetensors"
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class SmallLM(TransformersText):
    """A causal language model of LLaMA's shape (Touvron et al., 2023) whose weights are in the package: 2.6 M
    parameters, 4 blocks of width 192, head and embedding tied.

    How it was trained, on what, and what it reaches stands in ``weights/small_lm.md``. Its tokenizer is "small_lm".
    """

    def __init__(
        self,
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        lm_head: bool = False,
        attention: Literal["auto", "eager"] = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        seed: int = 0,
    ):
        """
        Args:
            weights: "pretrained" (those of the package, or ``checkpoint``) or "random" (seeded).
            checkpoint: a .safetensors file written by ``modalities.language.export_weights``.
            lm_head, attention, dtype: as of ``TransformersText``.
            seed: of the random weights.

        Raises RequestError where the file does not fit.
        """
        packaged = weights == "pretrained" and checkpoint is None
        super().__init__(
            name="llama",
            weights=weights,
            checkpoint=str(WEIGHTS) if packaged else checkpoint,
            config=SHAPE,
            lm_head=lm_head,
            attention=attention,
            dtype=dtype,
            seed=seed,
        )
        self.name = "small_lm"
        if packaged:
            self.source = self.source.replace(f"file: {WEIGHTS}", f"packaged: {WEIGHTS.name}")
