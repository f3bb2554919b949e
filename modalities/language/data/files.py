"""Files of labelled texts: CSV, TSV, JSON lines, or lines of a label and a text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from modalities.language.data import reading
from modalities.language.data.splits import stratified
from modalities.language.data.texts import Sample, Texts
from shared.errors import RequestError


class TextFiles(Texts):
    """Texts with a class each, read from files.

    A file is .csv or .tsv with a header, .jsonl with an object a line, or of any other suffix with a label, a space and
    a text in every line (as TREC, SST-2 and Subj are passed around).

    train: the file to train on.  validation, test: files, or fractions of ``train`` drawn by ``split_seed``, of every
        class alike; equal texts stay together. Drawn splits do not depend on ``seed``.
    classes: labels as the files spell them, in the order of the index; those of ``train``, sorted, if not given.
    class_names: what reports call them.
    text, label: names of the columns or keys.  encoding: of the files ("latin-1").
    per_class: few-shot: train on so many texts of each class, drawn by ``seed``; all if not given.
    tokenizer: "small_lm" (in the package), "bytes", a tokenizer.json, a folder that holds one, or a repository of the
        Hub.  max_length: tokens of a text, those that begin and end it included; what is longer is cut, and counted.
    batch_size: texts.  seed: of the order and ``per_class``.

    Raises RequestError with file and line for what ``reading.read`` refuses, one class only, a class without a text to
    train on, and a label that is none of the classes.
    """

    def __init__(
        self,
        *,
        train: Path,
        validation: float | Path = 0.1,
        test: float | Path = 0.2,
        classes: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        text: str = "text",
        label: str = "label",
        encoding: str = "utf-8",
        per_class: int | None = None,
        tokenizer: str = "small_lm",
        max_length: int = 128,
        batch_size: int = 32,
        split_seed: int = 0,
        seed: int = 0,
    ):
        def read(path: Path) -> list[reading.Row]:
            return reading.read(Path(path), text=text, label=label, encoding=encoding)

        rows = {"train": read(train)}
        known = sorted({row.label for row in rows["train"]}) if classes is None else [str(c) for c in classes]
        if len(known) < 2:
            raise RequestError(f"{train}: every label is {known[0]!r}; a classifier needs two classes")
        if class_names is not None and len(class_names) != len(known):
            raise RequestError(f"class_names: {len(class_names)} names for the {len(known)} labels {', '.join(known)}")
        whole = len(rows["train"])
        for part, wanted in (("test", test), ("validation", validation)):
            if isinstance(wanted, (int, float)):
                own = rows["train"]
                share = wanted * whole / len(own)
                stay, drawn = stratified([r.text for r in own], [r.label for r in own], share, split_seed)
                rows["train"], rows[part] = [own[i] for i in stay], [own[i] for i in drawn]
            else:
                rows[part] = read(wanted)
        super().__init__(
            {part: [_sample(row, known) for row in own] for part, own in rows.items()},
            known if class_names is None else class_names,
            tokenizer=tokenizer,
            max_length=max_length,
            per_class=per_class,
            batch_size=batch_size,
            seed=seed,
        )


def _sample(row: reading.Row, known: list[str]) -> Sample:
    if row.label not in known:
        near = difflib.get_close_matches(row.label, known, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise RequestError(f"{row.name}: label {row.label!r} is none of the classes {', '.join(known)}{hint}")
    return Sample(row.text, known.index(row.label), row.name)
