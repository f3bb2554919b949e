"""What importing costs: ``import shared`` loads torch and no other heavy library, ``omniadapt --help`` not even torch.

Each check runs in a fresh interpreter, and one shows that a check can fail.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "timm", "open_clip", "segment_anything", "diffusers", "transformers", "tokenizers", "lightning", "torchmetrics",
    "torchvision", "rasterio", "matplotlib", "PIL", "scipy", "pydantic", "yaml", "rich",
)  # fmt: skip
EVERYTHING_OF_SHARED = "import shared\nfor name in shared.__all__: getattr(shared, name)"
HELP = "import shared.cli\ntry: shared.cli.main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0"


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the libraries ``names`` a fresh interpreter has loaded after ``code``."""
    report = f"\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules], sep=',', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stderr.strip().split(",") if name]


def test_shared_loads_torch_and_nothing_else_that_is_heavy():
    assert loaded_by(EVERYTHING_OF_SHARED, ("torch", *HEAVY)) == ["torch"]


def test_help_does_not_even_load_torch():
    assert loaded_by(HELP, ("torch", "numpy", *HEAVY)) == []


@pytest.mark.parametrize("command", ["list methods", "show LoRA", "list recipes"])
def test_what_only_reads_source_does_not_load_torch(command):
    code = f"import shared.cli\nassert shared.cli.main({command.split()!r}) == 0"
    assert loaded_by(code, ("torch", *HEAVY)) == []


def test_the_check_can_fail():
    assert loaded_by(EVERYTHING_OF_SHARED + "\nimport yaml", ("torch", *HEAVY)) == ["torch", "yaml"]
    with pytest.raises(AssertionError, match="boom"):
        loaded_by("raise RuntimeError('boom')", HEAVY)
