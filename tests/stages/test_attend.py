"""Images that exist: from their captions to masks, shards and exports, the same every time, whatever is killed."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from synthgen import api
from synthgen.backbones.diffusers import Diffusers
from synthgen.backbones.tiny import Tiny
from synthgen.codecs import masks_to_labels
from synthgen.config import Choice
from synthgen.datasets import FolderDataset, open_masks
from synthgen.diffusion import StableDiffusion
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, MissingArtifact, PromptError, StaleArtifact, SynthgenError, UnitsFailed
from synthgen.image import encode_png
from synthgen.prompts import parse_line, sample_seed
from synthgen.records import Request
from synthgen.run import Run
from synthgen.stages import make_stage
from synthgen.stages.attend import Attend, fit_size, shrink
from synthgen.status import status
from synthgen.stores.tar import TarWriter, read_tar
from synthgen.tiny import compositor
from synthgen.tiny.truth import write_truth
from tests.factories import make_generation, make_run
from tests.tiny_data import NAMES, make_data

HERE = Local(workers=1)
SHAPES = ((32, 32), (24, 32), (32, 16), (24, 32), (32, 32))  # height and width


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A tar of drawn images of several shapes with captions, words and exact masks; keys as a truth set may have."""
    path = tmp_path_factory.mktemp("truth") / "truth.tar"
    with TarWriter(path) as tar:
        for row, (height, width) in enumerate(SHAPES):
            words = ("disc", "square") if row == 4 else (("disc", "square")[row % 2],)
            generation, masks = make_generation(words=words, size=32, grid=16, seed=row)
            top, left = (32 - height) // 2, (32 - width) // 2
            part = slice(top, top + height), slice(left, left + width)
            members = {
                "png": encode_png(np.ascontiguousarray(generation.image[part])),
                "mask.png": encode_png(np.ascontiguousarray(masks_to_labels(masks)[part])),
                "txt": generation.request.prompt.text.encode(),
                "json": json.dumps({"words": list(words), "label": words[0]}).encode(),
            }
            tar.add(f"{row:09d}", members)
    return path


@pytest.fixture(scope="module")
def settings(stable_diffusion, truth):
    backbone = Choice("diffusers", {"model": str(stable_diffusion)})
    return {"images": str(truth), "unit_size": 3, "backbone": backbone, "timesteps": (300, 600)}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("runs") / "r")
    api.attend(run, engine=HERE, **settings)
    return run


