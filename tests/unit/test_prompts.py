import random
import re

import pytest

from synthgen.errors import MissingArtifact, PromptError
from synthgen.prompts import (
    STOP_WORDS,
    expand,
    find_words,
    iter_prompts,
    parse_line,
    read_prompts,
    read_templates,
    request_for,
    sample_seed,
)


def test_brackets_mark_words_and_vanish_from_the_text():
    prompt = parse_line("a photo of a [golden retriever] on a [beach]")
    assert prompt.text == "a photo of a golden retriever on a beach"
    assert prompt.words == ("golden retriever", "beach")
    assert [prompt.text[first:last] for first, last in prompt.spans] == list(prompt.words)
    assert prompt.label is None


def test_one_marked_word_is_the_label():
    assert parse_line("a photo of a [dog]").label == "dog"


def test_the_second_of_two_equal_words_has_its_own_place():
    prompt = parse_line("a dog and a [dog]")
    assert prompt.spans == ((12, 15),)


def test_spaces_inside_brackets_do_not_count():
    assert parse_line("a [ dog ]").words == ("dog",)


def test_without_brackets_all_but_stop_words_are_marked():
    assert parse_line("a photo of a red dog in the park").words == ("red", "dog", "park")


def test_any_script_is_marked():
    assert parse_line("ein [Hündchen] und 犬").words == ("Hündchen",)
    assert parse_line("ein Hündchen, 犬").words == ("ein", "Hündchen", "犬")


@pytest.mark.parametrize(
    ("line", "says"),
    [("a [dog", "not closed"), ("a dog]", "no '['"), ("a []", "without a word"), ("a [b [c]]", "inside")],
)
def test_broken_brackets_name_the_line(tmp_path, line, says):
    path = tmp_path / "p.txt"
    path.write_text(f"# comment\n\na cat\n{line}\n")
    with pytest.raises(PromptError, match="line 4") as caught:
        read_prompts(path)
    assert says in str(caught.value)


