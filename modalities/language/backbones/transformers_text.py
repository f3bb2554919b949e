"""Hugging Face transformers for text: LLaMA and its kin, BLOOM, OPT, GPT-J; BERT and RoBERTa."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modalities.language.backbones import published
from modalities.language.backbones.families import FAMILIES, sites
from shared import weights as w
from shared.backbone import Backbone
from shared.catalog import nearest
from shared.errors import RequestError
from shared.sites import Sites

HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Hidden(NamedTuple):
    """What a language backbone returns.

    states: (B, N, C) of the last block, after the final norm where the model has one; at padding they mean nothing.
    mask: bool (B, N), true at tokens.  pooled: (B, C) of the model's own pooler, None where it was not asked for.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class TransformersText(Backbone):
    """A transformer of the library ``transformers``, its own modules, at ``self.model``.

    Its states equal the library's bit for bit. A batch is padded on the right. Every call writes ``context.tokens`` and
    ``context.token_mask``, both (B, N). In BERT the attention, in BLOOM attention and MLP, add the residual themselves
    (tag "residual" of their sites); BERT and OPT have no module for the whole MLP, and OPT's projections in it see
    (B * N, C) (tag "flat").

    causal: whether a token sees none after it.  width: channels of the states.  vocabulary: number of tokens.
    longest: tokens a text may have, None where nothing bounds it.
    family: how the library names the parts.  lm_head: the model's own language-modelling head, None if not asked for.
    """

    model: Any  # the library's class, known only where it is installed
    lm_head: Any

    def __init__(
        self,
        *,
        name: str,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        config: dict[str, Any] | None = None,
        lm_head: bool = False,
        pooler: bool = False,
        attention: Literal["auto", "eager"] = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        seed: int = 0,
    ):
        """
        Args:
            name: a repository of the Hub ("FacebookAI/roberta-base", or its last part where ``published`` knows it), or
                a family ("llama") whose size ``config`` gives.
            weights: "pretrained" (``checkpoint``, else the Hub) or "random" (seeded).
            checkpoint: a folder as ``save_pretrained`` writes it, whose config.json then counts, or one file of weights
                (.safetensors, .pt, .pth, .bin).
            config: changes of the model's configuration, such as hidden_size.
            lm_head: keep the head that gives next (or masked) tokens; ``logits`` runs it.
            pooler: BERT and RoBERTa only: also the pooler, a dense layer and tanh on the first token.
            attention: "eager" for plain products, which can be differentiated twice; "auto" is the fused kernel
                where the library has one.
            dtype: of the weights.
            seed: of the random weights.

        Raises RequestError where the name, a setting or the weights do not fit.
        """
        w.check_choice(name, weights, checkpoint)
        repository = published.find(name)
        super().__init__(repository or name)
        settings = _configuration(name, repository, checkpoint, config or {})
        self.family = FAMILIES[settings.model_type]
        self.causal = self.family.causal
        if pooler and (self.causal or lm_head):
            raise RequestError(f"{name}: a pooler comes with BERT and RoBERTa, without lm_head")
        kind = _kind(settings, lm_head, self.causal)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        options |= {"attn_implementation": "eager"} if attention == "eager" else {}
        options |= {} if self.causal or lm_head else {"add_pooling_layer": pooler}
        if weights == "random":
            whole, self.source = _random(kind, settings, options, name, seed), f"random (seed {seed})"
        else:
            whole, self.source = _pretrained(kind, settings, options, self.name, checkpoint, seed)
        whole.eval()
        self.model = whole.base_model
        others = [module for name, module in whole.named_children() if name != whole.base_model_prefix]
        self.lm_head = others[0] if lm_head else None
        self.config, self.vocabulary = settings, settings.vocab_size
        self.width = getattr(settings, "word_embed_proj_dim", settings.hidden_size)
        self.channels = (self.width,)
        self.keys, self.prompted = (settings.num_hidden_layers, math.prod(self._heads)), True
        positions = getattr(settings, "max_position_embeddings", None)
        # RoBERTa counts positions from the one after the padding token's index.
        self.longest = positions - settings.pad_token_id - 1 if positions and self.family.padded else positions

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Hidden:
        """tokens int64 (B, N) and mask bool (B, N), true at tokens (None: all are), to states (B, N, C)."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        self.context.tokens, self.context.token_mask = tokens, mask
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        told = vars(self.context)
        prompt, prefix = told.get("prompt"), told.get("prefix")
        if prompt is not None:
            words = self.model.get_input_embeddings()(given.pop("input_ids"))
            given["inputs_embeds"] = torch.cat([prompt.to(words).expand(len(words), -1, -1), words], 1)
        if prefix is not None:
            given |= {"past_key_values": self._cache(prefix, len(tokens)), "use_cache": self.causal}
        front = sum(len(part) for part in (prompt, prefix) if part is not None)
        if front and self.longest and front + tokens.shape[1] > self.longest:
            what = f"{tokens.shape[1]} tokens behind {front} of a prompt or prefix"
            raise RequestError(f"{self.name}: {what}; it takes {self.longest} in all")
        whole = torch.cat([mask.new_ones(len(mask), front), mask], 1) if front else mask
        output = self.model(attention_mask=whole.long(), **given)
        states, pooled = output.last_hidden_state[:, -tokens.shape[1] :], output.get("pooler_output")
        if prompt is not None and pooled is not None:  # the library's is of the first token, which is the prompt's
            pooled = self.model.pooler(states)
        return Hidden(states, mask, pooled)

    @property
    def _heads(self) -> tuple[int, int]:
        """Heads of the keys, and the channels of one."""
        settings = self.config
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        return heads, getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads

    def _cache(self, prefix: Tensor, batch: int) -> Any:
        """The library's cache of past keys and values, filled with a prefix (n, blocks, 2, channels)."""
        from transformers import DynamicCache

        cache = DynamicCache()
        past = prefix.to(next(self.model.parameters()).dtype).unflatten(3, self._heads).permute(1, 2, 3, 0, 4)
        for depth, (keys, values) in enumerate(past):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), depth)
        return cache

    def logits(self, states: Tensor) -> Tensor:
        """states (..., C) to scores of every token (..., vocabulary). Raises RequestError without ``lm_head``."""
        if self.lm_head is None:
            raise RequestError(f"{self.name}: built without its head; give backbone.lm_head=true")
        return self.lm_head(states)

    def sites(self) -> Sites:
        return sites(self)

    def example(self) -> tuple[Tensor, Tensor]:
        """Two texts of 5 tokens, the second padded by two."""
        device = next(self.model.parameters()).device
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocabulary, (2, 5), generator=random, device="cpu").to(device)
        mask = torch.tensor([[True] * 5, [True, True, True, False, False]], device=device)
        padding = self.config.pad_token_id
        return tokens.masked_fill(~mask, 0 if padding is None else padding), mask

    def __repr__(self) -> str:
        what = f"{self.name}, {self.config.model_type}, width {self.width}, {'causal' if self.causal else 'both ways'}"
        return f"{type(self).__name__}({what}, weights: {self.source})"


