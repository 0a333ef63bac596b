"""What an evaluation will take: its images by the image, and what each evaluator does with them by doing it.

The sample's images are seen by the networks in batches, and each evaluator is tried on their features (see
:mod:`synthgen.plan.eval_timing`). Of masks the true ones are judged beside themselves.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from synthgen.config import Choice
from synthgen.devices import devices_for
from synthgen.errors import MissingArtifact
from synthgen.models.transformers_encoder import encoder_folder
from synthgen.plan.eval_counts import Judged, Looked
from synthgen.plan.files import repeated
from synthgen.plan.meter import Meter, Took
from synthgen.run import Run
from synthgen.stages import Worker
from synthgen.stages._eval_rows import extractor_of, judges, rows_of
from synthgen.stages._eval_sources import Source, looked_at

if TYPE_CHECKING:
    from synthgen.evaluators import EvalData, Evaluator, Need, Row
    from synthgen.plan.sample import Sample
    from synthgen.stages.evaluate import Evaluate

__all__ = ["measure_evaluation"]

_FIRST = 8  # images of either side of the first evaluation, which warms everything up
_MAX_AT_ONCE = 32  # images of a batch on a CPU, where larger ones are no faster
_TEXTS = 256  # that are embedded to see how long it takes


def measure_evaluation(stage: Evaluate, sample: Sample, judged: Judged, rounds: int, meter: Meter) -> Took:
    """Evaluate the sample, and tell what all images will take: seconds an image, in each of ``rounds``.

    Raises:
        SynthgenError: it cannot be done, for the reason that it would have in a run.
    """
    device, run = devices_for(stage)[0], sample.run("probe")
    folder = Path(tempfile.mkdtemp(dir=sample.folder))  # of this evaluation: there may be several
    sides = _sides(sample, judged, folder)
    asked, stage = stage, replace(stage, verify=False)
    if judged.test.images:
        stage = replace(sides.shown_to(stage, folder / "first", _FIRST), encoder=_encoder(sample, judged))
    if judged.few_truth:
        judged.few_truth.write(folder / "truth")
        stage = replace(stage, truth=str(folder / "truth"), predicted=str(folder / "truth"))
    short = replace(_shortened(stage), batch_size=min(_FIRST, stage.batch_size))
    meter.work(short, run)
    files = _written(short.path(run), short, replace(asked, encoder=judged.encoder))
    parts, totals, samples, batch, held = list[str](), [0.0] * rounds, 0, 1, 0
    if judged.test.images:
        looking = _Looking(stage, run, sides, judged, device, folder, sample.seconds)
        totals, samples, batch, held = looking.take(rounds, parts)
        held = held if device == "cpu" else 0  # features lie in main memory, which is not what is told of a GPU
    if judged.few_truth:
        taken = [_seconds_of_masks(stage, run) for _ in range(rounds)]
        few = len(judged.few_truth.few)
        totals = [total + seconds * judged.truth / few for total, seconds in zip(totals, taken, strict=True)]
        parts.append(f"masks: those of {few} images, the true ones beside themselves")
        samples = samples or few
    each = tuple(total / max(1, judged.images) for total in totals)
    return Took(each, samples, batch, meter.start_seconds, device, meter.memory(device), tuple(parts), held, files)


@dataclass(frozen=True)
class _Sides:
    """The sample's images, as tars: those to learn from (none where nothing is learned), and those to be judged on."""

    train: list[Path]
    test: list[Path]

    def shown_to(self, stage: Evaluate, folder: Path, images: int) -> Evaluate:
        """``stage`` with ``images`` on either side, in ``folder``.

        Before those to be judged on come as many of the others where these are of another source, so that a few images
        of either share a class.
        """
        train = repeated(self.train, folder / "train", images) if self.train else None
        before = sorted(train.glob("*.tar")) if train and self.train != self.test else []
        test = repeated(before + self.test, folder / "test", images * (2 if before else 1))
        return replace(stage, train=str(train or ""), test=str(test))


def _sides(sample: Sample, judged: Judged, folder: Path) -> _Sides:
    own = sorted(sample.run("rounds").folder("shards").glob("train/*.tar"))

    def tars(name: str, side: Looked) -> list[Path]:
        if not side.images:
            return []
        if side.few is None:
            return own
        side.few.write(folder / f"few-{name}")
        return sorted((folder / f"few-{name}").glob("*.tar"))

    return _Sides(tars("train", judged.train), tars("test", judged.test))


