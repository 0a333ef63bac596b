"""A compact index of a tar's members, since those of millions of samples stay in memory while they are read."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Indexing", "Member", "TarIndex"]


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The samples of a tar in order: of each its key, and where its members lie, by their names in their order.

    Of a sample there is no object until it is asked for, only numbers in arrays that all samples share. So it takes
    little, and a forked process that reads samples copies none of it: nothing here counts references to a sample.
    """

    _keys: array[int]  # one after another, as UTF-8; no bytes, whose references are counted beside their content
    _key_starts: array[int]  # the byte at which each key begins, and at last where they end
    _names: tuple[tuple[str, ...], ...]  # what the members of a sample are called; each such list once
    _named: array[int]  # of each sample: which of these lists is its own
    _firsts: array[int]  # of each sample: the number of its first member, and at last how many there are
    _offsets: array[int]  # of each member
    _sizes: array[int]

    def __len__(self) -> int:
        return len(self._named)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Member]]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> tuple[str, dict[str, Member]]:
        row = range(len(self))[number]
        span = slice(self._firsts[row], self._firsts[row + 1])
        places = map(Member, self._offsets[span], self._sizes[span])
        return self.key(row), dict(zip(self._names[self._named[row]], places, strict=True))

    def find(self, key: str) -> dict[str, Member] | None:
        """Where the members of a sample lie, by its key; None: there is none of it. Quick where keys are in order."""
        number = bisect_left(range(len(self)), key, key=self.key)
        if number == len(self) or self.key(number) != key:  # not there, or in a tar of another order
            number = next((number for number in range(len(self)) if self.key(number) == key), -1)
        return self[number][1] if number >= 0 else None

    def key(self, number: int) -> str:
        """The key of a sample.

        Raises:
            IndexError: there is no such sample. A number below 0 counts from the end, as in a list.
        """
        row = range(len(self))[number]
        return self._keys[self._key_starts[row] : self._key_starts[row + 1]].tobytes().decode()


class Indexing:
    """An index in the making: it is given one sample after another, in the order of the tar."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}  # in order
        self._names: dict[tuple[str, ...], int] = {}
        self._named, self._firsts = array("Q"), array("Q")
        self._offsets, self._sizes = array("Q"), array("Q")

    def add(self, key: str, members: Mapping[str, Member]) -> None:
        """Add a sample.

        Raises:
            ValueError: the key was added before.
        """
        if key in self._keys:
            raise ValueError(f"the key {key!r} stands in it twice")
        self._keys[key] = None
        self._named.append(self._names.setdefault(tuple(members), len(self._names)))
        self._firsts.append(len(self._offsets))
        self._offsets.extend(member.offset for member in members.values())
        self._sizes.extend(member.size for member in members.values())

    def done(self) -> TarIndex:
        """What was given; nothing can be added."""
        self._firsts.append(len(self._offsets))
        keys, starts = bytearray(), array("Q", [0])
        for key in self._keys:
            keys += key.encode()
            starts.append(len(keys))
        return TarIndex(
            array("B", keys),
            _narrow(starts),
            tuple(self._names),
            _narrow(self._named),
            _narrow(self._firsts),
            _narrow(self._offsets),
            _narrow(self._sizes),
        )


def _narrow(numbers: array[int]) -> array[int]:
    """The same whole numbers with as few bytes each as the largest needs: 1, 2, 4 or 8."""
    most = max(numbers, default=0)
    return array(next(code for code in "BHIQ" if most < 256 ** array(code).itemsize), numbers)
