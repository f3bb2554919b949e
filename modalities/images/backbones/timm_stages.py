"""What timm's networks of four stages have in common: how they are made, filled and shown."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from modalities.images.backbones.inputs import byte_statistics, check_bands, example_images, library, nearest
from modalities.images.backbones.timm_hub import load
from shared import weights as w
from shared.backbone import Backbone
from shared.errors import RequestError


class _TimmStages(Backbone):
    """A network of timm at ``self.model`` that gives maps of its four stages at strides 4, 8, 16 and 32.

    Its arguments are those of the subclasses, which give ``forward``, ``sites``, ``renamed`` and:
    kind: what its names are names of.  family: timm's module of these.  entry: the kernel that takes the bands.
    """

    kind: ClassVar[str]
    family: ClassVar[str]
    entry: ClassVar[str]
    model: Any

    def __init__(
        self, bands: int, name: str, weights: str, checkpoint: str | None, seed: int, model_args: dict[str, Any] | None
    ):
        check_bands(name, bands)
        w.check_choice(name, weights, checkpoint)
        super().__init__(name)
        self.model = w.build(lambda: self._create(name, bands, model_args or {}), seed)
        self.bands = bands
        self.channels = tuple(stage["num_chs"] for stage in self.model.feature_info)
        self.statistics = byte_statistics(self.model.pretrained_cfg, bands)
        self.source = f"random (seed {seed})"
        if weights == "pretrained":
            self.source = load(self.model, name, bands, checkpoint, entry=self.entry, renamed=self.renamed)

    def create(self, name: str, **arguments: Any) -> Any:
        """timm's model without its classifier."""
        model = library("timm").create_model(name, **arguments)
        model.reset_classifier(0, reset_other=True)
        return model

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under the names of ``self.model``."""
        raise NotImplementedError

    def example(self) -> tuple[Tensor]:
        """Two images of 64 x 96 pixels, of about unit variance."""
        return (example_images(self.model, self.bands, 64, 96),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"

    def _create(self, name: str, bands: int, model_args: dict[str, Any]) -> Any:
        known = library("timm").list_models(module=self.family)
        if name.partition(".")[0] not in known:
            raise RequestError(f"{name}: no {self.kind}{nearest(name, known)}")
        ours = ("in_chans", "num_classes", "pretrained", "features_only", "output_stride")
        if taken := [key for key in model_args if key in ours]:
            raise RequestError(f"{name}: model_args {taken}: use the arguments bands and weights; strides are fixed")
        try:
            return self.create(name, in_chans=bands, **model_args)
        except (TypeError, AssertionError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise RequestError(f"{name}: timm refuses {model_args}: {error}") from error
