"""Match images to texts, which may state an object's position, and objects to their words."""

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
from synthgen.config import check_range
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._processes import gather, longest, share_of_mean
from synthgen.methods._products import products, unit
from synthgen.methods._regions import number_of, pool, regions
from synthgen.models.draws import uniform
from synthgen.models.dual import DualEncoder, save_dual_encoder
from synthgen.models.layers import initialize
from synthgen.models.linear import Linear
from synthgen.models.text import ImageReader, TextConfig, TextEncoder, TextTokenizer, first_words
from synthgen.models.vit import VisionTransformer

__all__ = ["VLP"]

#: Random streams of a sample.
POSITION, NEGATIVES = range(2)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # of the learned temperature, as in ALBEF's code

FAR = -1e4  # the logit of an excluded pair: its exponential and gradient are 0


class VLP(Method):
    """Vision-language pretraining by contrast and matching (ITC and ITM of ALBEF, Li et al., 2021, and of BLIP, 2022).

    v, u  = unit vectors of image and text                             s: learned temperature
    y     = 1 / (number of images with that text), 0 for other texts
    ITC   = 1/2 mean CE(v.U / s, y) + 1/2 mean CE(u.V / s, y)          U, V: of all images of the step, on all processes
    ITM   = mean CE of "they belong together" over each pair, each text with another image, each image with another text
    loss  = ITC + ITM

    In ITM a text's tokens attend to the image's patch tokens. Negatives are hard: the other image is drawn with
    probability softmax(u.V/s), the other text with softmax(v.U/s). Equal texts are positives of each other and never
    negatives; texts are equal if their tokens are, after truncation. Images without a text are left out.

    With ``position_share`` above 0 that share of the captions is extended by a sentence such as "The dog is in block
    5." (Free-ATM; position prompts are from PTP, Wang et al., 2022). The word is drawn from those whose mask covers
    ``min_area`` of the view or more. The block is that of the centre of the mask's box after crop and flip, on a grid
    of ``blocks`` by ``blocks`` numbered from 1 row by row. No detector is needed. A caption too long for the sentence
    to fit into ``max_tokens`` is truncated. Equal captions with different sentences are neither positives nor
    negatives of each other: both sentences may be true of both images.

    With ``region_weight`` above 0 the loss has ``region_weight`` times ITC between objects and words: u is the vector
    of the word as a text, v that of the mean patch token under its mask, and in as many further rows that of the mean
    of all patch tokens. A word counts where its mask covers half a patch, the first ``max_regions`` such words of an
    image. For what is the paper's and what is our choice see docs/methods.md.
    """

    guided: ClassVar = {"region_weight": 1.0}
    reads_texts: ClassVar = True
    min_images: ClassVar = 2

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        position_share: float = 0.0,  # share of the captions with a sentence on an object's position
        blocks: int = 3,  # rows, and columns, of the grid in those sentences
        min_area: float = 0.001,  # least area of such an object's mask, as a share of the view
        region_weight: float = 0.0,  # weight of the ITC between objects under masks and their words; 0: none
        max_regions: int = 3,  # maximum of objects per image
        text_depth: int = 0,  # blocks of the text tower; 0: half the encoder's
        reader_depth: int = 0,  # blocks of the fusion encoder for ITM; 0: half the encoder's
        embed_dim: int = 256,  # length of the compared vectors
        max_words: int = 22,  # maximum of words of a caption; the rest is cut off
        max_tokens: int = 48,  # maximum of tokens of a text
        temperature: float = 0.07,  # initial value of the learned temperature
        tokenizer: str = "",  # tokenizer.json, or a folder with one; empty: that of the shipped model
    ) -> None:
        super().__init__()
        check_range(ge=0, le=1, position_share=position_share, min_area=min_area)
        check_range(ge=1, blocks=blocks, embed_dim=embed_dim, max_words=max_words, max_regions=max_regions)
        check_range(ge=0, text_depth=text_depth, reader_depth=reader_depth, region_weight=region_weight)
        check_range(ge=4, max_tokens=max_tokens)
        check_range(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, temperature=temperature)
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
        self.image_head, self.text_head = Linear(config.dim, embed_dim), Linear(config.dim, embed_dim)
        self.reader = ImageReader(config.dim, config.num_heads, reader_depth or max(1, config.depth // 2))
        self.match_head = Linear(config.dim, 2)
        for head in (self.image_head, self.text_head, self.match_head):
            head.apply(initialize)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.position_share, self.blocks, self.min_area, self.max_words = position_share, blocks, min_area, max_words
        self.region_weight, self.max_regions = region_weight, max_regions

    @property
    def uses_masks(self) -> bool:
        """Masks give the objects and their positions."""
        return max(self.position_share, self.region_weight) > 0

    def check(self, samples: Sequence[Sample]) -> None:
        """Check for texts, and for masks if guided."""
        super().check(samples)
        if not any(sample.text for sample in samples):
            raise ConfigError(
                f"no text in the {len(samples)} samples looked at, and vlp matches images to texts; "
                "give shards with a member txt, or a text, caption or prompt in their json"
            )

    def check_start(self, folder: Path) -> None:
        """Check that its tokenizer is ours: the text tower's weights belong to token numbers."""
        path = folder / "tokenizer.json"
        if path.is_file() and path.read_text(encoding="utf-8") != self.tokenizer.json:
            raise ConfigError(
                f"the training in {folder} had another tokenizer.json than this one has; use the one in that folder, "
                f"or start from its encoder alone, such as {folder}/transformers"
            )

    def views(self) -> Augment:
        """PTP's crop of half the area or more; no flip where a text says left or right."""
        return Augment(size=self.encoder.config.image_size, scale=(0.5, 1.0), keep_sides=True)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """ITC and ITM of images and their texts, and with ``region_weight`` the ITC of objects and words."""
        device = batch.images.device
        texts = self.texts(batch)
        has_text = torch.tensor([bool(text) for text in texts], device=device)
        tokens, key_mask, names = self.tokenize(texts, device)
        padding = longest(tokens.shape[1], device) - tokens.shape[1]
        tokens, key_mask = F.pad(tokens, (0, padding)), F.pad(key_mask, (0, padding))
        image, text = self.encoder(batch.images)[:, 1:], self.text(tokens, key_mask)  # b n d, b t d
        v, u = unit(self.image_head(image.mean(1))), unit(self.text_head(text[:, 0]))

        usable = gather(has_text)
        fits = _alike(names) & usable  # b B: equal texts, the positives
        negatives = usable & ~fits
        if self.position_share:  # equal captions with different sentences are no negatives
            negatives &= ~_alike(self.tokenize(self.captions(batch), device)[2])
        scale = self.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        to_texts, to_images = (
            (products(ours, gather(theirs)) / scale).masked_fill(~(fits | negatives), FAR)
            for ours, theirs in ((v, u), (u, v))
        )
        itc = (self.contrast(to_texts, fits, has_text) + self.contrast(to_images, fits, has_text)) / 2

        drawn = uniform(batch.seeds, 2, stream=NEGATIVES)
        other_image, has_other_image = _draw(to_images.detach(), negatives, drawn[:, 0])
        other_text, has_other_text = _draw(to_texts.detach(), negatives, drawn[:, 1])
        fused = self.reader(
            torch.cat([text, text, gather(text)[other_text]]),
            torch.cat([key_mask, key_mask, gather(key_mask)[other_text]]),
            torch.cat([image, gather(image)[other_image], image]),
        )
        valid = torch.cat([has_text, has_text & has_other_image, has_text & has_other_text])
        itm, matched = self.match(fused, valid)
        metrics = {
            "itc": itc.detach(),
            "itm": itm.detach(),
            "retrieved": (fits.gather(1, to_texts.argmax(1, keepdim=True)).squeeze(1) & has_text).float().mean(),
            "matched": matched,
            "with_text": has_text.float().mean(),
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
        """ITC of each object, and of its whole image, with its word; and the share of objects nearest to theirs."""
        found = regions((batch,), self.encoder.config.patch_size, self.max_regions)
        spelling = {number_of(word): word.strip() for words in batch.words for word in words}
        numbers, index = torch.unique(found.words, return_inverse=True)  # each word is encoded once
        tokens, key_mask, names = self.tokenize([spelling.get(number, "") for number in numbers.tolist()], image.device)
        under_mask, everywhere = found.shares[0], torch.ones_like(found.shares[0])
        v = unit(self.image_head(pool(image, torch.cat([under_mask, everywhere], 1))))  # b 2k e
        u = unit(self.text_head(self.text(tokens, key_mask)[:, 0]))[index.repeat(1, 2)]
        both = found.present.repeat(1, 2)
        present, usable = both.flatten(), gather(both).flatten()
        fits = _alike(names[index.repeat(1, 2)]) & usable
        to_words, to_regions = (
            (products(ours.flatten(0, 1), gather(theirs).flatten(0, 1)) / scale).masked_fill(~usable, FAR)
            for ours, theirs in ((v, u), (u, v))
        )
        loss = (self.contrast(to_words, fits, present) + self.contrast(to_regions, fits, present)) / 2
        right = fits.gather(1, to_words.argmax(1, keepdim=True)).view_as(both)[:, : self.max_regions] & found.present
        return loss, right.sum() / found.present.sum().clamp(min=1)

    def contrast(
        self, logits: Float[Tensor, "b B"], fits: Bool[Tensor, "b B"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy with equal targets for all that fit; the mean over the valid rows of all processes."""
        log_likelihood = torch.where(fits, logits.log_softmax(1), 0.0).sum(1) / fits.sum(1).clamp(min=1)
        return share_of_mean(-log_likelihood, valid)

    def match(
        self, fused: Float[Tensor, "c d"], valid: Bool[Tensor, " c"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Cross-entropy of "they belong together" over the valid pairs, and the accuracy; the first third does."""
        belong = (torch.arange(len(fused), device=fused.device) < len(fused) // 3).long()
        logits = self.match_head(fused).float()
        right = (logits.argmax(1) == belong) & valid
        loss = share_of_mean(F.cross_entropy(logits, belong, reduction="none"), valid)
        return loss, right.sum() / valid.sum().clamp(min=1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Clamp the temperature, which has no gradient outside its range."""
        self.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def tokenize(
        self, texts: Sequence[str], device: torch.device
    ) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"], Int[Tensor, "n 2"]]:
        """Tokens, their mask without padding, and two hashes of each text: of its characters and of its tokens."""
        tokens, key_mask = self.tokenizer(texts)
        rows = zip(texts, tokens.tolist(), key_mask.sum(1).tolist(), strict=True)
        names = [(number_of(text), number_of(str(row[:length]))) for text, row, length in rows]
        return tokens.to(device), key_mask.to(device), torch.tensor(names, dtype=torch.long, device=device)

    def captions(self, batch: Batch) -> list[str]:
        """The first ``max_words`` words of each text."""
        return [first_words(text, self.max_words) for text in batch.texts]

    def texts(self, batch: Batch) -> list[str]:
        """The input of the text tower: the captions, a share of them with a sentence on one word's position."""
        captions = self.captions(batch)
        if not (self.position_share and batch.masks.shape[1]):
            return captions
        drawn = uniform(batch.seeds, 2, stream=POSITION).tolist()
        large = ((batch.masks.float().mean((2, 3)) >= self.min_area) & batch.present).tolist()
        blocks = blocks_of(batch.masks, self.blocks).tolist()
        texts = []
        for row, caption in enumerate(captions):
            words = [number for number, _ in enumerate(batch.words[row][: len(large[row])]) if large[row][number]]
            if caption and words and drawn[row][0] < self.position_share:
                number = words[int(drawn[row][1] * len(words))]
                sentence = f"The {batch.words[row][number].strip()} is in block {blocks[row][number]}."
                caption = self.extended(caption, sentence)
            texts.append(caption)
        return texts

    def extended(self, caption: str, sentence: str) -> str:
        """The caption and the sentence, in ``max_tokens``.

        The caption loses as many tokens at its end as it must, if need be all; where not even the sentence fits, the
        result is the caption alone. Each candidate is tokenized, because tokens may merge differently at a cut.
        """
        whole = f"{caption.rstrip(' .')}. {sentence}"
        if self.tokenizer.holds(whole):
            return whole
        shortened = [f"{caption[:end].rstrip(' .')}. {sentence}" for end in self.tokenizer.ends(caption)]
        candidates = [sentence, *shortened]
        count = bisect_left(candidates, True, key=lambda text: not self.tokenizer.holds(text))
        return candidates[count - 1] if count else caption

    def export(self, folder: Path) -> None:
        """Both towers, for retrieval: see :func:`synthgen.models.dual.load_dual_encoder`."""
        dual = DualEncoder(self.encoder, self.text, self.image_head, self.text_head, self.tokenizer)
        save_dual_encoder(dual, folder)


def blocks_of(masks: Bool[Tensor, "b k H W"], blocks: int) -> Int[Tensor, "b k"]:
    """The block of the centre of each mask's box, numbered from 1 row by row; arbitrary for an empty mask."""
    row, column = (_middle(masks.any(axis)) for axis in (3, 2))
    down, right = ((middle * blocks).long().clamp(max=blocks - 1) for middle in (row, column))
    return down * blocks + right + 1


def _middle(line: Bool[Tensor, "b k n"]) -> Float[Tensor, "b k"]:
    """The middle of the first and the last true pixel, as a share of the length."""
    length = line.shape[2]
    first, behind = line.float().argmax(2), length - line.flip(2).float().argmax(2)
    return (first + behind) / (2 * length)


def _alike(names: Int[Tensor, "*n 2"]) -> Bool[Tensor, "m M"]:
    """Which of this process's texts equal which of all processes: those with a common hash."""
    return (names.flatten(0, -2)[:, None] == gather(names).flatten(0, -2)).any(2)


def _draw(
    logits: Float[Tensor, "b B"], allowed: Bool[Tensor, "b B"], noise: Float[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """One allowed column of each row, with probability ~ softmax + 1e-4 (BLIP's code); and whether there is any."""
    cumulative = torch.where(allowed, logits.softmax(1) + 1e-4, 0.0).cumsum(1)
    threshold = noise[:, None] * (1 - 1e-6) * cumulative[:, -1:]  # below the total, also after rounding
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1), allowed.any(1)
