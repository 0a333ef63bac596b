"""Classify the object in an image, to evaluate what the model draws: ``python -m synthgen.tiny.classifier`` trains it.

It learns from composites of training alone, never from an image that a model made: half from whole ones of one object,
half from squares around any object. Prints its accuracy on held-out composites.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from synthgen.tiny.compositor import LAYOUTS, Composites, Compositor, Names
from synthgen.tiny.loop import Budget, Losses, Settings, optimise, rank_seed
from synthgen.tiny.truth import SEED as HELD_OUT_SEED

__all__ = ["MARGIN", "SIZE", "Classifier", "accuracy", "boxes", "crop", "train", "whole"]

SIZE = 64  # pixels a side of what it looks at
MARGIN = 0.15  # around the box of an evaluated crop; in training up to twice that
MIN_AREA = 0.01  # share of the image that an object must cover to be learned from
SEED = 4_000_000
SETTINGS = Settings(3e-3, 64, warmup_steps=200, steady=0.2, weight_decay=0.05, ema=0.998, show_every=300)
CHUNK = 64  # composites that are composed together
EVERY = 4  # steps between two chunks, so each object is looked at a few times
CHUNKS = 32  # number of newest chunks in memory


class Block(nn.Module):
    """Two convolutions with a way past them; ``stride`` 2 halves rows and columns."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        past = [nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1, bias=False)]
        self.past = nn.Identity() if inputs == outputs else nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.past(x))


