"""The commands. They parse, call the API and print; there is no logic here.

Exit codes: 0 done; 2 the command, a file or a setting must be put right; 3 some units failed (the same command tries
only those again); 130 stopped by Ctrl-C (the same command goes on). Anything else is a bug, with its traceback.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthgen.errors import ConfigError, SynthgenError

if TYPE_CHECKING:
    from synthgen.run import Run
    from synthgen.runner import Summary

app = typer.Typer(
    name="synthgen",
    help="Prompts in, labelled training shards and a trained encoder out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RunOption = Annotated[Path, typer.Option("--run", help="Run directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of this stage, e.g. min_area=0.01."),
]
WorkersOption = Annotated[int, typer.Option(help="Processes; 0: one for every GPU, or core where there is none.")]
BackboneOption = Annotated[
    str | None, typer.Option(help="tiny (ships with synthgen), diffusers.  [default: tiny; diffusers with --model]")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Short name (sd15, sdxl, sd35, flux-dev, ...), folder or hub id of a diffusers model."),
]
LATEST = Path("runs/latest")


@app.command()
def generate(
    prompts: Annotated[str, typer.Option(help="Prompt file (.txt or .jsonl).")],
    run: RunOption = LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    template: Annotated[str | None, typer.Option(help="File of templates for the marked words.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(help="Images of each prompt.  [default: 1]")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images.")] = None,
    backbone: BackboneOption = None,
    model: ModelOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn together.  [default: 16]")] = None,
    workers: WorkersOption = 0,
    settings: SetOption = None,
) -> None:
    """Make images from a prompt file and record where each word looked."""
    options = {"model": model, "num_steps": steps, "guidance_scale": guidance}
    part = _choice(backbone or ("diffusers" if model else "tiny"), options)
    given = {
        "prompts": prompts, "template": template, "images_per_prompt": images_per_prompt, "limit": limit,
        "batch_size": batch_size, "backbone": part,
    }  # fmt: skip
    _stage("generate", _create(run, seed), given, settings, workers)


@app.command()
def attend(
    images: Annotated[str, typer.Option(help="WebDataset tars with captions: a file, a pattern or a folder.")],
    run: RunOption = LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    backbone: BackboneOption = None,
    model: ModelOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images seen together.  [default: 16]")] = None,
    workers: WorkersOption = 0,
    settings: SetOption = None,
) -> None:
    """Record where the words of captions look in images that exist."""
    part = _choice(backbone or ("diffusers" if model else "tiny"), {"model": model})
    given = {"images": images, "backbone": part, "batch_size": batch_size}
    _stage("attend", _create(run, seed), given, settings, workers)


@app.command()
def masks(
    run: RunOption = LATEST,
    refine: Annotated[str | None, typer.Option(help="threshold, attentioncut.  [default: threshold]")] = None,
    attentioncut: Annotated[bool, typer.Option("--attentioncut", help="Short for --refine attentioncut.")] = False,
    min_area: Annotated[float | None, typer.Option(help="Smaller masks are dropped, as a share of the image.")] = None,
    workers: WorkersOption = 0,
    settings: SetOption = None,
) -> None:
    """Turn where each word looked into masks the size of the image."""
    if attentioncut and refine not in (None, "attentioncut"):
        raise ConfigError(f"--attentioncut and --refine {refine} ask for two refiners; give one of them")
    part = _choice("attentioncut" if attentioncut else refine or "threshold", {})
    _stage("masks", _open(run), {"refine": part, "min_area": min_area}, settings, workers)


@app.command()
def shards(
    run: RunOption = LATEST,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples of one tar.")] = None,
    val_ratio: Annotated[float | None, typer.Option(help="Share of samples kept for validation.")] = None,
    image_format: Annotated[str | None, typer.Option(help="jpg, png or webp.")] = None,
    workers: WorkersOption = 0,
    settings: SetOption = None,
) -> None:
    """Write WebDataset tars ready for training, with index and dataset card."""
    given = {"samples_per_shard": samples_per_shard, "val_ratio": val_ratio, "image_format": image_format}
    opened = _open(run)
    _stage("shards", opened, given, settings, workers)
    print(f"shards: {opened.folder('shards')}")


@app.command()
def pretrain(
    run: RunOption = LATEST,
    method: Annotated[str, typer.Option(help="mae.")] = "mae",
    guided: Annotated[bool, typer.Option("--guided", help="Hide patches under the masks sooner.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the shards.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    encoder: Annotated[str | None, typer.Option(help="micro, tiny, small, base, large.  [default: micro]")] = None,
    label: Annotated[str | None, typer.Option(help="Folder name under pretrain/.  [default: the method]")] = None,
    settings: SetOption = None,
) -> None:
    """Train an encoder on the run's shards (made first where they are missing)."""
    opened = _open(run)
    if not (opened.folder("shards") / "dataset.json").is_file():  # not made, or not to the end: with its own settings
        begun = opened.manifest()["artifacts"].get("shards", {})
        _stage("shards", opened, begun.get("settings", {}), None, 0)
    options = {"foreground_share": 0.5} if guided else {}
    given = {
        "method": {"name": method, **options}, "epochs": epochs, "batch_size": batch_size,
        "encoder": encoder, "label": label or (f"{method}-guided" if guided else None),
    }  # fmt: skip
    _stage("pretrain", opened, given, settings, 1)


