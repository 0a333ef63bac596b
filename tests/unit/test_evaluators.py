"""Evaluators against hand cases and written-out references."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthgen.config import Choice
from synthgen.errors import ConfigError
from synthgen.evaluators import (
    EVALUATORS,
    DenseFeatures,
    EvalData,
    ImageTextPairs,
    LabelledFeatures,
    LabelledImages,
    Latents,
    json_safe,
)
from synthgen.evaluators._bootstrap import interval, mean_with_interval, spread
from synthgen.evaluators._heads import Standardize
from synthgen.evaluators.detection import (
    DetectionFigures,
    Detections,
    _non_maximum_suppression,
    assign,
    average_precision,
    focal_loss,
    generalised_iou_loss,
)
from synthgen.evaluators.mask_iou import word_ious
from synthgen.evaluators.segmentation import count_pixels, mean_iou
from synthgen.records import WordMasks
from tests.evaluation import make_pairs, make_scenes
from tests.factories import shape_mask


def clouds(count, seed, spread=1.0, classes=3, dim=6):
    """Gaussian clouds round fixed centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) * 2
    return LabelledFeatures(centres[labels] + spread * torch.randn(count, dim, generator=generator), labels)


def make_masks(words, values, size=8):
    stacked = np.zeros((len(words), size, size), bool)
    for mask, (top, bottom, left, right) in zip(stacked, values, strict=True):
        mask[top:bottom, left:right] = True
    return WordMasks(tuple(words), stacked, np.zeros(len(words), np.float32))


MASKS = {"0": make_masks(["disc"], [(0, 4, 0, 4)])}


# -- knn


def test_knn_against_a_loop():
    train, test = clouds(40, 1, 2.0), clouds(25, 2, 2.0)
    evaluator = EVALUATORS.build(Choice("knn", {"k": 5, "temperature": 0.2}))
    wanted = []
    for row in test.features:
        cosines = [(float(row @ other / row.norm() / other.norm()), i) for i, other in enumerate(train.features)]
        votes = [0.0] * 3
        for cosine, i in sorted(cosines, reverse=True)[:5]:
            votes[train.labels[i]] += math.exp(cosine / 0.2)
        wanted.append(votes.index(max(votes)))
    assert evaluator.predict(train, test.features).tolist() == wanted
    right = np.mean([a == b for a, b in zip(wanted, test.labels.tolist(), strict=True)])
    assert evaluator.evaluate(EvalData(train=train, test=test))["accuracy"] == pytest.approx(right)


def test_knn_takes_small_sets_and_unknown_classes():
    train = LabelledFeatures(torch.eye(3), torch.arange(3))
    test = LabelledFeatures(torch.eye(3), torch.tensor([0, 1, -1]))
    assert EVALUATORS.build("knn").evaluate(EvalData(train=train, test=test))["accuracy"] == pytest.approx(2 / 3)


