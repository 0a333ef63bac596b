"""Prompts to shards on a small model of every family, and what becomes of an image that fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from synthgen import api
from synthgen.config import Choice
from synthgen.diffusion.backbone import BLACK, DiffusionBackbone
from synthgen.engines.local import Local
from synthgen.run import Run
from tests import models

LINES = "a photo of a [dog]\na [golden dog] and a [cat]\nthe [park]\n"
HERE = Local(workers=1)  # in this process
MAKERS = {
    "sd2": models.make_stable_diffusion_2,
    "sdxl": models.make_stable_diffusion_xl,
    "sdxl-turbo": partial(models.make_stable_diffusion_xl, turbo=True),
    "sd3": models.make_stable_diffusion_3,
    "sd35": partial(models.make_stable_diffusion_3, medium=True),
    "flux-dev": models.make_flux,
    "flux-schnell": partial(models.make_flux, dev=False),
}


def line(tmp_path: Path, model: Path, **options: Any) -> Run:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(LINES)
    run = Run.create(tmp_path / "run")
    backbone = Choice("diffusers", {"model": str(model), "num_steps": 2, **options})
    api.generate(run, engine=HERE, prompts=str(prompts), backbone=backbone)
    api.masks(run, engine=HERE, refine=Choice("attentioncut"))
    api.shards(run, engine=HERE, val_ratio=0.0)
    return run


def packed(run: Run) -> list[Any]:
    tars = sorted(str(path) for path in run.folder("shards").glob("train/*.tar"))
    return list(wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "json", "mask.png"))


@pytest.mark.parametrize("name", MAKERS)
def test_the_line(name: str, tmp_path: Path) -> None:
    distilled = {"num_steps": 1, "guidance_scale": 0.0} if name in ("sdxl-turbo", "flux-schnell") else {}
    samples = packed(line(tmp_path, MAKERS[name](tmp_path / "model"), height=64, width=96, **distilled))
    assert len(samples) == 3
    for image, meta, mask in samples:
        assert image.size == mask.size == (96, 64)
        assert np.asarray(mask).max() <= len(meta["words"])


def blacken(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Let every image whose prompt has this word come out black."""
    sample = DiffusionBackbone.sample

    def spoilt(self: Any, texts: list[str], *args: Any, **kwargs: Any) -> Any:
        images, recorder = sample(self, texts, *args, **kwargs)
        images[[word in text for text in texts]] = 0
        return images, recorder

    monkeypatch.setattr(DiffusionBackbone, "sample", spoilt)


def test_a_failed_image_is_left_out_with_its_reason(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blacken(monkeypatch, "cat")
    run = line(tmp_path, stable_diffusion)
    mark = run.mark("images", 0)
    assert mark["failed"] == {"0000000001": BLACK}
    assert (mark["count"], mark["notes"]) == (2, {"failed samples": 1})
    assert sorted(meta["prompt"] for _, meta, _ in packed(run)) == ["a photo of a dog", "the park"]


def test_a_unit_without_one_good_image_fails(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blacken(monkeypatch, "")
    with pytest.raises(Exception, match="failed"):
        line(tmp_path, stable_diffusion)
    assert BLACK in (tmp_path / "run" / "images" / "000000.failed.json").read_text()
