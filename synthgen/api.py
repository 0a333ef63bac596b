"""What the commands do, as functions. Each stage function has the settings of its stage as keyword arguments.

``engine`` is where the work is done: a name, such as ``"local"``, or ``Choice("ray", {"workers": 8})``.

Stages deal their units out to processes, so a script that calls them keeps its calls under
``if __name__ == "__main__":``, as for all of Python's ``multiprocessing``.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from synthgen.config import build
from synthgen.entries import merge_settings
from synthgen.errors import MissingArtifact
from synthgen.records import Generation, WordMasks
from synthgen.run import Run
from synthgen.runner import EngineLike, Progress, Summary, run_stage
from synthgen.stages import STAGES, make_stage

if TYPE_CHECKING:
    from synthgen.pipeline import Override
    from synthgen.plan import Plan

__all__ = [
    "attend",
    "evaluate",
    "export_dataset",
    "generate",
    "make_stage",
    "masks",
    "plan_pipeline",
    "plan_stage",
    "pretrain",
    "run_pipeline",
    "samples",
    "settings_to_go_on",
    "shards",
    "view",
]


def generate(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Make images and record where each word looked; settings as in :class:`synthgen.stages.generate.Generate`."""
    return _stage("generate", run, engine, progress, settings)


def attend(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Record where captions look in images that exist; settings as in :class:`synthgen.stages.attend.Attend`."""
    return _stage("attend", run, engine, progress, settings)


def masks(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Turn maps into masks; settings as in :class:`synthgen.stages.masks.Masks`."""
    return _stage("masks", run, engine, progress, settings)


def shards(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Write training tars; settings as in :class:`synthgen.stages.shards.Shards`."""
    return _stage("shards", run, engine, progress, settings)


def pretrain(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Train an encoder; settings as in :class:`synthgen.stages.pretrain.Pretrain`."""
    return _stage("pretrain", run, engine, progress, settings)


def evaluate(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Ask what an encoder learned; settings as in :class:`synthgen.stages.evaluate.Evaluate`."""
    return _stage("evaluate", run, engine, progress, settings)


def settings_to_go_on(run: Run, stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a command stands for: those its folder was begun with, and what is ``given`` in their place.

    What it was begun with counts where something was made with it, or where nothing is given. The functions of this
    module do not ask for it, and pipeline files do not either: they say everything themselves.

    Raises:
        MissingArtifact: a setting is needed that has no default, and the folder has not been begun.
    """
    contract = STAGES.load(stage)
    folder = contract.folder_of(given)
    begun = run.find_artifact(folder)
    asked = any(value not in ("", None) for value in given.values())
    known = {item.name: item for item in dataclasses.fields(contract)}
    if begun is None or begun["stage"] != stage or (asked and not run.is_nonempty(folder)):
        for name, item in known.items():
            if item.default is dataclasses.MISSING and name not in given:
                raise MissingArtifact(
                    f"{run.path} has no {name} of {stage} yet; give some with: "
                    f"synthgen {stage} --{name} PATH --run {shlex.quote(str(run.path))}"
                )
        return dict(given)
    before = {name: value for name, value in begun["settings"].items() if name in known}
    settings = merge_settings(before, given)
    if "label" in given and contract.folder_of(settings | {"label": before.get("label", "")}) == folder:
        settings["label"] = before.get("label", "")  # the folder has that name anyway
    return settings


def _stage(name: str, run: Run, engine: EngineLike, progress: Progress | None, settings: Mapping[str, Any]) -> Summary:
    return run_stage(make_stage(name, settings), run, engine, progress)


def samples(run: Run) -> Iterator[tuple[Generation, WordMasks | None]]:
    """Every finished sample of a run: image, maps, and masks where they have been made."""
    from synthgen import codecs
    from synthgen.stages.masks import read_generations

    for unit in run.units("images"):
        masked = run.tar("masks", unit).is_file()
        found = {key: codecs.decode_masks(key, members) for key, members in run.read("masks", unit)} if masked else {}
        for generation in read_generations(run, unit):
            yield generation, found.get(generation.request.key)


def view(run: Run, path: Path | None = None, *, limit: int = 96) -> Path:
    """Write one self-contained page that shows the run; returns where it lies."""
    from synthgen.viewers.page import write_page

    return write_page(run, path, limit=limit)


def export_dataset(
    run: Run, format: str, folder: Path | None = None, *, progress: Progress | None = None, **settings: Any
) -> Summary:
    """Write the masked samples as ``coco``, ``yolo`` or ``labels``; see :class:`synthgen.interchange.Export`."""
    from synthgen import interchange

    chosen = build(interchange.Export, {"format": format, **settings}, where="export")
    return interchange.export_dataset(run, chosen, folder, progress=progress)


def run_pipeline(
    path: str | Path,
    *,
    overrides: tuple[Override, ...] = (),
    engine: EngineLike = None,
    progress: Progress | None = None,
) -> list[Summary]:
    """Run the stages of a pipeline file in order; what is done stays as it is."""
    from synthgen.pipeline import read_pipeline

    return list(read_pipeline(path, overrides=overrides).execute(engine=engine, progress=progress))


def plan_pipeline(
    path: str | Path,
    *,
    overrides: tuple[Override, ...] = (),
    engine: EngineLike = None,
    workers: int = 0,
    measure: bool = True,
    sample: int = 0,
    describe: Callable[[str], None] = lambda text: None,
) -> Plan:
    """What a pipeline file will cost; arguments as in :func:`synthgen.plan.plan`. Its run is left as it is."""
    from synthgen.pipeline import read_pipeline
    from synthgen.plan import plan

    pipeline = read_pipeline(path, overrides=overrides)
    engine = pipeline.engine_with({"name": engine}) if isinstance(engine, str) else engine  # as ``synthgen run`` does
    return plan(pipeline, engine=engine, workers=workers, measure=measure, images=sample, describe=describe)


def plan_stage(
    stage: Literal["generate", "attend"],
    run: str | Path,
    *,
    engine: EngineLike = None,
    workers: int = 0,
    measure: bool = True,
    sample: int = 0,
    describe: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Plan:
    """What that stage alone with these settings will cost; see :func:`plan_pipeline`."""
    from synthgen.plan import pipeline_of, plan

    pipeline = pipeline_of(make_stage(stage, settings), run)
    return plan(pipeline, engine=engine, workers=workers, measure=measure, images=sample, describe=describe)
