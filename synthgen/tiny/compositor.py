"""Compose training images for the tiny model: one to three rendered objects over a perspective crop of a panorama.

A composite knows its caption, the words of it that name objects, and the exact mask of each: what no photograph gives.
"""

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from synthgen.tiny import IMAGE_SIZE
from synthgen.tiny.paint import COLOURS

__all__ = ["LAYOUTS", "MAX_OBJECTS", "SCENES", "Composites", "Compositor", "Layout", "Names", "article"]

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
OPENINGS = {"a photo of {}": 0.7, "{}": 0.2, "a picture of {}": 0.1}  # with their shares


@dataclass(frozen=True)
class Layout:
    """How the objects of a composite stand to one another, and what its caption says of it.

    The image is the square [-1, 1]², x to the right and y down. Fields ``{0}``, ``{1}``, ... of a phrase are the
    objects at the places of that number.
    """

    share: float  # of all composites
    places: tuple[tuple[float, float], ...]  # the objects' centres
    stray: tuple[float, float]  # how far from there, in x and y, at most
    side: tuple[float, float]  # of an object, as a share of the image's side, from and to
    phrases: dict[str, float]  # with their shares
    first_in_front: bool = False  # otherwise any object may hide another


LAYOUTS: tuple[Layout, ...] = (
    Layout(0.55, ((0.0, 0.06),), (0.18, 0.12), (0.62, 0.88), {"{0}": 1.0}),
    Layout(
        0.24,
        ((-0.48, 0.1), (0.48, 0.1)),
        (0.06, 0.2),
        (0.42, 0.54),
        {"{0} and {1}": 0.6, "{0} next to {1}": 0.2, "{0} to the left of {1}": 0.1, "{1} to the right of {0}": 0.1},
    ),
    Layout(
        0.07,
        ((0.0, -0.48), (0.0, 0.48)),
        (0.2, 0.04),
        (0.40, 0.50),
        {"{0} above {1}": 0.5, "{1} below {0}": 0.5},
    ),
    Layout(
        0.07,
        ((0.26, 0.32), (-0.2, -0.2)),
        (0.06, 0.06),
        (0.50, 0.60),
        {"{0} in front of {1}": 0.5, "{1} behind {0}": 0.5},
        first_in_front=True,
    ),
    Layout(
        0.07,
        ((-0.64, 0.1), (0.0, 0.1), (0.64, 0.1)),
        (0.03, 0.3),
        (0.33, 0.38),
        {"{0}, {1} and {2}": 1.0},
    ),
)
MAX_OBJECTS = max(len(layout.places) for layout in LAYOUTS)

WITH_SCENE = 0.5  # share of captions that name the scene
WITH_ALIAS = 0.5  # at most this share of objects is called by an ImageNet name, less where they have few
PAINTED = 0.4  # share of the objects that have painted renderings; these are called by their colour
FAMILIAR: tuple[str, ...] = (  # what people try first, and the demo draws
    *("panda", "cactus", "lion", "strawberry", "elephant", "car", "penguin", "bus", "owl", "tractor", "butterfly"),
    *("rocket", "mushroom", "sailboat", "house", "laptop", "dog", "cat", "horse", "fish", "flower", "tree", "apple"),
    *("pizza", "guitar", "chair", "airplane", "bicycle", "umbrella", "rabbit", "frog", "clock"),
)
FAMILIAR_WEIGHT = 3.0  # they are drawn so much more often than the others
HELD_OUT_YAW = 5.0  # held-out views look at most this far, in degrees, from the seam of a panorama
FIELD_OF_VIEW = (56.0, 70.0)  # degrees
HELD_OUT_FIELD_OF_VIEW = (56.0, 58.0)  # narrower, so that no corner of a view meets one of training's
PITCH = (-12.0, 8.0)  # degrees above the horizon
TILT = 6.0  # degrees that an object leans, at most


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
        """Read ``objects.json``, ``models.json`` and ``imagenet.json``."""
        files = [json.loads((folder / name).read_text(encoding="utf-8")) for name in ("objects.json", "models.json")]
        own = tuple(dict.fromkeys(name for file in files for name in file))
        aliases: dict[str, list[str]] = {name: [] for name in own}
        for row in json.loads((folder / "imagenet.json").read_text(encoding="utf-8")):
            if row["name"] != row["object"]:
                aliases[row["object"]].append(row["name"])
        return cls(own, tuple(tuple(aliases[name]) for name in own))

    def captions(self) -> list[str]:
        """Every name and every phrase of the captions, for the tokenizer."""
        names = [*self.own, *(name for names in self.aliases for name in names)]
        phrases = [phrase for layout in LAYOUTS for phrase in layout.phrases]
        return [*map(article, names), *COLOURS, *OPENINGS, *phrases, *SCENES.values()]

    def weights(self) -> Tensor:
        """How often each object is drawn, (objects,), sum 1: more where it is familiar or answers to many names."""
        weight = torch.tensor([(1 + len(names)) ** 0.25 for names in self.aliases])
        weight[[self.own.index(name) for name in FAMILIAR if name in self.own]] *= FAMILIAR_WEIGHT
        return weight / weight.sum()


