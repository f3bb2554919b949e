"""Losses of dense prediction that no library has as we need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_dice(
    logits: Tensor, mask: Tensor, *, ignore_index: int = 255, class_weights: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:  # fmt: skip
    """Cross entropy plus soft Dice (Milletari et al., 2016), over the pixels that are not ignored.

    logits: (B, K, H, W).  mask: (B, H, W), int64, 0 to K - 1 or ``ignore_index``.  class_weights: (K,), of the cross
    entropy.  Dice is taken over the whole batch and averaged over the classes that occur in ``mask``.
    total: adds sums up where processes share the batch (``processes.total``).

    Returns a scalar; exactly 0, with zero gradients, where every pixel is ignored.
    """
    valid = mask != ignore_index
    truth = mask[valid]  # (N,)
    scores = logits.movedim(1, -1)[valid].float()  # (N, K)
    weights = scores.new_ones(scores.shape[1]) if class_weights is None else class_weights
    entropy = F.cross_entropy(scores, truth, weights, reduction="sum")
    share = scores.softmax(1)
    support = torch.bincount(truth, minlength=scores.shape[1]).to(share)
    overlap = share.new_zeros(len(support)).index_add(0, truth, share.gather(1, truth[:, None])[:, 0])

    sums = total(torch.cat([entropy[None], weights[truth].sum()[None], share.sum(0), support, overlap]))
    (entropy, weight), (share, support, overlap) = sums[:2], sums[2:].view(3, -1)
    dice = 2 * overlap / (share + support).clamp(min=1e-12)
    present = support > 0
    return entropy / weight.clamp(min=1e-12) + ((1 - dice) * present).sum() / present.sum().clamp(min=1)
