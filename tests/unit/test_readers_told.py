"""What a loader process could not read is told in the words of its error."""

from __future__ import annotations

import pytest
from torch.utils.data import Dataset, default_collate

from synthgen.errors import CorruptShard
from synthgen.loader import Reader
from synthgen.stages._readers import telling_lost_readers

SAID = "sample 3 of here.tar: a wrong byte; delete it"


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise CorruptShard(SAID)
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_process_is_raised_as_it_is(num_workers: int) -> None:
    rows = iter(Reader(Broken(), default_collate, num_workers=num_workers))
    assert [int(next(rows)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorruptShard) as caught, telling_lost_readers():
        next(rows)
    assert str(caught.value) == SAID
