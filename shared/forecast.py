"""``omniadapt plan``: what a recipe's training will cost on this machine, and what other settings would."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.recipe import Recipe

NEAR = 0.95  # of full fine-tuning's time: adapters that need more of it are not faster
WAITING = 0.05  # of the time of training
FEW = 3  # the last part of the blocks that advice names: a third of them


def forecast(recipe: Recipe) -> dict[str, Any]:
    """Train a few batches on a copy, count one, and say what follows; nothing is kept and no directory written.

    Returns the fields of ``plan.Plan`` and ``counted.Counted`` by name, ``batches`` of an epoch, ``workers`` that load
    them, and ``advice``, sentences. Raises RequestError for what cannot be trained, and where several processes would.
    """
    from shared import run
    from shared.counted import counted
    from shared.plan import plan, trial
    from shared.training.engine import available

    engine = recipe.build("trainer")
    if engine.processes > 1:
        raise RequestError("costs are predicted for one process: leave out trainer.devices")
    available(engine)
    data = recipe.build("data")
    task = run.task_of(recipe, data)
    run.seed(recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = plan(task, data, engine, Path(folder))._asdict()
    run.seed(recipe.seed)
    copied = trial(task, engine)
    loader = data.train()
    copied.model.prepare(loader, copied.loss)
    batch = next(iter(loader))
    device = run.device() if engine.device == "auto" else engine.device
    copied, batch = copied.to(device), {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
    found |= counted(copied, batch, engine)._asdict() | {"batches": len(loader), "workers": loader.num_workers}
    return found | {"advice": list(advice(found))}


def advice(found: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers say; each sentence is computed from them."""
    step, (blocks, adapted) = found["step_seconds"], found["blocks"]
    if found["trained_backbone"]:
        yield f"The backbone trains; without gradients of its weights a step would take {_ms(scaled(found, 'limit'))}."
    else:
        limit, full = scaled(found, "limit"), scaled(found, "full")
        yield f"A step takes {step / limit:.2f} of its limit ({_ms(limit)}: forward, backward to the lowest adapter)."
        if step / full > NEAR:
            yield (
                f"It is not faster than full fine-tuning, {_ms(full)} a step: it takes {step / full:.2f} of that. What "
                "it saves is the optimiser's memory and the size of the file."
            )
        else:
            yield f"It takes {step / full:.2f} of a step of full fine-tuning, {_ms(full)}."
        if not adapted:
            yield f"Nothing in the backbone trains: its output could be computed once, {_ms(scaled(found, 'forward'))}."
        if adapted == blocks and blocks >= FEW:
            last, forward = blocks // FEW, min(scaled(found, "forward"), step)
            alone = forward + (step - forward) * last / blocks
            yield (
                f"In the last {last} of {blocks} blocks alone it would take {_ms(alone)}, and "
                f"{_ms(step * last / blocks)} with what goes into them computed once and kept."
            )
    if found["wait_share"] > WAITING and not found["workers"]:
        yield f"Training waits for data {found['wait_share']:.0%} of its time: data.workers=1 would load meanwhile."


def scaled(found: Mapping[str, Any], what: str) -> float:
    """Seconds of "forward", "limit" or "full" by their ratio to the step's."""
    return found[f"{what}_seconds"] / found["own_seconds"] * found["step_seconds"]


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The prediction as a table: what, and how much."""
    from shared.report.run_page import milliseconds, seconds, size

    return [
        ("trainable parameters", f"{found['trainable']:,}"),
        ("time of a step", milliseconds(found["step_seconds"])),
        ("time of an epoch", seconds(found["epoch_seconds"])),
        ("time of training", seconds(found["train_seconds"])),
        ("waiting for data", f"{found['wait_share']:.1%}"),
        ("peak memory", size(found["peak_memory_bytes"])),
        ("kept for backward", size(found["saved_bytes"])),
        ("forward", f"{found['forward_flops'] / 1e9:,.2f} GFLOP"),
        ("backward", f"{found['backward_flops'] / 1e9:,.2f} GFLOP"),
        ("limit of a step", milliseconds(scaled(found, "limit"))),
        ("step of full fine-tuning", milliseconds(scaled(found, "full"))),
    ]


def _ms(value: float) -> str:
    from shared.report.run_page import milliseconds

    return milliseconds(value)
