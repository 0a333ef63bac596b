"""Train the tiny model on CPU cores, part by part, and put the parts together: ``python -m synthgen.tiny.train``."""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from synthgen.tiny import DEFAULT_GUIDANCE, DEFAULT_STEPS, WEIGHTS, networks
from synthgen.tiny.compositor import Compositor, Names
from synthgen.tiny.loop import Budget, Losses, Settings, optimise, rank, rank_seed
from synthgen.tiny.sheet import PROMPTS, draw, write_sheet
from synthgen.tiny.truth import held_out

__all__ = ["export", "train_decoder", "train_unet", "train_vae"]

SEED = 2026
VAE_BATCH = 8  # a step and process
UNET_BATCH = 16  # a step and process
DRAWS = 2  # of noise for each composite
DROPPED = 0.1  # share of captions that are left empty, for guidance
VOCAB_SIZE = 4096  # at most; enough for every word of the captions
M = TypeVar("M", bound=nn.Module)
CHUNK = 16  # batches that are composed together


@dataclass(frozen=True)
class Job:
    """What every part of the training is told."""

    data: Path
    out: Path
    budget: Budget


def pixels(images: Tensor) -> Tensor:
    """uint8 (b, H, W, 3) → float (b, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class Autoencoding(nn.Module):
    """The loss of the autoencoder; latents are kept near unit variance, smooth, and robust to a little noise."""

    noise = 0.05

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, generator: torch.Generator) -> Losses:
        z = self.vae.encode(x).latents
        y = self.vae.decode(z + self.noise * torch.randn(z.shape, generator=generator)).sample
        pixel = F.l1_loss(y, x)
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        deviation, mean = torch.std_mean(z, dim=(0, 2, 3))
        unit = (deviation - 1).square().mean() + mean.square().mean()
        rough = z.diff(dim=2).square().mean() + z.diff(dim=3).square().mean()
        loss = pixel + 0.5 * edges + 0.5 * coarse + 0.02 * unit + 0.002 * rough
        return {"loss": loss, "pixel": pixel, "unit": unit, "rough": rough}


def train_vae(job: Job) -> None:
    """Train the autoencoder and write it, with its scaling factor, to ``out/vae``."""
    torch.manual_seed(SEED)
    vae = autoencode(job, networks.autoencoder(), job.out / "vae-training", Settings(2e-3, VAE_BATCH))
    if rank() == 0:
        composites = Compositor(job.data, Names.load()).draw(512, torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            deviation = float(vae.encode(pixels(composites.images)).latents.std())
        vae.register_to_config(scaling_factor=round(1 / deviation, 4))
        vae.save_pretrained(job.out / "vae")


def train_decoder(job: Job) -> None:
    """Train the decoder of ``out/vae`` on, its latents as they are, and write the whole to ``out/vae-tuned``."""
    vae = AutoencoderTiny.from_pretrained(job.out / "vae")
    vae.encoder.requires_grad_(False)
    vae = autoencode(job, vae, job.out / "decoder-training", Settings(1e-3, VAE_BATCH))
    if rank() == 0:
        vae.save_pretrained(job.out / "vae-tuned")


def autoencode(job: Job, vae: AutoencoderTiny, out: Path, settings: Settings) -> AutoencoderTiny:
    """Train what of ``vae`` has gradients; return it with averaged weights."""
    model = Autoencoding(vae)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compositor, chunk = Compositor(job.data, Names.load()), torch.empty(0)
    x = torch.cat([pixels(batch.images) for batch in held_out(job.data, 256)])

    def losses(step: int) -> Losses:
        nonlocal chunk
        generator = torch.Generator().manual_seed(rank_seed(SEED, 1, step))
        if step % CHUNK == 0 or not len(chunk):
            first = torch.Generator().manual_seed(rank_seed(SEED, 0, step // CHUNK))
            chunk = pixels(compositor.draw(VAE_BATCH * CHUNK, first).images)
        start = step % CHUNK * VAE_BATCH
        batch = chunk[start : start + VAE_BATCH]
        return model(batch.contiguous(memory_format=torch.channels_last), generator)  # type: ignore[no-any-return]

    def show(ema: dict[str, Tensor]) -> dict[str, float]:
        y = reconstruct(averaged(copy.deepcopy(vae), "vae.", ema), x)
        pairs = torch.stack([x[:32], y[:32]], dim=1).flatten(0, 1)
        write_sheet(out / "sheet.png", (pairs + 1) / 2, columns=16)
        return {"held_out_psnr": psnr(x, y)}

    ema = optimise(model, losses, out, job.budget, settings, show)
    return averaged(vae, "vae.", ema)


class Denoising(nn.Module):
    """The loss of the U-Net and the text tower: v-prediction, weighted by min(SNR, 5) / (SNR + 1)."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        alpha = networks.scheduler().alphas_cumprod
        self.signal, self.noise, self.snr = alpha.sqrt(), (1 - alpha).sqrt(), alpha / (1 - alpha)

    def forward(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Losses:
        """``latents`` (b, 4, 16, 16) of unit variance, ``tokens`` (b, 32)."""
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(len(self.snr), (len(latents),), generator=generator)
        signal_rate, noise_rate = (rate[t][:, None, None, None] for rate in (self.signal, self.noise))
        context = self.text_encoder(tokens).last_hidden_state
        v = self.unet(signal_rate * latents + noise_rate * noise, t, context).sample
        error = (v - (signal_rate * noise - noise_rate * latents)).square().mean(dim=(1, 2, 3))
        snr = self.snr[t]
        return {"loss": (error * snr.clamp(max=5) / (snr + 1)).mean(), "error": error.mean()}


def train_unet(job: Job) -> None:
    """Train the U-Net and the text tower over the frozen latents of ``out/vae``; keep the rest in ``out`` too."""
    torch.manual_seed(SEED)
    out = job.out / "unet-training"
    names = Names.load()
    if rank() == 0 and not (job.out / "tokenizer").is_dir():
        networks.train_tokenizer(names.captions(), VOCAB_SIZE).save_pretrained(job.out / "tokenizer")
    barrier()
    tokenizer = CLIPTokenizer.from_pretrained(job.out / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(job.out / "vae").eval()
    model = Denoising(networks.text_encoder(tokenizer), networks.unet())
    compositor = Compositor(job.data, names)
    latents, tokens, order = torch.empty(0), torch.empty(0), torch.empty(0)

    def compose(number: int) -> None:
        nonlocal latents, tokens, order
        generator = torch.Generator().manual_seed(rank_seed(SEED, 2, number))
        composites = compositor.draw(UNET_BATCH * CHUNK, generator)
        with torch.no_grad():
            latents = vae.encode(pixels(composites.images)).latents * vae.config.scaling_factor
        dropped = torch.rand(len(latents), generator=generator) < DROPPED
        captions = ["" if drop else caption for drop, caption in zip(dropped, composites.captions, strict=True)]
        tokens = tokenize(tokenizer, captions)
        order = torch.cat([torch.randperm(len(latents), generator=generator) for _ in range(DRAWS)])

    def losses(step: int) -> Losses:
        number, batch = divmod(step, CHUNK * DRAWS)
        if batch == 0 or not len(latents):
            compose(number)
        rows = order[batch * UNET_BATCH : (batch + 1) * UNET_BATCH]
        generator = torch.Generator().manual_seed(rank_seed(SEED, 3, step))
        return model(latents[rows], tokens[rows], generator)  # type: ignore[no-any-return]

    def show(ema: dict[str, Tensor]) -> dict[str, float]:
        pipeline = assemble(job.out, ema)
        images = draw(pipeline, PROMPTS[::2], DEFAULT_STEPS, DEFAULT_GUIDANCE, SEED)
        write_sheet(out / "sheet.png", images, columns=8)
        pipeline.save_pretrained(job.out / "pipeline")
        return {}

    optimise(model, losses, out, job.budget, Settings(learning_rate=1.5e-3, batch_size=UNET_BATCH), show)


def export(job: Job) -> None:
    """Write the pipeline, its tuned decoder where there is one, to the folder that the package ships."""
    ema = {k.removeprefix("ema."): v for k, v in load_file(job.out / "unet-training" / "state.safetensors").items()}
    pipeline = assemble(job.out, ema)
    if (job.out / "vae-tuned").is_dir():
        pipeline.vae = AutoencoderTiny.from_pretrained(job.out / "vae-tuned")
    pipeline.vae.register_to_config(_name_or_path="synthgen/tiny")  # in place of a path on this machine
    pipeline.save_pretrained(WEIGHTS)
    for path in WEIGHTS.rglob("*.safetensors"):
        path.chmod(0o644)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers, (b, 32), padded as the pipeline pads them."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    tokens: Tensor = batch.input_ids
    return tokens


def assemble(out: Path, ema: dict[str, Tensor]) -> StableDiffusionPipeline:
    """Put the parts in ``out`` and the averaged U-Net and text tower together."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    return StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(out / "vae"),
        text_encoder=averaged(networks.text_encoder(tokenizer), "text_encoder.", ema),
        tokenizer=tokenizer,
        unet=averaged(networks.unet(), "unet.", ema),
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def averaged(module: M, prefix: str, ema: dict[str, Tensor]) -> M:
    """Load the moving averages under ``prefix`` into a module, and set it to evaluation."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in ema.items() if k.startswith(prefix)}, strict=False)
    return module.eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """Encode and decode images in [-1, 1]."""
    return torch.cat([vae.decode(vae.encode(part).latents).sample for part in torch.split(x, 64)]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB; images in [-1, 1]."""
    error = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return round(float(-10 * error.log10().mean()), 3)


COMMANDS: dict[str, Callable[[Job], None]] = {
    "vae": train_vae,
    "unet": train_unet,
    "decoder": train_decoder,
    "export": export,
}


def work(index: int, processes: int, rendezvous: str, command: str, job: Job) -> None:
    """Run one process of a command."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=processes)
    COMMANDS[command](job)
    barrier()
    if processes > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, logs and sample sheets")
    parser.add_argument("--minutes", type=float, help="end after this long")
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--processes", type=int, default=1, help="one a core")
    args = parser.parse_args()
    if args.command != "export" and args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    os.environ["OMP_NUM_THREADS"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(args.data, args.out, Budget(args.minutes, args.steps))
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (args.processes, f"{folder}/rendezvous", args.command, job), nprocs=args.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
