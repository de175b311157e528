# SPDX-License-Identifier: Apache-2.0
"""The built-in texts: short and long, odd and plain, duplicates in different places, in an uneven order."""

from __future__ import annotations

TEXTS: tuple[str, ...] = (
    "My name is",
    "",
    "The committee postponed its decision until the engineers had measured the noise on all four cards twice, "
    "because one of the two earlier runs had been made with a stale build.",
    "a",
    "How do I change a tyre in the rain?",
    "def pool(h, m):\n    return (h * m[..., None]).sum(1) / m.sum(1, keepdims=True)",
    "😀🚀 ok 👍🏽",
    "Zażółć gęślą jaźń; Größe, naïve café, señor.",
    "3.14159 -273.15 1e-12 0xDEADBEEF 1,000,000",
    "The cat sat on the mat.",
    "東京は日本の首都です。",
    "   \t  ",
    "A replacement tyre is fitted after the wheel nuts are loosened and the car is jacked up; in wet weather, put a "
    "board under the jack so that it does not sink, and keep the nuts in the hubcap.",
    "\u2603\ufffd\U0001f9ff xqzwv",
    "Embedding models map sentences to vectors.",
    "Sentences are mapped to vectors by embedding models.",
    "SELECT name, COUNT(*) FROM cards WHERE status = 'Ready' GROUP BY name HAVING COUNT(*) > 1;",
    "no",
    "The cat sat on the mat.",
    "Не все кошки серы.",
    "THE CAT SAT ON THE MAT!",
    "https://example.org/a/b?c=d&e=%20f#g",
    "مرحبا بالعالم",
    "yes yes yes yes yes yes yes yes yes yes yes yes",
    "The mat sat on the cat.",
    "My name is",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "What colour was Napoleon's white horse?",
)
"""`☃` and the like are outside most vocabularies, so that the unknown token occurs."""

_DOCUMENTS = {
    "How do I change a tyre in the rain?": (
        "A flat tyre is changed after the wheel nuts are loosened and the car is jacked up.",
        "In wet weather, put a board under the jack so that it does not sink.",
        "Tyres are made of rubber, steel and textile.",
        "The rain in the mountains lasted for three days.",
        "def change(tyre):\n    return tyre.swap()",
        "",
    ),
    "What colour was Napoleon's white horse?": (
        "Napoleon's horse Marengo was grey, and is often painted white.",
        "The emperor owned more than fifty horses.",
        "White is the colour of snow.",
        "Napoleon's horse Marengo was grey, and is often painted white.",
        "horse horse horse horse horse horse horse horse",
    ),
    "cards": (
        "The committee measured the noise on all four cards twice.",
        "SELECT name FROM cards WHERE status = 'Ready';",
        "They played cards until midnight.",
        "no",
        "東京は日本の首都です。",
    ),
    "Embedding models map sentences to vectors.": (
        "Sentences are mapped to vectors by embedding models.",
        "Embedding models map sentences to vectors.",
        "Embedding models do not map sentences to vectors.",
        "A model railway needs a map of its own.",
        "Größe, naïve café, señor.",
    ),
    "": (
        "My name is",
        "The cat sat on the mat.",
        "The mat sat on the cat.",
    ),
}

PAIRS: tuple[tuple[str, str], ...] = tuple((query, text) for query, texts in _DOCUMENTS.items() for text in texts)
"""The built-in pairs of query and document: right and wrong answers, near copies, an empty query, an empty document."""
