"""One torch thread and one seed for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
MATERIALS = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def materials() -> Path:
    """The folder of golden cases and real data beside the project; tests that need it skip where it is absent."""
    if not (MATERIALS / "golden").is_dir():
        pytest.skip("the golden cases and real data are not beside the project")
    return MATERIALS
