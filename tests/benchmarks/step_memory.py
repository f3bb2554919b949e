"""Peak memory of a training step, with and without codes for saved activations.

``python -m tests.benchmarks.step_memory``. Each configuration runs in a process of its own on a random ViT-B/16.
Printed are the bytes saved for backward, and the peak of the process above what it held before the step (forward,
backward, AdamW).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

CONFIGURATIONS = {
    "AdaptFormer": ("AdaptFormer()", "None"),
    "AdaptFormer, 4 bits": ("AdaptFormer()", "Saving()"),
    "AdaptFormer, 4 bits, attention": ("AdaptFormer()", "Saving(attention=True)"),
    "LoRA": ("LoRA()", "None"),
    "LoRA, 4 bits": ("LoRA()", "Saving()"),
    "LoRA, 4 bits, attention": ("LoRA()", "Saving(attention=True)"),
    "S2A, exact": ("S2A(bits=None)", "None"),
    "S2A, 4 bits": ("S2A(attention=False)", "None"),
    "S2A, 4 bits, attention": ("S2A()", "None"),
}


def measure(method: str, saving: str, batch: int, depth: int) -> dict[str, float]:
    """One step; sizes in MiB."""
    import torch

    from modalities.images.backbones import TimmViT
    from shared import methods
    from shared.adapted import adapt
    from shared.memory import Saving, saved_bytes

    torch.manual_seed(0)
    name, small = "vit_base_patch16_224", {"depth": depth}
    backbone = TimmViT(3, name=name, weights="random", image_size=224, depths=[depth - 1], model_args=small)
    model = adapt(backbone, eval(method, vars(methods))).train()  # our own source
    model.saving = eval(saving, {"Saving": Saving})
    optimiser = torch.optim.AdamW(model.trainable().values())
    image = torch.randn(batch, 3, 224, 224)
    with saved_bytes(model) as small:  # one image: tables are made and code is warm before the step is measured
        output = model(image[:1]).summary
    output.sum().backward()
    model.zero_grad()
    before = _peak()
    model(image).summary.square().mean().backward()
    optimiser.step()
    return {"saved": sum(small.values()) * batch / 2**20, "peak": _peak() - before, "process": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS))
    parser.add_argument("--here", nargs=2, metavar=("METHOD", "SAVING"), help="measure one in this process")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(*given.here, given.batch, given.depth)))
        return
    print(f"ViT-B/16, depth {given.depth}, batch {given.batch}, MiB\n{'':32}{'saved':>8}{'peak':>8}{'process':>9}")
    for name in given.only:
        sizes = ["--batch", str(given.batch), "--depth", str(given.depth)]
        command = [sys.executable, "-m", "tests.benchmarks.step_memory", *sizes, "--here", *CONFIGURATIONS[name]]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{name:32}{found['saved']:8.0f}{found['peak']:8.0f}{found['process']:9.0f}", flush=True)


if __name__ == "__main__":
    main()
