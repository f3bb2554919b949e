"""Running text for language modelling: files cut into windows of tokens, from folders or generated."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modalities.language import tokens as t
from modalities.language.data import reading
from modalities.language.data.files import TextFiles
from modalities.language.data.grammar import sentences
from modalities.language.data.splits import Loaders
from modalities.language.data.texts import SPLITS, padded
from shared.errors import RequestError


class Corpus(Loaders):
    """What a language model is fed: ``train()``, ``validation()``, ``test()`` loaders of windows of running text.

    The documents of a split stand one after another, each between the begin and end tokens of the tokenizer. A window
    holds ``length`` + 1 tokens, the first of which the window before had last, so that each is predicted once. A batch
    is ``{"tokens": int64 (B, N), "mask": bool (B, N), "bytes": int64 (B,), "name": [str]}``; bytes are of the text that
    is predicted.

    documents: texts of each split.  The other arguments are those of ``TextCorpus``.
    """

    def __init__(
        self, documents: Mapping[str, Sequence[str]], *, tokenizer: str | None, vocabulary: int, length: int,
        batch_size: int, seed: int,
    ):  # fmt: skip
        if length < 1 or batch_size < 1 or seed < 0:
            raise RequestError(f"length {length}, batch_size {batch_size} and seed {seed}: at least 1, 1 and 0")
        self.length, self.batch_size, self.seed, self.documents = length, batch_size, seed, documents
        self.max_length = length + 1
        self.tokens = t.train(documents["train"], vocabulary) if tokenizer is None else t.Tokens(tokenizer)
        self.vocabulary = self.tokens.size
        self.streams = {part: self._stream(part) for part in SPLITS}

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``tokenizer_sha256`` tells the tokenizer from any other."""
        digest = hashlib.sha256(self.tokens.tokenizer.to_str().encode()).hexdigest()
        return {
            "kind": type(self).__name__,
            "reading": {"tokenizer": self.tokens.name, "length": self.length},
            "tokenizer_sha256": digest,
            "vocabulary": self.vocabulary,
            "seed": self.seed,
            "splits": {
                part: {"documents": len(self.documents[part]), "tokens": len(ids), "bytes": int(sizes.sum())}
                for part, (ids, sizes) in self.streams.items()
            },
        }

    def _stream(self, part: str) -> tuple[Tensor, Tensor]:
        """All tokens of a split and the bytes of each."""
        pairs = [self.tokens.document(text) for text in self.documents[part]]
        ids, sizes = (torch.tensor([value for pair in pairs for value in pair[i]], dtype=torch.long) for i in (0, 1))
        if len(ids) < 2:
            raise RequestError(f"the {part} split has {len(ids)} tokens: there is nothing to predict")
        return ids, sizes

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        ids, sizes = self.streams[part]
        starts = range(0, len(ids) - 1, self.length)

        def gather(chosen: list[int]) -> dict[str, Any]:
            ends = [min(start + self.length + 1, len(ids)) for start in chosen]
            rows = [ids[start:end].tolist() for start, end in zip(chosen, ends, strict=True)]
            count = [int(sizes[start + 1 : end].sum()) for start, end in zip(chosen, ends, strict=True)]
            return {
                **padded(rows, self.tokens.padding),
                "bytes": torch.tensor(count),
                "name": [f"{part} token {start}" for start in chosen],
            }

        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(starts, self.batch_size, shuffle=shuffle, collate_fn=gather, generator=order)  # type: ignore[arg-type]


