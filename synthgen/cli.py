"""The commands: they parse options, call the API and print; there is no logic here.

Heavy libraries are imported only by the commands that need them, so ``--help`` is fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthgen import flags
from synthgen.errors import ConfigError
from synthgen.options import (
    backbone_settings,
    engine_settings,
    export_settings,
    make_part,
    make_plan,
    method_settings,
    pipeline_overrides,
    resolve_settings,
)

if TYPE_CHECKING:
    from synthgen.run import Run
    from synthgen.runner import Summary

app = typer.Typer(
    name="synthgen",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def program(version: flags.VersionOption = False) -> None:
    """Prompts in, labelled training shards and a trained encoder out."""


@app.command(short_help="Generate images and record their cross-attention maps")
def generate(
    prompts: Annotated[str, typer.Option(help="Prompt file (.txt or .jsonl).  [default: the run's own copy]")] = "",
    run: flags.RunOption = flags.LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    template: Annotated[str | None, typer.Option(help="File of templates to insert the marked words into.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(help="Images per prompt.  [default: 1]")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of images (0: all).")] = None,
    backbone: flags.BackboneOption = None,
    model: flags.ModelOption = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (1: no classifier-free guidance).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch.  [default: 16]")] = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
    settings: flags.SetOption = None,
) -> None:
    """Generate images and record the cross-attention map of each marked word."""
    part = backbone_settings(backbone, settings, model=model, num_steps=steps, guidance_scale=guidance)
    given = {
        "prompts": prompts, "template": template or "", "images_per_prompt": images_per_prompt, "limit": limit,
        "batch_size": batch_size, "backbone": part,
    }  # fmt: skip
    with _created(run, seed) as opened:
        _stage("generate", opened, given, settings, engine_settings(engine, workers, address))


@app.command(short_help="Record cross-attention maps for existing images")
def attend(
    images: flags.ImagesOption = None,
    run: flags.RunOption = flags.LATEST,
    seed: Annotated[int | None, typer.Option(help="Seed of a new run.  [default: 0]")] = None,
    metadata: flags.MetadataOption = None,
    caption: flags.CaptionOption = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of images (0: all).")] = None,
    fit: flags.FitOption = None,
    inversion_steps: flags.InversionOption = None,
    backbone: flags.BackboneOption = None,
    model: flags.ModelOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch.  [default: 16]")] = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
    settings: flags.SetOption = None,
) -> None:
    """Record cross-attention maps for existing images, from their captions."""
    part = backbone_settings(backbone, settings, model=model)
    given = {
        "images": images, "metadata": metadata, "caption": caption, "limit": limit, "fit": fit,
        "inversion_steps": inversion_steps, "batch_size": batch_size, "backbone": part,
    }  # fmt: skip
    with _created(run, seed) as opened:
        _stage("attend", opened, given, settings, engine_settings(engine, workers, address))


@app.command(short_help="Turn attention maps into full-resolution masks")
def masks(
    run: flags.RunOption = flags.LATEST,
    refine: flags.RefineOption = None,
    attentioncut: Annotated[bool, typer.Option("--attentioncut", help="Short for --refine attentioncut.")] = False,
    min_area: Annotated[float | None, typer.Option(help="Drop masks smaller than this fraction of the image.")] = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
    settings: flags.SetOption = None,
) -> None:
    """Turn attention maps into full-resolution masks."""
    if attentioncut and refine not in (None, "attentioncut"):
        raise ConfigError(f"--attentioncut and --refine {refine} ask for two refiners; give one of them")
    given = {"refine": make_part("attentioncut" if attentioncut else refine, {}), "min_area": min_area}
    _stage("masks", _open(run), given, settings, engine_settings(engine, workers, address))


@app.command("filter", short_help="Choose the samples that shards leave out")
def filter_samples(
    run: flags.RunOption = flags.LATEST,
    filters: flags.FilterOption = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
    settings: flags.SetOption = None,
) -> None:
    """List blank, unsafe, unmasked and duplicate images, which shards leave out; nothing is deleted."""
    _stage("filter", _open(run), {"filters": filters}, settings, engine_settings(engine, workers, address))


@app.command(short_help="Write WebDataset tars for training")
def shards(
    run: flags.RunOption = flags.LATEST,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples per tar.")] = None,
    val_ratio: Annotated[float | None, typer.Option(help="Fraction of samples held out for validation.")] = None,
    image_format: Annotated[str | None, typer.Option(help="Image format in the tars: jpg, png or webp.")] = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
    settings: flags.SetOption = None,
) -> None:
    """Write WebDataset tars for training, with an index and a dataset card."""
    given = {"samples_per_shard": samples_per_shard, "val_ratio": val_ratio, "image_format": image_format}
    _stage("shards", _open(run), given, settings, engine_settings(engine, workers, address))


@app.command(short_help="Train an encoder on the run's shards")
def pretrain(
    run: flags.RunOption = flags.LATEST,
    method: flags.MethodOption = None,
    guided: Annotated[bool, typer.Option("--guided", help="Use the word masks to guide the method.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training shards.  [default: 20]")] = None,
    samples_seen: Annotated[int | None, typer.Option(help="Total training images, instead of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    encoder: Annotated[str | None, typer.Option(help="micro, tiny, small, base or large.  [default: micro]")] = None,
    label: Annotated[str | None, typer.Option(help="Output folder under pretrain/.  [default: the method]")] = None,
    settings: flags.SetOption = None,
) -> None:
    """Train an encoder on the run's shards (made if missing). Several GPUs: accelerate launch -m synthgen pretrain."""
    opened = _open(run)
    given = {"epochs": epochs, "samples_seen": samples_seen, "batch_size": batch_size, "encoder": encoder}
    given |= method_settings(method, guided, label, settings)
    own = not resolve_settings(opened, "pretrain", given, settings)[1].get("data")
    if own and not (opened.folder("shards") / "dataset.json").is_file():  # missing or incomplete
        _stage("shards", opened, {}, None)
    _stage("pretrain", opened, given, settings)


