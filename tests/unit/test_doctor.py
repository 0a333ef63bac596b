"""What the doctor says of this machine, and of machines and models that are not as they should be."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from synthgen import doctor
from synthgen.__main__ import main
from synthgen.attention import kernel
from synthgen.attention.kernel import attention_with_lse
from synthgen.doctor import examine, libraries, machine, recording
from synthgen.doctor.text import render
from synthgen.engines.local import Local, devices_for
from synthgen.errors import StorageError
from synthgen.stages.generate import Generate
from synthgen.stores import parse_location
from synthgen.stores.remote import RemotePath
from synthgen.text import columns


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return examine(tmp_path_factory.mktemp("doctor") / "runs" / "latest")


@pytest.fixture
def quick(monkeypatch):
    """Without what takes time: attention and the shipped model."""
    monkeypatch.setattr(doctor, "attention_on", lambda device, problems: [])
    monkeypatch.setattr(doctor, "shipped_model", lambda problems: None)


def typed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["synthgen", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def of_model(tmp_path, model):
    found = examine(tmp_path, str(model))
    return found.model, found.problems, found.notes


# -- a machine that works


def test_recording_is_exact_on_the_cpu_in_every_dtype(healthy):
    on_cpu = [item for item in healthy.attention if item.device == "cpu"]
    assert {(item.dtype, item.shape) for item in on_cpu} == {
        (dtype, shape) for dtype in ("float32", "float16", "bfloat16") for shape in recording.SHAPES
    }
    for item in on_cpu:
        assert item.exact, item
        assert item.same_output
        assert item.has_lse == (item.kernel == "flash")
        assert 0 < item.error < recording.TOLERANCE
    assert not [problem for problem in healthy.problems if "cpu" in problem]


def test_devices_disk_and_memory_are_reported(healthy, tmp_path):
    assert healthy.versions.keys() >= {"python", "synthgen", "torch", "diffusers", "transformers", "accelerate"}
    assert healthy.versions.keys() >= {"webdataset", "numpy", "scipy", "pillow"}
    assert healthy.devices[0].name == "cpu"
    assert healthy.devices[0].bfloat16
    devices = devices_for(Generate(prompts=""))
    assert healthy.generate.workers == len(devices)
    assert set(healthy.generate.devices) == set(devices)
    assert Local().workers == 0  # which is what the plan stands for
    assert healthy.disk.writable
    assert healthy.disk.free > 0
    assert healthy.memory.total is None or healthy.memory.total >= (healthy.memory.available or 0) > 0
    assert healthy.shipped.loads
    assert healthy.shipped.bytes > 100_000
    assert healthy.model is None
    extras = {extra.name: extra for extra in healthy.extras}
    assert extras.keys() >= {"tensorboard", "lora", "dev"}
    assert "training curves" in extras["tensorboard"].adds
    assert "LoRA" in extras["lora"].adds
    assert extras["dev"].libraries["pytest"]


def test_json_has_all_fields(healthy):
    plain = json.loads(json.dumps(healthy.plain(), allow_nan=False))
    assert set(plain) == {
        "ok", "versions", "platform", "devices", "generate", "attention", "disk", "memory", "shipped", "model",
        "extras", "notes", "problems",
    }  # fmt: skip
    assert plain["ok"] == (not plain["problems"])
    assert set(plain["attention"][0]) == {
        "device", "dtype", "shape", "kernel", "has_lse", "same_output", "error", "exact",
    }  # fmt: skip


def test_text_fits_a_console(healthy):
    text = render(healthy)
    assert max(map(columns, text.splitlines())) <= 100
    assert len(text.splitlines()) < 60
    assert "from the kernel" in text
    assert "synthgen generate would use: " in text
    assert text.endswith("no problems found") == (not healthy.problems)


def test_rows_are_not_cut_in_a_pipe(healthy):
    name = "a processor of many words " * 6
    found = replace(healthy, devices=[replace(healthy.devices[0], model=name)])
    assert name.strip() not in render(found)
    assert name in render(found, whole=True)


@pytest.mark.usefixtures("quick")
def test_no_file_is_left_behind(tmp_path, monkeypatch, capsys):
    code, told, complaints = typed(monkeypatch, capsys, "--run", tmp_path / "runs" / "latest", "--json")
    assert (code, complaints) == (0, "")
    assert json.loads(told)["ok"]
    assert not list(tmp_path.iterdir())


# -- one that does not


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, flags):
    (tmp_path / "file").write_text("in the way")
    code, told, complaints = typed(monkeypatch, capsys, "--run", tmp_path / "file" / "runs", *flags)
    assert code == 2
    assert complaints.startswith("synthgen: ")
    assert complaints.count("\n") == 1
    assert "file/runs cannot be written to" in complaints
    if flags:
        assert not json.loads(told)["disk"]["writable"]
    else:
        assert told.endswith("1 problem found\n")


@pytest.mark.usefixtures("quick")
def test_a_store_is_checked_without_a_local_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, told, _ = typed(monkeypatch, capsys, "--run", f"memory://{tmp_path.name}/run")
    assert code == 0
    assert f"store: memory://{tmp_path.name}/run: writable" in told
    disk = json.loads(typed(monkeypatch, capsys, "--run", f"memory://{tmp_path.name}/run", "--json")[1])["disk"]
    assert disk == {"path": f"memory://{tmp_path.name}/run", "free": None, "writable": True}
    assert not list(parse_location(f"memory://{tmp_path.name}").rglob("*"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("nowhere://bucket/run", "there is no kind of store called nowhere://"),
        ("memory://me:hunter2@bucket/run", "there is a password in memory://***@bucket"),
    ],
)
def test_an_unknown_store_is_a_problem(monkeypatch, capsys, run, says):
    code, told, complaints = typed(monkeypatch, capsys, "--run", run)
    assert (code, says in complaints, "hunter2" in told + complaints) == (2, True, False)
    assert "not writable" in told


def test_a_store_that_refuses_is_a_problem(monkeypatch):
    def refuse(self, data):
        raise StorageError(f"{self}: it says no")

    monkeypatch.setattr(RemotePath, "create", refuse)
    problems = []
    assert not machine.disk(Path("memory:/bucket/run"), problems).writable
    assert "it says no" in problems[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("sdl", "unknown model 'sdl'; did you mean 'sdxl'? there are: "),
        ("nobody/nothing", "not on this machine; download it first with: hf download nobody/nothing"),
        ("no/such/folder", "not on this machine"),
    ],
)
def test_an_unknown_model_is_one_line(tmp_path, monkeypatch, capsys, model, says):
    code, told, complaints = typed(monkeypatch, capsys, "--run", tmp_path, "--model", model)
    assert code == 2
    assert says in complaints
    assert complaints.count("\n") == 1
    assert "is not on this machine" in told


@pytest.mark.parametrize(("told", "exact"), [("nothing", True), ("a lie", False), ("other pixels", False)])
def test_the_logsumexp_of_the_kernel_is_checked(tmp_path, monkeypatch, told, exact):
    def telling(*arguments):
        output, lse = attention_with_lse(*arguments)
        output = output * 1.01 if told == "other pixels" else output
        return output, None if told == "nothing" else lse + (told == "a lie")

    monkeypatch.setattr(doctor, "shipped_model", lambda problems: None)
    monkeypatch.setattr(recording, "SHAPES", {"small": (64, 77, 40)})
    monkeypatch.setattr(kernel, "attention_with_lse", telling)
    found = examine(tmp_path)
    item = found.attention[0]
    assert item.has_lse == (told != "nothing")
    assert item.exact == exact
    assert any("is not exact at small" in problem for problem in found.problems) != exact
    assert ("recomputed" in render(found)) == (told == "nothing")


def test_attention_that_does_not_run_and_weights_that_do_not_load_are_problems(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(kernel, "attention_with_lse", fails)
    monkeypatch.setattr("synthgen.backbones.BACKBONES", type("Broken", (), {"build": fails})())
    found = examine(tmp_path)
    assert not found.attention
    assert "attention on cpu in float16 does not run (no such kernel)" in " ".join(found.problems)
    assert "the shipped model does not load (no such kernel)" in found.problems[-1]
    assert not any("\n" in problem for problem in found.problems)


def test_old_or_missing_libraries_are_problems(tmp_path, monkeypatch):
    needed = ["torch>=99.1", "nosuchlibrary>=2", 'nosuchextra; extra == "some"', 'other; sys_platform == "none"']
    monkeypatch.setattr(libraries.metadata, "requires", lambda name: needed)
    found = examine(tmp_path)
    old, missing = found.problems
    assert "is too old; update it with: pip install 'torch>=99.1'" in old
    assert missing == "not installed: nosuchlibrary; install them with: pip install nosuchlibrary"
    assert not found.devices  # what needs them is not looked at
    extras = {extra.name: extra for extra in found.extras}
    assert extras["some"].missing == ["nosuchextra"]
    assert "pip install nosuchextra" in render(found)


# -- models


@pytest.fixture
def folder(stable_diffusion, tmp_path):
    return shutil.copytree(stable_diffusion, tmp_path / "model")


def change(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.usefixtures("quick")
def test_a_model_in_a_folder(folder, tmp_path):
    model, problems, notes = of_model(tmp_path, folder)
    assert not problems
    assert not notes
    assert (model.family, model.pipeline) == ("StableDiffusion", "StableDiffusionPipeline")
    assert model.bytes == sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    text = " ".join(render(examine(tmp_path, str(folder))).split())
    assert "StableDiffusion (StableDiffusionPipeline), weights" in text


@pytest.mark.usefixtures("quick")
def test_a_model_in_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    model, problems, _ = of_model(tmp_path, "sd15")
    assert not problems
    assert model.folder == str(repo / "snapshots" / ("a" * 40))
    assert model.bytes > 0
    shutil.rmtree(repo / "snapshots" / ("a" * 40) / "vae")
    model, problems, _ = of_model(tmp_path, "sd15")
    assert model.missing == ("vae",)
    assert "no safetensors weights for vae on this machine" in problems[0]


@pytest.mark.usefixtures("quick")
def test_weights_of_a_variant_and_in_shards(folder, tmp_path):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".", ".fp16.")))
    unet = folder / "unet" / "diffusion_pytorch_model"
    whole = unet.with_name(unet.name + ".fp16.safetensors")
    whole.rename(unet.with_name(unet.name + ".fp16-00001-of-00002.safetensors"))
    model, problems, _ = of_model(tmp_path, folder)
    assert "unet" in model.missing  # half of it
    assert problems
    unet.with_name(unet.name + ".fp16-00002-of-00002.safetensors").write_bytes(b"the rest")
    model, problems, notes = of_model(tmp_path, folder)
    assert not problems
    assert model.variant == "fp16"
    assert notes[0].endswith("--set backbone.variant=fp16")
    assert model.bytes == sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))


@pytest.mark.usefixtures("quick")
def test_a_model_of_another_family_and_one_without_an_index(folder, tmp_path):
    change(folder, _class_name="KandinskyPipeline", movq=[None, None])
    model, problems, _ = of_model(tmp_path, folder)
    assert not model.family
    assert "is a KandinskyPipeline, whose attention synthgen does not know" in problems[0]
    for text in ("not JSON", "3"):
        (folder / "model_index.json").write_text(text)
        _, problems, _ = of_model(tmp_path, folder)
        assert "model_index.json cannot be read" in problems[0]
    (folder / "model_index.json").unlink()
    _, problems, _ = of_model(tmp_path, folder)
    assert "model_index.json cannot be read" in problems[0]
