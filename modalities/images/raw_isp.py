"""The input level of RAW-Adapter: a learnable image-signal-processor in front of a network trained on sRGB.

Cui & Harada, RAW-Adapter: Adapting Pre-trained Visual Model to Camera RAW Images, ECCV 2024 (arXiv 2408.14802).
Module names are those of the released weights. Images are (B, 3, H, W), linear, from 0 to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import RequestError

LEAST = 1e-5  # of a pixel, so that powers and quotients stay finite
R1, R2 = 3.0, 2.0  # pixels: what the horizontal and the vertical deviation of the blur start from
STEP = 0.1  # of a predicted number, where it moves a deviation or the colour matrix


class Blur(NamedTuple):
    """What is predicted of an image for gain and blur, (B,) each: deviations across and down in pixels, gain, and the
    share of the sharpening, from 0 to 1."""

    r1: Tensor
    r2: Tensor
    gain: Tensor
    sigma: Tensor


class Predictor(nn.Module):
    """``count`` numbers of an image: learnt queries read its tokens, at a sixteenth of its sides, with one head.

    width: of the tokens, a multiple of 8.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.q = nn.Parameter(torch.rand(1, count, width))
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (width // 8, width // 4, width // 2, width):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.GELU()]
            inputs = outputs
        self.kv_downsample = nn.Sequential(*layers[:-1])
        self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.down = nn.Linear(width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, count)."""
        tokens = self.kv_downsample(image).flatten(2).transpose(1, 2)
        weights = (self.q @ self.k(tokens).transpose(1, 2) * self.q.shape[-1] ** -0.5).softmax(-1)
        return self.down(self.proj(weights @ self.v(tokens))).squeeze(-1)


class KernelPredictor(Predictor):
    """Gain, blur and sharpening of an image. gain: what the gain starts from, itself trained or not."""

    def __init__(self, width: int, gain: float, train_gain: bool):
        super().__init__(width, 4)
        base = torch.full((1,), float(gain))
        if train_gain:
            self.gain_base = nn.Parameter(base)
        else:
            self.register_buffer("gain_base", base)
        self.register_buffer("r1_base", torch.full((1,), R1))
        self.register_buffer("r2_base", torch.full((1,), R2))

    def predict(self, image: Tensor) -> Blur:
        across, down, gain, sigma = self(image).unbind(1)
        r1, r2 = STEP * across + self.r1_base, STEP * down + self.r2_base
        return Blur(r1, r2, gain + self.gain_base, sigma.sigmoid())


class MatrixPredictor(Predictor):
    """Colour matrix and white balance of an image."""

    def __init__(self, width: int):
        super().__init__(width, 10)
        self.register_buffer("ccm_base", torch.eye(3))

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix (B, 3, 3) and the exponent rho (B,) of the white balance, at least 1."""
        found = self(image)
        return STEP * found[:, :9].unflatten(1, (3, 3)) + self.ccm_base, found[:, 9].relu() + 1


class LookUp(nn.Module):
    """A table from colours to what is added to them, as an MLP over pixels. hidden: its width."""

    def __init__(self, hidden: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(3, hidden), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(hidden, hidden), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 3))

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.movedim(1, -1)
        return (self.net(pixels) + pixels).clamp(0, 1).movedim(-1, 1)


class InputAdapter(nn.Module):
    """The stages, from an image to the list of it and what each stage made of it; the last is what the network sees.

    kernel: side of the blur in pixels, odd.  lut: hidden width of the look-up, None for none.
    """

    def __init__(self, *, width: int, kernel: int, lut: int | None, gain: float, train_gain: bool):
        super().__init__()
        self.kernel = kernel
        self.Predictor_K = KernelPredictor(width, gain, train_gain)
        self.Predictor_M = MatrixPredictor(width)
        self.LUT = None if lut is None else LookUp(lut)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four such images, five with the look-up."""
        sharpened = sharpen(image, self.Predictor_K.predict(image), self.kernel)
        matrix, rho = self.Predictor_M.predict(sharpened)
        balanced = white_balance(sharpened, rho)
        images = [image, sharpened, balanced, colour(balanced, matrix)]
        return images if self.LUT is None else [*images, self.LUT(images[-1])]


def gaussian(deviation: Tensor, kernel: int) -> Tensor:
    """Weights (B, kernel) that sum to one, of deviations (B,) in pixels."""
    places = torch.arange(kernel, device=deviation.device, dtype=deviation.dtype) - (kernel - 1) / 2
    weights = (-0.5 * (places / deviation[:, None]) ** 2).exp()
    return weights / weights.sum(1, keepdim=True)


def blurred(image: Tensor, r1: Tensor, r2: Tensor, kernel: int) -> Tensor:
    """Every image (B, 3, H, W) with its own Gaussian, deviations r1 across and r2 down, borders reflected."""
    batch, bands, height, width = image.shape
    reach = kernel // 2
    if min(height, width) <= reach:
        raise RequestError(f"RAWAdapter: images of {height} x {width} under a blur of {kernel} pixels; use larger ones")
    across, down = (gaussian(r, kernel).repeat_interleave(bands, 0) for r in (r1, r2))
    x = F.pad(image, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, across[:, None, None, :], groups=batch * bands)
    return F.conv2d(x, down[:, None, :, None], groups=batch * bands).view(image.shape)


def sharpen(image: Tensor, blur: Blur, kernel: int) -> Tensor:
    """Gain and blur, and a share of what the blur took; as published, that is measured on the image before the gain."""
    gain, sigma = (value.view(-1, 1, 1, 1) for value in (blur.gain, blur.sigma))
    smooth = blurred(gain * image, blur.r1, blur.r2, kernel)
    return (smooth + sigma * (image - smooth)).clamp(LEAST, 1)


def white_balance(image: Tensor, rho: Tensor) -> Tensor:
    """Shades of grey (Finlayson & Trezzi, 2004): the power means of the bands made equal; rho (B,), 1: grey world.

    image: above 0.
    """
    bands, whole = _power_mean(image, rho, (2, 3)), _power_mean(image, rho, (1, 2, 3))
    return image / (bands / whole)


def _power_mean(image: Tensor, rho: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Over these axes, which are kept; of numbers up to 1, as high powers of dark pixels would vanish."""
    rho, greatest = rho.view(-1, 1, 1, 1), image.detach().amax(dims, keepdim=True)
    return greatest * ((image / greatest) ** rho).mean(dims, keepdim=True) ** (1 / rho)


def colour(image: Tensor, matrix: Tensor) -> Tensor:
    """Every pixel by its image's matrix (B, 3, 3)."""
    return torch.einsum("bij,bjhw->bihw", matrix, image).clamp(LEAST, 1)
