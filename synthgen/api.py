"""The commands as functions. A stage's function has the settings of the stage as keyword arguments.

``engine`` says where units are made: a name, such as ``"local"``, or ``Choice("ray", {"workers": 8})``.

Stages start worker processes, so a script must call them under ``if __name__ == "__main__":``, as everywhere with
Python's ``multiprocessing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from synthgen.config import build
from synthgen.records import Generation, WordMasks
from synthgen.run import Run
from synthgen.runner import EngineLike, Progress, Summary, run_stage
from synthgen.stages import make_stage

if TYPE_CHECKING:
    from synthgen.plan import Plan
    from synthgen.validation import Validation

__all__ = [
    "attend",
    "evaluate",
    "export_dataset",
    "filter",
    "generate",
    "masks",
    "plan_pipeline",
    "plan_stage",
    "pretrain",
    "run_pipeline",
    "samples",
    "shards",
    "validate",
    "view",
]


def generate(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Generate images and record cross-attention; settings as in :class:`synthgen.stages.generate.Generate`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the engine cannot run this stage.
        MissingArtifact: the prompt file or the template file does not exist.
        PromptError: one of the two cannot be read.
        StaleArtifact: the run holds images that were made with other settings or prompts.
        MissingWeights: the model is not on this machine and cannot be downloaded.
        UnitsFailed: some units failed; the same call retries only those.
    """
    return _stage("generate", run, engine, progress, settings)


