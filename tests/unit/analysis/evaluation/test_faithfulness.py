"""Metrics of faithfulness against closed forms of a linear toy, and against slow loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from lenslrp.analysis.evaluation import faithfulness as faith
from lenslrp.analysis.evaluation.features import Features, Masks
from lenslrp.analysis.passes.prompts import Values
from lenslrp.errors import InputError

WEIGHTS = np.array([1.0, 4.0, -2.0, 3.0])
Numbers = NDArray[np.float64]


def game(value: Callable[[NDArray[np.bool_]], float], size: int) -> Features:
    """Features whose target is a function of what is still there; its probability is a tenth."""

    def without(removed: Masks) -> Values:
        values = np.array([value(~mask) for mask in removed], dtype=np.float64)
        return Values(values, values / 10)

    return Features(np.arange(size), without)


def linear(weights: Numbers = WEIGHTS) -> Features:
    return game(lambda there: float(weights[there].sum()), len(weights))


def tangled(size: int, seed: int) -> Features:
    """A random function of sets, nothing additive about it."""
    table = np.random.default_rng(seed).random(2**size)
    powers = 2 ** np.arange(size)
    return game(lambda there: float(table[int(powers[there].sum())]), size)


def test_curves_of_a_linear_toy_are_partial_sums() -> None:
    found = faith.curves(linear(), {"right": WEIGHTS, "wrong": -WEIGHTS}, steps=4)
    curve = found["right"]
    assert curve.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.morf.tolist() == [6, 2, -1, -2, 0]
    assert curve.lerf.tolist() == [6, 8, 7, 4, 0]
    # trapezoids of LeRF - MoRF = 0, 6, 8, 6, 0
    assert curve.area == pytest.approx(5.0)
    assert found["wrong"].area == pytest.approx(-5.0)
    assert curve.deletion == pytest.approx((3 + 2 - 1 - 2) / 4 / 10)
    assert curve.insertion == pytest.approx((3 + 8 + 7 + 4) / 4 / 10)
    assert curve.comprehensiveness == pytest.approx(np.mean([4, 7]) / 10)
    assert curve.sufficiency == pytest.approx(np.mean([-1, 2]) / 10)
    assert curve.scores()["area"] == curve.area
    assert set(curve.scores()) == {
        "area", "deletion", "insertion", "comprehensiveness", "sufficiency",
    }  # fmt: skip


def test_steps_are_rounded_to_whole_features_and_never_repeated() -> None:
    weights = np.array([5.0, 4, 3, 2, 1])
    curve = faith.curves(linear(weights), {"a": weights}, steps=2)["a"]
    assert curve.shares.tolist() == [0, 0.4, 1]
    assert curve.morf.tolist() == [15, 6, 0]
    many = faith.curves(linear(weights), {"a": weights}, steps=50)["a"]
    assert many.shares.tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_a_curve_without_a_step_in_one_half_has_no_mean_there() -> None:
    weights = np.array([3.0, 2, 1])
    curve = faith.curves(linear(weights), {"a": weights}, steps=2)["a"]
    assert curve.shares.tolist() == [0, 2 / 3, 1]
    assert np.isnan(curve.comprehensiveness)
    assert curve.sufficiency == pytest.approx((6 - 3) / 10)
    one = faith.curves(linear(weights), {"a": weights}, steps=1)["a"]
    assert np.isnan(one.sufficiency)


def test_equal_relevance_keeps_its_order_and_lerf_is_the_reverse() -> None:
    curve = faith.curves(linear(), {"flat": np.zeros(4)}, steps=4)["flat"]
    assert curve.morf.tolist() == [6, 5, 1, 3, 0]
    assert curve.lerf.tolist() == [6, 3, 5, 1, 0]


def test_curves_against_a_loop_on_a_tangled_game() -> None:
    features = tangled(7, seed=1)
    relevance = np.random.default_rng(2).normal(size=7)
    curve = faith.curves(features, {"a": relevance}, steps=7)["a"]
    for name, order in (("morf", np.argsort(-relevance)), ("lerf", np.argsort(relevance))):
        gone = np.zeros(7, dtype=bool)
        expected = [features.without(gone[None]).value[0]]
        for feature in order:
            gone[feature] = True
            expected.append(features.without(gone[None]).value[0])
        np.testing.assert_array_equal(getattr(curve, name), expected)
    total = 0.0
    for k in range(7):
        total += (curve.lerf[k] - curve.morf[k] + curve.lerf[k + 1] - curve.morf[k + 1]) / 2 / 7
    assert curve.area == pytest.approx(total, rel=1e-12)


def test_every_set_is_asked_for_once() -> None:
    asked: list[bytes] = []
    inner = linear()

    def without(removed: Masks) -> Values:
        asked.extend(mask.tobytes() for mask in removed)
        return inner.without(removed)

    faith.curves(Features(inner.index, without), {"a": WEIGHTS, "b": -WEIGHTS, "c": WEIGHTS})
    assert len(asked) == len(set(asked)) == 8  # none, all, and three on the way from each end


def test_comprehensiveness_and_sufficiency_against_loops() -> None:
    features, relevance = tangled(9, seed=3), np.random.default_rng(4).normal(size=9)
    order = np.argsort(-relevance)
    nothing = features.without(np.zeros((1, 9), bool)).probability[0]
    lost, missing = [], []
    for share in (0.01, 0.05, 0.1, 0.2, 0.5):
        k = next(k for k in range(10) if k >= share * 9)
        top = np.zeros(9, dtype=bool)
        top[order[:k]] = True
        lost.append(nothing - features.without(top[None]).probability[0])
        missing.append(nothing - features.without(~top[None]).probability[0])
    assert faith.comprehensiveness(features, relevance) == pytest.approx(np.mean(lost))
    assert faith.sufficiency(features, relevance) == pytest.approx(np.mean(missing))
    one = faith.comprehensiveness(linear(), WEIGHTS, bins=(0.25,))
    assert one == pytest.approx(0.4)
    assert faith.sufficiency(linear(), WEIGHTS, bins=(0.5,)) == pytest.approx((6 - 7) / 10)


def test_aopc_is_the_mean_loss_over_single_steps() -> None:
    assert faith.aopc(linear(), WEIGHTS, of="value") == pytest.approx(np.mean([4, 7, 8, 6]))
    assert faith.aopc(linear(), WEIGHTS) == pytest.approx(np.mean([4, 7, 8, 6]) / 10)


@pytest.mark.parametrize("seed", range(4))
def test_exact_bounds_are_those_of_all_orders(seed: int) -> None:
    features = tangled(5, seed)
    every = [
        faith.aopc(features, -np.argsort(order).astype(float))
        for order in itertools.permutations(range(5))
    ]
    low, high = faith.aopc_bounds(features)
    assert (low, high) == (pytest.approx(min(every)), pytest.approx(max(every)))
    assert faith.normalised_aopc(max(every), (low, high)) == pytest.approx(1)
    assert faith.normalised_aopc(min(every), (low, high)) == pytest.approx(0)
    for beam in (1, 2, 4):
        inner_low, inner_high = faith.aopc_bounds(features, beam=beam)
        assert low - 1e-12 <= inner_low <= inner_high <= high + 1e-12
    assert faith.aopc_bounds(features, beam=10) == pytest.approx((low, high))  # C(5, 2) sets


def test_a_wider_beam_finds_what_a_greedy_one_misses() -> None:
    # alone, feature 0 takes 2 and the others 1 at most; 1 and 2 together take everything
    losses = {(0,): 2.0, (1,): 1.0, (2,): 1.0, (0, 1): 2.0, (0, 2): 2.0, (1, 2): 9.0}
    features = game(lambda there: 9 - losses.get(tuple(np.flatnonzero(~there)), 0.0), 3)
    assert faith.aopc_bounds(features, beam=1, of="value")[1] == pytest.approx(4 / 3)
    assert faith.aopc_bounds(features, beam=2, of="value")[1] == pytest.approx(10 / 3)


def test_bounds_of_a_linear_toy_are_its_sorted_orders_and_long_inputs_use_a_beam() -> None:
    weights = np.linspace(1, 2, 20)
    features = linear(weights)
    low, high = faith.aopc_bounds(features, of="value")
    assert high == pytest.approx(faith.aopc(features, weights, of="value"))
    assert low == pytest.approx(faith.aopc(features, -weights, of="value"))


def test_without_a_difference_between_orders_there_is_no_normalised_score() -> None:
    features = game(lambda there: 1.0, 3)
    bounds = faith.aopc_bounds(features)
    assert bounds == (0, 0)
    assert np.isnan(faith.normalised_aopc(0.0, bounds))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: faith.curves(f, {"a": np.zeros(3)}), r"relevance is \[3\], but there are 4"),
        (lambda f: faith.curves(f, {"a": np.array([0, np.nan, 0, 0])}), "feature 1 is not finite"),
        (lambda f: faith.curves(f, {"a": WEIGHTS}, steps=0), "at least one step, not 0"),
        (lambda f: faith.comprehensiveness(f, WEIGHTS, (0.0,)), r"in \(0, 1\], not 0.0"),
        (lambda f: faith.aopc_bounds(f, beam=0), "at least one set, not 0"),
        (lambda f: faith.curves(linear(np.ones(0)), {"a": np.zeros(0)}), "no features"),
    ],
)
def test_bad_input_is_named(call: Callable[[Features], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(linear())
