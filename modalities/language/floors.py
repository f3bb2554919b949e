"""What counting reaches on a corpus: unigram and bigram models of its tokens, the floors of a language model.

python -m modalities.language.floors RECIPE [key=value ...]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.errors import exit_status

SHARES = torch.linspace(0.05, 0.95, 19).tolist()


def unigram(train: Tensor, size: int) -> Tensor:
    """Probabilities (size,) of tokens (N,), each counted once more than it occurs (Laplace)."""
    return (train.bincount(minlength=size) + 1.0) / (len(train) + size)


def bigram(train: Tensor, validation: Tensor, test: Tensor, size: int) -> tuple[float, float]:
    """The loss of ``test`` in nats a token under a mixture of bigram and unigram frequencies (Jelinek & Mercer, 1980),
    and the bigram's share in it, the best on ``validation``."""
    alone, before = unigram(train, size), train[:-1].bincount(minlength=size)
    pairs, counts = (train[:-1] * size + train[1:]).unique(return_counts=True)

    def loss(tokens: Tensor, share: float) -> float:
        wanted = tokens[:-1] * size + tokens[1:]
        place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
        together = torch.where(pairs[place] == wanted, counts[place], 0) / before[tokens[:-1]].clamp(min=1)
        return -(share * together + (1 - share) * alone[tokens[1:]]).log().mean().item()

    best = min(SHARES, key=lambda share: loss(validation, share))
    return loss(test, best), best


def floors(data: Any) -> dict[str, dict[str, float]]:
    """``loss``, ``perplexity`` and ``bits_per_byte`` of both on the test split of a ``Corpus``."""
    streams = {part: ids for part, (ids, _) in data.streams.items()}
    size, (test, bytes_) = data.vocabulary, data.streams["test"]
    alone = -unigram(streams["train"], size)[test[1:]].log().mean().item()
    both, _ = bigram(streams["train"], streams["validation"], test, size)
    total = (len(test) - 1) / math.log(2) / int(bytes_[1:].sum())
    return {
        name: {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss * total}
        for name, loss in (("unigram", alone), ("bigram", both))
    }


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    from shared import recipe

    parser = argparse.ArgumentParser(prog="python -m modalities.language.floors", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", help="a recipe of language modelling")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    given = parser.parse_args(arguments)
    found = floors(recipe.load(given.recipe, given.overrides).build("data"))
    for name, values in found.items():
        print(f"{name:10s}" + "".join(f"{key} {value:9.3f}   " for key, value in values.items()))


if __name__ == "__main__":
    sys.exit(main())
