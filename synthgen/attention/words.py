"""Which token positions spell which word, for any tokenizer that tells where its tokens stand in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from synthgen.records import Prompt

__all__ = ["TextEncoder", "WordTokens", "locate_in_encoders", "locate_words", "words_cut_off"]

_WHOLE = 100_000  # more tokens than any prompt has: tokenize all of it, then see where the pipeline will cut


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder as the network's attention sees it: how its prompt is cut, and where its tokens stand."""

    tokenizer: Any
    length: int  # tokens that it reads at most, the marks included
    start: int = 0  # the place of its first token in the text that is attended to


@dataclass(frozen=True, slots=True)
class WordTokens:
    """The token positions of a prompt's words in the text that is attended to."""

    positions: tuple[tuple[int, ...], ...]  # one tuple a word, empty where the word was cut off
    warnings: tuple[str, ...]  # what a person should know, such as a prompt that was cut


def locate_in_encoders(encoders: Sequence[TextEncoder], prompt: Prompt) -> WordTokens:
    """Find the tokens of each marked word of ``prompt`` in all text encoders of a model.

    Encoders that stand at the same place (Stable Diffusion XL's two) share positions; where they cut a word
    differently, the positions of both count. A word is cut off where no encoder reads it; each that is has a warning of
    its own, also the second of two equal ones.

    Raises:
        ValueError: a tokenizer gives no offsets (a slow one).
    """
    found = [locate_words(encoder.tokenizer, prompt, encoder.length) for encoder in encoders]
    positions: list[tuple[int, ...]] = []
    for k in range(len(prompt.words)):
        places = {encoder.start + at for encoder, one in zip(encoders, found, strict=True) for at in one.positions[k]}
        positions.append(tuple(sorted(places)))
    of_words = {_cut_off(word) for word in prompt.words}
    told = [*dict.fromkeys(warning for one in found for warning in one.warnings if warning not in of_words)]
    lost = [_cut_off(word) for word, places in zip(prompt.words, positions, strict=True) if not places]
    return WordTokens(tuple(positions), (*told[:1], *lost, *told[1:]))


def words_cut_off(warnings: Iterable[str]) -> list[str]:
    """The marked words that a sample lost, by its warnings: no text encoder reads as far as they stand."""
    found = (re.fullmatch(r"the word ['\"](.*)['\"] is cut off and has no mask", warning) for warning in warnings)
    return [match[1] for match in found if match]


def _cut_off(word: str) -> str:
    return f'the word "{word}" is cut off and has no mask'


def locate_words(tokenizer: Any, prompt: Prompt, length: int | None = None) -> WordTokens:
    """Find the tokens of each marked word of ``prompt``, as the pipeline will tokenize it.

    The prompt is cut at ``length`` tokens, by default the tokenizer's own. Start, end and padding tokens are never
    counted. Works by the character offsets that the tokenizer gives, so any script, words of many tokens, and the
    second of two equal words come out right.

    Raises:
        ValueError: the tokenizer gives no offsets (a slow one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
    limit = length or tokenizer.model_max_length
    encoded = tokenizer(prompt.text, truncation=True, max_length=_WHOLE, return_offsets_mapping=True)
    offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}  # not the unknown token, which may well be a word
    spelled = [
        (position, first, last)
        for position, (first, last) in enumerate(offsets)
        if last > first and encoded["input_ids"][position] not in marks
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
            warnings.append(_cut_off(word))
            found = ()
        positions.append(found)
    return WordTokens(tuple(positions), tuple(warnings))
