"""Train the tiny model, part by part, and put the parts together: ``python -m synthgen.tiny.train``.

The parts in their order: ``vae`` (the autoencoder), ``unet`` (with the text tower, over the frozen latents),
``decoder`` (on, the latents as they are), ``export`` (into the package). A part that was stopped goes on where it was,
and one that ended goes on when it is given more minutes or steps. ``begin``, in a new folder, takes up the weights in
the package in place of ``vae``, so that ``unet`` and ``decoder`` go on from there.
"""

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from synthgen.tiny import DEFAULT_GUIDANCE, DEFAULT_STEPS, WEIGHTS, networks
from synthgen.tiny.compositor import LAYOUTS, Compositor, Names
from synthgen.tiny.loop import Budget, Losses, Settings, State, optimise, rank, rank_seed
from synthgen.tiny.losses import Autoencoding, Denoising, WrittenOutAttention, halved, noise_like
from synthgen.tiny.recognised import emphasis
from synthgen.tiny.score import attention_iou, pixels
from synthgen.tiny.sheet import PROMPTS, draw, write_sheet
from synthgen.tiny.truth import held_out

__all__ = ["begin", "export", "train_decoder", "train_unet", "train_vae"]

SEED = 2026
DROPPED = 0.1  # share of captions that are left empty, for guidance
PADDING_HIDDEN = 0.7  # share of captions whose end and padding tokens the U-Net does not see: words must do without
HELD_OUT = 256  # composites that the logged figures are of
SCALED_BY = 512  # composites whose latents have unit variance
SHARES = (0.30, 0.46, 0.08, 0.08, 0.08)  # of the layouts that the U-Net learns: several objects are harder than one
VOCAB_SIZE = 4096  # at most; enough for every word of the captions
CHUNK = 16  # batches that are composed together
DRAWS = 8  # steps' batches that are drawn from the bank of latents for each one that is composed
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Preset:
    """What fits a kind of machine. Both train the same networks; batches are of one step and process."""

    device: str
    vae: Settings
    decoder: Settings
    unet: Settings
    bank: int  # latents kept in memory, of the newest composites
    compile: bool


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        "cpu",
        vae=Settings(2e-3, 8),
        decoder=Settings(1e-3, 8),
        unet=Settings(1e-3, 16, final_rate=0.02, steady=0.8),
        bank=8192,
        compile=False,
    ),
    "gpu": Preset(
        "cuda",
        vae=Settings(2e-3, 64, save_every=60, show_every=240),
        decoder=Settings(1e-3, 64, save_every=60, show_every=240),
        unet=Settings(2e-3, 256, final_rate=0.02, steady=0.7, save_every=60, show_every=240),
        bank=65536,
        compile=True,
    ),
}


@dataclass(frozen=True)
class Job:
    """What every part of the training is told."""

    data: Path
    out: Path
    budget: Budget
    preset: Preset
    recognised: Path | None = None  # what synthgen.tiny.recognised wrote: the U-Net sees more of what was not


def begin(job: Job) -> None:
    """Lay the package's weights in ``out`` as if they had been trained there, with AdamW's moments at zero.

    Raises:
        FileExistsError: ``out`` has a training of its own.
    """
    path = job.out / "unet-training" / "state.safetensors"
    if path.exists():
        raise FileExistsError(f"{path} is there already; give another folder with --out")
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipeline.tokenizer.save_pretrained(job.out / "tokenizer")
    pipeline.vae.save_pretrained(job.out / "vae")
    path.parent.mkdir(parents=True, exist_ok=True)
    State(Denoising(pipeline.text_encoder, pipeline.unet), job.preset.unet).save(path)