@app.command(short_help="Evaluate an encoder")
def evaluate(
    run: flags.RunOption = flags.LATEST,
    encoder: Annotated[str | None, typer.Option(help="Folder, or hub id of a ViT.  [default: the newest one]")] = None,
    evaluator: flags.EvaluatorOption = None,
    train: Annotated[str | None, typer.Option(help="Training set (shards or image folder).")] = None,
    test: Annotated[str | None, typer.Option(help="Test set (shards or image folder).")] = None,
    truth: Annotated[str | None, typer.Option(help="Ground-truth masks for mask IoU (tar or folder).")] = None,
    generator: Annotated[str | None, typer.Option(help="Also evaluate this model's activations.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of this evaluation.  [default: encoder and test set]")] = None,
    settings: flags.SetOption = None,
) -> None:
    """Evaluate an encoder (default: kNN, linear probe, and retrieval if it has a text encoder)."""
    given = {
        "encoder": encoder, "evaluators": evaluator, "train": train, "test": test, "truth": truth,
        "generator": generator, "label": label,
    }  # fmt: skip
    with _created(run, None) if test or truth else nullcontext(_open(run)) as opened:
        _stage("evaluate", opened, given, settings)


@app.command("run", short_help="Run the stages of a pipeline file")
def run_file(
    file: Annotated[Path, typer.Argument(help="Pipeline file, such as pipelines/tiny.yaml.")],
    run: flags.PipelineRunOption = None,
    only: Annotated[str, typer.Option(help="Run only this stage.")] = "",
    first: Annotated[str, typer.Option("--from", help="Start with this stage.")] = "",
    last: Annotated[str, typer.Option("--to", help="Stop after this stage.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the file and print what would run.")] = False,
    settings: flags.PathSetOption = None,
    engine: flags.EngineOption = None,
    workers: flags.WorkersOption = 0,
    address: flags.AddressOption = None,
) -> None:
    """Run the stages of a pipeline file; finished units are skipped."""
    from synthgen.console import print_note, print_result, print_scores, print_summary, progress
    from synthgen.pipeline import read_pipeline

    chosen = engine_settings(engine, workers, address)
    overrides = pipeline_overrides(run, settings, chosen)
    pipeline = read_pipeline(file, overrides).select(only=only, first=first, last=last)
    if dry_run:
        print("\n".join(pipeline.dry_run(chosen)))
        return
    for stage, summary in zip(pipeline.stages, pipeline.execute(engine=chosen, progress=progress()), strict=True):
        print_summary(summary)
        print_result(stage, _open(pipeline.run))
        print_note(pipeline.unevaluated(stage))
    print_scores(_open(pipeline.run))


