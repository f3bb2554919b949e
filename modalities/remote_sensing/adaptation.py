"""Domain generalisation and adaptation: segmentation that trains on one domain and is measured on another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from modalities.remote_sensing.data.domains import SOURCE
from modalities.remote_sensing.segmentation import Segmentation, measure
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.method import Method
from shared.training.optimiser import Optimiser
from shared.training.teacher import Teacher


class DomainGeneralisation(Segmentation):
    """Trains on the source's labels alone; its data are of two domains (``FolderDomains``, ``GeneratedDomains``).

    Results of a split are the target's (see ``Segmentation``), and with ``source_`` before their names the source's.
    What picks the best state by default, ``validation/miou``, therefore looks at labels of the target, as published
    results do; ``trainer.monitor: validation/source_miou`` does not.
    """

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser, *, exposure: float = 0.0):
        super().__init__(model, data, optimiser, exposure=exposure)
        if not hasattr(data, "pairs"):
            raise RequestError("the task wants data of two domains: FolderDomains or GeneratedDomains")
        self.source_confusion = MulticlassConfusionMatrix(
            len(self.classes), ignore_index=self.ignore_index, validate_args=False
        )
        self.source_loss = MeanMetric(nan_strategy="error")

    def evaluate(self, batch: dict[str, Any]) -> None:
        if "domain" not in batch or len(domains := set(batch["domain"].tolist())) != 1:
            raise RequestError(f"samples {', '.join(batch['name'])}: a batch is of one domain and says of which")
        metrics = [(self.source_confusion, self.source_loss), (self.confusion, self.mean_loss)]
        here, (confusion, mean_loss) = metrics if domains == {SOURCE} else metrics[::-1]
        self.score(batch, *here)
        # Of several processes one may see a single domain: what it adds to the other is nothing, which counts as seen.
        confusion.update(torch.zeros_like(batch["mask"]), torch.full_like(batch["mask"], self.ignore_index))
        mean_loss.update(0.0, 0.0)

    def results(self) -> dict[str, Any]:
        source = {"loss": self.source_loss.compute().item(), **measure(self.source_confusion.compute(), self.classes)}
        self.source_loss.reset()
        self.source_confusion.reset()
        return super().results() | _of_source(source)

    @classmethod
    def pooled(cls, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As ``Segmentation.pooled``, for each domain."""
        source = [{n.removeprefix("source_"): v for n, v in one.items() if n.startswith("source_")} for one in results]
        target = [{n: v for n, v in one.items() if not n.startswith("source_")} for one in results]
        return super().pooled(target) | _of_source(super().pooled(source))


