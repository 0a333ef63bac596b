import random
import re
import shutil
import subprocess

import pytest

from synthgen.errors import MissingArtifact, PromptError
from synthgen.prompts import (
    STOP_WORDS,
    _edges,
    _folded,
    expand,
    find_words,
    iter_prompts,
    parse_line,
    read_prompts,
    read_templates,
    request_for,
    sample_seed,
    survey_prompts,
)
from synthgen.records import Prompt


@pytest.mark.parametrize("name", ["p.csv", "p.TSV", "p.json", "p.parquet"])
def test_a_table_is_not_read_as_prompts(tmp_path, name):
    (tmp_path / name).write_text("prompt,words\na dog,dog\n")
    with pytest.raises(PromptError, match=r"prompts come from a \.txt file \(one per line\) or a \.jsonl file"):
        read_prompts(tmp_path / name)


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


def test_files_that_are_not_prompt_files_are_refused(tmp_path):
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
        ("{", "not valid JSON"), ('{"prompt": "a [dog]", "prompt": "a [cat]"}', "the key 'prompt' stands twice"),
        ("[]", "expected an object"), ('{"prompt": ""}', "expected an object"),
        ('{"prompt": "a dog", "words": ["cat"]}', "'cat' is not in the prompt"),
        ('{"prompt": "a dog", "words": ["dog", "dog"]}', "not that often"),
        ('{"prompt": "a doghouse", "words": ["dog"]}', "is not in the prompt"),
        ('{"prompt": "a dog", "words": "dog"}', "must be a list"), ('{"prompt": "a dog", "lable": "x"}', "'lable'"),
        ('{"prompt": "a dog", "label": true}', "must be a text or a whole number"),
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


def test_prompts_repeat_in_order_over_the_units():
    prompts = [parse_line(f"a [w{index}]") for index in range(3)]
    texts = [request_for(prompts, 0, unit, row, 2).prompt.label for unit in range(2) for row in range(2)]
    assert texts == ["w0", "w1", "w2", "w0"]
    assert request_for(prompts, 0, 1, 1, 2).key == "0000010001"


@pytest.mark.parametrize(("name", "count"), [("imagenet", 1000), ("coco", 80)])
def test_the_prompt_files_that_ship(name, count):
    prompts = read_prompts(f"prompts/{name}.txt")
    assert len(prompts) == count
    assert len({prompt.label for prompt in prompts}) == count


def test_errors_in_prompts_come_before_errors_in_templates(tmp_path):
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
        with pytest.raises(ValueError, match="not that often"):
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
        with pytest.raises(ValueError, match="is not in the prompt"):
            find_words(text, words)
    else:
        assert [text[first:last] for first, last in find_words(text, words)] == found


def test_words_of_ascii_text_are_those_of_the_plain_pattern():
    """By the plain pattern, also where other letters stand beside them."""
    plain = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
    draw = random.Random(0)
    for _ in range(300):
        line = "".join(draw.choice("ab2 _-'.,!") for _ in range(30))
        for text in (line, line + " é"):
            words = [word for word in plain.findall(text) if word.lower() not in STOP_WORDS]
            assert list(parse_line(text).words) == words


ROW = '{"prompt": "a dog and a cat", "words": ["cat"]}'


@pytest.mark.parametrize("name", ["p.jsonl", "P.JSONL", "p.JsonL"])
def test_jsonl_is_recognised_in_either_case(tmp_path, name):
    (tmp_path / name).write_text(f"{ROW}\n")
    (prompt,) = read_prompts(tmp_path / name)
    assert (prompt.text, prompt.words) == ("a dog and a cat", ("cat",))


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.txt", "rows"])
@pytest.mark.parametrize("row", [ROW, "{}", '{"score": NaN}', '{"prompt": "\\ud800"}'])
def test_json_objects_in_a_text_file_are_refused(tmp_path, name, row):
    path = tmp_path / name
    path.write_text(f"a [dog]\n  {row}\n")
    for read in (read_prompts, survey_prompts):
        with pytest.raises(PromptError, match=r"line 2: it is a JSON object.*name the file \.jsonl"):
            read(path)


