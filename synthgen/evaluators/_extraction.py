"""One pass over images that extracts what evaluators need: features, patch features with the truth, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Float32, Int, Int16, UInt8
from torch import Tensor

from synthgen.datasets import ImageDataset, Sample
from synthgen.diffusion.features import Activations, FeatureReader
from synthgen.evaluators import OF_SCENES, DenseFeatures, ImageTextPairs, Need, Row
from synthgen.evaluators._attentive import LARGEST
from synthgen.evaluators._views import Boxes, Collate, EvalImage, EvalImages
from synthgen.loader import Reader
from synthgen.models.dual import DualEncoder
from synthgen.models.vit import Encoder, EncoderConfig

__all__ = ["Extracted", "Extractor", "class_numbers", "joined_classes", "scenes", "text_pairs"]

_BACKGROUND = "background"
_NETWORK_NEEDS: frozenset[Need] = OF_SCENES | {"features", "maps"}  # that take a forward pass
_PIXEL_CELL = 4  # cells per side of the grid of a patch's colours, the pixel baseline


@dataclass(slots=True)
class Extracted:
    """What was extracted from the images of one source, in their order."""

    features: dict[str, Float32[Tensor, "n d"]] = field(default_factory=dict)  # by row of the table, for all images
    patches: dict[str, Float16[Tensor, "m d h w"]] = field(default_factory=dict)  # for images with masks or boxes
    pixels: Int16[Tensor, "m S S"] | None = None
    boxes: list[Boxes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # for images with masks or boxes
    num_boxes_only: int = 0  # how many of these have boxes but no masks
    names: dict[str, int] = field(default_factory=dict)  # class numbers used in pixels, in order of appearance
    embeddings: Float32[Tensor, "n e"] | None = None
    maps: dict[str, list[Float16[Tensor, "l t _ _ _"]]] = field(default_factory=dict)  # by row, one per block
    latents: Float32[Tensor, "l c h w"] | None = None
    images: UInt8[Tensor, "l S S 3"] | None = None  # at the encoder's size
    generator_images: UInt8[Tensor, "l s s 3"] | None = None  # at the generator's size


@dataclass(frozen=True, slots=True)
class View:
    """How images are preprocessed: square size and patch size in pixels, normalised as (pixels - mean) / std."""

    image_size: int
    patch_size: int
    mean: tuple[float, ...] = EncoderConfig.mean
    std: tuple[float, ...] = EncoderConfig.std

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class _Outputs:
    """One batch and the networks' outputs for it."""

    images: Float[Tensor, "b 3 S S"]
    tokens: dict[str, Float[Tensor, "b _ _"]]  # by network, class token first; empty if no evaluator needs them
    generator: Activations | None
    latents: Float32[Tensor, "b c h w"] | None


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Extracts what the evaluators of ``rows`` need; each image is decoded once and passes once through each network.

    The centre square of an image is resized to the encoder's input size, and for a generator to that of its own
    images. Rows of the result are those of ``networks``, ``generator``, and ``pixels``. Pixel features are the image at
    32 pixels or fewer, pixel patch features a patch's colours on a 4 x 4 grid. The generator's features are its
    activations averaged over space, its patch features the activations resized to the encoder's grid.
    """

    networks: Mapping[str, Encoder]  # all of one shape; empty if only a generator is evaluated
    rows: Mapping[Need, Collection[Row]]  # rows to evaluate, by what the evaluators need
    generator: FeatureReader | None = None
    dual: DualEncoder | None = None
    pool: str = "mean"
    by_label: bool = False  # a masked pixel's class is the image's label, not the word
    batch_size: int = 128
    num_workers: int = 0
    device: str = "cpu"

    @property
    def needs(self) -> frozenset[Need]:
        """What the evaluators need."""
        return frozenset(self.rows)

    @cached_property
    def view(self) -> View:
        """The view of the networks, or without networks that of the generator."""
        for network in self.networks.values():
            config = network.config
            return View(config.image_size, config.patch_size, config.mean, config.std)
        assert self.generator is not None
        side, (_, rows, columns) = self.generator.image_size, self.generator.shape
        return View(side, next(size for size in range(side // min(rows, columns), side + 1) if side % size == 0))

    @property
    def patch_bytes(self) -> int:
        """Bytes of one image's patch features (float16) and its ground truth (int16 per pixel)."""
        view = self.view
        width = sum(one.config.dim for row, one in self.networks.items() if self.keeps(row, *OF_SCENES))
        if self.generator is not None and self.keeps("generator", *OF_SCENES):
            width += self.generator.shape[0]
        width += 3 * min(_PIXEL_CELL, view.patch_size) ** 2 if self.keeps("pixels", *OF_SCENES) else 0
        return 2 * (view.grid**2 * width + view.image_size**2)

    @cached_property
    def labelled_bytes(self) -> int:
        """Bytes of one labelled image: its maps (float16), latents (float32) and pixels (uint8)."""
        total = 0
        if "maps" in self.needs:
            kept = [one.config.dim for row, one in self.networks.items() if self.keeps(row, "maps")]
            total += 2 * min(self.view.grid, LARGEST) ** 2 * sum(kept)
        if "maps" in self.needs and self.generator is not None and self.keeps("generator", "maps"):
            sizes = [(dim, *(min(side, LARGEST) for side in sides)) for dim, *sides in self.generator.shapes]
            total += 2 * len(self.generator.timesteps) * sum(map(math.prod, sizes))
        if "latents" in self.needs and self.generator is not None:
            side = self.generator.image_size
            total += self.generator.latents(torch.zeros(1, side, side, 3, dtype=torch.uint8)).nbytes
        if "images" in self.needs:
            total += 3 * self.view.image_size**2 if self.networks else 0
            total += 3 * self.generator.image_size**2 if self.generator is not None else 0
        return total

    def keeps(self, row: str, *needs: Need) -> bool:
        """Whether a row of the table is evaluated for any of ``needs``."""
        return any(row in self.rows.get(need, ()) for need in needs)

    def extract(
        self,
        samples: ImageDataset,
        numbers: Sequence[int],
        scene_numbers: Sequence[int],
        label_numbers: Sequence[int],
        advance: Callable[[int], None],
    ) -> Extracted:
        """Extract from the images ``numbers``.

        Patch features are kept for images in ``scene_numbers``, which have masks or boxes; maps, latents and pixels for
        images in ``label_numbers``.
        """
        view, with_boxes = self.view, set(scene_numbers)
        positions = {number: position for position, number in enumerate(label_numbers)}
        generator_size = self.generator.image_size if self.generator else 0
        items = EvalImages(samples, numbers, view.image_size, with_boxes=with_boxes, generator_size=generator_size)
        batches = Reader(items, Collate(view.mean, view.std), batch_size=self.batch_size, num_workers=self.num_workers)
        found, start, kept = Extracted(), 0, 0
        with torch.no_grad():
            for images, batch in batches:
                outputs = self._run_networks(images.to(self.device), batch)
                if "features" in self.needs:
                    self._keep_features(found, outputs, start, len(numbers))
                if self.dual is not None:
                    found.embeddings = _put(
                        found.embeddings, self.dual.embed_images(outputs.images), start, len(numbers)
                    )
                numbered = list(enumerate(numbers[start : start + len(batch)]))  # row of the batch, sample
                chosen = [row for row, number in numbered if number in with_boxes and self._has_class(batch[row])]
                if chosen:
                    self._keep_patches(found, outputs, [batch[row] for row in chosen], chosen, kept, len(with_boxes))
                chosen_labelled = [row for row, number in numbered if number in positions]
                if chosen_labelled:
                    first = positions[numbers[start + chosen_labelled[0]]]
                    self._keep_maps(found, outputs, chosen_labelled, first, len(label_numbers))
                    self._keep_images(found, [batch[row] for row in chosen_labelled], first, len(label_numbers))
                start, kept = start + len(batch), kept + len(chosen)
                advance(len(batch))
        found.patches = {name: patches[:kept] for name, patches in found.patches.items()}
        found.pixels = None if found.pixels is None else found.pixels[:kept]
        return found

    def _run_networks(self, images: Tensor, batch: Sequence[EvalImage]) -> _Outputs:
        activations = latents = None
        needs = self.needs & _NETWORK_NEEDS
        if self.generator is not None:
            pixels = _generator_pixels(batch)
            if needs:
                largest = LARGEST if "maps" in needs else 0
                activations = self.generator.read(pixels, [row.sample.key for row in batch], self.view.grid, largest)
            if "latents" in self.needs:
                latents = self.generator.latents(pixels)
        tokens = {name: network(images) for name, network in self.networks.items() if self.keeps(name, *needs)}
        return _Outputs(images, tokens, activations, latents)

    def _keep_features(self, found: Extracted, outputs: _Outputs, start: int, length: int) -> None:
        tokens = {name: x for name, x in outputs.tokens.items() if self.keeps(name, "features")}
        pooled = {name: x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1) for name, x in tokens.items()}
        if outputs.generator is not None and self.keeps("generator", "features"):
            pooled["generator"] = outputs.generator.pooled
        if self.keeps("pixels", "features"):
            pooled["pixels"] = F.adaptive_avg_pool2d(outputs.images, min(32, self.view.image_size)).flatten(1)
        for name, features in pooled.items():
            found.features[name] = _put(found.features.get(name), features, start, length)

    def _keep_patches(
        self,
        found: Extracted,
        outputs: _Outputs,
        batch: Sequence[EvalImage],
        chosen: Sequence[int],
        start: int,
        length: int,
    ) -> None:
        grid = self.view.grid
        maps = {name: _on_grid(x[chosen], grid) for name, x in outputs.tokens.items() if self.keeps(name, *OF_SCENES)}
        if outputs.generator is not None and self.keeps("generator", *OF_SCENES):
            maps["generator"] = outputs.generator.patches[chosen]
        if self.keeps("pixels", *OF_SCENES):
            cell = min(_PIXEL_CELL, self.view.patch_size)
            maps["pixels"] = F.pixel_unshuffle(F.adaptive_avg_pool2d(outputs.images[chosen], grid * cell), cell)
        for name, patches in maps.items():
            found.patches[name] = _put(found.patches.get(name), patches.half(), start, length)
        pixels = torch.from_numpy(np.stack([self._pixel_classes(found.names, row.sample) for row in batch]))
        found.pixels = _put(found.pixels, pixels, start, length)
        for row in batch:
            found.keys.append(row.sample.key)
            found.num_boxes_only += row.sample.label_map is None
            boxes = tuple((self._class_name(row.sample, name), edges) for name, edges in row.boxes)
            found.boxes.append(boxes)
            for name, _ in boxes:
                found.names.setdefault(name, len(found.names) + 1)

    def _keep_maps(self, found: Extracted, outputs: _Outputs, chosen: Sequence[int], start: int, length: int) -> None:
        if "maps" in self.needs:
            size = min(self.view.grid, LARGEST)
            maps = {
                name: [F.adaptive_avg_pool2d(_on_grid(x[chosen], self.view.grid), size)[:, None].half()]
                for name, x in outputs.tokens.items()
                if self.keeps(name, "maps")
            }
            if outputs.generator is not None and self.keeps("generator", "maps"):
                maps["generator"] = [block[chosen] for block in outputs.generator.maps]
            for name, blocks in maps.items():
                before = found.maps.get(name, [None] * len(blocks))
                pairs = zip(before, blocks, strict=True)
                found.maps[name] = [_put(whole, block, start, length) for whole, block in pairs]
        if outputs.latents is not None:
            found.latents = _put(found.latents, outputs.latents[chosen], start, length)

    def _keep_images(self, found: Extracted, batch: Sequence[EvalImage], start: int, length: int) -> None:
        if "images" in self.needs and self.networks:
            pixels = torch.from_numpy(np.stack([row.sample.image for row in batch]))
            found.images = _put(found.images, pixels, start, length)
        if "images" in self.needs and self.generator is not None:
            found.generator_images = _put(found.generator_images, _generator_pixels(batch), start, length)

    def _has_class(self, row: EvalImage) -> bool:
        """Whether each masked pixel or box has a known class; with ``by_label`` that takes one word and a label."""
        words = {name for name, _ in row.boxes} if row.sample.label_map is None else row.sample.words
        return not self.by_label or (row.sample.label is not None and len(words) == 1)

    def _class_name(self, sample: Sample, word: str) -> str:
        return sample.label or "" if self.by_label else word.lower()

    def _pixel_classes(self, names: dict[str, int], sample: Sample) -> Int16[np.ndarray, "S S"]:
        if sample.label_map is None:  # boxes give no pixel classes
            return np.zeros(sample.image.shape[:2], np.int16)
        numbers = np.zeros(256, np.int16)  # numbers beyond the last word have no class
        present = set(np.unique(sample.label_map).tolist())
        for number, word in enumerate(sample.words, start=1):
            if number in present:
                numbers[number] = names.setdefault(self._class_name(sample, word), len(names) + 1)
        pixels: Int16[np.ndarray, "S S"] = numbers[sample.label_map]
        return pixels


