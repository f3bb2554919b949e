"""The head of pretraining: a class for the image, and the pixels of the patches it was not shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.backbone import Features
from shared.errors import RequestError


class PretrainingHead(nn.Module):
    """A linear classifier on the summary, and a small transformer that fills in the patches that were dropped.

    The asymmetric decoder of masked autoencoders (He et al., 2022): tokens of patches that were seen are projected to
    ``width``, a learnt token stands for every other patch, and fixed sine and cosine positions tell them apart.

    channels: of the backbone's maps; the last ones are decoded.  classes: number of classes.
    patch: pixels a side of the backbone's patches.  bands: of the images.  width: channels inside.
    depth: blocks.  smoothing: of the class labels (Szegedy et al., 2016).
    """

    ignore_index = 255

    def __init__(
        self, channels: Sequence[int], classes: int, *, patch: int = 8, bands: int = 3, width: int = 96, depth: int = 1,
        smoothing: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if width % 32 or min(patch, bands, depth, width) < 1 or not 0 <= smoothing < 1:
            raise RequestError(
                f"head: patch {patch}, bands {bands} and depth {depth} are at least 1, width {width} a multiple of 32, "
                f"smoothing {smoothing} from 0 to below 1"
            )
        self.classes, self.patch, self.bands, self.smoothing = classes, patch, bands, smoothing
        self.classify = nn.Linear(channels[-1], classes)
        self.enter = nn.Linear(channels[-1], width)
        self.unseen_token = nn.Parameter(0.02 * torch.randn(width))
        block = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, bands * patch**2)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Class logits (B, classes)."""
        return self.classify(features.summary)

    def use(self, *, labels: bool, pixels: bool) -> None:
        """Which of its two parts train."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(labels if name.startswith("classify") else pixels)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """output: logits (B, classes).  label: (B,).  Cross entropy with smoothed labels."""
        return F.cross_entropy(output.float(), label, label_smoothing=self.smoothing)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Class probabilities (B, classes)."""
        return output.float().softmax(1)

    def reconstruct(self, tokens: Tensor, seen: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, n, C) of the patches ``seen`` (B, n) to values (B, m, bands * patch**2) of ``hidden`` (B, m)."""
        known = self.enter(tokens)
        table = positions(grid, known.shape[-1]).to(known)
        unseen = self.unseen_token.to(known).expand(*hidden.shape, -1)
        mixed = self.blocks(torch.cat([known + table[seen], unseen + table[hidden]], 1))
        return self.leave(mixed[:, seen.shape[1] :])

    def reconstruction_loss(self, values: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error on the ``hidden`` patches, each normalised by its own mean and deviation."""
        every = F.unfold(image, self.patch, stride=self.patch).transpose(1, 2)
        target = every.gather(1, hidden[:, :, None].expand(-1, -1, every.shape[2]))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        return F.mse_loss(values.float(), target)


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines (h*w, width) of row and column, a quarter of ``width`` each (Vaswani et al., 2017)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
