"""Adapters from other libraries' files into an adapted model, and from it into such files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import catalog, weights
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.interop import adapterhub, diffusers, kohya, peft
from shared.method import Method
from shared.store import read_header, write_atomically

READERS = {"peft": peft.read, "kohya": kohya.read, "diffusers": diffusers.read, "adapterhub": adapterhub.read}
WRITERS = {"peft": peft.write, "kohya": kohya.write, "diffusers": diffusers.write, "adapterhub": adapterhub.write}


def import_adapter(
    model: Adapted,
    path: str | os.PathLike,
    *,
    name: str = "default",
    format: str | None = None,
    skip: Sequence[str] = (),
    example: Sequence[Any] | None = None,
    other_backbone: bool = False,
) -> None:
    """Add the adapter that a file or folder holds to ``model`` under ``name``, and make it the active one.

    Dropout, which acts in training alone, is left out, and so is a prediction head in files of its own (AdapterHub's);
    one among the adapter's tensors is an error unless ``skip`` names it.
    format: "peft", "kohya" (LyCORIS too), "diffusers", "adapterhub" or "omniadapt" (a file of ours, whose method this
    attaches), None for what its content says.
    skip: words of tensors' names, between dots, or beginnings of them, to leave out ("classifier", "lora_te").
    example: inputs for the proof of effect, where the backbone brings none.
    other_backbone: whether a file of ours may be for other weights.

    Raises RequestError in one line where the file is damaged, empty or another's, where a setting changes the
    computation in a way that is not read, and where a name or a shape does not fit; the model is unchanged then.
    """
    path = Path(path)
    format = recognised(path) if format is None else format
    if format == "omniadapt":
        method, state = _ours(path), None
    elif format in READERS:
        method, state = READERS[format](path, model.backbone, tuple(skip))
    else:
        raise RequestError(f"format {format!r}: use one of {', '.join((*READERS, 'omniadapt'))}")
    before = model.state.active
    try:
        model.add(method, name=name, example=example)
    except (RequestError, WorkError) as error:
        raise type(error)(f"{path}: {error}") from error
    try:
        if state is None:
            model.load(path, other_backbone=other_backbone)
        else:
            _fill(model.bank[name], state, str(path))
    except RequestError:
        model.remove(name)
        model.state.active = before
        raise
    model.prepared.add(name)


def _ours(path: Path) -> Method:
    """The method that a file of ours names, with its arguments."""
    said = read_header(path)["method"]
    kind = catalog.find(said["type"], "method").load()
    try:
        return kind(**said["arguments"])
    except TypeError as error:
        raise RequestError(f"{path}: {said['type']} does not take its arguments ({error})") from error


def _fill(bank: Any, state: dict[str, Any], source: str) -> None:
    """Every tensor of the adapter from ``state``; all or none."""
    mine = bank.state_dict()
    wrong = sorted(mine.keys() ^ state.keys()) or [n for n, t in mine.items() if t.shape != state[n].shape]
    if wrong:
        raise RequestError(f"{source}: {len(state)} tensors for {len(mine)} of its adapter; {wrong[0]} differs")
    bank.load_state_dict(state)


def recognised(path: Path) -> str:
    """The format of a file or folder by what it holds. Raises RequestError where it is none of those read."""
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            config = peft.read_config(path)
            if "peft_type" in config:
                return "peft"
            if "config" in config:
                return "adapterhub"
            raise RequestError(f"{path / peft.CONFIG}: neither peft's (no peft_type) nor AdapterHub's (no config)")
        if (path / diffusers.FILE).is_file():
            return "diffusers"
        raise RequestError(f"{path}: no adapter known here: it holds neither {peft.CONFIG} nor {diffusers.FILE}")
    if path.name in peft.WEIGHTS or path.name in adapterhub.FILES[:1]:
        raise RequestError(f"{path}: give its folder, which holds {peft.CONFIG} too")
    names = list(weights.read(path))
    if kohya.is_kohya(names):
        return "kohya"
    if all(name.startswith("base_model.") for name in names):
        raise RequestError(f"{path}: a file of peft's: give its folder, which holds {peft.CONFIG} too")
    if diffusers.is_diffusers(names):
        return "diffusers"
    if all(name.startswith(("adapter.", "head.")) for name in names):
        read_header(path)
        return "omniadapt"
    raise RequestError(f"{path}: no adapter format known here has names such as {names[0]!r}")


def export_adapter(model: Adapted, folder: str | os.PathLike, *, format: str, prefix: str | None = None) -> list[Path]:
    """Write the active adapters into ``folder`` as another library reads them, and give the files.

    Several adapters, and those of rows of a fused projection, become one change of added rank. A head stays behind.
    format: "peft" (``adapter_config.json``, ``adapter_model.safetensors``), "kohya" (``lora.safetensors``),
    "diffusers" (``pytorch_lora_weights.safetensors``) or, for a ``BertBottleneck``, "adapterhub"
    (``adapter_config.json``, ``pytorch_adapter.bin``).
    prefix: what stands before the layers' names. None: for peft that of the library's model with its head, where the
    backbone has one ("model." of a LLaMA with ``lm_head``); for kohya "lora_unet_", "lora_te_" or, for any other
    model, "lycoris_"; for diffusers "unet."; for adapterhub none.

    Raises RequestError where an adapter is none the format can hold, nothing is active, or a file is there already;
    nothing is written then.
    """
    if format not in WRITERS:
        raise RequestError(f"format {format!r}: use one of {', '.join(WRITERS)}")
    files = WRITERS[format](model, prefix)
    paths = [Path(folder) / name for name in files]
    if there := [path for path in paths if path.exists()]:
        raise RequestError(f"{there[0]}: it is there already; name another folder")
    for path, data in zip(paths, files.values(), strict=True):
        write_atomically(path, data)
    return paths
