"""Every method through the stage: resuming, processes, what is exported, and data that does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact, StorageError, UnknownName
from synthgen.image import encode_png
from synthgen.methods import METHODS
from synthgen.models.dual import load_dual_encoder
from synthgen.models.vit import load_encoder
from synthgen.options import method_settings
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.stages import make_stage
from synthgen.stages._integrity import check_encoder
from synthgen.stores.tar import TarWriter
from synthgen.train.checkpoint import load_method
from tests.factories import make_generation

ROOT = Path(__file__).parents[2]
NAMES = METHODS.names()
LABELS = {"class_labels": True}  # of methods that condition on classes
FORMS = [*((name, {}) for name in NAMES), ("maskdit", LABELS), ("umd", LABELS)]
SMALL = {
    "encoder": {"name": "micro", "dim": 32, "depth": 2, "num_heads": 2},
    "samples_seen": 48,
    "batch_size": 8,
    "export": False,
    "log_every": 1,
    "save_every": 3,
    "num_workers": 0,
}
WORDS = (("disc",), ("square",), ("disc", "square"))


def members(number: int, words: tuple[str, ...] | None = None, **changes: bytes | None) -> dict[str, bytes]:
    """A sample of a shard; ``None`` takes a member out."""
    words = WORDS[number % 3] if words is None else words
    generation, truth = make_generation(f"{number:010d}", words or ("disc",), 32, seed=number)
    labels = (truth * np.arange(1, len(truth) + 1)[:, None, None]).max(0).astype(np.uint8)
    found = {
        "png": encode_png(generation.image),
        "txt": f"{generation.request.prompt.text} on table {number % 5}".encode(),
        "json": json.dumps({"words": list(words), "label": (*words, "none")[0]}).encode(),
        "mask.png": encode_png(labels),
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


def write(path: Path, samples: list[dict[str, bytes]]) -> str:
    with TarWriter(path) as tar:
        for number, sample in enumerate(samples):
            tar.add(f"{number:010d}", sample)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "000000.tar", [members(number) for number in range(24)])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def train(run: Run, data: str, method: str, progress: Progress | None = None, **changes: object) -> Path:
    """Pretrain with the guided form of ``method``; the folder it leaves."""
    options = {"name": method, **METHODS.load(method).guided, **changes.pop("options", {})}
    settings = SMALL | {"method": options, "data": [data]} | changes
    run_stage(make_stage("pretrain", settings), run, Local(workers=1), progress)
    return run.folder(f"pretrain/{settings.get('label') or method}")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sha256(folder: Path) -> str:
    newest = max((folder / "checkpoints").iterdir())  # teachers, queues and moments too, but for how long it took
    tensors = load_method(folder).state_dict()
    assert newest.name == "step-00000006.safetensors"
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


class Killed(BaseException):
    """Stands in for a kill."""


class KillAt(Progress):
    def __init__(self, step: int) -> None:
        self.left = step

    def describe(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.mark.parametrize(("name", "more"), FORMS)
def test_every_method_resumes_to_the_same_weights(name, more, run, data, tmp_path):
    options = more | ({"queue": 10} if name == "contrastive" else {})
    whole = train(run, data, name, options=options)
    assert len(losses(whole)) == 6
    other = Run.create(tmp_path / "killed")
    with pytest.raises(Killed):
        train(other, data, name, KillAt(5), options=options)
    again = train(other, data, name, options=options, num_workers=1)
    assert sha256(again) == sha256(whole)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_method_in_bf16_with_accumulation(name, options, run, data):
    folder = train(run, data, name, options=options, precision="bf16", accumulate=2, samples_seen=16)
    assert np.isfinite(losses(folder)).all()
    assert len(losses(folder)) == 2


def test_samples_seen_counts_images(run, data):
    folder = train(run, data, "mae", samples_seen=60)  # 24 images: two epochs and a half
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert records[-1]["learning_rate"] < records[3]["learning_rate"]  # the schedule ends with the budget
    assert json.loads((folder / "done.json").read_text())["steps"] == 8


def train_apart(run: Run, trainings: list[dict], *launcher: str) -> None:
    """Trainings in processes of their own, without the checks of shapes that tests are under."""
    script = run.path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import json, sys
            from synthgen.stages import make_stage
            from synthgen.engines.local import Local
            from synthgen.run import Run
            from synthgen.runner import run_stage

            if __name__ == "__main__":
                for settings in json.loads(sys.argv[2]):
                    run_stage(make_stage("pretrain", settings), Run.open(sys.argv[1]), Local(workers=1))
        """)
    )
    command = [sys.executable, *launcher, str(script), str(run.path), json.dumps(trainings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=run.path, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[:3000]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(run, data):
    """``accelerate launch`` on two CPU processes, the same step: equal up to the order of sums, here 1e-4."""
    trainings = []
    more = {"contrastive": {"queue": 10}, "vlp": {"position_share": 0.5}}
    for name, told in FORMS:
        options, label = more.get(name, {}) | told, f"{name}-told" if told else name
        train(run, data, name, options=options, label=label)
        method = {"name": name, **METHODS.load(name).guided, **options}
        trainings.append(SMALL | {"method": method, "data": [data], "label": f"{label}-both"})
    two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "29613"]
    train_apart(
        run, trainings, "-m", "accelerate.commands.launch", *two, "--mixed_precision", "no", "--dynamo_backend", "no"
    )
    for label in (f"{name}-told" if told else name for name, told in FORMS):
        both = run.folder(f"pretrain/{label}-both")
        assert json.loads((both / "done.json").read_text())["processes"] == 2
        assert losses(both) == pytest.approx(losses(run.folder(f"pretrain/{label}")), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_similar_losses(run, data):
    short = SMALL | {"samples_seen": 24, "data": [data], "method": "mae"}
    train_apart(run, [short | {"label": "plain"}, short | {"label": "compiled", "compile": True}])
    plain, compiled = run.folder("pretrain/plain"), run.folder("pretrain/compiled")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert load_encoder(compiled).state_dict().keys() == load_encoder(plain).state_dict().keys()


# -- what is exported


def test_vlp_exports_both_towers(run, data):
    folder = train(run, data, "vlp")
    dual, method = load_dual_encoder(folder), load_method(folder)
    images = torch.rand(3, 3, 32, 32)
    texts = ["a photo of a disc", "a square", "ein Hund 🐕 with many, many words " * 20]
    v, u = dual.embed_images(images), dual.embed_texts(texts)
    assert v.shape == u.shape == (3, 256)
    assert torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(u.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not v.requires_grad
    assert not u.requires_grad
    with torch.no_grad():
        read = [" ".join(text.split()[:22]) for text in texts]  # max_words, as in training
        told = method.text_head(method.text(*method.tokenizer(read))[:, 0])
        seen = method.image_head(method.encoder(images)[:, 1:].mean(1))
    assert torch.allclose(torch.nn.functional.normalize(told), u, atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(seen), v, atol=1e-6)
    assert torch.allclose(dual.embed_texts(texts[:1]), u[:1], atol=1e-5)  # padding changes nothing
    whole, begun = dual.embed_texts(["a disc " * 15, "a disc " * 11])  # 30 words and 22
    assert torch.equal(whole, begun)
    described = json.loads((folder / "text.json").read_text())
    assert described.pop("max_words") == 22
    (folder / "text.json").write_text(json.dumps(described))
    with pytest.raises(CorruptFile, match=r"text\.json\.max_words: this setting is required"):
        load_dual_encoder(folder)
    (folder / "text.json").write_text(json.dumps(described | {"max_words": 22}))
    whole = (folder / "text.safetensors").read_bytes()
    (folder / "text.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFile, match=r"text\.safetensors is cut off, or a byte of it is wrong.*synthgen pretrain"):
        check_encoder(folder)
    (folder / "text.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFile, match="the text tower in"):
        load_dual_encoder(folder)
    assert train(run, data, "vlp") == folder  # which makes it again
    check_encoder(folder)
    assert (folder / "text.safetensors").read_bytes() == whole


def test_a_training_without_texts_has_no_text_tower(run, data):
    folder = train(run, data, "mae", samples_seen=8)
    with pytest.raises(MissingArtifact, match=r"has no text tower \(text.json is missing\); .*--method vlp"):
        load_dual_encoder(folder)


def test_the_whole_method_can_be_loaded(run, data):
    folder = train(run, data, "umd", samples_seen=16)
    method = load_method(folder)
    assert method.sample(torch.arange(2), num_steps=2).shape == (2, 3, 32, 32)
    assert method.hiding.share == 0.5
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(MissingArtifact, match="no checkpoint"):
        load_method(folder)


@pytest.mark.parametrize("name", [name for name, options in FORMS if options])
def test_a_loaded_method_has_the_classes_of_its_training(name, run, data):
    folder = train(run, data, name, options=LABELS, samples_seen=16)
    method = load_method(folder)
    assert method.classes.names == ("disc", "square")
    drawn = method.sample(torch.arange(2), 2, labels=["disc", 1], guidance_scale=1.5)
    assert drawn.shape == (2, 3, 32, 32)
    with pytest.raises(UnknownName, match="unknown class 'disk'; did you mean 'disc'"):
        method.sample(torch.arange(2), 2, labels="disk")
    trained = load_file(folder / "encoder.safetensors")
    plain = train(run, data, name, samples_seen=16, label="plain")
    assert trained.keys() == load_file(plain / "encoder.safetensors").keys()
    assert {tensor.shape for tensor in trained.values()} == {
        tensor.shape for tensor in load_encoder(plain).state_dict().values()
    }


# -- data that does not fit


def test_missing_masks_are_refused(run, tmp_path):
    bare = write(tmp_path / "bare.tar", [members(number, (), **{"mask.png": None}) for number in range(8)])
    for name in NAMES:
        with pytest.raises(ConfigError, match=rf"^{name}, .*bare\.tar: no mask in the 8 samples looked at"):
            train(run, bare, name)


def test_some_masks_are_enough_and_are_counted(run, tmp_path):
    half = [members(number) if number % 2 else members(number, (), **{"mask.png": None}) for number in range(16)]
    folder = train(run, write(tmp_path / "half.tar", half), "contrastive", samples_seen=32)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < sum(record["with_words"] for record in records) / len(records) < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_step_without_words_are_averaged_with_those_that_have_some(name, run, tmp_path):
    few = [members(number) if number < 3 else members(number, (), **{"mask.png": None}) for number in range(16)]
    path = write(tmp_path / "few.tar", few)
    folder = train(run, path, name, batch_size=4, accumulate=2, samples_seen=16)
    assert np.isfinite(losses(folder)).all()


def test_missing_texts_are_refused(run, tmp_path):
    mute = write(tmp_path / "mute.tar", [members(number, txt=None) for number in range(8)])
    with pytest.raises(ConfigError, match=r"^vlp, .*mute\.tar: no text in the 8 samples looked at"):
        train(run, mute, "vlp")
    train(run, mute, "contrastive", samples_seen=8)


@pytest.mark.parametrize("name", [name for name, options in FORMS if options])
def test_missing_labels_are_refused(name, run, tmp_path):
    meta = json.dumps({"words": ["disc"]}).encode()
    bare = write(tmp_path / "bare.tar", [members(number, ("disc",), json=meta) for number in range(8)])
    with pytest.raises(ConfigError, match=rf"^{name}, .*bare\.tar: no label in the 8 samples looked at, and class_lab"):
        train(run, bare, name, options=LABELS)
    numbered = [members(number, ("disc",), json=meta, cls=str(7 * (number % 2)).encode()) for number in range(8)]
    folder = train(run, write(tmp_path / "numbered.tar", numbered), name, options=LABELS, samples_seen=8)
    assert load_method(folder).classes.names == ("0", "7")


def test_some_texts_are_enough_and_are_counted(run, tmp_path):
    half = [members(number, (), txt=b"a disc" if number % 2 else None, **{"mask.png": None}) for number in range(16)]
    folder = train(run, write(tmp_path / "half.tar", half), "vlp", samples_seen=16, options={"region_weight": 0.0})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["with_text"] for record in records) / 2 == pytest.approx(0.5)


def test_one_class_is_enough_and_one_word_is_not(run, tmp_path):
    one = write(tmp_path / "one.tar", [members(number, ("disc",)) for number in range(8)])
    for name in set(NAMES) - {"contrastive"}:
        assert np.isfinite(losses(train(run, one, name, samples_seen=8))).all()
    with pytest.raises(ConfigError, match="have the one word 'disc'"):
        train(run, one, "contrastive")


def test_a_broken_member_is_named(run, tmp_path):
    samples = [members(number) for number in range(40)]
    samples[33]["mask.png"] = b"no"
    broken = write(tmp_path / "broken.tar", samples)
    for name in NAMES:
        with pytest.raises(CorruptFile, match=r"^sample 0000000033 of .*broken\.tar cannot be read"):
            train(run, broken, name, samples_seen=40)


def test_a_broken_member_is_named_by_loader_processes_too(run, tmp_path):
    samples = [members(number) for number in range(64)]
    samples[33]["mask.png"] = b"no"  # not among the 32 that are looked at before anything starts
    broken = write(tmp_path / "broken.tar", samples)
    told = []
    for num_workers in (0, 1):
        with pytest.raises(CorruptFile, match=r"^sample 0000000033 of .*broken\.tar cannot be read") as caught:
            train(run, broken, "mae", samples_seen=64, num_workers=num_workers)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_one_line(run, data):
    folder = run.folder("pretrain/mae")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"^cannot write .*mae/metrics\.jsonl: No space left on device; free some"):
        train(run, data, "mae")


def test_a_batch_is_never_larger_than_the_data(run, tmp_path):
    few = write(tmp_path / "few.tar", [members(number) for number in range(3)])
    for name in NAMES:
        folder = train(run, few, name, batch_size=512, samples_seen=6)
        assert len(losses(folder)) == 2


def test_a_single_image_is_refused_by_methods_that_compare(run, tmp_path):
    one = write(tmp_path / "one.tar", [members(2)])
    for name in ("contrastive", "vlp"):
        with pytest.raises(ConfigError, match=rf"{name} compares images, and 1 at once \(of 1, .* needs 2 or more"):
            train(run, one, name)
    train(run, one, "mae", samples_seen=1)


def test_a_wrong_tokenizer_is_refused(run, data, tmp_path):
    with pytest.raises(MissingArtifact, match="there is no tokenizer"):
        train(run, data, "vlp", options={"tokenizer": str(tmp_path / "none.json")})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        train(run, data, "vlp", options={"tokenizer": str(tmp_path)})


def test_guided_on_the_command_line_sets_the_methods_option():
    told = {"method": {"name": "vlp", "region_weight": 1.0}, "label": "vlp-guided"}
    assert method_settings("vlp", guided=True, label=None, extra=None) == told
    assert method_settings("vlp", guided=True, label="mine", extra=None) == told | {"label": "mine"}
    assert method_settings("vlp", guided=False, label=None, extra=None) == {"method": "vlp", "label": None}
    with pytest.raises(UnknownName, match="did you mean 'contrastive'"):
        method_settings("contrastiv", guided=True, label=None, extra=None)


def test_a_changed_scorer_is_another_training(data, run, tmp_path):
    """A training whose scorer's weights were replaced is refused."""
    scorer = shutil.copytree(train(run, data, "mae"), tmp_path / "scorer")
    train(run, data, "automae", options={"scorer": str(scorer)})
    train(run, data, "automae", options={"scorer": str(scorer)})  # nothing to do
    weights = scorer / "encoder.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(StaleArtifact, match=r"method\.scorer"):
        train(run, data, "automae", options={"scorer": str(scorer)})
