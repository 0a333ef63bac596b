"""VLP: the losses, sentences on positions, and texts that are equal or too long."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import collate
from synthgen.methods._products import unit
from synthgen.methods.vlp import _draw, blocks_of
from synthgen.models.draws import uniform
from tests.methods import CONFIG, build, make_batch, make_samples, train, without_masks


def test_blocks_are_numbered_row_by_row():
    masks = torch.zeros(1, 4, 30, 30, dtype=torch.bool)
    masks[0, 0, 2:5, 2:5] = True
    masks[0, 1, 12:18, 22:29] = True
    masks[0, 2, 10:20, :] = True  # its box's middle is the image's
    masks[0, 3, 29, 0] = masks[0, 3, 29, 29] = True
    assert blocks_of(masks, 3).tolist() == [[1, 6, 5, 8]]
    assert blocks_of(masks.flip(3), 3).tolist() == [[3, 4, 5, 8]]


def test_the_sentence_gives_the_position_after_crop_and_flip():
    method = build("vlp", position_share=1.0)
    image, labels = np.zeros((60, 60, 3), np.uint8), np.zeros((60, 60), np.uint8)
    labels[:20, :20] = 1
    sample = Sample("0", image, None, "a dog on a beach .", ("dog",), labels)
    said = set()
    for number in range(30):
        view = method.views()(sample, np.random.default_rng(number))
        batch = dataclasses.replace(collate([view], CONFIG.mean, CONFIG.std), seeds=torch.tensor([number]))
        rows, columns = np.nonzero(view.label_map)
        block = 3 * int(3 * (rows.min() + rows.max() + 1) / 64) + int(3 * (columns.min() + columns.max() + 1) / 64) + 1
        (text,) = method.texts(batch)
        assert text == f"a dog on a beach. The dog is in block {block}."
        said.add(block)
    assert {1, 3} <= said  # mirrored ones among them


def test_sentences_on_positions_need_masks_and_reach_the_encoder():
    """The other guidance of vlp, which ``--guided`` does not set."""
    method, batch = build("vlp", position_share=1.0), make_batch()
    method(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.encoder.named_parameters())
    assert method.uses_masks
    bare = [dataclasses.replace(sample, words=(), label_map=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no mask in the 3 samples"):
        method.check(bare)
    plain = build("vlp")
    assert method(without_masks(batch), 0.5).loss.item() == plain(without_masks(batch), 0.5).loss.item()


def test_a_text_that_names_a_side_is_not_mirrored():
    view = build("vlp").views()
    labels = np.zeros((32, 32), np.uint8)
    labels[:, :4] = 1
    for text, mirrored in (("a dog on the Left", False), ("a dog leftover", True)):
        sample = Sample("0", np.zeros((32, 32, 3), np.uint8), None, text, ("dog",), labels)
        views = [view(sample, np.random.default_rng(number)) for number in range(40)]
        assert any(v.label_map[:, -1].any() for v in views) == mirrored


def test_position_share_and_the_choice_of_words():
    method = build("vlp", position_share=0.5, max_words=3)
    samples = [sample for sample in make_samples(400) if len(sample.words) == 2]
    batch = collate(samples, CONFIG.mean, CONFIG.std)
    texts = method.texts(batch)
    extended = [text for text in texts if "block" in text]
    assert 0.4 < len(extended) / len(texts) < 0.6
    assert 0.35 < sum("The disc" in text for text in extended) / len(extended) < 0.65
    assert all(text.startswith("a photo of") and "disc and" not in text for text in texts)  # three words of the caption
    assert build("vlp").texts(batch)[0] == batch.texts[0]


def test_the_loss_is_its_formula():
    """Equal texts share their target; images without a text are left out."""
    method = build("vlp")
    samples = make_samples(6)
    samples[1] = dataclasses.replace(samples[1], text=samples[3].text)
    samples[4] = dataclasses.replace(samples[4], text="")
    batch = make_batch(samples=samples)
    metrics = method(batch, 0.0).metrics
    with torch.no_grad():
        v = torch.nn.functional.normalize(method.image_head(method.encoder(batch.images)[:, 1:].mean(1)))
        u = torch.nn.functional.normalize(method.text_head(method.text(*method.tokenizer(batch.texts))[:, 0]))
    kept = [0, 1, 2, 3, 5]
    total = 0.0
    for near, far in ((v, u), (u, v)):
        for i in kept:
            chances = torch.stack([near[i] @ far[j] / 0.07 for j in kept]).softmax(0)
            fits = [chances[n] for n, j in enumerate(kept) if batch.texts[j] == batch.texts[i]]
            total -= sum(float(chance.log()) for chance in fits) / len(fits) / 2
    assert metrics["itc"].item() == pytest.approx(total / len(kept), rel=1e-4)
    assert metrics["with_text"].item() == pytest.approx(5 / 6)


def test_the_loss_over_regions_is_its_formula():
    """Means of patches, under masks and of all, against words alone; equal words share a target, faint ones none."""
    method = build("vlp", region_weight=1.0, max_regions=2)
    batch = make_batch(6)
    batch.masks[1, 0] = False  # nothing of the first disc is left
    batch.masks[1, 0, 0, :4] = True  # but a quarter of a patch
    metrics = method(batch, 0.0).metrics
    unit, regions, wholes, words = torch.nn.functional.normalize, [], [], []
    with torch.no_grad():
        tokens = method.encoder(batch.images)[:, 1:].view(6, 8, 8, -1)
        for image, own in enumerate(batch.words):
            for word, mask in zip(own, batch.masks[image].float(), strict=False):
                shares = mask.view(8, 4, 8, 4).mean((1, 3))
                if shares.sum() >= 0.5:
                    mean = (shares[..., None] * tokens[image]).sum((0, 1)) / shares.sum()
                    regions.append(unit(method.image_head(mean), dim=0))
                    wholes.append(unit(method.image_head(tokens[image].mean((0, 1))), dim=0))
                    words.append(word)
        read = {w: unit(method.text_head(method.text(*method.tokenizer([w]))[0, 0]), dim=0) for w in set(words)}
    named = [read[word] for word in words]
    assert 6 < len(words) < 9
    total = 0.0
    seen, said, meant = regions + wholes, named * 2, words * 2
    for near, far in ((seen, said), (said, seen)):
        for i, word in enumerate(meant):
            chances = torch.stack([near[i] @ other / 0.07 for other in far]).softmax(0)
            fits = [chance for chance, other in zip(chances, meant, strict=True) if other == word]
            total -= sum(float(chance.log()) for chance in fits) / len(fits) / 2
    assert metrics["regions"].item() == pytest.approx(total / len(meant), rel=1e-4)
    nearest = [words[int(torch.stack([region @ other for other in named]).argmax())] for region in regions]
    right = np.mean([one == other for one, other in zip(nearest, words, strict=True)])
    assert metrics["named"].item() == pytest.approx(right)


def test_regions_learn_their_words():
    method, batch = build("vlp", region_weight=1.0), make_batch(12)
    train(method, batch, 60)
    assert method(batch, 1.0).metrics["named"].item() > 0.9


def test_token_numbers_may_have_gaps(tmp_path):
    """As in a tokenizer.json from which entries were removed: the table has a row for the highest number."""
    entries = {"[UNK]": 0, "a": 1, "dog": 7, "cat": 9}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    method = build("vlp", tokenizer=str(tmp_path))
    assert method.text.embed.weight.shape[0] == method.text.config.vocab_size == 10
    texts = ("a dog", "a cat", "a bus", "dog")
    assert method(dataclasses.replace(make_batch(4), texts=texts), 0.0).loss.isfinite()
    assert build("vlp").tokenizer.vocab_size == 3541  # the shipped one has none


def test_padding_has_no_effect():
    method = build("vlp").eval()
    short, long = "a dog", "a photo of a dog and a cat on a beach"
    alone, real = method.tokenizer([short])
    together, both = method.tokenizer([short, long])
    assert together.shape[1] > alone.shape[1]
    with torch.no_grad():
        assert torch.allclose(method.text(alone, real)[0, 0], method.text(together, both)[0, 0], atol=1e-6)


def test_negatives_are_drawn_by_similarity():
    logits = torch.tensor([1.0, 3.0, 2.0, 5.0]).expand(20000, -1)
    allowed = torch.tensor([True, True, True, False]).expand(20000, -1)
    drawn, there = _draw(logits, allowed, uniform(torch.arange(20000)))
    often = torch.bincount(drawn, minlength=4) / 20000
    assert often.tolist() == pytest.approx([*torch.tensor([1.0, 3.0, 2.0]).softmax(0).tolist(), 0], abs=0.015)
    assert there.all()
    assert not _draw(logits[:1], torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1))[1].any()


def test_equal_texts_are_no_negatives():
    method, batch = build("vlp"), make_batch(4)
    output = method(dataclasses.replace(batch, texts=("a dog",) * 4), 0.0)
    output.loss.backward()
    assert method.encoder.cls_token.grad.isfinite().all()
    nothing = method(dataclasses.replace(batch, texts=("",) * 4), 0.0)
    assert nothing.loss.item() == 0.0


def of_one_prompt(count):
    """Images of one prompt with two objects at equal places: any sentence on either is true of every image."""
    batch = make_batch(count)
    masks = torch.zeros(count, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, 2:8, 2:8] = masks[:, 1, 24:30, 24:30] = True
    words, texts = (("dog", "beach"),) * count, ("a dog on a beach",) * count
    return dataclasses.replace(batch, masks=masks, present=masks.flatten(2).any(2), words=words, texts=texts)


def test_equal_captions_with_different_sentences_are_no_negatives():
    method, batch = build("vlp", position_share=1.0), of_one_prompt(8)
    assert sorted(set(method.texts(batch))) == [
        "a dog on a beach. The beach is in block 9.",
        "a dog on a beach. The dog is in block 1.",
    ]
    valid, match = [], method.match
    method.match = lambda fused, pairs: valid.append(pairs) or match(fused, pairs)
    metrics = method(batch, 0.0).metrics
    assert valid[0].tolist() == [True] * 8 + [False] * 16  # no wrong pair of image and text
    texts, scores = method.texts(batch), []
    with torch.no_grad():
        v = unit(method.image_head(method.encoder(batch.images)[:, 1:].mean(1)))
        u = unit(method.text_head(method.text(*method.tokenizer(texts))[:, 0]))
        for ours, theirs in ((v, u), (u, v)):
            for i in range(8):  # of equal texts alone
                chances = torch.stack([ours[i] @ theirs[j] / 0.07 for j in range(8) if texts[j] == texts[i]]).softmax(0)
                scores.append(-float(chances.log().mean()))
    assert metrics["itc"].item() == pytest.approx(sum(scores) / 16, rel=1e-4)
    other = dataclasses.replace(batch, texts=("a cat on a beach", *batch.texts[1:]))
    method(other, 0.0)
    assert valid[1].tolist() == [True] * 24  # another caption is a negative of all


def test_an_image_without_a_caption_gets_no_sentence():
    method, batch = build("vlp", position_share=1.0), of_one_prompt(4)
    batch = dataclasses.replace(batch, texts=("", "  ", "a dog", "a beach"), words=((" dog ", "dog\n"),) * 4)
    *without, first, second = method.texts(batch)
    assert without == ["", ""]
    assert first in {f"a dog. The dog is in block {block}." for block in (1, 9)}
    assert second in {f"a beach. The dog is in block {block}." for block in (1, 9)}
    assert method(batch, 0.0).metrics["with_text"].item() == 0.5


def test_texts_with_equal_tokens_are_equal():
    """Cut behind the same token they are no wrong pairs, whatever follows; cut a token later they would be others."""
    samples = make_samples(4)
    long = "a photo of a disc on a table beside"
    texts = (f"{long} a window", f"{long} two doors", "a square", f"{long} a window")
    batch = make_batch(samples=[dataclasses.replace(s, text=t) for s, t in zip(samples, texts, strict=True)])
    read = len(build("vlp").tokenizer([long])[0][0]) - 1  # without the token that ends a text
    cut, whole = build("vlp", max_tokens=read), build("vlp", max_tokens=read + 4)
    tokens, _ = cut.tokenizer(texts)
    assert torch.equal(tokens[0], tokens[1])
    same = dataclasses.replace(batch, texts=(texts[0], texts[0], *texts[2:]))
    assert cut(batch, 0.5).loss.item() == cut(same, 0.5).loss.item()
    assert whole(batch, 0.5).loss.item() != whole(same, 0.5).loss.item()
    cased = dataclasses.replace(batch, texts=(texts[0].upper(), *texts[1:]))
    assert whole(batch, 0.5).loss.item() == whole(cased, 0.5).loss.item()


@pytest.mark.parametrize("caption", ["{} on its deck beneath dramatic thunderclouds", "{} 船", "{}" + "船" * 40])
def test_a_long_caption_is_truncated_for_the_sentence(caption):
    caption = caption.format("a close-up photograph of a weathered wooden fishing boat with a disc standing proudly")
    method = build("vlp", position_share=1.0, max_tokens=24)
    sentence = "The disc is in block 7."
    text = method.extended(caption, sentence)
    begun, _, rest = text.partition(". ")
    assert (rest, caption.startswith(begun)) == (sentence, True)
    tokens, _ = method.tokenizer([text, *(f"{begun}. The disc is in block {block}." for block in range(8))])
    assert [torch.equal(tokens[0], row) for row in tokens[1:]] == [block == 7 for block in range(8)]
    assert 22 <= len(method.tokenizer([text])[0][0]) <= 24  # no more is cut than must be
    assert method.extended("a disc .", sentence) == f"a disc. {sentence}"
    assert build("vlp", max_tokens=10).extended(caption, sentence) == sentence
    assert build("vlp", max_tokens=6).extended(caption, sentence) == caption  # not even that would be read


@pytest.mark.parametrize(("begin", "edge"), [(0.0005, 0.001), (0.6, 0.5)])
def test_a_temperature_out_of_range_is_clamped_and_keeps_learning(begin, edge):
    method, batch = build("vlp"), make_batch(8)
    with torch.no_grad():
        method.temperature.fill_(begin)
    train(method, batch, 1)
    assert method.temperature.item() == pytest.approx(edge)
    train(method, batch, 4)
    assert method.temperature.grad.item() != 0
    assert 0.001 < method.temperature.item() < 0.5
    assert method(batch, 0.5).metrics["temperature"].item() == method.temperature.item()


def test_a_temperature_in_range_is_unchanged():
    method = build("vlp", temperature=0.0123)
    before = method.temperature.item()
    method.after_step(0.5)
    assert method.temperature.item() == before


def test_texts_are_needed():
    with pytest.raises(ConfigError, match="no text in the 3 samples"):
        build("vlp").check([dataclasses.replace(sample, text="") for sample in make_samples(3)])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"position_share": 2.0}, "at least 0 and at most 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"max_regions": 0}, "max_regions must be at least 1"),
        ({"region_weight": -1.0}, "region_weight must be at least 0"),
        ({"max_tokens": 2}, "at least 4"),
        ({"temperature": 0.9}, "at least 0.001 and at most 0.5"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build("vlp", **options)
