"""Compose training images for the tiny model: one to three rendered objects over a perspective crop of a panorama.

Each composite comes with its caption, the words of the caption that name objects, and an exact mask of each word.
"""

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from synthgen.tiny import IMAGE_SIZE
from synthgen.tiny.paint import COLOURS

__all__ = [
    "FAMILIAR",
    "LAYOUTS",
    "MAX_OBJECTS",
    "SCENES",
    "Composites",
    "Compositor",
    "Layout",
    "Names",
    "article",
    "preprocess",
]

FOLDER = Path(__file__).parent

SCENES: dict[str, str] = {  # panorama → its phrase in captions
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
TEMPLATES = {"a photo of {}": 0.7, "{}": 0.2, "a picture of {}": 0.1}  # of captions, with their probabilities


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An arrangement of objects, and the phrases that describe it.

    The image is the square [-1, 1]², x to the right and y down. In a phrase, ``{k}`` stands for the object at
    ``centres[k]``.
    """

    weight: float  # relative frequency
    centres: tuple[tuple[float, float], ...]  # of the objects
    jitter: tuple[float, float]  # largest offset from a centre, in x and y
    size: tuple[float, float]  # range of an object's side, as a share of the image's
    phrases: dict[str, float]  # with their probabilities
    first_in_front: bool = False  # otherwise the depth order is random


LAYOUTS: tuple[Layout, ...] = (
    Layout(weight=0.55, centres=((0.0, 0.06),), jitter=(0.18, 0.12), size=(0.62, 0.88), phrases={"{0}": 1.0}),
    Layout(
        weight=0.24,
        centres=((-0.48, 0.1), (0.48, 0.1)),
        jitter=(0.06, 0.2),
        size=(0.42, 0.54),
        phrases={
            "{0} and {1}": 0.6,
            "{0} next to {1}": 0.2,
            "{0} to the left of {1}": 0.1,
            "{1} to the right of {0}": 0.1,
        },
    ),
    Layout(
        weight=0.07,
        centres=((0.0, -0.48), (0.0, 0.48)),
        jitter=(0.2, 0.04),
        size=(0.40, 0.50),
        phrases={"{0} above {1}": 0.5, "{1} below {0}": 0.5},
    ),
    Layout(
        weight=0.07,
        centres=((0.26, 0.32), (-0.2, -0.2)),
        jitter=(0.06, 0.06),
        size=(0.50, 0.60),
        phrases={"{0} in front of {1}": 0.5, "{1} behind {0}": 0.5},
        first_in_front=True,
    ),
    Layout(
        weight=0.07,
        centres=((-0.64, 0.1), (0.0, 0.1), (0.64, 0.1)),
        jitter=(0.03, 0.3),
        size=(0.33, 0.38),
        phrases={"{0}, {1} and {2}": 1.0},
    ),
)
MAX_OBJECTS = max(len(layout.centres) for layout in LAYOUTS)

SCENE_PROBABILITY = 0.5  # that a caption names the scene
MAX_ALIAS_PROBABILITY = 0.5  # that an object is called by an ImageNet name; lower for objects with few of them
PAINT_PROBABILITY = 0.4  # that an object with painted renderings is one of them; captions name its colour
FAMILIAR: tuple[str, ...] = (  # what people try first, and what the demo shows
    *("panda", "cactus", "lion", "strawberry", "elephant", "car", "penguin", "bus", "owl", "tractor", "butterfly"),
    *("rocket", "mushroom", "sailboat", "house", "laptop", "dog", "cat", "horse", "fish", "flower", "tree", "apple"),
    *("pizza", "guitar", "chair", "airplane", "bicycle", "umbrella", "rabbit", "frog", "clock"),
)
FAMILIAR_WEIGHT = 3.0  # how much more often these are sampled than others
HELD_OUT_YAW = 5.0  # held-out views look at most this many degrees away from the seam of a panorama
FIELD_OF_VIEW = (56.0, 70.0)  # degrees
HELD_OUT_FIELD_OF_VIEW = (56.0, 58.0)  # narrower, so that no corner of a held-out view is seen in training
PITCH = (-12.0, 8.0)  # degrees above the horizon
MAX_ROTATION = 6.0  # of an object, degrees


def article(name: str) -> str:
    """Put "a" or "an" before a name, by its sound as far as the first letters tell."""
    lower = name.lower()
    consonant = lower.startswith(("uni", "eu", "one", "uku", "use", "u-"))
    vowel = lower[0] in "aeiou" or lower.startswith(("hour", "honest", "heir"))
    return f"{'an' if vowel and not consonant else 'a'} {name}"


def preprocess(images: Tensor) -> Tensor:
    """Images, uint8 (b, H, W, 3), as networks take them: float (b, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Names:
    """The names of the objects: ``own[k]``, and the ImageNet class names ``aliases[k]`` that captions use as well."""

    own: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Names":
        """Read ``objects.json``, ``models.json`` and ``imagenet.json``."""
        files = [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("objects.json", "models.json")]
        own = tuple(dict.fromkeys(name for file in files for name in file))
        aliases: dict[str, list[str]] = {name: [] for name in own}
        for row in json.loads((folder / "imagenet.json").read_text(encoding="utf-8")):
            if row["name"] != row["object"]:
                aliases[row["object"]].append(row["name"])
        return cls(own, tuple(tuple(aliases[name]) for name in own))

    def captions(self) -> list[str]:
        """Every name and every phrase of the captions, to train the tokenizer on."""
        names = [*self.own, *(name for names in self.aliases for name in names)]
        phrases = [phrase for layout in LAYOUTS for phrase in layout.phrases]
        return [*map(article, names), *COLOURS, *TEMPLATES, *phrases, *SCENES.values()]

    def weights(self) -> Tensor:
        """The sampling probability of each object, (objects,): higher if it is familiar or has many aliases."""
        weight = torch.tensor([(1 + len(names)) ** 0.25 for names in self.aliases])
        weight[[self.own.index(name) for name in FAMILIAR if name in self.own]] *= FAMILIAR_WEIGHT
        return weight / weight.sum()


@dataclass(frozen=True)
class Composites:
    """A batch of b composites; words are in the order of their caption, and masks in the order of the words."""

    images: Tensor  # uint8 (b, H, W, 3)
    captions: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # without article and colour
    spans: tuple[tuple[tuple[int, int], ...], ...]  # of each word in the caption, in characters
    objects: tuple[tuple[str, ...], ...]  # the object that each word names
    masks: Tensor  # bool (b, MAX_OBJECTS, H, W), the visible part of each word's object; empty after the last word

    def first(self, num: int) -> "Composites":
        """The first ``num`` composites."""
        return Composites(*(field[:num] for field in vars(self).values()))


class Instance(NamedTuple):
    """One object of a composite."""

    object: int
    rendering: int  # row of ``objects.safetensors``


class Caption(NamedTuple):
    """A caption, its words with their spans, and for each word the number of its object in the layout."""

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]


class Compositor:
    """Samples composites on ``device``; the same state of the generator (a CPU one) gives the same batch.

    Training and held-out composites show different parts of the panoramas, without a common pixel, and different views
    of an object. Objects with a single rendering are the same in both.
    """

    def __init__(self, data: Path, names: Names, *, held_out: bool = False, device: str = "cpu") -> None:
        objects = load_file(data / "objects.safetensors")
        self.names, self.held_out, self.device = names, held_out, torch.device(device)
        self.rgba = (objects["rgba"].permute(0, 3, 1, 2).float() / 255).to(self.device)  # n 4 h w, premultiplied
        self.colours = [tuple(COLOURS)[k] if k >= 0 else "" for k in objects["colour"].tolist()]
        self.plain: list[list[int]] = [[] for _ in names.own]  # renderings of each object in its own colours
        self.painted: list[list[int]] = [[] for _ in names.own]
        owners, is_held_out = objects["object"].tolist(), objects["held_out"].tolist()
        with_views = {k for k, view in zip(owners, is_held_out, strict=True) if view}  # objects with held-out views
        for row, k in enumerate(owners):
            if self.colours[row]:
                self.painted[k].append(row)
            elif k not in with_views or is_held_out[row] == held_out:
                self.plain[k].append(row)
        self.weights = names.weights() * torch.tensor([bool(rows) for rows in self.plain])
        panoramas = load_file(data / "panoramas.safetensors")
        self.scenes = tuple(SCENES)
        stack = torch.stack([panoramas[scene] for scene in self.scenes]).permute(3, 0, 1, 2).float() / 255
        self.height, self.width = stack.shape[2:]
        wrapped = torch.cat([stack[..., -1:], stack, stack[..., :1]], dim=3)  # one more column at either end
        self.atlas = wrapped.reshape(1, 3, -1, self.width + 2).to(self.device)  # all panoramas, one below the other

    def sample(self, num: int, generator: torch.Generator, layouts: Sequence[Layout] = LAYOUTS) -> Composites:
        """Compose ``num`` images; layouts are chosen by their weights."""
        scenes = torch.randint(len(self.scenes), (num,), generator=generator)
        weights = torch.tensor([layout.weight for layout in layouts])
        chosen = [layouts[k] for k in torch.multinomial(weights, num, replacement=True, generator=generator).tolist()]
        instances = [self._instances(len(layout.centres), generator) for layout in chosen]
        layers, depth = self._render(chosen, instances, generator)  # b k 4 H W and b k
        order = depth.argsort(dim=1)  # back to front
        layers = torch.gather(layers, 1, order[:, :, None, None, None].expand_as(layers))
        transmittance = (1 - layers[:, :, 3:]).flip(1).cumprod(1).flip(1)  # of each layer and all in front of it
        in_front = torch.cat([transmittance[:, 1:], torch.ones_like(transmittance[:, :1])], dim=1)
        visible = layers * in_front
        image = self._background(scenes, generator) * transmittance[:, 0] + visible[:, :, :3].sum(1)
        rows = zip(chosen, instances, scenes.tolist(), strict=True)
        captions = [self._caption(*row, generator) for row in rows]
        positions = [[*one.positions, *range(len(one.positions), MAX_OBJECTS)] for one in captions]
        layer = torch.gather(order.argsort(dim=1), 1, torch.tensor(positions, device=self.device))  # of each word
        alpha = visible[:, :, 3]
        return Composites(
            images=(image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
            captions=tuple(one.text for one in captions),
            words=tuple(one.words for one in captions),
            spans=tuple(one.spans for one in captions),
            objects=tuple(
                tuple(self.names.own[row[k].object] for k in one.positions)
                for row, one in zip(instances, captions, strict=True)
            ),
            masks=torch.gather(alpha, 1, layer[:, :, None, None].expand_as(alpha)) > 0.5,
        )

    def _instances(self, num: int, generator: torch.Generator) -> list[Instance]:
        """Sample ``num`` different objects, each in one of its renderings."""
        instances = []
        for k in torch.multinomial(self.weights, num, generator=generator).tolist():
            painted = self.painted[k] and float(torch.rand((), generator=generator)) < PAINT_PROBABILITY
            renderings = self.painted[k] if painted else self.plain[k]
            instances.append(Instance(k, renderings[int(torch.randint(len(renderings), (), generator=generator))]))
        return instances

    def _background(self, scenes: Tensor, generator: torch.Generator) -> Tensor:
        """Perspective crops of the panoramas ``scenes``, (b, 3, H, W) in [0, 1]."""
        b, size = len(scenes), IMAGE_SIZE
        if self.held_out:
            yaw = uniform((b,), -HELD_OUT_YAW, HELD_OUT_YAW, generator)
        else:
            margin = HELD_OUT_YAW + FIELD_OF_VIEW[1] + 4  # a view's corners reach up to 5° further than its field
            yaw = uniform((b,), margin, 360 - margin, generator)
        pitch = uniform((b,), *PITCH, generator).deg2rad().to(self.device)
        field_of_view = HELD_OUT_FIELD_OF_VIEW if self.held_out else FIELD_OF_VIEW
        half = (uniform((b,), *field_of_view, generator) / 2).deg2rad().tan().to(self.device)
        flip = (1 - 2.0 * (torch.rand(b, generator=generator) < 0.5)).to(self.device)
        gain = uniform((b, 1, 1, 1), 0.85, 1.15, generator).to(self.device)
        yaw, scenes = yaw.to(self.device), scenes.to(self.device)
        axis = (torch.arange(size, device=self.device) + 0.5) / size * 2 - 1
        right = (flip * half)[:, None, None] * axis[None, None, :]  # in camera coordinates, on the plane at distance 1
        down = half[:, None, None] * axis[None, :, None]
        cos, sin = pitch.cos()[:, None, None], pitch.sin()[:, None, None]
        forward, up = (cos + down * sin).expand(b, size, size), sin - down * cos
        azimuth = yaw.deg2rad()[:, None, None] + torch.atan2(right, forward)
        altitude = torch.atan2(up, torch.hypot(right, forward))
        u = azimuth.div(2 * math.pi).remainder(1) * self.width + 1  # pixels from the left edge of the wrapped atlas
        v = (0.5 - altitude / math.pi) * self.height + scenes[:, None, None] * self.height
        grid = torch.stack([u / self.atlas.shape[3], v / self.atlas.shape[2]], dim=-1) * 2 - 1
        crops = F.grid_sample(self.atlas, grid.reshape(1, b * size, size, 2), align_corners=False)
        crops = crops.reshape(3, b, size, size).transpose(0, 1)
        return (crops * gain).clamp(0, 1)

    def _render(
        self, layouts: Sequence[Layout], instances: Sequence[Sequence[Instance]], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Place the objects.

        Returns premultiplied layers (b, MAX_OBJECTS, 4, H, W), transparent for missing objects, and their order in
        depth (b, MAX_OBJECTS), larger in front.
        """
        present = torch.tensor([[k < len(row) for k in range(MAX_OBJECTS)] for row in instances])
        num = int(present.sum())
        owners = [layout for layout, row in zip(layouts, instances, strict=True) for _ in row]  # of each object
        centres = torch.tensor([centre for layout in layouts for centre in layout.centres])
        renderings = torch.tensor([instance.rendering for row in instances for instance in row])
        low, high = torch.tensor([layout.size for layout in owners]).T
        side = low + (high - low) * torch.rand(num, generator=generator)
        offsets = torch.tensor([layout.jitter for layout in owners]) * uniform((num, 2), -1, 1, generator)
        limit = (1 - side)[:, None]  # keeps the object inside the image
        x, y = (centres + offsets).clamp(-limit, limit).T
        angle = uniform((num,), -MAX_ROTATION, MAX_ROTATION, generator).deg2rad()
        gain = torch.cat([uniform((num, 1), 0.85, 1.1, generator).expand(num, 3), torch.ones(num, 1)], dim=1)
        cos, sin = angle.cos() / side, angle.sin() / side
        inverse = torch.stack(  # from coordinates of the image to those of the object
            [torch.stack([cos, sin, -cos * x - sin * y], dim=-1), torch.stack([-sin, cos, sin * x - cos * y], dim=-1)],
            dim=-2,
        ).to(self.device)
        grid = F.affine_grid(inverse, [num, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        rendered = F.grid_sample(self.rgba[renderings.to(self.device)], grid, align_corners=False)
        layers = rendered.new_zeros(*present.shape, 4, IMAGE_SIZE, IMAGE_SIZE)
        layers[present.to(self.device)] = rendered * gain.to(self.device)[:, :, None, None]
        depth = torch.rand(present.shape, generator=generator)
        depth[:, 0] += torch.tensor([layout.first_in_front for layout in layouts])
        return layers, depth.to(self.device)

    def _caption(
        self, layout: Layout, instances: Sequence[Instance], scene: int, generator: torch.Generator
    ) -> Caption:
        """Write the caption of one composite."""
        phrase, template = choose(layout.phrases, generator), choose(TEMPLATES, generator)
        template = template.format(phrase)
        if float(torch.rand((), generator=generator)) < SCENE_PROBABILITY:
            template = f"{template} {SCENES[self.scenes[scene]]}"
        text, words, spans, positions = "", [], [], []
        for literal, field, _, _ in string.Formatter().parse(template):
            text += literal
            if field is not None:
                instance = instances[int(field)]
                word = self._name(instance.object, generator)
                text += article(f"{self.colours[instance.rendering]} {word}".lstrip())
                words.append(word)
                spans.append((len(text) - len(word), len(text)))
                positions.append(int(field))
        return Caption(text, tuple(words), tuple(spans), tuple(positions))

    def _name(self, k: int, generator: torch.Generator) -> str:
        """One of the names of an object."""
        aliases = self.names.aliases[k]
        probability = min(MAX_ALIAS_PROBABILITY, len(aliases) / (len(aliases) + 3))
        if float(torch.rand((), generator=generator)) < probability:
            return aliases[int(torch.randint(len(aliases), (), generator=generator))]
        return self.names.own[k]


def choose(options: dict[str, float], generator: torch.Generator) -> str:
    """One of the options, by their probabilities."""
    return list(options)[int(torch.multinomial(torch.tensor(list(options.values())), 1, generator=generator))]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)
