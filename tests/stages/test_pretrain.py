"""Pretraining: what it leaves behind, and that stopping it at any moment changes nothing."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from synthgen.config import Choice
from synthgen.datasets import FolderDataset
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact, SynthgenError, UnknownName
from synthgen.methods import METHODS
from synthgen.models.vit import load_encoder
from synthgen.run import Run
from synthgen.runner import Progress, run_stage
from synthgen.stages import make_stage
from synthgen.stages._data_check import probe
from synthgen.stages.pretrain import Pretrain
from synthgen.stages.shards import Shards
from synthgen.train.checkpoint import Checkpoints
from synthgen.train.launch import check_precision
from synthgen.train.loop import Training
from tests.factories import make_run, record_settings

ROOT = Path(__file__).parents[2]
SMALL = {
    "encoder": Choice("micro", {"dim": 32, "depth": 2, "num_heads": 2}),
    "epochs": 4,
    "batch_size": 8,
    "export": False,
    "log_every": 1,
    "save_every": 3,
    "num_workers": 0,
}
ONE = Local(workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 24 samples, finished to its shards; tests take copies."""
    path = tmp_path_factory.mktemp("source") / "run"
    run = make_run(path, units=2, unit_size=12, image_size=32)
    run_stage(Shards(val_ratio=0.0), run, ONE)
    return path


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(source, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nobody stopped."""
    run = Run.open(shutil.copytree(source, tmp_path_factory.mktemp("whole") / "run"))
    run_stage(Pretrain(**SMALL), run, ONE)
    return run.folder("pretrain/mae")


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder)]


class Killed(BaseException):
    """Stands in for a kill: nothing catches it, and only what is on the disk remains."""


class Killer(Progress):
    def __init__(self, after: int) -> None:
        self.left = after

    def describe(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


def test_what_it_leaves(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "encoder.safetensors", "config.json", "checkpoints", "metrics.jsonl", "done.json", "settings.yaml",
    }  # fmt: skip
    done = json.loads((whole / "done.json").read_text())
    assert done["sha256"] == sha256(whole)
    assert (done["steps"], done["images"]) == (12, 24)
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000009.safetensors",
        "step-00000012.safetensors",
    ]
    assert [record["step"] for record in records(whole)] == list(range(1, 13))
    assert (records(whole)[-1]["epoch"], records(whole)[-1]["loss"]) == (3, done["loss"])
    assert {"learning_rate", "images_per_second", "seconds"} <= set(records(whole)[0])
    encoder = load_encoder(whole)
    assert (encoder.config.image_size, encoder.config.patch_size, encoder.config.dim) == (32, 4, 32)
    assert not list(whole.rglob("*.pt")) + list(whole.rglob("*.bin")) + list(whole.rglob(".*.tmp"))


def test_it_learns_and_repeats(whole, run):
    first, last = losses(whole)[0][1], losses(whole)[-1][1]
    assert last < first
    run_stage(Pretrain(**SMALL), run, ONE)
    assert sha256(run.folder("pretrain/mae")) == sha256(whole)


def test_again_is_nothing_to_do(run, whole):
    shutil.copytree(whole, run.folder("pretrain/mae"))
    record_settings(run, Pretrain(**SMALL).complete())
    before = (whole / "done.json").read_bytes()
    summary = run_stage(Pretrain(**SMALL), run, ONE)
    assert (summary.done_before, summary.samples) == (1, 0)
    assert (run.folder("pretrain/mae") / "done.json").read_bytes() == before


@pytest.mark.parametrize("step", [1, 3, 4, 8, 12])
def test_stopped_anywhere_it_ends_the_same(run, whole, step):
    folder = run.folder("pretrain/mae")
    with pytest.raises(Killed):
        run_stage(Pretrain(**SMALL), run, ONE, Killer(step))
    assert not (folder / "done.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # the line that was being written
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / ".step-00000099.safetensors.1.tmp").write_bytes(b"half")
    summary = run_stage(Pretrain(**SMALL), run, ONE)
    assert summary.samples == (12 - step // 3 * 3) * 8
    assert sha256(folder) == sha256(whole)
    assert losses(folder) == losses(whole)
    assert not list(folder.rglob(".*.tmp"))


def test_killed_process(run, whole):
    """SIGKILL from outside, wherever it hits; then the same command."""
    code = f"""
        import sys
        from synthgen.stages import make_stage
        from synthgen.engines.local import Local
        from synthgen.run import Run
        from synthgen.runner import run_stage
        settings = {dict(SMALL, encoder={"name": "micro", **SMALL["encoder"].options})!r}
        run_stage(make_stage("pretrain", settings), Run.open(sys.argv[1]), Local(workers=1))
    """
    folder = run.folder("pretrain/mae")
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(run.path)], cwd=ROOT)
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) == -signal.SIGKILL
    run_stage(Pretrain(**SMALL), run, ONE)
    assert sha256(folder) == sha256(whole)
    assert losses(folder) == losses(whole)


def test_broken_checkpoint_falls_back_to_the_one_before(run, whole, caplog):
    folder = run.folder("pretrain/mae")
    with pytest.raises(Killed):
        run_stage(Pretrain(**SMALL), run, ONE, Killer(8))
    newest = folder / "checkpoints" / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    run_stage(Pretrain(**SMALL), run, ONE)
    assert "step-00000006.safetensors cannot be read" in caplog.text
    assert sha256(folder) == sha256(whole)


def test_killed_behind_a_checkpoint_in_a_store_it_loses_no_record(run, whole, tmp_path, monkeypatch):
    """There the metrics are sent as a whole, now and then."""
    there = Run.create(f"memory://{tmp_path.name}/killed")
    settings = SMALL | {"data": (str(run.folder("shards") / "train"),)}
    save = Checkpoints.save

    def killed(checkpoints, module, optimizer, step, **state):
        save(checkpoints, module, optimizer, step, **state)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            run_stage(Pretrain(**settings), there, ONE)
    run_stage(Pretrain(**settings), there, ONE)
    assert losses(there.folder("pretrain/mae")) == losses(whole)


def test_without_its_metrics_a_training_ends_all_the_same(run, whole):
    folder = shutil.copytree(whole, run.folder("pretrain/mae"))
    record_settings(run, Pretrain(**SMALL).complete())
    for name in ("metrics.jsonl", "done.json"):
        (folder / name).unlink()
    run_stage(Pretrain(**SMALL), run, ONE)
    assert math.isnan(json.loads((folder / "done.json").read_text())["loss"])


def test_processes_that_see_different_checkpoints_are_an_error(run, monkeypatch):
    """Machines that share no folder: the first would go on, the others begin, and their gradients be added up."""
    with pytest.raises(Killed):
        run_stage(Pretrain(**SMALL), run, ONE, Killer(8))
    monkeypatch.setattr("accelerate.Accelerator.gather", lambda self, own: torch.stack([own, 0 * own]).flatten())
    with pytest.raises(
        SynthgenError, match=r"go on from different steps \(0, 6\), as not all of them see the same .*mae"
    ):
        run_stage(Pretrain(**SMALL), run, ONE)


def test_parts_of_a_step_add_up(run, whole):
    """Two halves of a batch give the gradient of the whole: the same training but for rounding and the draws."""
    run_stage(Pretrain(**SMALL | {"accumulate": 2, "label": "halves"}), run, ONE)
    folder = run.folder("pretrain/halves")
    assert [record["step"] for record in records(folder)] == list(range(1, 13))
    assert abs(losses(folder)[-1][1] - losses(whole)[-1][1]) < 0.2
    with pytest.raises(ConfigError, match="multiple of 5"):
        run_stage(Pretrain(**SMALL | {"accumulate": 5, "label": "fifths"}), run, ONE)
    with pytest.raises(
        ConfigError, match=r"8 of 3 images .* 4 parts .*fewer images than parts: lower accumulate, or use"
    ):
        Pretrain(batch_size=8, accumulate=4).order(run, 3)


def test_settings_that_change_no_result_may_change(run, whole):
    with pytest.raises(Killed):
        run_stage(Pretrain(**SMALL), run, ONE, Killer(5))
    other = SMALL | {"log_every": 5, "save_every": 100, "num_workers": 1, "export": True}
    run_stage(Pretrain(**other), run, ONE)
    folder = run.folder("pretrain/mae")
    assert sha256(folder) == sha256(whole)
    assert (folder / "transformers" / "model.safetensors").is_file()


def test_other_settings_are_refused_and_other_labels_are_not(run):
    short = SMALL | {"epochs": 1}
    run_stage(Pretrain(**short), run, ONE)
    with pytest.raises(StaleArtifact, match=r"method\.foreground_share is 0\.5 and was 0\.0"):
        run_stage(Pretrain(**short, method=Choice("mae", {"foreground_share": 0.5})), run, ONE)
    guided = Pretrain(**short, method=Choice("mae", {"foreground_share": 0.5}), label="mae-guided")
    run_stage(guided, run, ONE)
    assert {path.name for path in run.folder("pretrain").iterdir()} == {"mae", "mae-guided"}
    assert all("foreground_hidden" in record for record in records(run.folder("pretrain/mae-guided")))
    run_stage(Pretrain(**short | {"seed": 1, "label": "other-seed"}), run, ONE)
    assert sha256(run.folder("pretrain/other-seed")) != sha256(run.folder("pretrain/mae"))


@pytest.mark.parametrize("method", ["mae", "umd", "vlp"])
def test_every_option_counts_in_the_fingerprint(method):
    stage = make_stage("pretrain", {"method": method}).complete()
    options = inspect.signature(METHODS.load(method).__init__).parameters.keys() - {"self", "encoder"}
    hashed = stage.fingerprinted()
    assert hashed["method"].keys() == options | {"name"}
    assert {"start", "beta2", "epochs", "encoder", "masks"} <= hashed.keys()
    assert not {"save_every", "num_workers", "export"} & hashed.keys()


class Meddler(Killer):
    """Calls ``act`` before the second record, and kills later."""

    def __init__(self, act: Callable[[], object], after: int) -> None:
        super().__init__(after)
        self.acts = iter((lambda: None, act))

    def describe(self, text: str) -> None:
        next(self.acts, lambda: None)()
        super().describe(text)


def test_a_folder_that_another_command_has_taken_gets_no_checkpoint(run):
    """The same command failed elsewhere and took its settings back, and one with other settings came next."""
    folder, other = run.folder("pretrain/mae"), Pretrain(**SMALL | {"epochs": 1}).complete()

    def take() -> None:
        (folder / "settings.yaml").unlink()
        record_settings(run, other)

    with pytest.raises(StaleArtifact, match=r"another command has given .*mae other settings"):
        run_stage(Pretrain(**SMALL), run, ONE, Meddler(take, after=4))
    assert not (folder / "checkpoints").exists()  # which step 3 would have had
    run_stage(other, run, ONE)
    with pytest.raises(StaleArtifact, match=r"epochs is 4 and was 1"):
        run_stage(Pretrain(**SMALL), run, ONE)


def test_settings_that_were_taken_back_come_with_the_next_checkpoint(run, whole):
    folder = run.folder("pretrain/mae")
    with pytest.raises(Killed):
        run_stage(Pretrain(**SMALL), run, ONE, Meddler((folder / "settings.yaml").unlink, after=4))
    assert run.artifact("pretrain/mae")["settings"]["epochs"] == 4
    run_stage(Pretrain(**SMALL), run, ONE)
    assert sha256(folder) == sha256(whole)


def test_a_probe_is_spread_over_the_data_and_keeps_no_pixels(tmp_path):
    data = FolderDataset(Path(write_sizes(tmp_path / "data", *range(20, 83))))
    samples, sides = probe(data)
    assert [sample.key for sample in samples] == [data.key(index) for index in range(0, 63, 2)]
    assert sides == list(range(20, 83, 2))
    assert {sample.image.shape for sample in samples} == {(1, 1, 3)}
    assert all(sample.image.base is None for sample in samples)


def test_a_probe_still_has_masks_and_words(run):
    samples, _ = probe(Pretrain(**SMALL).dataset(run))
    assert {sample.label_map.shape for sample in samples} == {(1, 1)}
    assert all(sample.words for sample in samples)


def test_guidance_needs_masks(run):
    run2 = Run.create(run.path.parent / "bare")
    make_run(run2.path, units=1, unit_size=8, image_size=32, masks=False)
    run_stage(Shards(val_ratio=0.0, masks=False), run2, ONE)
    with pytest.raises(ConfigError, match=r"mae, .*train: no mask in the 8 samples looked at"):
        run_stage(Pretrain(**SMALL, method=Choice("mae", {"foreground_share": 0.5})), run2, ONE)


def test_own_data_needs_no_run(run, tmp_path):
    fresh = Run.create(tmp_path / "fresh")
    data = tuple(str(path) for path in sorted((run.path / "shards" / "train").glob("*.tar")))
    run_stage(Pretrain(**SMALL | {"epochs": 1}, data=data), fresh, ONE)
    assert (fresh.folder("pretrain/mae") / "encoder.safetensors").is_file()
    with pytest.raises(MissingArtifact, match="there is no nowhere"):
        run_stage(Pretrain(**SMALL, data=("nowhere",)), fresh, ONE)


def test_missing_shards_are_an_error(tmp_path):
    with pytest.raises(MissingArtifact, match="synthgen shards"):
        run_stage(Pretrain(**SMALL), Run.create(tmp_path / "empty"), ONE)


def test_unfinished_shards_are_an_error(run):
    (run.path / "shards" / "dataset.json").unlink()
    with pytest.raises(MissingArtifact, match="no finished shards"):
        run_stage(Pretrain(**SMALL), run, ONE)


def test_a_shard_that_a_killed_repair_left_out_is_an_error(run):
    run_stage(Shards(samples_per_shard=10, val_ratio=0.0), anew(run), ONE)
    folder = run.folder("shards")
    for path in (folder / "train").glob("000001*"):  # tar, mark and table: what is left tells nothing of it
        path.unlink()
    told = rf"^1 of the shards in {folder / 'train'} are gone \(first: 000001\.tar\); run: synthgen shards --run"
    with pytest.raises(MissingArtifact, match=told):
        run_stage(Pretrain(**SMALL), run, ONE)
    run_stage(Shards(samples_per_shard=10, val_ratio=0.0), run, ONE)
    assert len(Pretrain(**SMALL).dataset(run)) == 24
    (folder / "dataset.json").write_text('{"shards": [{"split": "train"}]}')
    with pytest.raises(CorruptFile, match=r"dataset\.json cannot be read; delete it and run: synthgen shards"):
        run_stage(Pretrain(**SMALL), run, ONE)


def anew(run: Run) -> Run:
    shutil.rmtree(run.folder("shards"))
    return run


def test_a_loss_that_is_no_number_names_its_step(run, monkeypatch):
    step = Training._step

    def poisoned(self, number, batches):
        if number == 4:
            with torch.no_grad():
                self.method.encoder.cls_token.fill_(float("nan"))
        return step(self, number, batches)

    monkeypatch.setattr(Training, "_step", poisoned)
    with pytest.raises(SynthgenError, match="not a finite number at step 5"):
        run_stage(Pretrain(**SMALL | {"log_every": 3}), run, ONE)
    kept = [path.name for path in (run.folder("pretrain/mae") / "checkpoints").iterdir()]
    assert kept == ["step-00000003.safetensors"]  # no checkpoint of broken weights


def test_a_broken_sample_is_named(run):
    tar = run.path / "shards" / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\xff\xd8\xff", len(data) // 2)  # a JPEG begins
    data[start : start + 400] = bytes(400)
    tar.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"^sample \d{10} of .*000000\.tar cannot be read"):
        run_stage(Pretrain(**SMALL), run, ONE)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"method": "mea"}, UnknownName, "did you mean 'mae'"),
        ({"method": {"name": "vlp", "temperature": "hot"}}, ConfigError, "method vlp.temperature"),
        ({"samples_seen": -1}, ConfigError, "samples_seen must be at least 0, not -1"),
        ({"encoder": "huge"}, UnknownName, "unknown encoder 'huge'"),
        ({"method": {"name": "mae", "mask_rato": 0.5}}, ConfigError, "did you mean 'mask_ratio'"),
        ({"epochs": 0}, ConfigError, "epochs must be at least 1, not 0"),
        ({"beta2": 1.0}, ConfigError, "beta2 must be at least 0 and below 1, not 1.0"),
        ({"epochs": "many"}, ConfigError, "stages.pretrain.epochs"),
        ({"data": "photos"}, ConfigError, r"stages.pretrain.data: Input should be a list, such as \[A, B\] \(got 'pho"),
        ({"precision": "fp8"}, ConfigError, "precision must be one of"),
        ({"base_learning_rate": -1.0}, ConfigError, "base_learning_rate must be at least 0"),
        ({"weight_decay": -0.1}, ConfigError, "weight_decay must be at least 0"),
        ({"max_norm": -1.0}, ConfigError, "max_norm must be at least 0"),
        ({"num_workers": -2}, ConfigError, "num_workers must be at least -1"),
        ({"label": "a/b"}, ConfigError, "plain folder name"),
        ({"trackers": ["tensorbord"]}, UnknownName, "did you mean 'tensorboard'"),
    ],
)
def test_bad_settings_are_an_error_before_anything_starts(run, settings, error, said):
    with pytest.raises(error, match=said):
        run_stage(make_stage("pretrain", settings), run, ONE)


def test_snapshots_are_taken_on_the_way(run: Run) -> None:
    run_stage(Pretrain(**SMALL, snapshots=3), run, ONE)  # 12 steps
    folder = run.folder("pretrain/mae")
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == [
        "step-000004",
        "step-000008",
        "step-000012",
    ]
    last, first = (load_encoder(folder / "snapshots" / name).state_dict() for name in ("step-000012", "step-000004"))
    end = load_encoder(folder).state_dict()
    assert all(torch.equal(last[name], end[name]) for name in end)
    assert not all(torch.equal(first[name], end[name]) for name in end)


def test_control_masks_guide_otherwise(run: Run) -> None:
    method = Choice("mae", {"foreground_share": 1.0, "foreground_share_start": 1.0})
    kinds = ("own", "elsewhere", "scattered")
    for masks in kinds:
        run_stage(Pretrain(**SMALL, method=method, masks=masks, label=masks), run, ONE)
    weights = [load_encoder(run.folder(f"pretrain/{masks}")).state_dict() for masks in kinds]
    for one, other in itertools.combinations(weights, 2):
        assert not all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="one of own, elsewhere, scattered"):
        Pretrain(masks="away")  # type: ignore[arg-type]


# -- images of several sizes


def write_sizes(folder: Path, *sides: int) -> str:
    folder.mkdir()
    for number, side in enumerate(sides):
        Image.fromarray(np.full((side, side + 8, 3), 10 * number % 256, np.uint8)).save(folder / f"{number:02d}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("sides", "size", "options"),
    [
        ((24, 64, 64, 64, 64), 64, {}),  # one small image, be it the first, decides nothing
        ((64, 64, 64, 24, 512), 64, {}),
        ((48, 48, 64, 64), 48, {}),
        ((40, 40, 40), 40, {}),
        ((300, 900, 260), 224, {}),
        ((24, 64, 64), 32, {"image_size": 32}),
    ],
)
def test_an_encoder_is_as_large_as_most_images(tmp_path, caplog, sides, size, options):
    data = write_sizes(tmp_path / "data", *sides)
    encoder = Choice("micro", {"dim": 8, "depth": 1, "num_heads": 1, **options})
    stage = Pretrain(**SMALL | {"encoder": encoder, "batch_size": 2}, data=(data,)).complete()
    run = Run.create(tmp_path / "run")
    with run.claim(stage) as claimed:
        stage = stage.prepare(claimed)
    samples, side = stage._samples_and_side
    assert stage.build_method(run, samples, side).encoder.config.image_size == size
    unlike = min(max(sides), 224) >= 2 * min(sides) and not options
    assert (f"the images have {min(sides)} to {max(sides)} pixels along their shorter side" in caplog.text) == unlike


def test_half_precision_is_not_for_cpus(run, monkeypatch):
    monkeypatch.setattr("synthgen.stages.pretrain.devices_for", lambda stage: ["cpu"])
    with pytest.raises(ConfigError, match=r"precision fp16 is for GPUs, .* runs on a CPU; give precision bf16, or no"):
        run_stage(Pretrain(**SMALL, precision="fp16"), run, ONE)
    assert not run.folder("pretrain/mae").exists()
    check_precision("fp16", "cuda:0")
    check_precision("bf16", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="precision fp16"):
        check_precision("fp16", "cuda:0")


# -- an export that comes later


def test_a_finished_training_is_exported_when_that_is_asked_for(run, whole):
    folder = shutil.copytree(whole, run.folder("pretrain/mae"))
    record_settings(run, Pretrain(**SMALL).complete())
    before = {name: (folder / name).read_bytes() for name in ("encoder.safetensors", "config.json", "done.json")}
    asked = Pretrain(**SMALL | {"export": True})
    assert run_stage(asked, run, ONE).done_before == 1
    model = transformers.ViTModel.from_pretrained(folder / "transformers", add_pooling_layer=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(images).last_hidden_state, load_encoder(folder)(images), atol=1e-5)
    assert before == {name: (folder / name).read_bytes() for name in before}
    written = (folder / "transformers" / "model.safetensors").stat().st_mtime_ns
    run_stage(asked, run, ONE)
    assert (folder / "transformers" / "model.safetensors").stat().st_mtime_ns == written
    (folder / "transformers" / "preprocessor_config.json").unlink()  # it was killed before its end
    run_stage(asked, run, ONE)
    assert (folder / "transformers" / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_two_equal_trainings_at_once_end_with_the_same_weights(run: Run, whole: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from synthgen.run import Run
        from synthgen.runner import run_stage
        from synthgen.stages.pretrain import Pretrain
        from tests.stages.test_pretrain import ONE, SMALL
        if __name__ == "__main__":
            run_stage(Pretrain(**SMALL), Run.open({str(run.path)!r}), ONE)
        """
    )
    both = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [one.wait(300) for one in both] == [0, 0]
    assert sha256(run.folder("pretrain/mae")) == sha256(whole)
