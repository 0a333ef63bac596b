"""The commands. They parse, call the API and print; there is no logic here.

Exit codes: 0 done; 2 the command, a file or a setting must be put right; 3 some units failed (the same command tries
only those again); 130 stopped by Ctrl-C (the same command goes on). Anything else is a bug, with its traceback.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthgen.errors import ConfigError, SynthgenError, one_line
from synthgen.options import (
    LATEST,
    AddressOption,
    BackboneOption,
    CaptionOption,
    EngineOption,
    MetadataOption,
    ModelOption,
    PathSetOption,
    PlannedRunOption,
    RunArgument,
    RunOption,
    RunsOption,
    SetOption,
    WorkersOption,
    agree,
    backbone_of,
    chosen_of,
    engine_of,
    export_of,
    method_of,
    pairs_of,
    part_of,
    plan_of,
)

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


@app.command()
def generate(
    prompts: Annotated[str, typer.Option(help="Prompt file (.txt or .jsonl).  [default: the run's own copy]")] = "",
    run: RunOption = LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    template: Annotated[str | None, typer.Option(help="File of templates for the marked words.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(help="Images of each prompt.  [default: 1]")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images; 0 is all.")] = None,
    backbone: BackboneOption = None,
    model: ModelOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn together.  [default: 16]")] = None,
    engine: EngineOption = None,
    workers: WorkersOption = 0,
    address: AddressOption = None,
    settings: SetOption = None,
) -> None:
    """Make images from a prompt file and record where each word looked."""
    part = backbone_of(backbone, settings, model=model, num_steps=steps, guidance_scale=guidance)
    given = {
        "prompts": prompts, "template": template or "", "images_per_prompt": images_per_prompt, "limit": limit,
        "batch_size": batch_size, "backbone": part,
    }  # fmt: skip
    with _created(run, seed) as opened:
        _stage("generate", opened, given, settings, engine_of(engine, workers, address))


@app.command()
def attend(
    images: Annotated[
        str | None, typer.Option(help="Folder of images or tars, or a tar.  [default: the run's]")
    ] = None,
    run: RunOption = LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    metadata: MetadataOption = None,
    caption: CaptionOption = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images; 0 is all.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="How the network sees an image: aspect (its proportions) or stretch.  [default: aspect]"),
    ] = None,
    inversion_steps: Annotated[int | None, typer.Option(help="Invert in so many steps; no noise is added.")] = None,
    backbone: BackboneOption = None,
    model: ModelOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images seen together.  [default: 16]")] = None,
    engine: EngineOption = None,
    workers: WorkersOption = 0,
    address: AddressOption = None,
    settings: SetOption = None,
) -> None:
    """Record where the words of captions look in images that exist."""
    part = backbone_of(backbone, settings, model=model)
    given = {
        "images": images, "metadata": metadata, "caption": caption, "limit": limit, "fit": fit,
        "inversion_steps": inversion_steps, "batch_size": batch_size, "backbone": part,
    }  # fmt: skip
    with _created(run, seed) as opened:
        _stage("attend", opened, given, settings, engine_of(engine, workers, address))


@app.command()
def masks(
    run: RunOption = LATEST,
    refine: Annotated[
        str | None, typer.Option(help="threshold, propagation, grabcut, attentioncut.  [default: threshold]")
    ] = None,
    attentioncut: Annotated[bool, typer.Option("--attentioncut", help="Short for --refine attentioncut.")] = False,
    min_area: Annotated[float | None, typer.Option(help="Smaller masks are dropped, as a share of the image.")] = None,
    engine: EngineOption = None,
    workers: WorkersOption = 0,
    address: AddressOption = None,
    settings: SetOption = None,
) -> None:
    """Turn where each word looked into masks the size of the image."""
    if attentioncut and refine not in (None, "attentioncut"):
        raise ConfigError(f"--attentioncut and --refine {refine} ask for two refiners; give one of them")
    part = part_of("attentioncut" if attentioncut else refine, {})
    _stage("masks", _open(run), {"refine": part, "min_area": min_area}, settings, engine_of(engine, workers, address))


@app.command()
def shards(
    run: RunOption = LATEST,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples of one tar.")] = None,
    val_ratio: Annotated[float | None, typer.Option(help="Share of samples kept for validation.")] = None,
    image_format: Annotated[str | None, typer.Option(help="jpg, png or webp.")] = None,
    engine: EngineOption = None,
    workers: WorkersOption = 0,
    address: AddressOption = None,
    settings: SetOption = None,
) -> None:
    """Write WebDataset tars ready for training, with index and dataset card."""
    given = {"samples_per_shard": samples_per_shard, "val_ratio": val_ratio, "image_format": image_format}
    opened = _open(run)
    _stage("shards", opened, given, settings, engine_of(engine, workers, address))
    print(f"shards: {opened.folder('shards')}")


@app.command()
def pretrain(
    run: RunOption = LATEST,
    method: Annotated[
        str | None, typer.Option(help="mae, vlp, ...: see synthgen schema pretrain.method.  [default: mae]")
    ] = None,
    guided: Annotated[bool, typer.Option("--guided", help="Let the word masks guide the method.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the shards.  [default: 20]")] = None,
    samples_seen: Annotated[int | None, typer.Option(help="Images in all, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    encoder: Annotated[str | None, typer.Option(help="micro, tiny, small, base, large.  [default: micro]")] = None,
    label: Annotated[str | None, typer.Option(help="Folder name under pretrain/.  [default: the method]")] = None,
    settings: SetOption = None,
) -> None:
    """Train an encoder on the run's shards (made if missing). Several GPUs: accelerate launch -m synthgen pretrain."""
    opened = _open(run)
    given = {"epochs": epochs, "samples_seen": samples_seen, "batch_size": batch_size, "encoder": encoder}
    given |= method_of(method, guided, label, settings)
    own = not chosen_of(opened, "pretrain", given, settings)[1].get("data")
    if own and not (opened.folder("shards") / "dataset.json").is_file():  # not made to the end
        _stage("shards", opened, {}, None)
    _stage("pretrain", opened, given, settings)


