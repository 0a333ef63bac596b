"""A run directory: its artifacts, their done marks and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact
from synthgen.records import Report
from synthgen.stores.tar import TarWriter, index_tar, read_tar, write_bytes, write_json

if TYPE_CHECKING:
    from synthgen.stages import Stage

__all__ = ["Run", "UnitWriter", "digest", "versions"]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # safe either way; ten times as fast where it is in C
_PACKAGES = ("synthgen", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "pillow", "webdataset")
_MADE_BY = {"images": "generate", "maps": "generate", "masks": "masks", "shards": "shards", "pretrain": "pretrain"}


def digest(value: Any) -> str:
    """The sha256 of plain data, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results may depend on. Recorded, never hashed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Run:
    """A folder in which stages find what earlier ones wrote, and write folders of their own.

    ``<artifact>/000012.tar`` holds a unit. The ``000012.json`` beside it comes last and is its done mark: count,
    sha256, seconds and fingerprint. ``000012.failed.json`` says why a unit failed. There is no other bookkeeping, and
    nothing is locked.
    """

    path: Path
    seed: int = 0

    @classmethod
    def create(cls, path: str | Path, *, seed: int | None = None) -> Run:
        """Open the run at ``path``; make it where it is not there yet (with seed 0 unless one is given).

        Raises:
            StaleArtifact: the run is there and has another seed.
        """
        path = Path(path)
        if (path / "run.yaml").exists():
            run = cls.open(path)
            if seed is not None and seed != run.seed and not run.manifest()["artifacts"]:
                run = cls(path, seed)  # nothing has been made with the old one
                run._save({"seed": seed, "artifacts": {}})
            if seed is not None and seed != run.seed:
                raise StaleArtifact(f"{path} was made with seed {run.seed}, not {seed}; choose another --run folder")
            return run
        run = cls(path, seed or 0)
        run._save({"seed": run.seed, "artifacts": {}})
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run that exists.

        Raises:
            MissingArtifact: there is no run at ``path``.
            ConfigError: its ``run.yaml`` cannot be read.
        """
        path = Path(path)
        if not (path / "run.yaml").is_file():
            raise MissingArtifact(
                f"there is no run at {path}; make one with: synthgen generate --prompts FILE --run {path}"
            )
        run = cls(path)
        seed = run.manifest().get("seed")
        if not isinstance(seed, int):
            raise ConfigError(f"{path}/run.yaml has no whole number under 'seed'; restore the file or start a new run")
        return cls(path, seed)

    # -- the manifest: settings and fingerprint of each artifact

    def manifest(self) -> dict[str, Any]:
        """What ``run.yaml`` says."""
        try:
            value = _LOADER((self.path / "run.yaml").read_text(encoding="utf-8")).get_single_data()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = str(error).replace("\n", " ")
            raise ConfigError(f"{self.path}/run.yaml is not YAML ({reason}); restore it or start a new run") from None
        if not isinstance(value, dict) or not isinstance(value.get("artifacts"), dict):
            raise ConfigError(f"{self.path}/run.yaml is not a run's manifest; restore the file or start a new run")
        return value

    def _save(self, manifest: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(manifest))  # no object twice, so that YAML needs no anchors
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
        write_bytes(self.path / "run.yaml", text.encode())

    def artifact(self, name: str) -> dict[str, Any]:
        """The manifest's entry of an artifact: stage, settings, inputs, fingerprint, versions.

        Raises:
            MissingArtifact: it has not been made; names the stage to run first.
        """
        entry: dict[str, Any] | None = self.manifest()["artifacts"].get(name)
        if entry is None:
            stage = _MADE_BY.get(name.partition("/")[0], name)
            raise MissingArtifact(f"{self.path} has no {name} yet; first run: synthgen {stage} --run {self.path}")
        return entry

    def check(self, stage: Stage) -> dict[str, Any]:
        """See that the inputs of ``stage`` are there and that what it made before had these settings.

        Returns:
            What the manifest should say of its artifacts (see :meth:`note`). Nothing is written.

        Raises:
            MissingArtifact: an input is missing; names the stage to run first.
            StaleArtifact: its folder was made with other settings or from other inputs; names them.
        """
        settings = stage.fingerprinted()
        inputs = {name: self.artifact(name)["fingerprint"] for name in stage.reads} | stage.inputs(self)
        fingerprint = digest({"stage": stage.name, "seed": self.seed, "settings": settings, "inputs": inputs})
        made = self.manifest()["artifacts"]
        for name in stage.artifacts():
            before = made.get(name)
            if before is not None and before["fingerprint"] != fingerprint and self._holds_anything(name):
                self._refuse(name, before, settings, inputs)
        return {"stage": stage.name, "settings": stage.settings(), "inputs": inputs, "fingerprint": fingerprint}

    def note(self, stage: Stage) -> None:
        """Put settings, inputs and versions of ``stage`` into the manifest, after :meth:`check`."""
        entry, manifest = self.check(stage), self.manifest()
        for name in stage.artifacts():
            kept = manifest["artifacts"].get(name, {})
            if any(kept.get(key) != entry[key] for key in ("fingerprint", "settings")):
                manifest["artifacts"][name] = entry | {"versions": versions()}
                self._save(manifest)

    def _holds_anything(self, name: str) -> bool:
        folder = self.path / name
        return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())

    def _refuse(self, name: str, before: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> None:
        def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
            return [key for key in {**old, **new} if old.get(key) != new.get(key)]

        old = before["settings"]
        changes = [
            f"{key} is {settings.get(key)!r} and was {old.get(key)!r}"
            for key in differing({key: value for key, value in old.items() if key in settings}, settings)
        ]
        changes += [f"its input {key!r} has changed" for key in differing(before["inputs"], inputs)]
        folder = self.path / name
        elsewhere = "another --label" if name.startswith("pretrain/") else "another --run folder"
        raise StaleArtifact(
            f"{folder} was made differently: {'; '.join(changes) or 'by another stage'}; "
            f"use the same settings, choose {elsewhere}, or delete {folder} to make it anew"
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
            value: dict[str, Any] = json.loads(self.tar(artifact, unit).with_suffix(".json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return value

    def has(self, artifact: str, unit: int, fingerprint: str) -> bool:
        """Whether a unit is there, whole, and made with the settings of ``fingerprint``."""
        mark = self.mark(artifact, unit)
        path = self.tar(artifact, unit)
        return (
            mark is not None
            and mark["fingerprint"] == fingerprint
            and path.is_file()
            and path.stat().st_size == mark["bytes"]
        )

    def units(self, artifact: str) -> list[int]:
        """The numbers of the units of an artifact that are done, in order.

        Raises:
            MissingArtifact: there are none; names the stage to run first.
        """
        self.artifact(artifact)
        marks = self.folder(artifact).glob("[0-9]*.json")
        found = sorted(int(path.stem) for path in marks if path.stem.isdigit())
        if not found:
            stage = _MADE_BY.get(artifact, artifact)
            raise MissingArtifact(
                f"{self.path} has no finished {artifact} yet; run: synthgen {stage} --run {self.path}"
            )
        return found

    def write(self, artifact: str, unit: int) -> UnitWriter:
        """A context in which samples are added to a unit; the unit is there when the context ends well."""
        return UnitWriter(self, artifact, unit)

    def read(self, artifact: str, unit: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a unit in order: key, and each member's bytes.

        Raises:
            MissingArtifact, CorruptShard: the unit is not there, or not whole.
        """
        return read_tar(self.tar(artifact, unit))

    def keys(self, artifact: str, unit: int) -> list[str]:
        """The keys of a unit in order."""
        return [key for key, _ in index_tar(self.tar(artifact, unit))]

    def fail(self, stage: Stage, report: Report) -> None:
        """Note why a unit failed, beside where its tar would be; a later success takes the note away."""
        for name in stage.artifacts():
            path = self.tar(name, report.unit).with_suffix(".failed.json")
            write_json(path, {"unit": report.unit, "error": report.error, "trace": report.trace})

    def failures(self, artifact: str) -> dict[int, str]:
        """The units of an artifact that failed when they were last tried, each with its reason."""
        found = {}
        for path in sorted(self.folder(artifact).glob("*.failed.json")):
            value = json.loads(path.read_bytes())
            found[int(value["unit"])] = str(value["error"])
        return found


