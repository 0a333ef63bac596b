"""Measure which objects the model generates recognisably: ``python -m synthgen.tiny.recognised``.

``--recognised`` of :mod:`synthgen.tiny.train` then samples the others more often. The seeds are different from those
of every reported figure.
"""

import argparse
import json
from pathlib import Path

from synthgen.prompts import sample_seed
from synthgen.records import Request, sample_key
from synthgen.tiny import WEIGHTS, score
from synthgen.tiny.classifier import Classifier
from synthgen.tiny.compositor import Names

__all__ = ["FACTOR_ALWAYS", "FACTOR_NEVER", "recognition_rates", "sampling_factors"]

SEED = 100  # of the first image of each object; later images count up from it
BATCH_SIZE = 16
FACTOR_ALWAYS, FACTOR_NEVER = 0.5, 4.0  # on the sampling probability of objects that are always and never recognised


def recognition_rates(weights: Path, classifier: Classifier, names: tuple[str, ...], times: int) -> dict[str, float]:
    """For each object, the share of ``times`` images of it alone in which the classifier recognises it."""
    model = score.backbone(weights)
    counts = dict.fromkeys(names, 0)
    keys = [sample_key(0, row) for row in range(len(names))]
    for seed in range(SEED, SEED + times):
        requests = [
            Request(key, score.photo_prompt(name), sample_seed(seed, key))
            for key, name in zip(keys, names, strict=True)
        ]
        for start in range(0, len(names), BATCH_SIZE):
            images = [generation.image for generation in model.generate(requests[start : start + BATCH_SIZE])]
            predicted = score.classify(classifier, images)
            for name, found in zip(names[start : start + BATCH_SIZE], predicted, strict=True):
                counts[name] += name == found
    return {name: round(count / times, 3) for name, count in counts.items()}


def sampling_factors(rates: dict[str, float], names: tuple[str, ...]) -> list[float]:
    """The factor on the sampling probability of each object: linear in its rate; 1 for an object without a rate."""
    return [FACTOR_NEVER + (FACTOR_ALWAYS - FACTOR_NEVER) * rates[name] if name in rates else 1.0 for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m synthgen.tiny.recognised", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a pipeline; default: the shipped one")
    parser.add_argument("--classifier", type=Path, required=True, help="file that synthgen.tiny.classifier wrote")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--times", type=int, default=6, help="images per object")
    args = parser.parse_args()
    rates = recognition_rates(args.weights, Classifier.load(args.classifier), Names.load().own, args.times)
    args.out.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
    print(f"recognised: {sum(rates.values()) / len(rates):.3f} of the images of {len(rates)} objects")


if __name__ == "__main__":
    main()
