"""What is done in a run, what failed and why, and what to do next."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthgen.attention.words import words_cut_off
from synthgen.codecs import decode_meta
from synthgen.config import build
from synthgen.errors import SynthgenError
from synthgen.run import Run
from synthgen.stages import STAGES
from synthgen.stores import listing, read_many
from synthgen.stores.tar import read_tar
from synthgen.tallies import CUT_OFF, Tallies, Tally
from synthgen.untrusted import MOST_JSON, read_file, read_json

__all__ = [
    "ArtifactStatus",
    "Evaluation",
    "RunStatus",
    "Score",
    "Shards",
    "Tally",
    "Training",
    "evaluations",
    "finite",
    "status",
]

_ORDER = ("generate", "masks", "shards", "pretrain", "evaluate")
_SPLITS = ("train", "val")  # folders of shards
_NOT_SCORES = {"settings", "versions", "inputs", "seed", "seconds", "train", "test"}  # of an evaluation's file


@dataclass(frozen=True, slots=True)
class ArtifactStatus:
    """How far one artifact is, in units and samples."""

    name: str
    stage: str  # what makes it
    done: int  # units
    planned: int  # units; as many as are known of where the stage cannot say
    samples: int = 0
    seconds: float = 0.0  # of work, summed over workers
    bytes: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)  # unit → reason
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples per second of one worker; 0 where no time was taken."""
        return self.samples / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Shards:
    """What ``shards/dataset.json`` says."""

    splits: dict[str, int]  # samples
    num_shards: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Training:
    """One folder of ``pretrain``."""

    name: str
    done: bool
    last: dict[str, float] = field(default_factory=dict)  # the last record of its metrics
    curve: tuple[tuple[float, float], ...] = ()  # step and loss


@dataclass(frozen=True, slots=True)
class Score:
    """What one evaluator says of one thing."""

    of: str  # such as "mae", or "random encoder" beside it
    evaluator: str
    values: dict[str, float]  # the score comes first; ``low`` and ``high`` bound it

    @property
    def main(self) -> tuple[str, float]:
        """The score itself, with its name."""
        return next((item for item in self.values.items() if item[0] not in ("low", "high")), ("", float("nan")))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of ``evaluate``."""

    name: str
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()  # what makes the scores doubtful
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunStatus:
    """All that ``synthgen status`` tells."""

    path: Path
    seed: int
    artifacts: tuple[ArtifactStatus, ...]
    labels: tuple[Tally, ...] = ()  # by class, most samples first
    words: tuple[Tally, ...] = ()  # by word, most samples first
    shards: Shards | None = None
    training: tuple[Training, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    problems: tuple[str, ...] = ()  # files that should be readable and are not
    advice: str = ""  # what to do next

    @property
    def num_failed(self) -> int:
        """Failed units; those that fill two artifacts count once."""
        return len({(artifact.stage, unit) for artifact in self.artifacts for unit in artifact.failures})

    @property
    def dropped(self) -> dict[str, int]:
        """How many masks were dropped for which kind of reason, most first."""
        counts = Counter[str]()
        for tally in self.words:
            counts.update(tally.dropped)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def plain(self) -> dict[str, Any]:
        """All of it as JSON can hold it: no number is NaN or infinite, those are None."""
        value: dict[str, Any] = finite(asdict(self) | {"path": str(self.path), "dropped": self.dropped})
        return value


def status(run: Run, *, counts: bool = True) -> RunStatus:
    """Look at a run; nothing is changed, and what cannot be read is named instead of raised.

    Done marks are read; with ``counts`` the tars of masks too, where their marks do not tell them by class and word.
    """
    problems: list[str] = []
    artifacts: dict[str, ArtifactStatus] = {}
    entries = run.manifest()["artifacts"]
    marks: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in entries.items():
        artifacts[name], marks[name] = _artifact(run, name, entry, artifacts, problems)
    labels, words = _tallies(run, marks["masks"], problems) if counts and "masks" in artifacts else ((), ())
    training = tuple(
        _training(folder, artifacts.get(f"pretrain/{folder.name}"))
        for folder in sorted(run.folder("pretrain").glob("*/"))
    )
    judged = evaluations(run, problems)
    found = tuple(artifacts.values())
    return RunStatus(
        run.path,
        run.seed,
        found,
        labels,
        words,
        _shards(run, problems),
        training,
        judged,
        tuple(problems),
        _advice(run, found, judged),
    )


def _artifact(
    run: Run, name: str, entry: Mapping[str, Any], earlier: Mapping[str, ArtifactStatus], problems: list[str]
) -> tuple[ArtifactStatus, dict[str, dict[str, Any]]]:
    """How far an artifact is, with the marks of what is done of it."""
    folder = run.folder(name)
    files = listing(folder)
    failures = {}
    for file in sorted(files):
        if (unit := file.removesuffix(".failed.json")).isdigit() and unit != file:
            failures[int(unit)] = str(_json(folder / file, problems).get("error", "no reason was written down"))
    marks = {}
    unfinished = set()
    for stem, length, mark in _marks(folder, files, problems):
        if length is not None and _is_done(length, mark, entry):
            marks[stem] = mark
        else:
            unfinished.add(stem)
    known = marks.keys() | unfinished | {f"{unit:06d}" for unit in failures}
    planned = _planned(run, entry)
    if planned is None:  # a stage is mostly as long as what it reads
        inputs = [earlier[given].planned for given in entry.get("inputs", {}) if given in earlier]
        planned = max([len(known), *inputs])
    notes: dict[str, int] = {}
    for mark in marks.values():
        for remark, count in (mark.get("notes") or {}).items():
            if count:
                notes[remark] = notes.get(remark, 0) + int(count)
    told = ArtifactStatus(
        name,
        str(entry.get("stage", name)),
        len(marks),
        max(planned, len(marks)),
        sum(int(mark.get("count", 0)) for mark in marks.values()),
        round(sum(float(mark.get("seconds", mark.get("duration", 0))) for mark in marks.values()), 3),
        sum(int(mark.get("bytes", 0)) for mark in marks.values()),
        notes,
        failures,
        dict(entry.get("settings") or {}),
        dict(entry.get("versions") or {}),
    )
    return told, marks


def _marks(
    folder: Path, files: Mapping[str, int], problems: list[str]
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Each done mark of an artifact: which unit it speaks of, how long the file is that it stands for, what it says.

    ``000012.json`` marks a unit, ``train/000012_stats.json`` a shard and ``done.json`` a training.
    """
    names = [name for name in sorted(files) if name == "done.json" or (name.endswith(".json") and name[:-5].isdigit())]
    for name, mark in _read_json(folder, names, problems):
        whole = "encoder.safetensors" if name == "done.json" else f"{name[:-5]}.tar"
        yield f"{0:06d}" if name == "done.json" else name[:-5], files.get(whole), mark
    for split in _SPLITS:
        inner = listing(folder / split)
        names = [name for name in sorted(inner) if name.endswith("_stats.json") and name[:-11].isdigit()]
        for name, mark in _read_json(folder / split, names, problems):
            yield f"{split}/{name[:-11]}", inner.get(f"{name[:-11]}.tar"), mark


