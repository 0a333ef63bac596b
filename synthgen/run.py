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
    digest,
    dump_yaml,
    exists,
    failure_files,
    output_files,
    read_entry,
    read_fingerprint,
    stale_artifact,
    validate_entry,
    versions,
)
from synthgen.errors import MissingArtifact, StaleArtifact, SynthgenError
from synthgen.records import Report
from synthgen.redact import redact
from synthgen.stores import parse_location
from synthgen.stores.checksum import verify_sha256
from synthgen.stores.tar import create_bytes, index_tar, read_tar, write_bytes, write_json
from synthgen.units import UnitWriter, is_finished, iter_marks, list_units, num_attempted, read_failures, read_mark

if TYPE_CHECKING:
    from synthgen.stages import Stage

__all__ = ["Run", "digest", "versions"]

_ORDER = ("images", "maps", "masks", "filter", "shards", "pretrain")  # of artifacts
_MADE_BY = {"images": "generate", "maps": "generate"}  # others have the name of their stage


@dataclass(frozen=True)
class Run:
    """A folder, here or in a store (``s3://bucket/run``), that stages read from and write to.

    A stage writes artifacts, folders of the run: ``images``, ``maps``, ``masks``, ``shards``, ``pretrain/<label>``.
    ``<artifact>/000012.tar`` is a unit. ``000012.json``, written last, is its done mark: count, sha256, seconds and
    fingerprint. ``000012.failed.json`` says why a unit failed. ``settings.yaml`` records what all units are made with:
    the first command that writes it decides, and other settings are refused. There is no other bookkeeping and a run is
    never locked, so any number of commands may work on it.
    """

    path: Path  # as ``parse_location`` gives it
    seed: int = 0
    claimed: Mapping[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)  # see :meth:`claim`

    @classmethod
    def create(cls, path: str | Path, *, seed: int | None = None) -> Run:
        """Open the run at ``path``, or create it (with seed 0 unless one is given).

        Raises:
            StaleArtifact: the run exists and has another seed.
        """
        run = cls(parse_location(path), seed or 0)
        file = run.path / "run.yaml"
        if not exists(file) and create_bytes(file, dump_yaml({"seed": run.seed})):
            return run
        before = cls.open(path)
        if seed is None or seed == before.seed:
            return before
        if not before.artifacts():  # nothing was made with the old seed
            write_bytes(file, dump_yaml({"seed": seed}))
            made = next(iter(before.artifacts().values()), None)
            if made is None:
                return run
            write_bytes(file, dump_yaml({"seed": made.get("seed", before.seed)}))  # another command was faster
        raise StaleArtifact(f"{path} was made with seed {before.seed}, not {seed}; choose another --run folder")

    @classmethod
    @contextmanager
    def create_or_roll_back(cls, path: str | Path, *, seed: int | None = None) -> Iterator[Run]:
        """:meth:`create`; a new run is removed again if the block fails and has written nothing to it."""
        folder = parse_location(path)
        is_new = not exists(folder)
        run = cls.create(path, seed=seed)
        try:
            yield run
        except BaseException:
            with suppress(OSError):  # another command has just written to it, or removed it
                if is_new and [entry.name for entry in folder.iterdir()] == ["run.yaml"]:
                    (folder / "run.yaml").unlink()
                    folder.rmdir()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run.

        Raises:
            MissingArtifact: there is no run at ``path``.
            ConfigError: its ``run.yaml`` cannot be read.
        """
        path = parse_location(path)
        entry = read_entry(path / "run.yaml", "seed", int) if cls(path).exists() else None
        if entry is None:
            raise MissingArtifact(
                f"there is no run at {path}; make one with: "
                f"synthgen generate --prompts FILE --run {shlex.quote(str(path))}"
            )
        return cls(path, entry["seed"])

    def exists(self) -> bool:
        """Whether there is a run at this path."""
        return exists(self.path / "run.yaml")

    # -- settings and fingerprint of each artifact

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """What each artifact is made with (see :meth:`artifact`), in the order of the stages.

        Raises:
            ConfigError: a ``settings.yaml`` cannot be read.
        """
        files = (*self.path.glob(f"*/{SETTINGS}"), *self.path.glob(f"*/*/{SETTINGS}"))
        names = [file.parent.relative_to(self.path).as_posix() for file in files]
        places = {name: place for place, name in enumerate(_ORDER)}
        names.sort(key=lambda name: (places.get(name.partition("/")[0], len(places)), name))
        return {name: entry for name in names if (entry := self.find_artifact(name)) is not None}

    def find_artifact(self, name: str) -> dict[str, Any] | None:
        """What :meth:`artifact` returns, or None if no stage has started on it.

        Raises:
            ConfigError: its ``settings.yaml`` cannot be read.
        """
        path = self.folder(name) / SETTINGS
        entry = read_entry(path, "fingerprint", str)
        return None if entry is None else validate_entry(entry, path)

    def artifact(self, name: str) -> dict[str, Any]:
        """What an artifact is made with: stage, seed, settings, inputs, fingerprint, versions.

        Raises:
            MissingArtifact: it has not been made; names the stage to run first.
            ConfigError: its ``settings.yaml`` cannot be read.
        """
        entry = self.claimed[name] if name in self.claimed else self.find_artifact(name)
        if entry is None:
            raise self.missing_artifact(name)
        return entry

    def missing_artifact(self, name: str) -> MissingArtifact:
        """The error for an artifact that has not been made; names the stage to run first."""
        stage = name.partition("/")[0]
        stage = _MADE_BY.get(stage, stage)
        prompts = "--prompts FILE " if stage == "generate" else ""
        command = f"synthgen {stage} {prompts}--run {shlex.quote(str(self.path))}"
        return MissingArtifact(f"{self.path} has no {name} yet; first run: {command}")

    def remedy(self, name: str) -> str:
        """The command that makes the missing units of an artifact, with the settings in its folder."""
        stage, _, label = name.partition("/")
        entry = self.claimed.get(name) or self.find_artifact(name)
        stage = str(entry["stage"]) if entry else _MADE_BY.get(stage, stage)
        label = f"--label {shlex.quote(label)} " if label else ""
        return f"synthgen {stage} {label}--run {shlex.quote(str(self.path))}"

    def check(self, stage: Stage) -> dict[str, Any]:
        """Check that the inputs of ``stage`` exist and that its folders have the same settings or none; writes nothing.

        Returns:
            The entry for their ``settings.yaml``. Growing settings are those of ``stage``, unless they ask for fewer
            samples than the run holds and the recorded ones ask for more.

        Raises:
            MissingArtifact: an input is missing; names the stage to run first.
            StaleArtifact: a folder was made with other settings or from other inputs; names them.
        """
        inputs = {name: self.artifact(name)["fingerprint"] for name in stage.reads}
        inputs |= {redact(name): value for name, value in stage.inputs(self).items()}
        now = {"stage": stage.name, "seed": self.seed, "settings": stage.fingerprinted(), "inputs": inputs}
        fingerprint, recorded = digest(now), stage
        for name in stage.artifacts():
            before = self.find_artifact(name)
            if before is not None and before["fingerprint"] == fingerprint:
                larger = recorded.at_least(self, before["settings"])
                made = self.finished_units(name, fingerprint) if larger is not recorded else {}
                if sum(made.values()) > recorded.num_samples(self):
                    recorded = larger
            elif before is not None and not self._is_replaceable(name):
                raise stale_artifact(self.folder(name), before, now)
        return now | {"settings": recorded.recorded_settings(self), "fingerprint": fingerprint}

    @contextmanager
    def claim(self, stage: Stage) -> Iterator[Run]:
        """Write settings, inputs and versions of ``stage`` to its folders, and yield a run that keeps them in memory.

        Of several commands that start at the same time the first decides. Whatever others do to the folders in the
        block, the yielded run uses these settings or fails (see :meth:`ensure_settings`). If the block fails, the
        settings of empty folders are removed, so that others can be given; where units failed they stay beside the
        failure files, for :mod:`synthgen.status`.

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
                raise self._changed_meanwhile(changed[0])
            yield replace(self, claimed=claimed)
            for name in stage.artifacts():
                self.ensure_settings(name, claimed[name])
        except BaseException:
            for name in new:
                with suppress(OSError, SynthgenError):  # the first error says more
                    self._remove_settings(name, entry["fingerprint"])
            raise

    def _remove_settings(self, name: str, fingerprint: str) -> None:
        """Remove the settings of an empty folder, if they are still those of ``fingerprint``."""
        path = self.folder(name) / SETTINGS
        if self.is_nonempty(name) or failure_files(self.folder(name)) or read_fingerprint(path) != fingerprint:
            return
        path.unlink(missing_ok=True)
        self.folder(name).rmdir()  # fails if another command is writing to it

    def _write_settings(self, stage: Stage, entry: dict[str, Any]) -> list[str]:
        """Write ``entry``, the result of :meth:`check`; the artifacts that had other settings, or none.

        Raises:
            MissingArtifact, StaleArtifact: see :meth:`check`.
        """
        new = []
        for name in stage.artifacts():
            kept = self.find_artifact(name)
            if kept is not None and all(kept.get(key) == entry[key] for key in ("fingerprint", "settings")):
                continue
            path, data = self.folder(name) / SETTINGS, dump_yaml(entry)
            while not (created := create_bytes(path, data)):
                data = dump_yaml(entry | self.check(stage))  # raises if another command was first
                if path.is_file():  # otherwise it has just removed its settings again
                    write_bytes(path, data)
                    break
            replaced = not created and kept is not None and kept["fingerprint"] != entry["fingerprint"]
            if replaced:  # all units of the earlier settings failed
                for failure in failure_files(self.folder(name)):
                    failure.unlink(missing_ok=True)
            if created or replaced:
                new.append(name)
        return new

    def ensure_settings(self, name: str, entry: dict[str, Any]) -> None:
        """Check that an artifact's folder still has the settings ``entry``; restore them if they are missing.

        Called before each unit is renamed. Until the first one is, another command may give the folder other settings
        (see :meth:`_is_replaceable`), and the same command elsewhere may fail and remove these.

        Raises:
            StaleArtifact: the folder has other settings.
        """
        path = self.folder(name) / SETTINGS
        while (found := read_fingerprint(path)) is None:
            if create_bytes(path, dump_yaml(entry)):
                return
        if found != entry["fingerprint"]:
            raise self._changed_meanwhile(name)

    def _changed_meanwhile(self, name: str) -> StaleArtifact:
        return StaleArtifact(
            f"another command has given {self.folder(name)} other settings since this one started, so this one stops; "
            "choose another --run folder for one of the two"
        )

    def is_nonempty(self, name: str) -> bool:
        """Whether an artifact's folder has, or is about to get, any file besides its settings, logs and failures."""
        return any(True for _ in output_files(self.folder(name)))

    def _is_replaceable(self, name: str) -> bool:
        """Whether other settings may replace those of a folder: it is empty, or all of its units failed."""
        in_use = (self.folder(name) / SETTINGS).is_file()  # a command may be about to make its first unit
        return not self.is_nonempty(name) and (not in_use or bool(failure_files(self.folder(name))))

    # -- units

    def folder(self, artifact: str) -> Path:
        """The folder of an artifact."""
        return self.path / artifact

    def tar(self, artifact: str, unit: int) -> Path:
        """The file of a unit of an artifact."""
        return self.path / artifact / f"{unit:06d}.tar"

    def mark(self, artifact: str, unit: int) -> dict[str, Any] | None:
        """The done mark of a unit, or None if it has none."""
        return read_mark(self.tar(artifact, unit).with_suffix(".json"))

    def has_unit(self, artifact: str, unit: int, fingerprint: str, min_samples: int = 0) -> bool:
        """Whether a unit is complete, has this fingerprint, and was made of at least ``min_samples`` samples."""
        return is_finished(self.tar(artifact, unit), fingerprint, min_samples)

    def iter_marks(self, artifact: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number and done mark of each unit whose tar has the length in its mark."""
        return iter_marks(self.folder(artifact))

    def finished_units(self, artifact: str, fingerprint: str) -> dict[int, int]:
        """The units for which :meth:`has_unit` is true, each with the number of samples that it was made of."""
        marks = self.iter_marks(artifact)
        return {unit: num_attempted(mark) for unit, mark in marks if mark["fingerprint"] == fingerprint}

    def units(self, artifact: str) -> list[int]:
        """The numbers of an artifact's units that have done marks, in order.

        Raises:
            MissingArtifact: there are none; names the stage to run first.
            StaleArtifact: some were made with other settings than those of the folder.
        """
        fingerprint = self.artifact(artifact)["fingerprint"]
        found = list_units(self.folder(artifact))
        if not found:
            raise MissingArtifact(f"{self.path} has no finished {artifact} yet; run: {self.remedy(artifact)}")
        others = [unit for unit, (made_with, _) in found.items() if made_with not in ("", fingerprint)]
        if others:
            raise StaleArtifact(
                f"{len(others)} of {len(found)} units of {self.folder(artifact)} were made with other settings than "
                f"those in its {SETTINGS} (first: {others[0]:06d}); make them anew: {self.remedy(artifact)}"
            )
        return list(found)

    def write(self, artifact: str, unit: int) -> UnitWriter:
        """A context manager to which samples are added; the unit appears when the block ends without an error."""
        return UnitWriter(self, artifact, unit)

    def read(self, artifact: str, unit: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a unit in order: key, and each member's bytes.

        Raises:
            MissingArtifact, CorruptFile: the unit is missing or damaged.
        """
        self.verify(artifact, unit)
        return read_tar(self.tar(artifact, unit))

    def verify(self, artifact: str, unit: int) -> None:
        """Check the sha256 of a unit against its done mark. A truncated tar passes: reading it names the last key.

        Raises:
            MissingArtifact: the unit is missing.
            CorruptFile: it has another sha256.
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
        """Write why a unit failed beside its tar; a later success removes the file.

        Raises:
            StaleArtifact: another command has given the folder other settings.
        """
        for name in stage.artifacts():
            if name in self.claimed:
                self.ensure_settings(name, self.claimed[name])
            texts = {field: redact(getattr(report, field)) for field in ("error", "trace", "damaged")}
            content = {"unit": report.unit, **texts, "device_suspect": report.device_suspect}
            write_json(self.tar(name, report.unit).with_suffix(FAILED), content)

    def clear_failure(self, stage: Stage, unit: int) -> None:
        """Remove the failure file of a unit that is done."""
        for name in stage.artifacts():
            self.tar(name, unit).with_suffix(FAILED).unlink(missing_ok=True)

    def failures(self, artifact: str) -> dict[int, str]:
        """The units of an artifact that failed when they were last tried, each with its reason.

        Units that are done are left out: a worker may be killed before it removes their failure files.
        """
        found, entry = read_failures(self.folder(artifact)), self.find_artifact(artifact)
        if entry is None:
            return found
        return {unit: why for unit, why in found.items() if not self.has_unit(artifact, unit, entry["fingerprint"])}
