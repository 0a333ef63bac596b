"""A run directory: its artifacts, their done marks and their fingerprints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthgen.entries import (
    FAILED,
    SETTINGS,
    as_yaml,
    describe_changes,
    digest,
    made_in,
    read_entry,
    validate_entry,
    versions,
)
from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact, StorageError
from synthgen.records import Report
from synthgen.redact import redact
from synthgen.stores import listing, parse_location, read_many
from synthgen.stores.checksum import verify_sha256
from synthgen.stores.tar import create_bytes, index_tar, read_tar, write_bytes, write_json
from synthgen.units import UnitWriter, checked_mark
from synthgen.untrusted import MAX_JSON, read_file, read_json

if TYPE_CHECKING:
    from synthgen.stages import Stage

__all__ = ["Run", "digest", "versions"]

_MADE_BY = {"images": "generate", "maps": "generate", "masks": "masks", "shards": "shards", "pretrain": "pretrain"}


@dataclass(frozen=True)
class Run:
    """A folder, here or in a store (``s3://bucket/run``), in which stages find and leave what they make.

    ``<artifact>/000012.tar`` holds a unit. The ``000012.json`` beside it comes last and is its done mark: count,
    sha256, seconds and fingerprint. ``000012.failed.json`` says why a unit failed, and ``settings.yaml`` what all of
    them are made with: whoever writes it first decides, and other settings are refused. There is no other bookkeeping,
    and nothing is locked, so any number of workers and people may work on one run.
    """

    path: Path  # as ``parse_location`` gives it
    seed: int = 0
    claimed: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)  # see ``claim``

    @classmethod
    def create(cls, path: str | Path, *, seed: int | None = None) -> Run:
        """Open the run at ``path``; make it where it is not there yet (with seed 0 unless one is given).

        Raises:
            StaleArtifact: the run is there and has another seed.
        """
        run = cls(parse_location(path), seed or 0)
        file = run.path / "run.yaml"
        if not _exists(file) and create_bytes(file, as_yaml({"seed": run.seed})):
            return run
        before = cls.open(path)
        if seed is None or seed == before.seed:
            return before
        if not before.manifest()["artifacts"]:  # nothing has been made with the old one
            write_bytes(file, as_yaml({"seed": seed}))
            begun = list(before.manifest()["artifacts"].values())
            if not begun:
                return run
            write_bytes(file, as_yaml({"seed": begun[0].get("seed", before.seed)}))  # by another command, just now
        raise StaleArtifact(f"{path} was made with seed {before.seed}, not {seed}; choose another --run folder")

    @classmethod
    @contextmanager
    def create_or_roll_back(cls, path: str | Path, *, seed: int | None = None) -> Iterator[Run]:
        """:meth:`create`, taken back if the block fails and nothing came into a run that was not there before."""
        folder = parse_location(path)
        there = _exists(folder)
        run = cls.create(path, seed=seed)
        try:
            yield run
        except BaseException:
            with suppress(OSError):  # somebody else has just begun in it, or taken it back
                if not there and [entry.name for entry in folder.iterdir()] == ["run.yaml"]:
                    (folder / "run.yaml").unlink()
                    folder.rmdir()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run that exists.

        Raises:
            MissingArtifact: there is no run at ``path``.
            ConfigError: its ``run.yaml`` cannot be read.
        """
        path = parse_location(path)
        if not cls(path).is_there:
            raise MissingArtifact(
                f"there is no run at {path}; make one with: "
                f"synthgen generate --prompts FILE --run {shlex.quote(str(path))}"
            )
        return cls(path, cls(path)._run_yaml()["seed"])

    @property
    def is_there(self) -> bool:
        """Whether it has been begun."""
        return _exists(self.path / "run.yaml")

    # -- settings and fingerprint of each artifact

    def manifest(self) -> dict[str, Any]:
        """The run's seed, and for each of its ``artifacts`` what :meth:`artifact` says, in the order of the stages."""
        run = self._run_yaml()
        artifacts = dict(run["artifacts"])
        for path in (*self.path.glob(f"*/{SETTINGS}"), *self.path.glob(f"*/*/{SETTINGS}")):
            if (entry := read_entry(path, "fingerprint", str)) is not None:
                artifacts[path.parent.relative_to(self.path).as_posix()] = entry
        for name, entry in artifacts.items():
            validate_entry(entry, self.folder(str(name)) / SETTINGS)
        places = {name: place for place, name in enumerate(_MADE_BY)}
        names = sorted(artifacts, key=lambda name: (places.get(name.partition("/")[0], len(places)), name))
        return run | {"artifacts": {name: artifacts[name] for name in names}}

    def _run_yaml(self) -> dict[str, Any]:
        value = read_entry(self.path / "run.yaml", "seed", int)
        if value is None:
            raise ConfigError(f"{self.path}/run.yaml is gone; restore it or start a new run")
        if not isinstance(value.setdefault("artifacts", {}), dict):  # older runs note all artifacts here
            raise ConfigError(f"{self.path}/run.yaml is no run's: its artifacts are no mapping; start a new run")
        return value

    def find_artifact(self, name: str) -> dict[str, Any] | None:
        """What an artifact is made with, as :meth:`artifact` tells it, or None where no stage has begun with it."""
        path = self.folder(name) / SETTINGS
        entry = read_entry(path, "fingerprint", str) or self._run_yaml()["artifacts"].get(name)
        return None if entry is None else validate_entry(entry, path)

    def artifact(self, name: str) -> dict[str, Any]:
        """What an artifact is made with: stage, settings, inputs, fingerprint, versions.

        Raises:
            MissingArtifact: it has not been made; names the stage to run first.
        """
        entry = self.claimed[name] if name in self.claimed else self.find_artifact(name)
        if entry is None:
            raise self.missing_artifact(name)
        return entry

    def missing_artifact(self, name: str) -> MissingArtifact:
        """The error that an artifact has not been made, with the stage to run first."""
        stage = _MADE_BY.get(name.partition("/")[0], name)
        given = "--prompts FILE " if stage == "generate" else ""
        first = f"synthgen {stage} {given}--run {shlex.quote(str(self.path))}"
        return MissingArtifact(f"{self.path} has no {name} yet; first run: {first}")

    def remedy(self, name: str) -> str:
        """The command that makes what an artifact lacks, with the settings that it was begun with."""
        stage, _, label = name.partition("/")
        entry = self.claimed.get(name) or self.find_artifact(name)
        stage = str(entry["stage"]) if entry else _MADE_BY.get(stage, stage)
        label = f"--label {shlex.quote(label)} " if label else ""
        return f"synthgen {stage} {label}--run {shlex.quote(str(self.path))}"

    def check(self, stage: Stage) -> dict[str, Any]:
        """See that the inputs of ``stage`` are there and that what it made before had these settings.

        Returns:
            What should be noted of its artifacts (see :meth:`record_settings`). Nothing is written.

        Raises:
            MissingArtifact: an input is missing; names the stage to run first.
            StaleArtifact: its folder was made with other settings or from other inputs; names them.
        """
        settings = stage.fingerprinted()
        inputs = {name: self.artifact(name)["fingerprint"] for name in stage.reads}
        inputs |= {redact(name): value for name, value in stage.inputs(self).items()}
        fingerprint = digest({"stage": stage.name, "seed": self.seed, "settings": settings, "inputs": inputs})
        for name in stage.artifacts():
            before = self.find_artifact(name)
            if before is not None and before["fingerprint"] != fingerprint and not self._is_free(name):
                self._refuse(name, before, stage, inputs)
        entry = {"stage": stage.name, "seed": self.seed, "settings": stage.recorded_settings(self), "inputs": inputs}
        return entry | {"fingerprint": fingerprint}

    @contextmanager
    def claim(self, stage: Stage) -> Iterator[Run]:
        """Note what ``stage`` works with (see :meth:`record_settings`), and yield the run as it is to be worked on.

        That run holds on to what was noted, whatever others do to the folders meanwhile. What was noted of folders that
        nothing came into is taken back when the block fails, so that a mistake may be mended with other settings; where
        units failed it stays beside their notes, for :mod:`synthgen.status`, until other settings take its place.

        Raises:
            MissingArtifact, StaleArtifact: see :meth:`check`.
        """
        noted = self.record_settings(stage)
        try:
            if Run.open(self.path).seed != self.seed:
                raise StaleArtifact(f"another command has just given {self.path} another seed; run this one again")
            claimed = {name: self.artifact(name) for name in (*stage.reads, *stage.artifacts())}
            yield replace(self, claimed=claimed)
            for name in stage.artifacts():
                if self.find_artifact(name) is None:  # the same command elsewhere failed early and took them back
                    create_bytes(self.folder(name) / SETTINGS, as_yaml(claimed[name]))
        except BaseException:
            for name in noted:
                if not self.is_nonempty(name) and not self._failure_notes(name):
                    (self.folder(name) / SETTINGS).unlink(missing_ok=True)
                    with suppress(OSError):  # the half written file of somebody else is in it
                        self.folder(name).rmdir()
            raise

    def record_settings(self, stage: Stage) -> list[str]:
        """Put settings, inputs and versions of ``stage`` into the folders of its artifacts, after :meth:`check`.

        Returns:
            The artifacts that had none of these. Of several commands that begin at once the first decides.

        Raises:
            MissingArtifact, StaleArtifact: see :meth:`check`.
        """
        entry = self.check(stage)
        new = []
        for name in stage.artifacts():
            kept = self.find_artifact(name)
            if kept is not None and all(kept.get(key) == entry[key] for key in ("fingerprint", "settings")):
                continue
            path, data = self.folder(name) / SETTINGS, as_yaml(entry | {"versions": versions()})
            while not (created := create_bytes(path, data)):
                self.check(stage)  # another command may have been first
                if path.is_file():  # otherwise it has just taken its settings back
                    write_bytes(path, data)
                    break
            other = not created and kept is not None and kept["fingerprint"] != entry["fingerprint"]
            if other:  # all that these made were failures
                for failure in self._failure_notes(name):
                    failure.unlink(missing_ok=True)
            if created or other:
                new.append(name)
        return new

    def is_nonempty(self, name: str) -> bool:
        """Whether anything was made of an artifact, or is being made: its settings, logs and failures are nothing."""
        return any(True for _ in made_in(self.folder(name)))

    def _is_free(self, name: str) -> bool:
        """Whether other settings may take the place of those in a folder: nothing is there, or all of it failed."""
        begun = (self.folder(name) / SETTINGS).is_file()  # maybe by a command that is just about to make something
        return not self.is_nonempty(name) and (not begun or bool(self._failure_notes(name)))

    def _failure_notes(self, name: str) -> list[Path]:
        return sorted(self.folder(name).glob(f"*{FAILED}"))

    def _refuse(self, name: str, before: dict[str, Any], stage: Stage, inputs: dict[str, str]) -> None:
        counted = {item.name for item in fields(stage) if not item.metadata.get("unhashed")}
        old = {key: value for key, value in before["settings"].items() if key in counted}
        told = describe_changes({**before, "settings": old}, {"settings": stage.fingerprinted(), "inputs": inputs})
        folder = self.path / name
        elsewhere = "another --label" if name.startswith("pretrain/") else "another --run folder"
        raise StaleArtifact(
            f"{folder} was made differently: {told}choose {elsewhere}, or delete {folder} to make it anew"
        )

    # -- units

    def folder(self, artifact: str) -> Path:
        """Where an artifact lies."""
        return self.path / artifact

    def tar(self, artifact: str, unit: int) -> Path:
        """Where a unit of an artifact lies."""
        return self.path / artifact / f"{unit:06d}.tar"

    def mark(self, artifact: str, unit: int) -> dict[str, Any] | None:
        """The done mark of a unit, or None where it is not done."""
        try:
            return checked_mark(read_json(read_file(self.tar(artifact, unit).with_suffix(".json"), MAX_JSON)))
        except (FileNotFoundError, ValueError):
            return None

    def has_unit(self, artifact: str, unit: int, fingerprint: str) -> bool:
        """Whether a unit is there, whole, and made with the settings of ``fingerprint``."""
        mark = self.mark(artifact, unit)
        if mark is None or mark["fingerprint"] != fingerprint:
            return False
        try:
            return self.tar(artifact, unit).stat().st_size == int(mark["bytes"])
        except (FileNotFoundError, NotADirectoryError):
            return False

    def iter_marks(self, artifact: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The done marks of all units whose tars are there and as long as their marks say, one after another.

        They are read together, but all of a large run would take much memory.
        """
        folder = self.folder(artifact)
        sizes = listing(folder)
        names = sorted(name for name in sizes if name.endswith(".json") and name[:-5].isdecimal())
        for name, data in read_many(folder, names, MAX_JSON):
            try:
                mark = checked_mark(read_json(data))
            except ValueError:
                continue
            if sizes.get(f"{name[:-5]}.tar") == mark["bytes"]:
                yield int(name[:-5]), mark

    def made(self, artifact: str, fingerprint: str) -> set[int]:
        """The units that :meth:`has` would say are there, looked for together."""
        return {unit for unit, mark in self.iter_marks(artifact) if mark["fingerprint"] == fingerprint}

    def units(self, artifact: str) -> list[int]:
        """The numbers of the units of an artifact that are done, in order.

        Raises:
            MissingArtifact: there are none; names the stage to run first.
        """
        self.artifact(artifact)
        marks = self.folder(artifact).glob("[0-9]*.json")
        found = sorted(int(path.stem) for path in marks if path.stem.isdigit())
        if not found:
            raise MissingArtifact(f"{self.path} has no finished {artifact} yet; run: {self.remedy(artifact)}")
        return found

    def write(self, artifact: str, unit: int) -> UnitWriter:
        """A context in which samples are added to a unit; the unit is there when the context ends well."""
        return UnitWriter(self, artifact, unit)

    def read(self, artifact: str, unit: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a unit in order: key, and each member's bytes.

        Raises:
            MissingArtifact, CorruptFile: the unit is not there, or not as it was written.
        """
        self.verify(artifact, unit)
        return read_tar(self.tar(artifact, unit))

    def verify(self, artifact: str, unit: int) -> None:
        """See that a unit has the sha256 that its done mark tells. One that is cut off says more when it is read.

        Raises:
            MissingArtifact: it is not there.
            CorruptFile: it has another.
        """
        mark, path = self.mark(artifact, unit), self.tar(artifact, unit)
        if mark is not None and self.has_unit(artifact, unit, mark["fingerprint"]):
            verify_sha256(path, mark["sha256"], self.remedy(artifact))
        elif not path.is_file():
            raise MissingArtifact(f"there is no file {path}; run: {self.remedy(artifact)}")

    def keys(self, artifact: str, unit: int) -> list[str]:
        """The keys of a unit in order."""
        return [key for key, _ in index_tar(self.tar(artifact, unit))]

    def fail(self, stage: Stage, report: Report) -> None:
        """Note why a unit failed, beside where its tar would be; a later success takes the note away."""
        for name in stage.artifacts():
            path = self.tar(name, report.unit).with_suffix(FAILED)
            write_json(path, {"unit": report.unit, "error": redact(report.error), "trace": redact(report.trace)})

    def forgive(self, stage: Stage, unit: int) -> None:
        """Take away the note of a failure: the unit is done."""
        for name in stage.artifacts():
            self.tar(name, unit).with_suffix(FAILED).unlink(missing_ok=True)

    def failures(self, artifact: str) -> dict[int, str]:
        """The units of an artifact that failed when they were last tried, each with its reason.

        A worker that is killed between the done mark of a unit and the end of its note leaves the note: it counts no
        more.
        """
        found, entry = {}, self.find_artifact(artifact)
        for path in self._failure_notes(artifact):
            unit = path.name.partition(".")[0]
            if not (unit.isascii() and unit.isdecimal()):  # not one of ours
                continue
            if entry is not None and self.has_unit(artifact, int(unit), entry["fingerprint"]):
                continue
            try:
                found[int(unit)] = str(read_json(read_file(path, MAX_JSON))["error"])
            except (OSError, ValueError, LookupError, TypeError):
                found[int(unit)] = f"{path} cannot be read"
        return found


def _exists(path: Path) -> bool:
    """Whether something is at a place.

    Raises:
        StorageError: nobody can tell, because it may not be looked at or cannot have this name.
    """
    try:
        return path.exists()
    except OSError as error:
        raise StorageError(
            f"{path} cannot be looked at ({error.strerror or error}); choose another --run folder"
        ) from None
