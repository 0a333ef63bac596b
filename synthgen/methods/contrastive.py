"""Agree across two views: of the whole image, or of each word's object in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synthgen.augment import Augment
from synthgen.config import check_range
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._ema import update_teacher
from synthgen.methods._processes import gather, own_rows, share_of_mean
from synthgen.methods._products import products, unit
from synthgen.methods._regions import WHOLE, Regions, pool, regions
from synthgen.models.layers import Projector
from synthgen.models.vit import VisionTransformer

__all__ = ["Contrastive"]

# In the queue, WHOLE marks keys of the loss over images, NO_WORD keys of images without words of that over objects.
NO_WORD = -2


class Contrastive(Method):
    """Two views of a thing are nearer than views of other things (MoCo v3: Chen, Xie and He, 2021, algorithm 1).

    q = predict(project(pool(encoder(view a))))        k = the same of view b by the teacher, without predict
    L(a, b) = -2 T * mean over q of log( exp(q.k+ / T) / (exp(q.k+ / T) + sum over k- of exp(q.k- / T)) )
    loss = L(1, 2) + L(2, 1)                           q and k have unit length

    The teacher is an EMA of the encoder, t <- m t + (1 - m) e after each step, with m from ``momentum`` to 1 by half a
    cosine. Negatives k- are the other images of the step, on all processes, and with ``queue`` that many earlier keys.
    ``pool`` is the mean of the patch tokens.

    With ``instance_share`` above 0 (after Free-ATM) the loss is (1 - instance_share) times that, and instance_share
    times the same loss over objects: ``pool`` is then the mean under one word's mask. The positive is the same word in
    the other view of the image. Negatives are other words: of the same image in the other view and in the same view,
    and of other images. The same word in another image is no negative unless ``same_word_negatives``. A word counts
    where its mask covers half a patch in both views, the first ``max_words`` such words of an image; an image without
    one takes part as a whole. The two losses share the queue, and each has its own keys there as negatives. For what is
    the paper's and what is our choice see docs/methods.md.
    """

    guided: ClassVar = {"instance_share": 1.0}
    min_images: ClassVar = 2

    queue_keys: Tensor
    queue_words: Tensor
    queue_end: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        instance_share: float = 0.0,  # weight of the loss over objects under masks; 1 minus it: over whole images
        max_words: int = 3,  # maximum of objects per image
        same_word_negatives: bool = False,  # whether the same word in another image is a negative
        temperature: float = 0.2,  # T: lower weighs the nearest negatives more
        momentum: float = 0.99,  # initial momentum of the teacher
        queue: int = 0,  # number of earlier keys that are negatives too
        projection_dim: int = 256,  # length of the compared vectors
        hidden_dim: int = 0,  # width of the projectors; 0: four times the encoder's, at most 4096
        jitter: float = 0.4,  # strength of the colour jitter, in [0, 1)
    ) -> None:
        super().__init__()
        check_range(ge=0, le=1, instance_share=instance_share, momentum=momentum)
        check_range(gt=0, temperature=temperature)
        check_range(ge=1, max_words=max_words, projection_dim=projection_dim)
        check_range(ge=0, queue=queue, hidden_dim=hidden_dim)
        check_range(ge=0, lt=1, jitter=jitter)
        dim = encoder.config.dim
        hidden_dim = hidden_dim or min(4096, 4 * dim)
        self.encoder = encoder
        self.project = Projector(dim, hidden_dim, projection_dim, depth=3)
        self.predict = Projector(projection_dim, hidden_dim, projection_dim, depth=2)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_project = copy.deepcopy(self.project).requires_grad_(False)
        self.register_buffer("queue_keys", torch.zeros(queue, projection_dim))
        self.register_buffer("queue_words", torch.full((queue,), WHOLE))
        self.register_buffer("queue_end", torch.zeros((), dtype=torch.long))
        self.instance_share, self.max_words, self.same_word_negatives = instance_share, max_words, same_word_negatives
        self.temperature, self.momentum, self.jitter = temperature, momentum, jitter
        self._new_keys: list[tuple[Tensor, Tensor]] = []  # of this step, with their words, for the queue

    @property
    def uses_masks(self) -> bool:
        """Masks define the objects."""
        return self.instance_share > 0

    @property
    def copies(self) -> Mapping[str, str]:
        """The teacher is a copy of the encoder and its first head."""
        return {"teacher.": "encoder.", "teacher_project.": "project."}

    def check(self, samples: Sequence[Sample]) -> None:
        """Check for masks if guided, and for more than one word, because equal words are no negatives."""
        super().check(samples)
        words = {word.strip().lower() for sample in samples if sample.label_map is not None for word in sample.words}
        if self.uses_masks and len(words) == 1 and not self.same_word_negatives:
            raise ConfigError(
                f"all {len(samples)} samples looked at have the one word {words.pop()!r}, and guidance contrasts "
                "different words; set method.same_word_negatives=true, or leave --guided out"
            )

    def views(self) -> Augment:
        """Crop, flip, colour jitter, grey, and above 64 pixels blur, as in MoCo v2."""
        size = self.encoder.config.image_size
        return Augment(size=size, jitter=self.jitter, jitter_probability=0.8, grey=0.2, blur=0.5 if size > 64 else 0.0)

    def second_views(self) -> Augment:
        """Another view of the same kind."""
        return self.views()

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The loss of two views of each image."""
        if batch.second is None:
            raise ValueError("contrastive needs a batch with two views")
        images = batch.images, batch.second.images
        tokens = [self.encoder(view)[:, 1:] for view in images]  # b n d each
        with torch.no_grad():
            targets = [self.teacher(view)[:, 1:] for view in images]
        loss, metrics = torch.zeros((), device=batch.images.device), {}
        if self.instance_share < 1:
            term, metrics["agreement"] = self.term(self.whole(batch), tokens, targets, WHOLE)
            loss = loss + (1 - self.instance_share) * term
        if self.instance_share > 0:
            objects = self.objects(batch, batch.second)
            term, metrics["instance_agreement"] = self.term(objects, tokens, targets, NO_WORD)
            loss = loss + self.instance_share * term
            metrics["with_words"] = (objects.words != WHOLE).any(1).float().mean()
            metrics["instances"] = objects.present.float().sum(1).mean()
        return StepOutput(loss, metrics)

    def whole(self, batch: Batch) -> Regions:
        """One region per image: all of it."""
        b, device = len(batch), batch.images.device
        shares = torch.ones(b, 1, self.encoder.config.grid**2, device=device)
        words = torch.full((b, 1), WHOLE, device=device)
        return Regions((shares, shares), torch.ones(b, 1, dtype=torch.bool, device=device), words)

    def objects(self, first: Batch, second: Batch) -> Regions:
        """One region for each word in both views, or the whole image where there is none."""
        found = regions((first, second), self.encoder.config.patch_size, self.max_words)
        is_first = torch.arange(self.max_words, device=first.images.device) == 0
        whole = ~found.present.any(1)[:, None] & is_first
        shares = tuple(torch.where(whole[:, :, None], 1.0, view) for view in found.shares)
        return replace(found, shares=shares, present=found.present | whole)

    def term(
        self, regions: Regions, tokens: list[Tensor], targets: list[Tensor], wordless: int
    ) -> tuple[Tensor, Tensor]:
        """The symmetric loss over regions, and how often the positive is the nearest key.

        ``wordless`` is the number of regions without a word in the queue: WHOLE of the loss over images, NO_WORD of
        that over objects.
        """
        queries = [unit(self.predict(self.project(pool(x, w)))) for x, w in zip(tokens, regions.shares, strict=True)]
        with torch.no_grad():
            keys = [unit(self.teacher_project(pool(x, w))) for x, w in zip(targets, regions.shares, strict=True)]
        in_queue = (self.queue_words == WHOLE) == (wordless == WHOLE)  # keys of the same loss
        first, first_right = self.contrast(queries[0], keys[1], keys[0], regions, in_queue)
        second, second_right = self.contrast(queries[1], keys[0], keys[1], regions, in_queue)
        if len(self.queue_keys):
            chosen = gather(regions.present).flatten()
            words = gather(regions.words).flatten()[chosen]
            words = words.masked_fill(words == WHOLE, wordless)
            self._new_keys.append((gather(keys[1]).flatten(0, 1)[chosen], words))
        return first + second, (first_right + second_right) / 2

    def contrast(
        self,
        queries: Float[Tensor, "b k d"],
        across: Float[Tensor, "b k d"],
        within: Float[Tensor, "b k d"],
        regions: Regions,
        in_queue: Bool[Tensor, " queue"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One direction: each query against the other view's keys of all images and its own view's of its image."""
        b, k, _ = queries.shape
        q, device = queries.flatten(0, 1), queries.device
        present, words = regions.present.flatten(), regions.words.flatten()[:, None]

        all_keys = gather(across).flatten(0, 1)
        numbers = torch.arange(len(all_keys), device=device)
        positives = numbers.view(-1, k)[own_rows(b)].flatten()
        allowed_across = gather(regions.present).flatten() & self.differ(words, gather(regions.words).flatten())
        allowed_across |= positives[:, None] == numbers
        allowed_within = regions.present[:, None] & self.differ(regions.words[:, :, None], regions.words[:, None])
        allowed_within &= ~torch.eye(k, dtype=torch.bool, device=device)  # a query's own key is no negative
        filled = torch.arange(len(self.queue_keys), device=device) < self.queue_end
        allowed_queue = filled & in_queue & self.differ(words, self.queue_words)

        similarity = (products(q, all_keys), products(queries, within).flatten(0, 1), products(q, self.queue_keys))
        allowed = torch.cat([allowed_across, allowed_within.flatten(0, 1), allowed_queue], dim=1)
        logits = (torch.cat(similarity, dim=1) / self.temperature).masked_fill(~allowed, -torch.inf)
        losses = F.cross_entropy(logits, positives, reduction="none")
        right = (logits.detach().argmax(1) == positives) & present
        return 2 * self.temperature * share_of_mean(losses, present), right.sum() / present.sum()

    def differ(self, ours: Int[Tensor, "..."], theirs: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which pairs may be negatives: those of different words, or without one."""
        return (ours != theirs) | (ours == WHOLE) | self.same_word_negatives

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the teacher, and replace the oldest keys of the queue by those of the step."""
        update_teacher(self.teacher, self.encoder, self.momentum, progress)
        update_teacher(self.teacher_project, self.project, self.momentum, progress)
        size = len(self.queue_keys)
        for keys, words in self._new_keys:
            keys, words = keys[-size:], words[-size:]
            indices = (self.queue_end + torch.arange(len(keys), device=keys.device)) % size
            self.queue_keys[indices], self.queue_words[indices] = keys, words
            self.queue_end += len(keys)
        self._new_keys.clear()
