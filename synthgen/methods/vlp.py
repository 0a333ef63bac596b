"""Match images to texts, which may say where each word's object is, and objects to their words."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synthgen.augment import Augment
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._names import number_of
from synthgen.methods._processes import gather, longest, share_of_mean
from synthgen.methods._products import products, unit
from synthgen.methods._regions import pool, regions
from synthgen.models.draws import uniform
from synthgen.models.dual import DualEncoder, save_dual_encoder
from synthgen.models.layers import initialize
from synthgen.models.text import ImageReader, TextConfig, TextEncoder, TextTokenizer, first_words
from synthgen.models.vit import VisionTransformer

__all__ = ["VLP"]

#: Streams of a sample's draws.
POSITION, NEGATIVES = range(2)

COLDEST, WARMEST = 0.001, 0.5  # the range of the learned temperature, as in ALBEF's code

FAR = -1e4  # in place of a similarity that does not count: its exponential is 0, and its gradient too


class VLP(Method):
    """Vision-language pretraining by contrast and matching (ITC and ITM of ALBEF, Li et al., 2021, and of BLIP, 2022).

    v, u  = unit vectors of image and text                             s: learned temperature
    y     = 1 / (number of images with that text), 0 for other texts
    ITC   = 1/2 mean CE(v.U / s, y) + 1/2 mean CE(u.V / s, y)          U, V: of all images of the step, on all processes
    ITM   = mean CE of "they belong together" over each pair, each text with another image, each image with another text
    loss  = ITC + ITM

    For ITM a text's tokens look at the image's patch tokens. The other image is drawn with probability softmax(u.V/s),
    the other text with softmax(v.U/s): the likely mistakes. Equal texts are no mistakes, and texts whose tokens are
    equal as far as they are read are equal. Images without a text are left out.

    With ``position_share`` above 0 that share of the texts is lengthened by a sentence such as "The dog is in block 5."
    (Free-ATM; the idea of position prompts is PTP's, Wang et al., 2022). The word is drawn from those whose mask covers
    ``min_area`` of the view or more. The block is that of the middle of the mask's box after crop and flip, on a grid
    of ``blocks`` by ``blocks`` numbered from 1 row by row. No detector is asked. A caption that leaves the sentence no
    room within ``max_tokens`` is cut by as many tokens as it takes.

    With ``region_weight`` above 0 that many times ITC between objects and words is added: u is then the vector of the
    word alone as a text, v that of the mean of the patch tokens under its mask, and for as many rows again that of the
    mean of them all. A word counts where its mask covers half a patch, the first ``max_regions`` such words of an
    image. What is known of the paper and what is our choice: docs/methods.md.
    """

    guided: ClassVar = {"region_weight": 1.0}
    reads_texts: ClassVar = True
    min_images: ClassVar = 2

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        position_share: float = 0.0,  # share of the texts that say where an object is
        blocks: int = 3,  # rows, and columns, of the grid that those texts count in
        min_area: float = 0.001,  # of such an object's mask, as a share of the view
        region_weight: float = 0.0,  # of the loss that matches objects under masks to their words; 0: none
        max_regions: int = 3,  # objects of an image, at most
        text_depth: int = 0,  # blocks of the text tower; 0: half the encoder's
        reader_depth: int = 0,  # blocks of what looks at image and text; 0: half the encoder's
        embed_dim: int = 256,  # length of the vectors that are compared
        max_words: int = 22,  # words of a text that are read, at most
        max_tokens: int = 48,  # of a text
        temperature: float = 0.07,  # where the learned one begins
        tokenizer: str = "",  # tokenizer.json, or a folder with one; that of the shipped model where it is empty
    ) -> None:
        super().__init__()
        for name, share in (("position_share", position_share), ("min_area", min_area)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {share}")
        if min(blocks, embed_dim, max_words, max_regions) < 1 or min(text_depth, reader_depth) < 0 or max_tokens < 4:
            raise ValueError(
                "blocks, embed_dim, max_words and max_regions must be 1 or more, text_depth and reader_depth 0 or "
                "more, max_tokens 4 or more"
            )
        if region_weight < 0:
            raise ValueError(f"region_weight must not be negative, but is {region_weight}")
        if not COLDEST <= temperature <= WARMEST:
            raise ValueError(f"temperature must lie between {COLDEST} and {WARMEST}, not {temperature}")
        config = encoder.config
        self.encoder = encoder
        self.tokenizer = TextTokenizer(tokenizer, max_tokens)
        self.text = TextEncoder(
            TextConfig(
                vocab_size=self.tokenizer.vocab_size,
                max_tokens=max_tokens,
                dim=config.dim,
                depth=text_depth or max(1, config.depth // 2),
                num_heads=config.num_heads,
                embed_dim=embed_dim,
                max_words=max_words,
            )
        )
        self.image_head, self.text_head = nn.Linear(config.dim, embed_dim), nn.Linear(config.dim, embed_dim)
        self.reader = ImageReader(config.dim, config.num_heads, reader_depth or max(1, config.depth // 2))
        self.match_head = nn.Linear(config.dim, 2)
        for head in (self.image_head, self.text_head, self.match_head):
            head.apply(initialize)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.position_share, self.blocks, self.min_area, self.max_words = position_share, blocks, min_area, max_words
        self.region_weight, self.max_regions = region_weight, max_regions

    @property
    def uses_masks(self) -> bool:
        """Masks say where objects are."""
        return max(self.position_share, self.region_weight) > 0

    def check(self, samples: Sequence[Sample]) -> None:
        """Texts, and masks if guided."""
        super().check(samples)
        if not any(sample.text for sample in samples):
            raise ConfigError(
                f"no text in the {len(samples)} samples looked at, and vlp matches images to texts; "
                "give shards with a member txt, or a prompt in their json"
            )

    def check_start(self, folder: Path) -> None:
        """Its tokens must be ours: a number that stands for another piece of text would teach nonsense."""
        path = folder / "tokenizer.json"
        if path.is_file() and path.read_text(encoding="utf-8") != self.tokenizer.json:
            raise ConfigError(
                f"the training in {folder} had another tokenizer.json than this one has; put back the one that lies "
                f"there, or begin with its encoder alone, such as {folder}/transformers"
            )

    def views(self) -> Augment:
        """PTP's crop of half the area or more; a text that says left or right is not mirrored."""
        return Augment(size=self.encoder.config.image_size, scale=(0.5, 1.0), keep_sides=True)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of some images with their texts."""
        device = batch.images.device
        texts = self.texts(batch)
        told = torch.tensor([bool(text) for text in texts], device=device)
        tokens, real, names = self.read(texts, [number_of(text) for text in texts], device)
        padding = longest(tokens.shape[1], device) - tokens.shape[1]
        tokens, real = F.pad(tokens, (0, padding)), F.pad(real, (0, padding))
        image, text = self.encoder(batch.images)[:, 1:], self.text(tokens, real)  # b n d, b t d
        v, u = unit(self.image_head(image.mean(1))), unit(self.text_head(text[:, 0]))

        usable = gather(told)
        fits = _alike(names) & usable  # b B: texts that say the same
        scale = self.temperature.clamp(COLDEST, WARMEST)
        to_texts, to_images = (
            (products(ours, gather(theirs)) / scale).masked_fill(~usable, FAR) for ours, theirs in ((v, u), (u, v))
        )
        itc = (self.contrast(to_texts, fits, told) + self.contrast(to_images, fits, told)) / 2

        drawn = uniform(batch.seeds, 2, stream=NEGATIVES)
        other_image, has_image = _draw(to_images.detach(), usable & ~fits, drawn[:, 0])
        other_text, has_text = _draw(to_texts.detach(), usable & ~fits, drawn[:, 1])
        known = self.reader(
            torch.cat([text, text, gather(text)[other_text]]),
            torch.cat([real, real, gather(real)[other_text]]),
            torch.cat([image, gather(image)[other_image], image]),
        )
        asked = torch.cat([told, told & has_image, told & has_text])
        itm, matched = self.match(known, asked)
        metrics = {
            "itc": itc.detach(),
            "itm": itm.detach(),
            "retrieved": (fits.gather(1, to_texts.argmax(1, keepdim=True)).squeeze(1) & told).float().mean(),
            "matched": matched,
            "with_text": told.float().mean(),
            "temperature": scale.detach(),
        }
        loss = itc + itm
        if self.region_weight > 0:
            named, metrics["named"] = self.name_regions(batch, image, scale)
            metrics["regions"] = named.detach()
            loss = loss + self.region_weight * named
        return StepOutput(loss, metrics)

    def name_regions(
        self, batch: Batch, image: Float[Tensor, "b n d"], scale: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """ITC of what lies under each mask, and of the whole image, with its word; how often masks find theirs."""
        found = regions((batch,), self.encoder.config.patch_size, self.max_regions)
        spelled = {number_of(word): word for words in batch.words for word in words}
        numbers, place = torch.unique(found.words, return_inverse=True)  # each word is read once
        listed: list[int] = numbers.tolist()
        tokens, real, names = self.read([spelled.get(number, "") for number in listed], listed, image.device)
        under_mask, everywhere = found.shares[0], torch.ones_like(found.shares[0])
        v = unit(self.image_head(pool(image, torch.cat([under_mask, everywhere], 1))))  # b 2k e
        u = unit(self.text_head(self.text(tokens, real)[:, 0]))[place.repeat(1, 2)]
        there = found.present.repeat(1, 2)
        present, usable = there.flatten(), gather(there).flatten()
        fits = _alike(names[place.repeat(1, 2)]) & usable
        to_words, to_regions = (
            (products(ours.flatten(0, 1), gather(theirs).flatten(0, 1)) / scale).masked_fill(~usable, FAR)
            for ours, theirs in ((v, u), (u, v))
        )
        loss = (self.contrast(to_words, fits, present) + self.contrast(to_regions, fits, present)) / 2
        right = fits.gather(1, to_words.argmax(1, keepdim=True)).view_as(there)[:, : self.max_regions] & found.present
        return loss, right.sum() / found.present.sum().clamp(min=1)

    def contrast(
        self, logits: Float[Tensor, "b B"], fits: Bool[Tensor, "b B"], told: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy against all that fit, in equal shares; the mean over the images with a text."""
        wanted = torch.where(fits, logits.log_softmax(1), 0.0).sum(1) / fits.sum(1).clamp(min=1)
        return share_of_mean(-wanted, told)

    def match(
        self, known: Float[Tensor, "c d"], asked: Bool[Tensor, " c"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of "they belong together", true of the first third, and how often it was answered right."""
        belong = (torch.arange(len(known), device=known.device) < len(known) // 3).long()
        verdict = self.match_head(known).float()
        right = (verdict.argmax(1) == belong) & asked
        loss = share_of_mean(F.cross_entropy(verdict, belong, reduction="none"), asked)
        return loss, right.sum() / asked.sum().clamp(min=1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The temperature is kept in its range: outside it would have no gradient, and never come back."""
        self.temperature.clamp_(COLDEST, WARMEST)

    def read(
        self, texts: Sequence[str], numbers: Sequence[int], device: torch.device
    ) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"], Int[Tensor, "n 2"]]:
        """Tokens, which of them are text, and two names of each text: its number, and that of its tokens as read."""
        tokens, real = self.tokenizer(texts)
        rows = zip(tokens.tolist(), real.sum(1).tolist(), strict=True)
        names = [*zip(numbers, (number_of(str(row[:length])) for row, length in rows), strict=True)]
        return tokens.to(device), real.to(device), torch.tensor(names, dtype=torch.long, device=device)

    def texts(self, batch: Batch) -> list[str]:
        """What the text tower reads: each caption's first words, and for a share of them where one word's object is."""
        captions = [first_words(text, self.max_words) for text in batch.texts]
        if not (self.position_share and batch.masks.shape[1]):
            return captions
        drawn = uniform(batch.seeds, 2, stream=POSITION).tolist()
        seen = ((batch.masks.float().mean((2, 3)) >= self.min_area) & batch.present).tolist()
        places = blocks_of(batch.masks, self.blocks).tolist()
        texts = []
        for row, caption in enumerate(captions):
            words = [number for number, _ in enumerate(batch.words[row][: len(seen[row])]) if seen[row][number]]
            if words and drawn[row][0] < self.position_share:
                number = words[int(drawn[row][1] * len(words))]
                sentence = f"The {batch.words[row][number]} is in block {places[row][number]}."
                caption = self.lengthened(caption, sentence) if caption else sentence
            texts.append(caption)
        return texts

    def lengthened(self, caption: str, sentence: str) -> str:
        """Of a caption as many tokens as leave room for the sentence, and the sentence; where none would, the caption.

        Whether a text fits is asked of the text itself: how tokens join at a cut is the tokenizer's affair.
        """
        whole = f"{caption.rstrip(' .')}. {sentence}"
        if self.tokenizer.holds(whole):
            return whole
        begun = [f"{caption[:end].rstrip(' .')}. {sentence}" for end in self.tokenizer.ends(caption)]
        tried = [sentence, *begun]
        count = bisect_left(tried, True, key=lambda text: not self.tokenizer.holds(text))
        return tried[count - 1] if count else caption

    def export(self, folder: Path) -> None:
        """Both towers, for retrieval: see :func:`synthgen.models.dual.load_dual_encoder`."""
        dual = DualEncoder(self.encoder, self.text, self.image_head, self.text_head, self.tokenizer)
        save_dual_encoder(dual, folder)


def blocks_of(masks: Bool[Tensor, "b k H W"], blocks: int) -> Int[Tensor, "b k"]:
    """The block, from 1 and row by row, in which the middle of each mask's box lies; an empty mask's says nothing."""
    row, column = (_middle(masks.any(axis)) for axis in (3, 2))
    down, right = ((middle * blocks).long().clamp(max=blocks - 1) for middle in (row, column))
    return down * blocks + right + 1


def _middle(line: Bool[Tensor, "b k n"]) -> Float[Tensor, "b k"]:
    """The middle between the first and the last that is set, as a share of the length."""
    length = line.shape[2]
    first, behind = line.float().argmax(2), length - line.flip(2).float().argmax(2)
    return (first + behind) / (2 * length)


def _alike(names: Int[Tensor, "*n 2"]) -> Bool[Tensor, "m M"]:
    """Which of this process's texts are the same as which of all: those that have a name in common."""
    return (names.flatten(0, -2)[:, None] == gather(names).flatten(0, -2)).any(2)


def _draw(
    logits: Float[Tensor, "b B"], allowed: Bool[Tensor, "b B"], lot: Float[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """One of the allowed for each row, with probability softmax + 1e-4 (BLIP's code); and whether there is one."""
    chances = torch.where(allowed, logits.softmax(1) + 1e-4, 0.0).cumsum(1)
    reach = lot[:, None] * (1 - 1e-6) * chances[:, -1:]  # below the whole, also after rounding
    drawn = torch.searchsorted(chances, reach, right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1), allowed.any(1)
