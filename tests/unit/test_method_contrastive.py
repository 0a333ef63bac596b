"""Contrastive: the loss over images and over objects, the teacher, and the queue."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from synthgen.errors import ConfigError
from synthgen.methods._regions import WHOLE
from tests.methods import build, make_batch, make_samples


def test_the_loss_is_its_formula():
    """Words across and within crops, written out as loops over queries and keys."""
    method = build("contrastive", instance_share=1.0, queue=5, temperature=0.3)
    batch = make_batch(6)
    method(make_batch(3), 0.0)
    method.after_step(0.0)  # now something is in the queue
    regions = method.objects(batch, batch.second)
    with torch.no_grad():
        tokens = [method.encoder(view.images)[:, 1:] for view in (batch, batch.second)]
        targets = [method.teacher(view.images)[:, 1:] for view in (batch, batch.second)]

    def vectors(tokens, weights, *heads):
        found = {}
        for image, slot in regions.present.nonzero().tolist():
            w = weights[image, slot]
            x = sum(w[patch] * tokens[image, patch] for patch in range(64)) / w.sum()
            for head in heads:
                x = head(x[None, None])[0, 0]
            found[image, slot] = x / x.norm()
        return found

    total, count = 0.0, 0
    with torch.no_grad():
        weights = regions.shares
        for here, there in ((0, 1), (1, 0)):
            queries = vectors(tokens[here], weights[here], method.project, method.predict)
            across = vectors(targets[there], weights[there], method.teacher_project)
            within = vectors(targets[here], weights[here], method.teacher_project)
            for (image, slot), q in queries.items():
                word = int(regions.words[image, slot])
                positive = torch.exp(q @ across[image, slot] / 0.3)
                negative = sum(
                    torch.exp(q @ key / 0.3)
                    for (i, s), key in across.items()
                    if (i, s) != (image, slot) and (word == WHOLE or int(regions.words[i, s]) != word)
                )
                negative += sum(torch.exp(q @ key / 0.3) for (i, s), key in within.items() if i == image and s != slot)
                negative += sum(
                    torch.exp(q @ key / 0.3)
                    for key, other in zip(method.queue_keys, method.queue_words, strict=True)
                    if key.norm() > 0 and (word == WHOLE or int(other) != word)
                )
                total, count = total - 2 * 0.3 * float(torch.log(positive / (positive + negative))), count + 1
    assert 0 < int(method.queue_end) < 5  # a part of the queue is filled
    assert count > 12  # images with two words among them
    assert method(batch, 0.0).loss.item() == pytest.approx(2 * total / count, rel=1e-4)


def test_the_plain_loss_is_that_of_moco():
    method, batch = build("contrastive"), make_batch(5)
    loss = method(batch, 0.0).loss.item()
    total = 0.0
    with torch.no_grad():
        for a, b in ((batch, batch.second), (batch.second, batch)):
            q = method.predict(method.project(method.encoder(a.images)[:, 1:].mean(1)))
            k = method.teacher_project(method.teacher(b.images)[:, 1:].mean(1))
            logits = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / 0.2
            total += 2 * 0.2 * torch.nn.functional.cross_entropy(logits, torch.arange(5)).item()
    assert loss == pytest.approx(total, rel=1e-5)


def test_words_count_where_both_views_show_them():
    method, batch = build("contrastive", instance_share=1.0, max_words=2), make_batch(3)
    masks = torch.zeros(3, 3, 32, 32, dtype=torch.bool)
    masks[0, 1, :8, :8] = masks[0, 2, 8:16, :8] = masks[1, 0, :8, :8] = True
    masks[2, 0, 0, 0] = True  # less than half a patch
    words = (("sky", "dog", "Cat"), ("cat",), ("dog",))
    there = {"present": masks.flatten(2).any(2), "words": words}
    first = dataclasses.replace(batch, masks=masks, **there)
    second = dataclasses.replace(batch.second, masks=masks.clone(), **there)
    second.masks[1] = False  # the second view shows the cat no more
    regions = method.objects(first, second)
    assert regions.present.tolist() == [[True, True], [True, False], [True, False]]
    assert (regions.words == WHOLE).tolist() == [[False, False], [True, True], [True, True]]
    assert regions.shares[0][0, 0].nonzero().flatten().tolist() == [0, 1, 8, 9]
    assert (regions.shares[0][1, 0] == 1).all()  # the whole image instead
    same = method.objects(dataclasses.replace(first, words=(("x", "dog", "cat"), *words[1:])), second)
    assert torch.equal(same.words, regions.words)  # case does not matter


def test_the_teacher_is_an_ema_with_rising_momentum():
    method = build("contrastive", momentum=0.9)
    with torch.no_grad():
        method.encoder.cls_token += 1.0
    start = method.teacher.cls_token.clone()
    method.after_step(0.0)
    assert torch.allclose(method.teacher.cls_token - start, torch.full_like(start, 0.1), atol=1e-6)
    before = method.teacher.cls_token.clone()
    method.after_step(1.0)
    assert torch.equal(method.teacher.cls_token, before)
    assert not any(p.requires_grad for p in (*method.teacher.parameters(), *method.teacher_project.parameters()))


def test_the_queue_drops_the_oldest_keys():
    method = build("contrastive", queue=6)
    keys = []
    for number in range(3):
        method(make_batch(samples=make_samples(12)[4 * number : 4 * number + 4]), 0.0)
        keys.append(method._new_keys[0][0])
        method.after_step(1.0)
    assert int(method.queue_end) == 12
    assert torch.equal(method.queue_keys, torch.cat([keys[1][2:], keys[2]]))


def test_the_losses_over_images_and_objects_have_their_own_negatives_in_the_queue():
    """The mixed loss is the mean of the two that each have a queue of their own."""
    first, second = make_batch(samples=make_samples(8)[:4]), make_batch(samples=make_samples(8)[4:])
    second.second.masks[0] = False  # an image without words is a whole one among the objects
    losses = []
    for share in (0.0, 1.0, 0.25):
        method = build("contrastive", instance_share=share, queue=40)
        method(first, 0.0)
        method.after_step(1.0)  # with the teacher as it was
        method(second, 0.0)
        method.after_step(1.0)
        losses.append(method(first, 0.0).loss.item())
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-6)
    assert int(method.queue_end) < 40


def test_a_single_word_is_refused():
    method = build("contrastive", instance_share=0.5)
    one = [dataclasses.replace(sample, words=("disc",)) for sample in make_samples(4)]
    with pytest.raises(ConfigError, match="all 4 samples looked at have the one word 'disc'"):
        method.check(one)
    build("contrastive", instance_share=0.5, same_word_negatives=True).check(one)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"instance_share": 1.5}, "at least 0 and at most 1"),
        ({"momentum": -0.1}, "at least 0 and at most 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"queue": -1}, "queue must be at least 0"),
        ({"jitter": 1.0}, "below 1"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build("contrastive", **options)
