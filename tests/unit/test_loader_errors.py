"""A loader process passes on errors unchanged."""

from __future__ import annotations

import pytest
from torch.utils.data import Dataset, default_collate

from synthgen.errors import CorruptFile
from synthgen.loader import Reader
from synthgen.stages._loader_errors import translate_loader_errors

MESSAGE = "sample 3 of here.tar: a wrong byte; delete it"


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise CorruptFile(MESSAGE)
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_loader_process_is_raised_unchanged(num_workers: int) -> None:
    rows = iter(Reader(Broken(), default_collate, num_workers=num_workers))
    assert [int(next(rows)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorruptFile) as caught, translate_loader_errors():
        next(rows)
    assert str(caught.value) == MESSAGE
