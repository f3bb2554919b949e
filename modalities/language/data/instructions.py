"""Instructions with their responses, as the texts that a language model is tuned on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from modalities.language.data import reading
from modalities.language.data.corpus import shared_out
from modalities.language.data.splits import Loaders
from modalities.language.data.texts import SPLITS, padded
from modalities.language.tokens import Tokens
from shared.errors import RequestError

# The prompt of Stanford Alpaca (Taori et al., 2023), which most instruction sets are published with.
OPENING = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
PAIRED = ", paired with an input that provides further context"


class Pair(NamedTuple):
    """prompt: up to the response, its heading included.  response: what the model shall say.  name: where it stands."""

    prompt: str
    response: str
    name: str


class Row(NamedTuple):
    """A pair as tokens.  scored: which are to be predicted; never the first.  bytes: of the text of those."""

    ids: list[int]
    scored: list[bool]
    bytes: int
    name: str


class Instructions(Loaders):
    """Instructions in the prompt of Alpaca, for ``LanguageModelling``.

    A batch is ``{"tokens": int64 (B, N), "mask" and "scored": bool (B, N), "bytes": int64 (B,), "name": [str]}``,
    padded on the right; scored are the tokens to be predicted, bytes are of their text.

    files: .json (a list) or .jsonl of objects with "instruction", "output" and, where there is one, "input".
    scored: "response" (as CorDA and MoLA train) or "all", the prompt too (as LLM-Adapters does).
    indentation: spaces in front of every line but the first (LLM-Adapters as published: 16).
    validation, test: fractions of the characters, drawn by ``seed``; equal texts stay together.
    tokenizer: as of ``TextFiles``.  max_length: tokens a text is cut at.  batch_size: texts.

    Raises RequestError with file and line or number: no such file, no JSON, an entry without a text under one of its
    keys; where a prompt leaves no room for its response; and where a split has no text.
    """

    def __init__(
        self,
        *,
        files: Sequence[Path],
        scored: Literal["response", "all"] = "response",
        indentation: int = 0,
        validation: float = 0.02,
        test: float = 0.02,
        tokenizer: str = "small_lm",
        max_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
    ):
        if scored not in ("response", "all"):
            raise RequestError(f"scored {scored!r}: use 'response' or 'all'")
        if min(max_length - 1, batch_size) < 1 or min(indentation, seed) < 0:
            what = f"max_length {max_length}, batch_size {batch_size}, indentation {indentation}, seed {seed}"
            raise RequestError(f"{what}: at least 2, 1, 0 and 0")
        pairs = {p.prompt + p.response: p for file in files for p in _pairs(Path(file), indentation)}
        if not pairs:
            raise RequestError("there is no instruction: name files")
        self.scored, self.max_length, self.batch_size, self.seed = scored, max_length, batch_size, seed
        self.tokens = Tokens(tokenizer)
        self.vocabulary = self.tokens.size
        parts = shared_out(list(pairs), validation, test, seed)
        self.rows = {part: [self._row(pairs[text]) for text in parts[part]] for part in SPLITS}

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON."""
        return {
            "kind": type(self).__name__,
            "reading": {"tokenizer": self.tokens.name, "max_length": self.max_length},
            "vocabulary": self.vocabulary,
            "scored": self.scored,
            "seed": self.seed,
            "splits": {part: {"instructions": len(self.rows[part])} for part in SPLITS},
        }

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.rows[part],  # type: ignore[arg-type]
            self.batch_size,
            shuffle=shuffle,
            collate_fn=self._batch,
            generator=order,
        )

    def _batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = padded([row.ids for row in rows], self.tokens.padding)
        longest = batch["tokens"].shape[1]
        return {
            **batch,
            "scored": torch.tensor([[*row.scored, *[False] * (longest - len(row.ids))] for row in rows]),
            "bytes": torch.tensor([row.bytes for row in rows]),
            "name": [row.name for row in rows],
        }

    def _row(self, pair: Pair) -> Row:
        ids, sizes = (row[: self.max_length] for row in self.tokens.document(pair.prompt + pair.response))
        start = 0 if self.scored == "all" else len(pair.prompt.encode())
        begins = accumulate(sizes, initial=0)
        scored = [index > 0 and begin >= start for index, begin in zip(range(len(ids)), begins, strict=False)]
        if not any(scored):
            raise RequestError(f"{pair.name}: its prompt alone fills max_length {self.max_length}")
        return Row(ids, scored, sum(size for size, counts in zip(sizes, scored, strict=True) if counts), pair.name)


def prompted(instruction: str, given: str = "", indentation: int = 0) -> str:
    """The prompt of an instruction, and of an input where there is one, up to the response."""
    parts = [("Instruction", instruction)] + ([("Input", given)] if given else [])
    lines = [OPENING.format(PAIRED if given else ""), ""]
    for title, text in parts:
        lines += [f"### {title}:", *text.split("\n"), ""]
    lines.append("### Response:")
    return ("\n" + " " * indentation).join(lines) + "\n" + " " * indentation


def _pairs(path: Path, indentation: int) -> Iterator[Pair]:
    for name, entry in _entries(path):
        texts = [entry.get(key, "") for key in ("instruction", "input", "output")] if isinstance(entry, dict) else []
        if not texts or not all(isinstance(t, str) for t in texts) or not (texts[0].strip() and texts[2].strip()):
            raise RequestError(f"{name}: wants an object with texts under 'instruction' and 'output', perhaps 'input'")
        yield Pair(prompted(texts[0].strip(), texts[1].strip(), indentation), texts[2].strip(), name)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file lists, with where it stands."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    content = reading.decode(path, "utf-8")
    if path.suffix.lower() not in (".json", *reading.LINES):
        raise RequestError(f"{path}: instructions come as .json or .jsonl")
    lines = path.suffix.lower() in reading.LINES
    try:
        if not lines:
            listed = json.loads(content)
            if not isinstance(listed, list):
                raise RequestError(f"{path}: wants a list of objects")
            yield from ((f"{path.name}[{index}]", entry) for index, entry in enumerate(listed))
            return
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield f"{path.name}:{number}", json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"{path}: no JSON ({error})") from error
