"""Ask each evaluator what the encoder learned."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from synthgen.config import Choice
from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact
from synthgen.records import Report, WordMasks
from synthgen.run import Run, digest, versions
from synthgen.stages import Stage, Work, Worker, free
from synthgen.stores.tar import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from synthgen.datasets import ImageDataset
    from synthgen.evaluators import Evaluator, Labelled

__all__ = ["Evaluate"]

Split = tuple["ImageDataset", dict[int, str]]  # a dataset, and the class of each sample that has one


@dataclass(frozen=True)
class Evaluate(Stage):
    """Ask what an encoder learned, and how good masks are where the truth is known.

    ``evaluate/<label>.json`` gets the scores. Two rows stand beside the encoder's own, without which a score says
    nothing: a ``random encoder`` of the same shape, and nearest neighbours of the ``pixels`` themselves. What makes a
    score doubtful (few images, classes that training does not know) is told under ``warnings``.
    """

    name: ClassVar = "evaluate"
    reads: ClassVar = ()
    writes: ClassVar = ("evaluate",)
    collective: ClassVar = True
    accelerated: ClassVar = True

    encoder: str = ""  # folder; the run's newest training where it is empty
    train: str = ""  # labelled tar, pattern or folder to learn from; the run's shards/train
    test: str = ""  # and to be judged on; the run's shards/val
    truth: str = ""  # tar, pattern or folder of tars with true masks
    predicted: str = ""  # the masks to judge; the run's own where it is empty
    evaluators: tuple[Choice, ...] = ()  # none: knn and linear_probe of an encoder, mask_iou where truth is given
    pool: str = "mean"  # of the patch tokens, or cls
    label: str = ""  # name of the file; the encoder's folder, with the names of ``test`` and ``truth``
    batch_size: int = free(128)
    num_workers: int = free(-1)  # loader processes; -1 is none on two cores, else up to 8

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "cls"):
            raise ValueError(f"pool must be mean or cls, not {self.pool!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")
        if "/" in self.label or self.label.startswith("."):
            raise ValueError(f"label must be a plain file name, not {self.label!r}")

    # -- what there is to do

    def artifacts(self) -> tuple[str, ...]:
        """None of the run's manifest: the file's name depends on the encoder, and all it was made from is in it."""
        return ()

    def chosen(self, run: Run) -> list[Evaluator]:
        """The evaluators, made.

        Raises:
            ConfigError: an option is wrong, or ``mask_iou`` is asked for without truth.
            MissingArtifact: there is nothing to evaluate.
        """
        from synthgen.evaluators import EVALUATORS

        choices = [Choice.of(choice) for choice in self.evaluators]
        if not choices:
            choices = [Choice("mask_iou")] if self.truth else []
            if not self.truth or self.encoder or _newest(run) is not None:
                choices = [Choice("knn"), Choice("linear_probe"), *choices]
        evaluators = [EVALUATORS.build(choice) for choice in choices]
        if not self.truth and any(evaluator.needs == "masks" for evaluator in evaluators):
            raise ConfigError("mask_iou needs the true masks; give --truth TAR (samples with mask.png and json words)")
        return evaluators

    def encoder_folder(self, run: Run) -> Path | None:
        """The encoder to judge; None where only masks are.

        Raises:
            MissingArtifact: there is none.
        """
        if all(evaluator.needs == "masks" for evaluator in self.chosen(run)):
            return None
        folder = Path(self.encoder) if self.encoder else _newest(run)
        if folder is None:
            raise MissingArtifact(
                f"{run.path} has no finished encoder; first run: synthgen pretrain --run {run.path}, or give --encoder"
            )
        if not (folder / "encoder.safetensors").is_file():
            raise MissingArtifact(f"there is no encoder in {folder} (encoder.safetensors); give a folder of pretrain")
        return folder

    def sources(self, run: Run) -> dict[str, str]:
        """Where the labelled images come from.

        Raises:
            MissingArtifact: the run has no such shards.
        """
        found = {}
        for name, given, split in (("train", self.train, "train"), ("test", self.test, "val")):
            own = run.folder("shards") / split
            if not given and not any(own.glob("*.tar")):
                raise MissingArtifact(
                    f"{run.path} has no shards/{split}; make shards with a val_ratio above 0, or give --{name}"
                )
            found[name] = given or str(own)
        return found

    def inputs(self, run: Run) -> dict[str, str]:
        """The encoder's hash, and names and sizes of the images."""
        from synthgen.datasets import source_inputs

        found: dict[str, str] = {}
        folder = self.encoder_folder(run)
        if folder is not None:
            with open(folder / "encoder.safetensors", "rb") as file:
                found["encoder"] = hashlib.file_digest(file, "sha256").hexdigest()
            for name, source in self.sources(run).items():
                found[name] = digest(list(source_inputs(source).values()))
        if self.truth:
            found["truth"] = digest(list(source_inputs(self.truth).values()))
            predicted = (
                list(source_inputs(self.predicted).values()) if self.predicted else run.artifact("masks")["fingerprint"]
            )
            found["predicted"] = digest(predicted)
        return found

    def path(self, run: Run) -> Path:
        """The file that gets the scores."""
        folder = self.encoder_folder(run)
        label = self.label
        if not label:
            label = "masks" if folder is None else folder.resolve().name
            label += f"-{Path(self.test).stem}" if self.test else ""
            label += f"-{Path(self.truth).stem}" if self.truth and folder is not None else ""
        return run.folder("evaluate") / f"{label}.json"

    def fingerprint(self, run: Run) -> str:
        """Of settings and inputs."""
        return digest({"seed": run.seed, "settings": self.fingerprinted(), "inputs": self.inputs(run)})

    def plan(self, run: Run) -> list[int]:
        """All of it is one unit."""
        return [0]

    def todo(self, run: Run) -> list[int]:
        """Nothing, if the file is there and was made from this."""
        before = _read(self.path(run))
        return [] if before and before.get("fingerprint") == self.fingerprint(run) else [0]

    def prepare(self, run: Run) -> None:
        """See that nothing is overwritten and images have labels.

        Raises:
            StaleArtifact: the file holds other scores.
            ConfigError: no image has a label, or training and test share no class.
        """
        path = self.path(run)
        before = _read(path)
        if before and before.get("fingerprint") != self.fingerprint(run):
            now = {**self.fingerprinted(), **{f"its input {k}": v for k, v in self.inputs(run).items()}}
            then = {**before.get("settings", {}), **{f"its input {k}": v for k, v in before.get("inputs", {}).items()}}
            changes = ", ".join(name for name, value in now.items() if then.get(name) != value)
            raise StaleArtifact(
                f"{path} holds scores made differently (changed: {changes or 'the seed'}); delete it, "
                "or give this evaluation another name with --set label=NAME"
            )
        if self.encoder_folder(run) is not None:
            self.splits(run)

    def splits(self, run: Run) -> dict[str, Split]:
        """The labelled images of training and test."""
        from synthgen.datasets import source_inputs

        found: dict[str, Split] = {}
        for name, source in self.sources(run).items():
            samples, labels = _labelled(source, digest(source_inputs(source)))
            if not labels:
                raise ConfigError(
                    f"no image of {source} has a label; give --{name} tars with cls (or label in json), "
                    "or a folder with a subfolder for each class"
                )
            found[name] = (samples, labels)
        known, asked = (set(found[name][1].values()) for name in ("train", "test"))
        if not known & asked:
            few = [", ".join(sorted(classes)[:4]) for classes in (known, asked)]
            raise ConfigError(
                f"training and test images share no class: {few[0]}, ... against {few[1]}, ...; their names must agree"
            )
        return found

    def size(self, run: Run, unit: int) -> int:
        """Images to look at."""
        if self.encoder_folder(run) is None:
            return 1
        return sum(len(labels) for _, labels in self.splits(run).values())

    # -- doing it

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Yields the one evaluation there is to do."""

        def work(unit: int) -> Report:
            started = time.perf_counter()
            result: dict[str, Any] = {"scores": {}, "warnings": []}
            evaluators, folder = self.chosen(run), self.encoder_folder(run)
            if folder is not None:
                self.judge_encoder(run, folder, worker, evaluators, result)
            if self.truth:
                self.judge_masks(run, evaluators, result)
            result |= {
                "settings": self.fingerprinted(),
                "inputs": self.inputs(run),
                "fingerprint": self.fingerprint(run),
                "versions": versions(),
                "seconds": round(time.perf_counter() - started, 3),
            }
            write_json(self.path(run), result)
            return Report(unit, self.size(run, unit), time.perf_counter() - started)

        yield work

    def judge_encoder(
        self, run: Run, folder: Path, worker: Worker, evaluators: list[Evaluator], result: dict[str, Any]
    ) -> None:
        """Scores of the encoder, of a random one, and of the pixels."""
        from synthgen.evaluators import Material
        from synthgen.models.vit import load_encoder

        encoder = load_encoder(folder)
        splits = self.splits(run)
        classes = sorted(set(splits["train"][1].values()))
        features = {name: self.features(run, encoder, split, classes, worker) for name, split in splits.items()}
        rows = {folder.resolve().name: "encoder", "random encoder": "random", "pixels": "pixels"}
        for row, kind in rows.items():
            result["scores"][row] = {
                choice_name(evaluator): evaluator.evaluate(
                    Material(train=features["train"][kind], test=features["test"][kind])
                )
                for evaluator in evaluators
                if evaluator.needs == "features" and (kind != "pixels" or choice_name(evaluator) == "knn")
            }
        result["warnings"] += _doubts(splits)
        result["encoder"] = str(folder)
        for name, (_, labels) in splits.items():
            result[name] = {"images": len(labels), "classes": len(set(labels.values()))}

    def features(self, run: Run, encoder: Any, split: Split, classes: list[str], worker: Worker) -> dict[str, Labelled]:
        """Features of a split: of the encoder, of a random one of its shape, and its pixels at 32 pixels or fewer."""
        import torch
        import torch.nn.functional as F

        from synthgen.augment import CenterCrop
        from synthgen.evaluators import Labelled
        from synthgen.loader import loader, workers_for
        from synthgen.models.vit import VisionTransformer
        from synthgen.train.loop import seed_everything

        samples, labels = split
        config = encoder.config
        seed_everything(run.seed)
        networks = {"encoder": encoder.to(worker.device), "random": VisionTransformer(config).eval().to(worker.device)}
        numbers = list(labels)
        order = [
            [(0, index) for index in numbers[start : start + self.batch_size]]
            for start in range(0, len(numbers), self.batch_size)
        ]
        batches = loader(
            samples,
            order,
            CenterCrop(size=config.image_size),
            mean=config.mean,
            std=config.std,
            num_workers=workers_for(self.num_workers),
        )
        found: dict[str, list[Tensor]] = {"encoder": [], "random": [], "pixels": []}
        with torch.inference_mode():
            for batch in batches:
                images = batch.images.to(worker.device)
                for name, network in networks.items():
                    found[name].append(network.features(images, self.pool).float().cpu())
                small = F.adaptive_avg_pool2d(images, min(32, config.image_size))
                found["pixels"].append(small.flatten(1).cpu())
                worker.tick(len(batch))
        known = {label: number for number, label in enumerate(classes)}
        y = torch.tensor([known.get(label, -1) for label in labels.values()])
        return {name: Labelled(torch.cat(parts).clone(), y) for name, parts in found.items()}

    def judge_masks(self, run: Run, evaluators: list[Evaluator], result: dict[str, Any]) -> None:
        """Scores of the masks."""
        from synthgen.datasets import open_masks
        from synthgen.evaluators import Material

        truth = open_masks(self.truth)
        predicted = open_masks(self.predicted) if self.predicted else _masks_of_run(run)
        shared = len(predicted.keys() & truth.keys())
        if not shared:
            raise ConfigError(f"no key of the predicted masks is among those of {self.truth}")
        if shared < len(truth):
            result["warnings"].append(
                f"{len(truth) - shared} of {len(truth)} true masks have no prediction beside them"
            )
        result["scores"]["masks"] = {
            choice_name(evaluator): evaluator.evaluate(Material(predicted=predicted, truth=truth))
            for evaluator in evaluators
            if evaluator.needs == "masks"
        }


@lru_cache(maxsize=4)
def _labelled(source: str, stamp: str) -> Split:
    """A dataset and its labels; they are asked for several times, and each asking reads every sample's json."""
    from synthgen.datasets import open_dataset

    samples = open_dataset(source, masks=False)
    return samples, {i: label for i in range(len(samples)) if (label := samples.label(i)) is not None}


