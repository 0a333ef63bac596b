"""A classifier of objects, to evaluate what the model generates: ``python -m synthgen.tiny.classifier`` trains it.

It is trained on training composites only, never on generated images: half of each batch are whole composites of one
object, the other half are crops around any object. At the end it prints its accuracy on held-out composites.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from synthgen.tiny.compositor import LAYOUTS, Composites, Compositor, Names, preprocess
from synthgen.tiny.loop import Budget, Losses, Settings, add_budget_options, fit, parse_budget, rank_seed
from synthgen.tiny.truth import SEED as HELD_OUT_SEED

__all__ = ["MARGIN", "SIZE", "Classifier", "accuracy", "boxes", "crop", "matches", "train", "whole"]

SIZE = 64  # pixels a side of the classifier's input
MARGIN = 0.15  # around a box, as a share of its longer side; up to twice as much in training
MIN_AREA = 0.01  # share of the image; smaller objects are not trained on
SEED = 4_000_000
SETTINGS = Settings(3e-3, 64, warmup_steps=200, constant_ratio=0.2, weight_decay=0.05, ema_decay=0.998, eval_every=300)
CHUNK = 64  # composites sampled at once
EVERY = 4  # steps between chunks, so that each object is seen a few times
CHUNKS = 32  # the buffer's size


class Block(nn.Module):
    """A residual block of two convolutions; ``stride`` 2 halves the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        shortcut = [nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1, bias=False)]
        self.past = nn.Identity() if inputs == outputs else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.past(x))


class Classifier(nn.Module):
    """A residual network of 0.6 M parameters: crops (b, 3, 64, 64) in [-1, 1] → logits (b, names)."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 96, 2), Block(96, 128, 2))
        self.head = nn.Linear(128, len(names))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of crops."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits

    @torch.no_grad()
    def classify(self, crops: Tensor) -> list[str]:
        """The name of the most likely object in each crop (b, 3, 64, 64)."""
        parts = [self(part.contiguous(memory_format=torch.channels_last)) for part in torch.split(crops, 64)]
        return [self.names[k] for part in parts for k in part.argmax(dim=1).tolist()]

    def save(self, path: Path) -> None:
        """Write weights and names as one safetensors file, atomically."""
        partial = path.with_suffix(".part")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, partial, metadata={"names": json.dumps(self.names)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Read what :meth:`save` wrote, in evaluation mode."""
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["names"])
        classifier = cls(tuple(names))
        classifier.load_state_dict(load_file(path))
        classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return classifier.eval()


def boxes(masks: Tensor) -> Tensor:
    """The bounding box of each mask, bool (n, H, W): float (n, 4), x0, y0, x1, y1, the ends exclusive; 0 if empty."""
    limits = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # columns, then rows
        first = occupied.int().argmax(dim=1)
        last = occupied.shape[1] - occupied.flip(1).int().argmax(dim=1)
        limits.append(torch.stack([first, last], dim=1) * occupied.any(dim=1, keepdim=True))
    return torch.stack(limits, dim=2).flatten(1).float()


