"""A small grammar: sentences whose topic shows in some of their words, and in none for sure."""

from __future__ import annotations

import random
from collections.abc import Sequence

TOPICS: dict[str, dict[str, Sequence[str]]] = {
    "weather": {
        "noun": ("storm", "cloud", "rain", "wind", "frost", "sun", "fog", "forecast"),
        "verb": ("soaks", "covers", "chills", "darkens", "dries"),
        "adjective": ("cold", "wet", "grey", "windy", "humid"),
    },
    "kitchen": {
        "noun": ("soup", "oven", "knife", "bread", "cook", "pan", "onion", "recipe"),
        "verb": ("boils", "slices", "stirs", "bakes", "seasons"),
        "adjective": ("salty", "sweet", "roasted", "fresh", "crisp"),
    },
    "harbour": {
        "noun": ("boat", "sailor", "crane", "anchor", "net", "pier", "captain", "cargo"),
        "verb": ("loads", "steers", "tows", "moors", "hauls"),
        "adjective": ("rusty", "heavy", "seaworthy", "salted", "wooden"),
    },
    "school": {
        "noun": ("teacher", "pupil", "lesson", "book", "exam", "class", "desk", "essay"),
        "verb": ("explains", "marks", "reads", "repeats", "learns"),
        "adjective": ("clever", "written", "difficult", "early", "patient"),
    },
}
COMMON: dict[str, Sequence[str]] = {
    "noun": ("man", "woman", "house", "day", "thing", "friend", "street", "letter"),
    "verb": ("sees", "brings", "needs", "finds", "leaves"),
    "adjective": ("old", "new", "small", "quiet", "good"),
}
FORMS = {
    "statement": "the {adjective} {noun} {verb} the {noun} .",
    "clause": "a {noun} {verb} every {noun} before the {adjective} {noun} {verb} it .",
    "question": "why does the {noun} stay {adjective} ?",
    "past": "yesterday the {noun} and the {noun} were {adjective} .",
    "denial": "nobody says that the {adjective} {noun} {verb} a {noun} .",
}
OWN, OTHER = 0.5, 0.1  # chances that a word is of the sentence's topic, and of another; else it is a common one


def sentence(draw: random.Random, topic: str) -> tuple[str, str]:
    """A sentence about ``topic``, one of ``TOPICS``, and its form, one of ``FORMS``."""
    words, form = [], draw.choice(tuple(FORMS))
    for word in FORMS[form].split():
        kind = word.strip("{}")
        if word == kind:
            words.append(word)
            continue
        chance = draw.random()
        if chance < OWN:
            words.append(draw.choice(TOPICS[topic][kind]))
        elif chance < OWN + OTHER:
            words.append(draw.choice(TOPICS[draw.choice([t for t in TOPICS if t != topic])][kind]))
        else:
            words.append(draw.choice(COMMON[kind]))
    return " ".join(words), form


def sentences(count: int, seed: int) -> list[tuple[str, int, int]]:
    """``count`` sentences with the index of their topic, the topics in turn, and that of their form."""
    draw, topics, forms = random.Random(seed), list(TOPICS), list(FORMS)
    made = [sentence(draw, topics[i % len(topics)]) for i in range(count)]
    return [(text, i % len(topics), forms.index(form)) for i, (text, form) in enumerate(made)]
