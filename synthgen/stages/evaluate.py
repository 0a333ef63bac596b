"""Score encoders, generators and masks with evaluators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from synthgen.backbones import BACKBONES
from synthgen.config import Choice
from synthgen.errors import MissingArtifact, StaleArtifact
from synthgen.records import Report
from synthgen.run import Run, digest, versions
from synthgen.stages import Stage, Work, Worker, runtime_field, unhashed
from synthgen.stages._eval_rows import default_label, generator_choice, has_scores, make_extractor, table_rows
from synthgen.stages._eval_sources import (
    MissingInput,
    Source,
    generator_files,
    masks_hash,
    missing_split,
    open_source,
    source_hash,
    split_hash,
    used_samples,
)
from synthgen.stages._eval_warnings import interval_warnings
from synthgen.stages._integrity import check_encoder, check_shards, diagnose_corruption, encoder_hash
from synthgen.stages._loader_errors import translate_loader_errors
from synthgen.stages._scores import changed_names, newest_training, read_scores, text_tower_hash
from synthgen.stages._sources import find_dataset, find_encoder
from synthgen.stores.tar import write_json
from synthgen.untrusted import visible

if TYPE_CHECKING:
    from synthgen.evaluators import EvalData, Evaluator, Need
    from synthgen.progress import Progress

__all__ = ["Evaluate"]

_DEFAULTS = ("knn", "linear_probe", "retrieval")  # for encoders; they take seconds


@dataclass(frozen=True)
class Evaluate(Stage):
    """Score encoders, generators and masks.

    The scores are written to ``evaluate/<label>.json``, one row for each model and evaluator. Two baselines are rows of
    their own: a ``random encoder`` of the same shape, and the ``pixels``. ``generator`` adds a row for a diffusion
    model, with or without an encoder. The file says under ``warnings`` what makes scores doubtful (few images, classes
    that training lacks), and under ``skipped`` why a default evaluator was left out.
    """

    name: ClassVar = "evaluate"
    reads: ClassVar = ()
    writes: ClassVar = ("evaluate",)
    collective: ClassVar = True
    accelerated: ClassVar = True

    encoder: str = ""  # folder of a training, folder or hub id of a vision transformer; the run's newest training
    train: str = ""  # tar, pattern or folder with training images; the run's shards/train
    test: str = ""  # the same with test images; the run's shards/val
    truth: str = ""  # tar, pattern or folder of tars with true masks
    predicted: str = ""  # masks to compare with them; the run's own by default
    evaluators: tuple[Choice, ...] = ()  # none: knn, linear_probe; retrieval and mask_iou where they are possible
    generator: Choice | None = None  # also evaluate a diffusion model: tiny, a short name, folder or hub id
    generator_timesteps: tuple[int, ...] = (50,)  # 0 to 999: noise levels at which it processes each image
    generator_inversion_steps: int = 0  # above 0: invert images in so many steps instead of adding noise
    generator_blocks: tuple[str, ...] = ()  # of its network, whose activations are the features; none: the middle one
    pool: str = "mean"  # of the patch tokens, or cls
    mask_classes: str = "words"  # class of a masked pixel: its word, or (label) the label of an image with one word
    patch_memory: float = 2.0  # GB for patch features, and for maps and latents; with more images fewer are taken
    baselines: bool = True  # add rows for a random encoder and the pixels
    label: str = ""  # name of the file; by default from encoder, generator, ``test`` and ``truth``
    batch_size: int = unhashed(128)
    verify: bool = unhashed(True)  # first check the sha256 of the encoder and of the run's shards
    num_workers: int = unhashed(-1)  # loader processes; -1 is none on two cores, else up to 8
    _hashes: dict[str, str] | None = runtime_field()  # see :meth:`_cached`

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
        """Encoder, images and masks, as far as the settings name them."""
        masks = (self.predicted or "masks", self.truth) if self.truth else ()
        if self.evaluators and all(Choice.of(one).name == "mask_iou" for one in self.evaluators):
            return masks
        return tuple(dict.fromkeys((self.encoder or "pretrain", self.train or "shards", self.test or "shards", *masks)))

    def complete(self) -> Self:
        """The same stage with every option of the evaluators and the generator filled in."""
        from synthgen.evaluators import EVALUATORS

        generator = self.generator and BACKBONES.complete(generator_choice(self.generator), "device")
        evaluators = tuple(EVALUATORS.complete(choice) for choice in self.evaluators)
        return replace(self, evaluators=evaluators, generator=generator)

    def fingerprinted(self) -> dict[str, Any]:
        """The settings that the scores depend on: without a generator, none of its settings.

        The encoder's name is not among them; its hash is an input.
        """
        settings = super().fingerprinted()
        del settings["encoder"]
        return {name: value for name, value in settings.items() if self.generator or not name.startswith("generator")}

    def artifacts(self) -> tuple[str, ...]:
        """None with settings of their own: a run may have many files of scores, each with its settings and inputs."""
        return ()

    def build_evaluators(self, run: Run) -> dict[str, Evaluator]:
        """The evaluators of the settings, or the default ones, by the names of their scores.

        Raises:
            UnknownName, ConfigError: there is none of that name, or an option is wrong.
            MissingDependency: one needs a library that is not installed.
        """
        from synthgen.evaluators import EVALUATORS, named

        choices = [Choice.of(choice) for choice in self.evaluators]
        if not choices:
            has_images = not self.truth or self.encoder or self.generator or newest_training(run) is not None
            names = (*(_DEFAULTS if has_images else ()), *(("mask_iou",) if self.truth else ()))
            choices = [Choice(name) for name in names]
        return {name: EVALUATORS.build(choice) for name, choice in named(choices).items()}

    def usable_evaluators(self, run: Run) -> tuple[dict[str, Evaluator], dict[str, str]]:
        """The evaluators to run, and the default ones that cannot run, each with the reason.

        Raises:
            ConfigError: an evaluator of the settings cannot run, or no default one can.
            MissingArtifact: there is nothing to evaluate.
        """
        evaluators = self.build_evaluators(run)
        lacking: dict[str, MissingInput] = {}
        for name, evaluator in evaluators.items():
            try:
                with diagnose_corruption(lambda: self._check_hashes(run, None)):
                    self._check_needs(run, name, evaluator.needs)
            except MissingInput as error:
                if self.evaluators:
                    raise
                lacking[name] = error
        if len(lacking) == len(evaluators):
            raise next(iter(lacking.values()))
        usable = {name: evaluator for name, evaluator in evaluators.items() if name not in lacking}
        return usable, {name: str(error) for name, error in lacking.items()}

    def _check_needs(self, run: Run, name: str, need: Need) -> None:
        """Check that the input of an evaluator exists.

        Raises:
            MissingInput: it does not; the message says what to give.
            MissingArtifact: there is no encoder, or no image at all.
        """
        if need == "masks":
            if not self.truth:
                raise MissingInput(f"{name} needs true masks; give --truth TAR (samples with mask.png and json words)")
            return
        folder, sources = self.encoder_folder(run), self.sources(run)
        if need == "pairs":
            if folder is None:
                raise MissingInput(f"{name} needs an encoder with a text tower, and there is only the generator")
            if not (folder / "text.safetensors").is_file():
                raise MissingInput(
                    f"{name} needs a text tower, and {folder} has none; train one with: synthgen pretrain --method vlp"
                )
            sources["test"].require("captions")
        elif need in ("patches", "boxes"):
            for source in sources.values():
                source.require("masked" if need == "patches" else "masked_or_boxed")
        else:
            for source in sources.values():
                source.require("labels")
            sources["test"].require_shared_class(sources["train"], same_run=not (self.train or self.test))

    def needs_images(self, run: Run) -> bool:
        """Whether any evaluator scores a model, not only masks."""
        return any(evaluator.needs != "masks" for evaluator in self.build_evaluators(run).values())

    def encoder_folder(self, run: Run) -> Path | None:
        """The folder of the encoder; None if only masks, or a generator without an encoder, are evaluated.

        Raises:
            MissingArtifact: there is none.
            MissingInput: an evaluator needs a generator, and none is given.
        """
        from synthgen.models.transformers_encoder import encoder_folder

        if not self.needs_images(run):
            return None
        needs_generator = [name for name, one in self.build_evaluators(run).items() if one.needs == "latents"]
        if needs_generator and not self.generator:
            raise MissingInput(f"{needs_generator[0]} needs a diffusion model, not an encoder; give --generator MODEL")
        folder = encoder_folder(self.encoder) if self.encoder else newest_training(run)
        if folder is None and not self.generator:
            raise MissingArtifact(
                f"{run.path} has no finished encoder; first run: {run.remedy('pretrain')}, or give --encoder"
            )
        return folder

    # -- images, masks, and their hashes

    def splits(self, run: Run) -> dict[str, str]:
        """The settings that name images, ``train`` (if anything is trained) and ``test``, with the run's own splits."""
        trains = any(one.needs not in ("pairs", "masks") for one in self.build_evaluators(run).values())
        return {"train": "train", "test": "val"} if trains else {"test": "val"}

    def sources(self, run: Run) -> dict[str, Source]:
        """The training images (if anything is trained) and the test images.

        Raises:
            MissingArtifact: the run has no such shards, or a given source does not exist.
        """
        sources = {}
        for name, split in self.splits(run).items():
            given, own = getattr(self, name), run.folder("shards") / split
            if not given and not any(own.glob("*.tar")):
                raise missing_split(run, split, name)
            path = given or str(own)
            sources[name] = open_source(name, path, self._source_hash(path))
        return sources

    def inputs(self, run: Run) -> dict[str, str]:
        """The hashes of the encoder, its text tower, the generator's files, the images and the masks."""
        if self._hashes is None:
            return self.with_runtime(_hashes={}).inputs(run)
        found: dict[str, str] = {}
        folder = self.encoder_folder(run)
        if folder is not None:
            found["encoder"] = self._cached(f"encoder {folder}", partial(encoder_hash, folder))
            if any(evaluator.needs == "pairs" for evaluator in self.usable_evaluators(run)[0].values()):
                found["text tower"] = self._cached(f"text tower {folder}", partial(text_tower_hash, folder))
        for name, path in generator_files(self.generator).items() if self.generator else ():
            found[f"generator's {name}"] = self._source_hash(path)
        for name in self.sources(run) if self.needs_images(run) else ():
            own = partial(split_hash, run, self.splits(run)[name])
            found[name] = self._source_hash(getattr(self, name)) or self._cached(f"shards for {name}", own)
        if self.truth:
            found["truth"] = self._source_hash(self.truth)
            found["predicted"] = self._source_hash(self.predicted) or self._cached("masks", partial(masks_hash, run))
        return found

    def _source_hash(self, source: str) -> str:
        """The hash of a given source; empty if none is given."""
        return self._cached(f"source {source}", partial(source_hash, source)) if source else ""

    def _cached(self, name: str, compute: Callable[[], str]) -> str:
        """A hash, computed once per command, after :meth:`prepare`: it describes the files before they are read."""
        if self._hashes is None:
            return compute()
        if name not in self._hashes:
            self._hashes[name] = compute()
        return self._hashes[name]

    # -- the file of scores

    def path(self, run: Run) -> Path:
        """The file of scores."""
        label = default_label(self, self.encoder_folder(run), images=self.needs_images(run))
        return run.folder("evaluate") / f"{self.label or label}.json"

    def fingerprint(self, run: Run, inputs: Mapping[str, str] | None = None) -> str:
        """The fingerprint of settings and inputs, by default of the present inputs."""
        inputs = self.inputs(run) if inputs is None else inputs
        return digest({"seed": run.seed, "settings": self.fingerprinted(), "inputs": inputs})

    def plan(self, run: Run) -> list[int]:
        """One unit."""
        return [0]

    def done(self, run: Run, unit: int) -> bool:
        """Whether the file has the scores of these settings and inputs."""
        before = read_scores(self.path(run))
        return bool(before) and before.get("fingerprint") == self.fingerprint(run)

    def check_sources(self, run: Run) -> None:
        """Check that the given images, masks and encoder exist."""
        for source in (self.train, self.test, self.truth, self.predicted):
            find_dataset(source, run)
        find_encoder(self.encoder, run)

    def prepare(self, run: Run) -> Self:
        """Check that the evaluators can run and that no other scores are overwritten.

        Raises:
            StaleArtifact: the file has scores of other settings or inputs.
            ConfigError: see :meth:`usable_evaluators`.
        """
        stage = self.with_runtime(_hashes={})
        stage.usable_evaluators(run)
        path = stage.path(run)
        before = read_scores(path)
        if before and before.get("fingerprint") != stage.fingerprint(run):
            changes = changed_names(before, stage.fingerprinted(), stage.inputs(run))
            raise StaleArtifact(
                f"{path} holds scores made differently (changed: {changes}); delete it, "
                "or give this evaluation another name with --label NAME"
            )
        return stage

    def size(self, run: Run, unit: int) -> int:
        """The number of images."""
        if not self.needs_images(run):
            return 1
        needs = frozenset(evaluator.needs for evaluator in self.usable_evaluators(run)[0].values())
        return max(1, sum(len(used_samples(source, needs)) for source in self.sources(run).values()))

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Yields the function that evaluates."""
        from synthgen.stages._eval_data import mask_scores

        def work(unit: int) -> Report:
            started = time.perf_counter()
            evaluators, skipped = self.usable_evaluators(run)
            inputs = self.inputs(run)  # before anything is read: a file that changes meanwhile makes the scores stale
            result: dict[str, Any] = {"scores": {}, "warnings": [], "skipped": skipped}
            folder = self.encoder_folder(run)
            of_images = {name: evaluator for name, evaluator in evaluators.items() if evaluator.needs != "masks"}
            if of_images:
                if self.verify:
                    self._check_hashes(run, folder)
                with translate_loader_errors():
                    self.score_images(run, folder, worker, of_images, result)
            if len(of_images) < len(evaluators):
                result["scores"]["masks"] = mask_scores(self, run, evaluators, result)
            result["warnings"] += interval_warnings(result["scores"])
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
            return Report(unit, count, notes=notes)

        yield work

    def _check_hashes(self, run: Run, folder: Path | None) -> None:
        """Check the sha256 of the encoder in ``folder``, and of the run's shards that are used.

        Raises:
            MissingArtifact, CorruptFile: a file is missing or has another.
        """
        if folder is not None:
            check_encoder(folder)
        for name, split in self.splits(run).items():
            if not getattr(self, name):
                check_shards(run, split)

    def score_images(
        self, run: Run, folder: Path | None, worker: Worker, evaluators: Mapping[str, Evaluator], result: dict[str, Any]
    ) -> None:
        """Add the scores of the encoder, the generator and the baselines to ``result``."""
        from synthgen.stages._eval_data import image_data

        rows = table_rows(self, folder, evaluators.values())
        extractor = make_extractor(self, run, folder, worker, evaluators.values())
        if self.generator and extractor.generator is None:
            result["warnings"].append(f"the generator has no row: {', '.join(evaluators)} cannot evaluate it")
        progress = worker.progress
        data = image_data(self.sources(run), extractor, rows.values(), self.patch_memory, progress.advance, result)
        if extractor.generator is not None:
            result["generator"] = extractor.generator.describe()
        for row, kind in rows.items():
            result["scores"][row] = {}
            for name, evaluator in evaluators.items():
                if has_scores(evaluator, kind):
                    result["scores"][row][name] = _run(evaluator, data[kind], progress, f"{name} of {row}")
        if folder is not None:
            result["encoder"] = self.encoder or str(folder)


def _run(evaluator: Evaluator, data: EvalData, progress: Progress, what: str) -> dict[str, float | None]:
    from synthgen.evaluators import json_safe

    progress.describe(what)
    return json_safe(evaluator.evaluate(replace(data, describe=lambda text: progress.describe(f"{what}: {text}"))))
