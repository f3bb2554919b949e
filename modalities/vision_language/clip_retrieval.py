"""Retrieval by CLIP: pairs of image and caption pull each other, by adapters in either tower; each finds the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.images.classification import framed
from modalities.vision_language.backbones import Embeddings
from modalities.vision_language.heads import contrastive, logits
from modalities.vision_language.retrieval import KS, measure
from modalities.vision_language.zero_shot import clip_of, embed_texts
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser
from shared.training.task import Task

SCALE = 100.0  # what cosines are multiplied by at most (Radford et al., 2021)


class ClipRetrieval(Task):
    """Trains and measures an ``OpenClip`` by the contrastive loss of images and captions (Radford et al., 2021).

    Every other caption of the batch is wrong for an image, and every other image for a caption; images of the batch
    with the same caption are equally right for it.

    model: without a head.  data: it gives ``bands``; its batches hold ``image`` (B, bands, H, W), ``captions`` (of each
    image: a list of tuples, in training of one) and ``name``. Data that are normalised by the backbone's statistics are
    told them here.  top: how many ``predict_files`` lists.

    Results of a split: those of ``retrieval.measure``, among all images and captions of it; ``mean_recall``, of its six
    recalls; ``loss``, of the first captions in batches as they come; ``images`` and ``captions``, their numbers.
    """

    monitor: ClassVar[str] = "validation/mean_recall"
    top: ClassVar[int] = 10

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser, *, cut: bool = False):
        """
        Args:
            cut: shorten captions that are longer than the context, as open_clip does; else they are refused.

        Raises RequestError where the model has a head or no text tower, or a caption of ``data`` is too long.
        """
        super().__init__(model, optimiser)
        backbone = clip_of(model)
        if model.head is not None:
            raise RequestError("ClipRetrieval compares embeddings: leave the section head out")
        if hasattr(data, "normalise_by"):
            data.normalise_by(backbone)
        self.bands, self.cut = data.bands, cut
        if not cut:
            backbone.check_texts(dict.fromkeys(getattr(data, "captions", ())))
        self._seen: list[tuple[Tensor, Tensor, list[tuple[str, ...]]]] = []
        self._losses: list[tuple[float, int]] = []

    def outputs(self, batch: dict[str, Any]) -> Tensor:
        """Scores (B, T) of the images and the batch's different captions, in the order in which these come first."""
        tokens = self._tokens(list(_places(batch["captions"])))
        found: Embeddings = self.model(batch["image"], tokens)
        assert found.scale is not None
        assert found.text is not None
        return logits(found._replace(scale=found.scale.clamp(max=SCALE)), found.text)

    def criterion(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        places = _places(batch["captions"])
        right = torch.tensor([places[told[0]] for told in batch["captions"]], device=outputs.device)
        return contrastive(outputs.float(), right)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        return clip_of(self.model).tokens(texts, cut=self.cut)

    def evaluate(self, batch: dict[str, Any]) -> None:
        found = self.model(batch["image"], self._tokens(texts := list(_places(batch["captions"]))))
        if not (torch.isfinite(found.image).all() and torch.isfinite(found.text).all()):
            raise WorkError(f"the embeddings are not finite on samples {', '.join(batch['name'])}")
        at = {text: place for place, text in enumerate(texts)}
        every = [at[text] for told in batch["captions"] for text in told]
        self._seen.append((found.image.cpu(), found.text[every].cpu(), batch["captions"]))
        first = {"captions": [told[:1] for told in batch["captions"]]}
        scores = logits(found, found.text[[at[text] for text in _places(first["captions"])]])
        self._losses.append((self.criterion(scores, first).item(), len(found.image)))

    def results(self) -> dict[str, Any]:
        image = torch.cat([image for image, _, _ in self._seen])
        captions = [told for _, _, batch in self._seen for told in batch]
        text = torch.cat([text for _, text, _ in self._seen])
        flat, places = [caption for told in captions for caption in told], _places(captions)
        first = {caption: index for index, caption in reversed(list(enumerate(flat)))}
        right = torch.zeros(len(image), len(places), dtype=torch.bool)
        for row, told in enumerate(captions):
            right[row, [places[caption] for caption in told]] = True
        found = measure(image, text[[first[caption] for caption in places]], right)
        images = sum(count for _, count in self._losses)
        loss = sum(value * count for value, count in self._losses) / images
        self._seen, self._losses = [], []
        recalls = [found[f"{way}/recall@{k}"] for way in ("image_to_text", "text_to_image") for k in KS]
        summary = {"mean_recall": sum(recalls) / len(recalls), "loss": loss}
        return {**found, **summary, "images": images, "captions": len(flat)}

    def configure_optimizers(self) -> Any:
        if self.trainer.world_size > 1:
            raise RequestError("ClipRetrieval compares all pairs of a batch, which one process must hold: give "
                               "trainer.devices 1")  # fmt: skip
        return super().configure_optimizers()

    @torch.no_grad()
    def embed_images(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to embeddings (B, D) of length 1, in eval mode."""
        training = self.training
        self.eval()
        try:
            found: Any = self.model(image.to(self.device))
        finally:
            self.train(training)
        if not torch.isfinite(found.image).all():
            raise WorkError("the embeddings are not finite: the image holds NaN, or the weights do")
        return found.image

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings (N, D) of length 1, in eval mode."""
        training = self.training
        self.eval()
        try:
            return F.normalize(embed_texts(self.model, self._tokens(texts)), dim=-1)
        finally:
            self.train(training)

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        kind: str | None = None, top: int | None = None, overwrite: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Rank images, or texts, and write a table (see ``ranking.rank_files``)."""
        from modalities.images.data import Preparation
        from modalities.vision_language.ranking import rank_files

        if unfit := [name for name, value in options.items() if value is not None]:
            raise RequestError(f"predict: retrieval has no --{unfit[0]}; it ranks images and texts")
        preparation = Preparation.of(described)
        rank_files(
            self, preparation, inputs, output, kind=kind, top=self.top if top is None else top, overwrite=overwrite
        )

    def pictures(self, data: Any, count: int = 8) -> Any:
        """``count`` images spread over the test split with the caption that each finds first among all of the split."""
        from shared.report.plots import COLOURS, Pictures

        samples: Any = data.test().dataset
        every = [samples[index] for index in range(len(samples))]
        texts = list(_places([sample["captions"] for sample in every]))
        known = self.embed_texts(texts)
        chosen = sorted({round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)})
        colours, shown = {"right": COLOURS[0], "wrong": COLOURS[5]}, []
        for sample in (every[index] for index in chosen):
            said = texts[int((self.embed_images(sample["image"][None])[0] @ known.T).argmax())]
            colour = colours["right" if said in sample["captions"] else "wrong"]
            picture: np.ndarray = framed(data.display(sample["image"]), colour)
            shown.append((f"{sample['name']}: {said}", picture))
        rows = [
            (f"{start + 1} to {min(start + 4, len(shown))} of {len(shown)} out of {len(every)} test images, with the "
             "caption each finds first", dict(shown[start : start + 4]))
            for start in range(0, len(shown), 4)
        ]  # fmt: skip
        return Pictures(rows, {"Frame": colours})

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuses, before it reaches the device, a batch that would train or measure wrongly."""
        image, names = batch["image"], ", ".join(batch["name"])
        if image.ndim != 4 or image.shape[1] != self.bands or len(batch["captions"]) != len(image):
            shapes = f"images {tuple(image.shape)} and captions of {len(batch['captions'])}"
            raise RequestError(f"samples {names}: {shapes} do not fit {self.bands} bands and each other")
        if image.dtype != (wanted := self.model.dtype):
            raise RequestError(f"samples {names}: images are {image.dtype}, the model computes in {wanted}")
        if not torch.isfinite(image).all():
            raise RequestError(f"samples {names}: an image holds NaN or infinity")
        return batch


def _places(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """The different captions, each with its place in the order in which they come first."""
    return {text: place for place, text in enumerate(dict.fromkeys(text for told in captions for text in told))}
