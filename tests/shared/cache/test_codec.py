"""Records of tokens: exact ones bit for bit, the others within their rounding."""

from __future__ import annotations

import pytest
import torch

from shared.cache.codec import decode, encode
from shared.errors import WorkError

CPU = torch.device("cpu")


def outputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(3, 2, 5, 128), with one channel far above the others, as transformers have them."""
    made = torch.randn(3, 2, 5, 128, dtype=torch.float64)
    made[..., 7] *= 300
    made[1, 1, 2] = 0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_records_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = outputs(dtype)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    back = decode(encode(x, "exact"), "exact", CPU)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [128, 24, 7])
def test_the_others_are_within_their_rounding(dtype: torch.dtype, channels: int) -> None:
    x = outputs(dtype)[..., :channels]
    half = decode(encode(x, "float16"), "float16", CPU)
    assert half.dtype == dtype
    torch.testing.assert_close(half, x, rtol=2**-11, atol=1e-7)
    coded = decode(encode(x, "int8"), "int8", CPU)
    group = {128: 64, 24: 8, 7: 1}[channels]
    bound = x.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True) / 254 * 1.0001
    assert coded.dtype == dtype
    assert bool(((coded - x).unflatten(-1, (-1, group)).abs() <= bound).all())
    assert not coded[1, 1, 2].any(), "zero stays zero"


def test_a_record_is_as_large_as_its_numbers() -> None:
    x = outputs()
    numbers = 2 * 5 * 128
    assert [len(encode(x, p)[0]) for p in ("exact", "float16", "int8")] == [
        16 + 4 * numbers, 16 + 2 * numbers, 16 + numbers + 4 * numbers // 64,
    ]  # fmt: skip


def test_records_do_not_depend_on_their_batch() -> None:
    x = outputs()
    for precision in ("exact", "float16", "int8"):
        assert encode(x, precision)[2] == encode(x[2:], precision)[0]


def test_what_float16_cannot_hold_is_an_error() -> None:
    x = outputs() * 1e4
    with pytest.raises(WorkError, match="float16: an activation of .* is above its 65504; use int8 or exact"):
        encode(x, "float16")
    assert decode(encode(x, "int8"), "int8", CPU).isfinite().all()
    x[0, 0, 0, 0] = float("nan")  # that was not finite before: the loss will tell
    assert decode(encode(x / 1e4, "float16"), "float16", CPU)[0, 0, 0, 0].isnan()
