import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from synthgen import api
from synthgen.config import Choice
from synthgen.diffusion import StableDiffusion
from synthgen.engines.local import Local
from synthgen.errors import (
    ConfigError,
    CorruptFile,
    MissingArtifact,
    PromptError,
    StaleArtifact,
    UnitsFailed,
    UnknownName,
)
from synthgen.options import resume_settings
from synthgen.prompts import read_prompts, request_for
from synthgen.run import Run
from synthgen.stages.generate import Generate

PROMPTS = "a photo of a [dog]\na [golden dog] and a [cat]\nthe [park] and an [umbrella umbrella]\n"


def sums(run, *artifacts):
    return {
        path.relative_to(run.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for artifact in artifacts
        for path in sorted(run.folder(artifact).glob("**/*.tar"))
    }


@pytest.fixture(scope="module")
def settings(stable_diffusion, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "p.txt"
    prompts.write_text(PROMPTS)
    backbone = Choice("diffusers", {"model": str(stable_diffusion), "num_steps": 2, "guidance_scale": 2.0})
    return {"prompts": str(prompts), "images_per_prompt": 3, "unit_size": 4, "batch_size": 4, "backbone": backbone}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("runs") / "r")
    api.generate(run, engine=Local(workers=1), **settings)
    return run


def test_samples_hold_image_prompt_and_maps(finished):
    samples = list(api.samples(finished))
    assert [generation.request.key for generation, _ in samples] == [
        f"{unit:06d}{row:04d}" for unit, rows in ((0, 4), (1, 4), (2, 1)) for row in range(rows)
    ]
    assert samples[1][0].request.prompt.words == ("golden dog", "cat")
    assert samples[1][0].maps.weights.shape == (2, 8, 8)
    assert samples[2][0].request.prompt.words == ("park",)  # the other word does not fit 16 tokens
    assert "cut off" in samples[2][0].warnings[1]
    assert [len(generation.words_cut_off) for generation, _ in samples[:3]] == [0, 0, 1]
    assert finished.mark("images", 0)["notes"] == {"samples with warnings": 1}
    seeds = {generation.request.seed for generation, _ in samples}
    assert len(seeds) == 9
    assert not np.array_equal(samples[0][0].image, samples[3][0].image)  # one prompt, two seeds


def test_two_workers_give_the_same_bytes(finished, settings, tmp_path):
    run = Run.create(tmp_path / "r")
    api.generate(run, engine=Local(workers=2), **settings)
    assert sums(run, "images", "maps") == sums(finished, "images", "maps")


def test_a_killed_command_is_finished_by_the_same_command(finished, settings, tmp_path):
    run = tmp_path / "r"
    backbone = settings["backbone"].options
    command = [
        sys.executable, "-m", "synthgen", "generate", "--prompts", settings["prompts"], "--images-per-prompt", "3",
        "--batch-size", "4", "--model", backbone["model"], "--steps", "2", "--guidance", "2.0",
        "--set", "unit_size=4", "--workers", "1", "--run", str(run),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "maps" / "000000.json").exists():
        assert process.poll() is None or (run / "maps" / "000000.json").exists()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = len(list((run / "maps").glob("*.json")))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert killed_at < 3, "the process had ended before it was killed"
    assert f"{killed_at} of 3 units were done before" in again.stdout
    assert sums(Run.open(run), "images", "maps") == sums(finished, "images", "maps")


def test_changed_prompts_are_refused_by_name(finished, settings, tmp_path):
    other = tmp_path / "p.txt"
    other.write_text(PROMPTS + "a [cat]\n")
    with pytest.raises(StaleArtifact, match="its input 'prompts' has changed"):
        api.generate(finished, engine=Local(workers=1), **{**settings, "prompts": str(other)})
    moved = tmp_path / "moved.txt"
    moved.write_text(PROMPTS)  # another name for the same prompts is no change
    assert api.generate(finished, engine=Local(workers=1), **{**settings, "prompts": str(moved)}).samples == 0


def command(*arguments):
    """What a command says when it is well."""
    told = subprocess.run([sys.executable, "-m", "synthgen", *map(str, arguments)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.fixture
def kept(finished, tmp_path):
    """The finished run, after its prompt file is gone."""
    shutil.copytree(finished.path, tmp_path / "kept")
    for name in ("images", "maps"):
        path = tmp_path / "kept" / name / "settings.yaml"
        path.write_text(re.sub(r"prompts: /.*", "prompts: gone.txt", path.read_text()))
    return Run.open(tmp_path / "kept")


def test_without_options_a_run_resumes_with_its_prompts_and_settings(finished, kept):
    kept.tar("images", 1).unlink()
    assert "2 of 3 units were done before" in command("generate", "--run", kept.path, "--workers", "1")
    assert sums(kept, "images", "maps") == sums(finished, "images", "maps")
    for name in ("images", "maps"):
        assert kept.artifact(name)["settings"] == finished.artifact(name)["settings"] | {"prompts": "gone.txt"}
    kept.tar("maps", 2).unlink()
    command("generate", "--run", kept.path, "--batch-size", "3", "--set", "backbone.num_steps=2", "--workers", "1")
    assert kept.artifact("maps")["settings"]["batch_size"] == 3  # of what is given the rest is laid over
    assert kept.artifact("maps")["settings"]["images_per_prompt"] == 3


def test_changed_settings_are_refused_without_prompts(kept):
    given = resume_settings(kept, "generate", {"prompts": "", "template": "", "backbone": {"num_steps": 3}})
    with pytest.raises(StaleArtifact, match=r"made differently: backbone.num_steps is 3 and was 2; use"):
        api.generate(kept, engine=Local(workers=1), **given)


@pytest.mark.parametrize("damage", ["cut", "byte", "gone", "no mark"])
def test_an_incomplete_prompt_copy_is_refused(kept, tmp_path, damage):
    path = kept.path / "prompts.jsonl"
    data = path.read_bytes()
    if damage in ("cut", "byte"):
        path.write_bytes(data[:-4] if damage == "cut" else data[:9] + b"X" + data[10:])
    else:
        (path if damage == "gone" else path.with_suffix(".json")).unlink()
    with pytest.raises((CorruptFile, MissingArtifact), match="synthgen generate --prompts FILE --run"):
        api.generate(kept, engine=Local(workers=1), **resume_settings(kept, "generate", {"prompts": ""}))
    (tmp_path / "p.txt").write_text(PROMPTS)
    given = resume_settings(kept, "generate", {"prompts": str(tmp_path / "p.txt")})
    assert api.generate(kept, engine=Local(workers=1), **given).samples == 0
    assert path.read_bytes() == data


def test_a_run_in_a_store_resumes_with_its_own_prompts(settings, tmp_path):
    run = Run.create(f"memory://{tmp_path.name}/r")
    api.generate(run, engine=Local(workers=1), **settings | {"limit": 2, "unit_size": 1})
    before = sums(run, "images", "maps")
    run.tar("images", 1).unlink()
    given = resume_settings(run, "generate", {"prompts": ""})
    assert api.generate(run, engine=Local(workers=1), **given).samples == 1
    assert sums(run, "images", "maps") == before


def test_a_stage_without_prompts_uses_those_of_the_run(kept, settings, tmp_path):
    stage = Generate(**settings | {"prompts": ""})
    assert list(stage.own_prompts(kept)) == read_prompts(settings["prompts"])
    assert Generate(**settings).own_prompts(kept) is None
    with pytest.raises(MissingArtifact, match="has no prompts yet"):
        stage.own_prompts(Run(tmp_path / "absent"))


def test_a_run_without_prompts_says_how_to_give_some(tmp_path):
    with pytest.raises(MissingArtifact, match=r"has no prompts yet; give some with: synthgen generate --prompts FILE"):
        api.generate(Run.create(tmp_path / "r"), prompts="")
    with pytest.raises(ConfigError, match="give prompts as well"):
        api.generate(Run.create(tmp_path / "r"), prompts="", template="t.txt")


def test_a_changed_option_of_the_backbone_is_refused(finished, settings):
    backbone = Choice("diffusers", {**settings["backbone"].options, "num_steps": 3})
    with pytest.raises(StaleArtifact, match="num_steps"):
        api.generate(finished, engine=Local(workers=1), **{**settings, "backbone": backbone})


def test_recorded_settings_have_every_option(finished):
    assert finished.artifact("images")["settings"]["backbone"]["dtype"] == "float32"


def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, settings):
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnknownName, match="did you mean 'tiny'"):
        api.generate(run, prompts=settings["prompts"], backbone="tyny")
    with pytest.raises(ConfigError, match="num_step"):
        api.generate(run, prompts=settings["prompts"], backbone=Choice("diffusers", {"num_step": 2}))
    with pytest.raises(ConfigError, match="unit_size must be at least 1"):
        api.generate(run, prompts=settings["prompts"], unit_size=0)
    with pytest.raises(PromptError):
        api.generate(run, prompts=str(tmp_path))
    assert [path.name for path in run.path.iterdir()] == ["run.yaml"]


def test_limit_and_template(settings, tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("a {} at night\n")
    stage = Generate(prompts=settings["prompts"], template=str(template), limit=5, images_per_prompt=2, unit_size=4)
    run = Run.create(tmp_path / "r")
    assert stage.plan(run) == [0, 1]
    assert [stage.size(run, unit) for unit in (0, 1)] == [4, 1]
    stage.prepare(run)
    assert (run.path / "prompts.jsonl").read_text().splitlines()[1].count("golden dog at night") == 1


@pytest.mark.parametrize("template", ["", "a {} at night\nan old {}\n"])
def test_workers_read_only_the_prompt_copy(tmp_path, template):
    (tmp_path / "p.txt").write_text(PROMPTS)
    (tmp_path / "t.txt").write_text(template)
    files = {"prompts": str(tmp_path / "p.txt")} | ({"template": str(tmp_path / "t.txt")} if template else {})
    held = read_prompts(*files.values())
    stage = Generate(**files, images_per_prompt=5, limit=13, unit_size=4).complete()
    run = Run.create(tmp_path / "r")
    with run.claim(stage) as claimed:
        stage.prepare(claimed)
        for path in files.values():
            Path(path).unlink()
        assert [stage.size(claimed, unit) for unit in stage.plan(claimed)] == [4, 4, 4, 1]
        for unit in stage.plan(claimed):  # images go round the prompts
            expected = [request_for(held, 0, unit, row, 4) for row in range(stage.size(claimed, unit))]
            assert stage.requests(claimed, unit) == expected
        assert stage.num_units(run) == 4  # status, which is given no claimed run


def test_prompts_may_change_until_an_image_is_made(tmp_path):
    run, path = Run.create(tmp_path / "r"), tmp_path / "p.txt"
    asked = []

    def begin_and_stop():
        stage = Generate(prompts=str(path)).complete()
        with run.claim(stage) as claimed:
            stage.prepare(claimed)
            asked.append([request.prompt.text for request in stage.requests(claimed, 0)])
            raise KeyboardInterrupt

    for text in ("a [dog]\n", "a [cat]\na [fox]\n"):
        path.write_text(text)
        os.utime(path, ns=(len(asked), len(asked)))
        with pytest.raises(KeyboardInterrupt):
            begin_and_stop()
    assert asked == [["a dog"], ["a cat", "a fox"]]


def test_missing_weights_are_one_line(settings, tmp_path):
    run = Run.create(tmp_path / "r")
    from synthgen.errors import MissingWeights

    with pytest.raises(MissingWeights, match=r"has no model_index\.json; give the folder of a diffusers") as caught:
        api.generate(
            run,
            engine=Local(workers=1),
            prompts=settings["prompts"],
            backbone=Choice("diffusers", {"model": str(tmp_path)}),
        )
    assert "\n" not in str(caught.value)


def test_a_unit_without_one_good_image_fails(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "sample", black(StableDiffusion.sample))
    run = Run.create(tmp_path / "r")
    with pytest.raises(UnitsFailed, match="no image of the unit is good: the image came out black"):
        api.generate(run, engine=Local(workers=1), **settings | {"images_per_prompt": 1})
    assert run.mark("images", 0) is None


def black(sample):
    def blackened(*args, **kwargs):
        images, recorder = sample(*args, **kwargs)
        return np.zeros_like(images), recorder

    return blackened