def crop(images: Tensor, boxes: Tensor, margin: float | Tensor = MARGIN) -> Tensor:
    """Crop a square around each box and resize it by bilinear sampling: (b, 3, 64, 64) in [-1, 1].

    A square that extends beyond the image is moved inside; it is at most as large as the image.

    Args:
        images: uint8 (b, H, W, 3), one for each box.
        boxes: float (b, 4), x0, y0, x1, y1 in pixels.
        margin: added on every side, as a share of the box's longer side; a number or (b,).
    """
    height, width = images.shape[1:3]
    size = torch.tensor([width, height])
    first, last = boxes[:, :2], boxes[:, 2:]
    side = ((last - first).amax(dim=1) * (1 + 2 * torch.as_tensor(margin))).clamp(4, min(height, width))[:, None]
    centre = torch.minimum(torch.maximum((first + last) / 2, side / 2), size - side / 2)
    scale, shift = side / size, 2 * centre / size - 1
    zero = torch.zeros(len(boxes))
    rows = [torch.stack([scale[:, 0], zero, shift[:, 0]], 1), torch.stack([zero, scale[:, 1], shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(boxes), 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(preprocess(images), grid, padding_mode="border", align_corners=False)


def whole(images: Tensor) -> Tensor:
    """Whole square images, uint8 (b, H, W, 3), as input of the classifier: (b, 3, 64, 64) in [-1, 1]."""
    height, width = images.shape[1:3]
    return crop(images, torch.tensor([[0.0, 0.0, width, height]]).expand(len(images), 4), 0.0)


class Buffer:
    """The newest CHUNKS chunks of composites, from which training crops are sampled."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.labels = {name: k for k, name in enumerate(names)}
        self.chunks: list[tuple[Tensor, Tensor, Tensor]] = []  # images; per object its image, label, if alone; boxes
        self.rows, self.alone = torch.empty(0, 2), torch.empty(0, 2)  # chunk and object: all, and those alone

    def add(self, batch: Composites) -> None:
        """Add a chunk; the oldest is dropped when the buffer is full."""
        rows = [
            (image, word, self.labels[name], int(len(objects) == 1))
            for image, objects in enumerate(batch.objects)
            for word, name in enumerate(objects)
        ]
        table = torch.tensor(rows)
        masks = batch.masks[table[:, 0], table[:, 1]]
        large = masks.float().mean(dim=(1, 2)) >= MIN_AREA
        self.chunks = [*self.chunks[-CHUNKS + 1 :], (batch.images, table[large][:, [0, 2, 3]], boxes(masks[large]))]
        self.rows = torch.tensor([(k, row) for k, chunk in enumerate(self.chunks) for row in range(len(chunk[1]))])
        self.alone = self.rows[torch.cat([chunk[1][:, 2] for chunk in self.chunks]).bool()]

    def sample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (num, 3, 64, 64) and labels (num,): first whole images of one object, then crops."""
        half = num // 2
        rows = [choose_rows(self.alone, half, generator), choose_rows(self.rows, num - half, generator)]
        images, labels, found = zip(*(self._object(*row) for row in torch.cat(rows).tolist()), strict=True)
        stack, around = torch.stack(images), torch.stack(found)
        around[:half] = torch.tensor([0, 0, stack.shape[2], stack.shape[1]])
        margin = 2 * MARGIN * torch.rand(num, generator=generator)
        margin[:half] *= -0.2  # whole images lose a little at the edges
        longer = (around[:, 2:] - around[:, :2]).amax(dim=1, keepdim=True)
        jitter = 0.05 * longer * (2 * torch.rand(num, 2, generator=generator) - 1)
        return augment(crop(stack, around + jitter.repeat(1, 2), margin), generator), torch.stack(labels)

    def _object(self, chunk: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The image (H, W, 3), the label and the box (4,) of an object."""
        images, table, around = self.chunks[chunk]
        return images[table[row, 0]], table[row, 1], around[row]


def choose_rows(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """``num`` rows, with replacement."""
    return rows[torch.randint(len(rows), (num,), generator=generator)]


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, gain per channel, brightness and noise, as generated images may have; x (b, 3, 64, 64)."""
    b = len(x)
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.where(torch.rand(b, 1, 1, 1, generator=generator) < 1 / 3, blurred, x)
    gain = 0.85 + 0.3 * torch.rand(b, 3, 1, 1, generator=generator)
    brightness = 0.2 * torch.rand(b, 1, 1, 1, generator=generator) - 0.1
    noise = 0.06 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return (x * gain + brightness + noise).clamp(-1, 1)


def train(
    data: Path,
    out: Path,
    budget: Budget,
    *,
    names: Names | None = None,
    settings: Settings = SETTINGS,
    num_eval: int = 512,
) -> tuple[Classifier, dict[str, float]]:
    """Train until the budget is used up and write the classifier to the file ``out``; a later call resumes.

    Returns it with its held-out :func:`accuracy` on ``num_eval`` composites. The checkpoint and the log are beside
    ``out``, in the folder of its name with ``-training``.
    """
    torch.manual_seed(SEED)
    names = names or Names.load()
    compositor, held_out = Compositor(data, names), Compositor(data, names, held_out=True)
    buffer = Buffer(names.own)
    model = Classifier(names.own)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute_losses(step: int) -> Losses:
        if step % EVERY == 0 or not buffer.chunks:
            buffer.add(compositor.sample(CHUNK, torch.Generator().manual_seed(rank_seed(SEED, 0, step // EVERY))))
        x, y = buffer.sample(settings.batch_size, torch.Generator().manual_seed(rank_seed(SEED, 1, step)))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last)).float()
        correct = (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y, label_smoothing=0.05), "right": correct}

    def ema_model(ema: dict[str, Tensor]) -> Classifier:
        """The model with EMA weights, and batch norm statistics recomputed for them."""
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(ema, strict=False)
        for module in averaged.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain mean over batches
        chunks, generator = Buffer(names.own), torch.Generator().manual_seed(rank_seed(SEED, 2))
        for k in range(4):
            chunks.add(compositor.sample(CHUNK, torch.Generator().manual_seed(rank_seed(SEED, 3, k))))
        with torch.no_grad():
            for _ in range(8):
                averaged.train()(chunks.sample(64, generator)[0].contiguous(memory_format=torch.channels_last))
        return averaged.eval()

    def evaluate(ema: dict[str, Tensor]) -> dict[str, float]:
        averaged = ema_model(ema)
        averaged.save(out)
        return accuracy(averaged, held_out, num_eval)

    ema = fit(model, compute_losses, out.with_name(f"{out.stem}-training"), budget, settings, evaluate)
    averaged = ema_model(ema)
    averaged.save(out)
    return averaged, accuracy(averaged, held_out, num_eval)


def accuracy(classifier: Classifier, compositor: Compositor, num: int) -> dict[str, float]:
    """The accuracy on ``num`` ``whole`` composites of one object, and on the ``crops`` of ``num`` composites of any."""
    whole_generator, crop_generator = (torch.Generator().manual_seed(HELD_OUT_SEED + k) for k in (0, 1))
    correct: dict[str, list[bool]] = {"whole": [], "crops": []}
    for start in range(0, num, CHUNK):
        count = min(CHUNK, num - start)
        batch = compositor.sample(count, whole_generator, LAYOUTS[:1])
        correct["whole"] += matches(classifier.classify(whole(batch.images)), [name for (name,) in batch.objects])
        batch = compositor.sample(count, crop_generator)
        rows = [(image, word) for image, objects in enumerate(batch.objects) for word in range(len(objects))]
        image, word = torch.tensor(rows).T
        predicted = classifier.classify(crop(batch.images[image], boxes(batch.masks[image, word])))
        correct["crops"] += matches(predicted, [name for objects in batch.objects for name in objects])
    return {name: round(sum(values) / max(len(values), 1), 4) for name, values in correct.items()}


def matches(predicted: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Whether each prediction is right."""
    return [one == other for one, other in zip(predicted, expected, strict=True)]


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.classifier", description=summary)
    parser.add_argument("--data", type=Path, required=True, help="folder that synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    add_budget_options(parser)
    args = parser.parse_args()
    budget = parse_budget(parser, args)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _, figures = train(args.data, args.out, budget, num_eval=2048)
    print(json.dumps({f"held_out_{name}": value for name, value in figures.items()}))


if __name__ == "__main__":
    main()