def joined_classes(train: Extracted, test: Extracted) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The background and the sorted training classes; and the same followed by the classes only test images have."""
    known = (_BACKGROUND, *sorted(train.names))
    return known, (*known, *sorted(test.names.keys() - train.names.keys()))


def scenes(found: Extracted, classes: tuple[str, ...]) -> dict[str, DenseFeatures]:
    """Patch features by row of the table, with the truth as numbers into ``classes``; call it only once."""
    if found.pixels is None:
        return {}
    number = {name: place for place, name in enumerate(classes[1:], start=1)}
    table = torch.zeros(len(found.names) + 1, dtype=torch.int16)
    for name, old in found.names.items():
        table[old] = number[name]
    for image in found.pixels:
        image.copy_(table[image.long()])
    boxes = tuple(torch.tensor([edges for _, edges in image]).view(-1, 4) for image in found.boxes)
    box_classes = tuple(torch.tensor([number[name] for name, _ in image], dtype=torch.long) for image in found.boxes)
    truth = found.pixels, boxes, box_classes, tuple(found.keys), classes
    return {row: DenseFeatures(patches, *truth) for row, patches in found.patches.items()}


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> Int[Tensor, " n"]:
    """The index of each label in ``classes``, -1 if it is not there."""
    known = {name: number for number, name in enumerate(classes)}
    return torch.tensor([known.get(label, -1) for label in labels])


def text_pairs(
    found: Extracted, captions: Sequence[Sequence[str]], dual: DualEncoder, batch_size: int = 256
) -> ImageTextPairs:
    """Embeddings of captioned images, and of each distinct caption."""
    assert found.embeddings is not None
    rows = [index for index, texts in enumerate(captions) if texts]
    numbers: dict[str, int] = {}
    pairs = [
        (image, numbers.setdefault(text, len(numbers)))
        for image, row in enumerate(rows)
        for text in dict.fromkeys(captions[row])
    ]
    texts = list(numbers)
    with torch.no_grad():
        embedded = [
            dual.embed_texts(texts[start : start + batch_size]).float().cpu()
            for start in range(0, len(texts), batch_size)
        ]
    of_image, of_text = (torch.tensor(part) for part in zip(*pairs, strict=True))
    return ImageTextPairs(found.embeddings[rows], torch.cat(embedded), of_image, of_text)


def _generator_pixels(batch: Sequence[EvalImage]) -> UInt8[Tensor, "b s s 3"]:
    """The images at the generator's size."""
    return torch.from_numpy(np.stack([row.generator_image for row in batch if row.generator_image is not None]))


def _on_grid(tokens: Tensor, grid: int) -> Float[Tensor, "b d g g"]:
    """Patch tokens, without the class token, arranged on their grid."""
    return tokens[:, 1:].mT.reshape(len(tokens), -1, grid, grid)


def _put(whole: Tensor | None, part: Tensor, start: int, length: int) -> Tensor:
    """Write ``part`` into ``whole``, allocated with ``length`` rows at the first part to avoid later copies."""
    if whole is None:
        dtype = part.dtype if part.dtype in (torch.float16, torch.int16, torch.uint8) else torch.float32
        whole = torch.empty(length, *part.shape[1:], dtype=dtype)
    whole[start : start + len(part)] = part.cpu()
    return whole
