"""Train the tiny model on CPU cores: ``python -m synthgen.tiny.train {vae,unet,export} --data DIR --out DIR``."""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from synthgen.tiny import networks
from synthgen.tiny.compositor import Composites, Compositor, Names
from synthgen.tiny.loop import Budget, Losses, Settings, optimise, rank, rank_seed

__all__ = ["HELD_OUT_SEED", "train_vae"]

SEED = 2026
HELD_OUT_SEED = 7_000_000  # of the truth set and of every measure; far from SEED
VAE_BATCH = 8  # a step and process
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


def held_out(data: Path, num: int) -> Composites:
    """The first ``num`` held-out composites."""
    compositor = Compositor(data, Names.load(), held_out=True)
    return compositor.draw(num, torch.Generator().manual_seed(HELD_OUT_SEED))


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
    out = job.out / "vae-training"
    model = Autoencoding(networks.autoencoder()).to(memory_format=torch.channels_last)
    compositor, chunk = Compositor(job.data, Names.load()), torch.empty(0)
    x = pixels(held_out(job.data, 256).images)

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
        vae = averaged(networks.autoencoder(), "vae.", ema)
        y = reconstruct(vae, x)
        write_sheet(out / "sheet.png", torch.stack([x[:32], y[:32]], dim=1).flatten(0, 1), columns=16)
        return {"held_out_psnr": psnr(x, y)}

    ema = optimise(model, losses, out, job.budget, Settings(learning_rate=2e-3, batch_size=VAE_BATCH), show)
    if rank() == 0:
        vae = averaged(networks.autoencoder(), "vae.", ema)
        with torch.no_grad():
            latents = vae.encode(pixels(compositor.draw(512, torch.Generator().manual_seed(SEED)).images)).latents
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        vae.save_pretrained(job.out / "vae")


def averaged(module: M, prefix: str, ema: dict[str, Tensor]) -> M:
    """Load the moving averages under ``prefix`` into a module, and set it to evaluation."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in ema.items() if k.startswith(prefix)}, strict=False)
    return module.eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """Encode and decode images in [-1, 1]."""
    return torch.cat([vae.decode(vae.encode(part).latents).sample for part in x.split(64)]).clamp(-1, 1)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB; images in [-1, 1]."""
    error = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    return round(float(-10 * error.log10().mean()), 3)


def write_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Write images (b, 3, H, W) in [-1, 1] as one PNG, row by row."""
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (r H) (c W) 3
    Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()).save(path)


COMMANDS: dict[str, Callable[[Job], None]] = {"vae": train_vae}


def work(index: int, processes: int, rendezvous: str, command: str, job: Job) -> None:
    """Run one process of a command."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=processes)
    COMMANDS[command](job)
    if processes > 1:
        dist.barrier()
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
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            work, (args.processes, f"{folder}/rendezvous", args.command, job), nprocs=args.processes
        )


if __name__ == "__main__":
    main()
