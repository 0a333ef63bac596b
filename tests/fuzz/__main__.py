"""``python -m tests.fuzz --inputs 10000 --seed 0``: the whole campaign, with its figures."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.campaign import campaign

ROOM = 3 * 2**30  # bytes of address space that reading may take beyond what is there when it begins


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a reader; may be repeated")
    parser.add_argument("--number", type=int, help="one input alone, as a failure names it")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where inputs that go wrong are put")
    asked = parser.parse_args()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM,) * 2)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = campaign(
            Path(folder) / "box",
            inputs=asked.inputs,
            seed=asked.seed,
            only=asked.only,
            number=asked.number,
            keep=asked.keep,
        )
    print(f"{'reader':16} {'read':>6} {'refused':>8} {'worst, s':>9}  refused as")
    for one in outcomes:
        kinds = ", ".join(f"{name} {count}" for name, count in one.refused.most_common())
        print(f"{one.name:16} {one.read:6} {one.refused.total():8} {one.worst:9.3f}  {kinds}")
    read, refused = sum(one.read for one in outcomes), sum((one.refused for one in outcomes), Counter())
    wrong = [line for one in outcomes for line in one.wrong]
    print(f"{'all':16} {read:6} {refused.total():8} {max(one.worst for one in outcomes):9.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"seed {asked.seed}; {time.process_time() - started:.0f} s of processor time; at most {peak:.0f} MiB of memory"
    )
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{len(wrong)} of {asked.inputs if asked.number is None else len(outcomes)} inputs went wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
