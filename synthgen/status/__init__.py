"""What is done in a run, what failed and why, and what to run next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from synthgen.errors import CorruptFile, MissingArtifact, SynthgenError
from synthgen.rejected import FILTER, count_rejected, read_rejected
from synthgen.run import Run
from synthgen.stages._units import content_hash
from synthgen.status.artifacts import NUM_EXAMPLES, ArtifactStatus, artifact_status
from synthgen.status.learning import Evaluation, Score, Training, evaluations, training_in
from synthgen.status.reading import finite
from synthgen.status.samples import Dropped, MaskCounts, Shards, finished_shards
from synthgen.tallies import Tally

__all__ = [
    "ArtifactStatus",
    "Dropped",
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

_ORDER = ("generate", "masks", "shards", "pretrain")  # then evaluate, which has no artifact


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Everything that ``synthgen status`` reports."""

    path: Path
    seed: int
    artifacts: tuple[ArtifactStatus, ...]
    labels: tuple[Tally, ...] = ()  # by class, most samples first
    words: tuple[Tally, ...] = ()  # by word, most samples first
    first_dropped: tuple[Dropped, ...] = ()  # the first few words without a mask
    shards: Shards | None = None
    training: tuple[Training, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    problems: tuple[str, ...] = ()  # unreadable files
    advice: str = ""  # what to run next

    @property
    def failures(self) -> dict[tuple[str, str], list[int]]:
        """Failed units by stage and reason."""
        units: dict[tuple[str, str], set[int]] = {}
        for artifact in self.artifacts:
            for unit, reason in artifact.failures.items():
                units.setdefault((artifact.stage, reason), set()).add(unit)
        return {key: sorted(found) for key, found in units.items()}

    @property
    def num_failed(self) -> int:
        """Failed units; a unit of two artifacts counts once."""
        return len({(stage, unit) for (stage, _), units in self.failures.items() for unit in units})

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped masks by kind of reason, most frequent first; words that were cut off are not among them."""
        counts = Counter[str]()
        for tally in self.words:
            counts.update(tally.dropped)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def words_cut_off(self) -> int:
        """Words without a mask because no text encoder reads as far as they stand."""
        return sum(tally.cut_off for tally in self.words)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data for JSON; NaN and infinity become None."""
        more = {"path": str(self.path), "dropped": self.dropped, "words_cut_off": self.words_cut_off}
        value: dict[str, Any] = finite(asdict(self) | more)
        return value


def status(run: Run, *, counts: bool = True) -> RunStatus:
    """The status of a run; nothing is changed, and unreadable files are listed in ``problems`` instead of raised.

    Only done marks are read; with ``counts`` also a few tars of masks, for the examples of ``first_dropped``.
    """
    problems: list[str] = []
    artifacts: dict[str, ArtifactStatus] = {}
    masks = MaskCounts()

    def count(unit: str, mark: Mapping[str, Any]) -> None:
        masks.add(run.folder("masks"), unit, mark, problems)

    entries = run.artifacts()
    for name, entry in entries.items():
        on_mark = (count,) if counts and name == "masks" else ()
        artifacts[name] = artifact_status(run, name, entry, artifacts, problems, *on_mark)
        if name == FILTER:
            artifacts[name] = _with_rejected(run, artifacts[name], problems)
    labels, words = masks.tallies.ranked()
    training = tuple(
        training_in(folder, artifacts.get(name), outdated=_is_outdated(name, entries))
        for folder in sorted(run.folder("pretrain").glob("*/"))
        for name in (f"pretrain/{folder.name}",)
    )
    state = RunStatus(
        run.path,
        run.seed,
        tuple(artifacts.values()),
        labels,
        words,
        masks.first_dropped(run, problems),
        finished_shards(run, problems),
        training,
        evaluations(run, problems),
    )
    return replace(state, problems=tuple(problems), advice=_advice(run, state))


def _with_rejected(run: Run, artifact: ArtifactStatus, problems: list[str]) -> ArtifactStatus:
    """The status of the filter with its decisions, once it has seen all images."""
    try:
        rejected = read_rejected(run)
    except MissingArtifact:  # units are missing, which their number shows
        return artifact
    except (SynthgenError, OSError) as error:
        problems.append(str(error))
        return artifact
    notes = {f"rejected by {name}": count for name, count in count_rejected(rejected.values()).items()}
    return replace(artifact, notes=notes, left_out=dict(islice(rejected.items(), NUM_EXAMPLES)))


def _is_outdated(training: str, entries: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a training read the run's shards, and others have been packed since."""
    before = entries[training].get("inputs", {}).get("shards") if training in entries else None
    return before is not None and "shards" in entries and before != entries["shards"]["fingerprint"]


def _advice(run: Run, state: RunStatus) -> str:
    """What to run next."""
    for artifact in state.artifacts:
        if artifact.name == "shards" and _has_grown(run, state.artifacts):
            again = run.remedy("shards")
            return f"delete {run.folder('shards')} and run: {again}, as there are more images than it was packed from"
        if artifact.failures or artifact.done < artifact.planned:
            return _retry(run, artifact, {one.name for one in state.artifacts})
    encoders = [one for one in state.training if one.done]
    if encoders and all(one.outdated for one in encoders):
        again = f"synthgen pretrain --method mae --label NAME --run {shlex.quote(str(run.path))}"
        return f"{again}, as every encoder was trained on earlier shards"
    has_encoder = bool(encoders)
    made = {artifact.stage for artifact in state.artifacts if artifact.done}
    done = {"generate" if stage == "attend" else stage for stage in made} | ({"pretrain"} if has_encoder else set())
    last = max((_ORDER.index(stage) for stage in done if stage in _ORDER), default=-1)
    of_models = any(score.of != "masks" for evaluation in state.evaluations for score in evaluation.scores)
    if (has_encoder and of_models) or (not done and state.evaluations):
        return f"all stages are done; to see the results: synthgen view {shlex.quote(str(run.path))}"
    stage = (*_ORDER, "evaluate")[last + 1]
    options = {"generate": "--prompts FILE ", "pretrain": "--method mae "}.get(stage, "")
    return f"synthgen {stage} {options}--run {shlex.quote(str(run.path))}"


def _retry(run: Run, artifact: ArtifactStatus, names: Collection[str]) -> str:
    """How to make the units that failed or are missing; ``names`` are those of the run's artifacts."""
    again = run.remedy(artifact.name)
    for file in map(Path, artifact.damaged.values()):
        name, unit = file.parent.name, file.stem
        if name in names and unit.isdecimal() and _is_damaged(run, name, int(unit)):
            path = run.tar(name, int(unit))
            return f"{path} is damaged: delete it, regenerate it with {run.remedy(name)}, then run {again}"
    left = len(artifact.failures) or artifact.planned - artifact.done
    if artifact.name.startswith("pretrain/"):
        what = "resumes from its last checkpoint"
    elif artifact.failures:
        what = f"retries the {f'{left} failed units' if left > 1 else 'failed unit'}"
    else:
        what = f"processes the {f'{left} remaining units' if left > 1 else 'remaining unit'}"
    return f"{again}, with the same settings as before: it {what}"


def _is_damaged(run: Run, artifact: str, unit: int) -> bool:
    """Whether a unit still has another checksum than when it was written."""
    try:
        run.verify(artifact, unit)
    except CorruptFile:
        return True
    except (SynthgenError, OSError):  # it is missing: the advice for its own stage covers that
        pass
    return False


def _has_grown(run: Run, artifacts: Sequence[ArtifactStatus]) -> bool:
    """Whether there are more images than the shards were packed from."""
    samples = {artifact.name: artifact.samples for artifact in artifacts}
    if samples.get("images", 0) <= samples["shards"]:
        return False
    try:
        before = run.artifact("shards")["inputs"].get("units of images")
        return before is not None and before != content_hash(run, "images", run.units("images"))
    except (SynthgenError, OSError):  # which the command itself reports
        return False