def _encoder(sample: Sample, judged: Judged) -> str:
    """The folder of the encoder, or of that of the same shape which was trained on the sample; none for a generator."""
    if not judged.encoder:
        return ""
    with suppress(MissingArtifact):
        encoder_folder(judged.encoder)
        return judged.encoder
    trained = sample.run("rounds").folder("pretrain") / Path(judged.encoder).name
    if not (trained / "encoder.safetensors").is_file():
        raise MissingArtifact(f"there is no encoder in {judged.encoder}, and no training before makes it")
    return str(trained)


def _shortened(stage: Evaluate) -> Evaluate:
    """With trainings of a step or a few, a different number in each, so that none is the same as another."""
    from synthgen.plan.eval_timing import LENGTHS

    few = []
    for place, choice in enumerate(stage.evaluators, start=1):
        options = {name: min(value, place) if name in LENGTHS else value for name, value in choice.options.items()}
        few.append(Choice(choice.name, options))
    return replace(stage, evaluators=tuple(few))


def _written(scores: Path, short: Evaluate, asked: Evaluate) -> int:
    """Bytes of the scores, with the names of what is really judged in place of the sample's."""
    text = scores.read_text(encoding="utf-8")
    for name in ("encoder", "train", "test", "truth", "predicted"):
        if of_sample := getattr(short, name):
            text = text.replace(of_sample, getattr(asked, name))
    return len(text.encode())