def choice_name(evaluator: Evaluator) -> str:
    """The name of an evaluator: that of its file."""
    return type(evaluator).__module__.rpartition(".")[2]


def _masks_of_run(run: Run) -> Mapping[str, WordMasks]:
    from synthgen import codecs
    from synthgen.datasets import LazyMasks

    readers: dict[str, Callable[[], WordMasks]] = {}
    for unit in run.units("masks"):
        for key, members in run.read("masks", unit):  # packed: a few hundred bytes a sample
            readers[key] = partial(codecs.decode_masks, key, members)
    return LazyMasks(readers)


def _newest(run: Run) -> Path | None:
    done = sorted(run.folder("pretrain").glob("*/done.json"), key=lambda path: path.stat().st_mtime_ns)
    return done[-1].parent if done else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _doubts(splits: Mapping[str, Split]) -> list[str]:
    """What makes scores on these images doubtful."""
    found = []
    for name, (samples, labels) in splits.items():
        if len(labels) < len(samples):
            found.append(f"{len(samples) - len(labels)} of {len(samples)} {name} images have no label and are left out")
    known, asked = list(splits["train"][1].values()), list(splits["test"][1].values())
    if len(asked) < 100:
        found.append(f"{len(asked)} test images are few: the intervals are wide")
    if unseen := sorted(set(asked) - set(known)):
        count = sum(label in unseen for label in asked)
        found.append(
            f"{count} test images are of classes that training lacks: {', '.join(unseen[:10])}; they count wrong"
        )
    if len(set(known)) == 1:
        found.append("there is one class only: every score is as good as that says")
    return found
