"""Learned embeddings of classes, which condition a denoiser."""

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
from synthgen.models.linear import Linear
from synthgen.untrusted import read_json

__all__ = ["ClassEmbedding"]

_MAX_LISTED = 20  # classes in an error message


class ClassEmbedding(nn.Module):
    """A learned vector for each class of the training data, and one for "no class".

    plain: a linear layer on a one-hot vector, so that "no class" is the zero vector (MaskDiT's code)
    deep:  "no class" has a vector of its own, and two layers with a SiLU between follow (UMD's code)

    The table is empty until :meth:`learn` names the classes or weights are loaded: names are stored with the weights.
    The number of a class is its index in ``names``, and that of "no class" is ``len(names)``.
    """

    def __init__(self, dim: int, *, deep: bool = False) -> None:
        super().__init__()
        self.dim, self.deep = dim, deep
        self.mix = nn.Sequential(Linear(dim, 2 * dim), nn.SiLU(), Linear(2 * dim, dim)) if deep else nn.Identity()
        self.mix.apply(initialize)
        self._take(())

    def learn(self, names: Iterable[str]) -> None:
        """Make a new table for the distinct ``names``, sorted: decimal names first, by value.

        Raises:
            ConfigError: a name is not valid text and could not be stored.
        """
        numbers, words = set[str](), set[str]()
        for name in names:
            (numbers if name.isdecimal() else words).add(name)
        for name in words:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"the class name {name!r} is not valid Unicode; rename its folder") from None
        self._take((*sorted(numbers, key=lambda name: (len(name), name)), *sorted(words)))

    def _take(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        self.table = nn.Embedding(len(self.names) + self.deep, self.dim)
        if not self.deep and self.names:
            nn.init.xavier_uniform_(self.table.weight)

    def forward(self, numbers: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The vectors of these class numbers."""
        table = self.table.weight if self.deep else F.pad(self.table.weight, (0, 0, 0, 1))
        vectors: Tensor = self.mix(F.embedding(numbers, table))
        return vectors

    def numbers(self, labels: Sequence[str | int | None]) -> Int[Tensor, " b"]:
        """The numbers of classes given by name or number; None is "no class".

        Where all names are decimal (a dataset without class names), 7 is the class named "7".

        Raises:
            UnknownName: no class has this name; the error lists the nearest.
            ConfigError: no class has this number.
        """
        return torch.tensor(
            [self._number(label) for label in labels], dtype=torch.long, device=self.table.weight.device
        )

    def none(self, count: int) -> Int[Tensor, " b"]:
        """The number of "no class", ``count`` times."""
        return torch.full((count,), len(self.names), device=self.table.weight.device)

    def _number(self, label: str | int | None) -> int:
        if label is None:
            return len(self.names)
        if isinstance(label, int) and not all(name.isdecimal() for name in self.names):
            if 0 <= label < len(self.names):
                return label
            raise ConfigError(f"there is no class {label}; the {len(self.names)} classes are counted from 0")
        number = self._numbers.get(str(label))
        if number is not None:
            return number
        if len(self.names) <= _MAX_LISTED:
            raise UnknownName.among("class", str(label), self.names)
        near = difflib.get_close_matches(str(label), self.names, n=_MAX_LISTED // 4, cutoff=0.0)
        raise UnknownName(f"unknown class {label!r}; of {len(self.names)} classes the nearest are: {', '.join(near)}")

    def get_extra_state(self) -> Tensor:
        """The names as bytes of JSON, because checkpoints hold tensors."""
        return torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take the names; makes a table for them if there is none yet.

        Raises:
            ValueError: the state is not a list of names, or the names differ from those of the data.
        """
        data = state.cpu().numpy().tobytes()
        names = read_json(data, most=len(data))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes are not a list of names")
        if not self.names:
            self._take(tuple(names))
        elif tuple(names) != self.names:  # a new table would leave the optimizer with the old one
            raise ValueError("its classes are not those of the data")