class SelfTraining(DomainGeneralisation):
    """DACS (Tranheden et al., 2021) with a mean teacher, as Earth-Adapter runs it; its data give pairs of images.

    A step trains on source images with their labels and, after iteration ``start``, also on mixed ones: of each source
    image half of its classes, drawn anew, are pasted onto a target image (ClassMix, Olsson et al., 2021) and onto its
    pseudo-labels, for which the teacher's most likely class counts however sure it is; pixels without data have none.
    After every step of the optimiser the teacher takes in the student (``shared.training.teacher``); the student is
    tested. Labels of the target never reach training.

    start: last iteration (steps of the optimiser, from 0) without mixed images (paper: 4000).
    mixed_weight: of the mixed loss (paper: 0.5).  limit: share of the teacher that a step keeps, at most (paper: 0.99).
    exposure: as in ``Segmentation``, of source and mixed images.

    The time of a step that a run predicts is that of the first ones, without mixed images; a later one takes two to
    three times as long.
    """

    def __init__(
        self, model: Adapted, data: Any, optimiser: Optimiser, *, start: int = 4000, mixed_weight: float = 0.5,
        limit: float = 0.99, exposure: float = 0.0,
    ):  # fmt: skip
        super().__init__(model, data, optimiser, exposure=exposure)
        if start < 0 or mixed_weight <= 0 or not 0 <= limit < 1:
            raise RequestError(
                f"task: start {start} is at least 0, mixed_weight {mixed_weight} above 0, limit {limit} from 0 to < 1"
            )
        if not data.pairs:
            raise RequestError("self-training adapts to images of the target: set data.pairs: true")
        for method in (model.methods[name] for name in model.active):
            if type(method).loss is not Method.loss:
                raise RequestError(f"{type(method).__name__} trains in passes of its own, self-training has others")
        self.start, self.mixed_weight = start, mixed_weight
        self.teacher = Teacher(model, limit)
        self._stepped = 0

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> Tensor:
        supervised = super().loss(batch)
        if self.global_step <= self.start:
            return supervised
        return supervised + self.mixed_weight * super().loss(self.mixed(batch))

    def mixed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch's mixed images and labels."""
        pasted = pasted_classes(batch["mask"], self.ignore_index)
        image = torch.where(pasted[:, None], batch["image"], batch["target"])
        return {**batch, "image": image, "mask": torch.where(pasted, batch["mask"], self.pseudo_labels(batch))}

    @torch.no_grad()
    def pseudo_labels(self, batch: dict[str, Any]) -> Tensor:
        """The teacher's classes (B, H, W) of the target images, ``ignore_index`` where these have no data."""
        target = batch["target"]
        scores = self.head.predict(self.teacher(self.model, target), (target.shape[2], target.shape[3]))
        return scores.argmax(1).masked_fill(~batch["target_valid"], self.ignore_index)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if "domain" in batch:  # of an evaluation
            return batch
        if "target" not in batch or batch["target"].shape != batch["image"].shape:
            raise RequestError(
                f"samples {', '.join(batch['name'])}: each wants a target image of its own size; set data.tile"
            )
        if not torch.isfinite(batch["target"]).all():
            raise RequestError(f"samples {', '.join(batch['target_name'])}: an image holds NaN or infinity")
        return batch

    # -- the teacher -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        from shared.training.sharded import Sharded

        if isinstance(self.trainer.strategy, Sharded):
            raise RequestError("trainer.strategy fsdp divides the model; its teacher is whole: use ddp")
        super().on_fit_start()
        if self.trainer.ckpt_path is None:  # what a method prepares, the teacher starts from
            self.teacher = Teacher(self.model, self.teacher.limit)

    def on_train_start(self) -> None:
        self._stepped = self.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > self._stepped:
            self._stepped = self.global_step
            self.teacher.update(self.model, self.global_step - 1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        averages = {f"teacher.{name}": tensor for name, tensor in self.teacher.tensors().items()}
        return super().state_dict(*args, **kwargs) | averages

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        student = {name: tensor for name, tensor in state_dict.items() if not name.startswith("teacher.")}
        found = super().load_state_dict(student, strict, assign)
        averages = {n.removeprefix("teacher."): t for n, t in state_dict.items() if n.startswith("teacher.")}
        if averages.keys() != student.keys():
            raise RequestError("checkpoint: its teacher is not that of this model; it is none of this task's")
        self.teacher = Teacher(self.model, self.teacher.limit)
        self.teacher.load(averages)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["self_training"] = self._settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (was := checkpoint.get("self_training")) != (now := self._settings()):
            raise RequestError(f"the checkpoint is of self-training with {was}, not with {now}")
        super().on_load_checkpoint(checkpoint)

    def _settings(self) -> dict[str, float]:
        return {"start": self.start, "mixed_weight": self.mixed_weight, "limit": self.teacher.limit}


def _of_source(results: Mapping[str, Any]) -> dict[str, Any]:
    """Named as the source's; its pixels of each class are in the confusion matrix."""
    return {f"source_{name}": value for name, value in results.items() if not name.startswith("support/")}


def pasted_classes(mask: Tensor, ignore_index: int) -> Tensor:
    """Where to paste (B, H, W): the pixels of ceil(n / 2) of the n classes of each mask, drawn without replacement."""
    pasted = torch.zeros_like(mask, dtype=torch.bool)
    for where, own in zip(pasted, mask, strict=True):
        classes = own.unique()
        classes = classes[classes != ignore_index]
        chosen = classes[torch.randperm(len(classes))[: math.ceil(len(classes) / 2)].to(classes.device)]
        where |= torch.isin(own, chosen)
    return pasted
