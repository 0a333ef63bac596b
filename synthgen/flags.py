"""The options of the commands: their names, types and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthgen import __version__

__all__ = [
    "LATEST",
    "AddressOption",
    "BackboneOption",
    "CaptionOption",
    "EngineOption",
    "EvaluatorOption",
    "FilterOption",
    "FitOption",
    "ImagesOption",
    "InversionOption",
    "MetadataOption",
    "MethodOption",
    "ModelOption",
    "PathSetOption",
    "PipelineRunOption",
    "PlannedImagesOption",
    "PlannedPromptsOption",
    "PlannedRunOption",
    "PlannedWorkersOption",
    "RefineOption",
    "RunArgument",
    "RunOption",
    "RunsOption",
    "SetOption",
    "VersionOption",
    "WorkersOption",
]

LATEST = Path("runs/latest")


def _folder(name: str | Path) -> Path:
    from synthgen.config import run_folder

    return run_folder(name)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"synthgen {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]
RunOption = Annotated[Path, typer.Option("--run", parser=_folder, metavar="<path>", help="Run directory.")]
RunArgument = Annotated[Path, typer.Argument(parser=_folder, help="Run directory.")]
RunsOption = Annotated[
    Path, typer.Option("--run", parser=_folder, metavar="<path>", help="Directory that runs would be written to.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, or PART.NAME=VALUE (see synthgen schema)."),
]
PathSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a setting, for example stages.masks.min_area=0.01."),
]
PipelineRunOption = Annotated[
    Path | None,
    typer.Option("--run", parser=_folder, metavar="<path>", help="Run directory.  [default: that of the file]"),
]
PlannedRunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        parser=_folder,
        metavar="<path>",
        help="Run directory.  [default: that of the pipeline file; otherwise runs/latest, or a new one]",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(help="Engine: local, accelerate or ray.  [default: local; accelerate under accelerate launch]"),
]
WorkersOption = Annotated[
    int, typer.Option(help="Worker processes (Ray: actors); 0: one per GPU, or per CPU core without GPUs.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join, such as head:6379.  [default: RAY_ADDRESS, else a local one]")
]
BackboneOption = Annotated[
    str | None,
    typer.Option(help="Backbone: tiny (ships with synthgen) or diffusers.  [default: tiny; diffusers with --model]"),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Short name (sd15, sdxl, sd35, flux-dev, ...), folder or hub id of a diffusers model."),
]
MetadataOption = Annotated[
    str | None,
    typer.Option(
        help="Captions of a folder of images: .jsonl or .csv (file_name, text), or COCO's captions_*.json.  "
        "[default: metadata.jsonl or .csv in the folder, else the .txt next to each image]"
    ),
]
CaptionOption = Annotated[
    str | None, typer.Option(help="Caption for images that have none; {label} is replaced by the class.")
]
ImagesOption = Annotated[
    str | None, typer.Option(help="Image folder, tar, or folder of tars.  [default: the one that the run already uses]")
]
FitOption = Annotated[
    str | None,
    typer.Option(help="How images are resized for the model: aspect (keep proportions) or stretch.  [default: aspect]"),
]
InversionOption = Annotated[
    int | None,
    typer.Option(help="Use inversion with this many steps (DDIM; SD 3 and FLUX: Euler) instead of adding noise."),
]
RefineOption = Annotated[
    str | None, typer.Option(help="Refiner: threshold, propagation, grabcut or attentioncut.  [default: threshold]")
]
MethodOption = Annotated[
    str | None, typer.Option(help="Method: mae, vlp, ... (see synthgen schema pretrain.method).  [default: mae]")
]
EvaluatorOption = Annotated[
    list[str] | None,
    typer.Option(help="Evaluator: knn, linear_probe, ... (see synthgen schema evaluate.evaluators); repeatable."),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        help="Filter: blank, unsafe, unmasked, duplicate or clip; repeatable.  [default: all but clip]",
    ),
]
PlannedPromptsOption = Annotated[
    str | None, typer.Option(help="Plan `synthgen generate` on this prompt file (instead of a pipeline file).")
]
PlannedImagesOption = Annotated[
    str | None, typer.Option(help="Plan `synthgen attend` on these images (instead of a pipeline file).")
]
PlannedWorkersOption = Annotated[
    int, typer.Option(min=0, help="Workers to assume; 0: as many as the engine would start on this machine.")
]
