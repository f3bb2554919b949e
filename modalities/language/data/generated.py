"""Generated texts: sentences of a small grammar with a topic each, made from a seed."""

from __future__ import annotations

from modalities.language.data.grammar import FORMS, TOPICS, sentences
from modalities.language.data.splits import stratified
from modalities.language.data.texts import Sample, Texts
from shared.errors import RequestError


class GeneratedText(Texts):
    """Sentences about four topics. Half of their nouns, verbs and adjectives are of the topic and a tenth of another,
    so a sentence of few words may not tell its topic: no model reaches an accuracy of 1.

    count: sentences.  validation, test: fractions of them.  seed: of the sentences, their split and the order.
    The other arguments are those of ``TextFiles``.
    """

    classes = tuple(TOPICS)

    def __init__(
        self,
        *,
        count: int = 600,
        validation: float = 0.2,
        test: float = 0.2,
        per_class: int | None = None,
        tokenizer: str = "small_lm",
        max_length: int = 64,
        batch_size: int = 16,
        seed: int = 0,
    ):
        if count < 1:
            raise RequestError(f"count {count}: at least 1 sentence")
        rows = [self._labelled(*row) for row in sentences(count, seed)]
        made = [Sample(text, label, f"sentence {i}") for i, (text, label) in enumerate(rows)]
        parts = {"train": made}
        for part, share in (("test", test), ("validation", validation)):
            own = parts["train"]
            if not own:
                break
            stay, drawn = stratified([s.text for s in own], [s.label for s in own], share * count / len(own), seed)
            parts["train"], parts[part] = [own[i] for i in stay], [own[i] for i in drawn]
        super().__init__(
            parts, self.classes, tokenizer=tokenizer, max_length=max_length, per_class=per_class,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip

    @staticmethod
    def _labelled(text: str, topic: int, form: int) -> tuple[str, int]:
        return text, topic


class GeneratedForms(GeneratedText):
    """The same sentences by their form, such as "question" and "denial", which a few words tell for sure."""

    classes = tuple(FORMS)

    @staticmethod
    def _labelled(text: str, topic: int, form: int) -> tuple[str, int]:
        return text, form
