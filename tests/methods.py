"""Samples, batches and small methods for the tests of methods."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from synthgen.augment import Augment
from synthgen.config import Choice
from synthgen.datasets import ImageDataset, Sample
from synthgen.loader import collate
from synthgen.methods import METHODS
from synthgen.models.vit import EncoderConfig, VisionTransformer
from tests.factories import make_generation

CONFIG = EncoderConfig(image_size=32, patch_size=4, dim=32, depth=2, num_heads=4)


def make_samples(count):
    samples = []
    for number in range(count):
        words = ("disc", "square") if number % 2 else ("disc",)
        generation, truth = make_generation("0", words, 32, seed=number)
        labels = (truth * np.arange(1, len(words) + 1)[:, None, None]).max(0).astype(np.uint8)
        text = f"{generation.request.prompt.text} on table {number}"
        label = ("disc", "square", None)[number % 3]
        samples.append(Sample(str(number), generation.image, label, text, words, labels))
    return samples


class MemoryDataset(ImageDataset):
    """Samples in memory."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def key(self, index):
        return self.samples[index].key

    def label(self, index):
        return self.samples[index].label

    def has_masks(self):
        return self.samples[0].label_map is not None


def make_batch(count=4, samples=None):
    """The same samples in two views."""
    samples = samples or make_samples(count)
    first, second = (
        collate(
            [Augment(size=32)(s, np.random.default_rng([n, v])) for n, s in enumerate(samples)], CONFIG.mean, CONFIG.std
        )
        for v in range(2)
    )
    return dataclasses.replace(first, second=second)


def without_masks(batch):
    bare = {"masks": batch.masks[:, :0], "present": batch.present[:, :0]}
    second = None if batch.second is None else dataclasses.replace(batch.second, **bare)
    return dataclasses.replace(batch, **bare, second=second)


def build(name, **options):
    torch.manual_seed(0)
    method = METHODS.build(Choice(name, options), encoder=VisionTransformer(CONFIG))
    method.fit_to(MemoryDataset(make_samples(3)))
    return method


def train(method, batch, steps, rate=2e-3):
    """So many steps on one batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], rate)
    losses = []
    for step in range(steps):
        loss = method(batch, step / steps).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step / steps)
    return losses