def _configuration(name: str, repository: str | None, checkpoint: str | None, changes: dict[str, Any]) -> Any:
    """The library's configuration: of the checkpoint's folder, a published name, a family, or the Hub; with changes."""
    from transformers import AutoConfig

    folder = Path(checkpoint) if checkpoint is not None else None
    if folder is not None and not folder.exists():
        raise RequestError(f"checkpoint {folder}: no such file or folder")
    try:
        with _quiet():
            if folder is not None and (folder / "config.json").is_file():
                return _changed(functools.partial(AutoConfig.from_pretrained, folder), {}, changes, name)
            if repository is not None:
                family, shape = published.PUBLISHED[repository]
                return _changed(functools.partial(AutoConfig.for_model, family), shape, changes, name)
            if name in FAMILIES:
                return _changed(functools.partial(AutoConfig.for_model, name), {}, changes, name)
            if "/" not in name:
                raise RequestError(f"{name}: no family and no published name known here{published.hint(name)}")
            place = w.fetch(name, name, ("config.json",)).parent
            return _changed(functools.partial(AutoConfig.from_pretrained, place), {}, changes, name)
    except OSError as error:
        raise RequestError(f"{folder or name}: its configuration cannot be read ({_line(error)})") from error
    except RequestError:
        raise
    except Exception as error:  # it has a kind of its own for a setting that does not validate
        raise RequestError(f"{name}: transformers refuses this configuration: {_line(error)}") from error


