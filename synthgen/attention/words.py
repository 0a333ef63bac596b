"""Which token positions spell which word, for any tokenizer that tells where its tokens stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synthgen.records import Prompt

__all__ = ["WordTokens", "locate_words"]

_WHOLE = 100_000  # more tokens than any prompt has: tokenize all of it, then see where the pipeline will cut


@dataclass(frozen=True, slots=True)
class WordTokens:
    """The token positions of a prompt's words in the text encoder's input."""

    positions: tuple[tuple[int, ...], ...]  # one tuple a word, empty where the word was cut off
    warnings: tuple[str, ...]  # what a person should know, such as a prompt that was cut


def locate_words(tokenizer: Any, prompt: Prompt) -> WordTokens:
    """Find the tokens of each marked word of ``prompt``, as the pipeline will tokenize it (cut at its maximum length).

    Start, end and padding tokens are never counted. Works by the character offsets that the tokenizer gives, so any
    script, words of many tokens, and the second of two equal words come out right.

    Raises:
        ValueError: the tokenizer gives no offsets (a slow one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
    limit = tokenizer.model_max_length
    encoded = tokenizer(prompt.text, truncation=True, max_length=_WHOLE, return_offsets_mapping=True)
    offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    spelled = [
        (position, first, last)
        for position, (first, last) in enumerate(offsets)
        if last > first and encoded["input_ids"][position] not in tokenizer.all_special_ids
    ]
    cut = len(offsets) > limit
    kept = [token for token in spelled if token[0] < limit - 1] if cut else spelled  # the last place is the end token
    reached = max((last for _, _, last in kept), default=0)
    warnings = []
    if cut:
        rest = prompt.text[reached:].strip()
        warnings.append(f"the prompt is longer than the {limit} tokens the model reads; left out: {rest!r}")
    positions = []
    for word, (start, stop) in zip(prompt.words, prompt.spans, strict=True):
        found = tuple(position for position, first, last in kept if first < stop and last > start)
        if cut and stop > reached:
            warnings.append(f"the word {word!r} is cut off and has no mask")
            found = ()
        positions.append(found)
    return WordTokens(tuple(positions), tuple(warnings))
