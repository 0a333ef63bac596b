"""Class conditioning: vectors, dropout of labels, guidance, and that classes decide what is sampled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from synthgen.config import Choice
from synthgen.datasets import ImageDataset
from synthgen.errors import ConfigError, CorruptFile, UnknownName
from synthgen.loader import Batch
from synthgen.methods import METHODS, _classes
from synthgen.methods._classes import class_numbers, classifier_free_guidance, labels_of, sampled_classes
from synthgen.models.classes import ClassEmbedding
from synthgen.models.draws import uniform
from synthgen.models.vit import EncoderConfig, VisionTransformer
from synthgen.train.start import load_weights

CONFIG = EncoderConfig(image_size=8, patch_size=2, dim=32, depth=1, num_heads=2)
COLOURS = {"red": (0.9, 0.1, 0.1), "blue": (0.1, 0.1, 0.9)}
CONDITIONED = ["maskdit", "umd"]


class LabelledFeatures(ImageDataset):
    """Labels without images."""

    def __init__(self, *labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError("labels are read without decoding an image")

    def key(self, index):
        return str(index)

    def label(self, index):
        return self.labels[index]

    def has_masks(self):
        return False


def build(name, labels=("red", "blue", None), **options):
    torch.manual_seed(0)
    method = METHODS.build(Choice(name, {"class_labels": True} | options), encoder=VisionTransformer(CONFIG))
    method.fit_to(LabelledFeatures(*labels))
    return method


def shaken(name, **options):
    """With weights that are nowhere zero, so that classes matter."""
    method = build(name, **options)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return method


def make_batch(count=8, step=0):
    """Even images, each with the name of its colour."""
    generator = torch.Generator().manual_seed(step)
    labels = [list(COLOURS)[number] for number in torch.randint(2, (count,), generator=generator).tolist()]
    mean, std = torch.tensor(CONFIG.mean), torch.tensor(CONFIG.std)
    colours = torch.tensor([COLOURS[label] for label in labels]) + 0.05 * torch.randn(count, 3, generator=generator)
    images = ((colours - mean) / std)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    masks = torch.zeros(count, 0, 8, 8, dtype=torch.bool)
    names = {"keys": ("",) * count, "texts": ("",) * count, "words": ((),) * count, "labels": tuple(labels)}
    return Batch(images, masks, masks.flatten(2).any(2), torch.arange(count) + count * step, **names)


# -- what the data tells


class Counted(LabelledFeatures):
    """It keeps which labels were read."""

    def __init__(self, *labels):
        super().__init__(*labels)
        self.read = []

    def label(self, index):
        self.read.append(index)
        return super().label(index)


def test_each_process_reads_the_labels_of_its_share_once(monkeypatch):
    labels = ("dog", None, "cat", "cat", "dog", "hen", "hen")
    data = Counted(*labels)
    assert labels_of(data) == labels_of(data) == {"cat", "dog", "hen"}
    assert data.read == list(range(7))
    monkeypatch.setattr(_classes, "world_size", lambda: 3)
    read, said = [], []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)

        def gather(every, found):
            said.append(found)
            every[:] = [{"dog"}, {"ant"}, found]

        monkeypatch.setattr("torch.distributed.all_gather_object", gather)
        data = Counted(*labels)
        assert labels_of(data) == {"dog", "ant", *said[rank]}  # what others found counts
        assert 2 <= len(data.read) <= 3
        read += data.read
    assert read == list(range(7))
    assert set().union(*said) == {"cat", "dog", "hen"}


def test_an_unreadable_label_ends_all_processes(monkeypatch):
    class Broken(Counted):
        def label(self, index):
            if index == 3:
                raise CorruptFile("sample 3 cannot be read")
            return super().label(index)

    with pytest.raises(CorruptFile, match="sample 3"):
        labels_of(Broken(*"abcd"))
    monkeypatch.setattr(_classes, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    said = []
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda every, found: said.append(found))
    with pytest.raises(CorruptFile, match="sample 3"):
        labels_of(Broken(*"abcd"))
    (error,) = said  # the other one gets the error before this one ends
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda every, found: every.__setitem__(1, error))
    with pytest.raises(CorruptFile, match="sample 3"):
        labels_of(Broken(*"abcd"))


# -- vectors and names


def test_a_plain_vector_is_a_linear_layer_on_a_one_hot_vector():
    classes = ClassEmbedding(5)
    classes.learn(["cat", "dog", "cat"])
    numbers = torch.tensor([1, 2, 0, 2])
    one_hot = F.one_hot(numbers, 3)[:, :2].float()  # no class is all 0
    assert torch.equal(classes(numbers), one_hot @ classes.table.weight)
    assert [tuple(p.shape) for p in classes.parameters()] == [(2, 5)]
    classes(classes.none(4)).sum().backward()  # a gradient, which is 0, also without a class
    assert not classes.table.weight.grad.any()


def test_a_deep_vector_is_two_layers_on_a_table_in_which_no_class_is_the_last():
    classes = ClassEmbedding(5, deep=True)
    classes.learn(["cat", "dog"])
    first, _, second = classes.mix
    rows = classes.table.weight[[0, 2]]
    by_hand = F.silu(rows @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert torch.allclose(classes(classes.numbers(["cat", None])), by_hand, atol=1e-6)
    assert classes.table.weight.shape == (3, 5)


def test_classes_are_found_by_name_and_by_number():
    classes = ClassEmbedding(4)
    classes.learn(["dog", "cat", "10", "9", "dog"])
    assert classes.names == ("9", "10", "cat", "dog")
    assert classes.numbers(["dog", 0, None, "9", 3]).tolist() == [3, 0, 4, 0, 3]
    with pytest.raises(ConfigError, match="there is no class 4; the 4 classes are counted from 0"):
        classes.numbers([4])
    with pytest.raises(UnknownName, match="unknown class 'dgo'; did you mean 'dog'"):
        classes.numbers(["dgo"])
    classes.learn(map(str, range(1, 12)))  # a cls without names, counted from 1: a number is a name
    assert classes.names == tuple(map(str, range(1, 12)))
    assert classes.numbers([1, 11, "2"]).tolist() == [0, 10, 1]
    with pytest.raises(UnknownName, match="unknown class '0'"):
        classes.numbers([0])


def test_of_many_classes_an_error_names_the_nearest():
    classes = ClassEmbedding(4)
    classes.learn(f"breed {number}" for number in range(1000))
    with pytest.raises(UnknownName, match=r"unknown class 'bred 77'; of 1000 classes the nearest are: breed 77, "):
        classes.numbers(["bred 77"])


def test_names_travel_with_the_weights(tmp_path):
    classes = ClassEmbedding(4, deep=True)
    classes.learn(["Hündin 🐕", "cat"])
    other = ClassEmbedding(4, deep=True)
    other.load_state_dict(classes.state_dict())
    assert other.names == classes.names
    assert torch.equal(other(other.numbers(["cat", None])), classes(classes.numbers(["cat", None])))
    kept = other.table.weight
    other.load_state_dict(classes.state_dict())  # a training that goes on: the optimizer holds on to them
    assert other.table.weight is kept
    for data in (b'{"cat": 1}', b"[1]", b"no", b"["):
        fresh = ClassEmbedding(4, deep=True)
        wrong = classes.state_dict() | {"_extra_state": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
        with pytest.raises(ValueError, match=r"classes are not a list|JSON|Expecting"):
            fresh.load_state_dict(wrong)
    classes.learn(["cat", "dog"])
    with pytest.raises(ValueError, match="its classes are not those of the data"):
        other.load_state_dict(classes.state_dict())


def test_a_folder_with_an_undecodable_name_is_an_error():
    with pytest.raises(ConfigError, match=r"the class name 'caf\\udce9' is not valid Unicode"):
        ClassEmbedding(4).learn([b"caf\xe9".decode("utf-8", "surrogateescape")])


# -- dropout of labels


def test_each_seed_decides_whether_its_label_is_dropped():
    classes = ClassEmbedding(4)
    classes.learn(["cat", "dog"])
    seeds, labels = torch.arange(20000), ("dog",) * 20000
    numbers, shares = class_numbers(classes, labels, seeds, 0.1, stream=4)
    dropped = numbers == 2
    assert shares["with_class"].item() == pytest.approx(1 - dropped.float().mean().item())
    assert torch.equal(dropped, uniform(seeds, stream=4) < 0.1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)  # 4.7 deviations
    assert (class_numbers(classes, labels, seeds, 0.0, stream=4)[0] == 1).all()
    assert class_numbers(classes, ("cat", None, "dog"), seeds[:3], 0.0, stream=4)[0].tolist() == [0, 2, 1]
    assert class_numbers(None, labels, seeds, 0.1, stream=4) == (None, {})


@pytest.mark.parametrize("name", CONDITIONED)
def test_each_method_drops_its_share_of_labels_and_conditions_no_clean_image(name):
    method, seen = build(name, label_dropout=0.3), []
    method.classes.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = make_batch(400)
    with_class = method(batch, 0.5).metrics["with_class"]
    (numbers,) = seen
    assert with_class.item() == pytest.approx((numbers < 2).float().mean().item())
    noised = 400 if name == "maskdit" else 200  # the second half of a batch of umd stays clean
    assert numbers.shape == (noised,)
    assert (numbers == 2).float().mean().item() == pytest.approx(0.3, abs=0.13)  # 4 deviations of 200
    true = method.classes.numbers(batch.labels[:noised])
    assert torch.equal(numbers[numbers < 2], true[numbers < 2])
    again = build(name, label_dropout=0.3)
    again.classes.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    again(batch, 0.9)
    assert torch.equal(seen[0], seen[1])


def test_without_noise_a_class_changes_nothing_in_the_encoder():
    """The exported encoder is the limit for an image of any class, and of none."""
    method, features = shaken("maskdit"), []
    method.decoder.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    x = torch.randn(2, 16, 12)
    with torch.no_grad():
        for sigma in (1.0, 1e-4):
            for number in (0, 1, 2):
                method.denoise(x, torch.full((2,), sigma), *method.whole(2), torch.tensor([number] * 2))
    far = [max(float((features[first + n] - features[first]).norm()) for n in (1, 2)) for first in (0, 3)]
    assert far[0] > 0.1
    assert far[1] < 1e-3 * far[0]


@pytest.mark.parametrize("name", CONDITIONED)
def test_initial_weights_and_loss_are_those_without_classes(name):
    """Classes come last when weights are drawn, and change nothing before the first step."""
    batch, labelled, plain = make_batch(), build(name), build(name, class_labels=False)
    assert plain.classes is None
    ours, theirs = labelled.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {key for key in ours if "classes" not in key} == theirs.keys()
    assert labelled(batch, 0.5).loss.item() == plain(batch, 0.5).loss.item()


# -- drawing


def test_guidance_is_its_formula_and_a_scale_of_1_needs_one_pass():
    answers, asks = {None: torch.tensor([1.0, 2.0]), "class": torch.tensor([3.0, 1.0])}, []

    def ask(numbers):
        asks.append(numbers)
        return answers[None if numbers is None else "class"]

    numbers = torch.tensor([0, 0])
    assert classifier_free_guidance(ask, numbers, 1.5).tolist() == [1.0 + 1.5 * 2.0, 2.0 - 1.5]
    assert len(asks) == 2
    asks.clear()
    assert classifier_free_guidance(ask, numbers, 1.0).tolist() == [3.0, 1.0]
    assert classifier_free_guidance(ask, None, 1.0).tolist() == [1.0, 2.0]
    assert len(asks) == 2


@pytest.mark.parametrize("name", CONDITIONED)
def test_the_sampler_uses_the_guided_prediction(name):
    """The same images as of a network whose own answer is none + w (class - none)."""
    method, seeds = shaken(name), torch.arange(3)
    drawn = method.sample(seeds, 3, labels=["red", None, 0], guidance_scale=2.5)
    twin, numbers = copy.deepcopy(method), torch.tensor([1, 2, 0])
    network, answer = (twin.average, "denoise") if name == "maskdit" else (twin, "noise")
    own, calls = getattr(network, answer), []

    def mixed(*args):
        assert args[-1] is not None
        calls.append(args)
        return own(*args[:-1], None) + 2.5 * (own(*args[:-1], numbers) - own(*args[:-1], None))

    setattr(network, answer, mixed)
    assert torch.allclose(twin.sample(seeds, 3, labels=["red", "red", "red"]), drawn, atol=1e-5)
    assert len(calls) == (5 if name == "maskdit" else 3)  # Heun: twice per step, except the last
    without = method.sample(seeds, 3)
    assert torch.allclose(drawn[1], without[1], atol=1e-5)  # without a class there is nothing to lead to
    assert not torch.allclose(drawn[0], without[0], atol=1e-3)
    assert torch.equal(method.sample(seeds, 3, labels="red"), method.sample(seeds, 3, labels=["red"] * 3))


@pytest.mark.parametrize("name", CONDITIONED)
@pytest.mark.parametrize(("guidance_scale", "times"), [(1.0, 1), (1.5, 2)])
def test_the_unconditional_half_is_computed_only_if_guided(name, guidance_scale, times):
    method, asks = build(name), []
    network = method.average if name == "maskdit" else method
    network.decoder.register_forward_pre_hook(lambda _, args: asks.append(1))
    method.sample(torch.arange(2), 2, labels="blue", guidance_scale=guidance_scale)
    assert len(asks) == (3 if name == "maskdit" else 2) * times  # Heun: twice per step, except the last


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance_scale": 1.5}, "has no effect without labels; give labels too"),
        ({"labels": "red", "guidance_scale": -1.0}, "must be 0 or more"),
        ({"labels": "red", "guidance_scale": float("nan")}, "must be 0 or more"),
        ({"labels": ["red", "blue"]}, "2 labels for 3 seeds"),
        ({"labels": "rad"}, "unknown class 'rad'; did you mean 'red'"),
        ({"labels": 2}, "there is no class 2"),
    ],
)
def test_invalid_sampling_is_refused(given, said):
    for name in CONDITIONED:
        with pytest.raises((ValueError, ConfigError), match=said):
            build(name).sample(torch.arange(3), 2, **given)
    with pytest.raises(ValueError, match="trained without classes; pretrain with class_labels: true"):
        sampled_classes(None, "red", 3, 1.0)


def train(method, steps, rate=5e-3):
    """Some steps on even images, each of one of two colours."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        method(make_batch(32, step), step / steps).loss.backward()
        optimizer.step()
        method.after_step(step / steps)


