"""Train an encoder on the shards with one method."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from synthgen.config import Choice, build
from synthgen.devices import devices_for, place
from synthgen.errors import ConfigError
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker, runtime_field, unhashed
from synthgen.stages._data_check import looked_at_first, side_of, tell_sizes
from synthgen.stages._init_weights import begin, option_inputs, start_inputs
from synthgen.stages._integrity import check_shards, check_there
from synthgen.stages._loader_errors import explaining_lost_workers
from synthgen.stages._outputs import export_missing, is_complete, save_outputs
from synthgen.stages._sources import find_dataset, find_encoder
from synthgen.stores import filled
from synthgen.untrusted import visible

if TYPE_CHECKING:
    from accelerate import Accelerator

    from synthgen.datasets import ImageDataset
    from synthgen.loader import Order
    from synthgen.methods import Method

__all__ = ["Pretrain"]

_PRECISIONS = ("no", "bf16", "fp16")
_MASKS = ("own", "elsewhere", "scattered")
_ADDED = {"start": "", "beta2": 0.95}  # settings that earlier versions had not, and what theirs were


@dataclass(frozen=True)
class Pretrain(Stage):
    """Train an encoder on the run's shards, or on ``data``, with one method.

    ``pretrain/<label>/`` gets ``encoder.safetensors`` and ``config.json`` (what
    :func:`synthgen.models.vit.load_encoder` reads), ``transformers/`` (the same encoder as a ``transformers`` ViT),
    ``metrics.jsonl``, ``checkpoints/`` and, last, ``done.json``. A method may add files of its own: see
    :meth:`synthgen.methods.Method.export`. Each ``label`` has its folder (by default the method's name), so several
    trainings live in one run.

    A killed training goes on from its newest checkpoint and ends with the same weights. On CPUs they are the same to
    the bit whatever ``num_workers``, ``save_every`` and ``log_every`` are; ``threads`` is a setting because another
    number of threads adds in another order. ``accelerate launch -m synthgen pretrain ...`` gives it several GPUs or
    machines; they share each step, and its losses are those of one process up to the order of sums.
    """

    name: ClassVar = "pretrain"
    reads: ClassVar[tuple[str, ...]] = ("shards",)
    writes: ClassVar = ("pretrain",)
    collective: ClassVar = True
    accelerated: ClassVar = True

    method: Choice = Choice("mae")
    encoder: Choice = Choice("micro")  # size, with patch_size, image_size, dim, depth, num_heads as options
    start: str = ""  # weights to begin from: folder of a training or of a ViT of transformers, or hub id; empty: none
    epochs: int = 20
    samples_seen: int = 0  # images to train on in all, instead of epochs; 0: epochs
    batch_size: int = 64  # images a step, over all processes and accumulated parts
    base_learning_rate: float = 0.0  # for 256 images a step; 0: 1.5e-4, or 3e-3 for encoders of fewer than 12 blocks
    weight_decay: float = 0.05
    beta2: float = 0.95  # of AdamW, whose first is 0.9
    warmup_ratio: float = 0.05  # share of the steps
    max_norm: float = 1.0  # of the gradient; 0 leaves it as it is
    precision: str = "no"  # bf16, fp16, or no (float32)
    accumulate: int = 1  # parts that a step's images are worked on in, for less memory
    compile: bool = False  # transformer blocks by torch.compile: minutes at the start, other last bits; meant for GPUs
    threads: int = 1  # of the CPU; another number gives other last bits
    seed: int = 0  # beside the run's seed: another start, order and views on the same shards
    label: str = ""
    data: tuple[str, ...] = ()  # tars, patterns, folders; instead of the run's own shards
    masks: Literal["own", "elsewhere", "scattered"] = "own"  # the others are controls: synthgen.mask_controls
    save_every: int = unhashed(200)  # steps
    log_every: int = unhashed(10)  # steps
    snapshots: int = unhashed(0)  # so many times, evenly apart, the encoder as it is goes to snapshots/step-<steps>/
    verify: bool = unhashed(True)  # read the run's shards once before, and see that they are as they were written
    num_workers: int = unhashed(-1)  # loader processes; -1 is none on two cores, else up to 8
    trackers: tuple[str, ...] = unhashed(())  # such as tensorboard, wandb; metrics.jsonl is always written
    export: bool = unhashed(True)  # write transformers/ too
    _samples_and_size: tuple[ImageDataset, int] | None = runtime_field()  # what :meth:`dataset_and_size` says

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, not {self.precision!r}")
        for name in ("epochs", "batch_size", "accumulate", "threads", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.snapshots < 0:
            raise ValueError(f"snapshots must be 0 or more, not {self.snapshots}")
        if self.masks not in _MASKS:
            raise ValueError(f"masks must be one of {', '.join(_MASKS)}, not {self.masks!r}")
        if self.samples_seen < 0:
            raise ValueError(f"samples_seen must be 1 or more (or 0, to count epochs), not {self.samples_seen}")
        if not 0 <= self.base_learning_rate < float("inf"):
            raise ValueError(f"base_learning_rate must be above 0 (or 0, to choose it), not {self.base_learning_rate}")
        for name in ("beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if "/" in self.label or self.label.startswith(".") or visible(self.label) != self.label:
            raise ValueError(f"label must be a plain folder name, not {self.label!r}")
        if self.data:  # then the run's own shards need not be there
            object.__setattr__(self, "reads", ())

    # -- what there is to do

    def artifacts(self) -> tuple[str, ...]:
        """One folder a training."""
        return (f"pretrain/{self.label or self.method.name}",)

    @classmethod
    def folder_of(cls, settings: Mapping[str, Any]) -> str:
        """That of the label, or of the method."""
        (name,) = build(cls, settings, where=f"stages.{cls.name}").artifacts()
        return name

    def source_names(self) -> tuple[str, ...]:
        """The run's shards, or ``data``."""
        return self.data or self.reads

    def complete(self) -> Pretrain:
        """With every option of the method."""
        from synthgen.methods import METHODS

        return replace(self, method=METHODS.complete(self.method, "encoder"))

    def fingerprinted(self) -> dict[str, Any]:
        """Without later settings and options where they are what earlier versions did, so that those trainings hold."""
        return self.as_before(super().fingerprinted())

    def recorded_settings(self, run: Run) -> dict[str, Any]:
        """The same, so that an error tells no option that made no difference; ``config.json`` has all of them."""
        return self.as_before(super().recorded_settings(run))

    def as_before(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings without what :attr:`synthgen.methods.Method.added` says."""
        from synthgen.methods import METHODS

        added, method = METHODS.load(self.method.name).added, settings["method"]
        settings = {name: value for name, value in settings.items() if name not in _ADDED or value != _ADDED[name]}
        return {**settings, "method": {k: v for k, v in method.items() if k not in added or v != added[k]}}

    def inputs(self, run: Run) -> dict[str, str]:
        """Names and sizes of the shards, and hashes of the start, and of what options of the method name."""
        from synthgen.datasets import source_inputs

        found = source_inputs(*self.sources(run))
        found = found if self.data else {"shards/train": next(iter(found.values()))}
        found |= option_inputs(self.method)
        if self.start:
            found |= start_inputs(self.start, self.method.name, run.find_artifact(*self.artifacts()))
        return found

    def sources(self, run: Run) -> list[str]:
        """Where the images come from.

        Raises:
            MissingArtifact: the run's shards are not finished, or one of them is gone.
            CorruptFile: their ``dataset.json`` cannot be read.
        """
        if self.data:
            return list(self.data)
        check_there(run, "train")
        return [str(run.folder("shards") / "train")]

    def plan(self, run: Run) -> list[int]:
        """A training is one unit."""
        return [0]

    def todo(self, run: Run) -> list[int]:
        """Nothing, if the encoder is there and was made with these settings."""
        (name,) = self.artifacts()
        return [] if is_complete(run.folder(name), run.artifact(name)["fingerprint"]) else [0]

    def size(self, run: Run, unit: int) -> int:
        """Images in all, each counted as often as it is seen."""
        order = self.order(run, len(self.dataset(run)))
        return order.steps * order.batch_size

    def check_sources(self, run: Run) -> None:
        """Check ``data`` and ``start``."""
        for source in self.data:
            find_dataset(source, run)
        find_encoder(self.start, run)

    def prepare(self, run: Run) -> Self:
        """See that the method can be built and the data fit it, before anything heavy begins.

        Raises:
            ConfigError: an option is wrong, the data lacks what the method needs, the start does not fit, or there is
                no such precision on this device.
            CorruptFile: a sample that was looked at, or the start, cannot be read.
            MissingDependency: a tracker's library is not installed, or no compiler.
        """
        from synthgen.train.launch import check_compiler, check_precision, check_trackers

        samples = self.dataset(run)
        part = self.order(run, len(samples)).batch_size // self.accumulate  # first: processes meet in it
        looked = looked_at_first(samples)
        method = self.build_method(run, samples, side_of(looked))
        try:
            method.check(looked)
        except ConfigError as error:
            raise ConfigError(f"{self.label or self.method.name}, {', '.join(self.sources(run))}: {error}") from None
        if part < method.min_images:
            raise ConfigError(
                f"{self.method.name} compares images, and {part} at once (of {len(samples)}, batch_size "
                f"{self.batch_size}, accumulate {self.accumulate}) are too few; it needs {method.min_images} or more"
            )
        if self.todo(run):  # what is finished needs no GPU, nor the weights that it began from
            check_precision(self.precision, devices_for(self)[0])
            if "image_size" not in self.encoder.options:
                tell_sizes(looked, method.encoder.config)
            self.load_start_weights(run, method)
        check_trackers(self.trackers)
        if self.compile:
            check_compiler()
        return self.with_runtime(_samples_and_size=(samples, side_of(looked)))

    def load_start_weights(self, run: Run, method: Method) -> dict[str, Any]:
        """Put the weights of ``start`` into ``method``; what ``done.json`` says of it."""
        inputs = run.artifact(*self.artifacts())["inputs"]
        return {"start": begin(method, self.start, self.method, inputs)} if self.start else {}

    def dataset_and_size(self, run: Run) -> tuple[ImageDataset, int]:
        """The images to train on, and how large they are, in pixels."""
        samples = self.dataset(run)
        return samples, side_of(looked_at_first(samples))

    def dataset(self, run: Run, *, masks: bool = True) -> ImageDataset:
        """The images to train on."""
        from synthgen.datasets import open_dataset
        from synthgen.mask_controls import CONTROLS, WithChangedMasks

        samples = open_dataset(*self.sources(run), masks=masks)
        return samples if self.masks == "own" else WithChangedMasks(samples, CONTROLS[self.masks])

    def order(self, run: Run, length: int) -> Order:
        """Which samples come when. A batch is never larger than the set.

        Raises:
            ConfigError: a step's images do not divide into equal parts.
        """
        from synthgen.loader import Order
        from synthgen.train.launch import num_processes

        shares = self.accumulate * num_processes()
        batch_size = min(self.batch_size, length // shares * shares)
        if not batch_size or batch_size % shares:
            few = "there are fewer images than parts: lower accumulate, or use fewer processes"
            remedy = f"choose a batch_size that is a multiple of {shares}" if batch_size else few
            step = f"a step of {self.batch_size} of {length} images"
            raise ConfigError(f"{step} does not divide into {shares} parts (processes times accumulate); {remedy}")
        steps = math.ceil(self.samples_seen / batch_size)
        return Order(
            length=length,
            batch_size=batch_size,
            epochs=math.ceil(steps / (length // batch_size)) or self.epochs,
            seed=self.mixed_seed(run),
            parts=self.accumulate,
            limit=steps,
        )

    def mixed_seed(self, run: Run) -> int:
        """One number from the run's seed and this stage's."""
        return int(hashlib.sha256(f"pretrain {run.seed} {self.seed}".encode()).hexdigest()[:12], 16)

    def build_method(self, run: Run, samples: ImageDataset, side: int) -> Method:
        """The method round a fresh encoder for images of ``side`` pixels; its weights depend on the seeds alone."""
        from synthgen.methods import METHODS
        from synthgen.models.vit import VisionTransformer, encoder_config
        from synthgen.train.loop import seed_everything

        config = encoder_config(self.encoder, side)
        seed_everything(self.mixed_seed(run))
        method = METHODS.build(self.method, encoder=VisionTransformer(config))
        method.fit_to(samples)
        return method

    # -- doing it

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Yields the one training there is to do."""
        import torch

        from synthgen.train.launch import accelerated

        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with filled(run.folder(*self.artifacts())) as folder:
                accelerator = accelerated(
                    folder,
                    cpu=worker.device == "cpu",
                    precision=self.precision,
                    accumulate=self.accumulate,
                    trackers=self.trackers,
                    settings=self.settings(),
                )

                def work(unit: int) -> Report:
                    with explaining_lost_workers():
                        return self.train(run, worker, accelerator, unit)

                yield work
                for tracker in accelerator.trackers:  # not end_training(): it ends what the next training needs as well
                    tracker.finish()
        finally:
            torch.set_num_threads(threads)

    def train(self, run: Run, worker: Worker, accelerator: Accelerator, unit: int) -> Report:
        """Train to the end and write the encoder."""
        from synthgen.loader import workers_for
        from synthgen.models.vit import save_encoder
        from synthgen.train.checkpoint import Checkpoints
        from synthgen.train.loop import Training, last_loss
        from synthgen.train.optim import OptimSettings

        started = time.perf_counter()
        (name,) = self.artifacts()
        folder, fingerprint = run.folder(name), run.artifact(name)["fingerprint"]
        if self.verify and not self.data:
            check_shards(run, "train", accelerator.process_index, accelerator.num_processes)
        samples, side = self._samples_and_size or self.dataset_and_size(run)
        method = self.build_method(run, samples, side)
        begun = self.load_start_weights(run, method)
        order = self.order(run, len(samples))
        training = Training(
            method=method,
            samples=samples if method.uses_masks else self.dataset(run, masks=False),
            order=order,
            optim=OptimSettings(
                base_learning_rate=self.base_learning_rate or (1.5e-4 if method.encoder.config.depth >= 12 else 3e-3),
                batch_size=order.batch_size,
                warmup_ratio=self.warmup_ratio,
                weight_decay=self.weight_decay,
                max_norm=self.max_norm,
                beta2=self.beta2,
            ),
            accelerator=accelerator,
            checkpoints=Checkpoints(folder / "checkpoints", fingerprint),
            metrics_path=folder / "metrics.jsonl",
            save_every=self.save_every,
            log_every=self.log_every,
            num_workers=workers_for(self.num_workers),
            compile=self.compile,
        )
        before = training.step * order.batch_size
        worker.progress.skip(before)
        about = {"size": self.encoder.name, "method": self.method.dump()}
        wanted = {order.steps * number // self.snapshots for number in range(1, self.snapshots + 1)} - {0}

        def snapshot(step: int) -> None:
            path = folder / "snapshots" / f"step-{step:06d}"
            if step in wanted and accelerator.is_main_process and not (path / "encoder.safetensors").is_file():
                save_encoder(method.encoder, path, **about)

        snapshot(training.step)  # killed between its checkpoint and its snapshot
        count, loss = 0, float("nan")
        for record in training.run():
            count += record.samples
            worker.progress.advance(record.samples)
            snapshot(record.step)
            if record.figures:
                loss = record.figures["loss"]
                worker.progress.describe(f"loss {loss:.3f}, {record.figures['images_per_second']:.0f} images/s")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if not count:  # killed between the last checkpoint and here: the loss stands in the metrics
                loss = last_loss(folder / "metrics.jsonl")
            done = {
                "fingerprint": fingerprint,
                "steps": order.steps,
                "images": len(samples),
                "loss": loss,
                "seconds": round(training.seconds, 3),
                "threads": self.threads,
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                **begun,
            }
            save_outputs(method.cpu(), folder, about, done, export=self.export)
        accelerator.wait_for_everyone()
        return Report(unit, count, time.perf_counter() - started)

    def finish(self, run: Run) -> None:
        """Write ``transformers/`` where ``export`` is asked for only now, when the training is long finished."""
        if self.export and place().rank == 0:
            export_missing(run.folder(*self.artifacts()))
