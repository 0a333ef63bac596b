"""What is done in a run, what failed and why, and what to do next."""

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
from synthgen.status.artifacts import ArtifactStatus, artifact_status
from synthgen.status.learning import Evaluation, Score, Training, evaluations, training_in
from synthgen.status.reading import finite
from synthgen.status.samples import Counted, Dropped, Shards, finished_shards
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

_UNIT = re.compile(r"\b(images|maps|masks)/(\d{6})\.tar\b")
_ORDER = ("generate", "masks", "shards", "pretrain", "evaluate")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """All that ``synthgen status`` tells."""

    path: Path
    seed: int
    artifacts: tuple[ArtifactStatus, ...]
    labels: tuple[Tally, ...] = ()  # by class, most samples first
    words: tuple[Tally, ...] = ()  # by word, most samples first
    first_dropped: tuple[Dropped, ...] = ()  # the first few words without a mask
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
    counted = Counted()
    for name, entry in entries.items():
        hear = (counted.hear,) if counts and name == "masks" else ()
        artifacts[name] = artifact_status(run, name, entry, artifacts, problems, *hear)
    looked = counts and "masks" in artifacts
    labels, words = counted.ranked(run, problems) if looked else ((), ())
    first = counted.first_dropped(run, problems) if looked else ()
    training = tuple(
        training_in(folder, artifacts.get(f"pretrain/{folder.name}"))
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
        first,
        finished_shards(run, problems),
        training,
        judged,
        tuple(problems),
        _advice(run, found, judged),
    )


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
            again = run.remedy(artifact.name)
            if found := _damaged(run, artifact):
                name, path = found
                return f"{path} is damaged: delete it, make it again with {run.remedy(name)}, then run {again}"
            return f"{again}, with the settings that it was begun with: it {what}"
    made = {artifact.stage for artifact in artifacts if artifact.done}
    done = {"generate" if stage == "attend" else stage for stage in made} | ({"evaluate"} if evaluations else set())
    last = max((_ORDER.index(stage) for stage in done if stage in _ORDER), default=-1)
    if last + 1 == len(_ORDER):
        return f"all stages are done; look at them: synthgen view {shlex.quote(str(run.path))}"
    options = {"generate": "--prompts FILE ", "pretrain": "--method mae "}.get(_ORDER[last + 1], "")
    return f"synthgen {_ORDER[last + 1]} {options}{where}"


def _damaged(run: Run, artifact: ArtifactStatus) -> tuple[str, Path] | None:
    """What a unit failed on, if it is a damaged file that another stage made, and nobody has mended it since."""
    for reason in artifact.failures.values():
        for name, unit in _UNIT.findall(reason) if reason.startswith(CorruptFile.__name__) else ():
            try:
                run.verify(name, int(unit))
            except CorruptFile:
                return name, run.tar(name, int(unit))
            except (SynthgenError, OSError):  # it is gone, which the advice for its own stage is about
                continue
    return None
