"""What a network is told of an image's class."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.errors import ConfigError, UnknownName
from synthgen.models.layers import initialize
from synthgen.untrusted import read_json

__all__ = ["ClassEmbedding"]

_LISTED = 20  # an error names so many classes at most


class ClassEmbedding(nn.Module):
    """A learned vector for each class of the training data, and what stands for no class.

    plain: a linear layer on a one-hot vector, so that no class is 0 (MaskDiT's code)
    deep:  no class has a vector of its own, and two layers with a SiLU between follow (UMD's code)

    There are no classes until :meth:`learn` names them, or weights are loaded: their names travel with the weights. The
    number of a class is its place among ``names``, and that of no class the one behind the last.
    """

    def __init__(self, dim: int, *, deep: bool = False) -> None:
        super().__init__()
        self.dim, self.deep = dim, deep
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)) if deep else nn.Identity()
        self.mix.apply(initialize)
        self._take(())

    def learn(self, names: Iterable[str]) -> None:
        """Make fresh vectors for classes of these ``names``, each counted once; numbers come first, by value.

        Raises:
            ConfigError: a name is no text, and so could not be kept.
        """
        numbers, words = set[str](), set[str]()
        for name in names:
            (numbers if name.isdecimal() else words).add(name)
        for name in words:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"the class {name!r} has a name that is no text; rename its folder") from None
        self._take((*sorted(numbers, key=lambda name: (len(name), name)), *sorted(words)))

    def _take(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._places = {name: place for place, name in enumerate(names)}
        self.table = nn.Embedding(len(self.names) + self.deep, self.dim)
        if not self.deep and self.names:
            nn.init.xavier_uniform_(self.table.weight)

    def forward(self, numbers: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The vectors of classes."""
        table = self.table.weight if self.deep else F.pad(self.table.weight, (0, 0, 0, 1))
        vectors: Tensor = self.mix(F.embedding(numbers, table))
        return vectors

    def numbers(self, labels: Sequence[str | int | None]) -> Int[Tensor, " b"]:
        """The numbers of classes that are said by name or number; None is no class.

        Where all names are numbers themselves (a dataset without names), 7 is the class of that name.

        Raises:
            UnknownName, ConfigError: there is no such class; names the nearest.
        """
        return torch.tensor(
            [self._number(label) for label in labels], dtype=torch.long, device=self.table.weight.device
        )

    def none(self, count: int) -> Int[Tensor, " b"]:
        """The number of no class, so many times."""
        return torch.full((count,), len(self.names), device=self.table.weight.device)

    def _number(self, label: str | int | None) -> int:
        if label is None:
            return len(self.names)
        if isinstance(label, int) and not all(name.isdecimal() for name in self.names):
            if 0 <= label < len(self.names):
                return label
            raise ConfigError(f"there is no class {label}; the {len(self.names)} classes are counted from 0")
        place = self._places.get(str(label))
        if place is not None:
            return place
        if len(self.names) <= _LISTED:
            raise UnknownName.among("class", str(label), self.names)
        near = difflib.get_close_matches(str(label), self.names, n=_LISTED // 4, cutoff=0.0)
        raise UnknownName(f"unknown class {label!r}; of {len(self.names)} classes the nearest are: {', '.join(near)}")

    def get_extra_state(self) -> Tensor:
        """The names, as bytes of JSON: checkpoints hold tensors."""
        return torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take the names, and make room for as many vectors. Those of a training that goes on stay what they are.

        Raises:
            ValueError: they are no list of names, or not those of the data.
        """
        data = state.cpu().numpy().tobytes()
        names = read_json(data, most=len(data))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes are no list of names")
        if not self.names:
            self._take(tuple(names))
        elif tuple(names) != self.names:  # an optimizer may hold on to the vectors there are
            raise ValueError("its classes are not those of the data")
