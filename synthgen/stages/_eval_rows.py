"""The rows of the table of scores, and the networks behind them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.run import Run
from synthgen.stages import Worker
from synthgen.stores import parse_location

if TYPE_CHECKING:
    from synthgen.diffusion.features import FeatureReader
    from synthgen.evaluators import Baseline, Evaluator, Need, Row
    from synthgen.evaluators._extraction import Extractor
    from synthgen.stages.evaluate import Evaluate

__all__ = ["backbone_of", "encoder_name", "extractor_of", "judges", "rows_of"]

_BASELINES: dict[str, Baseline] = {
    "random encoder": "random",
    "random generator": "random generator",
    "pixels": "pixels",
}


def judges(evaluator: Evaluator, row: Row) -> bool:
    """Whether an evaluator has something to say of a row.

    Of a generator what needs no texts; what needs latents of it alone.
    """
    if row == "generator":
        return evaluator.needs not in ("pairs", "masks")
    return (row == "encoder" and evaluator.needs != "latents") or row in evaluator.baselines


def rows_of(stage: Evaluate, folder: Path | None, evaluators: Collection[Evaluator]) -> dict[str, Row]:
    """What each row of the table is of, those that some evaluator can judge.

    Raises:
        ConfigError: the encoder is called as another row is.
    """
    rows: dict[str, Row] = {"generator": "generator"} if stage.generator else {}
    rows |= _BASELINES if stage.baselines else {}
    if folder:
        name = encoder_name(stage, folder)
        if name in rows:
            raise ConfigError(f"the encoder in {folder} is called as another row of the table; give it another name")
        rows = {name: "encoder", **rows}
    there = {"random": bool(folder), "random generator": bool(stage.generator)}
    return {
        row: kind
        for row, kind in rows.items()
        if any(judges(one, kind) for one in evaluators) and there.get(kind, True)
    }


def encoder_name(stage: Evaluate, folder: Path) -> str:
    """What the encoder is called: its folder, or the model on the hub."""
    given = stage.encoder
    return folder.resolve().name if not given or parse_location(given).exists() else given.rpartition("/")[2]


def extractor_of(
    stage: Evaluate, run: Run, folder: Path | None, worker: Worker, evaluators: Collection[Evaluator]
) -> Extractor:
    """What takes features from images: the networks of the rows, and a text tower where texts are needed.

    Raises:
        ConfigError: the generator's network has no such block (lists those it has), or cannot be read as is asked; or
            the encoder cannot.
    """
    from synthgen.evaluators._extraction import Extractor
    from synthgen.loader import workers_for
    from synthgen.models.dual import load_dual_encoder
    from synthgen.models.transformers_encoder import open_encoder
    from synthgen.train.loop import seed_everything

    needs, kinds = frozenset(one.needs for one in evaluators), rows_of(stage, folder, evaluators).values()
    networks = {"encoder": open_encoder(folder).to(worker.device)} if folder else {}
    if folder and stage.pool == "cls" and not networks["encoder"].has_class_token:
        raise ConfigError(f"the encoder in {folder} has no class token; leave pool at mean")
    if "random" in kinds:
        seed_everything(run.seed)
        networks["random"] = networks["encoder"].untrained().eval().to(worker.device)
    judged: dict[Need, set[Row]] = {need: set() for need in needs}
    for one in evaluators:
        judged[one.needs] |= {kind for kind in kinds if judges(one, kind)}
    return Extractor(
        networks=networks,
        needs=needs,
        rows=judged,
        generator=_reader(stage, run, worker, needs) if "generator" in kinds else None,
        dual=load_dual_encoder(folder).to(worker.device) if folder and "pairs" in needs else None,
        pool=stage.pool,
        by_label=stage.mask_classes == "label",
        batch_size=stage.batch_size,
        num_workers=workers_for(stage.num_workers),
        device=worker.device,
    )


def _reader(stage: Evaluate, run: Run, worker: Worker, needs: Collection[Need]) -> FeatureReader:
    from synthgen.diffusion.features import FeatureReader
    from synthgen.diffusion.feedback import FeedbackNetwork
    from synthgen.diffusion.truncated import see_that_it_can_be_cut

    assert stage.generator is not None
    backbone = BACKBONES.build(backbone_of(stage.generator), device=worker.device)
    reader = FeatureReader(
        backbone,
        timesteps=stage.generator_timesteps,
        blocks=stage.generator_blocks,
        inversion_steps=stage.generator_inversion_steps,
        seed=run.seed,
    )
    if "latents" in needs:  # what would be refused later is refused before images are read
        FeedbackNetwork(reader)
    if "images" in needs:
        see_that_it_can_be_cut(reader)
    return reader


def backbone_of(choice: Choice) -> Choice:
    """A backbone by its name; any other name is that of a model of ``diffusers``."""
    if choice.name in BACKBONES.names():
        return choice
    return Choice("diffusers", {"model": choice.name, **choice.options})
