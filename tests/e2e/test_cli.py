"""The commands as a person types them."""

import json
import subprocess
import sys

import pytest

from synthgen.__main__ import main
from synthgen.cli import app
from synthgen.console import summary_line
from synthgen.engines.local import Local
from synthgen.refiners.attentioncut import AttentionCut
from synthgen.runner import Summary, run_stage
from synthgen.stages.shards import Shards
from synthgen.status import status
from tests.factories import make_run


def synthgen(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "synthgen", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture
def typed(monkeypatch, capsys):
    """The same in this process: a command that makes nothing is over before another Python would have begun."""

    def run(*arguments, cwd=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["synthgen", *map(str, arguments)])
            if cwd is not None:
                patch.chdir(cwd)
            with pytest.raises(SystemExit) as end:
                main()
        return subprocess.CompletedProcess(arguments, end.value.code or 0, *capsys.readouterr())

    return run


def one_line(told, code=2):
    assert told.returncode == code
    assert told.stderr.startswith("synthgen: ")
    assert told.stderr.count("\n") == 1, told.stderr
    assert "Traceback" not in told.stderr
    return told.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['synthgen', '--help']\nfrom synthgen.__main__ import main\n"
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
        (["generate", "--run", "r"], "r has no prompts yet; give some with: synthgen generate --prompts FILE --run r"),
        (["generate", "--template", "t.txt", "--run", "r"], "give prompts as well"),
        (["attend", "--run", "r"], "give some with: synthgen attend --images PATH --run r"),
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
        (["evaluate", "--run", "new", "--test", "p.txt"], "new has no finished encoder"),
        (["status", "absent"], "there is no run at absent"),
        (["view", "absent"], "there is no run at absent"),
        (["view", "empty", "--limit", "0"], "--limit"),
        (["masks", "--min-area", "0.1", "--set", "min_area.x=1", "--run", "empty"], "is not a part with options"),
        (["generate", "--prompts", "p.txt", "--template", "t.txt", "--run", "r"], "there is no template file t.txt"),
        (["run", "absent.yaml"], "there is no pipeline file"),
        (["schema", "mask"], "did you mean 'masks'"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(typed, tmp_path, arguments, says):
    (tmp_path / "p.txt").write_text("a [dog]\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_text("seed: 0\n")
    assert says in one_line(typed(*arguments, cwd=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "empty"}  # no run was begun


def test_masks_status_and_view_of_a_run(typed, tmp_path):
    make_run(tmp_path / "r", masks=False)
    told = synthgen("masks", "--attentioncut", "--run", tmp_path / "r", "--workers", "1")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("masks: 12 samples in")
    told = typed("masks", "--attentioncut", "--run", tmp_path / "r")
    assert told.stdout == "masks: nothing to do, all 2 units were done\n"
    told = typed("masks", "--run", tmp_path / "r")  # with the settings that the masks were begun with
    assert told.stdout == "masks: nothing to do, all 2 units were done\n"
    refused = one_line(typed("masks", "--refine", "threshold", "--run", tmp_path / "r"))
    assert "made differently: refine is 'threshold' and was 'attentioncut'; use the same settings" in refused
    refused = one_line(typed("masks", "--set", "refine.smoothness=3.5", "--run", tmp_path / "r"))
    assert f"made differently: refine.smoothness is 3.5 and was {AttentionCut().smoothness}; use" in refused
    told = typed("status", tmp_path / "r")
    assert told.returncode == 0
    assert "masks" in told.stdout
    told = typed("view", tmp_path / "r")
    assert told.stdout == f"page: {tmp_path / 'r' / 'view.html'}\n"
    assert (tmp_path / "r" / "view.html").stat().st_size > 10_000


def test_what_lies_elsewhere_is_judged_without_a_run_before(typed, tmp_path):
    """A new one gets the scores."""
    run_stage(Shards(val_ratio=0.5), make_run(tmp_path / "r"), Local(workers=1))
    masks = tmp_path / "r" / "shards" / "val"
    told = synthgen("evaluate", "--run", tmp_path / "new", "--truth", masks, "--set", f"predicted={masks}")
    assert told.returncode == 0, told.stderr
    (scores,) = (tmp_path / "new" / "evaluate").glob("*.json")
    assert json.loads(scores.read_text())["scores"]["masks"]["mask_iou"]["mean_iou"] == 1
    assert told.stdout.splitlines()[0].startswith("evaluate: 5 samples in")  # images, not the one unit
    told = typed("evaluate", "--run", tmp_path / "new", "--truth", masks, "--set", f"predicted={masks}")
    assert "nothing to do" in told.stdout
    assert told.stdout.splitlines()[1] == f"scores: {scores}"
    again = ["evaluate", "--run", tmp_path / "new", "--truth", masks, "--set", f"predicted={masks}", "--label", "mine"]
    told = typed(*again)  # it prints its own scores alone
    assert [line.split()[0] for line in told.stdout.splitlines()[1:4]] == ["scores:", "evaluation", "mine"]
    assert "masks-val" not in told.stdout
    assert told.stdout.splitlines()[1] == f"scores: {scores.with_name('mine.json')}"


def test_a_dry_run_says_what_each_stage_reads_and_makes(typed, tmp_path):
    (tmp_path / "p.yaml").write_text(
        "run: runs/x\n"
        "stages: {generate: {prompts: p.txt}, masks: {}, shards: {}, pretrain: {method: vlp}, evaluate: {}}"
    )
    refused = one_line(typed("run", "p.yaml", "--dry-run", cwd=tmp_path))
    (tmp_path / "p.txt").write_text("a [dog]\n")
    assert typed("run", "p.yaml", "--dry-run", cwd=tmp_path).stdout.splitlines() == [
        "run: runs/x",
        "generate: p.txt -> images, maps",
        "masks: images, maps -> masks",
        "shards: images, masks -> shards",
        "pretrain: shards -> pretrain/vlp",
        "evaluate: pretrain, shards -> evaluate",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "p.yaml"}
    (tmp_path / "p.txt").unlink()
    told = one_line(typed("run", "p.yaml", cwd=tmp_path))
    assert "there is no prompt file p.txt" in told
    assert refused == told
    assert not (tmp_path / "runs" / "x").exists()


def test_a_wrong_byte_is_mended_as_the_messages_say(tmp_path):
    run = make_run(tmp_path / "a run", masks=False)
    path = run.tar("images", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    again = f"synthgen generate --run '{run.path}'"
    told = one_line(synthgen("masks", "--run", run.path, "--workers", "1"), code=3)
    assert f"{path} is cut off, or a byte of it is wrong" in told
    assert f"delete it and run: {again}" in told
    advice = status(run).advice
    assert advice == (
        f"{path} is damaged: delete it, regenerate it with {again}, then run synthgen masks --run '{run.path}'"
    )
    path.unlink()
    told = one_line(synthgen("masks", "--run", run.path, "--workers", "1"), code=3)
    assert f"there is no file {path}; run: {again}" in told
    assert status(run).advice.startswith(f"{again}, with the same settings as before")
    path.write_bytes(whole)
    assert "it retries the failed unit" in status(run).advice
    assert synthgen("masks", "--run", run.path, "--workers", "1").returncode == 0


def test_failed_units_end_with_code_three(tmp_path):
    run = make_run(tmp_path / "r", masks=False)
    path = run.tar("images", 1)
    path.write_bytes(path.read_bytes()[:9000])
    message = one_line(synthgen("masks", "--run", run.path, "--workers", "1"), code=3)
    assert "unit 000001" in message
    assert "it is cut off" in message
    assert run.mark("masks", 0) is not None


def test_one_unit_is_told_as_one():
    assert summary_line(Summary("masks", units=1, done_before=1)) == "masks: nothing to do, the one unit was done"
    assert summary_line(Summary("masks", units=1, samples=1, seconds=2.0)).startswith("masks: 1 sample in ")


def test_the_version_is_printed_without_a_command(typed):
    from synthgen import __version__

    told = typed("--version")
    assert (told.returncode, told.stdout, told.stderr) == (0, f"synthgen {__version__}\n", "")


def test_the_bare_command_shows_its_help():
    told = synthgen()
    assert told.returncode == 0
    assert told.stdout.startswith("Usage:")
    assert not told.stderr


def test_schema_lists_settings_and_options(typed):
    line = "\nmin_area        number  0.005      drop masks smaller than this fraction of the image\n"
    assert line in typed("schema", "masks").stdout
    assert "\nthreshold     Cross-attention above a threshold.\n" in typed("schema", "masks.refine").stdout
    assert "\nmethod  otsu, fixed  otsu     otsu: Otsu's threshold" in typed("schema", "masks.refine=threshold").stdout


def test_schema_is_json(typed):
    told = typed("schema", "masks", "--json")
    settings = {"refine", "min_area", "max_area", "min_contrast", "max_peak", "min_confidence"}
    assert set(json.loads(told.stdout)["properties"]) == settings
    assert json.loads(told.stdout)["properties"]["refine"]["default"] == {"name": "threshold"}
