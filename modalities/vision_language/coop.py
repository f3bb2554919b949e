"""CoOp: the words around a class name as trained vectors (Zhou et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modalities.images.backbones import library
from shared.adapter import Adapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class PromptWords(Adapter):
    """Puts trained vectors in the place of the first words of every text, after the start token.

    words: (classes or 1, count, C).
    """

    def __init__(self, words: Tensor):
        super().__init__()
        self.words = nn.Parameter(words)

    def forward(self, base: Callable[..., Tensor], text: Tensor) -> Tensor:
        """Tokens (N, context) to embeddings (N, context, C). Raises RequestError where texts begin with other words."""
        classes, count, _ = self.words.shape
        first = text[:, 1 : 1 + count]
        differ = not torch.compiler.is_compiling() and bool((first != first[:1]).any())
        if differ or text.shape[1] < count + 3:
            raise RequestError(
                f"CoOp count {count}: begin every template with the same {count} words, as in 'X X {{}}.'"
            )
        embedded = base(text)
        if classes > 1:
            class_of = self.context.class_of
            if not torch.compiler.is_compiling() and int(class_of.max()) >= classes:
                raise RequestError(f"CoOp classes {classes}: the texts are of {int(class_of.max()) + 1}")
            words = self.words[class_of]
        else:
            words = self.words.expand(len(text), -1, -1)
        return torch.cat([embedded[:, :1], words.to(embedded.dtype), embedded[:, 1 + count :]], dim=1)


@dataclass(frozen=True, kw_only=True)
class CoOp(Method):
    """Trained vectors instead of the first ``count`` words of the texts; both towers stay frozen.

    Write the templates with as many words to be replaced, such as "X X X X {}." (paper: one template, the class last).
    count: vectors (paper: 16, or 4 from words).  start: words whose embeddings they start from, as many tokens as
    ``count`` ("a photo of a"), or None: normal of deviation 0.02.  classes: number of classes, for vectors of each
    class (paper: better for fine-grained classes with many images), or None: the same for all.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/soft prompt",), acts_on="inputs", form="in place", mergeable="no",
        trains="(classes or 1) * count * site.width", modality="vision_language",
    )  # fmt: skip

    count: int = 16
    start: str | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or (self.classes is not None and self.classes < 2):
            raise RequestError(f"CoOp count {self.count}, classes {self.classes}: at least 1, and 2 or null")

    def sites(self, sites: Sites) -> Sites:
        return sites.select("embedding", tags="text")

    def build(self, site: Site) -> PromptWords:
        if self.start is None:
            words = torch.randn(1, self.count, site.width) * 0.02
        else:
            ids = library("open_clip").SimpleTokenizer().encode(self.start)
            if len(ids) != self.count:
                raise RequestError(f"CoOp start {self.start!r}: {len(ids)} tokens for count {self.count}")
            words = site.weight.detach()[ids][None].float()
        return PromptWords(words.repeat(self.classes or 1, 1, 1))

    def example(self) -> dict[str, Any]:
        return {"class_of": torch.tensor([0, 1])}
