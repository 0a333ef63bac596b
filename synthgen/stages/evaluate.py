"""Ask each evaluator what the encoder learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import MissingArtifact, StaleArtifact
from synthgen.records import Report
from synthgen.run import Run, digest, versions
from synthgen.stages import Stage, Work, Worker, runtime_field, unhashed
from synthgen.stages._eval_rows import backbone_of, encoder_name, extractor_of, judges, rows_of
from synthgen.stages._eval_sources import MissingInput, Source, looked_at, missing_split, open_source, stamp_of, stamps
from synthgen.stages._integrity import check_encoder, check_shards, encoder_hash, naming_damage
from synthgen.stages._loader_errors import explaining_lost_workers
from synthgen.stages._scores import changed, newest, read_scores, text_tower_hash
from synthgen.stages._sources import find_dataset, find_encoder
from synthgen.stores.tar import write_json
from synthgen.untrusted import visible

if TYPE_CHECKING:
    from synthgen.evaluators import Evaluator, Need

__all__ = ["Evaluate"]

_BY_DEFAULT = ("knn", "linear_probe", "retrieval")  # of an encoder: what costs seconds


@dataclass(frozen=True)
class Evaluate(Stage):
    """Ask what an encoder learned, and how good masks are where the truth is known.

    ``evaluate/<label>.json`` gets the scores. Two rows stand beside the encoder's own, without which a score says
    nothing: a ``random encoder`` of the same shape, and the ``pixels`` themselves. With ``generator`` there is a row
    of a diffusion model, which needs no encoder beside it. What makes a score doubtful (few images,
    classes that training does not know) is told under ``warnings``, and under ``skipped`` why an evaluator that nobody
    asked for by name was left out.
    """

    name: ClassVar = "evaluate"
    reads: ClassVar = ()
    writes: ClassVar = ("evaluate",)
    collective: ClassVar = True
    accelerated: ClassVar = True

    encoder: str = ""  # folder of a training, folder or hub id of a vision transformer; the run's newest training
    train: str = ""  # tar, pattern or folder to learn from; the run's shards/train
    test: str = ""  # and to be judged on; the run's shards/val
    truth: str = ""  # tar, pattern or folder of tars with true masks
    predicted: str = ""  # the masks to judge; the run's own where it is empty
    evaluators: tuple[
        Choice, ...
    ] = ()  # none: knn, linear_probe, retrieval if it can be, mask_iou where truth is given
    generator: Choice | None = None  # also judge a diffusion model: tiny, a short name, folder or hub id
    generator_timesteps: tuple[int, ...] = (50,)  # 0 to 999: how noised it sees the images, once at each
    generator_inversion_steps: int = 0  # more than 0: no noise, but an inversion in so many steps, seen on the way
    generator_blocks: tuple[str, ...] = ()  # of its network, whose activations are the features; none: the middle one
    pool: str = "mean"  # of the patch tokens, or cls
    mask_classes: str = "words"  # what a masked pixel is: its word, or (label) the label of an image with one word
    patch_memory: float = 2.0  # GB for patch features, and for maps and latents; with more images fewer are taken
    baselines: bool = True  # rows of a random encoder and of the pixels beside it
    label: str = ""  # name of the file; the encoder's folder, generator, the names of ``test`` and ``truth``
    batch_size: int = unhashed(128)
    verify: bool = unhashed(True)  # read the run's shards once before, and see that they are as they were written
    num_workers: int = unhashed(-1)  # loader processes; -1 is none on two cores, else up to 8
    _known: dict[tuple[str, str], str] | None = runtime_field()  # what :meth:`once` found

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "cls"):
            raise ValueError(f"pool must be mean or cls, not {self.pool!r}")
        if self.mask_classes not in ("words", "label"):
            raise ValueError(f"mask_classes must be words or label, not {self.mask_classes!r}")
        if not self.generator_timesteps or not all(0 <= timestep < 1000 for timestep in self.generator_timesteps):
            raise ValueError(f"generator_timesteps must be one or more of 0 to 999, not {self.generator_timesteps}")
        if not 0 <= self.generator_inversion_steps <= 1000:
            raise ValueError(f"generator_inversion_steps must be 0 to 1000, not {self.generator_inversion_steps}")
        if not self.patch_memory > 0:
            raise ValueError(f"patch_memory must be above 0, not {self.patch_memory}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")
        if "/" in self.label or self.label.startswith(".") or visible(self.label) != self.label:
            raise ValueError(f"label must be a plain file name, not {self.label!r}")

    def source_names(self) -> tuple[str, ...]:
        """Encoder, images and masks, as far as the settings tell."""
        masks = (self.predicted or "masks", self.truth) if self.truth else ()
        if self.evaluators and all(Choice.of(one).name == "mask_iou" for one in self.evaluators):
            return masks
        return tuple(dict.fromkeys((self.encoder or "pretrain", self.train or "shards", self.test or "shards", *masks)))

    def complete(self) -> Self:
        """The same with every option of the evaluators and of the generator spelled out."""
        from synthgen.evaluators import EVALUATORS

        generator = self.generator and BACKBONES.complete(backbone_of(self.generator), "device")
        evaluators = tuple(EVALUATORS.complete(choice) for choice in self.evaluators)
        return replace(self, evaluators=evaluators, generator=generator)

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that the scores depend on: where there is no generator, none of how it is read.

        What the encoder is called is none of them, for its hash is an input.
        """
        settings = super().fingerprinted()
        del settings["encoder"]
        return {name: value for name, value in settings.items() if self.generator or not name.startswith("generator")}

    # -- what there is to do

    def artifacts(self) -> tuple[str, ...]:
        """None of the run's manifest: the file's name depends on the encoder, and all it was made from is in it."""
        return ()

    def wanted(self, run: Run) -> dict[str, Evaluator]:
        """The evaluators that are asked for, or those by default, under the names of their scores.

        Raises:
            UnknownName, ConfigError: there is none of that name, or an option is wrong.
            MissingDependency: one needs a library that is not installed.
        """
        from synthgen.evaluators import EVALUATORS, named

        choices = [Choice.of(choice) for choice in self.evaluators]
        if not choices:
            of_encoder = not self.truth or self.encoder or self.generator or newest(run) is not None
            names = (*(_BY_DEFAULT if of_encoder else ()), *(("mask_iou",) if self.truth else ()))
            choices = [Choice(name) for name in names]
        return {name: EVALUATORS.build(choice) for name, choice in named(choices).items()}

    def chosen(self, run: Run) -> tuple[dict[str, Evaluator], dict[str, str]]:
        """The evaluators to run, and why others are left out: only those that nobody asked for by name are.

        Raises:
            ConfigError: what was asked for cannot be done, or nothing can.
            MissingArtifact: there is nothing to evaluate.
        """
        wanted = self.wanted(run)
        left_out: dict[str, MissingInput] = {}
        for name, evaluator in wanted.items():
            try:
                with naming_damage(lambda: self.check_written(run, None)):
                    self.check(run, name, evaluator.needs)
            except MissingInput as error:
                if self.evaluators:
                    raise
                left_out[name] = error
        if len(left_out) == len(wanted):
            raise next(iter(left_out.values()))
        kept = {name: evaluator for name, evaluator in wanted.items() if name not in left_out}
        return kept, {name: str(error) for name, error in left_out.items()}

    def check(self, run: Run, name: str, need: Need) -> None:
        """See that there is what an evaluator needs.

        Raises:
            MissingInput: there is not; says what to give.
            MissingArtifact: there is no encoder, or no images at all.
        """
        if need == "masks":
            if not self.truth:
                raise MissingInput(
                    f"{name} needs the true masks; give --truth TAR (samples with mask.png and json words)"
                )
            return
        folder, sources = self.encoder_folder(run), self.sources(run)
        if need == "pairs":
            if folder is None:
                raise MissingInput(f"{name} needs an encoder with a text tower, and there is only the generator")
            if not (folder / "text.safetensors").is_file():
                raise MissingInput(
                    f"{name} needs a text tower, and {folder} has none; train one with: synthgen pretrain --method vlp"
                )
            sources["test"].need_captions()
        elif need in ("patches", "boxes"):
            for source in sources.values():
                source.need_masks() if need == "patches" else source.need_boxes()
        else:
            for source in sources.values():
                source.need_labels()
            sources["test"].need_classes_of(sources["train"], same_run=not (self.train or self.test))

    def judges_images(self, run: Run) -> bool:
        """Whether it is asked what images give, and not only how good masks are."""
        return any(evaluator.needs != "masks" for evaluator in self.wanted(run).values())

    def encoder_folder(self, run: Run) -> Path | None:
        """The encoder to judge; None where only masks are, or a generator where there is no encoder.

        Raises:
            MissingArtifact: there is none.
            MissingInput: an evaluator judges generators alone, and none is named.
        """
        from synthgen.models.transformers_encoder import encoder_folder

        if not self.judges_images(run):
            return None
        of_generator = [name for name, evaluator in self.wanted(run).items() if evaluator.needs == "latents"]
        if of_generator and not self.generator:
            raise MissingInput(f"{of_generator[0]} judges a diffusion model and not an encoder; give --generator MODEL")
        folder = encoder_folder(self.encoder) if self.encoder else newest(run)
        if folder is None and self.generator:
            return None
        if folder is None:
            raise MissingArtifact(
                f"{run.path} has no finished encoder; first run: {run.remedy('pretrain')}, or give --encoder"
            )
        return folder

    def splits(self, run: Run) -> dict[str, str]:
        """What images are looked at, and the split of the run's shards that it is where no other source is given."""
        learned = any(evaluator.needs not in ("pairs", "masks") for evaluator in self.wanted(run).values())
        return {"train": "train", "test": "val"} if learned else {"test": "val"}

    def sources(self, run: Run) -> dict[str, Source]:
        """The images to learn from (unless nothing is learned) and those to be judged on.

        Raises:
            MissingArtifact: the run has no such shards, or a source that was given is not there.
        """
        found = {}
        for name, split in self.splits(run).items():
            given, own = getattr(self, name), run.folder("shards") / split
            if not given and not any(own.glob("*.tar")):
                raise missing_split(run, split, name)
            path = given or str(own)
            found[name] = open_source(name, path, self.stamp(path))
        return found

    def stamp(self, source: str) -> str:
        """What tells a source from others: see :func:`~synthgen.stages._eval_sources.stamp_of`."""
        return self.once(("source", source), lambda: stamp_of(source))

    def once(self, name: tuple[str, str], look: Callable[[], str]) -> str:
        """What ``look`` finds, which may take long; once for a command, by what stood there in :meth:`prepare`."""
        if self._known is None:
            return look()
        if name not in self._known:
            self._known[name] = look()
        return self._known[name]

    def inputs(self, run: Run) -> dict[str, str]:
        """The encoder's hash, that of its text tower, and what tells the images and masks from others."""
        if self._known is None:
            return self.with_runtime(_known={}).inputs(run)
        found: dict[str, str] = {}
        folder = self.encoder_folder(run)
        if folder is not None:
            found["encoder"] = self.once(("encoder", str(folder)), lambda: encoder_hash(folder))
            if any(evaluator.needs == "pairs" for evaluator in self.chosen(run)[0].values()):
                found["text tower"] = self.once(("text tower", str(folder)), lambda: text_tower_hash(folder))
        return found | stamps(self, run, self.sources(run) if self.judges_images(run) else {})

    def path(self, run: Run) -> Path:
        """The file that gets the scores."""
        folder, images = self.encoder_folder(run), self.judges_images(run)
        label = self.label
        if not label:
            parts = [encoder_name(self, folder)] if folder else []
            parts += ["generator"] if self.generator and images else []
            parts = parts or ["masks"]
            parts += [Path(self.test).stem] if self.test else []
            parts += [Path(self.truth).stem] if self.truth and images else []
            label = "-".join(parts)
        return run.folder("evaluate") / f"{label}.json"

    def fingerprint(self, run: Run, inputs: Mapping[str, str] | None = None) -> str:
        """Of settings and inputs: of those that there are, unless others are given."""
        inputs = self.inputs(run) if inputs is None else inputs
        return digest({"seed": run.seed, "settings": self.fingerprinted(), "inputs": inputs})

    def plan(self, run: Run) -> list[int]:
        """All of it is one unit."""
        return [0]

    def done(self, run: Run, unit: int) -> bool:
        """Whether the file is there and was made from this."""
        before = read_scores(self.path(run))
        return bool(before) and before.get("fingerprint") == self.fingerprint(run)

    def check_sources(self, run: Run) -> None:
        """Check the images, the masks and the encoder that are given."""
        for source in (self.train, self.test, self.truth, self.predicted):
            find_dataset(source, run)
        find_encoder(self.encoder, run)

    def prepare(self, run: Run) -> Self:
        """See that nothing is overwritten and that there is what the evaluators need.

        Raises:
            StaleArtifact: the file holds other scores.
            ConfigError: see :meth:`chosen`.
        """
        stage = self.with_runtime(_known={})  # what others change from here on is seen when this is done
        stage.chosen(run)
        path = stage.path(run)
        before = read_scores(path)
        if before and before.get("fingerprint") != stage.fingerprint(run):
            told = changed(before, stage.fingerprinted(), stage.inputs(run))
            raise StaleArtifact(
                f"{path} holds scores made differently (changed: {told}); delete it, "
                "or give this evaluation another name with --set label=NAME"
            )
        return stage

    def size(self, run: Run, unit: int) -> int:
        """Images to look at."""
        if not self.judges_images(run):
            return 1
        needs = frozenset(evaluator.needs for evaluator in self.chosen(run)[0].values())
        return max(1, sum(len(looked_at(source, needs)) for source in self.sources(run).values()))

    # -- doing it

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Yields the one evaluation there is to do."""

        def work(unit: int) -> Report:
            started = time.perf_counter()
            evaluators, skipped = self.chosen(run)
            inputs = self.inputs(run)  # before they are read: what another command makes meanwhile makes the file stale
            result: dict[str, Any] = {"scores": {}, "warnings": [], "skipped": skipped}
            folder = self.encoder_folder(run)
            of_images = {name: evaluator for name, evaluator in evaluators.items() if evaluator.needs != "masks"}
            if self.verify and of_images:
                self.check_written(run, folder)
            if of_images:
                with explaining_lost_workers():
                    self.judge_images(run, folder, worker, of_images, result)
            if len(of_images) < len(evaluators):
                self.judge_masks(run, evaluators, result)
            result |= {
                "settings": self.fingerprinted(),
                "inputs": inputs,
                "fingerprint": self.fingerprint(run, inputs),
                "versions": versions(),
                "seconds": round(time.perf_counter() - started, 3),
            }
            write_json(self.path(run), result)
            notes = {f"evaluators left out ({', '.join(skipped)})": len(skipped)} if skipped else {}
            count = self.size(run, unit) if of_images else result["masks"]["images"]
            return Report(unit, count, time.perf_counter() - started, notes=notes)

        yield work

    def check_written(self, run: Run, folder: Path | None) -> None:
        """See that the encoder, and what shards of the run are looked at, are as they were written.

        Raises:
            CorruptFile: one is not.
        """
        if folder is not None:
            check_encoder(folder)
        for name, split in self.splits(run).items():
            if not getattr(self, name):
                check_shards(run, split)

    def judge_images(
        self, run: Run, folder: Path | None, worker: Worker, evaluators: Mapping[str, Evaluator], result: dict[str, Any]
    ) -> None:
        """Scores of the encoder, of the generator, of a random encoder, and of the pixels."""
        from synthgen.evaluators import json_safe
        from synthgen.stages._eval_data import gathered, telling

        rows = rows_of(self, folder, evaluators.values())
        extractor = extractor_of(self, run, folder, worker, evaluators.values())
        if self.generator and extractor.generator is None:
            result["warnings"].append(f"the generator has no row: {', '.join(evaluators)} can say nothing of it")
        data = gathered(self.sources(run), extractor, rows.values(), self.patch_memory, worker.progress.advance, result)
        if extractor.generator is not None:
            result["generator"] = extractor.generator.describe()
        for row, kind in rows.items():
            result["scores"][row] = {}
            for name, evaluator in evaluators.items():
                if judges(evaluator, kind):
                    given = telling(data[kind], worker.progress.describe, f"{name} of {row}")
                    result["scores"][row][name] = json_safe(evaluator.evaluate(given))
        if folder is not None:
            result["encoder"] = self.encoder or str(folder)

    def judge_masks(self, run: Run, evaluators: Mapping[str, Evaluator], result: dict[str, Any]) -> None:
        """Scores of the masks."""
        from synthgen.stages._eval_data import scores_of_masks

        result["scores"]["masks"] = scores_of_masks(self, run, evaluators, result)
