"""The Mask2Former head (Cheng et al., 2022), made of the modules of transformers, on a backbone's feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from modalities.remote_sensing.heads.light import expected, resize
from shared.backbone import Features
from shared.errors import RequestError

STRIDES = (4, 8, 16, 32)
_OUTSIDE = -100.0  # a mask logit whose sigmoid is 0 and whose cross entropy with "outside" is 0 in float32


class Queries(NamedTuple):
    """What the decoder says after its start and after every layer, the last one last.

    classes: each (B, queries, classes + 1), the last column for "no object".  masks: each (B, queries, H/4, W/4).
    """

    classes: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


class Mask2FormerHead(nn.Module):
    """Queries that each give a class and a mask; a pixel decoder with deformable attention below them.

    Defaults are those of Cloud-Adapter (arXiv 2411.13127), which are the paper's. The semantic mask becomes one binary
    mask for every class present in an image.

    channels: of the backbone's maps: four, for strides 4 to 32, or one that serves all four.  classes: their number.
    queries: number of queries.  decoder_layers and encoder_layers: of the transformer and of the pixel decoder.
    width: channels inside, a power of two from 32.  feedforward and encoder_feedforward: inner widths of their MLPs.
    class_weight, mask_weight, dice_weight: of the three losses, and of the costs by which queries are matched.
    no_object_weight: of the class loss for unmatched queries.  points: sampled for the losses of each mask, of
    which the fraction ``importance`` are the least certain of ``oversample`` times as many.
    linked: the queries are those that an adapter makes (Rein's link): their positions as they are, their contents by a
    linear layer. With the adapter off, in evaluation, there are ``queries`` of zeros.
    ignore_index: value of ``mask`` without a label.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        queries: int = 100,
        decoder_layers: int = 9,
        encoder_layers: int = 6,
        width: int = 256,
        feedforward: int = 2048,
        encoder_feedforward: int = 1024,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        linked: bool = False,
        ignore_index: int = 255,
    ):
        super().__init__()
        if len(channels) not in (1, 4):
            raise RequestError(
                f"Mask2Former wants one feature map or four, not {len(channels)}: set the backbone's depths"
            )
        if width < 32 or width & (width - 1):
            raise RequestError(f"head.width {width}: use a power of two from 32")
        self.classes, self.ignore_index, self.maps = classes, ignore_index, len(channels)
        self.loss_weights = {"cross_entropy": class_weight, "mask": mask_weight, "dice": dice_weight}
        config = _config(
            num_labels=classes, num_queries=queries, encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # the library counts the prediction before the first layer
            hidden_dim=width, feature_size=width, mask_feature_size=width,
            dim_feedforward=feedforward, encoder_feedforward_dim=encoder_feedforward,
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight,
            no_object_weight=no_object_weight, train_num_points=points,
            oversample_ratio=oversample, importance_sample_ratio=importance, feature_strides=list(STRIDES),
        )  # fmt: skip
        self.queries, self.width, self.linked = queries, width, linked
        self._build(config, list(channels) * (4 // len(channels)))

    def _build(self, config: Any, channels: list[int]) -> None:
        from transformers.models.mask2former import modeling_mask2former as library

        self.pixel_decoder = library.Mask2FormerPixelDecoder(config, feature_channels=channels)
        self.transformer = library.Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.classify = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.criterion = library.Mask2FormerLoss(config, weight_dict=dict(self.loss_weights))
        self.apply(library.Mask2FormerPreTrainedModel(config)._init_weights)
        if self.linked:
            self.queries_to_features = nn.Linear(config.hidden_dim, config.hidden_dim)
            for name in ("queries_embedder", "queries_features"):
                setattr(self.transformer, name, _Given())

    def forward(self, features: Features, size: tuple[int, int]) -> Queries:
        """Maps (B, C_i, h_i, w_i) of an image of ``size`` (H, W) to class and mask logits of all queries."""
        levels = pyramid(expected(features, self.maps), size)
        pixels = self.pixel_decoder(levels, output_hidden_states=False, output_attentions=False, return_dict=True)
        decoded = self._decode(features, pixels.multi_scale_features, pixels.mask_features)
        classes = tuple(self.classify(state.transpose(0, 1)) for state in decoded.intermediate_hidden_states)
        return Queries(classes, decoded.masks_queries_logits)

    def _decode(self, features: Any, scales: Sequence[Tensor], finest: Tensor) -> Any:
        """The transformer's answer, to its own queries or to those that come with the features."""
        if not self.linked:
            return self.transformer(scales, finest, output_hidden_states=False)
        queries = getattr(features, "queries", None)
        if queries is None and self.training:
            raise RequestError("head.linked: no adapter makes its queries; use the method Rein with link: true")
        queries = finest.new_zeros(self.queries, self.width) if queries is None else queries[0]
        if queries.shape[1] != self.width:
            raise RequestError(f"head.width {self.width}: the method makes queries of width {queries.shape[1]}")
        given = {
            "queries_embedder.weight": queries,
            "queries_features.weight": self.queries_to_features(queries),
        }
        return functional_call(self.transformer, given, (scales, finest, False), tie_weights=False)

    def loss(self, output: Queries, mask: Tensor) -> Tensor:
        """The matched class, mask and Dice losses of every layer, weighted and summed: a scalar.

        mask: (B, H, W), int64, class indices or ``ignore_index``. An image without a labelled pixel takes no part: it
        may not teach that nothing is there; a batch of such images gives exactly 0. Inside ignored regions the mask
        logits are set to "outside" before matching and losses, which frees them of cost and gradient; only a rim of
        two cells (of stride 4) within such a region counts as outside every mask, as all of it does in the published
        code. An ignored pixel is never part of a class's mask.
        """
        labelled = mask != self.ignore_index
        kept = labelled.flatten(1).any(1)
        if not kept.any():
            return torch.stack([(t.float() * 0).sum() for t in (*output.classes, *output.masks)]).sum()
        hidden = _inside(~labelled[kept], output.masks[-1].shape[2:])
        with torch.autocast(mask.device.type, enabled=False):
            predictions = [
                {
                    "class_queries_logits": c[kept].float(),
                    "masks_queries_logits": m[kept].float().masked_fill(hidden, _OUTSIDE),
                }
                for c, m in zip(output.classes, output.masks, strict=True)
            ]
            present = [torch.unique(one[one != self.ignore_index]) for one in mask[kept]]
            masks = [(one == found[:, None, None]).float() for one, found in zip(mask[kept], present, strict=True)]
            last, earlier = predictions[-1], predictions[:-1]
            losses = self.criterion(**last, mask_labels=masks, class_labels=present, auxiliary_predictions=earlier)
        weighted = [
            w * v for kind, w in self.loss_weights.items() for n, v in losses.items() if n.startswith(f"loss_{kind}")
        ]
        return torch.stack(weighted).sum()

    def predict(self, output: Queries, size: tuple[int, int]) -> Tensor:
        """Class scores (B, classes, H, W) at ``size``: over queries, the sum of class softmax times mask sigmoid."""
        shares = output.classes[-1].float().softmax(-1)[..., :-1]
        masks = resize(output.masks[-1].float(), size).sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", shares, masks)


class _Given(nn.Module):
    """In the place of learnt queries (number, width) that are given with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)


def pyramid(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Maps (B, C, h, w), four or one for all, resized to strides 4, 8, 16 and 32 of an image of ``size``.

    For a transformer with patches of 16 these are the factors 4, 2, 1 and 0.5; nothing is trained.
    """
    maps = list(maps) * (4 // len(maps))
    sizes = [(max(1, size[0] // stride), max(1, size[1] // stride)) for stride in STRIDES]
    return [resize(m, target) for m, target in zip(maps, sizes, strict=True)]


def _inside(ignored: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, h, w): the cells that no bilinear sample at a labelled pixel of ``ignored`` (B, H, W) reads."""
    labelled = F.adaptive_max_pool2d((~ignored)[:, None].float(), tuple(size))
    return F.max_pool2d(labelled, 3, stride=1, padding=1) == 0


def _config(**values: Any) -> Any:
    try:
        from transformers import Mask2FormerConfig
    except ImportError as error:
        raise RequestError(f"Mask2Former: {error}; pip install 'omniadapt[remote-sensing]'") from error
    return Mask2FormerConfig(**values)
