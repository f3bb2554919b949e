"""Learning a sketch from data: weighted k-means, then rounding that passes errors on (Zhang and Shrivastava, 2024)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from shared.blocks.sketch import pack
from shared.errors import WorkError


def learn(
    weight: Tensor, moment: Tensor, bits: int, groups: int, *, exponent: float, damping: float, block: int = 128,
    where: str = "weight",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The table (R, groups, 2^bits), float32, and packed codes of a weight (R, C), for inputs of second moment (C, C).

    exponent: columns count by the power ``-exponent`` of the diagonal of the factor of the inverse moment, so those to
    whose rounding the output is sensitive count more.  damping: added to the diagonal, as a share of its mean.
    block: columns after which the error is passed on to all that follow.

    Raises WorkError where the damped moment has no inverse.
    """
    values, moment = weight.detach().float().clone(), moment.clone()
    diagonal = moment.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1
    values[:, unused] = 0
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(moment)
    factor, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_again:
        raise WorkError(f"the statistics at {where} have no inverse: raise damping (now {damping:g})")
    size = values.shape[1] // groups
    importance = (factor.diagonal() / factor.diagonal().min()).pow(-exponent)
    parts = zip(values.split(size, 1), importance.split(size), strict=True)
    table = torch.stack([centres(own, weights, 2**bits) for own, weights in parts], 1)
    return table, pack(_round(values, factor, table, block).unflatten(1, (groups, size)))


def _round(values: Tensor, factor: Tensor, table: Tensor, block: int) -> Tensor:
    """Codes (R, C): columns left to right, the error of each taken off those after it; ``values`` is used up."""
    columns, size = values.shape[1], values.shape[1] // table.shape[1]
    codes = torch.empty_like(values, dtype=torch.uint8)
    middles = _middles(table)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = values.new_empty(len(values), stop - start)
        for i in range(start, stop):
            column, group = values[:, i : i + 1], i // size
            code = torch.searchsorted(middles[:, group].contiguous(), column.contiguous())
            error = (column - table[:, group].gather(1, code)) / factor[i, i]
            values[:, i + 1 : stop] -= error * factor[i, i + 1 : stop]
            codes[:, i], errors[:, i - start] = code[:, 0], error[:, 0]
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _middles(centres: Tensor) -> Tensor:
    """Between neighbours of ascending centres (..., k): (..., k - 1)."""
    return (centres[..., 1:] + centres[..., :-1]) / 2


def centres(values: Tensor, weights: Tensor, count: int, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weighted k-means of each row of values (R, S), weights (S,): ``count`` centres (R, count), ascending.

    It starts evenly spaced between a row's least and greatest for up to 8 centres, else at points drawn far from each
    other (k-means++, seed 0). A row ends when no point moves, or the squared moves of its centres sum to less than
    ``tolerance`` times its variance. A centre without points goes to the point farthest from its own centre.
    """
    found = (_even(values, count) if count <= 8 else _far_apart(values, weights, count)).sort(1).values
    limit = tolerance * values.var(1, unbiased=False)
    running = torch.arange(len(values), device=values.device)
    before = torch.full(values.shape, -1, device=values.device)
    for _ in range(iterations):
        own, now = values[running], found[running]
        label = _occupied(own, now, torch.searchsorted(_middles(now).contiguous(), own))
        new = _means(own, weights, label, now).sort(1).values
        found[running] = new
        moving = (label != before[running]).any(1) & ((new - now).square().sum(1) > limit[running])
        before[running] = label
        running = running[moving]
        if not len(running):
            break
    return found


def _even(values: Tensor, count: int) -> Tensor:
    low, high = values.aminmax(dim=1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, count, device=values.device)


def _far_apart(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Points drawn with probability weight times squared distance to the nearest that was drawn before."""
    generator = Generator(values.device).manual_seed(0)
    distance = torch.ones_like(values)
    drawn = []
    for _ in range(count):
        chance = distance * weights
        chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, torch.ones_like(chance))  # no point is apart
        drawn.append(values.gather(1, torch.multinomial(chance, 1, generator=generator)))
        nearer = (values - drawn[-1]).square()
        distance = nearer if len(drawn) == 1 else torch.minimum(distance, nearer)
    return torch.cat(drawn, 1)


def _occupied(values: Tensor, centres: Tensor, label: Tensor) -> Tensor:
    """The labels (R, S), those of the points farthest from their own centre changed to centres that have none."""
    counts = torch.zeros_like(centres, dtype=torch.long).scatter_add_(1, label, torch.ones_like(label))
    empty = counts == 0
    most = min(int(empty.sum(1).max()), values.shape[1])
    if not most:
        return label
    distance = (values - centres.gather(1, label)).square()
    farthest = distance.topk(most, 1).indices
    vacant = empty.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    use = torch.arange(most, device=values.device) < empty.sum(1, keepdim=True)
    return label.scatter(1, farthest, torch.where(use, vacant, label.gather(1, farthest)))


def _means(values: Tensor, weights: Tensor, label: Tensor, centres: Tensor) -> Tensor:
    """The weighted mean of each centre's points; where all are equal, exactly that value; without points, as it was."""
    least = torch.full_like(centres, torch.inf).scatter_reduce_(1, label, values, "amin")
    above = (values - least.gather(1, label)) * weights
    total = torch.zeros_like(centres).scatter_add_(1, label, weights.expand_as(values))
    mean = least + torch.zeros_like(centres).scatter_add_(1, label, above) / total
    return torch.where(total > 0, mean, centres)