def _seconds_of_masks(stage: Evaluate, run: Run) -> float:
    started = time.perf_counter()
    stage.judge_masks(run, stage.chosen(run)[0], {"scores": {}, "warnings": []})
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Looking:
    """What judging an encoder, or a generator, takes."""

    stage: Evaluate
    run: Run
    sides: _Sides
    judged: Judged
    device: str
    folder: Path  # for what is made
    seconds: float  # that may be spent

    def take(self, rounds: int, parts: list[str]) -> tuple[list[float], int, int, int]:
        """Seconds for all images in each round, images of the sample, their batch, and bytes that all of them hold.

        What was measured of each evaluator goes into ``parts``.
        """
        from synthgen.plan.eval_timing import tried

        stage = self.stage
        chosen, left_out = stage.chosen(self.run)
        evaluators = {name: one for name, one in chosen.items() if one.needs != "masks"}
        batch, lead = self._batch(evaluators, rounds)
        more = self.sides.shown_to(stage, self.folder / "more", batch * (lead + rounds))
        totals, data, samples = self._seen(replace(more, batch_size=batch), evaluators, rounds)
        sizes = self._sizes(data)
        for name, evaluator in evaluators.items():
            kinds = [kind for kind in data if judges(evaluator, kind)]
            affordable = self.seconds / len(evaluators) / len(kinds)
            basis = ""
            for kind in kinds:
                there, classes = sizes[evaluator.needs]
                taken, basis = tried(evaluator, data[kind], there, classes, rounds, affordable)
                totals = [total + seconds for total, seconds in zip(totals, taken, strict=True)]
            parts.append(f"{name}: {basis}")
        parts += [f"{name}: left out" for name in left_out]
        return totals, samples, batch, _held(data.values(), sizes)

    def _batch(self, evaluators: Mapping[str, Evaluator], rounds: int) -> tuple[int, int]:
        """How many images to look at together, and how many batches come before those that count."""
        from synthgen.loader import workers_for

        lead = 1 + 2 * workers_for(self.stage.num_workers)  # what loader processes have read before the first is seen
        most = min(self.stage.batch_size, -(-max(self.judged.train.images, self.judged.test.images) // rounds))
        if self.device.startswith("cuda"):
            return most, lead
        started = time.perf_counter()
        _, _, samples = self._seen(replace(self.stage, batch_size=_FIRST), evaluators, 1)
        affordable = self.seconds / 2 * samples / (time.perf_counter() - started)
        return max(1, int(min(most, _MAX_AT_ONCE, affordable / 2 / (lead + rounds)))), lead

    def _seen(
        self, stage: Evaluate, evaluators: Mapping[str, Evaluator], rounds: int
    ) -> tuple[list[float], dict[Row, EvalData], int]:
        """Seconds in which all images are read and seen, in each round; what was seen of the sample, and its images."""
        from synthgen.stages._eval_data import gathered

        folder = encoder_folder(stage.encoder) if stage.encoder else None
        kinds = rows_of(stage, folder, evaluators.values()).values()
        extractor = extractor_of(stage, self.run, folder, Worker(device=self.device), evaluators.values())
        started = time.perf_counter()
        names = ("train", "test") if self.sides.train else ("test",)
        sources = {name: Source(name, getattr(stage, name)) for name in names}
        counts = {name: len(looked_at(source, extractor.needs)) for name, source in sources.items()}
        ends = [(0, time.perf_counter())]

        def tick(count: int) -> None:
            if count:  # of images that are left out there may be none
                ends.append((ends[-1][0] + count, time.perf_counter()))

        data = gathered(sources, extractor, kinds, stage.patch_memory, tick, {"warnings": []})
        beside = ends[0][1] - started + time.perf_counter() - ends[-1][1]  # to find images, and to sort what was seen
        totals, before, whole = [0.0] * rounds, 0, sum(counts.values())
        sizes = self._sizes(data)
        for name, count in counts.items():
            images = getattr(self.judged, name).images
            if not extractor.needs & {"features", "pairs"}:  # then only those that are kept are seen
                images = min(images, sum(sizes[need][0][name == "test"] for need in extractor.needs))
            each = _of_an_image([end for end in ends if before <= end[0] <= before + count], rounds)
            totals = [total + (seconds + beside / whole) * images for total, seconds in zip(totals, each, strict=True)]
            before += count
        if extractor.dual is not None:
            said = next(iter(sources["test"].captions.values()))[0]
            started = time.perf_counter()
            extractor.dual.embed_texts([f"{said} {number}" for number in range(_TEXTS)])
            seconds = (time.perf_counter() - started) / _TEXTS * self.judged.test.texts
            totals = [total + seconds for total in totals]
        return totals, data, whole

    def _sizes(self, data: Mapping[Row, EvalData]) -> dict[Need, tuple[tuple[int, int], int]]:
        """For each need the images to learn from and to be judged on (of pairs texts and images), and the classes."""
        train, test = self.judged.train, self.judged.test
        each = sum(_patch_bytes(given) for given in data.values())
        share = min(1.0, self.stage.patch_memory * 1e9 / max(1, each * (train.masked + test.masked)))
        words = train.classes if self.stage.mask_classes == "label" else train.words
        masked = (max(1, int(train.masked * share)), max(1, int(test.masked * share))), words
        each = sum(_map_bytes(given) for given in data.values()) + _pixel_bytes(data.values())
        share = min(1.0, self.stage.patch_memory * 1e9 / max(1, each * (train.labelled + test.labelled)))
        classed = (max(1, int(train.labelled * share)), max(1, int(test.labelled * share))), train.classes
        return {
            "maps": classed,
            "latents": classed,
            "images": classed,
            "features": ((train.labelled, test.labelled), train.classes),
            "patches": masked,
            "boxes": masked,
            "pairs": ((test.texts, test.captioned), 0),
        }


def _of_an_image(ends: Sequence[tuple[int, float]], rounds: int) -> list[float]:
    """Seconds an image in the last batches, from how many were seen when; the mean where there were too few."""
    each = [(after - before) / (more - less) for (less, before), (more, after) in pairwise(ends)][-rounds:]
    return each + [fmean(each)] * (rounds - len(each))


def _patch_bytes(data: EvalData) -> int:
    """What an image's patch features take in memory."""
    scenes = data.test_scenes
    return 0 if scenes is None else scenes.patches[0].nbytes


def _map_bytes(data: EvalData) -> int:
    """What an image's maps of blocks take in memory, and its latents."""
    maps = data.test_maps.maps if data.test_maps else ()
    latents = data.test_latents.values[0].nbytes if data.test_latents else 0
    return latents + sum(block[0].nbytes for block in maps)


def _pixel_bytes(materials: Collection[EvalData]) -> int:
    """What an image's own pixels take in memory, which all rows of encoders share, and all of the generator."""
    sizes = {given.encoder is None: given.test_images.pixels[0].nbytes for given in materials if given.test_images}
    return sum(sizes.values())


def _held(materials: Collection[EvalData], sizes: Mapping[Need, tuple[tuple[int, int], int]]) -> int:
    """What the features of all images take in memory, in bytes."""
    total = _pixel_bytes(materials) * sum(sizes["images"][0])
    for data in materials:
        if data.test is not None:
            total += data.test.features[0].nbytes * sum(sizes["features"][0])
        if data.pairs is not None:
            total += data.pairs.images[0].nbytes * sum(sizes["pairs"][0])
        total += _patch_bytes(data) * sum(sizes["patches"][0]) + _map_bytes(data) * sum(sizes["maps"][0])
    return total
