"""Detection on images with boxes and no masks, and the errors where there are neither."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.image import encode_png
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages._eval_sources import Source, used_samples
from synthgen.stages.evaluate import Evaluate
from synthgen.stores.tar import TarWriter
from tests.stages.test_evaluate import ONE, result

pytest.importorskip("pycocotools")

QUICK = {"seeds": 1, "steps": 20, "batch_size": 8, "width": 16, "learning_rate": 0.02}
DETECTION, SEGMENTATION = Choice("detection", QUICK), Choice("segmentation", {"seeds": 1, "steps": 1, "width": 16})
SIDE = 16


def write_boxed(path: Path, count: int = 8, masks: int = 0, bare: int = 0, **told: object) -> str:
    """Bright squares with a box each; the first ``masks`` have a mask too, and ``bare`` more have neither."""
    with TarWriter(path) as tar:
        for number in range(count + bare):
            pixels, mask = np.full((SIDE, SIDE, 3), 30, np.uint8), np.zeros((SIDE, SIDE), np.uint8)
            left, top = 2 * (number % 4), 2 * (number // 4 % 4)
            inside = (slice(top, top + 8), slice(left, left + 8))
            pixels[inside], mask[inside] = 250, 1
            about = {"words": ["Square"], **told}
            about |= {"boxes": [["Square", left, top, 8, 8]]} if number < count else {}
            members = {"png": encode_png(pixels), "json": json.dumps(about).encode()}
            tar.add(f"{number:04d}", members | ({"mask.png": encode_png(mask)} if number < masks else {}))
    return str(path)


@pytest.fixture
def asked(tmp_path: Path) -> dict:
    """An encoder that nobody trained, alone."""
    torch.manual_seed(0)
    config = EncoderConfig(image_size=SIDE, patch_size=4, dim=16, depth=1, num_heads=2)
    save_encoder(VisionTransformer(config), tmp_path / "enc")
    return {"encoder": str(tmp_path / "enc"), "evaluators": (DETECTION,), "label": "found", "baselines": False}


def test_detection_on_boxes_alone(asked, tmp_path):
    asked |= {name: write_boxed(tmp_path / f"{name}.tar", bare=2) for name in ("train", "test")}
    run = Run.create(tmp_path / "run")
    run_stage(Evaluate(**asked | {"baselines": True}), run, ONE)
    found = result(run, "found")
    told = {"images": 8, "images_with_masks": 0, "images_with_boxes_only": 8, "mask_classes": 1}
    assert (found["train"], found["test"]) == (told, told)
    numbers = found["scores"]["pixels"]["detection"]
    assert (numbers["boxes"], numbers["images"], numbers["classes"]) == (8, 8, 1)
    assert numbers["ap50"] > 0.3  # bright squares, read off their colours
    assert "few test images with masks or boxes (8): the intervals are wide" in found["warnings"]


def test_only_images_with_masks_count_if_pixels_are_needed(asked, tmp_path):
    asked |= {name: write_boxed(tmp_path / f"{name}.tar", masks=5) for name in ("train", "test")}
    run = Run.create(tmp_path / "run")
    run_stage(Evaluate(**asked | {"evaluators": (DETECTION, SEGMENTATION), "label": "both"}), run, ONE)
    both = result(run, "both")
    assert both["test"] == {"images": 5, "images_with_masks": 5, "mask_classes": 1}
    assert both["scores"]["enc"]["detection"]["images"] == both["scores"]["enc"]["segmentation"]["images"] == 5


def test_missing_boxes_and_masks_are_named(asked, tmp_path):
    good, bare = write_boxed(tmp_path / "good.tar"), write_boxed(tmp_path / "bare.tar", 0, bare=3)
    run = Run.create(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no image of .*bare.tar has masks or boxes; give --test tars with boxes in"):
        run_stage(Evaluate(**asked, train=good, test=bare), run, ONE)
    with pytest.raises(
        ConfigError, match=r"no image of .*good.tar has masks; give --train tars with mask.png and json"
    ):
        run_stage(Evaluate(**asked | {"evaluators": (SEGMENTATION,)}, train=good, test=good), run, ONE)


def test_classes_of_boxes_may_be_labels(asked, tmp_path):
    """Of images whose boxes are all of one word."""
    train, test = write_boxed(tmp_path / "train.tar", label="thing"), write_many(tmp_path / "many.tar")
    run = Run.create(tmp_path / "run")
    run_stage(Evaluate(**asked, train=train, test=test, mask_classes="label"), run, ONE)
    found = result(run, "found")
    assert found["scores"]["enc"]["detection"]["classes"] == 1
    warning = "3 of 6 test images with masks or boxes are left out: they have no label, or not exactly one word"
    assert warning in found["warnings"]


def write_many(path: Path) -> str:
    """Images with boxes of one word, or of two."""
    with TarWriter(path) as tar:
        for number in range(6):
            boxes = [["Square", 2, 2, 8, 8], ["other" if number % 2 else "Square", 9, 9, 5, 5]]
            about = {"words": [], "label": "thing", "boxes": boxes}
            pixels = np.full((SIDE, SIDE, 3), 40 * number, np.uint8)
            tar.add(f"{number:04d}", {"png": encode_png(pixels), "json": json.dumps(about).encode()})
    return str(path)


def test_images_with_masks_or_boxes_are_used(tmp_path):
    source = Source("test", write_boxed(tmp_path / "test.tar", masks=5, bare=2))
    for needs, count in (({"boxes"}, 8), ({"patches"}, 5), ({"boxes", "patches"}, 5), ({"features"}, 0)):
        assert len(used_samples(source, needs)) == count
