"""One HTML file that shows a run: images, prompts, and each word's mask before and after refining.

The file contains everything (styles, script, images as data URIs) and fetches nothing, so it can be mailed or archived
with a result. Each sample's masks are one label image and its attention one grey strip; the browser colours them on
demand. The same run gives the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from bisect import bisect_right
from collections.abc import Mapping
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from synthgen.codecs import decode_image, decode_maps, decode_masks, masks_to_labels
from synthgen.errors import SynthgenError
from synthgen.image import encode_jpeg, encode_png, resize
from synthgen.mask_shape import UNKNOWN, describe_masks
from synthgen.records import Maps, Prompt, WordMasks
from synthgen.rejected import read_rejected
from synthgen.run import Run
from synthgen.status import RunStatus, Training, finite, status
from synthgen.stores import listing, parse_location
from synthgen.stores.tar import read_tar, write_bytes
from synthgen.text import size

__all__ = ["write_page"]

LARGEST = 384  # pixels of the longer side; larger images are shown smaller, or 96 of them would not fit a page
EXACT = 128  # pixels of the longer side; up to this size an image is shown as the run's own PNG
MAX_TALLIES = 200  # rows of the tables of classes and of words
CURVE_POINTS = 240  # of a loss curve


def write_page(run: Run, path: Path | None = None, *, limit: int = 96) -> Path:
    """Write the page of a run, by default to ``view.html`` in it, and return its path.

    ``limit`` samples, spread evenly over the finished units, are shown. A tar that cannot be read is named on the page
    and raises no error.
    """
    if limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit}")
    state = status(run)
    samples, problems = _samples(run, state, limit)
    data = finite(_summary(state, problems)) | {"samples": samples}
    # "<" as an escape: no prompt can end the script element or open a comment in it
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, between, after = _template()
    path = run.path / "view.html" if path is None else parse_location(path)
    write_bytes(path, "".join((before, html.escape(_name(run.path)), between, text, after)).encode(errors="replace"))
    return path


def _template() -> tuple[str, str, str]:
    text = (files(__package__) / "page.html").read_text(encoding="utf-8")
    before, _, rest = text.partition("{{title}}")
    between, _, after = rest.partition("{{data}}")
    return before, between, after


def _name(path: Path) -> str:
    return path.resolve().name or str(path)


# -- the samples


def _samples(run: Run, state: RunStatus, limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The samples to show, in order of their keys, and what could not be read."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    made = {artifact.name for artifact in state.artifacts}
    if "images" not in made:
        return [], []
    try:
        rejected = read_rejected(run)
    except (SynthgenError, OSError) as error:
        rejected = {}
        problems.append(str(error))
    for unit, rows in _spread(run, limit, problems).items():
        try:
            keys = run.keys("images", unit)
            wanted = {keys[row] for row in rows if row < len(keys)}
            images = dict(read_tar(run.tar("images", unit), ("png", "json"), wanted))
            maps = _column(run, "maps", unit, ("maps.npz",), wanted, problems) if "maps" in made else {}
            masks = _column(run, "masks", unit, ("masks.npz", "json"), wanted, problems) if "masks" in made else {}
            for key, members in images.items():
                sample = _sample(key, members, maps.get(key), masks.get(key))
                sample["warnings"] += [f"rejected by the filter {rejected[key]}"] if key in rejected else []
                found.append(sample)
        except (SynthgenError, OSError) as error:
            problems.append(str(error))
    return found, problems


def _spread(run: Run, limit: int, problems: list[str]) -> dict[int, list[int]]:
    """The rows to show, by unit: ``limit`` samples, evenly spaced over all finished ones.

    Units whose tars do not match their marks are named in ``problems``.
    """
    marked = {
        int(name[:-5]) for name in listing(run.folder("images")) if name.endswith(".json") and name[:-5].isdecimal()
    }
    counts = sorted((unit, mark["count"]) for unit, mark in run.iter_marks("images"))
    if lost := sorted(marked - {unit for unit, _ in counts}):
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        problems.append(
            f"{run.tar('images', lost[0])}{others}: missing, cut off, or not the file of its done mark; "
            f"delete it and run: {run.remedy('images')}"
        )
    ends = list(accumulate(count for _, count in counts))
    total = ends[-1] if ends else 0
    num = min(limit, total)
    rows: dict[int, list[int]] = {}
    for place in (index * total // num for index in range(num)):
        number = bisect_right(ends, place)
        unit, count = counts[number]
        rows.setdefault(unit, []).append(place - (ends[number] - count))
    return rows


def _column(
    run: Run, artifact: str, unit: int, names: tuple[str, ...], keys: set[str], problems: list[str]
) -> dict[str, dict[str, bytes]]:
    """Some samples of another artifact of a unit; none if the unit is not done yet."""
    if run.mark(artifact, unit) is None:
        return {}
    try:
        return dict(read_tar(run.tar(artifact, unit), names, keys))
    except (SynthgenError, OSError) as error:
        problems.append(str(error))
        return {}


def _sample(
    key: str, image: Mapping[str, bytes], maps: Mapping[str, bytes] | None, masks: Mapping[str, bytes] | None
) -> dict[str, Any]:
    """One sample in the form that the page's script expects."""
    request, pixels, warnings = decode_image(key, image)
    height, width = pixels.shape[:2]
    sample: dict[str, Any] = {
        "key": key,
        "source": request.source,
        "text": _segments(request.prompt),
        "words": list(request.prompt.words),
        "label": request.prompt.label or "",
        "seed": str(request.seed),  # a script's numbers are exact to 2**53 only
        "warnings": list(warnings),
        "width": width,
        "height": height,
        "image": _picture(pixels, image["png"]),
    }
    if maps is not None:
        sample["attention"] = _attention(decode_maps(key, maps, request.prompt.words))
    if masks is not None:
        sample["masks"] = _masks(decode_masks(key, masks), _shown(height, width))
    return sample