@app.command()
def evaluate(
    run: RunOption = LATEST,
    encoder: Annotated[str | None, typer.Option(help="Folder, or hub id of a ViT.  [default: the newest]")] = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(help="knn, linear_probe, ...: see synthgen schema evaluate.evaluators; may be repeated."),
    ] = None,
    train: Annotated[str | None, typer.Option(help="Shards or image folder to learn from.")] = None,
    test: Annotated[str | None, typer.Option(help="Shards or image folder to be judged on.")] = None,
    truth: Annotated[str | None, typer.Option(help="Tar or folder of true masks, for mask IoU.")] = None,
    generator: Annotated[str | None, typer.Option(help="Also judge this model's activations.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of the scores.  [default: encoder and test set]")] = None,
    settings: SetOption = None,
) -> None:
    """Ask what an encoder learned; by default what takes seconds: kNN, linear probe, and retrieval if it has texts."""
    from synthgen.console import say_scores

    given = {
        "encoder": encoder, "evaluators": evaluator, "train": train, "test": test, "truth": truth,
        "generator": generator, "label": label,
    }  # fmt: skip
    with _created(run, None) if test or truth else nullcontext(_open(run)) as opened:
        _stage("evaluate", opened, given, settings)
        say_scores(opened)


@app.command("run")
def run_file(
    file: Annotated[Path, typer.Argument(help="Pipeline file, such as pipelines/tiny.yaml.")],
    only: Annotated[str, typer.Option(help="One stage of it.")] = "",
    first: Annotated[str, typer.Option("--from", help="Begin with this stage.")] = "",
    last: Annotated[str, typer.Option("--to", help="End with this stage.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and its inputs; say what would run.")] = False,
    settings: PathSetOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = 0,
    address: AddressOption = None,
) -> None:
    """Run the stages of a pipeline file; what is done stays as it is."""
    from synthgen.console import progress, say, say_scores
    from synthgen.pipeline import read_pipeline

    chosen = engine_of(engine, workers, address)
    agree({"engine": chosen}, settings)
    pipeline = read_pipeline(file, list(pairs_of(settings).items())).select(only=only, first=first, last=last)
    if dry_run:
        print("\n".join(pipeline.rehearsed(pipeline.engine_with(chosen))))
        return
    for summary in pipeline.execute(engine=pipeline.engine_with(chosen), progress=progress()):
        say(summary)
    say_scores(_open(pipeline.run))