def test_equally_near_copies_all_vote():
    """Five copies are the nearest, and two would have votes: of their classes the one of most copies wins."""
    train = LabelledFeatures(torch.tensor([[1.0, 0]] * 5 + [[0, 1.0]] * 3), torch.tensor([2, 1, 0, 1, 2, 0, 0, 0]))
    evaluator = EVALUATORS.build(Choice("knn", {"k": 2}))
    for order in itertools.islice(itertools.permutations(range(8)), 0, None, 997):
        rows = torch.tensor(order)
        mixed = LabelledFeatures(train.features[rows], train.labels[rows])
        assert evaluator.predict(mixed, torch.tensor([[1.0, 0.1], [0.1, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("k", [5, 20, 100])
def test_knn_on_constant_features_predicts_the_majority_class(k):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 15 + [1] * 20 + [2] * 15)
    train = LabelledFeatures(torch.ones(50, 64) + 1e-8 * torch.randn(50, 64, generator=generator), labels)
    test = LabelledFeatures(torch.ones(40, 64), torch.arange(40) % 4 - 1)
    evaluator = EVALUATORS.build(Choice("knn", {"k": k}))
    for rows in (torch.arange(50), torch.randperm(50, generator=generator), torch.arange(50).flip(0)):
        mixed = LabelledFeatures(train.features[rows], labels[rows])
        assert evaluator.predict(mixed, test.features).tolist() == [1] * 40
        assert evaluator.evaluate(EvalData(train=mixed, test=test))["accuracy"] == pytest.approx(1 / 4)


def test_the_order_of_training_images_changes_no_neighbour():
    """Among 400 rows on a grid many are equally near; keys tell which image is which."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, 2, (400, 3), generator=generator).float()
    train = LabelledFeatures(features, torch.arange(400) % 7, tuple(f"{row:03d}" for row in range(400)))
    order = torch.randperm(400, generator=generator)
    mixed = LabelledFeatures(features[order], train.labels[order], tuple(train.keys[row] for row in order))
    evaluator, asked = EVALUATORS.build("knn"), torch.randn(300, 3, generator=generator)
    assert torch.equal(evaluator.predict(train, asked), evaluator.predict(mixed, asked))


# -- linear probe


def test_probe_is_the_minimum():
    """At the minimum the gradient of the written-out loss is 0."""
    train = clouds(50, 3, 2.0)
    probe = EVALUATORS.build(Choice("linear_probe", {"l2": 0.1}))
    z = train.features.double()
    weight, bias = probe.solve(z, train.labels, 3, 0.1)
    logits = z @ weight.T + bias
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    error = (p - torch.eye(3, dtype=torch.float64)[train.labels]) / len(z)
    assert (error.T @ z + 0.1 * weight).abs().max() < 1e-5
    assert error.sum(0).abs().max() < 1e-5


def test_probe_reads_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=generator)
    linear = (features[:, 0] > 0).long()
    noise = torch.randint(0, 2, (400,), generator=generator)
    probe = EVALUATORS.build("linear_probe")
    for labels, low, high in ((linear, 0.93, 1.0), (noise, 0.35, 0.65)):
        data = EvalData(
            train=LabelledFeatures(features[:300], labels[:300]), test=LabelledFeatures(features[300:], labels[300:])
        )
        assert low <= probe.evaluate(data)["accuracy"] <= high


def test_probe_ignores_scale_and_dead_features():
    train, test = clouds(60, 1), clouds(30, 2)

    def stretched(split):
        dead = torch.full((len(split.features), 1), 3.0)
        return LabelledFeatures(torch.cat([split.features * 1000 + 7, dead], 1), split.labels)

    probe = EVALUATORS.build("linear_probe")
    plain = probe.evaluate(EvalData(train=train, test=test))
    other = probe.evaluate(EvalData(train=stretched(train), test=stretched(test)))
    assert other["accuracy"] == pytest.approx(plain["accuracy"])


# -- mask IoU


def test_iou_by_hand():
    truth = make_masks(["disc", "square"], [(0, 4, 0, 4), (4, 8, 4, 8)])
    guess = make_masks(["disc", "square"], [(0, 4, 0, 2), (4, 8, 0, 4)])
    assert word_ious(guess, truth) == [0.5, 0.0]
    numbers = EVALUATORS.build("mask_iou").evaluate(EvalData(predicted={"a": guess, "b": truth}, truth={"a": truth}))
    assert (numbers["mean_iou"], numbers["found"], numbers["words"], numbers["images"]) == (0.25, 0.5, 2, 1)


def test_words_are_matched_by_name():
    truth = make_masks(["dog", "cat", "dog"], [(0, 2, 0, 2), (4, 6, 0, 2), (0, 2, 6, 8)])
    swapped = make_masks(["cat", "dog", "dog"], [(4, 6, 0, 2), (0, 2, 0, 2), (0, 2, 6, 8)])
    assert word_ious(swapped, truth) == [1.0, 1.0, 1.0]
    assert word_ious(make_masks(["Dog"], [(0, 2, 0, 2)]), truth) == [1.0, 0.0, 0.0]


def test_words_without_true_pixels_do_not_count():
    truth = make_masks(["dog", "cat"], [(0, 2, 0, 2), (0, 0, 0, 0)])
    assert word_ious(make_masks(["dog", "cat"], [(0, 2, 0, 2), (5, 8, 5, 8)]), truth) == [1.0]


def test_masks_of_another_size_are_resized():
    def disc(size):
        return WordMasks(
            ("disc",), shape_mask("disc", size / 2, size / 2, size / 3, size)[None], np.zeros(1, np.float32)
        )

    (iou,) = word_ious(disc(32), disc(64))
    assert iou > 0.93


def test_nothing_shared_is_an_error():
    with pytest.raises(ConfigError, match="share no sample"):
        EVALUATORS.build("mask_iou").evaluate(EvalData(predicted=MASKS, truth={"7": MASKS["0"]}))


# -- intervals


def test_interval_has_its_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = mean_with_interval((rng.random(80) < 0.6).astype(float))
        hits += low <= 0.6 <= high
    assert 180 <= hits <= 199  # 95 % of 200 is 190


def test_interval_draws_the_words_of_an_image_together():
    sums, counts = np.array([4.0, 0.0] * 20), np.array([4.0, 4.0] * 20)
    mean, low, high = mean_with_interval(sums, counts)
    alone = mean_with_interval(np.array([1.0] * 80 + [0.0] * 80))
    assert mean == alone[0] == 0.5
    assert high - low > 1.5 * (alone[2] - alone[1])


def test_interval_of_any_score_is_that_of_the_mean():
    values = np.random.default_rng(1).random(50)
    _, low, high = mean_with_interval(values)
    assert interval(lambda times: times @ values / 50, 50) == pytest.approx((low, high), abs=2e-3)
    assert interval(lambda times: times @ np.full(50, 0.01), 50) == pytest.approx(
        (0.5, 0.5)
    )  # sets have as many images


def test_interval_contains_the_score_if_resampled_sets_miss_a_class():
    """Ten classes, one image each, one of them found: sets that miss it score 0, others up to the whole."""
    found = np.eye(10)[0]

    def mean_over_shown(times):
        return (times > 0) @ found / (times > 0).sum(1)

    low, high = interval(mean_over_shown, 10)
    assert 0 <= low <= 0.1 <= high <= 1


def test_one_image_has_no_interval():
    mean, *bounds = mean_with_interval(np.array([3.0]), np.array([4.0]))
    assert mean == 0.75
    assert np.isnan([*bounds, *interval(lambda times: times @ np.ones(1), 1)]).all()
    assert not np.isnan(mean_with_interval(np.array([0.0, 1.0]))).any()
    assert json_safe({"ap": mean, "low": bounds[0], "high": bounds[1], "words": 4.0}) == {
        "ap": 0.75, "low": None, "high": None, "words": 4.0,
    }  # fmt: skip


def test_spread_is_over_seeds():
    assert spread([0.5]) == {}
    assert spread([0.2, 0.4]) == {"spread": pytest.approx(0.2 / math.sqrt(2))}


# -- segmentation


def test_mean_iou_by_hand():
    """Pixels of all images count together, a class that nobody shows does not count, one that nobody knows counts 0."""
    true = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 3]]]).short()
    guess = torch.tensor([[[0, 0], [1, 0]], [[0, 1], [0, 1]]])
    scores = torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).half()
    nothing = (torch.zeros(0, 4),) * 2, (torch.zeros(0, dtype=torch.long),) * 2
    scenes = DenseFeatures(scores, true, *nothing, ("a", "b"), ("background", "disc", "square", "unseen"))
    counts = count_pixels(torch.nn.Identity(), scenes, "cpu")
    assert mean_iou(*counts, np.ones((1, 2)))[0] == pytest.approx((4 / 6 + 1 / 4 + 0) / 3)
    assert mean_iou(*counts, np.array([[1.0, 0]]))[0] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_class_that_training_lacks_counts_as_zero():
    counts = [np.array([[3.0, 0.0]]), np.array([[4.0, 0.0]]), np.array([[3.0, 1.0]])]
    assert mean_iou(*counts, np.ones((1, 1)))[0] == pytest.approx((3 / 4 + 0) / 2)


def test_heads_find_edges_between_patches():
    """Enlarged scores put the outline near the true one: patches of 4 pixels, boxes of whole patches."""
    options = {"seeds": 1, "steps": 150, "width": 32, "decoder_learning_rate": 0.02}
    train, test = (make_scenes(count, seed, known=True, scale=4) for count, seed in ((32, 1), (12, 2)))
    numbers = EVALUATORS.build(Choice("segmentation", options)).evaluate(EvalData(train_scenes=train, test_scenes=test))
    assert numbers["miou"] > 0.8
    assert numbers["decoder_miou"] > 0.9
    assert "spread" not in numbers


def test_dead_channels_say_nothing():
    scenes = make_scenes(6, 1, known=True)
    scenes.patches[:, 1] = 3.0
    normal = Standardize(scenes)(scenes.patches)
    assert (normal[:, 1] == 0).all()
    others = normal[:, [0, 2, 3]].double()
    assert others.mean((0, 2, 3)).abs().max() < 1e-5
    assert (others.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


# -- detection


def detections(scenes, noise, seed=0, copies=3):
    """True boxes, shaken, several times, and some of another class."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for image, (boxes, classes) in enumerate(zip(scenes.boxes, scenes.box_classes, strict=True)):
        for box, number in zip(boxes, classes.tolist(), strict=True):
            for copy in range(copies):
                shaken = box + noise * torch.randn(4, generator=generator)
                score = float(torch.rand((), generator=generator)) - copy
                rows.append(
                    (image, torch.cat([shaken[:2], torch.maximum(shaken[2:], shaken[:2] + 0.1)]), score, number)
                )
        rows.append((image, torch.tensor([0.0, 0, 3, 3]), float(torch.rand((), generator=generator)), 1 + image % 2))
    images, boxes, scores, classes = zip(*rows, strict=True)
    return Detections(torch.tensor(images), torch.stack(boxes), torch.tensor(scores), torch.tensor(classes))


def test_perfect_boxes_are_found_perfectly():
    scenes = make_scenes(10, 5, known=True)
    found = Detections(
        torch.repeat_interleave(torch.arange(10), torch.tensor([len(boxes) for boxes in scenes.boxes])),
        torch.cat(scenes.boxes), torch.ones(sum(map(len, scenes.boxes))), torch.cat(scenes.box_classes),
    )  # fmt: skip
    judged = average_precision(found, scenes)
    assert (judged.ap, judged.ap50, judged.ap75) == pytest.approx((1, 1, 1))
    assert judged.resampled(np.ones((1, 10)))[0] == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_resampled_precision_is_that_of_coco(noise):
    """Each image once: COCO's figure. Some images left out or doubled: COCO's figure for that set."""
    scenes = make_scenes(16, 6, known=True)
    found = detections(scenes, noise)
    judged = average_precision(found, scenes)
    assert 0.05 < judged.ap < 0.95
    times = np.array([2, 0, 1, 3, 0, 1, 1, 0, 1, 1, 2, 0, 1, 1, 1, 1.0])
    drawn = np.repeat(np.arange(16), times.astype(int))
    redrawn = DenseFeatures(
        scenes.patches[drawn], scenes.pixels[drawn], tuple(scenes.boxes[i] for i in drawn),
        tuple(scenes.box_classes[i] for i in drawn), tuple(map(str, range(16))), scenes.classes,
    )  # fmt: skip
    parts = []
    for place, image in enumerate(drawn):
        own = found.images == int(image)
        parts.append((torch.full((int(own.sum()),), place), found.boxes[own], found.scores[own], found.classes[own]))
    wanted = average_precision(Detections(*(torch.cat(part) for part in zip(*parts, strict=True))), redrawn)
    assert judged.resampled(np.ones((1, 16)))[0] == pytest.approx(judged.ap, abs=1e-6)
    assert judged.resampled(times[None])[0] == pytest.approx(wanted.ap, abs=1e-6)


def test_nothing_found_is_zero():
    scenes = make_scenes(4, 7, known=True)
    nothing = Detections(
        torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    )
    judged = average_precision(nothing, scenes)
    assert isinstance(judged, DetectionFigures)
    assert (judged.ap, judged.resampled(np.ones((1, 4)))[0]) == (0, 0)


def test_cells_are_assigned_the_smallest_box():
    boxes = torch.tensor([[0.0, 0, 8, 8], [3, 3, 5, 5], [6.1, 6.1, 6.4, 6.4]])
    learned, sides = assign(boxes, torch.tensor([1, 2, 3]), 8)
    grid = learned.view(8, 8)
    assert grid[3:5, 3:5].tolist() == [[2, 2], [2, 2]]
    assert grid[2, 3] == grid[5, 4] == 1  # within 1.5 cells of the large box's middle
    assert grid[0, 0] == 0
    assert grid[6, 6] == 3  # smaller than a cell, and still learned
    assert sides.view(8, 8, 4)[3, 3].tolist() == [3, 3, 5, 5]


def test_generalised_iou_by_hand():
    found, true = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]]), torch.tensor([[1.0, 0, 3, 2], [3, 0, 4, 1]])
    wanted = [1 - 2 / 6, 1 - (0 - 2 / 4)]
    assert generalised_iou_loss(found, true).tolist() == pytest.approx(wanted)