@app.command()
def evaluate(
    run: RunOption = LATEST,
    encoder: Annotated[str | None, typer.Option(help="Encoder folder.  [default: the run's newest]")] = None,
    train: Annotated[str | None, typer.Option(help="Labelled shards or image folder to learn from.")] = None,
    test: Annotated[str | None, typer.Option(help="Labelled shards or image folder to be judged on.")] = None,
    truth: Annotated[str | None, typer.Option(help="Tar or folder of true masks, for mask IoU.")] = None,
    settings: SetOption = None,
) -> None:
    """Ask what an encoder learned: kNN, linear probe, and mask IoU where truth is known."""
    given = {"encoder": encoder, "train": train, "test": test, "truth": truth}
    _stage("evaluate", _open(run), given, settings, 1)
    _print_scores(run)


@app.command("run")
def run_file(
    file: Annotated[Path, typer.Argument(help="Pipeline file, such as pipelines/tiny.yaml.")],
    only: Annotated[str, typer.Option(help="One stage of it.")] = "",
    first: Annotated[str, typer.Option("--from", help="Begin with this stage.")] = "",
    last: Annotated[str, typer.Option("--to", help="End with this stage.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file and say what would run.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="e.g. stages.masks.min_area=0.01")
    ] = None,
    workers: WorkersOption = 0,
) -> None:
    """Run the stages of a pipeline file; what is done stays as it is."""
    from synthgen.console import ConsoleProgress, tell
    from synthgen.engines import ENGINES
    from synthgen.pipeline import read_pipeline

    pipeline = read_pipeline(file, list(_pairs(settings).items())).select(only=only, first=first, last=last)
    if dry_run:
        for stage in pipeline.stages:
            print(
                f"{stage.name}: {', '.join(stage.reads) or 'prompts'} -> {pipeline.run}/{', '.join(stage.artifacts())}"
            )
        return
    engine = ENGINES.build("local", workers=workers) if workers else None
    for summary in pipeline.execute(engine=engine, progress=ConsoleProgress()):
        print(tell(summary))
    _print_scores(pipeline.run)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="Run directory.")] = LATEST) -> None:
    """Say what is done, what failed and why, and what to do next."""
    from synthgen.run import Run
    from synthgen.status import status as look
    from synthgen.status_text import render

    print(render(look(Run.open(run))))


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Run directory.")] = LATEST,
    output: Annotated[Path | None, typer.Option(help="Where to write the page.  [default: RUN/view.html]")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many samples.")] = 96,
) -> None:
    """Write one page that shows images, prompts and each word's mask."""
    from synthgen.api import view as write
    from synthgen.run import Run

    print(f"page: {write(Run.open(run), output, limit=limit)}")


