"""The records that flow between stages. Plain values: no torch, no files."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float16, Float32, UInt8

#: Self-attention is kept between a cell and these neighbours (row step, column step), in cells of the maps' grid:
#: half of the 8-neighbourhood at distances 1, 2 and 4. The other half is the same edges in the other direction.
AFFINITY_OFFSETS: tuple[tuple[int, int], ...] = tuple(
    (step * row, step * column) for step in (1, 2, 4) for row, column in ((0, 1), (1, 0), (1, 1), (1, -1))
)

#: The warning of a sample that the model's own safety checker flagged.
SAFETY_WARNING = "the safety checker objects to this image"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the text encoder reads it, without brackets, and the words whose masks are wanted."""

    text: str
    words: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()  # of each word: text[start:stop] is the word
    label: str | None = None  # class name, if the prompt has one


@dataclass(frozen=True, slots=True)
class Request:
    """One image to generate, or an existing one to attend to."""

    key: str  # ten digits: unit and row, see ``sample_key``
    prompt: Prompt
    seed: int  # from the run's seed and the key, nothing else
    source: str = ""  # the original name of an existing image; empty: the image is generated


@dataclass(frozen=True, slots=True)
class Maps:
    """Attention recorded while an image was generated, or while ``attend`` ran the model on an existing one."""

    words: tuple[str, ...]
    weights: Float16[np.ndarray, "words h w"]  # mean cross-attention probability in [0, 1], on the latent grid
    affinity: Float16[np.ndarray, "edges h w"]  # mean self-attention along AFFINITY_OFFSETS, both ways averaged,
    # in multiples of uniform attention (1 = 1 / (h w)); 0 where an edge leaves the grid


@dataclass(frozen=True, slots=True)
class Generation:
    """An image with its request and its recorded attention."""

    request: Request
    image: UInt8[np.ndarray, "H W 3"]
    maps: Maps
    warnings: tuple[str, ...] = ()  # what a user should know about a sample that is still usable
    failed: str = ""  # why there is no usable image; empty: there is one
    words_cut_off: tuple[str, ...] = ()  # marked words that no text encoder reads: the prompt is too long


@dataclass(frozen=True, slots=True)
class WordMasks:
    """One mask per word. A pixel belongs to at most one word."""

    words: tuple[str, ...]
    values: Bool[np.ndarray, "words H W"]
    scores: Float32[np.ndarray, " words"]  # mean attention inside minus outside, each map scaled to [0, 1]
    dropped: tuple[str, ...] = ()  # for each word "" or the reason why its mask is empty, "kind: detail"
    # Quality of each mask, see mask_quality: in [0, 1], 0 for an empty mask, None where it was not measured.
    confidence: Float32[np.ndarray, " words"] | None = None  # expected IoU with the object
    sharpness: Float32[np.ndarray, " words"] | None = None  # image gradient along the outline relative to elsewhere
    disagreement: Float32[np.ndarray, " words"] | None = None  # 1 - IoU with the mask of ``threshold``


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one unit."""

    unit: int
    count: int = 0  # samples written
    error: str = ""  # empty: the unit is done
    trace: str = ""  # traceback of an unexpected error
    device_suspect: bool = False  # whether the only device that tried the unit may be the cause
    damaged: str = ""  # the file of an earlier stage whose checksum is wrong, if that is the error
    notes: dict[str, int] = field(default_factory=dict)  # counts by remark, such as {"dropped": 3}


def sample_key(unit: int, row: int) -> str:
    """The ten-digit key of a sample: six digits for its unit, four for its row in the unit."""
    if not (0 <= unit < 10**6 and 0 <= row < 10**4):
        raise ValueError(f"unit {unit} or row {row} does not fit a key of six and four digits")
    return f"{unit:06d}{row:04d}"