def test_focal_loss_by_hand():
    logits, right = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    p = 1 / (1 + math.exp(-2))
    wanted = [0.25 * 0.25 * math.log(2), 0.75 * p**2 * -math.log(1 - p)]
    assert focal_loss(logits, right).tolist() == pytest.approx(wanted, rel=1e-5)


def test_overlapping_boxes_of_a_class_are_dropped():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 3.8], [0, 0, 4, 3.7], [5, 5, 8, 8]]])
    assert _non_maximum_suppression(boxes, torch.tensor([[1, 1, 2, 1]]), 0.6).tolist() == [[True, False, True, True]]


# -- retrieval


def test_recall_against_a_loop():
    pairs = make_pairs(30, known=False)
    mixed = ImageTextPairs(pairs.images, pairs.texts + 0.7 * pairs.images.repeat(2, 1), pairs.of_image, pairs.of_text)
    numbers = EVALUATORS.build("retrieval").evaluate(EvalData(pairs=mixed))
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (mixed.images, mixed.texts))
    similarity = images @ texts.T
    for k in (1, 5, 10):
        hits = [bool({i, i + 30} & set(similarity[i].topk(k).indices.tolist())) for i in range(30)]
        assert numbers[f"image_to_text_r{k}"] == pytest.approx(np.mean(hits))
        hits = [j % 30 in similarity[:, j].topk(k).indices.tolist() for j in range(60)]
        assert numbers[f"text_to_image_r{k}"] == pytest.approx(np.mean(hits))
    recalls = [value for name, value in numbers.items() if name.startswith(("image_to", "text_to"))]
    assert numbers["mean_recall"] == pytest.approx(np.mean(recalls))


