"""What every method must do, plain and guided."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch

from synthgen.config import Choice
from synthgen.datasets import Sample
from synthgen.errors import ConfigError
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.models.transformers_vit import to_transformers
from synthgen.models.vit import VisionTransformer, load_encoder, save_encoder
from tests.methods import CONFIG, build, make_batch, make_samples, train, without_masks

NAMES = METHODS.names()
LABELS = {"class_labels": True}  # of methods that condition on classes
FORMS = [(name, {}) for name in NAMES]
FORMS += [
    (name, LABELS)
    for name in NAMES
    if LABELS.keys() <= inspect.signature(METHODS.load(name).__init__).parameters.keys()
]
EACH = [(name, options, guided) for name, options in FORMS for guided in (False, True)]


def build_each(name, options, guided):
    return build(name, **options, **(METHODS.load(name).guided if guided else {}))


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_every_method(name, options, guided):
    """A finite loss, gradients for all of the encoder, independence of torch's seed, and pickling."""
    method, batch = build_each(name, options, guided), make_batch()
    assert method.uses_masks == guided
    losses = []
    for seed, copy in enumerate((method, pickle.loads(pickle.dumps(method)))):
        torch.manual_seed(seed)
        output = copy(batch, 0.5)
        losses.append(output.loss.item())
        assert output.loss.ndim == 0
        assert output.loss.isfinite()
        assert all(value.numel() == 1 and not value.requires_grad for value in output.metrics.values())
    assert losses[0] == losses[1]
    method(batch, 0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in method.encoder.named_parameters())
    assert all(
        p.grad is not None for p in method.parameters() if p.requires_grad
    )  # or processes could not share a step
    method.after_step(1.0)
    for view in (method.views(), method.second_views()):
        if view is not None:
            shown = view(Sample("0", np.zeros((40, 50, 3), np.uint8)), np.random.default_rng(0))
            assert shown.image.shape == (32, 32, 3)


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_every_method_learns_from_64_images(name, options, guided):
    losses = train(build_each(name, options, guided), make_batch(64), 8)
    assert np.mean(losses[-2:]) < 0.95 * losses[0]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_every_method_overfits_one_batch(name, options):
    losses = train(build(name, **options), make_batch(8), 80)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_exported_encoders_have_the_same_features(name, options, tmp_path):
    """Our own export and that for transformers."""
    method, batch = build(name, **options), make_batch()
    train(method, batch, 2)
    save_encoder(method.encoder, tmp_path, method={"name": name})
    with torch.no_grad():
        features = method.encoder(batch.images)
        assert torch.equal(load_encoder(tmp_path)(batch.images), features)
        assert torch.allclose(to_transformers(method.encoder)(batch.images).last_hidden_state, features, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_wrong_type_are_refused(name):
    parameters = inspect.signature(METHODS.load(name).__init__).parameters
    options = [option for option in parameters if option not in ("self", "encoder")]
    for option in options:
        wrong = 3 if isinstance(parameters[option].default, str) else "most"
        with pytest.raises(ConfigError, match=rf"{name}\.{option}"):
            build(name, **{option: wrong})
    with pytest.raises(ConfigError, match="unknown setting"):
        build(name, no_such_option=1)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_the_state_holds_what_was_read_from_the_data(name, options):
    """A method that was not fitted to the data, such as a loaded one, has the same loss with the same state."""
    method, batch = build(name, **options), make_batch()
    train(method, batch, 1)
    fresh = METHODS.build(Choice(name, options), encoder=VisionTransformer(CONFIG))
    fresh.load_state_dict(method.state_dict())
    assert fresh(batch, 0.5).loss.item() == method(batch, 0.5).loss.item()


@pytest.mark.parametrize("name", [name for name, options in FORMS if options])
def test_class_conditioning_needs_labels(name):
    method = build(name, **LABELS)
    bare = [dataclasses.replace(sample, label=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no label in the 3 samples looked at"):
        method.check(bare)
    method.check([*bare, *make_samples(1)])
    batch = make_batch()
    assert method(dataclasses.replace(batch, labels=(None,) * 4), 0.5).loss.isfinite()
    build(name).check(bare)
    other = build(name)
    other.load_state_dict({key: value for key, value in method.state_dict().items() if "classes" not in key})


@pytest.mark.parametrize(("name", "options", "guided"), EACH)
def test_metrics_have_the_same_names_for_every_batch(name, options, guided):
    """Parts of a step, and processes, whose samples lack something are averaged with those that have it."""
    method, batch = build_each(name, options, guided), make_batch()
    wordless = dataclasses.replace(batch, words=((),) * 4, second=dataclasses.replace(batch.second, words=((),) * 4))
    lacking = [
        without_masks(wordless),
        dataclasses.replace(batch, masks=batch.masks & False, present=batch.present & False),
        dataclasses.replace(batch, texts=("",) * 4),
        dataclasses.replace(batch, labels=(None,) * 4),
    ]
    for progress in (0.0, 0.5, 1.0):
        expected = list(method(batch, progress).metrics)
        for other in lacking:
            metrics = method(other, progress).metrics
            assert list(metrics) == expected  # they are stacked in this order
            assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_guidance_needs_masks(name):
    method = build_each(name, {}, guided=True)
    bare = [dataclasses.replace(sample, words=(), label_map=None) for sample in make_samples(3)]
    with pytest.raises(ConfigError, match="no mask in the 3 samples"):
        method.check(bare)
    method.check([*bare, *make_samples(2)])
    assert method(without_masks(make_batch()), 0.5).loss.isfinite()  # a batch without any does no harm
    build(name).check(bare)


@pytest.mark.parametrize(
    ("name", "options", "guided"), [form for form in EACH if form[0] not in ("contrastive", "vlp")]
)
def test_a_step_is_the_mean_of_its_halves(name, options, guided):
    """Random numbers belong to the samples: the mean loss is the same however a step is split."""
    method, samples = build_each(name, options, guided), make_samples(8)
    whole = make_batch(samples=samples)

    def part(batch, rows):
        tensors = {
            f.name: v[rows] for f in dataclasses.fields(Batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)
        }
        names = {n: tuple(getattr(batch, n)[i] for i in rows) for n in ("keys", "texts", "words", "labels")}
        return dataclasses.replace(batch, **tensors, **names, second=None)

    halves = [method(part(whole, rows), 0.7).loss.item() for rows in ([0, 2, 4, 6], [1, 3, 5, 7])]
    assert method(whole, 0.7).loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)
