"""Write what a backbone makes, while it makes more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from synthgen import codecs
from synthgen.errors import SynthgenError
from synthgen.records import Generation, Report
from synthgen.run import Run
from synthgen.units import UnitWriter

__all__ = ["write_unit"]


def write_unit(
    run: Run,
    unit: int,
    batches: Iterable[Sequence[Generation]],
    advance: Callable[[int], None],
    unreadable: Collection[str] = (),
) -> Report:
    """Write one unit of ``images`` and ``maps`` from batches, in their order; both will be of one worker.

    A batch is encoded and written in a thread of its own while the next one is drawn. Failed images are left out, with
    their reasons in the unit's done mark. ``unreadable``, which may grow meanwhile, are the keys of those for which it
    is their source that is to blame: trying again would not help, so a unit of nothing else is written empty.

    Raises:
        SynthgenError: not one image is good, and not all of them were unreadable.
    """
    with (
        run.write("maps", unit) as maps,
        run.write("images", unit) as images,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as pool,
    ):
        images.followed_by, maps.follows = "maps", images
        writing: Future[None] | None = None
        for batch in batches:
            if writing is not None:
                writing.result()
            writing = pool.submit(_write, deque(batch), images, maps, advance)
            del batch  # each image is freed when it is written, while the next ones are drawn
        if writing is not None:
            writing.result()
        to_try = [reason for key, reason in images.failed.items() if key not in unreadable]
        if to_try and not images.count:
            raise SynthgenError(f"no image of the unit is good: {to_try[0]}")
    return Report(unit, images.count, notes=images.notes)


def _write(batch: deque[Generation], images: UnitWriter, maps: UnitWriter, advance: Callable[[int], None]) -> None:
    count = len(batch)
    while batch:
        generation = batch.popleft()
        key = generation.request.key
        if generation.failed:
            images.fail(key, generation.failed)
            continue
        images.add(key, codecs.encode_image(generation))
        maps.add(key, codecs.encode_maps(generation.maps))
        if generation.warnings:
            images.note("samples with warnings")
    advance(count)
