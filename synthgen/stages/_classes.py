"""The classes of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from synthgen.errors import CorruptFile
from synthgen.prompt_copy import iter_lines
from synthgen.run import Run
from synthgen.stores.tar import read_tar
from synthgen.untrusted import read_json

__all__ = ["classes_of"]


def classes_of(run: Run, units: Collection[int] | None) -> list[str]:
    """The labels in the order of the run's prompts, or of the images of ``units``; none if one of them has no label."""
    path = run.path / "prompts.jsonl"
    if run.artifact("images")["stage"] != "attend" and path.is_file():  # a failed generate may have left one
        labels = (_label(line, path) for line in iter_lines(path))
    else:
        tars = (run.tar("images", unit) for unit in sorted(units or run.units("images")))
        labels = (_label(members.get("json", b""), tar) for tar in tars for _, members in read_tar(tar, {"json"}))
    found: dict[str, None] = {}
    for label in labels:
        if not label:
            return []
        found[label] = None
    return list(found)


def _label(data: bytes, path: Path) -> str:
    try:
        label = read_json(data)["label"]
    except (ValueError, LookupError, TypeError):
        raise CorruptFile(f"the labels in {path} cannot be read; delete it and run the stage that made it") from None
    return label if isinstance(label, str) else ""
