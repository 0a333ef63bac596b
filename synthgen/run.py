"""A run directory: its artifacts, their done marks and their fingerprints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthgen.entries import (
    FAILED,
    SETTINGS,
    as_yaml,
    digest,
    exists,
    failure_notes,
    made_differently,
    made_in,
    read_entry,
    read_fingerprint,
    validate_entry,
    versions,
)
from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact, SynthgenError
from synthgen.records import Report
from synthgen.redact import redact
from synthgen.stores import parse_location
from synthgen.stores.checksum import verify_sha256
from synthgen.stores.tar import create_bytes, index_tar, read_tar, write_bytes, write_json
from synthgen.units import UnitWriter, is_finished, iter_marks, read_failures, read_mark, rows_of, units_in

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
        if not exists(file) and create_bytes(file, as_yaml({"seed": run.seed})):
            return run
        before = cls.open(path)
        if seed is None or seed == before.seed:
            return before
        if not before.manifest()["artifacts"]:  # nothing has been made with the old one
            write_bytes(file, as_yaml({"seed": seed}))
            entries = list(before.manifest()["artifacts"].values())
            if not entries:
                return run
            write_bytes(file, as_yaml({"seed": entries[0].get("seed", before.seed)}))  # of another command, just now
        raise StaleArtifact(f"{path} was made with seed {before.seed}, not {seed}; choose another --run folder")

    @classmethod
    @contextmanager
    def create_or_roll_back(cls, path: str | Path, *, seed: int | None = None) -> Iterator[Run]:
        """:meth:`create`; a run that was not there before is removed if the block fails and nothing else is in it."""
        folder = parse_location(path)
        there = exists(folder)
        run = cls.create(path, seed=seed)
        try:
            yield run
        except BaseException:
            with suppress(OSError):  # another command has just written into it, or removed it
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
        """Whether there is a run at this path."""
        return exists(self.path / "run.yaml")

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
        """What an artifact is made with, as :meth:`artifact` returns it, or None where no stage has started on it."""
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
        """The command that makes what an artifact lacks, with the settings in its folder."""
        stage, _, label = name.partition("/")
        entry = self.claimed.get(name) or self.find_artifact(name)
        stage = str(entry["stage"]) if entry else _MADE_BY.get(stage, stage)
        label = f"--label {shlex.quote(label)} " if label else ""
        return f"synthgen {stage} {label}--run {shlex.quote(str(self.path))}"

    def check(self, stage: Stage) -> dict[str, Any]:
        """Check that the inputs of ``stage`` are there and that its folders have its settings, or none.

        Returns:
            The entry for their ``settings.yaml``, with the growing settings that ask for most. Nothing is written.

        Raises:
            MissingArtifact: an input is missing; the message names the stage to run first.
            StaleArtifact: a folder was made with other settings or from other inputs; the message names them.
        """
        settings = stage.fingerprinted()
        inputs = {name: self.artifact(name)["fingerprint"] for name in stage.reads}
        inputs |= {redact(name): value for name, value in stage.inputs(self).items()}
        (fingerprint, older), largest = stage.fingerprints(self.seed, inputs), stage
        for name in stage.artifacts():
            before = self.find_artifact(name)
            if before is None:
                continue
            if before["fingerprint"] == fingerprint:
                largest = largest.at_least(self, before["settings"])
            elif before["fingerprint"] == older:
                fingerprint = older
            elif not self._is_free(name):
                now = {"settings": settings, "inputs": inputs}
                raise made_differently(self.folder(name), before, now, stage.hashed_names())
        entry = {"stage": stage.name, "seed": self.seed, "settings": largest.recorded_settings(self), "inputs": inputs}
        return entry | {"fingerprint": fingerprint}

    @contextmanager
    def claim(self, stage: Stage) -> Iterator[Run]:
        """Write the settings of ``stage`` (see :meth:`record_settings`), and yield a run that keeps them in memory.

        Whatever others do to the folders meanwhile, that run works with these settings or not at all (see
        :meth:`keep_settings`). If the block fails, the settings of folders that nothing came into are removed, so that
        other settings can be given; where units failed they stay beside the notes, for :mod:`synthgen.status`.

        Raises:
            MissingArtifact, StaleArtifact: see :meth:`check`; or the settings changed before the block ended.
        """
        entry = self.check(stage) | {"versions": versions()}
        new = self._write_settings(stage, entry)
        try:
            if Run.open(self.path).seed != self.seed:
                raise StaleArtifact(f"another command has just given {self.path} another seed; run this one again")
            claimed = {name: self.artifact(name) for name in stage.reads}
            claimed |= {name: self.find_artifact(name) or entry for name in stage.artifacts()}
            expected = entry["inputs"] | dict.fromkeys(stage.artifacts(), entry["fingerprint"])
            if changed := [name for name, found in claimed.items() if found["fingerprint"] != expected[name]]:
                raise self._given_to_another(changed[0])
            yield replace(self, claimed=claimed)
            for name in stage.artifacts():
                self.keep_settings(name, claimed[name])
        except BaseException:
            for name in new:
                with suppress(OSError, SynthgenError):  # what went wrong before says more
                    self._remove_settings(name, entry["fingerprint"])
            raise

    def _remove_settings(self, name: str, fingerprint: str) -> None:
        """Remove the settings of a folder that nothing came into, if they are still those of ``fingerprint``."""
        path = self.folder(name) / SETTINGS
        if self.is_nonempty(name) or failure_notes(self.folder(name)) or read_fingerprint(path) != fingerprint:
            return
        path.unlink(missing_ok=True)
        self.folder(name).rmdir()  # fails where somebody else is just writing into it

    def record_settings(self, stage: Stage) -> list[str]:
        """Put settings, inputs and versions of ``stage`` into the folders of its artifacts, after :meth:`check`.

        Returns:
            The artifacts that had none of these. Of several commands that begin at once the first decides.

        Raises:
            MissingArtifact, StaleArtifact: see :meth:`check`.
        """
        return self._write_settings(stage, self.check(stage) | {"versions": versions()})

    def _write_settings(self, stage: Stage, entry: dict[str, Any]) -> list[str]:
        new = []
        for name in stage.artifacts():
            kept = self.find_artifact(name)
            if kept is not None and all(kept.get(key) == entry[key] for key in ("fingerprint", "settings")):
                continue
            path, data = self.folder(name) / SETTINGS, as_yaml(entry)
            while not (created := create_bytes(path, data)):
                data = as_yaml(entry | self.check(stage))  # another command may have been first, or ask for more
                if path.is_file():  # otherwise it has just taken its settings back
                    write_bytes(path, data)
                    break
            other = not created and kept is not None and kept["fingerprint"] != entry["fingerprint"]
            if other:  # all that these made were failures
                for failure in failure_notes(self.folder(name)):
                    failure.unlink(missing_ok=True)
            if created or other:
                new.append(name)
        return new

    def keep_settings(self, name: str, entry: dict[str, Any]) -> None:
        """See that an artifact's folder still has the settings ``entry``, and put them back where they are gone.

        A command asks before each unit takes its name: until the first one has, another command may give the folder
        other settings (see :meth:`_is_free`), and the same command elsewhere may fail and take these back.

        Raises:
            StaleArtifact: the folder has other settings.
        """
        path = self.folder(name) / SETTINGS
        while (found := read_fingerprint(path) or (self.find_artifact(name) or {}).get("fingerprint")) is None:
            if create_bytes(path, as_yaml(entry)):
                return
        if found != entry["fingerprint"]:
            raise self._given_to_another(name)

    def _given_to_another(self, name: str) -> StaleArtifact:
        return StaleArtifact(
            f"another command has given {self.folder(name)} other settings since this one started, which adds nothing "
            "more to it; choose another --run folder for one of the two"
        )

    def is_nonempty(self, name: str) -> bool:
        """Whether anything was made of an artifact, or is being made: its settings, logs and failures are nothing."""
        return any(True for _ in made_in(self.folder(name)))

    def _is_free(self, name: str) -> bool:
        """Whether other settings may take the place of those in a folder: nothing is there, or all of it failed."""
        in_use = (self.folder(name) / SETTINGS).is_file()  # maybe by a command that is about to make something
        return not self.is_nonempty(name) and (not in_use or bool(failure_notes(self.folder(name))))

    # -- units

    def folder(self, artifact: str) -> Path:
        """Where an artifact lies."""
        return self.path / artifact

    def tar(self, artifact: str, unit: int) -> Path:
        """Where a unit of an artifact lies."""
        return self.path / artifact / f"{unit:06d}.tar"

    def mark(self, artifact: str, unit: int) -> dict[str, Any] | None:
        """The done mark of a unit, or None where it is not done."""
        return read_mark(self.tar(artifact, unit).with_suffix(".json"))

    def has_unit(self, artifact: str, unit: int, fingerprint: str, least: int = 0) -> bool:
        """Whether a unit of at least so many samples is there, whole, and made with the settings of ``fingerprint``."""
        return is_finished(self.tar(artifact, unit), fingerprint, least)

    def iter_marks(self, artifact: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The done marks of all units whose tars are there and as long as their marks say, one after another."""
        return iter_marks(self.folder(artifact))

    def finished_units(self, artifact: str, fingerprint: str) -> dict[int, int]:
        """The units for which :meth:`has_unit` is true, read together: how many samples each was made of."""
        return {unit: rows_of(mark) for unit, mark in self.iter_marks(artifact) if mark["fingerprint"] == fingerprint}

    def units(self, artifact: str) -> list[int]:
        """The numbers of the units of an artifact that are done, in order.

        Raises:
            MissingArtifact: there are none; names the stage to run first.
            StaleArtifact: some were made with other settings than the folder's.
        """
        fingerprint = self.artifact(artifact)["fingerprint"]
        found = units_in(self.folder(artifact))
        if not found:
            raise MissingArtifact(f"{self.path} has no finished {artifact} yet; run: {self.remedy(artifact)}")
        others = [unit for unit, (made_with, _) in found.items() if made_with not in ("", fingerprint)]
        if others:
            raise StaleArtifact(
                f"{len(others)} of {len(found)} units of {self.folder(artifact)} were made with other settings than "
                f"its {SETTINGS} tells (first: {others[0]:06d}); make them anew: {self.remedy(artifact)}"
            )
        return list(found)

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
        """Note why a unit failed, beside where its tar would be; a later success takes the note away.

        Raises:
            StaleArtifact: another command has given the folder other settings.
        """
        for name in stage.artifacts():
            if name in self.claimed:
                self.keep_settings(name, self.claimed[name])
            path = self.tar(name, report.unit).with_suffix(FAILED)
            reason = {"error": redact(report.error), "trace": redact(report.trace)}
            write_json(path, {"unit": report.unit, **reason, "device_suspect": report.device_suspect})

    def clear_failure(self, stage: Stage, unit: int) -> None:
        """Remove the note of a failure: the unit is done."""
        for name in stage.artifacts():
            self.tar(name, unit).with_suffix(FAILED).unlink(missing_ok=True)

    def failures(self, artifact: str) -> dict[int, str]:
        """The units of an artifact that failed when they were last tried, each with its reason.

        A worker that is killed between the done mark of a unit and the end of its note leaves the note: it counts no
        more.
        """
        found, entry = read_failures(self.folder(artifact)), self.find_artifact(artifact)
        if entry is None:
            return found
        return {unit: why for unit, why in found.items() if not self.has_unit(artifact, unit, entry["fingerprint"])}