class TextCorpus(Corpus):
    """Documents of plain text, split by the seed.

    files: .txt files, and folders searched with their subfolders for them.  separator: what stands between two
        documents of a file (an empty line); None: a file is one document.
    labelled: data sets as the arguments of ``TextFiles``: their training and validation texts are documents too,
        without their labels. A text of one of their test splits is left out wherever it stands.
    validation, test: fractions of the characters.
    encoding: of the files.
    tokenizer: as of ``TextFiles``; None: a byte-level BPE of ``vocabulary`` tokens, trained on the training documents.
    length: tokens that a window predicts.  batch_size: windows.  seed: of split and order.

    Raises RequestError for a file that is missing, empty or no text in its encoding, and where a split has no text.
    """

    def __init__(
        self,
        *,
        files: Sequence[Path] = (),
        separator: str | None = "\n\n",
        labelled: Sequence[dict[str, Any]] = (),
        validation: float = 0.05,
        test: float = 0.05,
        encoding: str = "utf-8",
        tokenizer: str | None = None,
        vocabulary: int = 4096,
        length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
    ):
        texts = [text for path in _found(files) for text in _documents(path, separator, encoding)]
        unwanted: set[str] = set()
        for arguments in labelled:
            samples = _data(arguments).samples
            texts += [sample.text for part in ("train", "validation") for sample in samples[part]]
            unwanted |= {sample.text for sample in samples["test"]}
        if not texts:
            raise RequestError("there is no text: name files, or labelled data")
        kept = [text for text in texts if text not in unwanted]
        self.left_out = len(texts) - len(kept)
        super().__init__(
            shared_out(kept, validation, test, seed), tokenizer=tokenizer, vocabulary=vocabulary, length=length,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"left_out": self.left_out}


class GeneratedCorpus(Corpus):
    """Running text of generated sentences, ten to a document.

    count: sentences.  The other arguments are those of ``TextCorpus``.
    """

    def __init__(
        self,
        *,
        count: int = 600,
        validation: float = 0.1,
        test: float = 0.1,
        tokenizer: str | None = "small_lm",
        vocabulary: int = 4096,
        length: int = 32,
        batch_size: int = 8,
        seed: int = 0,
    ):
        made = [text for text, *_ in sentences(count, seed)]
        texts = ["\n".join(made[i : i + 10]) for i in range(0, len(made), 10)]
        super().__init__(
            shared_out(texts, validation, test, seed), tokenizer=tokenizer, vocabulary=vocabulary, length=length,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip


def shared_out(texts: Sequence[str], validation: float, test: float, seed: int) -> dict[str, list[str]]:
    """Documents by split, drawn by the seed until each fraction of the characters is reached; equal ones together."""
    if min(validation, test) <= 0 or validation + test >= 1:
        raise RequestError(f"validation {validation} and test {test}: fractions above 0, together below 1")
    distinct = sorted(set(texts))
    random.Random(seed).shuffle(distinct)
    total, home = sum(map(len, texts)), dict[str, str]()
    parts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for text in distinct:
        short = [p for p, share in (("test", test), ("validation", validation)) if parts[p] < share * total]
        home[text] = short[0] if short else "train"
        parts[home[text]] += len(text)
    found = {part: [text for text in texts if home[text] == part] for part in SPLITS}
    if empty := [part for part, own in found.items() if not own]:
        raise RequestError(f"the {empty[0]} split has no text: {len(distinct)} documents in all are too few")
    return found


def _found(files: Sequence[Path]) -> list[Path]:
    """The files, and those of the folders."""
    found: list[Path] = []
    for path in map(Path, files):
        inside = sorted(p for p in path.rglob("*.txt") if p.is_file()) if path.is_dir() else [path]
        if not inside:
            raise RequestError(f"{path}: the folder holds no .txt file")
        found += inside
    return found


def _data(arguments: dict[str, Any]) -> TextFiles:
    try:
        return TextFiles(**{"tokenizer": "bytes", **arguments})
    except TypeError as error:
        raise RequestError(f"labelled: {arguments} are not the arguments of TextFiles ({error})") from error


def _documents(path: Path, separator: str | None, encoding: str) -> list[str]:
    if not path.is_file():
        raise RequestError(f"{path}: no such file or folder")
    content = reading.decode(path, encoding)
    if "\0" in content:
        raise RequestError(f"{path}: a zero byte; this is no text file")
    texts = content.split(separator) if separator else [content]
    if not (kept := [text.strip() for text in texts if text.strip()]):
        raise RequestError(f"{path}: it holds no text")
    return kept
