"""Words and texts as numbers that can be compared and sent between processes."""

from __future__ import annotations

import hashlib
from functools import lru_cache

__all__ = ["number_of"]


@lru_cache(maxsize=65536)
def number_of(name: str) -> int:
    """A number of 62 bits, the same for the same name in lower case on every process."""
    digest = hashlib.blake2b(name.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
