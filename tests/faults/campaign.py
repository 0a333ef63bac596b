"""Moments drawn by the seed, one after another: the command is disturbed, run again, and must end as if undisturbed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.kinds import KINDS
from tests.faults.line import LINES, done_twice, finished, prepare, sums
from tests.faults.scene import Late, Place, Scene, Undisturbed, Wrong, run_undisturbed
from tests.faults.zygote import Zygote

__all__ = ["Campaign", "Moment", "Outcome", "plan"]

TRIES = 5  # a moment that comes too late is tried again at a quarter of its share


@dataclass(frozen=True)
class Moment:
    """What happens, where and when."""

    number: int
    kind: str
    place: Place
    share: float  # of the stage's time, of the room it needs, or of the file's length; in [0, 1)

    def __str__(self) -> str:
        target = f" ({self.place.target})" if self.place.target else ""
        return f"{self.number:3} {self.kind:12} {self.place.line} {self.place.stage}{target} at {self.share:.3f}"


@dataclass
class Outcome:
    """What became of a moment."""

    moment: Moment
    said: str = ""  # what the disturbed command ended with
    equal: bool = False  # every file in the end is the one of the undisturbed run
    twice: list[str] = field(default_factory=list)  # finished work that was made again
    wrong: str = ""  # what else must not be
    seconds: float = 0.0

    @property
    def well(self) -> bool:
        """Whether all of it is as it must be."""
        return self.equal and not self.twice and not self.wrong


def plan(moments: int, seed: int, only: Sequence[str] = ()) -> list[Moment]:
    """So many moments, dealt out to the kinds that this machine can do by their weights, and to the places of each."""
    kinds = {name: kind for name, kind in KINDS.items() if (not only or name in only) and kind.available()}
    counts = _dealt(moments, {name: kind.WEIGHT for name, kind in kinds.items()})
    drawn: list[Moment] = []
    for name, count in counts.items():
        places = kinds[name].PLACES
        for turn in range(count):
            share = Random(f"{seed}:{name}:{turn}").random()
            drawn.append(Moment(len(drawn), name, places[turn % len(places)], share))
    return drawn


def _dealt(total: int, weights: dict[str, int]) -> dict[str, int]:
    """``total`` in proportion to the weights, whole, the largest remainders first."""
    whole = sum(weights.values())
    counts = {name: total * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % whole))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class Campaign:
    """Disturbs a run at one moment after another; ``box`` is an empty folder to do it in."""

    def __init__(self, box: Path, zygote: Zygote, seed: int = 0) -> None:
        self.box, self.zygote, self.seed = box, zygote, seed
        self._undisturbed: dict[str, Undisturbed] = {}  # by the name of the line
        prepare(box)

    def disturb(self, moment: Moment) -> Outcome:
        """Disturb a run at this moment, and run the command again."""
        name = moment.place.line
        if name not in self._undisturbed:
            self._undisturbed[name] = run_undisturbed(LINES[name], self.box, self.zygote)
        started = time.monotonic()
        outcome = _disturbed(moment, self._undisturbed[name], self.zygote, self.box, self.seed)
        outcome.seconds = time.monotonic() - started
        return outcome


def _disturbed(moment: Moment, whole: Undisturbed, zygote: Zygote, box: Path, seed: int) -> Outcome:
    outcome = Outcome(moment)
    for attempt in range(TRIES):
        share = moment.share / 4**attempt
        scene = Scene(whole, zygote, box / f"moment-{moment.number:03d}", Random(f"{seed}:{moment}"), share)
        scene.restore(moment.place.stage)
        try:
            outcome.said = KINDS[moment.kind].strike(scene, moment.place)
            _judge(scene, outcome)
            return outcome
        except Late:
            continue
        except Wrong as error:
            outcome.wrong = str(error)
            return outcome
        finally:
            scene.close()
    outcome.wrong = f"the command had ended {TRIES} times before it could be disturbed"
    return outcome


def _judge(scene: Scene, outcome: Outcome) -> None:
    """Run the command again, and compare."""
    before = finished(scene.run)
    ended = scene.mend()
    if ended.status:
        outcome.wrong = f"run again, it ended with {ended.status}: {ended.said[-2000:]}"
        return
    scene.fetch()
    after = finished(scene.run)
    found = sums(scene.run)
    outcome.equal = found == scene.whole.sums
    if not outcome.equal:
        names = {**found, **scene.whole.sums}
        differing = sorted(name for name in names if found.get(name) != scene.whole.sums.get(name))
        outcome.wrong = f"not as in the undisturbed run: {', '.join(differing)}"
    changed = [name for name, identity in before.items() if after.get(name, identity) != identity]
    outcome.twice = sorted(name for name in changed if not scene.spared(name))
    told = [unit for unit in done_twice(scene.run) if not scene.spared_in_logs(*unit)]
    outcome.twice += [f"{stage} {unit:06d}, by its log" for stage, unit in told]
    left = sorted(path.relative_to(scene.run).as_posix() for path in scene.run.rglob(".*.tmp"))
    if left and not outcome.wrong:
        outcome.wrong = f"half written files were left: {', '.join(left)}"
