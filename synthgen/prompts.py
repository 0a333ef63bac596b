"""Read prompt files: one prompt per line, the words to mask in brackets; notation in ``prompts/README.md``."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol

from synthgen.errors import MissingArtifact, PromptError
from synthgen.records import Prompt, Request, sample_key
from synthgen.untrusted import MAX_PROMPTS, MAX_WORDS, is_object, iter_text, read_json, shortened, visible

__all__ = [
    "Prompts",
    "Survey",
    "expand",
    "find_words",
    "iter_prompts",
    "parse_line",
    "read_prompts",
    "read_templates",
    "request_for",
    "sample_seed",
    "survey_prompts",
]

#: Words that name nothing visible. A line without brackets asks for masks of all other words.
STOP_WORDS = frozenset(
    """a about above across after against along among an and another any are around as at be been before behind being
    below beneath beside between both but by can close cute down during each every few for from front good had has have
    her here his how image in inside into is it its large left like many more most my near next no nor not of off on one
    or other our out outside over own photo photograph picture right seen shot side small so some such than that the
    their them there these they this those through to top toward towards two under up upon very view was we were what
    when where which while who whose will with within without you your""".split()  # noqa: SIM905
)
# Initial vowels with a consonant sound, and the silent h.
_SOUNDS_LIKE_CONSONANT = ("uni", "euro", "one", "use", "usu", "ute")
_SOUNDS_LIKE_VOWEL = ("hour", "honest", "heir")
_BRACKETS = re.compile(r"([\[\]])")
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, Hiragana, Katakana, Han; and Han iteration marks.
_UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3040-\u309f\u30a0-\u30ff\u31f0-\u31ff"
    "\uff66-\uff9f\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_PLAIN_EDGES = re.compile(r"(?<!\w)"), re.compile(r"(?!\w)")  # in ASCII text: where a word may begin, and end
_BEGIN, _END = "\ud800", "\ud801"  # markers for such places; lone surrogates, which no valid text contains
_SAME = str.maketrans("ı\u1fd3\u1fe3\ufb06", "i\u0390\u03b0\ufb05")  # equal under re.IGNORECASE
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)\{\}")


class Prompts(Protocol):
    """Prompts by number: a list, or a run's copy of its prompts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Prompt: ...


def read_prompts(path: str | Path, template: str | Path | None = None) -> list[Prompt]:
    """The prompts of a ``.txt`` file (a line each) or a ``.jsonl`` file (an object each), templates applied.

    Raises:
        MissingArtifact: there is no such file.
        PromptError: it is not UTF-8, contains no prompt, or a line cannot be read; names the line.
    """
    return list(iter_prompts(path, template))


def iter_prompts(path: str | Path, template: str | Path | None = None) -> Iterator[Prompt]:
    """The prompts of :func:`read_prompts`, one at a time, for files that do not fit into memory.

    With templates the file is read once to check every line, and then once for each template.

    Raises:
        MissingArtifact, PromptError: as for :func:`read_prompts`, when the line is reached.
    """
    path = Path(path)
    if template is None:
        yield from _parsed(path)
        return
    for _ in _parsed(path):
        pass
    for text in read_templates(template):
        yield from _filled(text, _parsed(path))


@dataclass(frozen=True, slots=True)
class Survey:
    """An overview of a prompt file, made without parsing every prompt."""

    count: int  # prompts, templates applied: as many as ``read_prompts`` would return
    lines: tuple[str, ...]  # some lines of the file, unchanged and evenly spaced
    prompts: tuple[Prompt, ...]  # the prompts of these lines
    templates: tuple[str, ...]  # all templates; empty if there is no template file


