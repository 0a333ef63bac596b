"""Train an encoder on the shards by one method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from synthgen.config import Choice, check_range
from synthgen.devices import devices_for, place
from synthgen.errors import ConfigError
from synthgen.records import Report
from synthgen.run import Run
from synthgen.stages import Stage, Work, Worker, make_stage, runtime_field, unhashed
from synthgen.stages._data_check import probe, typical_side, warn_of_sizes
from synthgen.stages._init_weights import load_start, option_inputs, start_inputs
from synthgen.stages._integrity import check_shards, check_shards_exist
from synthgen.stages._loader_errors import translate_loader_errors
from synthgen.stages._outputs import export_missing, is_complete, save_outputs
from synthgen.stages._sources import find_dataset, find_encoder
from synthgen.stores import staging_folder
from synthgen.untrusted import visible

if TYPE_CHECKING:
    from accelerate import Accelerator

    from synthgen.datasets import ImageDataset
    from synthgen.loader import Order
    from synthgen.methods import Method
    from synthgen.train.optim import OptimSettings

__all__ = ["Pretrain"]

_PRECISIONS = ("no", "bf16", "fp16")
_MASKS = ("own", "elsewhere", "scattered")


@dataclass(frozen=True)
class Pretrain(Stage):
    """Train an encoder on the run's shards, or on ``data``, with one method.

    ``pretrain/<label>/`` gets ``encoder.safetensors`` and ``config.json`` (what
    :func:`synthgen.models.vit.load_encoder` reads), ``transformers/`` (the same encoder as a ``transformers`` ViT),
    ``metrics.jsonl``, ``checkpoints/`` and, last, ``done.json``. A method may add files of its own: see
    :meth:`synthgen.methods.Method.export`. Each ``label`` has its folder (by default the method's name), so several
    trainings live in one run.

    A killed training resumes from its newest checkpoint and ends with the same weights. On CPUs they are bit-identical
    for any ``num_workers``, ``save_every`` and ``log_every``; ``threads`` is a setting because the number of threads
    decides the order of sums. ``accelerate launch -m synthgen pretrain ...`` trains on several GPUs or machines, which
    share each step; the losses are those of one process up to the order of sums.
    """

    name: ClassVar = "pretrain"
    writes: ClassVar = ("pretrain",)
    collective: ClassVar = True
    accelerated: ClassVar = True

    method: Choice = Choice("mae")
    encoder: Choice = Choice("micro")  # size, with patch_size, image_size, dim, depth, num_heads as options
    start: str = ""  # initial weights: folder of a training or of a ViT of transformers, or hub id; empty: random
    epochs: int = 20
    samples_seen: int = 0  # number of images to train on, instead of epochs; 0: epochs
    batch_size: int = 64  # images per step, over all processes and accumulated parts
    base_learning_rate: float = 0.0  # for 256 images per step; 0: 1.5e-4, or 3e-3 for encoders below 12 blocks
    weight_decay: float = 0.05
    beta2: float = 0.95  # of AdamW; beta1 is 0.9
    warmup_ratio: float = 0.05  # share of the steps
    max_norm: float = 1.0  # gradient clipping norm; 0: no clipping
    precision: str = "no"  # bf16, fp16, or no (float32)
    accumulate: int = 1  # number of parts that a step is computed in, to save memory
    compile: bool = False  # torch.compile for transformer blocks: takes minutes, changes last bits; meant for GPUs
    threads: int = 1  # CPU threads; another number changes last bits
    seed: int = 0  # beside the run's seed: changes initial weights, order and views
    label: str = ""  # output folder under pretrain/; empty: the method's name
    data: tuple[str, ...] = ()  # tars, patterns, folders; instead of the run's own shards
    masks: Literal["own", "elsewhere", "scattered"] = "own"  # the others are controls: synthgen.mask_controls
    save_every: int = unhashed(200)  # steps
    log_every: int = unhashed(10)  # steps
    snapshots: int = unhashed(0)  # number of evenly spaced copies of the encoder, in snapshots/step-<steps>/
    verify: bool = unhashed(True)  # check the sha256 of the run's shards first
    num_workers: int = unhashed(-1)  # loader processes; -1: none on two cores, else up to 8
    trackers: tuple[str, ...] = unhashed(())  # such as tensorboard, wandb; metrics.jsonl is always written
    export: bool = unhashed(True)  # write transformers/ too
    _samples_and_side: tuple[ImageDataset, int] | None = runtime_field()  # the images, and their typical side in pixels

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, not {self.precision!r}")
        if self.masks not in _MASKS:
            raise ValueError(f"masks must be one of {', '.join(_MASKS)}, not {self.masks!r}")
        check_range(ge=1, epochs=self.epochs, batch_size=self.batch_size, accumulate=self.accumulate)
        check_range(ge=1, threads=self.threads, save_every=self.save_every, log_every=self.log_every)
        check_range(ge=0, snapshots=self.snapshots, samples_seen=self.samples_seen)
        check_range(ge=-1, num_workers=self.num_workers)
        check_range(ge=0, lt=math.inf, base_learning_rate=self.base_learning_rate)
        check_range(ge=0, lt=math.inf, weight_decay=self.weight_decay, max_norm=self.max_norm)
        check_range(ge=0, lt=1, beta2=self.beta2, warmup_ratio=self.warmup_ratio)
        if "/" in self.label or self.label.startswith(".") or visible(self.label) != self.label:
            raise ValueError(f"label must be a plain folder name, not {self.label!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The run's shards, unless ``data`` is given."""
        return () if self.data else ("shards",)

    # -- planning

    def artifacts(self) -> tuple[str, ...]:
        """One folder per training."""
        return (f"pretrain/{self.label or self.method.name}",)

    @classmethod
    def folder_of(cls, settings: Mapping[str, Any]) -> str:
        """The folder of a training with these settings."""
        (name,) = make_stage(cls.name, settings).artifacts()
        return name

    def source_names(self) -> tuple[str, ...]:
        """The run's shards, or ``data``."""
        return self.data or self.reads

    def complete(self) -> Pretrain:
        """The same stage with every option of the method."""
        from synthgen.methods import METHODS

        return replace(self, method=METHODS.complete(self.method, "encoder"))

    def inputs(self, run: Run) -> dict[str, str]:
        """Hashes of the shards' names and sizes, of the initial weights, and of files that method options name."""
        from synthgen.datasets import source_inputs

        found = source_inputs(*self.sources(run))
        found = found if self.data else {"shards/train": next(iter(found.values()))}
        found |= option_inputs(self.method)
        if self.start:
            found |= start_inputs(self.start, self.method.name, run.find_artifact(*self.artifacts()))
        return found

    def sources(self, run: Run) -> list[str]:
        """Tars, patterns and folders of the training images.

        Raises:
            MissingArtifact: the run's shards are not finished, or one of them is missing.
            CorruptFile: their ``dataset.json`` cannot be read.
        """
        if self.data:
            return list(self.data)
        check_shards_exist(run, "train")
        return [str(run.folder("shards") / "train")]

    def plan(self, run: Run) -> list[int]:
        """A training is one unit."""
        return [0]

    def todo(self, run: Run) -> list[int]:
        """The unit, unless the encoder was written with these settings."""
        (name,) = self.artifacts()
        return [] if is_complete(run.folder(name), run.artifact(name)["fingerprint"]) else [0]

    def size(self, run: Run, unit: int) -> int:
        """The number of images that all steps take together."""
        order = self.order(run, len(self.dataset(run)))
        return order.steps * order.batch_size

    def check_sources(self, run: Run) -> None:
        """Check ``data`` and ``start``."""
        for source in self.data:
            find_dataset(source, run)
        find_encoder(self.start, run)

    def prepare(self, run: Run) -> Self:
        """Check that the method can be built and the data suits it, before anything heavy begins.

        Raises:
            ConfigError: an option is wrong, the data lacks what the method needs, the initial weights do not fit, or
                the device does not support the precision.
            CorruptFile: one of the samples looked at, or the initial weights, cannot be read.
            MissingDependency: a tracker's library or a compiler is not installed.
        """
        from synthgen.train.launch import check_compiler, check_precision, check_trackers

        samples = self.dataset(run)
        part = self.order(run, len(samples)).batch_size // self.accumulate  # first: the processes meet here
        probed, sides = probe(samples)
        method = self.build_method(run, samples, typical_side(sides))
        try:
            method.check(probed)
        except ConfigError as error:
            raise ConfigError(f"{self.label or self.method.name}, {', '.join(self.sources(run))}: {error}") from None
        if part < method.min_images:
            raise ConfigError(
                f"{self.method.name} compares images, and {part} at once (of {len(samples)}, batch_size "
                f"{self.batch_size}, accumulate {self.accumulate}) are too few; it needs {method.min_images} or more"
            )
        if self.todo(run):  # a finished training needs neither the GPU nor its initial weights
            check_precision(self.precision, devices_for(self)[0])
            if "image_size" not in self.encoder.options:
                warn_of_sizes(sides, method.encoder.config.image_size)
            self.load_start_weights(run, method)
        check_trackers(self.trackers)
        if self.compile:
            check_compiler()
        return self.with_runtime(_samples_and_side=(samples, typical_side(sides)))

    def load_start_weights(self, run: Run, method: Method) -> dict[str, Any]:
        """Load the weights of ``start`` into ``method``; the entry for ``done.json``."""
        if not self.start:
            return {}
        inputs = run.artifact(*self.artifacts())["inputs"]
        return {"start": load_start(method, self.start, self.method, inputs)}

    def dataset(self, run: Run, *, masks: bool = True) -> ImageDataset:
        """The training images."""
        from synthgen.datasets import open_dataset
        from synthgen.mask_controls import CONTROLS, WithChangedMasks

        samples = open_dataset(*self.sources(run), masks=masks)
        return samples if self.masks == "own" else WithChangedMasks(samples, CONTROLS[self.masks])

    def order(self, run: Run, length: int) -> Order:
        """The samples of each step. A batch is never larger than the dataset.

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
        """The method with a new encoder for images of ``side`` pixels; initial weights depend on the seeds alone."""
        from synthgen.methods import METHODS
        from synthgen.models.vit import VisionTransformer, encoder_config
        from synthgen.train.loop import seed_everything

        config = encoder_config(self.encoder, side)
        seed_everything(self.mixed_seed(run))
        method = METHODS.build(self.method, encoder=VisionTransformer(config))
        method.fit_to(samples)
        return method

    # -- training

    @contextmanager
    def open(self, run: Run, worker: Worker) -> Iterator[Work]:
        """Yields the training."""
        import torch

        from synthgen.train.launch import accelerated

        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with staging_folder(run.folder(*self.artifacts())) as folder:
                accelerator = accelerated(
                    folder,
                    cpu=worker.device == "cpu",
                    precision=self.precision,
                    accumulate=self.accumulate,
                    trackers=self.trackers,
                    settings=self.settings(),
                )

                def work(unit: int) -> Report:
                    with translate_loader_errors():
                        return self.train(run, worker, accelerator, unit)

                yield work
                for tracker in accelerator.trackers:  # end_training() would also destroy the process group
                    tracker.finish()
        finally:
            torch.set_num_threads(threads)

    def train(self, run: Run, worker: Worker, accelerator: Accelerator, unit: int) -> Report:
        """Train from the newest checkpoint to the end, and write the encoder."""
        from synthgen.loader import workers_for
        from synthgen.models.vit import save_encoder
        from synthgen.train.checkpoint import Checkpoints
        from synthgen.train.loop import Training, last_loss

        (name,) = self.artifacts()
        folder, entry = run.folder(name), run.artifact(name)
        ensure_settings = partial(run.ensure_settings, name, entry)  # before anything is written into the folder
        if self.verify and not self.data:
            check_shards(run, "train", accelerator.process_index, accelerator.num_processes)
        assert self._samples_and_side is not None  # set by prepare()
        samples, side = self._samples_and_side
        method = self.build_method(run, samples, side)
        start = self.load_start_weights(run, method)
        order = self.order(run, len(samples))
        ensure_settings()
        training = Training(
            method=method,
            samples=samples if method.uses_masks else self.dataset(run, masks=False),
            order=order,
            optim=self.optim_settings(method, order.batch_size),
            accelerator=accelerator,
            checkpoints=Checkpoints(folder / "checkpoints", entry["fingerprint"]),
            metrics_path=folder / "metrics.jsonl",
            save_every=self.save_every,
            log_every=self.log_every,
            num_workers=workers_for(self.num_workers),
            compile=self.compile,
            before_save=ensure_settings,
        )
        worker.progress.skip(training.step * order.batch_size)
        about = {"size": self.encoder.name, "method": self.method.dump()}
        snapshot_steps = {order.steps * number // self.snapshots for number in range(1, self.snapshots + 1)} - {0}

        def snapshot(step: int) -> None:
            path = folder / "snapshots" / f"step-{step:06d}"
            if step in snapshot_steps and accelerator.is_main_process and not (path / "encoder.safetensors").is_file():
                ensure_settings()
                save_encoder(method.encoder, path, **about)

        snapshot(training.step)  # it is missing if the process was killed after this step's checkpoint
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
            done = {
                "fingerprint": entry["fingerprint"],
                "steps": order.steps,
                "images": len(samples),
                "loss": loss if count else last_loss(folder / "metrics.jsonl"),  # killed after the last checkpoint
                "seconds": round(training.seconds, 3),
                "threads": self.threads,
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                **start,
            }
            ensure_settings()
            save_outputs(method.cpu(), folder, about, done, export=self.export)
        accelerator.wait_for_everyone()
        return Report(unit, count)

    def optim_settings(self, method: Method, batch_size: int) -> OptimSettings:
        """The settings of the optimizer."""
        from synthgen.train.optim import OptimSettings

        return OptimSettings(
            base_learning_rate=self.base_learning_rate or (1.5e-4 if method.encoder.config.depth >= 12 else 3e-3),
            batch_size=batch_size,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            max_norm=self.max_norm,
            beta2=self.beta2,
        )

    def finish(self, run: Run) -> None:
        """Write ``transformers/`` if ``export`` was turned on only after the training had finished."""
        if self.export and place().rank == 0:
            export_missing(run.folder(*self.artifacts()))