def train_vae(job: Job) -> None:
    """Train the autoencoder and write it, with its scaling factor, to ``out/vae``."""
    torch.manual_seed(SEED)
    model = Autoencoding(networks.autoencoder())
    vae = autoencode(job, model, job.out / "vae-training", job.preset.vae).cpu()
    if rank() == 0:
        composites = Compositor(job.data, Names.load()).draw(SCALED_BY, torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            deviation = float(vae.encode(pixels(composites.images)).latents.std())
        vae.register_to_config(scaling_factor=round(1 / deviation, 4))
        vae.save_pretrained(job.out / "vae")


def train_decoder(job: Job) -> None:
    """Train the decoder of ``out/vae`` on, its latents as they are, and write the whole to ``out/vae-tuned``.

    The squared error, which is what PSNR measures, counts for more than while the latents are still being found.
    """
    vae = AutoencoderTiny.from_pretrained(job.out / "vae")
    vae.encoder.requires_grad_(False)
    model = Autoencoding(vae, square=20.0, edge=0.1)
    vae = autoencode(job, model, job.out / "decoder-training", job.preset.decoder).cpu()
    if rank() == 0:
        vae.save_pretrained(job.out / "vae-tuned")


def autoencode(job: Job, model: Autoencoding, out: Path, settings: Settings) -> AutoencoderTiny:
    """Train what of an autoencoder has gradients; return it with averaged weights."""
    vae = model.vae
    model.to(job.preset.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if job.preset.compile:
        model.compile()
    compositor, chunk = Compositor(job.data, Names.load(), device=job.preset.device), torch.empty(0)
    x = torch.cat([pixels(batch.images) for batch in held_out(job.data, HELD_OUT)])

    def losses(step: int) -> Losses:
        nonlocal chunk
        generator = torch.Generator().manual_seed(rank_seed(SEED, 1, step))
        if step % CHUNK == 0 or not len(chunk):
            first = torch.Generator().manual_seed(rank_seed(SEED, 0, step // CHUNK))
            chunk = pixels(compositor.draw(settings.batch_size * CHUNK, first).images)
        batch = torch.split(chunk, settings.batch_size)[step % CHUNK]
        return model(batch.contiguous(memory_format=torch.channels_last), generator)  # type: ignore[no-any-return]

    def show(ema: dict[str, Tensor]) -> dict[str, float]:
        y = reconstruct(averaged(copy.deepcopy(vae).cpu(), "vae.", ema), x)
        pairs = torch.stack([x[:32], y[:32]], dim=1).flatten(0, 1)
        write_sheet(out / "sheet.png", (pairs + 1) / 2, columns=16)
        return {"held_out_psnr": psnr(x, y)}

    ema = optimise(model, losses, out, job.budget, settings, show)
    return averaged(vae, "vae.", ema)


class Bank:
    """Latents, tokens and places of objects of the newest composites, from which batches are drawn."""

    def __init__(self, size: int) -> None:
        self.size, self.parts = size, list[tuple[Tensor, ...]]()

    def add(self, *part: Tensor) -> None:
        """Take in a part, tensors of as many rows; the oldest leave when there is no more room."""
        self.parts.append(part)
        while sum(len(part[0]) for part in self.parts) > self.size:
            self.parts.pop(0)

    def draw(self, num: int, generator: torch.Generator) -> list[Tensor]:
        """``num`` rows at random, of each tensor."""
        each = len(self.parts[0][0])
        rows = torch.randint(each * len(self.parts), (num,), generator=generator).tolist()
        drawn = [[part[row % each] for part in self.parts[row // each]] for row in rows]
        return [torch.stack(rows) for rows in zip(*drawn, strict=True)]


def train_unet(job: Job) -> None:
    """Train the U-Net and the text tower over the frozen latents of ``out/vae``; keep the rest in ``out`` too.

    A resumed run fills its bank of composites anew.
    """
    torch.manual_seed(SEED)
    out, settings, device = job.out / "unet-training", job.preset.unet, torch.device(job.preset.device)
    names = Names.load()
    if rank() == 0 and not (job.out / "tokenizer").is_dir():
        networks.train_tokenizer(names.captions(), VOCAB_SIZE).save_pretrained(job.out / "tokenizer")
    barrier()
    tokenizer = CLIPTokenizer.from_pretrained(job.out / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(job.out / "vae").eval()
    vae.to(device, memory_format=torch.channels_last)
    model = Denoising(networks.text_encoder(tokenizer), networks.unet()).to(device)
    if device.type == "cpu":
        model.unet.set_attn_processor(WrittenOutAttention())
    if job.preset.compile:
        model.compile()
    compositor = Compositor(job.data, names, device=job.preset.device)
    if job.recognised:
        shares = json.loads(job.recognised.read_text(encoding="utf-8"))
        compositor.weights = compositor.weights * torch.tensor(emphasis(shares, names.own))
    layouts = [replace(layout, share=share) for layout, share in zip(LAYOUTS, SHARES, strict=True)]
    bank, empty = Bank(job.preset.bank), tokenize(tokenizer, [""]).to(device)
    held = list(held_out(job.data, HELD_OUT // 2))

    def compose(number: int) -> None:
        first = torch.Generator().manual_seed(rank_seed(SEED, 2, number))
        composites = compositor.draw(settings.batch_size * CHUNK, first, layouts)
        with torch.no_grad(), halved(device):
            x = pixels(composites.images).contiguous(memory_format=torch.channels_last)
            latents = (
                torch.cat([vae.encode(part).latents.float() for part in torch.split(x, 64)]) * vae.config.scaling_factor
            )
        tokens = tokenize(tokenizer, list(composites.captions)).to(device)
        objects = composites.masks.any(dim=1, keepdim=True).float().to(device)
        bank.add(latents.contiguous(), tokens, F.adaptive_avg_pool2d(objects, latents.shape[2:]))

    def losses(step: int) -> Losses:
        number, batch = divmod(step, CHUNK * DRAWS)
        if batch == 0 or not bank.parts:
            compose(number)
        generator = torch.Generator().manual_seed(rank_seed(SEED, 3, step))
        latents, tokens, objects = bank.draw(settings.batch_size, generator)
        dropped, hidden = torch.rand(2, len(latents), generator=generator).to(device)
        tokens = torch.where((dropped < DROPPED)[:, None], empty, tokens)
        strata = torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)  # one timestep of each
        t = (strata * len(model.snr) / len(latents)).long().to(device)
        return model(latents, tokens, objects, t, noise_like(latents, generator), hidden < PADDING_HIDDEN)  # type: ignore[no-any-return]

    def show(ema: dict[str, Tensor]) -> dict[str, float]:
        pipeline = assemble(job.out, ema)
        images = draw(pipeline, PROMPTS, DEFAULT_STEPS, DEFAULT_GUIDANCE, SEED)
        write_sheet(out / "sheet.png", images, columns=8)
        pipeline.save_pretrained(job.out / "pipeline")
        return attention_iou(pipeline, held)

    optimise(model, losses, out, job.budget, settings, show)


def export(job: Job) -> None:
    """Write the pipeline, its tuned decoder where there is one, to the folder that the package ships."""
    ema = {k.removeprefix("ema."): v for k, v in load_file(job.out / "unet-training" / "state.safetensors").items()}
    pipeline = assemble(job.out, ema)
    if (job.out / "vae-tuned").is_dir():
        pipeline.vae = AutoencoderTiny.from_pretrained(job.out / "vae-tuned")
    pipeline.vae.register_to_config(_name_or_path="synthgen/tiny")  # in place of a path on this machine
    pipeline.unet.half()  # in the file only: it loads as float32
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
    module.load_state_dict(
        {k.removeprefix(prefix): v.cpu() for k, v in ema.items() if k.startswith(prefix)}, strict=False
    )
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
    "begin": begin,
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
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="cpu (default) or gpu")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the steps first, for minutes on a CPU (default: on a GPU)",
    )
    parser.add_argument("--recognised", type=Path, help="of synthgen.tiny.recognised: train the U-Net on the rest more")
    parser.add_argument("--processes", type=int, default=1, help="one a core; one on a GPU")
    args = parser.parse_args()
    if args.command not in ("begin", "export") and args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    os.environ["OMP_NUM_THREADS"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]
    if args.compile is not None:
        preset = replace(preset, compile=args.compile)
    job = Job(args.data, args.out, Budget(args.minutes, args.steps), preset, args.recognised)
    if args.command == "begin":  # nothing to compute, so no processes
        try:
            begin(job)
        except FileExistsError as error:
            parser.error(str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (args.processes, f"{folder}/rendezvous", args.command, job), nprocs=args.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