@dataclass(frozen=True)
class Composites:
    """A batch of b composites; words stand in the order of the caption, masks in that of the words, then empty."""

    images: Tensor  # uint8 (b, H, W, 3)
    captions: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # without article and colour
    spans: tuple[tuple[tuple[int, int], ...], ...]  # where each word stands in the caption, in characters
    objects: tuple[tuple[str, ...], ...]  # the object behind each word
    masks: Tensor  # bool (b, MAX_OBJECTS, H, W), what is seen of each word

    def first(self, num: int) -> "Composites":
        """The first ``num`` of them."""
        return Composites(
            self.images[:num],
            self.captions[:num],
            self.words[:num],
            self.spans[:num],
            self.objects[:num],
            self.masks[:num],
        )


@dataclass(frozen=True)
class Thing:
    """One object of a composite: which, in what rendering."""

    object: int
    rendering: int


class Compositor:
    """Draws composites on ``device``; the same generator (a CPU one) in the same state gives the same batch.

    Training sees the part of each panorama, and those views of an object, that the held-out set does not: backgrounds
    share no pixel. Objects of a single drawing are the same in both.
    """

    def __init__(self, data: Path, names: Names, *, held_out: bool = False, device: str = "cpu") -> None:
        objects = load_file(data / "objects.safetensors")
        self.names, self.held_out, self.device = names, held_out, torch.device(device)
        self.rgba = (objects["rgba"].permute(0, 3, 1, 2).float() / 255).to(self.device)  # n 4 h w, premultiplied
        self.colours = [tuple(COLOURS)[k] if k >= 0 else "" for k in objects["colour"].tolist()]
        self.plain: list[list[int]] = [[] for _ in names.own]  # renderings of each object in its own colours
        self.painted: list[list[int]] = [[] for _ in names.own]
        of, kept_back = objects["object"].tolist(), objects["held_out"].tolist()
        several = {k for k, back in zip(of, kept_back, strict=True) if back}  # objects with views to hold out
        for row, k in enumerate(of):
            if self.colours[row]:
                self.painted[k].append(row)
            elif k not in several or kept_back[row] == held_out:
                self.plain[k].append(row)
        panoramas = load_file(data / "panoramas.safetensors")
        self.scenes = tuple(SCENES)
        stack = torch.stack([panoramas[scene] for scene in self.scenes]).permute(3, 0, 1, 2).float() / 255
        self.height, self.width = stack.shape[2:]
        wrapped = torch.cat([stack[..., -1:], stack, stack[..., :1]], dim=3)  # one column more at either end
        self.atlas = wrapped.reshape(1, 3, -1, self.width + 2).to(self.device)  # panoramas one above the other
        drawn = torch.tensor([bool(rows) for rows in self.plain])
        self.weights = names.weights() * drawn

    def draw(self, num: int, generator: torch.Generator, layouts: Sequence[Layout] = LAYOUTS) -> Composites:
        """Compose ``num`` images, of the ``layouts`` by their shares."""
        scene = torch.randint(len(self.scenes), (num,), generator=generator)
        shares = torch.tensor([layout.share for layout in layouts])
        chosen = [layouts[k] for k in torch.multinomial(shares, num, replacement=True, generator=generator).tolist()]
        things = [self._things(len(layout.places), generator) for layout in chosen]
        layers, depth = self._objects(chosen, things, generator)  # b k 4 H W and b k
        order = depth.argsort(dim=1)  # back to front
        behind = torch.gather(layers, 1, order[:, :, None, None, None].expand_as(layers))
        through = (1 - behind[:, :, 3:]).flip(1).cumprod(1).flip(1)  # light that passes a layer and all before it
        seen = behind * torch.cat([through[:, 1:], torch.ones_like(through[:, :1])], dim=1)
        image = self._background(scene, generator) * through[:, 0] + seen[:, :, :3].sum(1)
        captions, words, spans, places = zip(
            *(self._caption(*row, generator) for row in zip(chosen, things, scene.tolist(), strict=True)), strict=True
        )
        named = torch.tensor([[*row, *range(len(row), MAX_OBJECTS)] for row in places], device=self.device)
        layer = torch.gather(order.argsort(dim=1), 1, named)  # of each word
        return Composites(
            images=(image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
            captions=captions,
            words=words,
            spans=spans,
            objects=tuple(
                tuple(self.names.own[row[place].object] for place in named)
                for row, named in zip(things, places, strict=True)
            ),
            masks=torch.gather(seen[:, :, 3], 1, layer[:, :, None, None].expand_as(seen[:, :, 3])) > 0.5,
        )

    def _things(self, num: int, generator: torch.Generator) -> list[Thing]:
        """``num`` different objects, each in one of its renderings."""
        things = []
        for k in torch.multinomial(self.weights, num, generator=generator).tolist():
            painted = self.painted[k] and float(torch.rand((), generator=generator)) < PAINTED
            options = self.painted[k] if painted else self.plain[k]
            things.append(Thing(k, options[int(torch.randint(len(options), (), generator=generator))]))
        return things

    def _background(self, scene: Tensor, generator: torch.Generator) -> Tensor:
        """Perspective crops of the panoramas ``scene``, (b, 3, H, W) in [0, 1]."""
        b, size = len(scene), IMAGE_SIZE
        if self.held_out:
            yaw = uniform((b,), -HELD_OUT_YAW, HELD_OUT_YAW, generator)
        else:
            clear = HELD_OUT_YAW + FIELD_OF_VIEW[1] + 4  # a view's corners reach further than its field, by 5° at most
            yaw = uniform((b,), clear, 360 - clear, generator)
        pitch = uniform((b,), *PITCH, generator).deg2rad().to(self.device)
        field = HELD_OUT_FIELD_OF_VIEW if self.held_out else FIELD_OF_VIEW
        half = (uniform((b,), *field, generator) / 2).deg2rad().tan().to(self.device)
        flip = (1 - 2.0 * (torch.rand(b, generator=generator) < 0.5)).to(self.device)
        gain = uniform((b, 1, 1, 1), 0.85, 1.15, generator).to(self.device)
        yaw, scene = yaw.to(self.device), scene.to(self.device)
        axis = (torch.arange(size, device=self.device) + 0.5) / size * 2 - 1
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
        return (crops * gain).clamp(0, 1)

    def _objects(
        self, layouts: Sequence[Layout], things: Sequence[Sequence[Thing]], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Place the objects.

        Returns premultiplied layers (b, MAX_OBJECTS, 4, H, W), empty where there is none, and how near each is to the
        eye, (b, MAX_OBJECTS).
        """
        present = torch.tensor([[k < len(row) for k in range(MAX_OBJECTS)] for row in things])
        num = int(present.sum())
        of = [layout for layout, row in zip(layouts, things, strict=True) for _ in row]  # a row an object from here on
        place = torch.tensor([place for layout in layouts for place in layout.places])
        rendering = torch.tensor([thing.rendering for row in things for thing in row])
        low, high = torch.tensor([layout.side for layout in of]).T
        side = low + (high - low) * torch.rand(num, generator=generator)
        stray = torch.tensor([layout.stray for layout in of]) * uniform((num, 2), -1, 1, generator)
        room = (1 - side)[:, None]  # how far the centre may be with the object still inside
        x, y = (place + stray).clamp(-room, room).T
        angle = uniform((num,), -TILT, TILT, generator).deg2rad()
        gain = torch.cat([uniform((num, 1), 0.85, 1.1, generator).expand(num, 3), torch.ones(num, 1)], dim=1)
        cos, sin = angle.cos() / side, angle.sin() / side
        inverse = torch.stack(  # from the image's square to the object's
            [torch.stack([cos, sin, -cos * x - sin * y], dim=-1), torch.stack([-sin, cos, sin * x - cos * y], dim=-1)],
            dim=-2,
        ).to(self.device)
        grid = F.affine_grid(inverse, [num, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        drawn = F.grid_sample(self.rgba[rendering.to(self.device)], grid, align_corners=False)
        layers = drawn.new_zeros(*present.shape, 4, IMAGE_SIZE, IMAGE_SIZE)
        layers[present.to(self.device)] = drawn * gain.to(self.device)[:, :, None, None]
        depth = torch.rand(present.shape, generator=generator)
        stacked = torch.tensor([layout.first_in_front for layout in layouts])
        depth[:, 0] += stacked
        return layers, depth.to(self.device)

    def _caption(
        self, layout: Layout, things: Sequence[Thing], scene: int, generator: torch.Generator
    ) -> tuple[str, tuple[str, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
        """Write a caption: its text, the words that name the objects, where they stand, the place of each object."""
        phrase, opening = pick(layout.phrases, generator), pick(OPENINGS, generator)
        template = opening.format(phrase)
        if float(torch.rand((), generator=generator)) < WITH_SCENE:
            template = f"{template} {SCENES[self.scenes[scene]]}"
        text, words, spans, places = "", [], [], []
        for literal, field, _, _ in string.Formatter().parse(template):
            text += literal
            if field is not None:
                thing = things[int(field)]
                word = self._name(thing.object, generator)
                text += article(f"{self.colours[thing.rendering]} {word}".lstrip())
                words.append(word)
                spans.append((len(text) - len(word), len(text)))
                places.append(int(field))
        return text, tuple(words), tuple(spans), tuple(places)

    def _name(self, k: int, generator: torch.Generator) -> str:
        aliases = self.names.aliases[k]
        share = min(WITH_ALIAS, len(aliases) / (len(aliases) + 3))
        if float(torch.rand((), generator=generator)) < share:
            return aliases[int(torch.randint(len(aliases), (), generator=generator))]
        return self.names.own[k]


def pick(options: dict[str, float], generator: torch.Generator) -> str:
    """One of the options, by their shares."""
    return list(options)[int(torch.multinomial(torch.tensor(list(options.values())), 1, generator=generator))]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)
