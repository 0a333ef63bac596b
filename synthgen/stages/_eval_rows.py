"""The rows of the table of scores, and the networks behind them."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.run import Run, digest
from synthgen.stages import Worker
from synthgen.stores import parse_location

if TYPE_CHECKING:
    from synthgen.diffusion.features import FeatureReader
    from synthgen.evaluators import Baseline, Evaluator, Need, Row
    from synthgen.evaluators._extraction import Extractor
    from synthgen.stages.evaluate import Evaluate

__all__ = ["default_label", "generator_choice", "has_scores", "make_extractor", "source_label", "table_rows"]

_BASELINES: dict[str, Baseline] = {
    "random encoder": "random",
    "random generator": "random generator",
    "pixels": "pixels",
}


def has_scores(evaluator: Evaluator, row: Row) -> bool:
    """Whether an evaluator has scores for a kind of row.

    For a generator all have that need no texts; only for a generator those that need latents.
    """
    if row == "generator":
        return evaluator.needs not in ("pairs", "masks")
    return (row == "encoder" and evaluator.needs != "latents") or row in evaluator.baselines


def table_rows(stage: Evaluate, folder: Path | None, evaluators: Collection[Evaluator]) -> dict[str, Row]:
    """The rows that some evaluator has scores for: name and kind. ``folder`` is the encoder's.

    Raises:
        ConfigError: the encoder has the name of another row.
    """
    rows: dict[str, Row] = {"generator": "generator"} if stage.generator else {}
    rows |= _BASELINES if stage.baselines else {}
    if folder:
        name = encoder_name(stage, folder)
        if name in rows:
            raise ConfigError(f"the encoder in {folder} has the name of another row of the table; give it another name")
        rows = {name: "encoder", **rows}
    possible = {"random": bool(folder), "random generator": bool(stage.generator)}
    return {
        row: kind
        for row, kind in rows.items()
        if any(has_scores(one, kind) for one in evaluators) and possible.get(kind, True)
    }


def encoder_name(stage: Evaluate, folder: Path) -> str:
    """The name of the encoder: that of its folder, or of the model on the hub."""
    given = stage.encoder
    return folder.resolve().name if not given or parse_location(given).exists() else given.rpartition("/")[2]


def default_label(stage: Evaluate, folder: Path | None, *, images: bool) -> str:
    """The name of the file of scores, without its suffix.

    Args:
        stage: the settings.
        folder: the encoder's, if there is one.
        images: whether models are evaluated, not only masks.
    """
    parts = [encoder_name(stage, folder)] if folder else []
    parts += ["generator"] if stage.generator and images else []
    parts = parts or ["masks"]
    parts += [source_label(stage.test)] if stage.test else []
    parts += [source_label(stage.truth)] if stage.truth and images else []
    return "-".join(parts)


def source_label(source: str) -> str:
    """The part of a file name that stands for a source: its stem.

    A pattern, or a stem with characters that shells or stores treat specially, becomes the last plain part of its path
    with a hash of the whole: ``val-`` and eight digits for ``runs/*/shards/val/*.tar``.
    """
    stem, folders = Path(source).stem, Path(source).parent.parts
    if re.fullmatch(r"[\w,+=@-][\w.,+=@-]*", stem):
        return stem
    plain = (re.sub(r"[^\w.]+", "-", part).strip("-.") for part in (stem, *reversed(folders)))
    name = next(filter(None, plain), "")
    return f"{name}-{digest(source)[:8]}".removeprefix("-")


def make_extractor(
    stage: Evaluate, run: Run, folder: Path | None, worker: Worker, evaluators: Collection[Evaluator]
) -> Extractor:
    """The extractor of features for the rows, with their networks, and a text tower if an evaluator needs texts.

    Raises:
        ConfigError: the generator's network has no such block (lists those it has), or it or the encoder does not
            support the settings.
    """
    from synthgen.evaluators._extraction import Extractor
    from synthgen.loader import workers_for
    from synthgen.models.dual import load_dual_encoder
    from synthgen.models.transformers_encoder import open_encoder
    from synthgen.train.loop import seed_everything

    kinds = table_rows(stage, folder, evaluators).values()
    networks = {"encoder": open_encoder(folder).to(worker.device)} if folder else {}
    if folder and stage.pool == "cls" and not networks["encoder"].has_class_token:
        raise ConfigError(f"the encoder in {folder} has no class token; leave pool at mean")
    if "random" in kinds:
        seed_everything(run.seed)
        networks["random"] = networks["encoder"].untrained().eval().to(worker.device)
    rows: dict[Need, set[Row]] = {evaluator.needs: set() for evaluator in evaluators}
    for evaluator in evaluators:
        rows[evaluator.needs] |= {kind for kind in kinds if has_scores(evaluator, kind)}
    return Extractor(
        networks=networks,
        rows=rows,
        generator=_feature_reader(stage, run, worker, rows) if "generator" in kinds else None,
        dual=load_dual_encoder(folder).to(worker.device) if folder and "pairs" in rows else None,
        pool=stage.pool,
        by_label=stage.mask_classes == "label",
        batch_size=stage.batch_size,
        num_workers=workers_for(stage.num_workers),
        device=worker.device,
    )


def _feature_reader(stage: Evaluate, run: Run, worker: Worker, needs: Collection[Need]) -> FeatureReader:
    from synthgen.diffusion.features import FeatureReader
    from synthgen.diffusion.feedback import FeedbackNetwork
    from synthgen.diffusion.truncated import check_truncatable

    assert stage.generator is not None
    backbone = BACKBONES.build(generator_choice(stage.generator), device=worker.device)
    reader = FeatureReader(
        backbone,
        timesteps=stage.generator_timesteps,
        blocks=stage.generator_blocks,
        inversion_steps=stage.generator_inversion_steps,
        seed=run.seed,
    )
    if "latents" in needs:  # refuse before images are read what would be refused later
        FeedbackNetwork(reader)
    if "images" in needs:
        check_truncatable(reader)
    return reader


def generator_choice(choice: Choice) -> Choice:
    """The backbone of that name; any other name is that of a model of ``diffusers``."""
    if choice.name in BACKBONES.names():
        return choice
    return Choice("diffusers", {"model": choice.name, **choice.options})