def test_the_same_for_every_image_finds_nothing():
    pairs = make_pairs(20, known=True)
    same = ImageTextPairs(torch.ones(20, 4), torch.ones(40, 4), pairs.of_image, pairs.of_text)
    assert EVALUATORS.build("retrieval").evaluate(EvalData(pairs=same))["mean_recall"] == 0


def test_a_text_of_several_images_is_right_for_each():
    """Three images, two of which are called the same."""
    images = torch.tensor([[1.0, 0], [1.0, 0.1], [0, 1]])
    texts = torch.tensor([[1.0, 0.05], [0, 1]])
    pairs = ImageTextPairs(images, texts, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]))
    numbers = EVALUATORS.build(Choice("retrieval", {"ranks": [1]})).evaluate(EvalData(pairs=pairs))
    assert numbers["image_to_text_r1"] == numbers["text_to_image_r1"] == numbers["mean_recall"] == 1
    assert numbers["chance_r1"] == pytest.approx(1 / 2)


def test_chance_is_what_random_vectors_reach():
    generator = torch.Generator().manual_seed(0)
    evaluator, found = EVALUATORS.build("retrieval"), []
    base = make_pairs(40, known=True)
    for _ in range(30):
        images, texts = torch.randn(40, 32, generator=generator), torch.randn(80, 32, generator=generator)
        found.append(evaluator.evaluate(EvalData(pairs=ImageTextPairs(images, texts, base.of_image, base.of_text))))
    for k in (1, 5, 10):
        assert np.mean([numbers[f"image_to_text_r{k}"] for numbers in found]) == pytest.approx(
            found[0][f"chance_r{k}"], abs=0.04
        )


def test_a_missing_library_is_named():
    script = (
        "import sys; sys.modules['pycocotools'] = None\n"
        "from synthgen.errors import MissingDependency\n"
        "from synthgen.evaluators import EVALUATORS\n"
        "try: EVALUATORS.build('detection')\n"
        "except MissingDependency as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install pycocotools" in told.stdout


@pytest.mark.parametrize("accessor", ["labelled", "feature_maps", "latents", "images"])
def test_images_without_labels_are_an_error(accessor):
    with pytest.raises(ConfigError, match="no labelled images to train on, or none to evaluate on"):
        getattr(EvalData(), accessor)()


def test_missing_parts_of_the_data_are_named():
    latents = Latents(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    with pytest.raises(ConfigError, match="no generator that the latents are of"):
        EvalData(train_latents=latents, test_latents=latents).latents()
    images = LabelledImages(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    with pytest.raises(ConfigError, match="neither an encoder nor a generator"):
        EvalData(train_images=images, test_images=images).images()
    with pytest.raises(ConfigError, match="no images with texts"):
        EvalData().image_text_pairs()
