"""Initialise a method with the weights of an earlier training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from synthgen.errors import ConfigError
from synthgen.methods import Method

__all__ = ["LoadedWeights", "load_weights"]

_STATE = "_extra_state"  # extra state of a module that is not a weight, such as class names


@dataclass(frozen=True)
class LoadedWeights:
    """How the tensors of a method were initialised, and which tensors of the earlier training were not used."""

    taken: int  # tensors loaded from the earlier training
    copied: int  # tensors of averages and teachers that it lacks, copied from the tensors that they follow
    anew: int  # tensors with their default initialisation
    new_parts: tuple[str, ...]  # the parts of those tensors
    left_parts: tuple[str, ...]  # parts of the earlier training that the method lacks

    def __str__(self) -> str:
        copied = f", {self.copied} copied from those that they follow" if self.copied else ""
        new = f", {self.anew} initialised" + (f" ({', '.join(self.new_parts)})" if self.new_parts else "")
        left = f"; not used: {', '.join(self.left_parts)}" if self.left_parts else ""
        return f"{self.taken} tensors loaded{copied}{new}{left}"


def load_weights(method: Method, tensors: Mapping[str, Tensor]) -> LoadedWeights:
    """Load ``tensors`` of an earlier training, by name, into ``method``.

    Each part (decoder, classes, ...) is loaded, initialised or left out as a whole; the encoder is always loaded.

    Raises:
        ConfigError: a tensor has another shape, a part matches only partly, or classes have other names.
    """
    own, copies = method.state_dict(), method.copies
    both = [name for name in own if name in tensors]
    new, left = [name for name in own if name not in tensors], [name for name in tensors if name not in own]
    for name in both:
        if name.endswith(_STATE) and not _same(own[name], tensors[name]):
            raise ConfigError(
                f"its {_part(name, copies)} have other names than those of the data; train on data with the same "
                "classes, or without class_labels"
            )
    for name in both:
        if own[name].shape != tensors[name].shape:
            raise ConfigError(
                f"its {name} has the shape {tuple(tensors[name].shape)}, and that of this training "
                f"{tuple(own[name].shape)}; give the options that it was trained with"
            )
    taken = _parts(both, copies)
    for name in (*new, *left):
        part = _part(name, copies)
        if part in taken or part == "encoder":
            lacks = "lacks" if name in own else "also has"
            raise ConfigError(
                f"its {part} fits only in part: it {lacks} {name}; give the options that it was trained with"
            )
    state: dict[str, Tensor] = {**own, **{name: tensors[name] for name in both}}
    copied = {name: source for name in new if (source := _followed(name, copies)) in state}
    state |= {name: state[source].clone() for name, source in copied.items()}
    method.load_state_dict(state)
    fresh = [name for name in new if name not in copied]
    return LoadedWeights(
        len(both), len(copied), len(fresh), tuple(sorted(_parts(fresh, copies))), tuple(sorted(_parts(left, copies)))
    )


def _followed(name: str, copies: Mapping[str, str]) -> str:
    """The name of the tensor that a tensor of an average or teacher follows; empty for other tensors."""
    return next((fast + name.removeprefix(slow) for slow, fast in copies.items() if name.startswith(slow)), "")


def _part(name: str, copies: Mapping[str, str]) -> str:
    """The part of a method that a tensor belongs to; a part of an average is separate from the part it follows."""
    inside = next((slow for slow, fast in copies.items() if not fast and name.startswith(slow)), "")
    return inside + name.removeprefix(inside).partition(".")[0]


def _parts(names: Iterable[str], copies: Mapping[str, str]) -> set[str]:
    return {_part(name, copies) for name in names}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