@app.command()
def plan(
    file: Annotated[Path | None, typer.Argument(help="Pipeline file, such as pipelines/tiny.yaml.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt file instead: what synthgen generate would do.")] = None,
    images: Annotated[str | None, typer.Option(help="Images instead: what synthgen attend would do.")] = None,
    metadata: MetadataOption = None,
    caption: CaptionOption = None,
    model: ModelOption = None,
    run: PlannedRunOption = None,
    measure: Annotated[bool, typer.Option(help="Make a small sample, or count only.")] = True,
    sample: Annotated[int, typer.Option(min=0, help="Images of it; 0: what takes about a minute.")] = 0,
    engine: EngineOption = None,
    workers: Annotated[int, typer.Option(min=0, help="That will share the work; 0: as many as fit here.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="As for synthgen run, generate or attend.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a pipeline will cost before it starts: images, units, bytes, hours and memory."""
    from synthgen.console import doing
    from synthgen.plan.text import render

    found = plan_of(
        file, run, prompts=prompts, images=images, metadata=metadata, caption=caption, model=model, engine=engine,
        extra=settings, workers=workers, measure=measure, sample=sample, describe=doing("plan"),
    )  # fmt: skip
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()))


@app.command()
def status(
    run: RunArgument = LATEST,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every class and word in it.")] = False,
) -> None:
    """Say what is done, what failed and why, and what to do next."""
    from synthgen.status import status as look
    from synthgen.status.text import render

    found = look(_open(run))
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()))


@app.command()
def view(
    run: RunArgument = LATEST,
    output: Annotated[Path | None, typer.Option(help="Where to write the page.  [default: RUN/view.html]")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many samples.")] = 96,
) -> None:
    """Write one page that shows images, prompts and each word's mask."""
    from synthgen.api import view as write

    print(f"page: {write(_open(run), output, limit=limit)}")


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
    from synthgen.console import progress, say

    opened = _open(run)
    chosen = export_of(format, image_format, settings)
    say(export_dataset(opened, format, out, progress=progress(), **chosen))
    print(f"{format}: {out or opened.folder(f'export-{format}')}")


@app.command()
def doctor(
    run: RunsOption = Path("runs"),
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether this machine will work, and how well."""
    from synthgen.console import doing
    from synthgen.doctor import examine
    from synthgen.doctor.text import render

    found = examine(run, model or "", doing("doctor"))
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()), flush=True)
    for problem in found.problems:
        print(f"synthgen: {problem}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def schema(
    of: Annotated[str, typer.Argument(help="A stage (masks), or a part of it (masks.refine=attentioncut).")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema.")] = False,
) -> None:
    """List the settings of a stage, the parts there are, or the options of one."""
    from synthgen.schema import listing

    print(listing(of, as_json=as_json))


# -- what the commands share


def _created(path: Path, seed: int | None) -> AbstractContextManager[Run]:
    from synthgen.run import Run

    return Run.create_or_roll_back(path, seed=seed)


def _open(path: Path) -> Run:
    from synthgen.run import Run

    return Run.open(path)


def _stage(
    name: str, run: Run, given: dict[str, Any], extra: list[str] | None, engine: dict[str, Any] | None = None
) -> None:
    from synthgen import api
    from synthgen.console import progress, say

    chosen, settings = chosen_of(run, name, given, extra, engine)
    call: Callable[..., Summary] = getattr(api, name)
    say(call(run, progress=progress(), engine=chosen, **settings))


def _refused(error: OSError) -> str:
    """What the system does not let be done, such as reading a folder of somebody else."""
    why = error.strerror or type(error).__name__
    return f"{one_line(OSError(error.filename))}: {why}; put that right, or give another path"


def main() -> None:
    """Run the command line; an error that a person can act on is one line, which cannot steer the console."""
    from synthgen.redact import redact
    from synthgen.text import plain

    try:
        code = app(standalone_mode=False)
    except SynthgenError as error:
        print(f"synthgen: {plain(str(error))}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, FileNotFoundError):
            print(f"synthgen: {plain(_refused(error))}", file=sys.stderr)
            sys.exit(2)
        if not hasattr(error, "format_message"):  # the parser's own errors have one; anything else is a bug
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
            sys.exit(1)
        if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: the command alone asks for help
            print(error.format_message())
            sys.exit(0)
        command = getattr(getattr(error, "ctx", None), "command_path", "synthgen")
        message = error.format_message().rstrip(".")
        print(f"synthgen: {plain(redact(message))}; see: {command} --help", file=sys.stderr)
        code = 2
    if code == 130:
        print("synthgen: stopped; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
