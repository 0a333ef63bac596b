"""``python -m tests.faults --moments 100 --seed 0``: the whole campaign, with its figures."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.campaign import Campaign, Moment, Outcome, plan
from tests.faults.zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a kind; may be repeated")
    parser.add_argument("--number", type=int, help="one moment alone, as a failure names it")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    moments = plan(asked.moments, asked.seed, asked.only)
    if asked.number is not None:
        moments = [moment for moment in moments if moment.number == asked.number]
    if not moments:
        parser.error("there is no such moment")
    started = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, Zygote() as zygote:
        campaign = Campaign(Path(folder), zygote, asked.seed)
        for moment in moments:
            outcomes.append(campaign.disturb(moment))
            tell(outcomes[-1])
    seconds = time.monotonic() - started
    wrong = sum(not outcome.well for outcome in outcomes)
    found = figures(outcomes, asked.seed, seconds)
    for name, row in found["kinds"].items():
        print(f"{name:14} {row}")
    print(f"{len(outcomes) - wrong} of {len(outcomes)} moments ended as if undisturbed, in {seconds:.0f} s")
    if asked.out:
        write(asked.out, found)
    return bool(wrong)


def figures(outcomes: Sequence[Outcome], seed: int, seconds: float) -> dict[str, Any]:
    """What is written down: for all, for each kind and for each stage."""

    def count(of: Callable[[Moment], str]) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {}
        for outcome in outcomes:
            row = rows.setdefault(
                of(outcome.moment), {"moments": 0, "equal": 0, "made_twice": 0, "wrong": 0, "seconds": 0}
            )
            row["moments"] += 1
            row["equal"] += outcome.equal
            row["made_twice"] += len(outcome.twice)
            row["wrong"] += bool(outcome.wrong)
            row["seconds"] = round(row["seconds"] + outcome.seconds, 1)
        return rows

    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        **count(lambda moment: "all"),
        "kinds": count(lambda moment: moment.kind),
        "stages": count(lambda moment: moment.place.stage),
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """The figures with date, machine and commit, as the benchmarks write theirs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _common import commit, machine

    record = {
        "figures": found,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def tell(outcome: Outcome) -> None:
    """A line for a moment that ended well, and all that is known of one that did not."""
    print(
        f"{'ok   ' if outcome.well else 'WRONG'} {outcome.moment}  {outcome.seconds:.1f} s  {outcome.said[:200]}",
        flush=True,
    )
    if outcome.wrong:
        print(f"      {outcome.wrong}", flush=True)
    if outcome.twice:
        print(f"      made twice: {', '.join(outcome.twice)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
