"""The project's linear layer: what it computes, and by which library."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from synthgen.models import linear as module
from synthgen.models.linear import Linear, linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """The shapes for which oneDNN was asked, on any processor and for layers of any size."""
    shapes = []
    forward = module._OneDnnLinear.forward

    def recorded(ctx, x, *others):
        shapes.append(tuple(x.shape))
        return forward(ctx, x, *others)

    monkeypatch.setattr(module._OneDnnLinear, "forward", staticmethod(recorded))
    monkeypatch.setattr(module, "_ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(module, "_MIN_PRODUCTS", 1)
    return shapes


def outputs_and_gradients(function, *inputs):
    """The result of a function of fresh leaves, and the gradients of a weighted sum of it."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    y = function(*leaves)
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()
    return y, *torch.autograd.grad((y * weights).sum(), leaves)


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (1, 7), (7,)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_torch(onednn, shape, bias):
    inputs = [torch.randn(*shape), torch.randn(11, 7), *([torch.randn(11)] if bias else [])]
    for mine, theirs in zip(
        outputs_and_gradients(linear, *inputs), outputs_and_gradients(F.linear, *inputs), strict=True
    ):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 3  # forward, and the gradients of input and weight


@needs_onednn
def test_strides_may_be_any(onednn):
    x, weight = torch.randn(7, 6, 5).permute(2, 1, 0), torch.randn(11, 14)[:, ::2]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    x = torch.randn(5, 7, requires_grad=True)
    (linear(x, weight).t()[::2]).sum().backward()  # the gradient that comes in is strided
    torch.testing.assert_close(x.grad, weight[::2].sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)
    assert onednn


@needs_onednn
def test_only_the_gradients_that_are_needed_are_computed(onednn):
    layer = Linear(7, 11).requires_grad_(False)
    x = torch.randn(5, 7, requires_grad=True)
    layer(x).sum().backward()
    assert len(onednn) == 2
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert len(onednn) == 4
    assert layer.bias.grad is None


@needs_onednn
@pytest.mark.parametrize("of", ["input", "weight"])
def test_a_frozen_half_keeps_only_what_its_gradient_needs(onednn, of):
    layer, x, saved = Linear(7, 11).requires_grad_(of == "weight"), torch.randn(5, 7, requires_grad=of == "input"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept.shape), lambda _: None):
        layer(x)
    assert saved == [(11, 7) if of == "input" else (5, 7)]


@needs_onednn
def test_gradients_have_gradients(onednn):
    def penalty(function):
        x, weight = (torch.linspace(-1, 1, count).view(-1, 7).requires_grad_() for count in (35, 77))
        (to_x,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(to_x.square().sum(), (x, weight))

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-4)


class Subclass(torch.Tensor):
    """A tensor with operators of its own, as quantised weights are."""


def traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)(x)  # the check would call the layer untraced


def counted(layer, x):
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * x.numel() * len(layer.weight)
    return y


def differentiated(layer, x):
    return torch.func.vjp(layer, x)[0]


def vectorised(layer, x):
    return torch.vmap(layer)(x[None])[0]


def subclassed(layer, x):
    return layer(x.as_subclass(Subclass)).as_subclass(torch.Tensor)


@pytest.mark.filterwarnings("ignore")  # jaxtyping's checks are traced too
@pytest.mark.parametrize("use", [traced, counted, differentiated, vectorised, subclassed])
def test_what_watches_or_replaces_operators_sees_those_of_torch(onednn, use):
    layer, x = Linear(7, 11).requires_grad_(False), torch.randn(5, 7)
    torch.testing.assert_close(use(layer, x), F.linear(x, layer.weight, layer.bias))
    assert not onednn


@pytest.mark.parametrize("case", ["other precision", "autocast", "small", "Intel", "compiling", "oneDNN off"])
def test_torch_computes_everything_else(onednn, monkeypatch, case):
    x = torch.randn(5, 7, dtype=torch.float64 if case == "other precision" else torch.float32)
    layer = Linear(7, 11, dtype=x.dtype)
    if case == "small":
        monkeypatch.setattr(module, "_MIN_PRODUCTS", 5 * 7 * 11 + 1)
    if case == "Intel":
        monkeypatch.setattr(module, "_ONEDNN_IS_FASTER", False)
    if case == "oneDNN off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))
    assert not onednn