def attend(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Record cross-attention for existing images; settings as in :class:`synthgen.stages.attend.Attend`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the engine cannot run this stage.
        MissingArtifact: there are no images at the source.
        PromptError: a caption is missing in a folder of images, or not one of the captions in tars can be used.
        StaleArtifact: the run holds images that were made with other settings or from another source.
        MissingWeights: the model is not on this machine and cannot be downloaded.
        UnitsFailed: some units failed; the same call retries only those.
    """
    return _stage("attend", run, engine, progress, settings)


def masks(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Turn maps into masks; settings as in :class:`synthgen.stages.masks.Masks`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the engine cannot run this stage.
        MissingArtifact: the run has no images with maps.
        StaleArtifact: the run holds masks that were made with other settings.
        UnitsFailed: some units failed; the same call retries only those.
    """
    return _stage("masks", run, engine, progress, settings)


def shards(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Write training tars; settings as in :class:`synthgen.stages.shards.Shards`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the engine cannot run this stage.
        MissingArtifact: the run has no images, or some of them have no masks.
        StaleArtifact: the run holds shards made with other settings or of other units, or a unit has other settings.
        CorruptFile: the tar of a unit is missing or cut off.
        UnitsFailed: some units failed; the same call retries only those.
    """
    return _stage("shards", run, engine, progress, settings)


def pretrain(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Train an encoder; settings as in :class:`synthgen.stages.pretrain.Pretrain`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the engine cannot run this stage.
        MissingArtifact: the run has no shards, or ``data`` or ``start`` does not exist.
        StaleArtifact: the folder of this label holds a training with other settings.
        CorruptFile: a shard, a sample or the weights of ``start`` cannot be read.
        UnitsFailed: the training failed; the same call resumes it from its last checkpoint.
    """
    return _stage("pretrain", run, engine, progress, settings)


def filter(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """List the samples that shards leave out; settings as in :class:`synthgen.stages.filter.Filter`.

    Raises:
        ConfigError: a filter or a setting is unknown or wrong.
        MissingArtifact: there are no images, or a filter reads masks and some images have none.
        MissingWeights: a filter's model does not exist or cannot be downloaded.
        StaleArtifact: the run was filtered with other settings.
        CorruptFile: a sample cannot be read.
        UnitsFailed: some units failed; the same call retries them.
    """
    return _stage("filter", run, engine, progress, settings)


def evaluate(run: Run, *, engine: EngineLike = None, progress: Progress | None = None, **settings: Any) -> Summary:
    """Evaluate an encoder; settings as in :class:`synthgen.stages.evaluate.Evaluate`.

    Raises:
        ConfigError: a setting is unknown or wrong, the engine cannot run this stage, or an evaluator lacks its data.
        MissingArtifact: there is no encoder, or there are no images to evaluate it on.
        StaleArtifact: the file of this label holds scores that were made with other settings or inputs.
        CorruptFile: the encoder or a shard cannot be read.
        UnitsFailed: the evaluation failed.
    """
    return _stage("evaluate", run, engine, progress, settings)


def _stage(name: str, run: Run, engine: EngineLike, progress: Progress | None, settings: Mapping[str, Any]) -> Summary:
    return run_stage(make_stage(name, settings), run, engine, progress)


def samples(run: Run) -> Iterator[tuple[Generation, WordMasks | None]]:
    """Every finished sample of a run: image and maps, and its masks or None.

    Raises:
        MissingArtifact: the run has no images, or a unit of images has no maps.
        CorruptFile: a tar or a sample cannot be read.
    """
    from synthgen import codecs
    from synthgen.stages.masks import read_generations

    for unit in run.units("images"):
        masked = run.tar("masks", unit).is_file()
        found = {key: codecs.decode_masks(key, members) for key, members in run.read("masks", unit)} if masked else {}
        for generation in read_generations(run, unit):
            yield generation, found.get(generation.request.key)


def view(run: Run, path: Path | None = None, *, limit: int = 96) -> Path:
    """Write one self-contained page that shows the run (by default ``view.html`` in it) and return its path.

    At most ``limit`` samples are shown. A tar that cannot be read is named on the page.

    Raises:
        ValueError: ``limit`` is negative.
        StorageError: the page cannot be written.
    """
    from synthgen.viewers.page import write_page

    return write_page(run, path, limit=limit)


def validate(folder: str | Path, *, decode: bool = True) -> Validation:
    """Check that WebDataset tars, by whoever, can be read by the usual readers; see :mod:`synthgen.validation`.

    Args:
        folder: of tars, of folders of tars such as ``train`` and ``val``, or a single tar.
        decode: decode every image and mask.

    Raises:
        MissingArtifact: there is no tar.
    """
    from synthgen.validation import validate_shards

    return validate_shards(folder, decode=decode)


def export_dataset(
    run: Run, format: str, folder: Path | None = None, *, progress: Progress | None = None, **settings: Any
) -> Summary:
    """Write the masked samples as ``coco``, ``yolo`` or ``labels``; see :class:`synthgen.export.Export`.

    Raises:
        ConfigError: a setting is unknown or wrong, or the folder holds something else.
        MissingArtifact: the run has no masks, or not of every image.
        StaleArtifact: the folder holds an export of other masks, or with other settings.
        CorruptFile: a sample cannot be read, or its masks do not fit it.
    """
    from synthgen import export

    chosen = build(export.Export, {"format": format, **settings}, where="export")
    return export.export_dataset(run, chosen, folder, progress=progress)


def run_pipeline(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    engine: EngineLike = None,
    progress: Progress | None = None,
) -> list[Summary]:
    """Run the stages of a pipeline file in order; finished units are skipped.

    Args:
        path: of the file.
        overrides: settings by dotted paths, such as ``{"stages.masks.min_area": 0.01}``.
        engine: replaces that of the file; a bare name keeps the options that the file has for this engine.
        progress: receives the progress of each stage.

    Raises:
        MissingArtifact: there is no such file, or a stage lacks its input.
        ConfigError: the file or an override is wrong, or the engine cannot run a stage.
        StaleArtifact: the run was made with other settings.
        UnitsFailed: some units of a stage failed; later stages have not run.
    """
    from synthgen.pipeline import read_pipeline

    return list(read_pipeline(path, overrides=overrides).execute(engine=engine, progress=progress))


def plan_pipeline(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    engine: EngineLike = None,
    workers: int = 0,
    measure: bool = True,
    sample: int = 0,
    describe: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The estimated cost of a pipeline file; writes nothing to its run.

    Arguments as in :func:`run_pipeline`; the others, and the errors as in :func:`synthgen.plan.plan`.
    """
    from synthgen.pipeline import read_pipeline
    from synthgen.plan import plan

    pipeline = read_pipeline(path, overrides=overrides)
    return plan(pipeline, engine=engine, workers=workers, measure=measure, sample=sample, describe=describe)


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
    """The estimated cost of one stage with these settings; see :func:`plan_pipeline`."""
    from synthgen.plan import pipeline_of, plan

    pipeline = pipeline_of(make_stage(stage, settings), run)
    return plan(pipeline, engine=engine, workers=workers, measure=measure, sample=sample, describe=describe)
