"""Classification by CLIP: classes are words, and adapters in either tower, prompts or a head learn from few images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities.images.classification import Classification
from modalities.vision_language.heads import ZeroShotHead
from modalities.vision_language.zero_shot import (
    check_share,
    class_texts,
    class_weights,
    clip_of,
    embed_texts,
    similarity_maps,
)
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser


class ClipClassification(Classification):
    """Trains and measures an ``OpenClip`` with a ``SimilarityHead`` or a ``ZeroShotHead``.

    model: with the head.  data: as ``Classification`` takes them. With ``ensemble`` 0 the results are zero-shot.
    """

    def __init__(
        self, model: Adapted, data: Any, optimiser: Optimiser, *, names: Mapping[str, str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",), ensemble: float = 1.0,
    ):  # fmt: skip
        """
        Args:
            names: what a class is called in the texts ({AnnualCrop: annual crop land}); its own name, "_" read as a
                space, where it is not among them.
            templates: the texts of a class, whose embeddings are averaged; "{}" is its name.
            ensemble: the share of the tuned model in evaluation and prediction, from 0 (zero-shot) to 1 (WiSE-FT:
                Wortsman et al., 2022): the strength of the adapters and the place between the head's two weights.

        Raises RequestError where names, templates or the share do not fit, or a text is longer than the context.
        """
        backbone = clip_of(model)
        super().__init__(model, data, optimiser)
        if unknown := [name for name in names or {} if name not in self.classes]:
            raise RequestError(f"names: {unknown[0]!r} is no class; there are {', '.join(self.classes)}")
        with self.between(ensemble):  # refused now where it cannot be
            pass
        told = names or {}
        self.names = tuple(told.get(name) or name.replace("_", " ") for name in self.classes)
        self.templates, self.ensemble = tuple(templates), ensemble
        tokens = backbone.tokens(class_texts(self.names, self.templates))
        self.tokens: Tensor
        self.class_of: Tensor
        self.register_buffer("tokens", tokens, persistent=False)
        each = torch.arange(len(self.names), device=tokens.device)
        self.register_buffer("class_of", each.repeat_interleave(len(self.templates)), persistent=False)
        self._kept: tuple[Any, Tensor] | None = None
        if isinstance(self.head, ZeroShotHead) and not self.head.started:
            with model.disabled():
                self.head.start(class_weights(embed_texts(model, self.tokens), len(self.classes)))

    def outputs(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, classes)."""
        text = None if isinstance(self.head, ZeroShotHead) else self._text()
        return self.model(batch["image"], text, context={"class_of": self.class_of})

    def _text(self) -> Tensor:
        """The tokens where a gradient is to reach the text tower, else its embeddings, computed once for what it is."""
        adapters = [
            parameter
            for name in self.model.active
            for key, module in self.model.bank[name].named_children()
            if not key.startswith("image/")
            for parameter in module.parameters()
        ]
        parts = [*adapters, *clip_of(self.model).text.parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in parts):
            return self.tokens
        state, device = self.model.state, self.tokens.device
        mode = (self.model.training, device, torch.is_autocast_enabled(device.type))
        key = (state.active, state.lowest, state.drawn, mode, [(id(p), p._version) for p in parts])
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):
                self._kept = key, embed_texts(self.model, self.tokens, self.class_of)
        return self._kept[1]

    @contextlib.contextmanager
    def between(self, share: float) -> Iterator[None]:
        """Within the block the model is ``share`` of the way from the zero-shot one (0) to the tuned one (1).

        Raises RequestError where the backbone itself was trained, so that the zero-shot weights are gone, and in the
        first call where a method has no strength other than 0 or 1, such as prompts.
        """
        check_share(share)
        if share < 1 and any(method.trains_backbone for method in self.model.methods.values()):
            raise RequestError("ensemble: this method overwrites the zero-shot weights; use zero_shot.ensembled")
        state, head = self.model.state, self.head
        before, own = state.active, getattr(head, "share", 1.0)
        state.active = tuple((name, strength * share) for name, strength in before) if share else ()
        if isinstance(head, ZeroShotHead):
            head.share = share
        try:
            yield
        finally:
            state.active = before
            if isinstance(head, ZeroShotHead):
                head.share = own

    def evaluate(self, batch: dict[str, Any]) -> None:
        with self.between(self.ensemble):
            super().evaluate(batch)

    def predict(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to class probabilities (B, classes), by the model at ``ensemble``."""
        with self.between(self.ensemble):
            return super().predict(image)

    @torch.no_grad()
    def similarity_maps(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to cosines of each patch with each class (B, classes, h, w).

        By the model at ``ensemble``: with its texts, or with the weights of a ``ZeroShotHead``.
        """
        with self.between(self.ensemble):
            if isinstance(self.head, ZeroShotHead):
                weights = torch.lerp(self.head.zero_shot, self.head.weight, self.head.share)
            else:
                weights = class_weights(self._text(), len(self.classes))
            found = similarity_maps(self.model, image.to(self.device), weights)
        if not torch.isfinite(found).all():
            raise WorkError("the similarities are not finite: the image holds NaN, or the weights do")
        return found

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        ensemble: float | None = None, kind: str | None = None, overwrite: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """As ``Classification`` writes them, or with ``kind`` "maps" the ``similarity_maps`` of each image (see
        ``map_files.map_images``).  ensemble: in place of the task's own."""
        from modalities.images.data import Preparation
        from modalities.vision_language.map_files import map_images

        before = self.ensemble
        self.ensemble = before if ensemble is None else ensemble
        try:
            check_share(self.ensemble)
            if kind != "maps":
                facts: dict[str, Any] = {"described": described, "identity": identity, "kind": kind}
                super().predict_files(inputs, output, overwrite=overwrite, **facts, **options)
                return
            if unfit := [name for name, value in options.items() if value is not None]:
                raise RequestError(
                    f"predict --as maps: there is no --{unfit[0]}; the model sees one square of an image"
                )
            preparation = Preparation.of(described)
            map_images(self.similarity_maps, self.classes, preparation, inputs, output, overwrite=overwrite)
        finally:
            self.ensemble = before
