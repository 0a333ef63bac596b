import json

import numpy as np
import pytest
import torch

from synthgen import api
from synthgen.backbones.diffusers import Diffusers
from synthgen.codecs import masks_to_labels
from synthgen.config import Choice
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingArtifact, StaleArtifact, UnitsFailed
from synthgen.image import encode_png
from synthgen.prompts import parse_line, sample_seed
from synthgen.records import Request
from synthgen.run import Run
from synthgen.stores.tar import TarWriter
from tests.factories import make_generation


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A tar of drawn images with captions, words and exact masks; nine-digit keys, as a truth set may have."""
    path = tmp_path_factory.mktemp("truth") / "truth.tar"
    with TarWriter(path) as tar:
        for row in range(5):
            words = ("disc", "square") if row == 4 else (("disc", "square")[row % 2],)
            generation, masks = make_generation(words=words, size=32, grid=16, seed=row)
            members = {
                "png": encode_png(generation.image),
                "mask.png": encode_png(masks_to_labels(masks)),
                "txt": generation.request.prompt.text.encode(),
                "json": json.dumps({"words": list(words), "label": words[0]}).encode(),
            }
            tar.add(f"{row:09d}", members)
    return path


@pytest.fixture(scope="module")
def settings(stable_diffusion, truth):
    backbone = Choice("diffusers", {"model": str(stable_diffusion)})
    return {"images": str(truth), "unit_size": 3, "backbone": backbone, "timesteps": (300, 600)}


def test_from_captions_to_the_iou_of_masks(settings, truth, tmp_path):
    run = Run.create(tmp_path / "r")
    assert api.attend(run, engine=Local(workers=1), **settings).samples == 5
    samples = [generation for generation, _ in api.samples(run)]
    assert [one.request.key for one in samples] == [f"{row:09d}" for row in range(5)]
    assert samples[4].maps.words == ("disc", "square")
    assert samples[0].request.prompt.label == "disc"
    api.masks(run, engine=Local(workers=1))
    api.evaluate(run, engine=Local(workers=1), truth=str(truth))
    scores = json.loads((run.path / "evaluate" / "masks.json").read_text())["scores"]["masks"]["mask_iou"]
    assert all(np.isfinite(value) for value in np.ravel([v for v in scores.values() if isinstance(v, float)]))


def test_batches_and_workers_change_nothing_that_matters(settings, tmp_path):
    one, two = Run.create(tmp_path / "one"), Run.create(tmp_path / "two")
    api.attend(one, engine=Local(workers=1), **settings)
    api.attend(two, engine=Local(workers=1), batch_size=1, **settings)
    for (left, _), (right, _) in zip(api.samples(one), api.samples(two), strict=True):
        np.testing.assert_array_equal(left.image, right.image)
        np.testing.assert_allclose(left.maps.weights.astype(float), right.maps.weights.astype(float), atol=2e-4)


def test_the_network_sees_the_noised_latent_once_a_timestep(stable_diffusion):
    model = Diffusers(model=str(stable_diffusion))
    pipeline, seen = model.family.pipeline, []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    model.attend(image, [Request("0", parse_line("a [dog]"), 7)], (100, 900))
    assert [timestep for _, timestep in seen] == [100, 900]
    with torch.inference_mode():
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2) / 127.5 - 1
        latent = pipeline.vae.encode(pixels).latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(7))
    for (noised, timestep), _ in zip(seen, range(2), strict=True):
        kept = pipeline.scheduler.alphas_cumprod[timestep]
        torch.testing.assert_close(noised, kept.sqrt() * latent + (1 - kept).sqrt() * noise)


def test_other_images_are_refused_and_bad_ones_named(settings, tmp_path, truth):
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=Local(workers=1), **settings)
    other = tmp_path / "other.tar"
    with TarWriter(other) as tar:
        tar.add("000000000", {"png": encode_png(np.zeros((8, 8, 3), np.uint8)), "txt": b"a [dog]"})
        tar.add("000000001", {"png": encode_png(np.zeros((8, 8, 3), np.uint8))})
    with pytest.raises(StaleArtifact, match="its input 'images' has changed"):
        api.attend(run, engine=Local(workers=1), **{**settings, "images": str(other)})
    fresh = Run.create(tmp_path / "fresh")
    with pytest.raises(UnitsFailed, match="sample 000000001 has no caption"):
        api.attend(fresh, engine=Local(workers=1), **{**settings, "images": str(other)})
    with pytest.raises(MissingArtifact, match=r"absent\.tar"):
        api.attend(Run.create(tmp_path / "f2"), **{**settings, "images": str(tmp_path / "absent.tar")})
    with pytest.raises(ConfigError, match="timesteps must be"):
        api.attend(run, **{**settings, "timesteps": (1000,)})
    assert sample_seed(0, "000000000") != sample_seed(0, "000000001")
