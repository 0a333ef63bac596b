"""Finding parts: the folder is the registry, and a part's name is its file's name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from synthgen.config import Choice, build, check
from synthgen.errors import MissingDependency, UnknownName

T = TypeVar("T")


@dataclass(frozen=True)
class Family(Generic[T]):
    """All parts of one kind: the modules of ``package``, each with the one name of its ``__all__``.

    ``Family("synthgen.refiners").build(Choice("threshold"))`` imports that module alone.
    """

    package: str

    @property
    def kind(self) -> str:
        """What one part is called: "refiner" for ``synthgen.refiners``."""
        return self.package.rpartition(".")[2].removesuffix("s")

    def names(self) -> list[str]:
        """The names of all parts, sorted; imports none of them."""
        paths = importlib.import_module(self.package).__path__
        return sorted(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))

    def load(self, name: str) -> type[T]:
        """The class of one part.

        Raises:
            UnknownName: there is no such part.
            MissingDependency: its module needs a library that is not installed.
        """
        if name not in self.names():
            raise UnknownName.among(self.kind, name, self.names())
        try:
            module = importlib.import_module(f"{self.package}.{name}")
        except ModuleNotFoundError as error:
            if error.name and error.name.partition(".")[0] == "synthgen":
                raise
            raise MissingDependency(
                f"the {self.kind} {name!r} needs the library {error.name!r}; install it with: pip install {error.name}"
            ) from None
        (public,) = module.__all__
        part: type[T] = getattr(module, public)
        return part

    def complete(self, choice: Choice | str, *given: str) -> Choice:
        """``choice`` with every option it leaves open at its default; ``given`` are not options. Makes no part.

        Raises:
            UnknownName, ConfigError, MissingDependency: as for :meth:`build`.
        """
        choice = Choice.of(choice)
        where = f"{self.kind} {choice.name}"
        return Choice(choice.name, check(self.load(choice.name), choice.options, where=where, given=frozenset(given)))

    def build(self, choice: Choice | str, **given: Any) -> T:
        """Make the part that ``choice`` names, its options checked against its signature.

        Raises:
            ConfigError: an option is unknown, missing or of the wrong kind.
        """
        choice = Choice.of(choice)
        return build(self.load(choice.name), choice.options, where=f"{self.kind} {choice.name}", **given)
