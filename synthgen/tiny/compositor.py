"""Compose training images for the tiny model: one or two rendered objects over a perspective crop of a panorama.

A composite knows its caption, the words of it that name objects, and the exact mask of each: what no photograph gives.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from synthgen.tiny import IMAGE_SIZE

__all__ = ["SCENES", "Composites", "Compositor", "Names", "article"]

FOLDER = Path(__file__).parent

SCENES: dict[str, str] = {  # panorama → how a caption speaks of it
    "apartment": "in the apartment",
    "bridge": "on the bridge",
    "city": "in the city",
    "dawn": "at dawn",
    "esplanade": "in the mall",
    "forest": "in the forest",
    "hall": "in the hall",
    "lab": "in the lab",
    "lobby": "in the lobby",
    "night": "at night",
    "park": "in the park",
    "sky": "in the sky",
    "studio": "in the studio",
    "sunrise": "at sunrise",
    "sunset": "at sunset",
    "venice": "in venice",
    "warehouse": "in the warehouse",
    "workshop": "in the workshop",
}
OPENINGS = ("a photo of {}", "{}", "a picture of {}")
OPENING_WEIGHTS = (0.7, 0.2, 0.1)
JOINTS = ("{} and {}", "{} next to {}")
JOINT_WEIGHTS = (0.75, 0.25)

TWO_OBJECTS = 0.45  # share of composites with two objects
WITH_SCENE = 0.5  # share of captions that name the scene
WITH_ALIAS = 0.75  # at most this share of objects is called by an ImageNet name, less where they have few
HELD_OUT_YAW = 5.0  # held-out views look at most this far, in degrees, from the seam of a panorama
FIELD_OF_VIEW = (56.0, 70.0)  # degrees
HELD_OUT_FIELD_OF_VIEW = (56.0, 58.0)  # narrower, so that no corner of a view meets one of training's
PITCH = (-12.0, 8.0)  # degrees above the horizon
SUPERSAMPLE = 2  # objects are drawn this much larger, then averaged


def article(name: str) -> str:
    """Put "a" or "an" before a name, by its sound as far as the first letters tell."""
    lower = name.lower()
    consonant = lower.startswith(("uni", "eu", "one", "uku", "use", "u-"))
    vowel = lower[0] in "aeiou" or lower.startswith(("hour", "honest", "heir"))
    return f"{'an' if vowel and not consonant else 'a'} {name}"


@dataclass(frozen=True)
class Names:
    """What each object may be called: ``own[k]`` and the ImageNet class names ``aliases[k]``."""

    own: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Names":
        """Read ``objects.json`` and ``imagenet.json``."""
        own = tuple(json.loads((folder / "objects.json").read_text(encoding="utf-8")))
        aliases: dict[str, list[str]] = {name: [] for name in own}
        for row in json.loads((folder / "imagenet.json").read_text(encoding="utf-8")):
            if row["name"] != row["object"]:
                aliases[row["object"]].append(row["name"])
        return cls(own, tuple(tuple(aliases[name]) for name in own))

    def captions(self) -> list[str]:
        """Every name and every phrase of the captions, for the tokenizer."""
        names = [*self.own, *(name for names in self.aliases for name in names)]
        return [*map(article, names), *OPENINGS, *JOINTS, *SCENES.values()]

    def weights(self) -> Tensor:
        """How often each object is drawn, (objects,), sum 1: by the root of how many names it answers to."""
        weight = torch.tensor([math.sqrt(1 + len(names)) for names in self.aliases])
        return weight / weight.sum()


@dataclass(frozen=True)
class Composites:
    """A batch of b composites; an image with one object has an empty second mask."""

    images: Tensor  # uint8 (b, 64, 64, 3)
    captions: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # as they stand in the caption, in its order
    objects: tuple[tuple[str, ...], ...]  # the object behind each word
    masks: Tensor  # bool (b, 2, 64, 64), what is seen of each word

    def first(self, num: int) -> "Composites":
        """The first ``num`` of them."""
        return Composites(
            self.images[:num], self.captions[:num], self.words[:num], self.objects[:num], self.masks[:num]
        )


class Compositor:
    """Draws composites; the same generator state gives the same batch.

    Training sees the part of each panorama that held-out views do not: its crops and the held-out ones share no pixel.
    """

    def __init__(self, data: Path, names: Names, *, held_out: bool = False) -> None:
        objects = load_file(data / "objects.safetensors")
        self.names, self.held_out = names, held_out
        self.rgba = objects["rgba"].permute(0, 3, 1, 2).float() / 255  # n 4 96 96, premultiplied
        self.renderings = [torch.nonzero(objects["object"] == k).flatten().tolist() for k in range(len(names.own))]
        panoramas = load_file(data / "panoramas.safetensors")
        self.scenes = tuple(SCENES)
        stack = torch.stack([panoramas[scene] for scene in self.scenes]).permute(3, 0, 1, 2).float() / 255
        self.height, self.width = stack.shape[2:]
        wrapped = torch.cat([stack[..., -1:], stack, stack[..., :1]], dim=3)  # one column more at either end
        self.atlas = wrapped.reshape(1, 3, -1, self.width + 2)  # panoramas one above the other
        self.weights = names.weights()

    def draw(self, num: int, generator: torch.Generator) -> Composites:
        """Compose ``num`` images."""
        scene = torch.randint(len(self.scenes), (num,), generator=generator)
        two = torch.rand(num, generator=generator) < TWO_OBJECTS
        chosen = torch.stack([self._choose(generator) for _ in range(num)])  # b 2, left before right
        rendering = torch.tensor(
            [[self._pick(self.renderings[k], generator) for k in pair] for pair in chosen.tolist()]
        )
        layers = self._objects(rendering, two, generator)  # b 2 4 H W
        first_in_front = torch.rand(num, 1, 1, 1, generator=generator) < 0.5
        alpha = layers[:, :, 3:]
        hidden = torch.stack([alpha[:, 1] * ~first_in_front, alpha[:, 0] * first_in_front], dim=1)  # by the other one
        seen = layers * (1 - hidden)
        image = self._background(scene, generator) * (1 - seen[:, :, 3:].sum(1).clamp(max=1)) + seen[:, :, :3].sum(1)
        present = [pair[: 1 + both] for pair, both in zip(chosen.tolist(), two.tolist(), strict=True)]
        written = [self._caption(pair, s, generator) for pair, s in zip(present, scene.tolist(), strict=True)]
        return Composites(
            images=(image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
            captions=tuple(caption for caption, _ in written),
            words=tuple(words for _, words in written),
            objects=tuple(tuple(self.names.own[k] for k in pair) for pair in present),
            masks=seen[:, :, 3] > 0.5,
        )

    def _choose(self, generator: torch.Generator) -> Tensor:
        """Two different objects, (2,)."""
        return torch.multinomial(self.weights, 2, generator=generator)

    @staticmethod
    def _pick(options: Sequence[int], generator: torch.Generator) -> int:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def _background(self, scene: Tensor, generator: torch.Generator) -> Tensor:
        """Perspective crops of the panoramas ``scene``, (b, 3, H, W) in [0, 1]."""
        b, size = len(scene), IMAGE_SIZE
        if self.held_out:
            yaw = uniform((b,), -HELD_OUT_YAW, HELD_OUT_YAW, generator)
        else:
            clear = (
                HELD_OUT_YAW + FIELD_OF_VIEW[1] + 4
            )  # the corners of a view reach further than its field, by 5° at most
            yaw = uniform((b,), clear, 360 - clear, generator)
        pitch = uniform((b,), *PITCH, generator).deg2rad()
        field = HELD_OUT_FIELD_OF_VIEW if self.held_out else FIELD_OF_VIEW
        half = (uniform((b,), *field, generator) / 2).deg2rad().tan()
        flip = 1 - 2.0 * (torch.rand(b, generator=generator) < 0.5)
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        right = (flip * half)[:, None, None] * axis[None, None, :]  # the view's own axes; forward is 1
        down = half[:, None, None] * axis[None, :, None]
        cos, sin = pitch.cos()[:, None, None], pitch.sin()[:, None, None]
        forward, up = (cos + down * sin).expand(b, size, size), sin - down * cos
        azimuth = yaw.deg2rad()[:, None, None] + torch.atan2(right, forward)
        altitude = torch.atan2(up, torch.hypot(right, forward))
        u = azimuth.div(2 * math.pi).remainder(1) * self.width + 1  # pixels from the left edge of the wrapped atlas
        v = (0.5 - altitude / math.pi) * self.height + scene[:, None, None] * self.height
        grid = torch.stack([u / self.atlas.shape[3], v / self.atlas.shape[2]], dim=-1) * 2 - 1
        crops = F.grid_sample(self.atlas, grid.reshape(1, b * size, size, 2), align_corners=False)
        crops = crops.reshape(3, b, size, size).transpose(0, 1)
        return (crops * uniform((b, 1, 1, 1), 0.85, 1.15, generator)).clamp(0, 1)

    def _objects(self, rendering: Tensor, two: Tensor, generator: torch.Generator) -> Tensor:
        """Place the renderings, (b, 2): premultiplied layers (b, 2, 4, H, W), the second empty where not ``two``."""
        b = len(two)
        pair = two[:, None]
        side = torch.where(pair, uniform((b, 2), 0.42, 0.54, generator), uniform((b, 2), 0.58, 0.90, generator))
        shift = torch.where(pair, torch.tensor([-0.48, 0.48]) + uniform((b, 2), -0.08, 0.08, generator), 0.0)
        room = (1 - side).clamp(min=0)  # how far the centre may stray with the object still inside, of half a side
        x = torch.where(pair, shift.clamp(-room, room), room * uniform((b, 2), -0.7, 0.7, generator))
        y = room * uniform((b, 2), -0.3, 0.6, generator)
        angle = uniform((b, 2), -6.0, 6.0, generator).deg2rad()
        cos, sin = angle.cos() / side, angle.sin() / side
        inverse = torch.stack(  # from the image's square [-1, 1]² to the object's
            [
                torch.stack([cos, sin, -cos * x - sin * y], dim=-1),
                torch.stack([-sin, cos, sin * x - cos * y], dim=-1),
            ],
            dim=-2,
        )
        size = IMAGE_SIZE * SUPERSAMPLE
        grid = F.affine_grid(inverse.reshape(2 * b, 2, 3), [2 * b, 4, size, size], align_corners=False)
        layers = F.grid_sample(self.rgba[rendering.flatten()], grid, align_corners=False)
        layers = F.avg_pool2d(layers, SUPERSAMPLE).reshape(b, 2, 4, IMAGE_SIZE, IMAGE_SIZE)
        gain = torch.cat([uniform((b, 2, 1), 0.85, 1.1, generator).expand(b, 2, 3), torch.ones(b, 2, 1)], dim=2)
        present = torch.stack([torch.ones_like(two), two], dim=1)
        return layers * gain[..., None, None] * present[:, :, None, None, None]

    def _caption(self, objects: Sequence[int], scene: int, generator: torch.Generator) -> tuple[str, tuple[str, ...]]:
        """Write a caption, the object on the left named first, and say which words of it name the objects."""
        words = tuple(self._name(k, generator) for k in objects)
        things = [article(word) for word in words]
        text = things[0] if len(things) == 1 else self._weighted(JOINTS, JOINT_WEIGHTS, generator).format(*things)
        text = self._weighted(OPENINGS, OPENING_WEIGHTS, generator).format(text)
        if float(torch.rand((), generator=generator)) < WITH_SCENE:
            text = f"{text} {SCENES[self.scenes[scene]]}"
        return text, words

    def _name(self, k: int, generator: torch.Generator) -> str:
        aliases = self.names.aliases[k]
        share = min(WITH_ALIAS, len(aliases) / (len(aliases) + 3))
        if float(torch.rand((), generator=generator)) < share:
            return aliases[int(torch.randint(len(aliases), (), generator=generator))]
        return self.names.own[k]

    @staticmethod
    def _weighted(options: Sequence[str], weights: Sequence[float], generator: torch.Generator) -> str:
        return options[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)
