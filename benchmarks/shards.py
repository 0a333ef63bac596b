"""Writing, reading and opening shards: synthgen's tars compared with ``tarfile``, ``webdataset`` and ``wids``.

``python benchmarks/shards.py`` writes ``results/shards.json``. All contenders alternate on the same samples (the bytes
of an image, a mask, a prompt, a class and a JSON object) in one folder:

* ``write``: synthgen also computes a sha256 and waits for the disk (fsync), which the others do not; ``synthgen, as
  others`` leaves both out.
* ``read``: all members as bytes, nothing decoded.
* ``open``: until any sample of a shard can be read by its number; ``held`` is the memory of the Python objects that
  exist then.

The stage ``shards`` is measured as a whole as well.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import webdataset
from _common import make_parser, rounds, write_result
from wids.wids import IndexedTarSamples

from synthgen.engines.local import Local
from synthgen.runner import run_stage
from synthgen.stages.shards import Shards
from synthgen.stores.tar import TarWriter, index_tar, read_tar

SAMPLES = 1000
IMAGE_BYTES, MASK_BYTES = 60_000, 3_000  # about as in a 512 px JPEG and its mask
REPEATS = 12
STAGE_SAMPLES, STAGE_PIXELS = 64, 512

Samples = list[tuple[str, dict[str, bytes]]]


def make_samples() -> Samples:
    """Incompressible samples, the same in every run."""
    rng = random.Random(0)
    return [
        (
            f"{number:010d}",
            {
                "jpg": rng.randbytes(IMAGE_BYTES),
                "mask.png": rng.randbytes(MASK_BYTES),
                "txt": b"a photo of a dog in a park",
                "cls": b"7",
                "json": json.dumps({"key": f"{number:010d}", "words": ["dog", "park"]}).encode(),
            },
        )
        for number in range(SAMPLES)
    ]


def write_synthgen(path: Path, samples: Samples) -> None:
    with TarWriter(path) as tar:
        for key, members in samples:
            tar.add(key, members)


def write_synthgen_bare(path: Path, samples: Samples) -> None:
    no_hash = mock.Mock(hexdigest=lambda: "")
    with mock.patch("os.fsync"), mock.patch("hashlib.file_digest", return_value=no_hash):
        write_synthgen(path, samples)


def write_tarfile(path: Path, samples: Samples) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_webdataset(path: Path, samples: Samples) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})


def read_synthgen(path: Path) -> int:
    return sum(len(data) for _, members in read_tar(path) for data in members.values())


def read_tarfile(path: Path) -> int:
    with tarfile.open(path) as tar:
        files = (tar.extractfile(info) for info in tar)
        return sum(len(file.read()) for file in files if file)


def read_webdataset(path: Path) -> int:
    dataset = webdataset.WebDataset(str(path), shardshuffle=False)
    return sum(len(data) for sample in dataset for data in sample.values() if isinstance(data, bytes))


def speeds(seconds: Mapping[str, list[float]], size: int) -> dict[str, dict[str, float]]:
    """Megabytes of content per second in the median and in the best round, and the speed over ``tarfile``."""
    return {
        name: {
            "mb_per_s": round(size / 1e6 / statistics.median(times), 1),
            "best_mb_per_s": round(size / 1e6 / min(times), 1),
            "times_tarfile": times_tarfile(times, seconds["tarfile"]),
        }
        for name, times in seconds.items()
    }


def times_tarfile(times: list[float], plain: list[float]) -> float:
    """The speed over ``tarfile``: the median of the ratios within each round, which other work changes least."""
    return round(statistics.median(b / a for a, b in zip(times, plain, strict=True)), 2)


def held(opener: Callable[[], object]) -> float:
    """The bytes per sample of the Python objects of an open shard."""
    gc.collect()
    tracemalloc.start()
    opened = opener()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del opened
    return round(size / SAMPLES, 1)


def open_tarfile(path: Path) -> tarfile.TarFile:
    tar = tarfile.open(path)  # noqa: SIM115  # it stays open while it is measured
    tar.getmembers()
    return tar


def time_stage(folder: Path) -> dict[str, float]:
    """The stage ``shards`` in one process: decodes PNG and masks, encodes JPEG and mask PNG."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    factories = importlib.import_module("tests.factories")
    run = factories.make_run(folder / "run", units=4, unit_size=STAGE_SAMPLES // 4, image_size=STAGE_PIXELS)
    start = time.perf_counter()
    run_stage(Shards(samples_per_shard=STAGE_SAMPLES // 4), run, Local(workers=1))
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in run.folder("shards").glob("*/*.tar"))
    return {
        "samples": STAGE_SAMPLES,
        "pixels": STAGE_PIXELS,
        "samples_per_s": round(STAGE_SAMPLES / seconds, 1),
        "mb_per_s": round(size / 1e6 / seconds, 2),
    }


def main() -> None:
    make_parser(__doc__).parse_args()
    samples = make_samples()
    size = sum(len(data) for _, members in samples for data in members.values())
    writers: dict[str, Callable[[Path, Samples], None]] = {
        "synthgen": write_synthgen,
        "synthgen, as others": write_synthgen_bare,
        "tarfile": write_tarfile,
        "webdataset": write_webdataset,
    }
    readers: dict[str, Callable[[Path], int]] = {
        "synthgen": read_synthgen,
        "tarfile": read_tarfile,
        "webdataset": read_webdataset,
    }
    with tempfile.TemporaryDirectory() as name:
        paths = {writer: Path(name) / f"{number}.tar" for number, writer in enumerate(writers)}
        write_seconds = rounds(
            {writer: functools.partial(write, paths[writer], samples) for writer, write in writers.items()}, REPEATS
        )
        shard = paths["synthgen"]
        assert all(read(shard) == size for read in readers.values())
        read_seconds = rounds({reader: functools.partial(read, shard) for reader, read in readers.items()}, REPEATS)
        openers: dict[str, Callable[[], object]] = {
            "synthgen": functools.partial(index_tar, shard),
            "tarfile": functools.partial(open_tarfile, shard),
            "wids": functools.partial(IndexedTarSamples, path=str(shard)),
        }
        open_seconds = rounds(openers, REPEATS)
        memory = {name: held(opener) for name, opener in openers.items()}
        overhead = {writer: round(100 * (path.stat().st_size / size - 1), 2) for writer, path in paths.items()}
        figures = {
            "samples": SAMPLES,
            "content_mb": round(size / 1e6, 1),
            "repeats": REPEATS,
            "write": speeds(write_seconds, size),
            "read": speeds(read_seconds, size),
            "open": {
                name: {
                    "us_per_sample": round(1e6 * statistics.median(times) / SAMPLES, 1),
                    "times_tarfile": times_tarfile(times, open_seconds["tarfile"]),
                }
                for name, times in open_seconds.items()
            },
            "held_bytes_per_sample": memory,
            "tar_overhead_percent": overhead,
            "stage": time_stage(Path(name)),
        }
    print(write_result("shards", figures).read_text())


if __name__ == "__main__":
    main()
