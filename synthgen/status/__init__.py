"""What is done in a run, what failed and why, and what to run next."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthgen.errors import CorruptFile, SynthgenError
from synthgen.run import Run
from synthgen.stages._units import content_of
from synthgen.status.artifacts import ArtifactStatus, artifact_status
from synthgen.status.learning import Evaluation, Score, Training, evaluations, training_in
from synthgen.status.reading import finite
from synthgen.status.samples import Counted, Dropped, Shards, finished_shards
from synthgen.tallies import CUT_OFF, Tally, kind_of

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

_UNIT = re.compile(r"\b(images|maps|masks)/(\d{6})\.tar\b")
_ORDER = ("generate", "masks", "shards", "pretrain")  # and evaluate, of which there is no artifact


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
    def num_failed(self) -> int:
        """Failed units; a unit of two artifacts counts once."""
        return len({(artifact.stage, unit) for artifact in self.artifacts for unit in artifact.failures})

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped masks by kind of reason, most frequent first; words that were cut off never had one."""
        counts = Counter[str]()
        for tally in self.words:
            counts.update(tally.dropped)
        del counts[kind_of(CUT_OFF)]
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def words_cut_off(self) -> int:
        """Words without a mask because no text encoder reads as far as they stand."""
        return sum(tally.dropped.get(kind_of(CUT_OFF), 0) for tally in self.words)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data for JSON; NaN and infinity become None."""
        more = {"path": str(self.path), "dropped": self.dropped, "words_cut_off": self.words_cut_off}
        value: dict[str, Any] = finite(asdict(self) | more)
        return value


def status(run: Run, *, counts: bool = True) -> RunStatus:
    """The status of a run; nothing is changed, and unreadable files are listed in ``problems`` instead of raised.

    Only done marks are read; with ``counts`` also the tars of masks whose marks have no tallies by class and word.
    """
    problems: list[str] = []
    artifacts: dict[str, ArtifactStatus] = {}
    entries = run.manifest()["artifacts"]
    counted = Counted()
    for name, entry in entries.items():
        hear = (counted.hear,) if counts and name == "masks" else ()
        artifacts[name] = artifact_status(run, name, entry, artifacts, problems, *hear)
    has_masks = counts and "masks" in artifacts
    labels, words = counted.ranked(run, problems) if has_masks else ((), ())
    first = counted.first_dropped(run, problems) if has_masks else ()
    training = tuple(
        training_in(folder, artifacts.get(f"pretrain/{folder.name}"))
        for folder in sorted(run.folder("pretrain").glob("*/"))
    )
    found_scores = evaluations(run, problems)
    found = tuple(artifacts.values())
    return RunStatus(
        run.path,
        run.seed,
        found,
        labels,
        words,
        first,
        finished_shards(run, problems),
        training,
        found_scores,
        tuple(problems),
        _advice(run, found, any(one.done for one in training), found_scores),
    )


def _advice(run: Run, artifacts: Sequence[ArtifactStatus], has_encoder: bool, evaluations: Sequence[Evaluation]) -> str:
    where = f"--run {shlex.quote(str(run.path))}"
    for artifact in artifacts:
        if artifact.name == "shards" and _has_grown(run, artifacts):
            again = run.remedy("shards")
            return f"delete {run.folder('shards')} and run: {again}, as there are more images than it was packed from"
        if artifact.failures or artifact.done < artifact.planned:
            left = len(artifact.failures) or artifact.planned - artifact.done
            what = f"processes the {f'{left} remaining units' if left > 1 else 'remaining unit'}"
            if artifact.name.startswith("pretrain/"):
                what = "resumes from its last checkpoint"
            elif artifact.failures:
                what = f"retries the {f'{left} failed units' if left > 1 else 'failed unit'}"
            again = run.remedy(artifact.name)
            if found := _damaged(run, artifact):
                name, path = found
                return f"{path} is damaged: delete it, regenerate it with {run.remedy(name)}, then run {again}"
            return f"{again}, with the same settings as before: it {what}"
    made = {artifact.stage for artifact in artifacts if artifact.done}
    done = {"generate" if stage == "attend" else stage for stage in made} | ({"pretrain"} if has_encoder else set())
    last = max((_ORDER.index(stage) for stage in done if stage in _ORDER), default=-1)
    of_models = any(score.of != "masks" for evaluation in evaluations for score in evaluation.scores)
    if (has_encoder and of_models) or (not done and evaluations):
        return f"all stages are done; to see the results: synthgen view {shlex.quote(str(run.path))}"
    stage = (*_ORDER, "evaluate")[last + 1]
    options = {"generate": "--prompts FILE ", "pretrain": "--method mae "}.get(stage, "")
    return f"synthgen {stage} {options}{where}"


def _has_grown(run: Run, artifacts: Sequence[ArtifactStatus]) -> bool:
    """Whether the images are more than the shards have, and not those that the shards are packed from."""
    samples = {artifact.name: artifact.samples for artifact in artifacts}
    if samples.get("images", 0) <= samples["shards"]:
        return False
    try:
        before = run.artifact("shards")["inputs"].get("units of images")
        return before is not None and before != content_of(run, "images", run.units("images"))
    except (SynthgenError, OSError):  # which the command itself reports
        return False


def _damaged(run: Run, artifact: ArtifactStatus) -> tuple[str, Path] | None:
    """The damaged file of an earlier stage that a unit failed on, if it is still damaged."""
    for reason in artifact.failures.values():
        for name, unit in _UNIT.findall(reason) if reason.startswith(CorruptFile.__name__) else ():
            try:
                run.verify(name, int(unit))
            except CorruptFile:
                return name, run.tar(name, int(unit))
            except (SynthgenError, OSError):  # it is missing: the advice for its own stage covers that
                continue
    return None
