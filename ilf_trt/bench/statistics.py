"""What repeated measurements say: medians with an interval, ratios within a turn, and when enough is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
WIDER, FEW = 1.6, 4
"""The scatter of two medians' difference is 2 ** 0.5 of that of one; the rest was found on samples of 7 to 60."""
MOST_PICKS = 1 << 22
LEAST_TURNS = 7
"""Below it, resampling a handful of numbers says too little about their median."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and the bounds between which that of a repeated run lies in 19 of 20 cases."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Distance of the bounds as a share of the median; 0.04 means ±2 %."""
        return (self.high - self.low) / self.median if self.median else float("inf")

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside of the bounds."""
        return not self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of times in ms, of `n` measurements."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    least_ms: float
    most_ms: float
    n: int


def median_interval(values: Sequence[float]) -> Interval:
    """The median with its bootstrap interval: the bounds of the medians of resampled values, made wider.

    The values are positive: times, or their ratios. A repeated run has a scatter of its own, and a few values know
    little of theirs: `WIDER` and `FEW` make 19 of 20 repeated runs fit for lognormal, normal, exponential and two-
    peaked times. The generator starts anew each time, so that the same values give the same bounds. Raises ValueError
    without values and for a value that is not positive.
    """
    numbers = np.asarray(values, np.float64)
    if not (numbers > 0).all():
        raise ValueError(f"the least value is {numbers.min():g}, expected positive ones")
    medians = _resampled(numbers, np.median)
    tail = (1 - CONFIDENCE) / 2
    median = float(np.median(numbers))
    wider = WIDER * (1 + FEW / len(numbers))
    bounds = (float(bound) for bound in np.quantile(medians, (tail, 1 - tail)))
    low, high = (median * (bound / median) ** wider for bound in bounds)
    return Interval(median, low, high)


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean in the place of the median, with the bootstrap interval that holds the true one in 19 of 20 cases.

    The values are differences, of any sign. Raises ValueError without values.
    """
    numbers = np.asarray(values, np.float64)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_resampled(numbers, np.mean), (tail, 1 - tail))
    return Interval(float(numbers.mean()), float(low), float(high))


def ratio_interval(base_ms: Sequence[float], other_ms: Sequence[float]) -> Interval:
    """How many times faster `other` is than `base`, turn by turn: a drift of the machine leaves a ratio as it is.

    Both have one time for each turn. Raises ValueError for different lengths.
    """
    pairs = zip(base_ms, other_ms, strict=True)
    return median_interval([base / other for base, other in pairs])


def spread(times_ms: Sequence[float]) -> Spread:
    """The quantiles of times; raises ValueError without times."""
    numbers = np.asarray(times_ms, np.float64)
    if not len(numbers):
        raise ValueError("no times were measured")
    p50, p90, p99 = (float(value) for value in np.quantile(numbers, (0.5, 0.9, 0.99)))
    return Spread(p50, p90, p99, float(numbers.min()), float(numbers.max()), len(numbers))


def is_enough(ratios: Sequence[Interval], turns: int, within: float) -> bool:
    """Whether every interval is narrower than ±`within`, after at least `LEAST_TURNS` turns."""
    return turns >= LEAST_TURNS and all(interval.width <= 2 * within for interval in ratios)


def quartile_spread(times_ms: Sequence[float]) -> float:
    """Distance between the quartiles as a share of the median: what the machine's noise does to equal work."""
    low, median, high = np.quantile(np.asarray(times_ms, np.float64), (0.25, 0.5, 0.75))
    return float((high - low) / median)


def _resampled(numbers: Numbers, middle: Callable[..., Numbers]) -> Numbers:
    """The middles of `RESAMPLES` samples of the same size, drawn in pieces that fit into little memory."""
    size = len(numbers)
    if not size:
        raise ValueError("no values were measured")
    rng, at_once = np.random.default_rng(0), max(MOST_PICKS // size, 1)
    pieces = [min(at_once, RESAMPLES - begin) for begin in range(0, RESAMPLES, at_once)]
    return np.concatenate([middle(numbers[rng.integers(0, size, (piece, size))], axis=1) for piece in pieces])
