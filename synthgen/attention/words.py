"""The token positions of words, for any tokenizer that provides character offsets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synthgen.records import Prompt

__all__ = ["PromptTokenizer", "WordTokens", "locate_in_encoders", "locate_words"]

_WHOLE = 100_000  # more tokens than any prompt has: tokenize all of it, then apply the limit of the pipeline


@dataclass(frozen=True)
class PromptTokenizer:
    """How one text encoder of a model tokenizes a prompt, and the position of its tokens in the network's attention."""

    tokenizer: Any
    length: int  # maximum number of tokens of the encoder, including start and end tokens
    start: int = 0  # position of its first token in the sequence that the network attends to


@dataclass(frozen=True, slots=True)
class WordTokens:
    """The token positions of a prompt's words in the text that is attended to."""

    positions: tuple[tuple[int, ...], ...]  # one tuple per word, empty if the word was cut off
    warnings: tuple[str, ...]  # for the user: where a prompt was cut off, and which of its words have no mask


def locate_in_encoders(encoders: Sequence[PromptTokenizer], prompt: Prompt) -> WordTokens:
    """Find the tokens of each marked word of ``prompt`` in all text encoders of a model.

    Encoders with the same start (Stable Diffusion XL's two) share positions; if they split a word differently, the
    positions of both count. A word is cut off if no encoder reads it; each such word has a warning, also the second
    of two equal words.

    Raises:
        ValueError: a tokenizer provides no offsets (a slow one).
    """
    found = [locate_words(encoder.tokenizer, prompt, encoder.length) for encoder in encoders]
    positions: list[tuple[int, ...]] = []
    for k in range(len(prompt.words)):
        places = {encoder.start + at for encoder, one in zip(encoders, found, strict=True) for at in one.positions[k]}
        positions.append(tuple(sorted(places)))
    warnings = [*dict.fromkeys(warning for one in found for warning in one.warnings)]
    warnings += [
        f'the word "{word}" is cut off and has no mask'
        for word, places in zip(prompt.words, positions, strict=True)
        if not places
    ]
    return WordTokens(tuple(positions), tuple(warnings))


def locate_words(tokenizer: Any, prompt: Prompt, length: int | None = None) -> WordTokens:
    """Find the tokens of each marked word of ``prompt``, as the pipeline will tokenize it.

    The prompt is cut at ``length`` tokens, by default the tokenizer's own limit, with a warning. Start, end and padding
    tokens are never counted. Positions come from the tokenizer's character offsets, so any script, words of many
    tokens, and the second of two equal words are handled. A learned embedding of several vectors is as many tokens.

    Raises:
        ValueError: the tokenizer provides no offsets (a slow one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
    limit = length or tokenizer.model_max_length
    text, spans = _expanded(tokenizer, prompt)
    encoded = tokenizer(text, truncation=True, max_length=_WHOLE, return_offsets_mapping=True)
    offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}  # not the unknown token, which may well be a word
    spelled = [
        (position, first, last)
        for position, (first, last) in enumerate(offsets)
        if last > first and encoded["input_ids"][position] not in special
    ]
    cut = len(offsets) > limit
    kept = [token for token in spelled if token[0] < limit - 1] if cut else spelled  # the last place is the end token
    reached = max((last for _, _, last in kept), default=0)
    too_long = f"the prompt is longer than the {limit} tokens the model reads; left out: {text[reached:].strip()!r}"
    positions = [
        ()
        if cut and stop > reached
        else tuple(position for position, first, last in kept if first < stop and last > start)
        for start, stop in spans
    ]
    return WordTokens(tuple(positions), (too_long,) if cut else ())


def _expanded(tokenizer: Any, prompt: Prompt) -> tuple[str, list[tuple[int, int]]]:
    """The text that the pipeline tokenizes, and the spans of the marked words in it.

    diffusers replaces the token ``<toy>`` of a learned embedding of three vectors (textual inversion) by
    ``<toy> <toy>_1 <toy>_2``, which shifts everything after it.
    """
    text, spans = prompt.text, list(prompt.spans)
    added = getattr(tokenizer, "added_tokens_encoder", {})
    for token in [token for token in added if f"{token}_1" in added and token in text]:
        if token not in tokenizer.tokenize(text):
            continue
        count = next(count for count in itertools.count(1) if f"{token}_{count}" not in added)
        whole = " ".join([token, *(f"{token}_{number}" for number in range(1, count))])
        longer = len(whole) - len(token)
        places = [match.start() for match in re.finditer(re.escape(token), text)]
        spans = [
            (
                first + longer * sum(place + len(token) <= first for place in places),
                last + longer * sum(place < last for place in places),
            )
            for first, last in spans
        ]
        text = text.replace(token, whole)
    return text, spans
