"""One artifact of a run as a column: any sample's members by its key."""

from __future__ import annotations

from synthgen.errors import CorruptFile, MissingArtifact
from synthgen.run import Run
from synthgen.stores._failures import unreadable
from synthgen.stores.index import TarIndex
from synthgen.stores.open_files import OpenFiles
from synthgen.stores.tar import index_tar, read_member

__all__ = ["Column", "unit_of"]


class Column:
    """The samples of one artifact by key; headers of a unit are read when it is first asked for.

    ``verified`` has the artifact and number of units whose checksum was verified, which are not read through again;
    newly verified units are added to it.
    """

    def __init__(self, run: Run, artifact: str, verified: set[tuple[str, int]] | None = None) -> None:
        self.run, self.artifact = run, artifact
        self._verified = set() if verified is None else verified
        self._units: dict[int, TarIndex] = {}
        self._files = OpenFiles()

    def read(self, key: str, *names: str) -> dict[str, bytes]:
        """The members of a sample: all, or those of these names.

        Raises:
            MissingArtifact: there is no such sample, or its unit is gone.
            CorruptFile: a member is missing, or the unit is not as it was written.
            StorageError: the system cannot read the unit.
        """
        unit = unit_of(key)
        path = self.run.tar(self.artifact, unit)
        if unit not in self._units:
            if (self.artifact, unit) not in self._verified:
                self.run.verify(self.artifact, unit)
                self._verified.add((self.artifact, unit))
            self._units[unit] = index_tar(path)
        members = self._units[unit].find(key)
        if members is None:
            raise MissingArtifact(f"{path} has no sample {key}; {self._again()}")
        values = {}
        for name in names or members:
            if name not in members:
                raise CorruptFile(f"{path}: sample {key} has no member {name!r}; {self._again()}")
            try:
                values[name] = read_member(self._files[path], members[name])
            except OSError as error:
                raise unreadable(path, error) from None
            except ValueError as error:
                raise CorruptFile(f"{path}: sample {key}: {error}; {self._again()}") from None
        return values

    def _again(self) -> str:
        return f"delete it and run: {self.run.remedy(self.artifact)}"


def unit_of(key: str) -> int:
    """The unit that a sample of the run's own making belongs to.

    Raises:
        CorruptFile: the key is not one that a run makes.
    """
    if not (key.isascii() and key.isdecimal()):
        raise CorruptFile(
            f"{key!r} is no key of a run's sample, which has ten digits; delete its tar, and make it again"
        )
    return int(key[:6])
