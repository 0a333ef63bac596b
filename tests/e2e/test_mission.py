"""The four commands that users were promised, as typed and in that order, on the run that nobody named."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_four_commands(tmp_path):
    (tmp_path / "prompts").mkdir()
    shutil.copy(ROOT / "prompts/imagenet.txt", tmp_path / "prompts")
    shutil.copy(ROOT / "Makefile", tmp_path)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "synthgen").write_text(f'#!/bin/sh\nexec {sys.executable} -m synthgen "$@"\n')
    (bin_folder / "synthgen").chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / ".venv" / ".installed").touch()
    for command in (
        ".venv/bin/synthgen generate --prompts prompts/imagenet.txt --limit 24 --steps 2",  # all 1000 take minutes
        ".venv/bin/synthgen masks --attentioncut",
        ".venv/bin/synthgen pretrain --method mae --epochs 2",
        "make shards",
    ):
        told = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path)
        assert told.returncode == 0, f"{command}: {told.stderr}"
        assert "Traceback" not in told.stderr
        if "pretrain" in command:
            assert told.stdout.endswith("\nencoder: runs/latest/pretrain/mae\n")
    assert "nothing to do" in told.stdout  # pretrain had made the shards
    assert "\nshards: runs/latest/shards\n" in told.stdout
    run = tmp_path / "runs" / "latest"
    assert (run / "pretrain" / "mae" / "encoder.safetensors").is_file()
    assert (run / "shards" / "train" / "000000.tar").is_file()
    assert (run / "shards" / "README.md").is_file()


def test_make_shards_needs_no_environment_where_synthgen_is_installed(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    installed = tmp_path / "bin" / "synthgen"
    installed.parent.mkdir()
    installed.write_text('#!/bin/sh\necho "with $@"\n')
    installed.chmod(0o755)

    def make(*arguments):
        path = f"{installed.parent}:/usr/bin:/bin"
        return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=tmp_path, env={"PATH": path})

    assert make("shards").stdout == "with shards --run runs/latest\n"
    assert "-m venv .venv" in make("-n", "demo").stdout  # another project's program has this name
    (tmp_path / ".venv").mkdir()
    assert ".venv/bin/synthgen shards" in make("-n", "shards").stdout
    (tmp_path / ".venv").rmdir()
    installed.unlink()
    assert "-m venv .venv" in make("-n", "shards").stdout


def test_pretrain_goes_on_with_shards_that_were_begun(tmp_path):
    from synthgen import api
    from synthgen.engines.local import Local
    from tests.factories import make_run

    run = make_run(tmp_path / "r", units=3)
    api.shards(run, engine=Local(workers=1), samples_per_shard=7)
    (run.folder("shards") / "dataset.json").unlink()  # as if killed before the end
    command = [
        sys.executable,
        "-m",
        "synthgen",
        "pretrain",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--run",
        str(run.path),
    ]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert (run.folder("shards") / "dataset.json").is_file()
    assert run.artifact("shards")["settings"]["samples_per_shard"] == 7
