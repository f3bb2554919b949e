"""CLIP with both towers: open_clip's image and text transformers as one frozen backbone (Radford et al., 2021)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones import OpenClipTower, library, nearest, resblock_sites
from shared import weights as w
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

OTHER_TOKENS = ("hf_tokenizer_name", "tokenizer_kwargs")


class Embeddings(NamedTuple):
    """What both towers say, of length 1 along ``D``; None for what was not asked.

    image: (B, D).  text: (N, D).  patches: (B, D, h, w).  scale: (B, 1), what cosines are multiplied by.
    """

    image: Tensor | None
    text: Tensor | None
    patches: Tensor | None
    scale: Tensor | None


class OpenClip(Backbone):
    """An open_clip model whose towers are its ``VisionTransformer`` and ``TextTransformer``, the library's own modules.

    They lie at ``self.image`` (an ``OpenClipTower``) and ``self.text``. Sites have the same roles in both towers and
    the tag "image" or "text"; depths count in each tower from 0.

    bands: channels of the image.
    """

    text: Any  # open_clip's class, known only where open_clip is installed

    def __init__(
        self,
        bands: int,
        *,
        name: str,
        towers: Literal["both", "image", "text"] = "both",
        pretrained: str | None = None,
        checkpoint: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
        text_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: open_clip's model name ("ViT-B-32").
            towers: which of them show their sites, so which a method adapts.
            pretrained: one of open_clip's tags for that name ("laion2b_s34b_b79k"), or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file of the whole model; with a tag in ``pretrained``, a file
                of those weights.
            image_size: pixels, one side or (height, width); None means the model's own. Positions are resampled.
            seed: of the random weights.
            model_args: changes of the configuration: embed_dim, quick_gelu and the fields of ``vision_cfg``.
            text_args: changes of ``text_cfg``.

        Raises RequestError where the name, the tag, the size, an argument or the weights do not fit.
        """
        super().__init__(name)
        if towers not in ("both", "image", "text"):
            raise RequestError(f"{name}: towers {towers!r}: use both, image or text")
        self.image = OpenClipTower(
            bands, name=name, pretrained=pretrained, checkpoint=checkpoint, image_size=image_size, depths=(-1,),
            seed=seed, model_args=model_args,
        )  # fmt: skip
        if self.image.tower.attn_pool is not None:
            raise RequestError(f"{name}: its image tower pools by attention; only class-token and mean pools fit here")
        config = _text_config(name, text_args or {})
        self.text = w.build(lambda: _create(name, self.image.config, config), seed)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.image.context = self.context
        self.towers, self.bands = towers, bands
        self.summary_width, self.statistics, self.source = (
            self.image.summary_width, self.image.statistics, self.image.source,
        )  # fmt: skip
        if self.image.file is not None:
            self._load()

    def forward(self, image: Tensor | None = None, text: Tensor | None = None, *, dense: bool = False) -> Embeddings:
        """Images (B, bands, H, W) and texts to embeddings of length 1.

        text: tokens (N, context) as ``tokens`` gives them, or embeddings (N, D), which pass as they are.
        dense: also the embedding of each patch: the last block's tokens, normed and projected as the class token is.
        """
        pooled = patches = scale = None
        if image is not None:
            features = self.image(image)
            pooled = F.normalize(features.summary, dim=-1)
            scale = self.logit_scale.exp().expand(len(image), 1)
            if dense:
                patches = F.normalize(torch.einsum("bchw,cd->bdhw", features.maps[-1], self.image.tower.proj), dim=1)
        if text is not None and not text.is_floating_point():
            if text.ndim != 2 or text.shape[1] != self.text.context_length:
                raise RequestError(
                    f"{self.name}: tokens must be (N, {self.text.context_length}), got {tuple(text.shape)}"
                )
            text = F.normalize(self.text(text), dim=-1)
        return Embeddings(pooled, text, patches, scale)

    def tokens(self, texts: Sequence[str], *, cut: bool = False) -> Tensor:
        """Tokens (N, context) of texts, by open_clip's tokenizer, on the backbone's device.

        cut: leave out what is longer than the context, as open_clip does.

        Raises RequestError as ``check_texts`` does.
        """
        self.check_texts(texts, cut=cut)
        length = self.text.context_length
        return _tokenizer()(list(texts), context_length=length).to(self.logit_scale.device)

    def check_texts(self, texts: Iterable[str], *, cut: bool = False) -> None:
        """Raises RequestError for a text without a word, or of more tokens than the context where none is ``cut``."""
        most = self.text.context_length - 2
        for text in texts:
            if not (count := len(_tokenizer().encode(text))):
                raise RequestError(f"text {text!r} holds no word")
            if count > most and not cut:
                told = f"{text[:40]}..." if len(text) > 40 else text
                raise RequestError(f"text {told!r}: {count} tokens, {self.name} takes {most}; shorten it")

    def sites(self) -> Sites:
        sites = [Site("model", 0, "", self, parameter=None, layout="BCHW", width=self.bands)]
        if self.towers != "text":
            inside = [site for site in self.image.sites() if site.role != "model"]
            sites += [replace(s, path=f"image.{s.path}", tags=(*s.tags, "image")) for s in inside]
        if self.towers != "image":
            sites += [replace(site, tags=(*site.tags, "text")) for site in self._text_sites()]
        return Sites(sites, self.name)

    def _text_sites(self) -> list[Site]:
        """None for whole blocks, where methods add tokens: the causal mask has room for the context alone."""
        text, width = self.text, self.text.width
        inside = resblock_sites("text.transformer", text.transformer, width, prefix=0)
        last = len(text.transformer.resblocks) - 1
        return [
            Site("embedding", -1, "text.token_embedding", text.token_embedding, width=width),
            *(site for site in inside if site.role != "block"),
            *norm_sites("text.ln_final", text.ln_final, last, 0, "final"),
        ]

    def example(self) -> tuple[Tensor, Tensor]:
        """Two images, and two texts of the whole context that differ in their last word."""
        ids = torch.arange(1, self.text.context_length + 1).repeat(2, 1)
        ids[1, -2] += 1
        ids[:, 0], ids[:, -1] = self.text.vocab_size - 2, self.text.vocab_size - 1
        return *self.image.example(), ids.to(self.logit_scale.device)

    def _load(self) -> None:
        """Fill the text tower and the scale from the file that filled the image tower."""
        assert self.image.file is not None
        state = {n: t for n, t in w.read(self.image.file).items() if not n.startswith("visual.")}
        if "logit_scale" not in state:
            raise RequestError(f"{self.source}: it holds no logit_scale; give a file of the whole CLIP model")
        self.logit_scale.data = state.pop("logit_scale").reshape(()).to(self.logit_scale)
        text = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
        w.fill(self.text, text or state, f"the text tower of {self.name}", self.source)

    def __repr__(self) -> str:
        shown = "both towers" if self.towers == "both" else f"the {self.towers} tower"
        context = self.text.context_length
        return f"{type(self).__name__}({self.name}, sites of {shown}, context {context}, weights: {self.source})"