def survey_prompts(path: str | Path, template: str | Path | None = None, *, most: int = 64) -> Survey:
    """Count the prompts of a file and parse ``most`` of them, evenly spaced; the others take no memory.

    Raises:
        MissingArtifact: there is no such file.
        PromptError: it is not UTF-8, contains no prompt, or one of the parsed lines cannot be read.
    """
    path = Path(path)
    count, step, kept = 0, 1, []
    for number, line in _prompt_lines(path):
        if count % step == 0:
            kept.append((number, line))
            if len(kept) == 2 * most:
                kept, step = kept[::2], 2 * step
        count += 1
    kept = [kept[index * len(kept) // most] for index in range(most)] if len(kept) > most else kept
    templates = () if template is None else tuple(read_templates(template))
    prompts = [_parse(path, number, line) for number, line in kept]
    if templates:
        expand(prompts, templates[:1])  # each must mark a word
    return Survey(count * max(1, len(templates)), tuple(line for _, line in kept), tuple(prompts), templates)


def _prompt_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that contain a prompt, with their numbers."""
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".parquet"):  # each line would become a prompt unparsed
        raise PromptError(f"{path}: prompts come from a .txt file (one per line) or a .jsonl file (an object per line)")
    found = False
    for number, line in _lines(path, "prompt file", "--prompts"):
        if line.startswith("#") and not _is_json(path):
            continue
        found = True
        yield number, line
    if not found:
        raise PromptError(f"{path} holds no prompt; write one per line, such as: a photo of a [dog] in a park")


def _parsed(path: Path) -> Iterator[Prompt]:
    return (_parse(path, number, line) for number, line in _prompt_lines(path))


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        if not _is_json(path) and is_object(line):
            raise ValueError("it is a JSON object in a file of plain text; name the file .jsonl")
        return _within_bounds(_parse_json(line) if _is_json(path) else parse_line(line))
    except ValueError as error:
        raise PromptError(f"{path}, line {number}: {error}") from None


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def read_templates(path: str | Path) -> list[str]:
    """The templates of a file: lines with one ``{}`` for the marked word, and without brackets.

    Raises:
        MissingArtifact, PromptError: as for :func:`read_prompts`.
    """
    path = Path(path)
    templates = []
    for number, line in _lines(path, "template file", "--template"):
        if line.startswith("#"):
            continue
        if line.count("{}") != 1:
            raise PromptError(f"{path}, line {number}: a template has exactly one {{}} where the word goes")
        if _BRACKETS.search(line):
            raise PromptError(
                f"{path}, line {number}: a template has no brackets, as only the word at {{}} gets a mask; leave them "
                "out, or write whole prompts with brackets and give no template"
            )
        templates.append(line)
    if not templates:
        raise PromptError(f"{path} holds no template; write one per line, such as: a photo of a {{}} in a park")
    return templates


def parse_line(line: str) -> Prompt:
    """Parse a line of a text file; ``[word]`` marks a word to mask, no brackets mark all but the stop words.

    The label is the word in brackets if there is exactly one.

    Raises:
        ValueError: a bracket is not closed, or empty, or inside another.
    """
    text, words, spans, start = "", [], [], None
    for piece in _BRACKETS.split(line):
        if piece == "[":
            if start is not None:
                raise ValueError("a '[' is inside brackets; close the first with ']'")
            start = len(text)
        elif piece == "]":
            if start is None:
                raise ValueError("a ']' has no '[' before it")
            inside = text[start:]
            if not inside.strip():
                raise ValueError("brackets without a word in them")
            first = start + len(inside) - len(inside.lstrip())
            words.append(inside.strip())
            spans.append((first, first + len(inside.strip())))
            start = None
        else:
            text += piece
    if start is not None:
        raise ValueError("a '[' is not closed with ']'")
    if not words:
        spans = [match.span() for match in _word_of(text).finditer(text) if match.group().lower() not in STOP_WORDS]
        return Prompt(text, tuple(text[first:last] for first, last in spans), tuple(spans))
    return Prompt(text, tuple(words), tuple(spans), words[0] if len(words) == 1 else None)


def _parse_json(line: str) -> Prompt:
    """Parse a line of a ``.jsonl`` file: ``prompt``, and optionally ``words`` and ``label``.

    ``words`` are located from left to right, so a word that occurs twice may be listed twice. Without ``words`` the
    brackets in ``prompt`` count, as in a text file.
    """
    try:
        row = read_json(line, unique_keys=True)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError("expected an object with a text under 'prompt'")
    unknown = sorted(set(row) - {"prompt", "words", "label"})
    if unknown:
        raise ValueError(f"unknown key {shortened(unknown[0])!r}; there are: prompt, words, label")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise ValueError("'label' must be a text or a whole number")
    words = row.get("words")
    if words is None:
        prompt = parse_line(visible(row["prompt"]))
    elif isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words):
        text = visible(row["prompt"])
        spans = find_words(text, [visible(word) for word in words])
        prompt = Prompt(text, tuple(text[first:last] for first, last in spans), tuple(spans))
    else:
        raise ValueError("'words' must be a list of words of the prompt")
    return Prompt(prompt.text, prompt.words, prompt.spans, prompt.label if label is None else visible(str(label)))


def _within_bounds(prompt: Prompt) -> Prompt:
    if len(prompt.words) > MAX_WORDS:
        raise ValueError(f"it asks for {len(prompt.words)} masks; {MAX_WORDS} are the most, so mark fewer in brackets")
    return prompt


def find_words(text: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """The span of each of ``words`` in ``text``: whole words, any case; the n-th of equal words at its n-th place.

    Longer words are placed first, so that "dog" is not found inside a "hot dog" that is listed as well. Next to letters
    of scripts written without spaces a word may begin and end anywhere.

    Raises:
        ValueError: a word does not occur in the text, or not often enough; or there are more than ``MAX_WORDS``.
    """
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} words are listed; {MAX_WORDS} are the most")
    named = [word.strip() for word in words]
    pieces = _pieces(text, text.isascii())
    marked, starts = "".join(pieces), list(accumulate(map(len, pieces), initial=0))
    longest = sorted(range(len(named)), key=lambda number: -len(named[number]))
    for order in (longest, range(len(named))):  # second try for overlapping words: "hot dog", "dog bun"
        found: dict[int, tuple[int, int]] = {}
        for number in order:
            place = _free_place(marked, starts, named[number], text.isascii(), sorted(found.values()))
            if place is None:
                break
            found[number] = place
        else:
            return [found[number] for number in range(len(named))]
    word, prompt = shortened(words[number]), shortened(text)
    raise ValueError(f"the word {word!r} is not in the prompt {prompt!r} (or not that often)")


def _free_place(
    marked: str, starts: Sequence[int], word: str, plain: bool, taken: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first span of a word that overlaps none of the spans in ``taken``, which are sorted."""
    if not word or len(word) >= len(starts):
        return None
    head, *inner, _ = _pieces(word, plain)
    spelled, at = f"{_BEGIN}{head[-1]}{''.join(inner)}{_END}", 0
    while (at := marked.find(spelled, at)) >= 0:
        first = bisect(starts, at) - 1
        before = bisect(taken, (first + len(word) - 1, len(starts))) - 1  # the last that begins before the word ends
        if before < 0 or taken[before][1] <= first:
            return first, first + len(word)
        at = starts[taken[before][1]]
    return None


def _pieces(text: str, plain: bool) -> list[str]:
    """Each character case-folded, after the markers for "a word may begin here" and "a word may end before it".

    The last piece is the end of the text. A word between its markers is found by a plain substring search.
    """
    folded = text.lower() if text.isascii() else map(_folded, text)
    pieces = [*folded, ""]
    for sign, edge in zip((_BEGIN, _END), _PLAIN_EDGES if plain else _edges(), strict=True):
        for match in edge.finditer(text):
            pieces[match.start()] = sign + pieces[match.start()]
    return pieces


def _folded(character: str) -> str:
    """One representative of all characters that a pattern without case treats as equal."""
    folded = character.lower()[0].casefold()
    return (folded if len(folded) == 1 else character.lower()[0]).translate(_SAME)


def _word_of(text: str) -> re.Pattern[str]:
    """The pattern of a word in this text: letters with combining marks, joined by hyphens and apostrophes."""
    return _WORD if text.isascii() else _marked_word()


@cache
def _marked_word() -> re.Pattern[str]:
    letters = rf"[^\W_]+(?:[{_marks()}]+[^\W_]*)*"
    return re.compile(rf"{letters}(?:[-'’]{letters})*")


@cache
def _edges() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for the start and end of a whole word: no letter next to it, or a letter of a script without spaces.

    No word ends before a combining mark, which belongs to the letter before it.
    """
    marks, joined = _marks(), rf"(?<=[{_UNSPACED}])|(?=[{_UNSPACED}])"
    before = rf"(?<![\w{marks}])|(?![{marks}])(?:{joined})"
    return re.compile(before), re.compile(rf"(?![{marks}])(?:(?!\w)|{joined})")


@cache
def _marks() -> str:
    """All combining marks, for a character class; without the variation selectors, which turn characters into emoji."""
    numbers = chain(range(0x300, 0xFE00), range(0xFE10, 0x20000), range(0xE0100, 0xE01F0))
    return "".join(chr(number) for number in numbers if unicodedata.category(chr(number)) in ("Mn", "Mc"))


def expand(prompts: Sequence[Prompt], templates: Sequence[str]) -> list[Prompt]:
    """Put the first marked word of each prompt into every template, one template after another.

    ``a {}`` becomes ``an`` before a vowel sound. The label is the prompt's or, if it has none, its first marked word.

    Raises:
        PromptError: a prompt marks no word.
    """
    return [filled for template in templates for filled in _filled(template, prompts)]


def _filled(template: str, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    for prompt in prompts:
        if not prompt.words or not prompt.words[0]:
            text, into = shortened(prompt.text), shortened(template)
            raise PromptError(f"the prompt {text!r} marks no word to put into the template {into!r}")
        word = prompt.words[0]
        text = _ARTICLE.sub(rf"\1{'n' if _takes_an(word) else ''}\2{{}}", template)
        start = text.index("{}")
        text = text.replace("{}", word)
        yield Prompt(text, (word,), ((start, start + len(word)),), prompt.label or word)


def _takes_an(word: str) -> bool:
    word = word.lower()
    if word.startswith(_SOUNDS_LIKE_CONSONANT):
        return False
    return word[0] in "aeiou" or word.startswith(_SOUNDS_LIKE_VOWEL)


def sample_seed(run_seed: int, key: str) -> int:
    """The seed of one image, in [0, 2**53); a function of the run's seed and the key alone."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}:{key}".encode(), digest_size=8).digest(), "big") >> 11


def request_for(prompts: Prompts, run_seed: int, unit: int, row: int, unit_size: int) -> Request:
    """The request for one row: image ``i = unit * unit_size + row`` shows prompt ``i mod len(prompts)``."""
    key = sample_key(unit, row)
    prompt = prompts[(unit * unit_size + row) % len(prompts)]
    return Request(key, prompt, sample_seed(run_seed, key))


def _lines(path: Path, kind: str, option: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a text file, with their numbers."""
    try:
        yield from iter_text(path, MAX_PROMPTS)
    except FileNotFoundError:
        raise MissingArtifact(f"there is no {kind} {path}; give one with {option} FILE") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror or error}; give a file with {option} FILE") from None
    except ValueError as error:
        raise PromptError(f"{path} cannot be read: {error}") from None
