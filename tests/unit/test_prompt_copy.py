"""A run's own copy of its prompts: the bytes of one written whole, any prompt by its number, and little in memory."""

import json
import tracemalloc
from dataclasses import asdict, replace

import pytest

from synthgen import codecs
from synthgen.errors import CorruptFile, MissingArtifact, PromptError, StaleArtifact
from synthgen.prompt_copy import Content, content_of, ensure_copy, iter_lines, open_copy
from synthgen.prompts import iter_prompts, parse_line, read_prompts
from synthgen.stores import parse_location
from synthgen.stores.cache import cache_folder

LINES = [
    f"a [disc {number}] beside a\u2028[W\u00fcrfel] 犬" for number in range(600)
]  # three blocks, the last not full
PROMPTS = [parse_line(line) for line in LINES]


@pytest.fixture(autouse=True)
def afresh():
    """Copies are opened once in each process; each test is to begin with none."""
    open_copy.cache_clear()


@pytest.fixture
def folder(tmp_path):
    ensure_copy(tmp_path, PROMPTS, content_of(PROMPTS))
    return tmp_path


def opened(folder, prompts=PROMPTS):
    return open_copy(folder, content_of(prompts).sha256)


def test_the_copy_has_the_bytes_of_one_written_whole(folder):
    rows = [json.dumps(codecs.prompt_to_json(prompt), ensure_ascii=False, sort_keys=True) for prompt in PROMPTS]
    assert (folder / "prompts.jsonl").read_bytes() == ("\n".join(rows) + "\n").encode()
    assert [line.decode().rstrip("\n") for line in iter_lines(folder / "prompts.jsonl")] == rows


def test_any_prompt_by_its_number(folder):
    prompts = opened(folder)
    assert len(prompts) == len(PROMPTS)
    assert [prompts[number] for number in range(600)] == PROMPTS
    for number in (599, 0, 256, 255, 512):
        assert prompts[number] == PROMPTS[number]
    for number in (-1, 600):
        with pytest.raises(IndexError, match="there are 600"):
            prompts[number]


def test_prompts_that_fill_one_block_or_less_are_read(tmp_path):
    for count in (1, 255, 256, 257):
        ensure_copy(tmp_path / str(count), PROMPTS[:count], content_of(PROMPTS[:count]))
        prompts = opened(tmp_path / str(count), PROMPTS[:count])
        assert [prompts[number] for number in range(len(prompts))] == PROMPTS[:count]


def test_only_one_block_of_prompts_is_in_memory(tmp_path):
    path, count = tmp_path / "p.txt", 8_000
    path.write_text("".join(f"a [golden retriever] beside a [house number {number}]\n" for number in range(count)))
    tracemalloc.start()
    content = content_of(iter_prompts(path))
    ensure_copy(tmp_path, iter_prompts(path), content)
    prompts = open_copy(tmp_path, content.sha256)
    assert prompts[count - 1].words == ("golden retriever", f"house number {count - 1}")
    bounded = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    held = read_prompts(path)
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == len(prompts) == count
    assert bounded < 3e6
    assert whole > 3 * bounded


# -- written once, and again where it is not whole


def test_a_complete_copy_is_not_written_again(folder):
    before = (folder / "prompts.jsonl").stat().st_mtime_ns, (folder / "prompts.json").stat().st_mtime_ns
    ensure_copy(folder, iter(()), content_of(PROMPTS))  # no prompt is even looked at
    assert before == ((folder / "prompts.jsonl").stat().st_mtime_ns, (folder / "prompts.json").stat().st_mtime_ns)


@pytest.mark.parametrize("damage", ["cut", "byte", "gone", "no mark", "bad mark"])
def test_an_incomplete_copy_is_written_again(folder, damage):
    path, mark = folder / "prompts.jsonl", folder / "prompts.json"
    data, said = path.read_bytes(), mark.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-7])
    elif damage == "byte":
        path.write_bytes(data[:90] + b"x" + data[91:])
    elif damage == "bad mark":
        mark.write_bytes(said[:40])
    else:
        (path if damage == "gone" else mark).unlink()
    ensure_copy(folder, PROMPTS, content_of(PROMPTS))
    assert (path.read_bytes(), mark.read_bytes()) == (data, said)


