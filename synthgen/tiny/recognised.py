"""Count which objects the model draws so that they are recognised: ``python -m synthgen.tiny.recognised``.

Continued training should see the least recognised objects most often: see ``--recognised`` of
:mod:`synthgen.tiny.train`. The images are of other seeds than those of any reported figure.
"""

import argparse
import json
from pathlib import Path

from synthgen.prompts import sample_seed
from synthgen.records import Request, sample_key
from synthgen.tiny import WEIGHTS, score
from synthgen.tiny.classifier import Classifier
from synthgen.tiny.compositor import Names

__all__ = ["HARDEST", "MASTERED", "emphasis", "recognised"]

SEED = 100  # of the first image of each object; the next ones count up
BATCH = 16
MASTERED = 0.5  # how often an object is drawn that was always recognised, against how often it would be
HARDEST = 4.0  # and one that never was


def recognised(weights: Path, classifier: Classifier, names: tuple[str, ...], times: int) -> dict[str, float]:
    """For each object the share of ``times`` images of it alone in which the classifier sees it."""
    model = score.backbone(weights)
    counts = dict.fromkeys(names, 0)
    for time in range(times):
        keys = [sample_key(0, row) for row in range(len(names))]
        requests = [
            Request(key, score.photo(name), sample_seed(SEED + time, key))
            for key, name in zip(keys, names, strict=True)
        ]
        for start in range(0, len(names), BATCH):
            images = [generation.image for generation in model.generate(requests[start : start + BATCH])]
            shown = score.classified(classifier, images)
            for name, seen in zip(names[start : start + BATCH], shown, strict=True):
                counts[name] += name == seen
    return {name: round(count / times, 3) for name, count in counts.items()}


def emphasis(shares: dict[str, float], names: tuple[str, ...]) -> list[float]:
    """How much more often each object should be drawn; an object without a share as often as ever."""
    return [HARDEST + (MASTERED - HARDEST) * shares[name] if name in shares else 1.0 for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m synthgen.tiny.recognised", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="a pipeline's folder; default: the shipped one")
    parser.add_argument("--classifier", type=Path, required=True, help="what synthgen.tiny.classifier wrote")
    parser.add_argument("--out", type=Path, required=True, help="a json file")
    parser.add_argument("--times", type=int, default=6, help="images of each object")
    args = parser.parse_args()
    shares = recognised(args.weights, Classifier.load(args.classifier), Names.load().own, args.times)
    args.out.write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    print(f"recognised: {sum(shares.values()) / len(shares):.3f} of the images of {len(shares)} objects")


if __name__ == "__main__":
    main()