class UnitWriter:
    """Write one unit of an artifact: the tar, then its done mark (see :meth:`Run.write`)."""

    def __init__(self, run: Run, artifact: str, unit: int) -> None:
        self.run, self.artifact, self.unit = run, artifact, unit
        self.notes: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self._tar = TarWriter(run.tar(artifact, unit))

    def __enter__(self) -> UnitWriter:
        self._fingerprint = self.run.artifact(self.artifact)["fingerprint"]
        self._tar.path.with_suffix(".json").unlink(missing_ok=True)
        self._started = time.perf_counter()
        self._tar.__enter__()
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample."""
        self._tar.add(key, members)

    @property
    def count(self) -> int:
        """Samples added so far."""
        return self._tar.count

    def note(self, remark: str, count: int = 1) -> None:
        """Count a remark, such as "dropped masks", for ``status`` and ``view``."""
        self.notes[remark] = self.notes.get(remark, 0) + count

    def fail(self, key: str, reason: str) -> None:
        """Leave a sample out and keep its reason in the done mark; it is counted in the notes."""
        self.failed[key] = reason
        self.note("failed samples")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.__exit__(kind, error, trace)
        if kind is None:
            mark = {
                "count": self._tar.count,
                "bytes": self._tar.size,
                "sha256": self._tar.sha256,
                "seconds": round(time.perf_counter() - self._started, 3),
                "fingerprint": self._fingerprint,
                "notes": self.notes,
                **({"failed": self.failed} if self.failed else {}),
            }
            write_json(self._tar.path.with_suffix(".json"), mark)
            self._tar.path.with_suffix(".failed.json").unlink(missing_ok=True)