def _segments(prompt: Prompt) -> list[tuple[str, int]]:
    """The prompt in pieces, each with the number of its word or -1.

    The spans are cut here, because they count code points and the browser counts UTF-16 units. Words without a span of
    their own are appended.
    """
    pieces: list[tuple[str, int]] = []
    end = 0
    placed = set()
    for (start, stop), word in sorted(zip(prompt.spans, range(len(prompt.words)), strict=False)):
        if not end <= start < stop <= len(prompt.text):
            continue
        pieces += [(prompt.text[end:start], -1)] if start > end else []
        pieces.append((prompt.text[start:stop], word))
        placed.add(word)
        end = stop
    pieces += [(prompt.text[end:], -1)] if end < len(prompt.text) else []
    for word, text in enumerate(prompt.words):
        if word not in placed:
            pieces += [(" ", -1), (text, word)]
    return pieces


def _shown(height: int, width: int) -> tuple[int, int]:
    """The size (height, width) of an image on the page."""
    shrink = min(1.0, LARGEST / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _picture(pixels: UInt8[np.ndarray, "H W 3"], png: bytes) -> str:
    height, width = pixels.shape[:2]
    if max(height, width) <= EXACT:
        return _uri("image/png", png)
    shown = _shown(height, width)
    return _uri("image/jpeg", encode_jpeg(pixels if shown == (height, width) else resize(pixels, shown), quality=85))


def _attention(maps: Maps) -> dict[str, Any]:
    """The words' maps stacked vertically in one grey image, each scaled from its minimum (0) to its maximum (255)."""
    weights: Float[np.ndarray, "words h w"] = np.nan_to_num(maps.weights.astype(np.float32), posinf=1.0, neginf=0.0)
    num, height, width = weights.shape
    if not weights.size:
        return {"strip": "", "height": height, "width": width, "peaks": []}
    low = weights.min(axis=(1, 2), keepdims=True)
    high = weights.max(axis=(1, 2), keepdims=True)
    grey = (255 * (weights - low) / np.where(high > low, high - low, 1)).round().astype(np.uint8)
    strip = _uri("image/png", encode_png(grey.reshape(num * height, width)))
    return {"strip": strip, "height": height, "width": width, "peaks": [_rounded(peak) for peak in high.ravel()]}


def _masks(masks: WordMasks, shown: tuple[int, int]) -> dict[str, Any]:
    """One image of word numbers at the size shown, with the scores and measures of each word's mask."""
    labels = masks_to_labels(masks.values)
    if labels.shape != shown:
        labels = np.asarray(Image.fromarray(labels).resize((shown[1], shown[0]), Image.Resampling.NEAREST))
    described = describe_masks(masks)
    figures = {
        name: [None if mask[name] == UNKNOWN else _rounded(mask[name]) for mask in described]
        for name in ("confidence", "sharpness", "disagreement")
    }
    return {
        "labels": _uri("image/png", encode_png(labels)),
        "scores": [_rounded(mask["score"]) for mask in described],
        "areas": [_rounded(mask["area"]) for mask in described],
        "objects": [len(mask["instances"]) for mask in described],
        "dropped": [mask["dropped"] for mask in described],
        **figures,
    }


def _rounded(value: float) -> float:
    return round(float(np.nan_to_num(value)), 4)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


# -- the run


def _summary(state: RunStatus, problems: list[str]) -> dict[str, Any]:
    """All data of a page except its samples."""
    return {
        "run": _name(state.path),
        "seed": str(state.seed),
        "next": state.advice,
        "artifacts": [
            {
                "name": item.name,
                "stage": item.stage,
                "done": item.done,
                "planned": item.planned,
                "failed": len(item.failures),
                "samples": item.samples,
                "seconds": item.seconds,
                "rate": item.rate,
                "size": size(item.bytes),
                "notes": item.notes,
                "settings": item.settings,
                "versions": item.versions,
            }
            for item in state.artifacts
        ],
        "failures": [
            {"stage": stage, "units": units, "reason": reason} for (stage, reason), units in state.failures.items()
        ],
        "problems": list(dict.fromkeys([*state.problems, *problems])),
        "num_masks": sum(tally.masks for tally in state.words),
        "dropped": state.dropped,
        "words_cut_off": state.words_cut_off,
        "num_labels": len(state.labels),
        "labels": [dataclasses.asdict(tally) for tally in state.labels[:MAX_TALLIES]],
        "num_words": len(state.words),
        "words": [dataclasses.asdict(tally) for tally in state.words[:MAX_TALLIES]],
        "shards": dataclasses.asdict(state.shards) if state.shards else None,
        "training": [_curve(item) for item in state.training],
        "evaluations": [
            {
                "name": item.name,
                "warnings": item.warnings,
                "seconds": item.seconds,
                "scores": [
                    {"of": score.of, "evaluator": score.evaluator, "main": score.main, "values": score.values}
                    for score in item.scores
                ],
            }
            for item in state.evaluations
        ],
    }


def _curve(training: Training) -> dict[str, Any]:
    """A loss curve of at most ``CURVE_POINTS`` points, each the mean of consecutive records."""
    points = np.array(training.curve, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    parts = np.array_split(points, min(CURVE_POINTS, len(points))) if len(points) else []
    return {
        "name": training.name,
        "done": training.done,
        "last": training.last,
        "curve": [[float(f"{value:.5g}") for value in part.mean(axis=0)] for part in parts],
    }
