"""Train the tiny model, part by part: ``python -m synthgen.tiny.train``.

The commands in their order: ``vae`` trains the autoencoder; ``unet`` the U-Net and the text encoder on its latents;
``decoder`` fine-tunes the decoder without changing the latents; ``export`` writes the whole pipeline into the package.
A training that was stopped resumes, and one that has ended continues if it is given more minutes or steps. In a new
folder, ``begin`` takes the weights of the package in place of ``vae``, so that ``unet`` and ``decoder`` continue from
them.
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
from synthgen.tiny.compositor import LAYOUTS, Compositor, Names, preprocess
from synthgen.tiny.loop import (
    Budget,
    Losses,
    Settings,
    TrainState,
    add_budget_options,
    fit,
    parse_budget,
    rank,
    rank_seed,
)
from synthgen.tiny.losses import AutoencoderLoss, DenoisingLoss, EagerAttention, autocast, randn_like
from synthgen.tiny.recognised import sampling_factors
from synthgen.tiny.score import attention_iou, psnr, reconstruct
from synthgen.tiny.sheet import PROMPTS, generate, write_sheet
from synthgen.tiny.truth import held_out

__all__ = ["begin", "export", "train_decoder", "train_unet", "train_vae"]

SEED = 2026
CAPTION_DROPOUT = 0.1  # share of empty captions, for classifier-free guidance
PADDING_MASK_RATIO = 0.7  # share of captions whose end and padding tokens are masked out, so that words must do
NUM_HELD_OUT = 256  # composites that are evaluated for the log
NUM_SCALING = 512  # composites whose latents get unit variance
LAYOUT_WEIGHTS = (0.30, 0.46, 0.08, 0.08, 0.08)  # for the U-Net: several objects are harder than one
VOCAB_SIZE = 4096  # an upper limit that all words of the captions fit in
CHUNK = 16  # batches composed at once
REUSE = 8  # how often a latent is used on average, with different noise
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Preset:
    """Settings for a kind of machine; all presets train the same networks."""

    device: str
    vae: Settings
    decoder: Settings
    unet: Settings
    buffer_size: int  # latents of the newest composites that are kept in memory
    compile: bool


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        "cpu",
        vae=Settings(2e-3, 8),
        decoder=Settings(1e-3, 8),
        unet=Settings(1e-3, 16, constant_ratio=0.8),
        buffer_size=8192,
        compile=False,
    ),
    "gpu": Preset(
        "cuda",
        vae=Settings(2e-3, 64, save_every=60, eval_every=240),
        decoder=Settings(1e-3, 64, save_every=60, eval_every=240),
        unet=Settings(2e-3, 256, constant_ratio=0.7, save_every=60, eval_every=240),
        buffer_size=65536,
        compile=True,
    ),
}


@dataclass(frozen=True)
class Job:
    """The options of a command."""

    data: Path
    out: Path
    budget: Budget
    preset: Preset
    recognised: Path | None = None  # file that synthgen.tiny.recognised wrote


def begin(job: Job) -> None:
    """Write the package's weights to ``out`` as a training at step 0, with AdamW's moments at zero.

    Raises:
        FileExistsError: there is a training in ``out`` already.
    """
    path = job.out / "unet-training" / "state.safetensors"
    if path.exists():
        raise FileExistsError(f"{path} exists already; give another folder with --out")
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipeline.tokenizer.save_pretrained(job.out / "tokenizer")
    pipeline.vae.save_pretrained(job.out / "vae")
    path.parent.mkdir(parents=True, exist_ok=True)
    TrainState(DenoisingLoss(pipeline.text_encoder, pipeline.unet), job.preset.unet).save(path)


# -- the autoencoder


def train_vae(job: Job) -> None:
    """Train the autoencoder and write it, with its scaling factor, to ``out/vae``."""
    torch.manual_seed(SEED)
    model = AutoencoderLoss(networks.autoencoder())
    vae = fit_autoencoder(job, model, job.out / "vae-training", job.preset.vae).cpu()
    if rank() == 0:
        composites = Compositor(job.data, Names.load()).sample(NUM_SCALING, torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            std = float(vae.encode(preprocess(composites.images)).latents.std())
        vae.register_to_config(scaling_factor=round(1 / std, 4))
        vae.save_pretrained(job.out / "vae")


def train_decoder(job: Job) -> None:
    """Fine-tune the decoder of ``out/vae`` with the encoder frozen, and write both to ``out/vae-tuned``.

    The squared error, on which PSNR depends, has a larger weight than in the first training.
    """
    vae = AutoencoderTiny.from_pretrained(job.out / "vae")
    vae.encoder.requires_grad_(False)
    model = AutoencoderLoss(vae, mse_weight=20.0, edge_weight=0.1)
    vae = fit_autoencoder(job, model, job.out / "decoder-training", job.preset.decoder).cpu()
    if rank() == 0:
        vae.save_pretrained(job.out / "vae-tuned")


def fit_autoencoder(job: Job, model: AutoencoderLoss, out: Path, settings: Settings) -> AutoencoderTiny:
    """Train the parameters that require gradients; return the autoencoder with EMA weights."""
    vae = model.vae
    model.to(job.preset.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if job.preset.compile:
        model.compile()
    compositor, chunk = Compositor(job.data, Names.load(), device=job.preset.device), torch.empty(0)
    x = torch.cat([preprocess(batch.images) for batch in held_out(job.data, NUM_HELD_OUT)])

    def compute_losses(step: int) -> Losses:
        nonlocal chunk
        if step % CHUNK == 0 or not len(chunk):
            chunk_generator = torch.Generator().manual_seed(rank_seed(SEED, 0, step // CHUNK))
            chunk = preprocess(compositor.sample(settings.batch_size * CHUNK, chunk_generator).images)
        batch = torch.split(chunk, settings.batch_size)[step % CHUNK].contiguous(memory_format=torch.channels_last)
        return model(batch, torch.Generator().manual_seed(rank_seed(SEED, 1, step)))  # type: ignore[no-any-return]

    def evaluate(ema: dict[str, Tensor]) -> dict[str, float]:
        y = reconstruct(load_ema(copy.deepcopy(vae).cpu(), "vae.", ema), x)
        pairs = torch.stack([x[:32], y[:32]], dim=1).flatten(0, 1)
        write_sheet(out / "sheet.png", (pairs + 1) / 2, columns=16)
        return {"held_out_psnr": round(float(psnr(x, y).mean()), 3)}

    ema = fit(model, compute_losses, out, job.budget, settings, evaluate)
    return load_ema(vae, "vae.", ema)


# -- the U-Net and the text encoder


class LatentBuffer:
    """The newest chunks of latents, tokens and object maps, from which batches are sampled."""

    def __init__(self, size: int) -> None:
        self.size, self.chunks = size, list[tuple[Tensor, ...]]()

    def add(self, *chunk: Tensor) -> None:
        """Add tensors with the same number of rows; the oldest chunks are dropped if there are more than ``size``."""
        self.chunks.append(chunk)
        while sum(len(chunk[0]) for chunk in self.chunks) > self.size:
            self.chunks.pop(0)

    def sample(self, num: int, generator: torch.Generator) -> list[Tensor]:
        """``num`` random rows of each tensor."""
        rows_per_chunk = len(self.chunks[0][0])
        rows = torch.randint(rows_per_chunk * len(self.chunks), (num,), generator=generator).tolist()
        samples = [[part[row % rows_per_chunk] for part in self.chunks[row // rows_per_chunk]] for row in rows]
        return [torch.stack(column) for column in zip(*samples, strict=True)]


def train_unet(job: Job) -> None:
    """Train the U-Net and the text encoder on latents of ``out/vae``; the pipeline is written to ``out/pipeline``.

    The buffer of latents is not part of the checkpoint: a resumed training fills it again.
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
    model = DenoisingLoss(networks.text_encoder(tokenizer), networks.unet()).to(device)
    if device.type == "cpu":
        model.unet.set_attn_processor(EagerAttention())
    if job.preset.compile:
        model.compile()
    compositor = Compositor(job.data, names, device=job.preset.device)
    if job.recognised:
        rates = json.loads(job.recognised.read_text(encoding="utf-8"))
        compositor.weights = compositor.weights * torch.tensor(sampling_factors(rates, names.own))
    layouts = [replace(layout, weight=weight) for layout, weight in zip(LAYOUTS, LAYOUT_WEIGHTS, strict=True)]
    buffer, no_caption = LatentBuffer(job.preset.buffer_size), tokenize(tokenizer, [""]).to(device)
    held_out_batches = list(held_out(job.data, NUM_HELD_OUT // 2))

    def add_chunk(number: int) -> None:
        """Compose and encode the images of CHUNK batches."""
        generator = torch.Generator().manual_seed(rank_seed(SEED, 2, number))
        composites = compositor.sample(settings.batch_size * CHUNK, generator, layouts)
        x = preprocess(composites.images).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(device):
            latents = torch.cat([vae.encode(part).latents.float() for part in torch.split(x, 64)])
            latents = (latents * vae.config.scaling_factor).contiguous()
        tokens = tokenize(tokenizer, list(composites.captions)).to(device)
        objects = composites.masks.any(dim=1, keepdim=True).float().to(device)
        buffer.add(latents, tokens, F.adaptive_avg_pool2d(objects, latents.shape[2:]))

    def compute_losses(step: int) -> Losses:
        number, batch = divmod(step, CHUNK * REUSE)
        if batch == 0 or not buffer.chunks:
            add_chunk(number)
        generator = torch.Generator().manual_seed(rank_seed(SEED, 3, step))
        latents, tokens, objects = buffer.sample(settings.batch_size, generator)
        b = len(latents)
        dropout, mask_padding = torch.rand(2, b, generator=generator).to(device)
        tokens = torch.where((dropout < CAPTION_DROPOUT)[:, None], no_caption, tokens)
        stratified = (torch.arange(b) + torch.rand(b, generator=generator)) * len(model.snr) / b
        noise = randn_like(latents, generator)
        t = stratified.long().to(device)
        return model(latents, tokens, objects, t, noise, mask_padding < PADDING_MASK_RATIO)  # type: ignore[no-any-return]

    def evaluate(ema: dict[str, Tensor]) -> dict[str, float]:
        pipeline = assemble(job.out, ema)
        write_sheet(out / "sheet.png", generate(pipeline, PROMPTS, DEFAULT_STEPS, DEFAULT_GUIDANCE, SEED), columns=8)
        pipeline.save_pretrained(job.out / "pipeline")
        return attention_iou(pipeline, held_out_batches)

    fit(model, compute_losses, out, job.budget, settings, evaluate)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (b, 32), padded as in the pipeline."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    tokens: Tensor = batch.input_ids
    return tokens


# -- the pipeline


def export(job: Job) -> None:
    """Write the pipeline, with the fine-tuned decoder if there is one, to the folder that the package ships."""
    ema = {k.removeprefix("ema."): v for k, v in load_file(job.out / "unet-training" / "state.safetensors").items()}
    pipeline = assemble(job.out, ema)
    if (job.out / "vae-tuned").is_dir():
        pipeline.vae = AutoencoderTiny.from_pretrained(job.out / "vae-tuned")
    pipeline.vae.register_to_config(_name_or_path="synthgen/tiny")  # instead of a path on this machine
    pipeline.unet.half()  # in the file only: it is loaded as float32
    pipeline.save_pretrained(WEIGHTS)
    for path in WEIGHTS.rglob("*.safetensors"):
        path.chmod(0o644)


def assemble(out: Path, ema: dict[str, Tensor]) -> StableDiffusionPipeline:
    """Build the pipeline from the parts in ``out`` and the EMA weights of U-Net and text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    return StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(out / "vae"),
        text_encoder=load_ema(networks.text_encoder(tokenizer), "text_encoder.", ema),
        tokenizer=tokenizer,
        unet=load_ema(networks.unet(), "unet.", ema),
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_ema(module: M, prefix: str, ema: dict[str, Tensor]) -> M:
    """Load the EMA weights under ``prefix`` into a module, in evaluation mode."""
    weights = {name.removeprefix(prefix): p.cpu() for name, p in ema.items() if name.startswith(prefix)}
    module.load_state_dict(weights, strict=False)
    return module.eval()


# -- the command line


TRAININGS: dict[str, Callable[[Job], None]] = {"vae": train_vae, "unet": train_unet, "decoder": train_decoder}


def run_process(index: int, processes: int, rendezvous: str, command: str, job: Job) -> None:
    """Run one process of a training."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=processes)
    TRAININGS[command](job)
    barrier()
    if processes > 1:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=sorted([*TRAININGS, "begin", "export"]))
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and sample sheets")
    add_budget_options(parser)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="settings for the machine (cpu)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the model first, which takes minutes on a CPU (default: on a GPU)",
    )
    parser.add_argument("--recognised", type=Path, help="file of synthgen.tiny.recognised: train more on other objects")
    parser.add_argument("--processes", type=int, default=1, help="one per core; one on a GPU")
    args = parser.parse_args()
    budget = parse_budget(parser, args) if args.command in TRAININGS else Budget()
    os.environ["OMP_NUM_THREADS"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]
    if args.compile is not None:
        preset = replace(preset, compile=args.compile)
    job = Job(args.data, args.out, budget, preset, args.recognised)
    if args.command == "export":
        export(job)
    elif args.command == "begin":
        try:
            begin(job)
        except FileExistsError as error:
            parser.error(str(error))
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (args.processes, f"{folder}/rendezvous", args.command, job)
            spawn(run_process, arguments, nprocs=args.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
