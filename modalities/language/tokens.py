"""Tokenizers of the library of that name: the packaged one, plain bytes, a file or one of the Hub; and training one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shared import weights as w
from shared.errors import RequestError

PACKAGED = Path(__file__).parent / "weights" / "small_lm_tokenizer.json"
PADDING, BEGIN, END, MASK = SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
PADDINGS = (PADDING, "[PAD]", "<|endoftext|>")  # names of the padding token in published tokenizers


class Tokens:
    """A tokenizer with what a data set needs of it.

    name: "small_lm" (in the package), "bytes" (every byte a token), a tokenizer.json, a folder that holds one, or a
    repository of the Hub.  size: number of tokens.  padding: index of the padding token, 0 where there is none.

    Raises RequestError where there is no such tokenizer or its file is damaged.
    """

    def __init__(self, name: str, tokenizer: Any = None):
        self.name, self.tokenizer = name, _found(name) if tokenizer is None else tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.size: int = self.tokenizer.get_vocab_size()
        named = (self.tokenizer.token_to_id(token) for token in PADDINGS)
        self.padding: int = next((index for index in named if index is not None), 0)

    def encode(self, texts: Iterable[str], longest: int | None = None) -> list[list[int]]:
        """Indices of each text with the begin and end tokens that the tokenizer gives, at most ``longest``."""
        self.tokenizer.no_truncation()
        if longest is not None:
            if longest <= (special := self.tokenizer.num_special_tokens_to_add(False)):
                raise RequestError(
                    f"max_length {longest}: the tokenizer {self.name} adds {special} tokens to every text"
                )
            self.tokenizer.enable_truncation(longest)
        return [each.ids for each in self.tokenizer.encode_batch(list(texts))]

    def document(self, text: str) -> tuple[list[int], list[int]]:
        """Indices of a text between begin and end, and for each the bytes it adds, which sum up to the text's."""
        self.tokenizer.no_truncation()
        found = self.tokenizer.encode(text)
        sizes, reached = [], 0
        for (_, end), special in zip(found.offsets, found.special_tokens_mask, strict=True):
            stop = reached if special else max(reached, end)
            sizes.append(len(text[reached:stop].encode()))
            reached = stop
        return found.ids, sizes

    def decode(self, indices: list[int]) -> str:
        """The text of these tokens, without special ones."""
        return self.tokenizer.decode(indices)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        from shared.store import write_atomically

        write_atomically(path, self.tokenizer.to_str(pretty=False).encode())


def train(texts: Iterable[str], size: int) -> Tokens:
    """A byte-level BPE (Sennrich et al., 2016; Radford et al. 2019) of ``size`` tokens, the same for the same texts."""
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(SPECIAL):
        raise RequestError(f"vocabulary {size}: a byte-level one has at least {len(alphabet) + len(SPECIAL)} tokens")
    tokenizer = _blank()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_each(texts), trainer)
    return Tokens(f"trained, {tokenizer.get_vocab_size()} tokens", _bounded(tokenizer))


def _each(texts: Iterable[str]) -> Iterator[str]:
    yield from texts


def _blank(vocabulary: dict[str, int] | None = None) -> Any:
    """A byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]) if vocabulary else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _bounded(tokenizer: Any) -> Any:
    """With a begin and an end token around every text."""
    from tokenizers import processors

    ends = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B {END}", special_tokens=ends
    )
    return tokenizer


def _found(name: str) -> Any:
    if name == "bytes":
        from tokenizers import pre_tokenizers

        tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = _blank({token: index for index, token in enumerate(tokens)})
        tokenizer.add_special_tokens(list(SPECIAL))
        return _bounded(tokenizer)
    return _read(PACKAGED if name == "small_lm" else _file(name))


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    if name.count("/") == 1 and not path.suffix:
        return w.fetch(name, name, ("tokenizer.json",))
    raise RequestError(f"tokenizer {name}: no such file; use 'small_lm', 'bytes', a tokenizer.json or a Hub repository")


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise RequestError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