@app.command()
def export(
    format: Annotated[str, typer.Option("--format", help="coco, yolo or labels.")],
    run: RunOption = LATEST,
    out: Annotated[Path | None, typer.Option(help="Where to.  [default: RUN/export-FORMAT]")] = None,
    image_format: Annotated[str | None, typer.Option(help="png or jpg.  [default: jpg for yolo, else png]")] = None,
    settings: SetOption = None,
) -> None:
    """Write images and masks as COCO, YOLO or label images."""
    from synthgen.api import export_dataset
    from synthgen.console import ConsoleProgress, tell

    opened = _open(run)
    given = _pairs(settings) | ({"image_format": image_format} if image_format else {})
    print(tell(export_dataset(opened, format, out, progress=ConsoleProgress(), **given)))
    print(f"{format}: {out or opened.folder(f'export-{format}')}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Option("--run", help="Where runs would be written.")] = Path("runs"),
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether this machine will work, and how well."""
    import json

    from synthgen.doctor import examine
    from synthgen.doctor_text import render

    found = examine(run, model or "")
    print(json.dumps(found.plain(), indent=2) if as_json else render(found), flush=True)
    for problem in found.problems:
        print(f"synthgen: {problem}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def schema(
    stage: Annotated[str, typer.Argument(help="One of the stages, such as masks.")],
) -> None:
    """Print the settings of a stage as JSON schema."""
    import json

    from synthgen.config import settings_schema
    from synthgen.stages import STAGES

    print(json.dumps(settings_schema(STAGES.load(stage)), indent=2))


# -- what the commands share


def _create(path: Path, seed: int | None) -> Run:
    from synthgen.run import Run

    return Run.create(path, seed=seed)


def _open(path: Path) -> Run:
    from synthgen.run import Run

    return Run.open(path)


def _choice(part: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"name": part, **{key: value for key, value in options.items() if value is not None}}


def _pairs(settings: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` options as a mapping; values are YAML, so numbers are numbers."""
    import yaml

    from synthgen.config import load_yaml

    pairs = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, not {setting!r}")
        try:
            pairs[name] = load_yaml(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {name}: {value!r} is not a YAML value") from None
    return pairs


def _stage(name: str, run: Run, given: dict[str, Any], extra: list[str] | None, workers: int) -> None:
    from synthgen import api
    from synthgen.console import ConsoleProgress, tell
    from synthgen.engines import ENGINES

    settings = {key: value for key, value in given.items() if value is not None}
    for dotted, value in _pairs(extra).items():
        part, _, option = dotted.partition(".")
        if option:  # --set refine.smoothness=2 is an option of a part
            before = settings.get(part, {})
            if not isinstance(before, str | dict):
                raise ConfigError(f"--set {dotted}: {part} is no part with options, but {before!r}")
            settings[part] = {**({"name": before} if isinstance(before, str) else before), option: value}
        else:
            settings[part] = value
    engine = ENGINES.build("local", workers=workers)
    call: Callable[..., Summary] = getattr(api, name)
    print(tell(call(run, engine=engine, progress=ConsoleProgress(), **settings)))


def _print_scores(run: Path) -> None:
    from synthgen.run import Run
    from synthgen.status_text import scores

    for line in scores(Run.open(run)):
        print(line)


def main() -> None:
    """Run the command line; an error that a person can act on is one line."""
    try:
        code = app(standalone_mode=False)
    except SynthgenError as error:
        print(f"synthgen: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's own errors have one; anything else is a bug
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: the command alone asks for help
            print(error.format_message())
            sys.exit(0)
        command = getattr(getattr(error, "ctx", None), "command_path", "synthgen")
        message = error.format_message().rstrip(".")
        print(f"synthgen: {message}; see: {command} --help", file=sys.stderr)
        code = 2
    if code == 130:
        print("synthgen: stopped; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
