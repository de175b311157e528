# SPDX-License-Identifier: Apache-2.0
"""The built-in prompts of language models: plain, terse, code, another script; and a long text to cut at any length."""

from __future__ import annotations

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Wasser kocht bei",
)

LONG = (
    "A river begins in the hills, where rain gathers in small streams that nobody has named. It runs down through woods"
    " and meadows, turns the wheel of a mill, passes under two bridges of grey stone, and reaches the town by evening."
    " Boats lie there in a row, and children count them. In the morning the water is gone, and other water, which looks"
    " the same, has taken its place; so the town has never seen the same river twice, and yet it has one name for it."
)