@pytest.mark.parametrize(
    "line",
    ["{a|b}", "{a|b} in the rain", "[dog] on a beach", "[dog]", '["dog"]', "{", "{'prompt': 'a dog'}", '{"dog"} there',
     '{"a": 1} and {"b": 2}', '{"a":' * 5000],
)  # fmt: skip
def test_text_that_begins_like_json_is_text(tmp_path, line):
    path = tmp_path / "p.txt"
    path.write_text(f"{line}\n")
    assert read_prompts(path) == [parse_line(line)]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_lines_end_in_every_way(tmp_path, end, monkeypatch):
    lines = ["a [dog]", "", "# no", "a [cat]", "a [bird"]
    (tmp_path / "p.txt").write_bytes(end.join(lines[:4]).encode())
    (tmp_path / "t.txt").write_bytes(f"a {{}}{end}the {{}}{end}".encode())
    for size in (2**18, 1, 7, 8):  # chunks end before, within and after the end of a line
        monkeypatch.setattr("synthgen.untrusted._CHUNK", size)
        (tmp_path / "p.txt").write_bytes(end.join(lines[:4]).encode())
        assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["a dog", "a cat"]
        assert read_templates(tmp_path / "t.txt") == ["a {}", "the {}"]
        (tmp_path / "p.txt").write_bytes(end.join(lines).encode())
        with pytest.raises(PromptError, match="line 5"):
            read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("coding", "place"),
    [
        ("LATIN1", "byte 5, 0xfc"),
        ("UTF-16LE", "byte 1, 0x00"),
        ("UTF-16BE", "byte 0, 0x00"),
        ("UTF-16", "byte 0, 0xff"),
    ],
)
def test_the_suggested_command_makes_the_file_readable(tmp_path, coding, place):
    path = tmp_path / "my prompts.txt"
    text = "\ufeff犬と猫" if coding == "UTF-16" else "ein Hündchen"
    path.write_bytes(text.encode("UTF-16LE" if coding == "UTF-16" else coding))
    with pytest.raises(PromptError, match=rf"not UTF-8 \({place}\).*from {coding} or whatever") as caught:
        read_prompts(path)
    command = str(caught.value).partition("written in: ")[2]
    assert command == f"iconv -f {coding} -t UTF-8 '{path}' > NEW.txt"
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert [prompt.text for prompt in read_prompts(tmp_path / "NEW.txt")] == [text.lstrip("\ufeff")]


def test_a_zero_byte_is_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("synthgen.untrusted._CHUNK", 16)
    path = tmp_path / "t.txt"
    path.write_bytes("a photo of a {}\nthe {} at né\0ght\n".encode())
    with pytest.raises(PromptError, match=r"byte 29, 0x00"):
        read_templates(path)


def placed(text, words):
    """By patterns, each place tried: what ``find_words`` is held against."""
    plain = re.compile(r"(?<!\w)"), re.compile(r"(?!\w)")
    before, after = plain if text.isascii() else _edges()
    for order in (sorted(range(len(words)), key=lambda number: -len(words[number])), range(len(words))):
        found = {}
        for number in order:
            spelled = re.compile(re.escape(words[number]), re.IGNORECASE)
            for first in range(len(text)):
                match = spelled.match(text, first)
                whole = match and match.end() > first and before.match(text, first) and after.match(text, match.end())
                if whole and all(match.end() <= start or first >= stop for start, stop in found.values()):
                    found[number] = match.span()
                    break
        if len(found) == len(words):
            return [found[number] for number in range(len(words))]
    return None


def test_find_words_agrees_with_regular_expressions():
    draw, both = random.Random(0), 0
    for letters in ("ab -'A", "a bé-É", "sSſkK\u212aIiıİ", "犬a猫 b", "a\u0301 ท\u0e35bA", "σςΣ βϐ µμ"):
        for _ in range(400):
            text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 14)))
            starts = [draw.randrange(len(text)) for _ in range(draw.randint(1, 4))]
            words = [text[start : start + draw.randint(1, 4)].strip() for start in starts]
            words = [draw.choice((word, word.upper(), word.lower(), word.swapcase())) for word in words]
            expected = placed(text, words)
            both += expected is not None
            if expected is None:
                with pytest.raises(ValueError, match="is not in the prompt"):
                    find_words(text, words)
            else:
                assert find_words(text, words) == expected
    assert both > 300


def test_case_is_ignored_as_in_regular_expressions():
    letters = [letter for letter in map(chr, range(0x20000)) if letter.lower() != letter or letter.upper() != letter]
    assert len(letters) > 2500
    for letter in letters[::3] + list("ıİſ\u212a\u1fd3\ufb06ς"):
        spelled = re.compile(re.escape(letter), re.IGNORECASE)
        for other in (letter.lower(), letter.upper(), letter.casefold(), "i", "s"):
            if len(other) == 1:
                assert bool(spelled.fullmatch(other)) == (_folded(letter) == _folded(other)), (letter, other)


def test_an_empty_word_is_refused_by_templates():
    with pytest.raises(PromptError, match="marks no word to put into"):
        expand([Prompt("", ("",), ((0, 0),), " ")], ["a {}"])