def _changed(make: Callable[..., Any], shape: dict[str, Any], changes: dict[str, Any], name: str) -> Any:
    """The configuration that ``make`` gives, with the published ``shape`` and the changes over it."""
    plain = make()
    for key in changes:
        if not hasattr(plain, key):
            raise RequestError(f"{name}: config has no {key!r}{nearest(key, plain.to_dict())}")
    named = [{plain.attribute_map.get(key, key): value for key, value in one.items()} for one in (shape, changes)]
    made = make(**named[0] | named[1])
    if made.model_type not in FAMILIES:
        raise RequestError(f"{name}: a {made.model_type} model; supported are {', '.join(FAMILIES)}")
    if FAMILIES[made.model_type].causal:
        made.use_cache = False
    return made


def _kind(config: Any, lm_head: bool, causal: bool) -> Any:
    """The library's class for a configuration."""
    import transformers as t

    if not lm_head:
        return t.AutoModel
    return t.AutoModelForCausalLM if causal else t.AutoModelForMaskedLM


def _random(kind: Any, config: Any, options: dict[str, Any], name: str, seed: int) -> Any:
    try:
        with _quiet():
            return w.build(lambda: kind.from_config(config, **options), seed)
    except Exception as error:  # as above
        raise RequestError(f"{name}: transformers refuses this configuration: {_line(error)}") from error


def _pretrained(
    kind: Any, config: Any, options: dict[str, Any], name: str, checkpoint: str | None, seed: int
) -> tuple[Any, str]:
    """The model with weights of a file, a folder or the Hub, and which; on the meta device nothing is read.

    Raises RequestError where a tensor of the model is in none of the files, has another shape or is not finite.
    """
    source = f"Hub: {name}" if checkpoint is None else f"file: {checkpoint}"
    device = torch.get_default_device()
    with torch.device("meta"):
        outline = _random(kind, config, options, name, seed)
    if device.type == "meta":
        return outline, f"{source} (not loaded: meta device)"
    place, more = name if checkpoint is None else checkpoint, dict(options)
    if checkpoint is not None and Path(checkpoint).is_file():
        place, more["state_dict"] = None, w.read(checkpoint)
    more |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if checkpoint is None:
        w.fetch(name, name, HUB_FILES)  # offline is known at once, and told with a way out
    try:
        with _quiet(), torch.device("cpu"):
            model, found = type(outline).from_pretrained(place, **more)
    except Exception as error:  # whatever the library and its client raise: offline, gated, gone, damaged
        reason = f"{type(error).__name__}: {_line(error)}"
        raise RequestError(f"{source}: its weights cannot be read ({reason})") from error
    _check(model, found, FAMILIES[config.model_type].blocks, f"{source}: it does not fit {name}")
    return model.to(device), source


def _check(model: nn.Module, found: dict[str, Any], blocks: str, what: str) -> None:
    """Raises RequestError where loading left a tensor out: of the model, or of a block in the file."""
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [f"{key} {tuple(got)} for {tuple(want)}" for key, got, want in sorted(found["mismatched_keys"])]
    left = [key for key in sorted(found["unexpected_keys"]) if f"{blocks}." in key and key.endswith(".weight")]
    wrong += [f"{key} has no place" for key in left]
    wrong += [
        f"{key} holds numbers that are not finite" for key, p in model.named_parameters() if not p.isfinite().all()
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RequestError(f"{what}: {', '.join(wrong[:3])}{more}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and its report of what did not fit, which is an error here."""
    from transformers.utils import logging as theirs

    log = logging.getLogger("transformers")
    level, bars = log.level, theirs.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def _line(error: BaseException) -> str:
    """The first line of a message; of the cause, where the library wraps one."""
    cause = error.__cause__ if isinstance(error.__cause__, (ValueError, TypeError)) else error
    return (str(cause).strip() or type(cause).__name__).split("\n")[0]