def test_prompts_that_change_while_they_are_read_leave_no_copy(tmp_path):
    with pytest.raises(PromptError, match="changed while they were read"):
        ensure_copy(tmp_path, PROMPTS[1:], content_of(PROMPTS))
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingArtifact, match="is not finished"):
        opened(tmp_path)


def test_a_failure_while_writing_keeps_the_old_copy(folder):
    def broken():
        yield from PROMPTS[1:300]
        raise PromptError("line 301")

    data = (folder / "prompts.jsonl").read_bytes()
    with pytest.raises(PromptError, match="line 301"):
        ensure_copy(folder, broken(), content_of(PROMPTS[1:]))
    assert (folder / "prompts.jsonl").read_bytes() == data
    assert {path.name for path in folder.iterdir()} == {"prompts.jsonl"}  # its mark spoke of other prompts


# -- read by workers


def test_other_prompts_are_refused(folder):
    with pytest.raises(StaleArtifact, match="has been given other prompts"):
        opened(folder, PROMPTS[1:])
    ensure_copy(folder, PROMPTS[1:], content_of(PROMPTS[1:]))
    assert opened(folder, PROMPTS[1:])[0] == PROMPTS[1]
    with pytest.raises(StaleArtifact):
        opened(folder)


def test_a_damaged_line_is_named_and_can_be_repaired(folder):
    path = folder / "prompts.jsonl"
    data = path.read_bytes()
    place = len(b"".join(data.splitlines(keepends=True)[:300]))
    path.write_bytes(data[:place] + b"[" + data[place + 1 :])
    prompts = opened(folder)
    assert prompts[299] == PROMPTS[299]
    with pytest.raises(CorruptFile, match=r"prompts\.jsonl: line 301 cannot be read; .*generate --prompts FILE"):
        prompts[300]
    path.write_bytes(data)
    assert prompts[300] == PROMPTS[300]
    path.write_bytes(data[:-9])
    with pytest.raises(CorruptFile, match="shorter"):
        prompts[599]
    path.unlink()
    with pytest.raises(CorruptFile, match="it is missing"):
        prompts[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 601 + 256}, {"count": "600"}, {"count": True}, {"bytes": 1}, {"bytes": 2**40}, {"sha256": 7},
        {"every": 0}, {"every": 1}, {"blocks": [0, 5]}, {"blocks": [1, 5, 9]}, {"blocks": [0, 9, 5]},
        {"blocks": [0, 5, None]}, {"blocks": None}, {"blocks": []},
    ],
)  # fmt: skip
def test_invalid_marks_are_ignored(folder, wrong):
    mark = folder / "prompts.json"
    mark.write_text(json.dumps(asdict(content_of(PROMPTS)) | wrong))
    with pytest.raises(MissingArtifact, match="is not finished"):
        opened(folder)


def test_a_mark_with_another_block_size_is_read(folder):
    content = content_of(PROMPTS)
    lines = (folder / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    places = [sum(map(len, lines[:number])) for number in range(0, 600, 100)]
    changed: Content = replace(content, every=100, blocks=tuple(places))
    (folder / "prompts.json").write_text(json.dumps(asdict(changed)))
    prompts = opened(folder)
    assert [prompts[number] for number in range(600)] == PROMPTS


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_from_a_store_only_one_block_is_requested(store, tmp_path, kind):
    place = parse_location(store.url("run") if kind == "s3" else f"memory://{tmp_path.name}/run")
    ensure_copy(tmp_path, PROMPTS, content_of(PROMPTS))
    ensure_copy(place, PROMPTS, content_of(PROMPTS))
    for name in ("prompts.jsonl", "prompts.json"):
        assert (place / name).read_bytes() == (tmp_path / name).read_bytes()
    ensure_copy(place, iter(()), content_of(PROMPTS))
    prompts = opened(place)
    begun = len(store.lines)
    assert [prompts[number] for number in (300, 301, 511, 599)] == [PROMPTS[number] for number in (300, 301, 511, 599)]
    if kind == "s3":
        assert store.lines[begun:] == ["GET /bucket/run/prompts.jsonl"] * 2
    assert not (cache_folder() / "files").exists() or not list((cache_folder() / "files").iterdir())
