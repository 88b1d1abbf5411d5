"""Intervals, areas, rank correlation; and the journal that results are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lenslrp.analysis.common import statistics
from lenslrp.analysis.common.journal import resumed
from lenslrp.errors import InputError, StorageError


def test_bootstrap_is_paired_by_its_seed_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 400)
    mean, low, high = statistics.bootstrap(values, seed=1)
    assert mean == values.mean()
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert statistics.bootstrap(values, seed=1) == (mean, low, high)
    shifted = statistics.bootstrap(values + 2, seed=1)
    assert shifted == pytest.approx((mean + 2, low + 2, high + 2))  # the same resamples
    assert statistics.interval(np.ones(5), 0, "+") == "+1.00 (+1.00 to +1.00)"
    with pytest.raises(InputError, match="no values"):
        statistics.bootstrap(np.ones(0), 0)


def test_bootstrap_against_a_loop() -> None:
    values = np.random.default_rng(3).random(6)
    picks = np.random.default_rng(7).integers(0, 6, (statistics.RESAMPLES, 6))
    means = sorted(sum(values[i] for i in row) / 6 for row in picks)
    _, low, high = statistics.bootstrap(values, seed=7)
    for edge, share in ((low, 0.025), (high, 0.975)):
        place = share * (len(means) - 1)
        k = int(place)
        assert edge == pytest.approx(means[k] + (place - k) * (means[k + 1] - means[k]))


def test_area_is_a_sum_of_trapezoids() -> None:
    assert statistics.area(np.array([4.0, 2, 0])) == pytest.approx(2)
    assert statistics.area(np.array([4.0, 2, 0]), np.array([0, 0.2, 1])) == pytest.approx(1.4)


def test_rank_correlation_with_ties_against_a_loop() -> None:
    a = np.array([3.0, 1, 1, 2, 5, 5, 5])
    b = np.array([1.0, 2, 2, 0, 9, 4, 4])

    def ranks(x: np.ndarray) -> list[float]:
        return [sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x]

    expected = np.corrcoef(ranks(a), ranks(b))[0, 1]
    assert statistics.spearman(a, b) == pytest.approx(expected)
    assert statistics.spearman(a, np.exp(a)) == pytest.approx(1)
    assert statistics.spearman(a, -a) == pytest.approx(-1)
    assert np.isnan(statistics.spearman(a, np.ones(7)))


def test_results_are_resumed_and_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with resumed(path, {"seed": 0}) as (rows, append):
        assert rows == []
        append({"n": 1})
    path.write_text(path.read_text() + '{"n": 2')
    with resumed(path, {"seed": 0}) as (rows, append):
        assert rows == [{"n": 1}]
        append({"n": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [{"n": 1}, {"n": 2}]


def test_a_file_made_with_other_settings_is_refused_and_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with resumed(path, {"seed": 0, "k": (1, 2), "in": {"a": 1, "b": 2}}):
        pass
    with resumed(path, {"k": [1, 2], "seed": 0, "in": {"b": 2, "a": 1}}):  # the same, as JSON
        pass
    before = path.read_bytes()
    with (
        pytest.raises(
            InputError, match=r"results\.jsonl was made with .*\(seed 0, now 1; in\.a 1, now 3\)"
        ),
        resumed(path, {"seed": 1, "k": (1, 2), "in": {"a": 3, "b": 2}}),
    ):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"{nonsense\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"seed": 0}\n' + line + b'{"n": 2}\n')
    with (
        pytest.raises(StorageError, match=r"results\.jsonl line 2 is damaged"),
        resumed(path, {"seed": 0}),
    ):
        pass
