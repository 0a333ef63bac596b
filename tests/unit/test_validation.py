"""Problems of data sets, put into a sound one, are found; a sound one has none."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from synthgen import api
from synthgen.engines.local import Local
from synthgen.errors import MissingArtifact
from synthgen.image import encode_jpeg, encode_png
from synthgen.progress import Progress
from synthgen.stores.tar import TarWriter
from synthgen.validation import validate_shards
from tests.factories import make_run

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
LABELS = np.zeros((16, 16), np.uint8)
META = {"words": ["disc", "square"], "score": 0.5, "box": [0, 1, 2, 3], "parts": [], "about": {"name": "x"}}


def sample(**changes):
    """The members of a sound sample; None leaves one out."""
    meta = json.dumps(META).encode()
    members = {"cls": b"3", "jpg": encode_jpeg(PIXELS), "json": meta, "mask.png": encode_png(LABELS), "txt": b"a disc"}
    members |= {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in members.items() if value is not None}


def write(path, *samples, start=0):
    with TarWriter(path) as tar:
        for number, members in enumerate(samples, start):
            tar.add(f"{number:010d}", members)


def with_meta(**changes):
    return sample(json=json.dumps({**META, **changes}).encode())


def problems(folder, **options):
    return [str(finding) for finding in validate_shards(folder, **options).findings]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run") / "r", units=4)
    api.shards(run, samples_per_shard=8, val_ratio=0.2, engine=Local(workers=1))
    return run.folder("shards")


@pytest.fixture
def copy(shards, tmp_path):
    for path in shards.rglob("*.*"):
        target = tmp_path / path.relative_to(shards)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def test_own_shards_are_sound(shards):
    found = validate_shards(shards)
    assert found.valid
    assert not found.findings
    assert found.samples == 24
    assert found.tars == len(list(shards.glob("*/*.tar")))
    assert found.members == ("cls", "jpg", "json", "mask.png", "txt")
    assert not problems(shards / "train")
    assert not problems(shards / "train" / "000000.tar")


def test_other_programs_tars_are_sound_too(tmp_path):
    write(tmp_path / "part-00.tar", {"png": encode_png(PIXELS)}, {"png": encode_png(PIXELS)})
    write(tmp_path / "part-01.tar", {"png": encode_png(PIXELS)}, start=2)
    assert not problems(tmp_path)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (sample(mask_png=None), "error: samples have different members"),
        (sample(jpg=None), "error: a sample has 0 images"),
        (sample(png=encode_png(PIXELS)), "error: a sample has 2 images"),
        (sample(jpg=b"no image"), "error: an image cannot be decoded"),
        (sample(mask_png=b"no image"), "error: a mask.png cannot be decoded"),
        (sample(mask_png=encode_png(PIXELS)), "error: a mask.png cannot be decoded"),
        (sample(mask_png=encode_png(LABELS[:8])), "error: a mask.png has another size than its image"),
        (sample(mask_png=encode_png(LABELS + 3)), "error: a mask.png has labels above the number of words"),
        (sample(txt=b" \n"), "warning: a txt is empty"),
        (sample(txt=b"\xff"), "error: a txt is not UTF-8"),
        (sample(cls=b"disc"), "error: a cls is not a whole number"),
        (sample(json=b"{"), "error: a json is not a JSON object"),
        (sample(json=b"[]"), "error: a json is not a JSON object"),
        (with_meta(score=1), "error: the json changes its keys or types"),
        (with_meta(more=1), "error: the json changes its keys or types"),
        (with_meta(about={"name": 1}), "error: the json changes its keys or types"),
        (with_meta(words=[1]), "error: the json changes its keys or types"),
        (with_meta(parts=[1, "x"]), "error: a list in the json has items of several types"),
        (with_meta(score=None), "warning: the json has null values"),
        (sample(pyd=b""), "error: members of the types pyd"),
    ],
)
def test_a_sample_that_breaks_a_reader_is_named(tmp_path, other, problem):
    write(tmp_path / "000000.tar", sample(), sample(), other, other)
    found = problems(tmp_path)
    (line,) = [line for line in found if line.startswith(problem)]
    assert "first in 000000.tar, sample 0000000002" in line
    assert line.endswith("(2 times)")
    assert validate_shards(tmp_path).valid == problem.startswith("warning")


@pytest.mark.parametrize(
    "other", [with_meta(parts=[{"a": 1}]), with_meta(box=[]), sample(mask_png=encode_png(LABELS + 255))]
)
def test_empty_lists_and_ignored_pixels_are_no_problem(tmp_path, other):
    write(tmp_path / "000000.tar", sample(), other)
    assert not problems(tmp_path)


def test_problems_between_tars_are_found(tmp_path):
    write(tmp_path / "train" / "000000.tar", sample(), sample())
    write(tmp_path / "train" / "000002.tar", with_meta(score="high"), start=2)
    write(tmp_path / "val" / "000000.tar", sample(txt=None), start=1)
    write(tmp_path / "val" / "last.tar", sample(), start=7)
    found = problems(tmp_path)
    assert [line.partition(":")[0] for line in found] == ["error"] * 4 + ["warning"]
    text = "\n".join(found)
    assert "different members, which Hugging Face datasets refuses or drops; first in val/000000.tar" in text
    assert "keys or types, which tables cannot hold; first in train/000002.tar: score" in text
    assert "a key occurs twice, which wids and NeMo Curator refuse; first in val/000000.tar, sample 0000000001" in text
    assert "have gaps, which stops readers of {000000..000009}; first in train: 1" in text
    assert "names of the tars are not one prefix and a number" in text


def test_gaps_are_counted_and_not_listed(tmp_path):
    for number, name in enumerate(("20250101000000", "20260101000000")):
        write(tmp_path / f"{name}.tar", sample(), start=number)
    (finding,) = validate_shards(tmp_path).findings
    assert (finding.count, finding.first) == (9_999_999_999, f"{tmp_path.name}: 20250101000001")


def test_each_kind_of_problem_is_one_finding(tmp_path):
    write(tmp_path / "000000.tar", *(with_meta(**{f"key{number}": 1}) for number in range(300)))
    (finding,) = validate_shards(tmp_path).findings
    assert finding.count == 299
    assert finding.first == "000000.tar, sample 0000000001: key0"


def test_side_files_of_other_programs_are_no_problem(tmp_path):
    write(tmp_path / "00000.tar", sample(), sample())
    stats = {"count": 5, "successes": 2, "failed_to_download": 3}  # as img2dataset counts
    (tmp_path / "00000_stats.json").write_text(json.dumps(stats))
    for manifest in ({"name": "set", "classes": ["a"]}, {"shards": 3}, {"shards": ["a.tar"]}):
        (tmp_path / "dataset.json").write_text(json.dumps(manifest))
        assert not problems(tmp_path)
    for rows in (None, ["00000.tar"]):
        (tmp_path / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": rows}))
        assert not problems(tmp_path)


def test_a_tar_that_ends_early_is_found(copy):
    path = copy / "train" / "000000.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    found = problems(copy)
    assert any(
        line.startswith("error: the tar cannot be read to its end; first in train/000000.tar: ") for line in found
    )
    assert any("than its _stats.json" in line for line in found)


def test_a_changed_byte_is_found_by_the_checksum(copy):
    path = copy / "train" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"a photo of")] ^= 1
    path.write_bytes(data)
    (line,) = problems(copy, decode=False)
    assert line.startswith("error: a tar has another number of samples or another sha256 than its _stats.json")


def test_side_files_that_do_not_fit_are_found(copy):
    extra = copy / "train" / f"{len(list((copy / 'train').glob('*.tar'))):06d}.tar"
    write(extra, sample(), start=999999)
    (copy / "README.md").unlink()
    (copy / "index-val.json").write_text("[")
    found = "\n".join(problems(copy))
    assert "sizes.json does not list the tars" in found
    assert "the list of tars and samples is not that of the folder; first in dataset.json" in found
    assert "no data_files in README.md" in found
    assert "is not a JSON object; first in index-val.json" in found


def test_a_tar_that_a_wids_index_misses_is_found(copy):
    (copy / "val" / "000000.tar").rename(copy / "val" / "000001.tar")
    assert any("a wids index lists a tar that is missing" in line for line in problems(copy))


def test_without_decoding_pixels_are_not_looked_at(tmp_path):
    write(tmp_path / "000000.tar", sample(), sample(jpg=b"no image"))
    assert len(problems(tmp_path)) == 1
    assert not problems(tmp_path, decode=False)


def test_progress_counts_tars(shards):
    class Counter(Progress):
        total = done = 0

        def start(self, stage, total, done):
            self.total = total

        def advance(self, count):
            self.done += count

    counter = Counter()
    validate_shards(shards, decode=False, progress=counter)
    assert counter.done == counter.total == len(list(shards.glob("*/*.tar")))


def test_the_command_fails_on_shards_that_are_not_valid(copy):
    line = [sys.executable, "-m", "synthgen", "validate", str(copy)]
    sound = subprocess.run(line, capture_output=True, text=True)
    assert (sound.returncode, sound.stdout.splitlines()[-1]) == (0, "valid")
    write(copy / "train" / "000000.tar", sample(cls=b"x"))
    damaged = subprocess.run([*line, "--json", "--no-decode"], capture_output=True, text=True)
    assert damaged.returncode == 2
    found = json.loads(damaged.stdout)
    assert not found["valid"]
    assert "a cls is not a whole number" in [one["problem"] for one in found["findings"]]


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(MissingArtifact, match="no tars in"):
        validate_shards(tmp_path)
    with pytest.raises(MissingArtifact, match="no folder"):
        validate_shards(tmp_path / "none")