def _read_json(folder: Path, names: Sequence[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files of a folder that are read together; one that is gone meanwhile, or cannot be read, is named and empty."""
    found = dict(read_many(folder, names, MOST_JSON))
    for name in names:
        try:
            if name not in found:
                raise ValueError("it is gone, or may not be read")
            value = read_json(found[name], finite=False)
        except ValueError as error:
            problems.append(f"{folder / name} cannot be read ({error}); delete it and run its stage again")
            value = {}
        yield name, value if isinstance(value, dict) else {}


def _is_done(length: int, mark: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the file is as long as its mark says, and made with the present settings."""
    counts = [mark.get(name, 0) for name in ("count", "bytes", "seconds", "duration")]
    notes = mark.get("notes") or {}
    sane = isinstance(notes, dict) and all(_is_number(one) and math.isfinite(one) for one in (*counts, *notes.values()))
    return sane and mark.get("fingerprint") == entry.get("fingerprint") and mark.get("bytes", length) == length


def _planned(run: Run, entry: Mapping[str, Any]) -> int | None:
    """How many units the stage plans, or None where it cannot be made again from what the manifest says."""
    try:
        name = str(entry["stage"])
        return build(STAGES.load(name), entry["settings"], where=name).planned(run)
    except Exception:  # a stage of another version, a lost input: status must still answer
        return None


def _tallies(
    run: Run, marks: Mapping[str, Mapping[str, Any]], problems: list[str]
) -> tuple[tuple[Tally, ...], tuple[Tally, ...]]:
    """Masks by class and by word: from the done marks; of units whose marks tell none, from their tars."""
    tallies = Tallies()
    told = set()
    for unit, mark in marks.items():
        with suppress(ValueError):
            tallies.add(mark.get("tallies"))
            told.add(f"{unit}.tar")
    folder = run.folder("masks")
    for name in sorted(listing(folder).keys() - told):
        if name.endswith(".tar") and name[:1].isdigit():
            try:
                _count(tallies, run.folder("images") / name, folder / name)
            except (SynthgenError, OSError, KeyError, ValueError, TypeError) as error:
                problems.append(str(error))
    return tallies.ranked()


def _count(tallies: Tallies, images: Path, masks: Path) -> None:
    about = {key: _about(members) for key, members in read_tar(images, ("json",))}
    for key, record in [(key, decode_meta(key, members)) for key, members in read_tar(masks, ("json",))]:
        wanted = [str(word) for word in record.get("words", ())]
        dropped = record.get("dropped")
        reasons = [str(reason) for reason in dropped] if isinstance(dropped, list) else []
        reasons += [""] * (len(wanted) - len(reasons))
        label, lost = about.get(key, ("", []))
        tallies.count(label, wanted + lost, reasons[: len(wanted)] + [CUT_OFF] * len(lost))


def _about(members: Mapping[str, bytes]) -> tuple[str, list[str]]:
    """The class of a sample, and the words that it lost before it had maps."""
    meta = decode_meta("", members)
    return str(meta.get("label") or ""), words_cut_off(str(one) for one in meta.get("warnings") or ())


def _shards(run: Run, problems: list[str]) -> Shards | None:
    path = run.folder("shards") / "dataset.json"
    if not path.is_file():
        return None
    value = _json(path, problems)
    listed = value.get("shards")
    shards = [shard for shard in listed if isinstance(shard, dict)] if isinstance(listed, list) else []
    splits: dict[str, int] = {}
    given = value.get("splits")
    for name, split in given.items() if isinstance(given, dict) else ():
        count = split.get("samples") if isinstance(split, dict) else split
        splits[str(name)] = count if isinstance(count, int) else 0
    sizes = (float(shard["bytes"]) for shard in shards if _is_number(shard.get("bytes")))
    return Shards(splits, len(shards), sum(int(size) for size in sizes if math.isfinite(size)))


def _training(folder: Path, artifact: ArtifactStatus | None) -> Training:
    rows: list[dict[str, float]] = []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line that is being written just now
            continue
        if isinstance(row, dict):
            rows.append({str(key): float(value) for key, value in row.items() if _is_number(value)})
    curve = tuple((row["step"], row["loss"]) for row in rows if "step" in row and "loss" in row)
    done = bool(artifact.done) if artifact else (folder / "done.json").is_file()
    return Training(folder.name, done, rows[-1] if rows else {}, curve)


def evaluations(run: Run, problems: list[str]) -> tuple[Evaluation, ...]:
    """What each evaluation of a run found; files that cannot be read are named in ``problems``."""
    found = []
    for path in sorted(run.folder("evaluate").glob("*.json")):
        value = _json(path, problems)
        scores = value.get("scores")
        warnings = value.get("warnings")
        found.append(
            Evaluation(
                path.stem,
                tuple(_score_rows(scores if isinstance(scores, dict) else value)),
                tuple(str(warning) for warning in warnings) if isinstance(warnings, list) else (),
                float(value["seconds"]) if _is_number(value.get("seconds")) else 0.0,
            )
        )
    return tuple(found)


def _score_rows(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Score]:
    """The innermost mappings that hold numbers; the keys on the way say of what and by whom."""
    numbers = {key: float(item) for key, item in value.items() if _is_number(item) and key not in _NOT_SCORES}
    if numbers:
        yield Score(" ".join(path[:-1]), path[-1] if path else "", numbers)
    for key, item in value.items():
        if isinstance(item, Mapping) and key not in _NOT_SCORES:
            yield from _score_rows(item, (*path, key))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = read_json(read_file(path), finite=False)
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}); delete it and run its stage again")
        return {}
    return value if isinstance(value, dict) else {}