def _text_config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """open_clip's configuration of a text tower with changes."""
    open_clip = library("open_clip")
    whole = open_clip.get_model_config(name)
    config = dict(whole["text_cfg"])
    if config.get("hf_model_name") or "multimodal_cfg" in whole:
        raise RequestError(f"{name}: its text tower is not open_clip's TextTransformer; try ViT-B-32")
    if foreign := [key for key in OTHER_TOKENS if config.get(key)]:
        raise RequestError(f"{name}: its texts are read by another tokenizer ({foreign[0]}), which is not supported")
    fields = {field.name for field in dataclasses.fields(open_clip.CLIPTextCfg)}
    for key in changes:
        if key not in fields or key.startswith("hf_") or key in OTHER_TOKENS:
            raise RequestError(f"{name}: text_args has no {key!r}{nearest(key, fields)}")
    return config | changes


def _create(name: str, image: dict[str, Any], config: dict[str, Any]) -> Any:
    """The text tower alone, of the embedding and the activation of the image tower's configuration."""
    try:
        build = library("open_clip.model")._build_text_tower
        tower = build(image["embed_dim"], config, quick_gelu=image.get("quick_gelu", False))
    except (TypeError, AssertionError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(f"{name}: open_clip refuses {config}: {error}") from error
    if not all(isinstance(block.attn, nn.MultiheadAttention) for block in tower.transformer.resblocks):
        raise RequestError(f"{name}: only open_clip's default blocks are supported, not block_type 'custom'")
    if tower.vocab_size < (words := _tokenizer().vocab_size):
        raise RequestError(f"{name}: text_args vocab_size {tower.vocab_size}: the tokenizer has {words} words")
    return tower


@functools.cache
def _tokenizer() -> Any:
    """CLIP's byte-pair tokenizer, whose vocabulary comes with open_clip."""
    return library("open_clip").SimpleTokenizer()
