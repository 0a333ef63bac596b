"""A few training steps of each part of the tiny model on synthetic data: both presets, resuming, export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from synthgen.tiny import IMAGE_SIZE, networks, train
from synthgen.tiny.compositor import Names
from synthgen.tiny.loop import Budget
from synthgen.tiny.losses import DenoisingLoss, EagerAttention
from tests.tiny_data import NAMES, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Names, "load", classmethod(lambda cls: NAMES))
    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr(train, "NUM_HELD_OUT", 8)
    monkeypatch.setattr(train, "NUM_SCALING", 8)
    monkeypatch.setattr(train, "PROMPTS", train.PROMPTS[:8])
    monkeypatch.setattr(train, "DEFAULT_STEPS", 1)
    torch.set_num_threads(1)


def job(data: Path, out: Path, preset: str, steps: int) -> train.Job:
    """A preset with small batches, on the CPU and without compilation."""
    chosen = train.PRESETS[preset]
    parts = {
        name: replace(getattr(chosen, name), batch_size=4, log_every=1, eval_every=1e9)
        for name in ("vae", "decoder", "unet")
    }
    return train.Job(data, out, Budget(steps=steps), replace(chosen, device="cpu", compile=False, **parts))


@pytest.mark.parametrize("preset", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_every_part_trains_and_the_pipeline_generates(
    preset: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "WEIGHTS", tmp_path / "weights")
    for command in (train.train_vae, train.train_unet, train.train_decoder, train.export):
        command(job(data, tmp_path / "out", preset, 3))
    for part in ("vae", "unet", "decoder"):
        rows = (tmp_path / "out" / f"{part}-training" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 3
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a dog", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    (weights,) = (tmp_path / "weights" / "unet").glob("*.safetensors")
    with safe_open(weights, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in list(file.keys())} == {torch.float16}
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32


def test_fine_tuning_the_decoder_does_not_change_the_latents(data: Path, tmp_path: Path) -> None:
    for command in (train.train_vae, train.train_decoder):
        command(job(data, tmp_path, "cpu", 2))
    before, after = (train.AutoencoderTiny.from_pretrained(tmp_path / name) for name in ("vae", "vae-tuned"))
    x = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    assert torch.equal(before.encode(x).latents, after.encode(x).latents)
    assert not torch.equal(
        before.decode(torch.zeros(1, 4, 16, 16)).sample, after.decode(torch.zeros(1, 4, 16, 16)).sample
    )


def test_the_unets_training_resumes(data: Path, tmp_path: Path) -> None:
    train.train_vae(job(data, tmp_path, "cpu", 1))
    train.train_unet(job(data, tmp_path, "cpu", 2))
    train.train_unet(job(data, tmp_path, "cpu", 4))
    rows = [json.loads(row) for row in (tmp_path / "unet-training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_the_end_token_and_the_padding_can_be_masked_out() -> None:
    tokenizer = networks.train_tokenizer(NAMES.captions(), 1024)
    model = DenoisingLoss(networks.text_encoder(tokenizer), networks.unet()).eval()
    tokens = train.tokenize(tokenizer, ["a photo of a dog"])
    other = tokens.clone()
    other[:, -3:] = tokenizer.bos_token_id  # after the end token, so it matters only if padding is attended to
    z, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    noise = torch.randn(1, 4, 16, 16)
    for mask_padding in (True, False):
        with torch.no_grad():
            losses = [
                float(model(z, some, torch.zeros(1, 1, 16, 16), t, noise, torch.tensor([mask_padding]))["loss"])
                for some in (tokens, other)
            ]
        assert (losses[0] == losses[1]) == mask_padding


def test_errors_on_objects_have_a_larger_weight() -> None:
    tokenizer = networks.train_tokenizer(NAMES.captions(), 1024)
    model = DenoisingLoss(networks.text_encoder(tokenizer), networks.unet()).eval()
    tokens, t, mask_padding = (
        train.tokenize(tokenizer, ["a photo of a dog"]),
        torch.tensor([500]),
        torch.tensor([False]),
    )
    z, noise = torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16)
    z[..., :4] = 3.0  # the untrained U-Net has a larger error here

    def loss(columns: slice) -> float:
        objects = torch.zeros(1, 1, 16, 16)
        objects[..., columns] = 1
        with torch.no_grad():
            return float(model(z, tokens, objects, t, noise, mask_padding)["loss"])

    everywhere, nowhere = loss(slice(None)), loss(slice(0))
    assert everywhere == pytest.approx(nowhere)  # it is a mean
    assert loss(slice(4)) > nowhere > loss(slice(4, None))


def test_eager_attention_equals_the_default_processor() -> None:
    torch.manual_seed(0)
    unet = networks.unet().eval()
    arguments = (torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 7, networks.WIDTH))
    seen = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        plain = [unet(*arguments, encoder_attention_mask=mask).sample for mask in (None, seen)]
        unet.set_attn_processor(EagerAttention())
        written = [unet(*arguments, encoder_attention_mask=mask).sample for mask in (None, seen)]
    for one, other in zip(plain, written, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not torch.equal(plain[0][1], plain[1][1])


def test_the_buffer_keeps_the_newest_chunks() -> None:
    buffer = train.LatentBuffer(4)
    for number in range(3):
        buffer.add(torch.full((2, 1), float(number)), torch.full((2, 1), number))
    latents, tokens = buffer.sample(200, torch.Generator().manual_seed(0))
    assert set(latents.flatten().tolist()) == {1.0, 2.0}
    assert torch.equal(latents.long(), tokens)


def test_training_continues_from_the_weights_of_the_package(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train.begin(job(data, out, "cpu", 0))
    state = out / "unet-training" / "state.safetensors"
    with safe_open(state, framework="pt") as file:
        assert file.metadata()["step"] == "0"
        initial = {name: file.get_tensor(name) for name in file.keys() if name.startswith("ema.unet.")}  # noqa: SIM118
    shipped = StableDiffusionPipeline.from_pretrained(train.WEIGHTS, safety_checker=None).unet.state_dict()
    assert all(torch.equal(values, shipped[name.removeprefix("ema.unet.")]) for name, values in initial.items())
    train.train_unet(job(data, out, "cpu", 1))
    (row,) = (out / "unet-training" / "metrics.jsonl").read_text().splitlines()[:1]
    assert json.loads(row)["error"] < 1.0  # that of an untrained one: v has unit variance
    train.train_decoder(job(data, out, "cpu", 1))
    assert (out / "vae-tuned").is_dir()
    with pytest.raises(FileExistsError, match="give another folder"):
        train.begin(job(data, out, "cpu", 0))


def test_the_export_runs_once_whatever_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[train.Job] = []
    monkeypatch.setattr(train, "export", jobs.append)
    monkeypatch.setattr(train, "spawn", None)
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "2"]
    monkeypatch.setattr("sys.argv", ["train", "export", *options])
    train.main()
    assert len(jobs) == 1
