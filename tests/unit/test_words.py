import pytest
from transformers import CLIPTokenizer

from synthgen.attention.words import PromptTokenizer, locate_in_encoders, locate_words
from synthgen.prompts import parse_line
from synthgen.records import Prompt


@pytest.fixture(scope="module")
def tokenizer(stable_diffusion):
    return CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer")  # 16 tokens at most


def spelled(tokenizer, line):
    prompt = parse_line(line)
    ids = tokenizer(prompt.text, truncation=True, max_length=16)["input_ids"]
    found = locate_words(tokenizer, prompt)
    return [
        "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in word])).replace("</w>", " ")
        for word in found.positions
    ], found.warnings


def test_words_of_one_and_of_many_tokens(tokenizer):
    assert spelled(tokenizer, "a [dog] in an [elf]") == (["dog ", "elf "], ())


def test_words_of_several_words(tokenizer):
    assert spelled(tokenizer, "a [golden dog] in the [park]") == (["golden dog ", "park "], ())


def test_the_second_of_two_equal_words(tokenizer):
    prompt = parse_line("a dog and a [dog]")
    assert locate_words(tokenizer, prompt).positions == ((5,),)


def test_punctuation_case_and_other_scripts(tokenizer):
    assert spelled(tokenizer, "A [Dog], a [cat]!")[0] == ["dog ", "cat "]
    words, warnings = spelled(tokenizer, "a [é] cat")
    assert len(words) == 1
    assert words[0]
    assert not warnings


def test_a_word_beyond_the_limit_has_no_positions_but_a_warning(tokenizer):
    words, warnings = spelled(tokenizer, "a [dog] and an [umbrella umbrella]")
    assert words == ["dog ", ""]
    assert "longer than the 16 tokens" in warnings[0]
    prompt = parse_line("a [dog] and an [umbrella umbrella]")
    found = locate_in_encoders([PromptTokenizer(tokenizer, 16)], prompt)
    assert found.warnings == (warnings[0], 'the word "umbrella umbrella" is cut off and has no mask')
    assert [bool(positions) for positions in found.positions] == [True, False]


@pytest.mark.parametrize("word", ["cat's", "a\\b", "café\xa0noir", "\u200bdog", 'the "big" cat\'s'])
def test_a_word_that_was_cut_off_is_named_unchanged(tokenizer, word):
    text = "a dog and a cat and a dog and a cat and a dog and " + word
    prompt = Prompt(text, (word,), ((len(text) - len(word), len(text)),))
    found = locate_in_encoders([PromptTokenizer(tokenizer, 16)], prompt)
    assert found.positions == ((),)
    assert found.warnings[1:] == (f'the word "{word}" is cut off and has no mask',)


def test_no_special_token_ever_counts(tokenizer):
    prompt = parse_line("[a] [dog] [cat]")
    assert locate_words(tokenizer, prompt).positions == ((1,), (2,), (3,))


def test_each_word_that_was_cut_off_has_a_warning_also_beside_an_equal_one_that_was_read(tokenizer):
    cats = "and a cat " * 4
    long, short = PromptTokenizer(tokenizer, 16), PromptTokenizer(tokenizer, 12)
    for encoders in ([long], [long, short]):
        prompt = parse_line(f"a [dog] {cats}and a [dog] and a [dog]")
        found = locate_in_encoders(encoders, prompt)
        assert [bool(positions) for positions in found.positions] == [True, False, False]
        *too_long, second, third = found.warnings
        assert second == third == 'the word "dog" is cut off and has no mask'
        assert ["longer than the" in warning for warning in too_long] == [True] * len(encoders)


def test_a_word_that_one_encoder_reads_is_not_cut_off(tokenizer):
    prompt = parse_line("a photo of a cat and a [dog]")
    found = locate_in_encoders([PromptTokenizer(tokenizer, 6), PromptTokenizer(tokenizer, 16, start=6)], prompt)
    assert found.positions == ((14,),)
    assert ["longer than the 6 tokens" in warning for warning in found.warnings] == [True]
