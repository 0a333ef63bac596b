"""The cut against brute force on grids of up to twelve pixels, and what must hold on any grid and of any solver."""

from __future__ import annotations

import itertools
import pickle
import sys

import numpy as np
import pytest

from synthgen import graphcut
from synthgen.graphcut import Edges, MaximumFlow, ends, energy, expand, fastest, grid_edges

OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 1), (-1, 2), (2, -3))
SHAPES = ((2, 3), (3, 2), (1, 5), (3, 3), (2, 4), (3, 4))


def random_problem(seed, shape, labels=2):
    rng = np.random.default_rng(seed)
    unaries = rng.normal(0, 2, (labels, *shape))
    offsets = [offset for offset in OFFSETS if rng.random() < 0.6]
    edges = grid_edges(shape, [(offset, rng.random(shape) * rng.integers(0, 2, shape) * 2) for offset in offsets])
    return unaries, edges


def cut(inside, outside, edges, *, free=None, held=None, solver=None):
    """The pixels inside: labels of two, by their prices."""
    start = np.zeros(inside.shape, dtype=int) if held is None else held.astype(int)
    return expand(np.stack([outside, inside]), edges, free=free, start=start, solver=solver).astype(bool)


def all_labellings(shape, labels=2):
    return (np.array(flat).reshape(shape) for flat in itertools.product(range(labels), repeat=shape[0] * shape[1]))


def least(unaries, edges):
    return min(energy(unaries, edges, each) for each in all_labellings(unaries.shape[1:], len(unaries)))


def energy_by_loop(unaries, weights, labels):
    """The formula of the module, written out pixel by pixel."""
    height, width = labels.shape
    total = sum(unaries[labels[y, x], y, x] for y in range(height) for x in range(width))
    for (dy, dx), weight in weights:
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y + dy < height and 0 <= x + dx < width and labels[y, x] != labels[y + dy, x + dx]:
                total += weight[y, x]
    return total