def redness(method, **given):
    """How often an image is nearer to red than to blue."""
    red, blue = torch.tensor(COLOURS["red"]), torch.tensor(COLOURS["blue"])
    means = method.sample(torch.arange(24), 20, **given).mean((2, 3))
    return float(((means - red).norm(dim=1) < (means - blue).norm(dim=1)).float().mean())


@pytest.mark.parametrize("name", CONDITIONED)
def test_labels_decide_what_is_drawn(name):
    """Two colours as classes: images of one are nearer to it than to the other."""
    whole = {"clean_share": 0.0, "noisy_mask_ratio": 0.0} if name == "umd" else {"decoder_dim": 32}
    method = build(name, label_dropout=0.2, **whole)
    train(method, 400 if name == "umd" else 200)
    assert redness(method, labels="red") > 0.75
    assert redness(method, labels="blue") < 0.25
    assert redness(method, labels="red", guidance_scale=2.0) > 0.75
    assert redness(method, labels="blue", guidance_scale=2.0) < 0.25


def test_a_network_without_classes_is_tuned_to_sample_by_class():
    """UMD's two phases: the second begins with the first one's weights, hides nothing and draws by its average."""
    first = build("umd", class_labels=False)
    train(first, 200)
    tuned = build("umd", label_dropout=0.2, clean_share=0.05, noisy_mask_ratio=0.0, ema_decay=0.9)
    loaded = load_weights(tuned, first.state_dict())
    assert loaded.new_parts == ("classes", "steps")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor)
        assert torch.equal(tuned.state_dict()[f"average.{name}"], tensor)  # it begins as what it follows
    train(tuned, 250)
    red = {label: redness(tuned, labels=label, guidance_scale=2.0) for label in COLOURS}
    assert red["red"] > 0.75
    assert red["blue"] < 0.25
    tuned.average = None
    assert redness(tuned, labels="red", guidance_scale=2.0) > 0.75  # the weights themselves learned it as well


# -- settings


@pytest.mark.parametrize("name", CONDITIONED)
def test_a_wrong_share_is_an_error(name):
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"label_dropout must be at least 0 and below 1"):
            build(name, label_dropout=share)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"ema_decay": 1.1}, "ema_decay must be at least 0 and at most 1, not 1.1"),
        ({"crop_area": 0.0}, "crop_area must be at least 0.01 and at most 1, not 0.0"),
    ],
)
def test_wrong_options_of_tuning_are_errors(option, said):
    with pytest.raises(ConfigError, match=said):
        build("umd", **option)


def test_crop_area_is_the_least_share_of_an_image_in_a_view():
    assert [build("umd", **option).views().scale for option in ({}, {"crop_area": 0.95})] == [(0.8, 1.0), (0.95, 1.0)]
