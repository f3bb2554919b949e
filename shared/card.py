"""The model card of a pushed run: a README.md in the Hub's form, every word of it from what the run recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


def card(
    repository: str, licence: str, header: Mapping[str, Any], tree: Mapping[str, Any], found: Mapping[str, Any]
) -> str:
    """The card of ``repository`` (owner/name), Markdown with the Hub's YAML metadata on top.

    licence: as the Hub abbreviates it.  header: of the adapter file.  tree: the resolved recipe.  found: what
    ``metrics.json`` holds. What a run did not record is left out.
    """
    method, name = header["method"]["type"], repository.rpartition("/")[2]
    parts = [
        f"---\n{_metadata(repository, licence, header, tree, found)}\n---",
        f"# {name}",
        f"A {method} adapter of {_text(header['backbone']['name'])}, trained and tested with "
        f"omniadapt {_text(header['version'])}.",
        _table(("", ""), _facts(header, tree, found)),
    ]
    if found.get("random_backbone"):
        parts.append("The frozen weights of the backbone were never trained: they are random.")
    parts += ["## Data", _table(("", ""), _data(found.get("data") or {}))]
    if scores := _scores(found):
        best = found.get("best") or {}
        state = (
            f", at epoch {best['epoch']}, the best by {best['monitor']}" if {"epoch", "monitor"} <= set(best) else ""
        )
        parts += ["## Score", f"On the test split{state}:", _table(("metric", "value"), _shown(scores))]
    parts += ["## Load", _loading(repository), "## Versions", _table(("", ""), (found.get("versions") or {}).items())]
    return "\n\n".join(parts) + "\n"


def _metadata(
    repository: str, licence: str, header: Mapping[str, Any], tree: Mapping[str, Any], found: Mapping[str, Any]
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _kebab(tree["task"]["type"])
    kind = str((found.get("data") or {}).get("kind", tree["data"]["type"]))
    results = [
        EvalResult(
            task_type=task, dataset_type=kind, dataset_name=kind, dataset_split="test", metric_type=name,
            metric_value=value,
        )
        for name, value in _scores(found).items()
    ]  # fmt: skip
    return ModelCardData(
        license=licence,
        library_name="omniadapt",
        base_model=base_model(found.get("backbone", "")),
        tags=["omniadapt", "adapter", _kebab(header["method"]["type"]), task],
        model_name=repository.rpartition("/")[2],
        eval_results=results or None,
    ).to_yaml(line_break="\n")


def base_model(backbone: str) -> str | None:
    """The Hub's name of the frozen weights, where the run says that they came from there."""
    found = re.search(r"weights: (?:timm hub|Hub): ([\w.-]+/[\w.-]+)$", backbone)
    return found and found[1]


def _facts(header: Mapping[str, Any], tree: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method, counts = header["method"], found.get("parameters") or {}
    yield "task", tree["task"]["type"]
    yield "backbone", f"{tree['backbone']['type']}: {found.get('backbone', header['backbone']['name'])}"
    yield "fingerprint of its weights", header["backbone"]["fingerprint"]
    yield "method", f"{method['type']}: {_settings(method['arguments'])}"
    if "head" in tree:
        yield "head", f"{tree['head']['type']}: {_settings({k: v for k, v in tree['head'].items() if k != 'type'})}"
    yield "adapted sites", f"{len(header['sites'])}"
    for role in ("trainable", "adapter", "head", "frozen"):
        if role in counts:
            yield f"parameters, {role}", f"{counts[role]:,}"
    if {"steps", "epochs", "seed"} <= set(found):
        yield "training", f"steps {found['steps']:,}, epochs {found['epochs']:,}, seed {found['seed']}"
    if "file_bytes" in found:
        yield "adapter file", f"{found['file_bytes']:,} bytes"


def _data(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What data said of themselves, as far as it is short."""
    for key in ("kind", "classes", "band_names", "window", "vocabulary"):
        if key in described:
            value = described[key]
            if isinstance(value, Mapping):  # of several tasks
                value = [f"{task}: {' / '.join(map(str, names))}" for task, names in value.items()]
            yield key, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    for split, facts in (described.get("splits") or {}).items():
        yield f"{split} split", "; ".join(_counts(facts)) if isinstance(facts, Mapping) else str(facts)


def _counts(facts: Mapping[str, Any]) -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{key}: " + ", ".join(f"{name} {_number(count)}" for name, count in value.items())
        elif isinstance(value, (int, float, str)):
            yield f"{_number(value)} {key}" if isinstance(value, int) else f"{key} {_number(value)}"
        elif isinstance(value, (list, tuple)):
            yield f"{len(value):,} {key}"


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    """The test results that are measures, not counts."""
    return {name: value for name, value in (found.get("test") or {}).items() if isinstance(value, float)}


def _shown(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield from ((name, f"{value:.4g}") for name, value in scores.items())


def _loading(repository: str) -> str:
    return (
        f"```\nomniadapt pull {repository}\n```\n\nor, in Python, with the backbone's weights at hand:\n\n"
        f'```python\nfrom shared import load\n\ntrained = load("hf://{repository}")\n'
        "trained.task.model  # backbone, adapter and head, in eval mode\n```"
    )


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {_text(name)} | {_text(value)} |" for name, value in rows)])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "as by default"


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    """Text that stays in its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|_", "-", name).lower()
