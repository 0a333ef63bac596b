"""What an evaluation will have before it: images to learn from and to be judged on, and what is known of them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from synthgen.errors import ConfigError
from synthgen.plan.source import Pictures, survey_pictures
from synthgen.records import Prompt
from synthgen.run import Run
from synthgen.stages._eval_sources import Source, looked_at, open_source, placed
from synthgen.stages.attend import prompt_of
from synthgen.stages.evaluate import Evaluate
from synthgen.stages.pretrain import Pretrain

if TYPE_CHECKING:
    from synthgen.evaluators import Need

__all__ = ["COMPARED", "Judged", "Looked", "expected", "judged", "prompts_of"]

COMPARED = 100_000  # prompts, or images of a source, at most, of which each is looked at for a count


@dataclass(frozen=True)
class Looked:
    """The images of one side of an evaluation."""

    images: int = 0  # that are looked at, for whatever evaluator
    labelled: int = 0
    classes: int = 0
    masked: int = 0  # or with boxes, where these will do
    words: int = 0  # different ones that masks are of
    captioned: int = 0
    texts: int = 0  # different ones
    exact: bool = True  # or expected, from some of them
    few: Pictures | None = None  # of a source of its own; None: the run's shards


@dataclass(frozen=True)
class Judged:
    """All that an evaluation looks at."""

    train: Looked
    test: Looked
    truth: int = 0  # images with true masks
    few_truth: Pictures | None = None
    encoder: str = ""  # the folder in the run, or elsewhere; none where only masks are judged, or a generator alone

    @property
    def images(self) -> int:
        """Images that an encoder or a generator sees; where there is none, those whose masks are judged."""
        return self.train.images + self.test.images or self.truth

    @property
    def basis(self) -> str:
        """How exact the number is."""
        seen = bool(self.test.images)
        parts = [f"{self.train.images:,} to learn from, {self.test.images:,} to be judged on"] * seen
        parts += [f"at most {self.truth:,} with true masks"] * bool(self.truth)
        return f"{'counted' if self.train.exact and self.test.exact else 'expected'}: {'; '.join(parts)}"


def expected(images: int, prompts: Sequence[Prompt], shown: Sequence[int] | None, *, masks: bool) -> Looked:
    """What is known of images of the run's own shards before they are there.

    Args:
        images: how many.
        prompts: all that there are, or some of them.
        shown: the numbers of the prompts that the images show; None: ``prompts`` are some, and their share is taken.
        masks: whether the shards hold masks.
    """
    numbers = range(len(prompts)) if shown is None else shown
    those = [prompts[number] for number in numbers]
    share = images / max(1, len(those))
    labels = [prompt.label for prompt in those if prompt.label]
    return Looked(
        labelled=round(len(labels) * share),
        classes=len(set(labels)),
        masked=images if masks else 0,
        words=len({word.lower() for prompt in those for word in prompt.words}),
        captioned=images,
        texts=images if shown is None else len(set(shown)),
        exact=shown is not None,
    )


def prompts_of(pictures: Pictures, template: str) -> list[Prompt]:
    """What ``attend`` would ask of the few; ``template`` is for images without a caption.

    Raises:
        PromptError, CorruptFile: as there.
    """
    from synthgen.datasets import open_dataset

    with _written(pictures) as folder:
        samples = open_dataset(folder, masks=False)
        return [prompt_of(samples, number, template) for number in range(len(samples))]


@contextmanager
def _written(pictures: Pictures) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="synthgen-plan-") as folder:
        pictures.write(Path(folder) / "few")
        yield Path(folder) / "few"


def judged(stage: Evaluate, run: Run, own: tuple[Looked, Looked] | None, training: Pretrain | None) -> Judged:
    """What ``stage`` will look at.

    Args:
        stage: with every option of its evaluators.
        run: as it is, or will be.
        own: the run's train and val shards, if they are not there yet.
        training: the last one of the pipeline, whose encoder it is if no other is named.

    Raises:
        ConfigError, MissingArtifact: what the stage would be refused for, as far as it can be known.
    """
    if training and not stage.encoder:
        stage = replace(stage, encoder=str(run.folder(*training.artifacts())))
    needs = {evaluator.needs for evaluator in stage.wanted(run).values()}
    images = stage.judges_images(run)
    encoder = stage.encoder or str(stage.encoder_folder(run) or "") if images else ""
    if "pairs" in needs and not stage.evaluators and not (encoder and _has_texts(encoder, training)):
        needs.discard("pairs")
    train, test = Looked(), Looked()
    if images:
        learned = bool(needs - {"pairs", "masks"})
        train = _side(stage, run, "train", needs, own and own[0]) if learned else train
        test = _side(stage, run, "test", needs, own and own[1])
    few = survey_pictures(stage.truth) if stage.truth else None
    return Judged(train, test, few.count if few else 0, few, encoder)


def _has_texts(encoder: str, training: Pretrain | None) -> bool:
    """Whether an encoder comes with a text tower, or will."""
    if (Path(encoder) / "text.safetensors").is_file():
        return True
    if training is None:
        return False
    from synthgen.methods import METHODS

    return METHODS.load(training.method.name).reads_texts


def _side(stage: Evaluate, run: Run, name: str, needs: Collection[Need], own: Looked | None) -> Looked:
    """The images to learn from, or to be judged on."""
    from synthgen.evaluators import OF_LABELLED, OF_SCENES

    given: str = getattr(stage, name)
    if not given and own is not None:
        if not own.captioned:
            split = "train" if name == "train" else "val"
            raise ConfigError(
                f"{run.path} will have no image in shards/{split}; plan more images, change the val_ratio of "
                f"stages.shards, or give --{name}"
            )
        masked = own.masked if OF_SCENES & set(needs) else 0
        captioned = own.captioned if "pairs" in needs and name == "test" else 0
        return replace(own, images=max(masked, captioned, own.labelled if OF_LABELLED & set(needs) else 0))
    source = given or stage.sources(run)[name].path
    few = survey_pictures(source)
    if few.count <= COMPARED:
        return replace(_known(open_source(name, source), needs), few=few)
    with _written(few) as folder:
        seen = _known(Source(name, str(folder)), needs)
    share = few.count / len(few.few)
    return replace(
        seen,
        **{kind: round(getattr(seen, kind) * share) for kind in ("images", "labelled", "masked", "captioned", "texts")},
        exact=False,
        few=few,
    )


def _known(source: Source, needs: Collection[Need]) -> Looked:
    texts = {text for told in source.captions.values() for text in told} if "pairs" in needs else ()
    where = placed(source, needs)
    said = {word for number in where for word in source.samples.marked(number)}
    said |= {box[0] for number in where for box in source.samples.boxes(number)} if "boxes" in needs else set()
    return Looked(
        images=len(looked_at(source, needs)),
        labelled=len(source.labels),
        classes=len(set(source.labels.values())),
        masked=len(where),
        words=len({word.lower() for word in said}),
        captioned=len(source.captions) if "pairs" in needs else 0,
        texts=len(texts),
    )