@app.command(short_help="Estimate the cost of a pipeline")
def plan(
    file: Annotated[Path | None, typer.Argument(help="Pipeline file, such as pipelines/tiny.yaml.")] = None,
    prompts: flags.PlannedPromptsOption = None,
    images: flags.PlannedImagesOption = None,
    metadata: flags.MetadataOption = None,
    caption: flags.CaptionOption = None,
    model: flags.ModelOption = None,
    run: flags.PlannedRunOption = None,
    measure: Annotated[bool, typer.Option(help="Measure a small sample, or only count.")] = True,
    sample: Annotated[int, typer.Option(min=0, help="Sample size in images; 0: as many as fit in about a minute.")] = 0,
    engine: flags.EngineOption = None,
    workers: flags.PlannedWorkersOption = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="As for synthgen run, generate or attend.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate the cost of a pipeline before it starts: images, units, bytes, hours and memory."""
    from synthgen.console import step_printer
    from synthgen.plan.text import render

    found = make_plan(
        file, run, prompts=prompts, images=images, metadata=metadata, caption=caption, model=model, engine=engine,
        extra=settings, workers=workers, measure=measure, sample=sample, describe=step_printer("plan"),
    )  # fmt: skip
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()))


@app.command(short_help="Show what is done, what failed and what to run next")
def status(
    run: flags.RunArgument = flags.LATEST,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every class and word.")] = False,
) -> None:
    """Show what is done, what failed and why, and what to run next."""
    from synthgen.status import status as read_status
    from synthgen.status.text import render

    found = read_status(_open(run))
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()))


@app.command(short_help="Write an HTML page of images, prompts and masks")
def view(
    run: flags.RunArgument = flags.LATEST,
    output: Annotated[Path | None, typer.Option(help="File to write.  [default: RUN/view.html]")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of samples.")] = 96,
) -> None:
    """Write one HTML page that shows images, prompts, and each word's attention and mask."""
    from synthgen.api import view as write

    print(f"page: {write(_open(run), output, limit=limit)}")


@app.command(short_help="Export images and masks as COCO, YOLO or label images")
def export(
    format: Annotated[str, typer.Option("--format", help="Output format: coco, yolo or labels.")],
    run: flags.RunOption = flags.LATEST,
    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: RUN/export-FORMAT]")] = None,
    image_format: Annotated[str | None, typer.Option(help="png or jpg.  [default: jpg for yolo, else png]")] = None,
    settings: flags.SetOption = None,
) -> None:
    """Export images and masks as COCO, YOLO or label images."""
    from synthgen.api import export_dataset
    from synthgen.console import print_summary, progress

    opened = _open(run)
    chosen = export_settings(format, image_format, settings)
    print_summary(export_dataset(opened, format, out, progress=progress(), **chosen))
    print(f"{format}: {out or opened.folder(f'export-{format}')}")


@app.command(short_help="Check WebDataset shards of any program")
def validate(
    folder: Annotated[str, typer.Argument(help="Folder of tars, or of folders such as train and val; or a tar.")],
    decode: Annotated[bool, typer.Option(help="Decode every image and mask.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that webdataset, wids, Hugging Face datasets and open_clip can read shards. Exit code 2: they cannot."""
    from synthgen.console import progress
    from synthgen.validation import render, validate_shards

    found = validate_shards(folder, decode=decode, progress=progress())
    print(json.dumps(found.plain(), indent=2) if as_json else render(found))
    if not found.valid:
        raise typer.Exit(2)


@app.command(short_help="Check this machine")
def doctor(
    run: flags.RunsOption = Path("runs"),
    model: flags.ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: libraries, devices, attention recording, disk, memory and models."""
    from synthgen.console import step_printer
    from synthgen.doctor import examine
    from synthgen.doctor.text import render

    found = examine(run, model or "", step_printer("doctor"))
    print(json.dumps(found.plain(), indent=2) if as_json else render(found, whole=not sys.stdout.isatty()), flush=True)
    for problem in found.problems:
        print(f"synthgen: {problem}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(2)


@app.command(short_help="List stages, parts and their settings")
def schema(
    of: Annotated[
        str, typer.Argument(help="Stage (masks), setting (masks.refine) or part (masks.refine=attentioncut).")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema.")] = False,
) -> None:
    """List the settings of a stage, the parts that a setting accepts, or the options of a part."""
    from synthgen.schema import listing

    print(listing(of, as_json=as_json))


# -- shared by the commands


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
    from synthgen.console import print_result, print_scores, print_summary, progress
    from synthgen.stages import make_stage
    from synthgen.stages.evaluate import Evaluate

    chosen, settings = resolve_settings(run, name, given, extra, engine)
    call: Callable[..., Summary] = getattr(api, name)
    print_summary(call(run, progress=progress(), engine=chosen, **settings))
    stage = make_stage(name, settings)
    print_result(stage, run)
    if isinstance(stage, Evaluate):
        print_scores(run, stage.path(run).stem)
