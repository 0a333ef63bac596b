"""The results of ``synthgen doctor`` as plain text for the console."""

from __future__ import annotations

from collections.abc import Iterator

from synthgen.doctor import Examination, HostedModel
from synthgen.text import counted, size, table, wrap

__all__ = ["render"]

_YES_NO = {True: "yes", False: "no"}


def render(found: Examination, *, whole: bool = False) -> str:
    """An examination without its problems, as plain text of at most 100 columns.

    With ``whole``, for files and pipes, rows are not truncated.
    """
    return "\n\n".join("\n".join(block) for block in _blocks(found, whole) if block)


def _blocks(found: Examination, whole: bool) -> Iterator[list[str]]:
    libraries = ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "synthgen")
    yield wrap(f"synthgen {found.versions.get('synthgen', '')} on {found.platform}") + wrap(f"with {libraries}")
    if found.devices:
        yield table(
            ("device", "memory", "free", "bfloat16", "model"),
            [
                (
                    item.name,
                    _size(item.memory_total),
                    _size(item.memory_free),
                    _YES_NO[item.bfloat16],
                    item.model + (f", {counted(item.cores, 'cores')}" if item.cores else ""),
                )
                for item in found.devices
            ],
            right=(1, 2),
            whole=whole,
        )
    if found.generate is not None:
        workers = counted(found.generate.workers, "workers")
        yield wrap(f"synthgen generate would use: {', '.join(found.generate.devices)}; {workers}")
    if found.attention:
        yield table(
            ("device", "dtype", "attention shape", "kernel", "bit-identical", "max error", "logsumexp"),
            [
                (
                    item.device,
                    item.dtype,
                    item.shape,
                    item.kernel,
                    _YES_NO[item.same_output],
                    f"{item.error:.1e}",
                    "from the kernel" if item.has_lse else "recomputed",
                )
                for item in found.attention
            ],
            right=(5,),
            whole=whole,
        )
    yield list(_places(found))
    yield table(
        ("extra", "installed", "adds", "install with"),
        [
            (item.name, _installed(item.missing, item.libraries), item.adds, item.install if item.missing else "")
            for item in found.extras
        ],
        whole=whole,
    )
    yield [line for note in found.notes for line in wrap(f"note: {note}")]
    count = len(found.problems)
    yield [f"{counted(count, 'problems')} found" if count else "no problems found"]


def _places(found: Examination) -> Iterator[str]:
    """One line each: disk, memory, models."""
    disk, memory, shipped = found.disk, found.memory, found.shipped
    kind, free = ("store", "") if disk.free is None else ("disk", f" {size(disk.free)} free,")
    yield from wrap(f"{kind}: {disk.path}:{free} {'' if disk.writable else 'not '}writable")
    if memory.total is not None:
        yield f"memory: {size(memory.total)}" + (
            f", {size(memory.available)} available" if memory.available is not None else ""
        )
    if shipped is not None:
        yield f"shipped model: {'loads' if shipped.loads else 'does not load'}, {size(shipped.bytes)}"
    if found.model is not None:
        yield from wrap(f"model {_model(found.model)}")


def _model(model: HostedModel) -> str:
    name = model.name if model.name == model.model else f"{model.name} ({model.model})"
    if not model.pipeline:
        return f"{name}: {'its index cannot be read' if model.folder else 'is not on this machine'}"
    weights = f"no weights of {', '.join(model.missing)}" if model.missing else f"weights {size(model.bytes)}"
    return f"{name}: {model.family or 'unknown family'} ({model.pipeline}), {weights}, in {model.folder}"


def _installed(missing: list[str], libraries: dict[str, str]) -> str:
    if not missing:
        return next(iter(libraries.values())) if len(libraries) == 1 else "yes"
    return "no" if len(missing) == len(libraries) else f"without {', '.join(missing)}"


def _size(count: int | None) -> str:
    return "" if count is None else size(count)