@pytest.mark.parametrize("seed", range(10))
def test_energy_is_its_formula(seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    weights = [(offset, rng.random(shape)) for offset in OFFSETS]
    unaries, labels = rng.normal(size=(3, *shape)), rng.integers(0, 3, shape)
    assert energy(unaries, grid_edges(shape, weights), labels) == pytest.approx(
        energy_by_loop(unaries, weights, labels)
    )


def least_of_two(unaries, edges):
    """The least energy of all divisions in two, all of them at once."""
    size = unaries[0].size
    inside = np.arange(2**size)[:, None] >> np.arange(size) & 1  # a row a division
    own = inside @ unaries[1].ravel() + (1 - inside) @ unaries[0].ravel()
    first, second, weight = edges.pairs()
    return (own + (inside[:, first] != inside[:, second]) @ weight).min()


@pytest.mark.parametrize("block", range(10))
def test_cut_is_the_minimum_of_a_thousand_random_problems(block):
    shapes = [(height, width) for height in range(1, 13) for width in range(1, 12 // height + 1)]
    for seed in range(100 * block, 100 * (block + 1)):
        unaries, edges = random_problem(seed, shapes[seed % len(shapes)])
        found, same = (cut(unaries[1], unaries[0], edges, solver=solver) for solver in (MaximumFlow, fastest()))
        assert energy(unaries, edges, found.astype(int)) == pytest.approx(least_of_two(unaries, edges), abs=1e-6)
        assert (found == same).all()


def test_cut_takes_the_smallest_of_equals():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        unaries = rng.integers(0, 3, (2, 3, 3)).astype(float)  # whole prices: many ties
        edges = grid_edges((3, 3), [(offset, rng.integers(0, 3, (3, 3)).astype(float)) for offset in OFFSETS[:4]])
        found = cut(unaries[1], unaries[0], edges, solver=(MaximumFlow, fastest())[seed % 2])
        best = least(unaries, edges)
        equals = [each for each in all_labellings((3, 3)) if energy(unaries, edges, each) < best + 1e-9]
        assert energy(unaries, edges, found.astype(int)) == pytest.approx(best, abs=1e-6)
        assert all((found <= each.astype(bool)).all() for each in equals)  # it lies inside every other one


def test_costs_may_differ_by_many_orders_of_magnitude():
    """Neither a seed of a million nats nor edges of a billionth overflow or vanish."""
    inside, outside = np.zeros((1, 4)), np.zeros((1, 4))
    outside[0, 0], inside[0, 3] = 1e6, 1e6
    edges = grid_edges((1, 4), [((0, 1), np.array([[3e-3, 1e-3, 2e-3, 0]]))])
    assert cut(inside, outside, edges).tolist() == [[True, True, False, False]]
    small = cut(inside * 1e-15, outside * 1e-15, edges.times(1e-15))
    assert small.tolist() == [[True, True, False, False]]
    dear = grid_edges((1, 4), [((0, 1), np.full((1, 4), 1e12))] * 3)
    inside[0, 3] = 1e6 - 1
    assert cut(inside, outside, dear).all()


def test_many_pixels_do_not_overflow():
    net = np.where(np.arange(128 * 128).reshape(128, 128) % 2, 1e4, -1e4)
    edges = grid_edges((128, 128), [(offset, np.full((128, 128), 1e3)) for offset in OFFSETS[:4]])
    assert (cut(-net, np.zeros_like(net), edges) == (net > 0)).all()


def test_cut_without_edges_is_the_cheapest_label():
    edges = grid_edges((2, 3), [((0, 1), np.ones((2, 3))), ((1, 0), np.ones((2, 3)))])
    nothing = np.zeros((2, 3))
    assert not cut(nothing, nothing, edges).any()
    assert cut(nothing, nothing + 1, edges).all()
    assert not cut(nothing + 1, nothing, edges).any()
    assert cut(nothing, nothing + 1, grid_edges((2, 3), [])).all()


def test_band_that_is_everything_is_the_whole_cut():
    for seed in range(20):
        unaries, edges = random_problem(seed, (3, 4))
        whole = cut(unaries[1], unaries[0], edges)
        free = np.ones((3, 4), dtype=bool)
        assert (cut(unaries[1], unaries[0], edges, free=free, held=~whole) == whole).all()


def test_band_is_the_minimum_given_its_fixed_pixels():
    for seed in range(60):
        unaries, edges = random_problem(seed, (3, 3))
        rng = np.random.default_rng(1000 + seed)
        free, held = rng.random((3, 3)) < 0.6, rng.random((3, 3)) < 0.5
        found = cut(unaries[1], unaries[0], edges, free=free, held=held)
        assert (found == held)[~free].all()
        allowed = [each for each in all_labellings((3, 3)) if (each.astype(bool) == held)[~free].all()]
        best = min(energy(unaries, edges, each) for each in allowed)
        assert energy(unaries, edges, found.astype(int)) == pytest.approx(best, abs=1e-6)


def test_band_around_the_answer_gives_the_answer():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    signal = np.where((y - 20) ** 2 + (x - 18) ** 2 < 120, 1.0, -1.0) + rng.normal(0, 1.0, (40, 40))
    edges = grid_edges((40, 40), [(offset, np.full((40, 40), 1.0)) for offset in OFFSETS[:4]])
    whole = cut(-signal, signal, edges)
    free = rng.random((40, 40)) < 0.3
    assert 200 < whole.sum() < 600
    for solver in (MaximumFlow, fastest()):  # many pairs of certain pixels are parted: together more than an int32
        assert (cut(-signal, signal, edges, free=free, held=whole, solver=solver) == whole).all()


def test_expand_with_two_labels_is_the_minimum():
    for seed in range(40):
        unaries, edges = random_problem(seed, (3, 3))
        assert energy(unaries, edges, expand(unaries, edges)) == pytest.approx(least(unaries, edges), abs=1e-6)


def test_no_single_move_improves_what_expand_found():
    exact = 0
    for seed in range(40):
        unaries, edges = random_problem(seed, (2, 3), labels=3)
        found = expand(unaries, edges)
        cost = energy(unaries, edges, found)
        for label in range(3):
            for taken in all_labellings((2, 3)):
                assert energy(unaries, edges, np.where(taken, label, found)) > cost - 1e-6
        best = least(unaries, edges)
        lowest = sum(unaries.min(axis=0).ravel())  # the bound of Boykov et al. is about what lies above the unaries
        assert cost - lowest <= 2 * (best - lowest) + 1e-6
        exact += cost < best + 1e-6
    assert exact >= 34  # a move that forgets the pairs of other labels finds far fewer


def test_expand_keeps_fixed_pixels():
    for seed in range(20):
        unaries, edges = random_problem(seed, (3, 4), labels=4)
        rng = np.random.default_rng(seed)
        free, start = rng.random((3, 4)) < 0.5, rng.integers(0, 4, (3, 4))
        found = expand(unaries, edges, free=free, start=start)
        assert (found == start)[~free].all()
        assert energy(unaries, edges, found) <= energy(unaries, edges, start)


def hard_problem(seed):
    """A grid of any shape with ties, pixels on their own, prices below zero or far apart, and edges of any length."""
    rng = np.random.default_rng(seed)
    labels, height, width = rng.integers(2, 5), *rng.integers(1, 15, 2)
    shape = (int(height), int(width))
    unaries = rng.normal(0, 2, (labels, *shape))
    weights = [(offset, rng.random(shape) * rng.integers(0, 2, shape)) for offset in OFFSETS if rng.random() < 0.5]
    if seed % 3 == 1:  # whole prices
        unaries, weights = np.rint(unaries), [(offset, np.rint(3 * weight)) for offset, weight in weights]
    if seed % 3 == 2:  # from a billionth to a billion
        unaries = unaries * 10.0 ** rng.integers(-9, 9, shape)
        weights = [(offset, weight * 10.0 ** rng.integers(-9, 9, shape)) for offset, weight in weights]
    return unaries, grid_edges(shape, [*weights, *weights[:1]])  # some pairs twice


def test_solvers_give_the_same_cut():
    pytest.importorskip("numba")
    assert fastest() is not MaximumFlow
    changed = 0
    for seed in range(90):
        unaries, edges = hard_problem(seed)
        rng = np.random.default_rng(1000 + seed)
        free, start = (rng.random(unaries.shape[1:]) < share for share in (0.7, 0.5))
        for options in ({}, {"free": free, "start": start.astype(int)}):
            found, same = (expand(unaries, edges, solver=solver, **options) for solver in (MaximumFlow, fastest()))
            assert (found == same).all(), seed
            changed += (found != unaries.argmin(axis=0)).any()
        held, same = (
            cut(unaries[0], unaries[1], edges, free=free, held=start, solver=solver)
            for solver in (MaximumFlow, fastest())
        )
        assert (held == same).all(), seed
    assert changed > 90  # not every pixel took its cheapest label


def test_solvers_give_a_move_the_same_costs():
    pytest.importorskip("numba")
    changed = 0
    for seed in range(30):
        unaries, edges = hard_problem(seed)
        rng = np.random.default_rng(seed)
        prices = rng.integers(0, 100, (len(unaries), unaries[0].size))
        half = np.rint(edges.weight.clip(0, 9)).astype(np.int32).reshape(len(edges.offsets), -1)
        labels = rng.integers(0, len(unaries), unaries[0].size)
        plain, fast = (
            solver(unaries[0].shape, edges.offsets).move(prices, half, labels, 1) for solver in (MaximumFlow, fastest())
        )
        assert (plain[0] == fast[0]).all()
        assert (plain[1] == fast[1]).all()
        changed += (plain[1] != 2 * half).any()
    assert changed > 5


def test_pairs_are_edges_with_a_cost():
    weight = np.array([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]])
    edges = grid_edges((2, 3), [((0, 1), weight), ((1, -1), weight)])
    pairs = list(zip(*(each.tolist() for each in edges.pairs()), strict=True))
    assert pairs == [(0, 1, 1.0), (3, 4, 3.0), (4, 5, 4.0), (2, 4, 2.0)]
    free = np.array([[True, False, False], [False, False, False]])
    only = grid_edges((2, 3), [((0, 1), weight), ((1, -1), weight)], free=free)
    assert [each.tolist() for each in only.pairs()] == [[0], [1], [1.0]]


def test_solvers_agree_on_large_flows_over_long_paths():
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    shape = (60, 60)
    edges = grid_edges(shape, [(offset, rng.gamma(0.5, size=shape)) for offset in OFFSETS[:4]])
    ends_apart = np.zeros(shape)
    ends_apart[:, 0], ends_apart[:, -1] = 50, -50
    found, same = (cut(-ends_apart, ends_apart, edges, solver=solver) for solver in (MaximumFlow, fastest()))
    assert found[:, 0].any()
    assert not found[:, -1].all()
    assert (found == same).all()


@pytest.mark.parametrize("missing", ["numba", "synthgen.maxflow"])
def test_without_numba_scipy_cuts(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "synthgen.maxflow", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr("synthgen.maxflow", raising=False)
    assert graphcut.fastest.__wrapped__() is MaximumFlow


def test_compiles_without_a_writable_cache(monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    from synthgen.maxflow import compiled

    def double(number):
        return 2 * number

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(double)(21) == 42


def test_expand_with_one_label():
    assert not expand(np.ones((1, 2, 3)), grid_edges((2, 3), [])).any()


def test_same_answer_again_and_after_pickling():
    unaries, edges = random_problem(3, (3, 4), labels=3)
    copy = pickle.loads(pickle.dumps(edges))
    assert isinstance(copy, Edges)
    assert (expand(unaries, edges) == expand(unaries, copy)).all()


@pytest.mark.parametrize("offset", [*OFFSETS, (5, 0), (0, -9), (-4, -4)])
def test_ends_are_an_offset_apart(offset):
    index = np.arange(12).reshape(3, 4)
    here, there = ends((3, 4), offset)
    assert index[here].shape == index[there].shape
    assert index[here].size == max(3 - abs(offset[0]), 0) * max(4 - abs(offset[1]), 0)
    assert ((index[there] - index[here]) == offset[0] * 4 + offset[1]).all()


@pytest.mark.parametrize("price", [-1.0, np.nan, np.inf])
def test_refuses_negative_and_infinite_edges(price):
    with pytest.raises(ValueError, match="price of an edge"):
        grid_edges((2, 2), [((0, 1), np.full((2, 2), price))])


@pytest.mark.parametrize("price", [np.nan, np.inf])
def test_refuses_non_finite_pixel_costs(price):
    with pytest.raises(ValueError, match="price of a pixel"):
        cut(np.full((2, 2), price), np.zeros((2, 2)), grid_edges((2, 2), []))


def test_a_numba_without_the_private_option_goes_without(monkeypatch):
    maxflow, numba = pytest.importorskip("synthgen.maxflow"), pytest.importorskip("numba")
    asked = maxflow._uncounted.__wrapped__
    assert asked() == {"_nrt": False}
    monkeypatch.setattr(maxflow, "njit", lambda _nrt, **_: numba.njit(_unheard_of=_nrt))
    assert asked() == {}


def test_more_offsets_than_a_byte_has_bits_make_the_same_cut():
    """Forty offsets, which are eighty arcs of a pixel."""
    rng = np.random.default_rng(0)
    offsets = [(dy, dx) for dy in range(5) for dx in range(-4, 5) if (dy, dx) > (0, 0)][:40]
    edges = grid_edges((12, 12), [(offset, rng.gamma(0.5, size=(12, 12)) / 20) for offset in offsets])
    unaries = rng.normal(size=(2, 12, 12))
    found, same = (expand(unaries, edges, solver=solver) for solver in (fastest(), MaximumFlow))
    assert 0 < found.sum() < found.size
    assert (found == same).all()
