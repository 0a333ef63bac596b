"""The commands as a person types them."""

import json
import subprocess
import sys

import pytest

from synthgen.cli import app
from tests.factories import make_run


def synthgen(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "synthgen", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def one_line(told, code=2):
    assert told.returncode == code
    assert told.stderr.startswith("synthgen: ")
    assert told.stderr.count("\n") == 1, told.stderr
    assert "Traceback" not in told.stderr
    return told.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['synthgen', '--help']\nfrom synthgen.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'pydantic', 'yaml', 'rich', 'scipy', 'PIL'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for command in ("generate", "masks", "shards", "pretrain", "evaluate", "run", "status", "view"):
        assert command in told.stdout


def test_every_command_and_part_appears_in_the_docs():
    from pathlib import Path

    from synthgen.backbones import BACKBONES
    from synthgen.engines import ENGINES
    from synthgen.evaluators import EVALUATORS
    from synthgen.methods import METHODS
    from synthgen.refiners import REFINERS

    root = Path(__file__).resolve().parents[2]
    text = "".join(path.read_text(encoding="utf-8") for path in [root / "README.md", *root.glob("docs/**/*.md")])
    for command in app.registered_commands:
        assert f"synthgen {command.name or command.callback.__name__}" in text
    for family in (BACKBONES, ENGINES, EVALUATORS, METHODS, REFINERS):
        for name in family.names():
            assert f"`{name}`" in text, f"the {family.kind} {name} is in no document"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generat"], "Did you mean 'generate'"),
        (["generate", "--promps", "x"], "--prompts"),
        (["generate", "--prompts", "absent.txt", "--run", "r"], "there is no prompt file absent.txt"),
        (["generate", "--prompts", "p.txt", "--backbone", "tyny", "--run", "r"], "did you mean 'tiny'"),
        (["generate", "--prompts", "p.txt", "--set", "unit_siz=4", "--run", "r"], "did you mean 'unit_size'"),
        (["generate", "--prompts", "p.txt", "--set", "unit_size", "--run", "r"], "NAME=VALUE"),
        (["generate", "--prompts", "p.txt", "--workers", "-1", "--run", "r"], "workers must be"),
        (["generate", "--prompts", "p.txt", "--limit", "x", "--run", "r"], "'--limit'"),
        (["masks", "--run", "absent"], "there is no run at absent"),
        (["masks", "--run", "empty"], "first run: synthgen generate"),
        (["masks", "--refine", "attentioncutt", "--run", "empty"], "did you mean 'attentioncut'"),
        (["masks", "--refine", "threshold", "--attentioncut", "--run", "empty"], "give one of them"),
        (["shards", "--run", "empty"], "first run: synthgen"),
        (["pretrain", "--method", "mea", "--run", "empty"], "synthgen"),
        (["evaluate", "--run", "empty"], "synthgen"),
        (["status", "absent"], "there is no run at absent"),
        (["view", "absent"], "there is no run at absent"),
        (["view", "empty", "--limit", "0"], "--limit"),
        (["masks", "--min-area", "0.1", "--set", "min_area.x=1", "--run", "empty"], "no part with options"),
        (["generate", "--prompts", "p.txt", "--template", "t.txt", "--run", "r"], "there is no template file t.txt"),
        (["run", "absent.yaml"], "there is no pipeline file"),
        (["schema", "mask"], "did you mean 'masks'"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path, arguments, says):
    (tmp_path / "p.txt").write_text("a [dog]\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_text("seed: 0\nartifacts: {}\n")
    assert says in one_line(synthgen(*arguments, cwd=tmp_path))


def test_masks_status_and_view_of_a_run(tmp_path):
    make_run(tmp_path / "r", masks=False)
    told = synthgen("masks", "--attentioncut", "--run", tmp_path / "r", "--workers", "1")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("masks: 12 samples in")
    told = synthgen("masks", "--attentioncut", "--run", tmp_path / "r")
    assert told.stdout == "masks: nothing to do, all 2 units were done\n"
    assert "refine is" in one_line(synthgen("masks", "--run", tmp_path / "r"))
    told = synthgen("status", tmp_path / "r")
    assert told.returncode == 0
    assert "masks" in told.stdout
    told = synthgen("view", tmp_path / "r")
    assert told.stdout == f"page: {tmp_path / 'r' / 'view.html'}\n"
    assert (tmp_path / "r" / "view.html").stat().st_size > 10_000


def test_failed_units_end_with_code_three(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("images", 1)
    path.write_bytes(path.read_bytes()[:9000])
    message = one_line(synthgen("masks", "--run", run.path, "--workers", "1"), code=3)
    assert "unit 000001" in message
    assert "it is cut off" in message
    assert run.mark("masks", 0) is not None


def test_the_bare_command_shows_its_help():
    told = synthgen()
    assert told.returncode == 0
    assert told.stdout.startswith("Usage:")
    assert not told.stderr


def test_schema_is_json():
    told = synthgen("schema", "masks")
    settings = {"refine", "min_area", "max_area", "min_contrast", "max_peak", "min_confidence"}
    assert set(json.loads(told.stdout)["properties"]) == settings
    assert json.loads(told.stdout)["properties"]["refine"]["default"] == {"name": "threshold"}