class Classifier(nn.Module):
    """A residual net of 0.6 M parameters: crops (b, 3, 64, 64) in [-1, 1] → logits (b, names)."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 96, 2), Block(96, 128, 2))
        self.head = nn.Linear(128, len(names))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of crops."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits

    @torch.no_grad()
    def classify(self, crops: Tensor) -> list[str]:
        """The name of what each crop (b, 3, 64, 64) shows."""
        parts = [self(part.contiguous(memory_format=torch.channels_last)) for part in torch.split(crops, 64)]
        return [self.names[k] for part in parts for k in part.argmax(dim=1).tolist()]

    def save(self, path: Path) -> None:
        """Write weights and names as one safetensors file."""
        part = path.with_suffix(".part")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, part, metadata={"names": json.dumps(self.names)})
        part.replace(path)

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
    """The box of each mask, bool (n, H, W) → float (n, 4): x0, y0, x1, y1, the latter two just outside; 0 for none."""
    ends = []
    for seen in (masks.any(dim=1), masks.any(dim=2)):  # columns, then rows
        first = seen.int().argmax(dim=1)
        last = seen.shape[1] - seen.flip(1).int().argmax(dim=1)
        ends.append(torch.stack([first, last], dim=1) * seen.any(dim=1, keepdim=True))
    return torch.stack(ends, dim=2).flatten(1).float()  # first x y, then last x y


def crop(images: Tensor, boxes: Tensor, margin: float | Tensor = MARGIN) -> Tensor:
    """Cut a square around each box and resize it, (b, 3, 64, 64) in [-1, 1].

    ``images`` are uint8 (b, H, W, 3), one for each of ``boxes``, float (b, 4), x0, y0, x1, y1 in pixels. ``margin``, a
    number or (b,), is added on every side, in shares of the box's longer side. A square that would leave the image is
    moved into it, and it is never larger than the image. From more than 128 pixels some are skipped.
    """
    height, width = images.shape[1:3]
    room = torch.tensor([width, height])
    first, last = boxes[:, :2], boxes[:, 2:]
    side = ((last - first).amax(dim=1) * (1 + 2 * torch.as_tensor(margin))).clamp(4, min(height, width))[:, None]
    centre = torch.minimum(torch.maximum((first + last) / 2, side / 2), room - side / 2)
    scale, shift = side / room, 2 * centre / room - 1
    zero = torch.zeros(len(boxes))
    rows = [torch.stack([scale[:, 0], zero, shift[:, 0]], 1), torch.stack([zero, scale[:, 1], shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(boxes), 3, SIZE, SIZE], align_corners=False)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def whole(images: Tensor) -> Tensor:
    """Whole square images, uint8 (b, H, W, 3), as the classifier looks at them: (b, 3, 64, 64) in [-1, 1]."""
    height, width = images.shape[1:3]
    return crop(images, torch.tensor([[0.0, 0.0, width, height]]).expand(len(images), 4), 0.0)


class Buffer:
    """The newest composites, and where their objects are."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.number = {name: k for k, name in enumerate(names)}
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # images, (rows, 3) of image, object and alone, boxes
        self.rows, self.alone = torch.empty(0, 2), torch.empty(0, 2)  # (rows, 2) of part and row of it

    def add(self, batch: Composites) -> None:
        """Take in a chunk; the oldest leaves when there are CHUNKS."""
        rows = [
            (image, word, self.number[name], int(len(objects) == 1))
            for image, objects in enumerate(batch.objects)
            for word, name in enumerate(objects)
        ]
        table = torch.tensor(rows)
        masks = batch.masks[table[:, 0], table[:, 1]]
        large = masks.float().mean(dim=(1, 2)) >= MIN_AREA
        self.parts = [*self.parts[-CHUNKS + 1 :], (batch.images, table[large][:, [0, 2, 3]], boxes(masks[large]))]
        self.rows = torch.tensor([(k, row) for k, part in enumerate(self.parts) for row in range(len(part[1]))])
        self.alone = self.rows[torch.cat([part[1][:, 2] for part in self.parts]).bool()]

    def draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crops (num, 3, 64, 64) and the objects' numbers (num,): whole images of one object, then squares."""
        half = num // 2
        chosen = [pick(self.alone, half, generator), pick(self.rows, num - half, generator)]
        images, labels, around = zip(*(self.look(*row) for row in torch.cat(chosen).tolist()), strict=True)
        pixels, sides = torch.stack(images), torch.stack(around)
        sides[:half] = torch.tensor([0, 0, pixels.shape[2], pixels.shape[1]])
        margin = 2 * MARGIN * torch.rand(num, generator=generator)
        margin[:half] *= -0.2  # of whole images a little is cut off
        longer = (sides[:, 2:] - sides[:, :2]).amax(dim=1, keepdim=True)
        stray = 0.05 * longer * (2 * torch.rand(num, 2, generator=generator) - 1)
        return disturb(crop(pixels, sides + stray.repeat(1, 2), margin), generator), torch.stack(labels)

    def look(self, part: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The image (H, W, 3), the object's number and its box (4,) of one row."""
        images, table, around = self.parts[part]
        return images[table[row, 0]], table[row, 1], around[row]


def pick(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """``num`` rows at random."""
    return rows[torch.randint(len(rows), (num,), generator=generator)]


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (b, 3, 64, 64), a third of them softer, with a little other light and noise, as drawn ones may be."""
    b = len(x)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.where(torch.rand(b, 1, 1, 1, generator=generator) < 1 / 3, soft, x)
    gain = 0.85 + 0.3 * torch.rand(b, 3, 1, 1, generator=generator)
    lift = 0.2 * torch.rand(b, 1, 1, 1, generator=generator) - 0.1
    noise = 0.06 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return (x * gain + lift + noise).clamp(-1, 1)


def train(
    data: Path,
    out: Path,
    budget: Budget,
    *,
    names: Names | None = None,
    settings: Settings = SETTINGS,
    judged: int = 512,
) -> tuple[Classifier, dict[str, float]]:
    """Train until the budget is spent and write the classifier to the file ``out``; a stopped training goes on.

    Returns it with its held-out :func:`accuracy` on ``judged`` composites. Checkpoints and the log lie beside ``out``,
    in the folder of its name with ``-training``.
    """
    torch.manual_seed(SEED)
    names = names or Names.load()
    compositor, held_out = Compositor(data, names), Compositor(data, names, held_out=True)
    buffer = Buffer(names.own)
    model = Classifier(names.own)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def losses(step: int) -> Losses:
        if step % EVERY == 0 or not buffer.parts:
            chunk = torch.Generator().manual_seed(rank_seed(SEED, 0, step // EVERY))
            buffer.add(compositor.draw(CHUNK, chunk))
        x, y = buffer.draw(settings.batch_size, torch.Generator().manual_seed(rank_seed(SEED, 1, step)))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last)).float()
        right = (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y, label_smoothing=0.05), "right": right}

    def averaged(ema: dict[str, Tensor]) -> Classifier:
        """The model with averaged weights, its norms' statistics taken anew: those of training are of other weights."""
        judge = copy.deepcopy(model)
        judge.load_state_dict(ema, strict=False)
        for module in judge.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain mean
        chunks, crops = Buffer(names.own), torch.Generator().manual_seed(rank_seed(SEED, 2))
        for k in range(4):
            chunks.add(compositor.draw(CHUNK, torch.Generator().manual_seed(rank_seed(SEED, 3, k))))
        with torch.no_grad():
            for _ in range(8):
                judge.train()(chunks.draw(64, crops)[0].contiguous(memory_format=torch.channels_last))
        return judge.eval()

    def show(ema: dict[str, Tensor]) -> dict[str, float]:
        judge = averaged(ema)
        judge.save(out)
        return accuracy(judge, held_out, judged)

    ema = optimise(model, losses, out.with_name(f"{out.stem}-training"), budget, settings, show)
    judge = averaged(ema)
    judge.save(out)
    return judge, accuracy(judge, held_out, judged)


def accuracy(classifier: Classifier, compositor: Compositor, num: int) -> dict[str, float]:
    """Share of right names: of ``num`` ``whole`` composites of one object, and of the ``crops`` of ``num`` of any."""
    first, second = (torch.Generator().manual_seed(HELD_OUT_SEED + k) for k in (0, 1))
    right: dict[str, list[bool]] = {"whole": [], "crops": []}
    for start in range(0, num, CHUNK):
        count = min(CHUNK, num - start)
        batch = compositor.draw(count, first, LAYOUTS[:1])
        right["whole"] += same(classifier.classify(whole(batch.images)), [objects[0] for objects in batch.objects])
        batch = compositor.draw(count, second)
        rows = [(image, word) for image, objects in enumerate(batch.objects) for word in range(len(objects))]
        image, word = torch.tensor(rows).T
        seen = classifier.classify(crop(batch.images[image], boxes(batch.masks[image, word])))
        right["crops"] += same(seen, [name for objects in batch.objects for name in objects])
    return {name: round(sum(values) / max(len(values), 1), 4) for name, values in right.items()}


def same(one: list[str], other: list[str]) -> list[bool]:
    """Where two lists agree."""
    return [left == right for left, right in zip(one, other, strict=True)]


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.classifier", description=summary)
    parser.add_argument("--data", type=Path, required=True, help="what synthgen.tiny.fetch prepared")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--minutes", type=float, help="train for this long, earlier calls counted in")
    parser.add_argument("--steps", type=int, help="train for so many steps, earlier calls counted in")
    args = parser.parse_args()
    if args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _, figures = train(args.data, args.out, Budget(args.minutes, args.steps), judged=2048)
    print(json.dumps({f"held_out_{name}": value for name, value in figures.items()}))


if __name__ == "__main__":
    main()
