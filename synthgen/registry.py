"""Find parts by name: each folder is a registry, and a part's name is its file's name.

Other packages add parts with entry points, in the group named after the folder's package: ``synthgen.refiners``.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from synthgen.config import Choice, build, check
from synthgen.errors import ConfigError, MissingDependency, UnknownName, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """All parts of one kind: the modules of ``package``, each with one name in ``__all__``, and entry points.

    ``Registry("synthgen.refiners").build(Choice("threshold"))`` imports only that module.
    """

    package: str
    setting: str = ""  # the setting that names a part of this kind, such as "masks.refine"

    @property
    def kind(self) -> str:
        """The singular name of a part: "refiner" for ``synthgen.refiners``."""
        return self.package.rpartition(".")[2].removesuffix("s")

    def names(self) -> list[str]:
        """The names of all parts, sorted; imports none of them."""
        return sorted(self._modules() | set(entry_points(group=self.package).names))

    def load(self, name: str) -> type[T]:
        """The class of one part.

        Raises:
            UnknownName: there is no such part.
            MissingDependency: its module needs a library that is not installed.
            ConfigError: several packages provide a part of this name, or its entry point does not resolve, or it
                imports a module that its own package lacks.
        """
        own, others = name in self._modules(), [*entry_points(group=self.package, name=name)]
        packages = ["synthgen"] * own + [point.dist.name if point.dist else point.value for point in others]
        if not packages:
            raise UnknownName.among(self.kind, name, self.names())
        if len(packages) > 1:
            raise ConfigError(
                f"the {self.kind} {name!r} is in several packages ({', '.join(packages)}); keep one of them"
            )
        part: type[T]
        try:
            if others:
                part = others[0].load()
            else:
                module = importlib.import_module(f"{self.package}.{name}")
                (public,) = module.__all__
                part = getattr(module, public)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if own and library == "synthgen":
                raise
            if others and (library in ("", others[0].module.partition(".")[0]) or importlib.util.find_spec(library)):
                raise self._not_loaded(name, packages[0], error) from None  # a module missing in its package
            how = f"it with: pip install {library}" if own else "the package that provides it"
            raise MissingDependency(f"the {self.kind} {name!r} needs the library {library!r}; install {how}") from None
        except (ImportError, AttributeError) as error:
            if own:
                raise
            raise self._not_loaded(name, packages[0], error) from None
        return part

    def _not_loaded(self, name: str, package: str, error: Exception) -> ConfigError:
        return ConfigError(f"the {self.kind} {name!r} of {package} does not load: {one_line(error)}")

    def _modules(self) -> set[str]:
        """The names of the parts in the package's own folder."""
        paths = importlib.import_module(self.package).__path__
        return {module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_")}

    def complete(self, choice: Choice | str, *given: str) -> Choice:
        """``choice`` with defaults for all options it does not set; builds nothing, and ``given`` are not options.

        Raises:
            UnknownName, ConfigError, MissingDependency: as for :meth:`build`.
        """
        choice = Choice.of(choice)
        part, context = self.load(choice.name), self._context(choice.name)
        return Choice(choice.name, check(part, choice.options, given=frozenset(given), **context))

    def build(self, choice: Choice | str, **given: Any) -> T:
        """Build the part that ``choice`` names, with its options checked against its signature.

        Raises:
            ConfigError: an option is unknown, missing or of the wrong type.
        """
        choice = Choice.of(choice)
        return build(self.load(choice.name), choice.options, **self._context(choice.name), **given)

    def _context(self, name: str) -> dict[str, str]:
        """For errors: how to name a part, and where its options are listed."""
        return {"where": f"{self.kind} {name}", "listed": f"{self.setting}={name}" if self.setting else ""}