def test_files_that_are_no_prompt_files(tmp_path):
    with pytest.raises(MissingArtifact, match="no prompt file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("ein Hündchen".encode("latin-1"))
    with pytest.raises(PromptError, match=r"not UTF-8 \(byte 5, 0xfc\)"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(PromptError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a dog\u2028a cat"}\r\n', encoding="utf-8")
    assert read_prompts(path)[0].text == "a dog\u2028a cat"


def test_jsonl_with_words_and_label(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a dog and a Dog", "words": ["dog", "dog"], "label": "pets"}\n'
        '{"prompt": "a [cat]"}\n{"prompt": "a hot dog", "words": ["hot dog"]}\n'
    )
    first, second, third = read_prompts(path)
    assert (first.words, first.spans, first.label) == (("dog", "Dog"), ((2, 5), (12, 15)), "pets")
    assert (second.words, second.label) == (("cat",), "cat")
    assert third.words == ("hot dog",)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"), ("[]", "expected an object"), ('{"prompt": ""}', "expected an object"),
        ('{"prompt": "a dog", "words": ["cat"]}', "'cat' does not stand"),
        ('{"prompt": "a dog", "words": ["dog", "dog"]}', "not so often"),
        ('{"prompt": "a doghouse", "words": ["dog"]}', "does not stand"),
        ('{"prompt": "a dog", "words": "dog"}', "must be a list"), ('{"prompt": "a dog", "lable": "x"}', "'lable'"),
    ],
)  # fmt: skip
def test_broken_rows_name_the_line(tmp_path, row, says):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a cat"}}\n{row}\n')
    with pytest.raises(PromptError, match="line 2") as caught:
        read_prompts(path)
    assert says in str(caught.value)


def test_templates_take_each_word_with_its_article(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("# templates\na photo of a {}\nthe {} at night\n")
    prompts = expand(
        [parse_line("a [dog]"), parse_line("an [owl]"), parse_line("a [unicycle]"), parse_line("an [hourglass]")],
        read_templates(path),
    )
    assert [prompt.text for prompt in prompts] == [
        "a photo of a dog", "a photo of an owl", "a photo of a unicycle", "a photo of an hourglass",
        "the dog at night", "the owl at night", "the unicycle at night", "the hourglass at night",
    ]  # fmt: skip
    assert all(prompt.text[slice(*prompt.spans[0])] == prompt.words[0] == prompt.label for prompt in prompts)
    path.write_text("no place\n")
    with pytest.raises(PromptError, match="line 1"):
        read_templates(path)


def test_seeds_depend_on_run_and_key_alone():
    seeds = {sample_seed(run, f"{key:010d}") for run in range(20) for key in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert sample_seed(0, "0000000000") == 4265920950659602  # a change here changes every dataset


def test_prompts_take_turns_over_the_units():
    prompts = [parse_line(f"a [w{index}]") for index in range(3)]
    texts = [request_for(prompts, 0, unit, row, 2).prompt.label for unit in range(2) for row in range(2)]
    assert texts == ["w0", "w1", "w2", "w0"]
    assert request_for(prompts, 0, 1, 1, 2).key == "0000010001"


@pytest.mark.parametrize(("name", "count"), [("imagenet", 1000), ("coco", 80)])
def test_the_prompt_files_that_ship(name, count):
    prompts = read_prompts(f"prompts/{name}.txt")
    assert len(prompts) == count
    assert len({prompt.label for prompt in prompts}) == count


def test_what_is_wrong_with_a_prompt_is_told_before_what_is_wrong_with_a_template(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("the\na [dog]\na [cat\n")  # the first marks no word, the last cannot be read
    for template in ("a {}\n", "no place for it\n"):
        (tmp_path / "t.txt").write_text(template)
        with pytest.raises(PromptError, match="line 3"):
            read_prompts(path, tmp_path / "t.txt")
    path.write_text("a [dog]\nthe\n")
    (tmp_path / "t.txt").write_text("a {}\nthe {}\n")
    prompts = iter_prompts(path, tmp_path / "t.txt")
    assert next(prompts).text == "a dog"
    with pytest.raises(PromptError, match=r"'the' marks no word to put into the template 'a \{\}'"):
        next(prompts)


@pytest.mark.parametrize("template", ["a photo of a [{}]", "a {} in a [park]", "a {}]"])
def test_brackets_in_a_template_are_refused_by_its_line(tmp_path, template):
    (tmp_path / "p.txt").write_text("a [dog]\n")
    path = tmp_path / "t.txt"
    path.write_text(f"# templates\na photo of a {{}}\n{template}\n")
    for read in (read_templates, lambda path: read_prompts(tmp_path / "p.txt", path)):
        with pytest.raises(PromptError, match=r"t\.txt, line 3: a template has no brackets.*leave them out"):
            read(path)


@pytest.mark.parametrize(
    ("text", "words", "starts"),
    [
        ("a hot dog and a dog", ["dog", "hot dog"], [16, 2]),
        ("a hot dog and a dog", ["hot dog", "dog"], [2, 16]),
        ("a teddy bear, a bear and a bear", ["bear", "teddy bear", "Bear"], [16, 2, 27]),
        ("a hot dog bun", ["dog bun", "hot dog"], None),
        ("a hot dog bun and a hot dog", ["dog bun", "hot dog"], [6, 20]),
        ("a dog bun stand by a hot dog bun", ["hot dog", "dog bun"], [21, 2]),
        ("b c d and a b c d", ["a b", "b c d"], [10, 0]),
        ("a b c d and b c d", ["a b", "b c d"], [0, 12]),  # the longer one, placed first, would leave no room
    ],
)
def test_longer_words_are_placed_first_and_given_back_in_their_order(text, words, starts):
    if starts is None:
        with pytest.raises(ValueError, match="not so often"):
            find_words(text, words)
        return
    spans = find_words(text, words)
    assert [first for first, _ in spans] == starts
    assert [text[first:last].lower() for first, last in spans] == [word.lower() for word in words]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("re\u0301sume\u0301 on a table", ("re\u0301sume\u0301", "table")),
        ("बिल्ली और कुत्ता", ("बिल्ली", "और", "कुत्ता")),
        ("แมวที่นั่ง", ("แมวที่นั่ง",)),
        ("l'e\u0301te\u0301 d'un semi-re\u0301el", ("l'e\u0301te\u0301", "d'un", "semi-re\u0301el")),
        ("❤\ufe0f 1\ufe0f\u20e3 naïve", ("1", "naïve")),  # what makes an emoji of a character is no letter
    ],
)
def test_combining_marks_belong_to_their_letters(line, words):
    assert parse_line(line).words == words


@pytest.mark.parametrize(
    ("text", "words", "found"),
    [
        ("一只猫在沙发上", ["猫", "沙发"], ["猫", "沙发"]),
        ("ロボットとiPhoneを見る", ["iphone", "ロボット"], ["iPhone", "ロボット"]),
        ("แมวที่นั่ง", ["แมว", "นั่ง"], ["แมว", "นั่ง"]),
        ("ဆိုင်ခွေး", ["ခွေး"], ["ခွေး"]),
        ("ที่", ["ท"], None),  # nothing ends before a mark
        ("बिल्ली", ["बिल"], None),
        ("a cafe\u0301", ["cafe"], None),
        ("ein Hündchen", ["hünd"], None),
        ("un chien au café", ["chien", ""], None),
        ("a dog on a cafe", ["dog", ""], None),
        ("ein Hündchen", ["hündchen"], ["Hündchen"]),
    ],
)
def test_where_a_word_ends_in_other_scripts(text, words, found):
    if found is None:
        with pytest.raises(ValueError, match="does not stand"):
            find_words(text, words)
    else:
        assert [text[first:last] for first, last in find_words(text, words)] == found


def test_words_of_ascii_text_are_what_they_were():
    """By the plain pattern, also where other letters stand beside them."""
    plain = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
    draw = random.Random(0)
    for _ in range(300):
        line = "".join(draw.choice("ab2 _-'.,!") for _ in range(30))
        for text in (line, line + " é"):
            words = [word for word in plain.findall(text) if word.lower() not in STOP_WORDS]
            assert list(parse_line(text).words) == words
