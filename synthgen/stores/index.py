"""A compact index of a tar, since the indexes of millions of samples are kept in memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Member", "TarIndex"]


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of a member are in its tar."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The samples of a tar in order: the key of each, and its members by name.

    All samples share a few arrays of numbers; the objects of a sample are made when it is requested. So an index takes
    little memory, and forked processes share it: reading a sample changes no reference count in these arrays.
    """

    _keys: array[int]  # UTF-8, one after another; not bytes, whose reference count lies beside the content
    _key_starts: array[int]  # where each key begins, and where the last one ends
    _layouts: tuple[tuple[str, ...], ...]  # the different lists of member names
    _layout: array[int]  # the number of each sample's layout
    _first: array[int]  # the number of each sample's first member, and the number of members
    _offsets: array[int]  # of each member
    _sizes: array[int]

    @classmethod
    def build(cls, samples: Iterable[tuple[str, Mapping[str, Member]]]) -> TarIndex:
        """Index samples in the order of the tar.

        Raises:
            ValueError: a key occurs twice.
        """
        keys: dict[str, None] = {}
        layouts: dict[tuple[str, ...], int] = {}
        layout, first, offsets, sizes = (array("Q") for _ in range(4))
        last = ""
        for key, members in samples:
            if key in keys:
                raise ValueError(f"the key {key!r} occurs twice, the second time after {last!r}")
            keys[key] = None
            layout.append(layouts.setdefault(tuple(members), len(layouts)))
            first.append(len(offsets))
            offsets.extend(member.offset for member in members.values())
            sizes.extend(member.size for member in members.values())
            last = key
        first.append(len(offsets))
        text, starts = bytearray(), array("Q", [0])
        for key in keys:
            text += key.encode()
            starts.append(len(text))
        numbers = (_narrow(values) for values in (layout, first, offsets, sizes))
        return cls(array("B", text), _narrow(starts), tuple(layouts), *numbers)

    def __len__(self) -> int:
        return len(self._layout)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Member]]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> tuple[str, dict[str, Member]]:
        row = range(len(self))[number]
        span = slice(self._first[row], self._first[row + 1])
        members = map(Member, self._offsets[span], self._sizes[span])
        return self.key(row), dict(zip(self._layouts[self._layout[row]], members, strict=True))

    def key(self, number: int) -> str:
        """The key of a sample.

        Raises:
            IndexError: there is no such sample. A number below 0 counts from the end, as in a list.
        """
        row = range(len(self))[number]
        return self._keys[self._key_starts[row] : self._key_starts[row + 1]].tobytes().decode()

    def find(self, key: str) -> dict[str, Member] | None:
        """The members of a sample by its key, or None if there is no such sample; fast if the keys are sorted."""
        number = bisect_left(range(len(self)), key, key=self.key)
        if number == len(self) or self.key(number) != key:  # missing, or the keys are not sorted
            number = next((number for number in range(len(self)) if self.key(number) == key), -1)
        return self[number][1] if number >= 0 else None


def _narrow(numbers: array[int]) -> array[int]:
    """The same whole numbers in 1, 2, 4 or 8 bytes each, as the largest requires."""
    largest = max(numbers, default=0)
    return array(next(code for code in "BHIQ" if largest < 256 ** array(code).itemsize), numbers)
