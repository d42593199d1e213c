"""Intervals that hold what they promise, on samples whose distribution is known."""

import numpy as np
import pytest

from ilf_trt.bench.statistics import (
    LEAST_TURNS,
    Interval,
    is_enough,
    median_interval,
    quartile_spread,
    ratio_interval,
    spread,
)

RUNS, TURNS = 400, 30


def times_ms(rng: np.random.Generator, factor: float = 1.0, turns: int = TURNS) -> list[float]:
    """Times as a busy machine gives them: lognormal, every tenth far too long."""
    late = np.where(rng.random(turns) < 0.1, rng.uniform(1.2, 3, turns), 1.0)
    return list(100 * factor * rng.lognormal(0.0, 0.03, turns) * late)


@pytest.mark.parametrize("turns", [LEAST_TURNS, TURNS])
def test_the_interval_of_a_run_holds_the_median_of_another_in_nineteen_of_twenty(turns: int) -> None:
    rng = np.random.default_rng(1)
    holds = 0
    for _ in range(RUNS):
        first, second = (ratio_interval(times_ms(rng, 1.0, turns), times_ms(rng, 0.5, turns)) for _ in range(2))
        holds += (first.low <= second.median <= first.high) + (second.low <= first.median <= second.high)
    assert holds / (2 * RUNS) >= 0.94  # 19 of 20, less what 800 cases scatter


def test_the_interval_holds_the_true_ratio_nearly_always() -> None:
    rng = np.random.default_rng(2)
    intervals = [ratio_interval(times_ms(rng), times_ms(rng, 0.5)) for _ in range(RUNS)]
    assert sum(not interval.excludes(2.0) for interval in intervals) / RUNS >= 0.97


def test_a_ratio_within_turns_does_not_see_a_machine_that_slows_down() -> None:
    drift = np.linspace(1, 3, TURNS)
    interval = ratio_interval(list(100 * drift), list(50 * drift))
    assert (interval.low, interval.median, interval.high) == pytest.approx((2, 2, 2))


def test_bounds_of_few_values_stay_positive() -> None:
    interval = median_interval([10.0, 11.0, 6.0])
    assert 0 < interval.low < 10 < interval.high
    with pytest.raises(ValueError, match="the least value is 0, expected positive ones"):
        median_interval([1.0, 0.0])


def test_the_same_values_give_the_same_bounds() -> None:
    values = times_ms(np.random.default_rng(3))
    assert median_interval(values) == median_interval(list(values))


def test_quantiles_and_the_spread_of_equal_work() -> None:
    got = spread([float(value) for value in range(1, 101)])
    assert (got.p50_ms, got.least_ms, got.most_ms, got.n) == (50.5, 1, 100, 100)
    assert (got.p90_ms, got.p99_ms) == pytest.approx((90.1, 99.01))
    assert quartile_spread([1.0, 1.0, 1.0]) == 0
    assert quartile_spread([float(value) for value in range(1, 101)]) == pytest.approx(49.5 / 50.5)


def test_without_values_there_is_nothing_to_say() -> None:
    for call in (lambda: spread([]), lambda: median_interval([])):
        with pytest.raises(ValueError, match="measured"):
            call()
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratio_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("half_width", "turns", "enough"),
    [(0.019, LEAST_TURNS, True), (0.021, LEAST_TURNS, False), (0.0, LEAST_TURNS - 1, False)],
)
def test_enough_is_measured_when_the_widest_interval_is_narrow(half_width: float, turns: int, enough: bool) -> None:
    narrow, other = Interval(2, 2, 2), Interval(2, 2 * (1 - half_width), 2 * (1 + half_width))
    assert is_enough([narrow, other], turns, within=0.02) is enough
