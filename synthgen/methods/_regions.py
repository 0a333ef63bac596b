"""The regions under word masks, for methods that compare objects."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synthgen.loader import Batch

__all__ = ["WHOLE", "Regions", "number_of", "pool", "regions"]

WHOLE = -1  # the number of a region without a word, such as a whole image


@lru_cache(maxsize=65536)
def number_of(text: str) -> int:
    """A hash of 62 bits of a word or text, without case and surrounding space; equal on every process."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


@dataclass(frozen=True, slots=True)
class Regions:
    """Objects of each image, padded to an equal number k on every process."""

    shares: tuple[Float[Tensor, "b k n"], ...]  # of each patch under the object's mask, for each view
    present: Bool[Tensor, "b k"]
    words: Int[Tensor, "b k"]  # equal numbers for equal words; WHOLE without one


def regions(views: Sequence[Batch], patch_size: int, count: int) -> Regions:
    """The first ``count`` words of each image whose masks cover half a patch or more in every view."""
    first, device = views[0], views[0].images.device
    covered = [_covered(view.masks, patch_size) for view in views]
    named = [[number_of(word) for word in words] for words in first.words]
    width = first.masks.shape[1]
    words = torch.tensor([(row + [WHOLE] * width)[:width] for row in named], dtype=torch.long, device=device)
    present = torch.stack([view.sum(2) >= 0.5 for view in covered]).all(0)
    # present words first, then cut or pad to ``count``, so that shapes agree on all processes
    order = present.long().argsort(dim=1, descending=True, stable=True)[:, :count]
    missing = count - order.shape[1]
    present = F.pad(present.gather(1, order), (0, missing))
    words = F.pad(words.gather(1, order), (0, missing), value=WHOLE).masked_fill(~present, WHOLE)
    indices = order[:, :, None].expand(-1, -1, covered[0].shape[2])
    shares = tuple(F.pad(view.gather(1, indices), (0, 0, 0, missing)) for view in covered)
    return Regions(shares, present, words)


def _covered(masks: Bool[Tensor, "b k H W"], patch_size: int) -> Float[Tensor, "b k n"]:
    patches = F.avg_pool2d(masks.flatten(0, 1)[:, None].float(), patch_size)  # also where there are no words
    return patches.view(*masks.shape[:2], patches.shape[2] * patches.shape[3])


def pool(tokens: Float[Tensor, "b n d"], shares: Float[Tensor, "b k n"]) -> Float[Tensor, "b k d"]:
    """The mean of the patch tokens under each mask."""
    return shares @ tokens / shares.sum(2, keepdim=True).clamp(min=1e-6)