@pytest.fixture(scope="module")
def photos(truth, tmp_path_factory):
    """The same images as a folder: classes, a table, and a text beside the image that it does not name."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for row, (_, members) in enumerate(read_tar(truth)):
        name = f"shapes/{row}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(members["png"])
        if row == 4:
            (folder / name).with_suffix(".txt").write_bytes(members["txt"])
        else:
            rows.append({"file_name": name, "text": members["txt"].decode()})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sums(run, *artifacts):
    return {
        path.relative_to(run.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for artifact in artifacts
        for path in sorted(run.folder(artifact).glob("**/*.tar"))
    }


# -- what is recorded


def test_samples_are_the_images_as_they_were(finished, truth):
    samples = [generation for generation, _ in api.samples(finished)]
    assert [one.request.key for one in samples] == [f"{unit:06d}{row:04d}" for unit, row in np.ndindex(2, 3)][:5]
    assert [one.request.source for one in samples] == [f"{row:09d}" for row in range(5)]
    assert [one.image.shape[:2] for one in samples] == list(SHAPES)
    for one, (_, members) in zip(samples, read_tar(truth), strict=True):
        assert encode_png(one.image) == members["png"]
        assert one.request.prompt.text == members["txt"].decode()
    assert samples[4].maps.words == ("disc", "square")
    assert samples[0].request.prompt.label == "disc"
    shapes = [one.maps.weights.shape[1:] for one in samples]
    assert [rows / columns for rows, columns in shapes] == pytest.approx([1, 0.75, 2, 0.75, 1], rel=0.2)


def test_batches_change_nothing_that_matters(finished, settings, tmp_path):
    other = Run.create(tmp_path / "r")
    api.attend(other, engine=HERE, batch_size=1, **settings)
    for (left, _), (right, _) in zip(api.samples(finished), api.samples(other), strict=True):
        np.testing.assert_array_equal(left.image, right.image)
        np.testing.assert_allclose(left.maps.weights.astype(float), right.maps.weights.astype(float), atol=2e-4)


def test_stretched_images_have_the_models_size(settings, tmp_path):
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=HERE, fit="stretch", limit=3, max_side=20, **settings)
    samples = [generation for generation, _ in api.samples(run)]
    assert [one.maps.weights.shape for one in samples] == [(1, 8, 8)] * 3
    assert [one.image.shape[:2] for one in samples] == [(20, 20), (15, 20), (20, 10)]


@pytest.mark.parametrize(
    ("shape", "size", "multiple", "expected"),
    [
        ((480, 640), (512, 512), 32, (448, 576)),
        ((640, 480), (512, 512), 32, (576, 448)),
        ((100, 100), (512, 512), 32, (512, 512)),
        ((10, 1000), (512, 512), 32, (352, 736)),  # 2 : 1 at most
        ((1, 1), (40, 80), 8, (56, 56)),
        ((300, 600), (40, 80), 16, (40, 80)),  # the model's own size, as it is
        ((86, 128), (128, 128), 16, (112, 160)),
    ],
)
def test_fit_size_keeps_proportions_up_to_two_to_one(shape, size, multiple, expected):
    assert fit_size(shape, size, multiple) == expected


def test_photos_are_not_kept_in_memory_at_full_size(settings, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(6):
        Image.new("RGB", (90 - row, 60)).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text("a [dog]")
    read, decoded, alive = FolderDataset.__getitem__, [], []

    def reads(self, index):
        alive.append(sum(image() is not None for image in decoded))
        sample = read(self, index)
        decoded.append(weakref.ref(sample.image))
        return sample

    monkeypatch.setattr(FolderDataset, "__getitem__", reads)
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=HERE, max_side=48, batch_size=1, **settings | {"images": str(folder), "unit_size": 6})
    assert alive == [0] * 6
    assert [one.image.shape for one, _ in api.samples(run)] == [(round(60 * 48 / (90 - n)), 48, 3) for n in range(6)]


def test_large_images_are_stored_smaller():
    image = np.zeros((30, 300, 3), np.uint8)
    assert shrink(image, 0) is shrink(image, 300) is image
    assert shrink(image, 100).shape == (10, 100, 3)
    assert shrink(np.zeros((1, 300, 3), np.uint8), 100).shape == (1, 100, 3)


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


def test_the_shipped_model_inverts_its_own_image():
    """40 steps there and back by DDIM, without guidance: the decoded image comes back with a PSNR above 22 dB."""
    model = Tiny()
    request = Request("0000000000", parse_line("a photo of a [panda]"), 1)
    (drawn,) = model.generate([request])
    (inverted,) = model.attend(drawn.image[None], [request], (), inversion_steps=4)
    assert inverted.maps.weights.shape == drawn.maps.weights.shape
    pipeline = model.pipeline
    with torch.inference_mode():
        latent = model.encode(torch.tensor(drawn.image[None]))
        denoise = model.casting_denoiser([request.prompt.text], latent)
        found = model.invert(latent, denoise, 40)
        assert 0.7 < float(found.std()) < 1.3  # nearly noise
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading")
        scheduler.set_timesteps(40)
        for timestep in scheduler.timesteps:
            found = scheduler.step(denoise(found, float(timestep)), timestep, found).prev_sample
        images = pipeline.vae.decode(torch.cat([latent, found]) / pipeline.vae.config.scaling_factor).sample
    first, second = images.clamp(-1, 1) / 2
    assert -10 * float((first - second).square().mean().log10()) > 22


# -- the line


def test_from_captions_to_the_iou_of_masks(finished, truth, tmp_path):
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=HERE, **finished.artifact("images")["settings"] | {"images": str(truth)})
    assert "synthgen masks" in status(run).advice
    api.masks(run, engine=HERE, min_area=0.0, max_area=1.0)
    for generation, masks in api.samples(run):
        assert masks.values.shape[1:] == generation.image.shape[:2]
    api.evaluate(run, engine=HERE, truth=str(truth))
    scores = json.loads((run.path / "evaluate" / "masks.json").read_text())["scores"]["masks"]["mask_iou"]
    assert (scores["images"], scores["words"]) == (5, 6)
    assert 0 < scores["mean_iou"] < 1


def test_held_out_composites_are_judged_by_their_own_masks(stable_diffusion, tmp_path, monkeypatch):
    monkeypatch.setattr(compositor.Names, "load", classmethod(lambda cls: NAMES))
    monkeypatch.setattr(compositor, "IMAGE_SIZE", 32)
    tar = write_truth(make_data(tmp_path / "data"), tmp_path / "truth", 4)
    run = Run.create(tmp_path / "r")
    backbone = Choice("diffusers", {"model": str(stable_diffusion)})
    api.attend(run, engine=HERE, images=str(tar), backbone=backbone, inversion_steps=3)
    api.masks(run, engine=HERE, refine=Choice("attentioncut"), min_area=0.0, max_area=1.0)
    api.evaluate(run, engine=HERE, truth=str(tar))
    scores = json.loads((run.path / "evaluate" / "masks.json").read_text())["scores"]["masks"]["mask_iou"]
    assert scores["images"] == 4


def test_a_folder_is_attended_masked_packed_and_exported(photos, settings, tmp_path):
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=HERE, **settings | {"images": str(photos)})
    api.masks(run, engine=HERE, min_area=0.0, max_area=1.0)
    api.shards(run, engine=HERE, val_ratio=0.0, image_format="png")
    described = json.loads((run.folder("shards") / "dataset.json").read_text())
    assert (described["made_by"], described["classes"]) == ("attend", ["shapes"])
    assert "licence of where they come from" in described["licence"]
    card = (run.folder("shards") / "README.md").read_text()
    assert "5 existing images with captions, with a mask for each marked word" in card
    assert "synthetic" not in card
    packed = dict(read_tar(run.folder("shards") / "train" / "000000.tar"))
    truth = {f"shapes/{row}": (photos / f"shapes/{row}.png").read_bytes() for row in range(5)}
    metas = {key: json.loads(members["json"]) for key, members in packed.items()}
    assert {meta["source"]: packed[key]["png"] for key, meta in metas.items()} == truth
    masks = open_masks(run.folder("shards") / "train")
    assert {key: (meta["height"], meta["width"]) for key, meta in metas.items()} == {
        key: masks[key].values.shape[1:] for key in masks
    }
    page = api.view(run).read_text()
    assert "a photo of a disc" in page or "disc" in page
    assert status(run).shards.splits == {"train": 5}
    api.export_dataset(run, "coco")
    images = json.loads((run.path / "export-coco/annotations/instances.json").read_text())["images"]
    assert [(image["height"], image["width"]) for image in images] == list(SHAPES)
    assert '"source":"shapes/3"' in page.replace(" ", "")
    for form in ("yolo", "labels"):
        assert api.export_dataset(run, form).samples == 5
    for form in ("coco", "yolo", "labels"):
        with (run.path / f"export-{form}" / "sources.csv").open(newline="") as file:
            named = {row["source"]: row["key"] for row in csv.DictReader(file)}
        assert named == {meta["source"]: key for key, meta in metas.items()}


def test_classes_are_those_of_the_images_after_a_failed_generate(photos, settings, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a [dog]\n")
    run = Run.create(tmp_path / "r")
    with pytest.raises(SynthgenError):
        api.generate(
            run, engine=HERE, prompts=str(tmp_path / "prompts.txt"), backbone=Choice("diffusers", {"model": ""})
        )
    assert (run.path / "prompts.jsonl").is_file()
    api.attend(run, engine=HERE, **settings | {"images": str(photos)})
    api.shards(run, engine=HERE, val_ratio=0.0, masks=False)
    assert json.loads((run.folder("shards") / "dataset.json").read_text())["classes"] == ["shapes"]


def test_shards_of_our_own_are_images_with_captions(settings, tmp_path):
    made = make_run(tmp_path / "made", units=1, unit_size=4, image_size=32)
    api.shards(made, engine=HERE, val_ratio=0.0, shuffle=False)
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=HERE, **settings | {"images": str(made.folder("shards") / "train")})
    for (old, _), (new, _) in zip(api.samples(made), api.samples(run), strict=True):
        assert new.request.prompt == old.request.prompt
        assert new.request.source == old.request.key


# -- again, on two workers, and after a kill


@pytest.mark.slow  # as of generate, in test_generate
def test_two_workers_give_the_same_bytes(finished, settings, tmp_path):
    run = Run.create(tmp_path / "r")
    api.attend(run, engine=Local(workers=2), **settings)
    assert sums(run, "images", "maps") == sums(finished, "images", "maps")


@pytest.mark.slow  # quick ones kill generate, and the whole line in tests/faults
def test_a_killed_command_is_finished_by_the_same_command(settings, photos, tmp_path):
    table, model = str(photos / "metadata.jsonl"), settings["backbone"].options["model"]
    command = [
        sys.executable, "-m", "synthgen", "attend", "--images", str(photos), "--metadata", table, "--model", model,
        "--inversion-steps", "30", "--set", "unit_size=1", "--workers", "1", "--run",
    ]  # fmt: skip
    run = tmp_path / "killed"
    process = subprocess.Popen([*command, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "maps" / "000000.json").exists():
        assert process.poll() is None or (run / "maps" / "000000.json").exists()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = len(list((run / "maps").glob("[0-9]*.json")))
    again = subprocess.run([*command, str(run)], capture_output=True, text=True, timeout=120, check=True)
    assert killed_at < 4, "the process had ended before it was killed"
    assert f"{killed_at} of 4 units were done before" in again.stdout
    whole = Run.create(tmp_path / "whole")
    given = {"images": str(photos), "metadata": table, "backbone": settings["backbone"], "inversion_steps": 30}
    api.attend(whole, engine=HERE, unit_size=1, **given)
    assert sums(Run.open(run), "images", "maps") == sums(whole, "images", "maps")
    assert len(sums(whole, "images")) == 4
    whole.tar("maps", 2).unlink()
    nothing_but = [sys.executable, "-m", "synthgen", "attend", "--workers", "1", "--run", str(whole.path)]
    assert "3 of 4 units were done" in subprocess.run(nothing_but, capture_output=True, text=True, check=True).stdout
    assert sums(Run.open(run), "images", "maps") == sums(whole, "images", "maps")


# -- what is refused


def test_other_images_are_refused_and_bad_ones_named(finished, settings, tmp_path):
    other = tmp_path / "other.tar"
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    with TarWriter(other) as tar:
        tar.add("000000000", {"png": picture, "txt": b"a [dog]"})
        tar.add("000000001", {"png": picture})
    given = {**settings, "images": str(other)}
    with pytest.raises(StaleArtifact, match="its input 'images' has changed"):
        api.attend(finished, engine=HERE, **given)
    fresh = Run.create(tmp_path / "fresh")
    assert api.attend(fresh, engine=HERE, **given).notes == {"failed samples": 1}
    assert fresh.mark("images", 0)["failed"] == {"0000000001": "sample 000000001: it has no caption"}
    api.attend(Run.create(tmp_path / "told"), engine=HERE, **given, caption="a [dog] or a [cat]")
    with pytest.raises(MissingArtifact, match=r"absent\.tar"):
        api.attend(Run.create(tmp_path / "f2"), **{**settings, "images": str(tmp_path / "absent.tar")})
    assert sample_seed(0, "0000000000") != sample_seed(0, "0000000001")


def test_a_folder_without_captions_is_refused_before_anything_is_loaded(photos, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/x.png").write_bytes((photos / "shapes/0.png").read_bytes())
    missing = Choice("diffusers", {"model": str(tmp_path / "no-model")})
    with pytest.raises(PromptError, match="sample x: it has no caption"):
        api.attend(Run.create(tmp_path / "r"), engine=HERE, images=str(tmp_path / "bare"), backbone=missing)
    assert not (tmp_path / "r/images").exists()


def test_another_caption_is_another_input(photos, settings, tmp_path):
    run, folder = Run.create(tmp_path / "r"), tmp_path / "photos"
    folder.mkdir()
    (folder / "x.png").write_bytes((photos / "shapes/0.png").read_bytes())
    given = settings | {"images": str(folder)}
    (folder / "x.txt").write_text("a [dog]")
    api.attend(run, engine=HERE, **given)
    assert api.attend(run, engine=HERE, **given).samples == 0
    (folder / "x.txt").write_text("a [cat]")  # as long as the other
    with pytest.raises(StaleArtifact, match="its input 'captions' has changed"):
        api.attend(run, engine=HERE, **given)


def test_an_image_that_cannot_be_read_is_left_out_with_its_reason(photos, settings, tmp_path):
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / "good.png").write_bytes((photos / "shapes/0.png").read_bytes())
    (folder / "bad.png").write_bytes(b"this is no picture")
    Image.new("1", (300, 1)).save(folder / "thin.png")
    given = settings | {"images": str(tmp_path), "caption": "a photo of a {label}"}
    run = Run.create(tmp_path / "r")
    assert api.attend(run, engine=HERE, **given).samples == 2
    assert "cannot identify" in run.mark("images", 0)["failed"]["0000000000"]
    assert run.mark("images", 0)["notes"] == {"failed samples": 1}
    assert [one.request.source for one, _ in api.samples(run)] == ["cat/good", "cat/thin"]
    assert {one.request.prompt.text for one, _ in api.samples(run)} == {"a photo of a cat"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"timesteps": (1000,)}, "timesteps must be"),
        ({"inversion_steps": 1001}, "inversion_steps must be"),
        ({"unit_size": 0}, "unit_size must be"),
        ({"unit_size": 10_001}, "unit_size must be"),
        ({"limit": -1}, "limit and max_side"),
        ({"fit": "crop"}, "fit"),
        ({"caption": "a {lable}"}, "caption must be as"),
        ({"caption": "{label} and {label}"}, "caption must be as"),
        ({"caption": "a [photo] of {label}"}, "caption must be as"),
        ({"caption": "a [dog"}, "caption 'a \\[dog' cannot be read: a '\\[' is not closed"),
    ],
)
def test_invalid_settings_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        make_stage("attend", {"images": "x.tar", **wrong})
    assert Attend("x.tar", caption="a {label}").caption == "a {label}"


# -- samples that cannot be used


def picture(seed):
    return encode_png(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def tar_of(path, *samples):
    with TarWriter(path) as tar:
        for row, members in enumerate(samples):
            tar.add(f"{row:09d}", {name: data for name, data in members.items() if data is not None})
    return path


def test_an_unusable_caption_costs_one_sample_of_a_tar(settings, tmp_path):
    captions = [b"a [dog", b"a [cat]", None, b" ".join([b"[dog]"] * 256), b"a dog"]
    words = [None, None, None, None, b'{"words": ["cat"]}']
    samples = [{"png": picture(row), "txt": captions[row], "json": words[row]} for row in range(5)]
    run = Run.create(tmp_path / "r")
    given = settings | {"images": str(tar_of(tmp_path / "x.tar", *samples)), "unit_size": 5}
    assert api.attend(run, engine=HERE, **given).samples == 1
    assert run.mark("images", 0)["failed"] == {
        "0000000000": "sample 000000000: a '[' is not closed with ']'",
        "0000000002": "sample 000000002: it has no caption",
        "0000000003": "sample 000000003: its caption asks for 256 masks; 255 are the most, so mark fewer",
        "0000000004": "sample 000000004: the word 'cat' is not in the prompt 'a dog' (or not that often)",
    }
    assert api.attend(run, engine=HERE, **given).done_before == 1


@pytest.mark.parametrize("units", [1, 3])
def test_a_unit_of_unreadable_samples_is_done_and_empty(settings, units, tmp_path):
    samples = [
        {"png": b"this is no picture", "txt": b"a [dog]"},
        {"png": picture(0), "txt": b"a [dog"},
        {"png": picture(1), "txt": b"a [cat]"},
    ]
    run = Run.create(tmp_path / "r")
    given = settings | {"images": str(tar_of(tmp_path / "x.tar", *samples[:units])), "unit_size": 1}
    assert api.attend(run, engine=HERE, **given).samples == units // 3
    marks = [run.mark("images", unit) for unit in range(units)]
    assert [mark["count"] for mark in marks] == [0, 0, 1][:units]
    (reason,) = marks[0]["failed"].values()
    assert "cannot identify" in reason
    assert not any(word in reason for word in ("delete", "leave it out", "get it anew"))  # its run would refuse that
    assert api.attend(run, engine=HERE, **given).done_before == units
    api.masks(run, engine=HERE, min_area=0.0, max_area=1.0)
    assert [run.mark("masks", unit)["count"] for unit in range(units)] == [0, 0, 1][:units]
    assert len(list(api.samples(run))) == units // 3
    assert "synthgen shards" in status(run).advice
    if units == 3:
        api.shards(run, engine=HERE, val_ratio=0.0, image_format="png")
        assert status(run).shards.splits == {"train": 1}
        assert '"key":"0000020000"' in api.view(run).read_text().replace(" ", "")
    else:
        with pytest.raises(MissingArtifact, match="no image"):
            api.shards(run, engine=HERE, val_ratio=0.0)


def test_a_unit_without_one_good_image_fails(settings, tmp_path, monkeypatch):
    samples = [{"png": b"this is no picture", "txt": b"a [dog]"}, {"png": picture(0), "txt": b"a [dog]"}]
    given = settings | {"images": str(tar_of(tmp_path / "x.tar", *samples)), "unit_size": 2}
    encode = StableDiffusion.encode
    monkeypatch.setattr(StableDiffusion, "encode", lambda family, pixels: encode(family, pixels) * torch.nan)
    with pytest.raises(UnitsFailed, match="no image of the unit is good: its attention came out with values"):
        api.attend(Run.create(tmp_path / "r"), engine=HERE, **given)


def test_tars_without_a_usable_caption_are_refused_before_anything_is_loaded(tmp_path):
    tar = tar_of(tmp_path / "x.tar", {"png": picture(0), "txt": b"a [dog"}, {"png": picture(1)})
    missing = Choice("diffusers", {"model": str(tmp_path / "no-model")})
    with pytest.raises(
        PromptError, match=r"no caption in .*x\.tar can be used: sample 000000000: a '\[' is not closed"
    ):
        api.attend(Run.create(tmp_path / "r"), engine=HERE, images=str(tar), backbone=missing)
    assert not (tmp_path / "r/images").exists()
