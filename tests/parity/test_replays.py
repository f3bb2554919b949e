"""Every replay reproduces its golden case; the harness can fail, and says why it cannot replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.__main__ import LIMIT, difference, main, slug_of

REPLAYS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("_", "test_")))


@pytest.mark.parametrize("slug", REPLAYS)
def test_the_published_numbers_come_out(slug, materials) -> None:
    assert difference(materials / "golden" / f"{slug}.npz") <= LIMIT


def test_a_wrong_number_fails(materials, tmp_path, capsys) -> None:
    with np.load(materials / "golden" / "cloud_adapter.npz", allow_pickle=False) as archive:
        case = dict(archive)
    case["out.feats_after_3"][0, 5, 2] += 1e-3
    np.savez(tmp_path / "cloud_adapter_wrong.npz", **case)
    assert main([str(tmp_path / "cloud_adapter_wrong.npz")]) == 1
    assert capsys.readouterr().out.startswith("cloud_adapter 0.001")
    case["out.feats_after_3"][0, 5, 2] = np.nan
    np.savez(tmp_path / "cloud_adapter_nan.npz", **case)
    assert main([str(tmp_path / "cloud_adapter_nan.npz")]) == 1


def test_what_cannot_be_replayed_says_why(tmp_path, capsys) -> None:
    (tmp_path / "cloud_adapter.npz").write_bytes(b"not a zip")
    assert main([str(tmp_path / "cloud_adapter.npz")]) == 2
    assert "not a golden case" in capsys.readouterr().err
    assert main([str(tmp_path / "unheard_of.npz")]) == 2
    assert "no replay for this system" in capsys.readouterr().err
    assert slug_of(Path("cloud_adapter_seed9_large.npz")) == "cloud_adapter"