def finite(value: Any) -> Any:
    """Plain data in which None stands for NaN and infinity: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _advice(run: Run, artifacts: Sequence[ArtifactStatus], evaluations: Sequence[Evaluation]) -> str:
    where = f"--run {shlex.quote(str(run.path))}"
    for artifact in artifacts:
        if artifact.failures or artifact.done < artifact.planned:
            left = len(artifact.failures) or artifact.planned - artifact.done
            what = f"does the {left} unit{'s' if left > 1 else ''} that {'are' if left > 1 else 'is'} left"
            if artifact.name.startswith("pretrain/"):
                what = "goes on from its last checkpoint"
            elif artifact.failures:
                what = f"retries the {f'{left} units' if left > 1 else 'unit'} that failed"
            return f"run synthgen {artifact.stage} again with the same settings ({where}): it {what}"
    made = {artifact.stage for artifact in artifacts if artifact.done}
    done = {"generate" if stage == "attend" else stage for stage in made} | ({"evaluate"} if evaluations else set())
    last = max((_ORDER.index(stage) for stage in done if stage in _ORDER), default=-1)
    if last + 1 == len(_ORDER):
        return f"all stages are done; look at them: synthgen view {shlex.quote(str(run.path))}"
    options = {"generate": "--prompts FILE ", "pretrain": "--method mae "}.get(_ORDER[last + 1], "")
    return f"synthgen {_ORDER[last + 1]} {options}{where}"
