"""Two results of the same model: which rows became faster or slower, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ilf_trt.errors import InvalidRequest, told

from .observation import Observation
from .observation_log import OBSERVATIONS_FILE, read_observations
from .result import Result, RowResult, read_result
from .sentences import HASH_CHARS
from .statistics import CONFIDENCE, Interval, Numbers, Spread

RESAMPLES = 4000
"""More than a single interval needs: many rows together ask for the outer quantiles."""
MOST_PICKS = 1 << 22
"""Numbers that one resampling holds at a time, 32 MiB."""
NORMAL_90 = 1.2816
"""How many standard deviations the 90th percentile of a normal distribution lies above its median."""
LARGEST_POWER = 700.0  # of e, that a float64 can hold
MEDIAN_ERROR = 1.2533
"""The standard error of a median over that of a mean, for a normal distribution: the square root of pi / 2."""
NAME_CHARS = 60
MOST_ROWS = 1024
"""Of one result; each is resampled."""

Key = tuple[str, int]
"""Slug and batch of a row."""


class Change(StrEnum):
    """What became of a row, in words."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference seen"
    UNKNOWN = "not measured in both"


class Source(StrEnum):
    """What an interval comes from."""

    RUNS = "runs"
    """The bootstrap over the raw samples of both."""
    SPREAD = "spread"
    """The quantiles in both results, as if times were normal."""
    NOTHING = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A result with its raw samples, none if they do not lie beside it."""

    name: str
    result: Result
    observations: tuple[Observation, ...] = ()


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A row that both results have. `ratio` is the time of the second over that of the first: below 1 is faster."""

    slug: str
    title: str
    batch: int
    before_ms: float | None
    after_ms: float | None
    ratio: Interval | None
    source: Source
    change: Change


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows that both results have, and what else is not the same in them."""

    before: Measured
    after: Measured
    rows: tuple[ComparedRow, ...]
    warnings: tuple[str, ...]


def read_measured(path: Path) -> Measured:
    """A result by its file or folder, with the `observations.jsonl` beside it if there is one.

    Raises InvalidRequest for what is no result, and for samples that cannot be read.
    """
    result = read_result(path)
    place = (path if path.is_dir() else path.parent) / OBSERVATIONS_FILE
    return Measured(str(path), result, read_observations(place) if place.exists() else ())


def compare(before: Measured, after: Measured) -> Comparison:
    """Row by row, second against first.

    The interval is the bootstrap over the runs of both, if both have them, else it is taken from their spreads. Raises
    InvalidRequest for results of different models or boundaries, for results without a row in common, and for one of
    more than `MOST_ROWS` rows.
    """
    _check_alike(before, after)
    others = {_key(row): row for row in reversed(after.result.rows)}
    pairs = [(row, others[_key(row)]) for row in before.result.rows if _key(row) in others]
    if not pairs:
        raise InvalidRequest(
            f"no row is in both results: {_rows_of(before)}, and {_rows_of(after)}; measure the same rows and batches"
        )
    samples = _by_row(before.observations), _by_row(after.observations)
    rows = tuple(
        _compared(row, other, *(each.get(_key(row), []) for each in samples), rows=len(pairs)) for row, other in pairs
    )
    warnings = [*_warnings(before.result, after.result, pairs), *_shared_changes(rows, before.result.base_line)]
    return Comparison(before, after, rows, tuple(warnings))


def medians_ratio(before_ms: Sequence[float] | Numbers, after_ms: Sequence[float] | Numbers, rows: int = 1) -> Interval:
    """The median of `after` over that of `before`, with its bootstrap interval; each is resampled for itself.

    `rows` ratios of one comparison lie within their bounds together with 95 % confidence (Bonferroni). The generator
    starts anew each time. Raises ValueError without values and for a median that is not positive.
    """
    rng = np.random.default_rng(0)
    first, second = np.asarray(before_ms, np.float64), np.asarray(after_ms, np.float64)
    if not (len(first) and len(second)):
        raise ValueError("no values were measured")
    middle = float(np.median(first))
    if not middle > 0:
        raise ValueError(f"the median is {middle:g}, expected a positive time")
    ratios = _medians(second, rng) / _medians(first, rng)
    tail = _tail(rows)
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(float(np.median(second)) / middle, float(low), float(high))


def spreads_ratio(before: Spread, after: Spread, rows: int = 1) -> Interval:
    """The ratio of two medians with bounds from quantiles alone, as if times were normal; `rows` as above.

    Times are skewed to the right, so the true bounds are closer. Raises ValueError for a median that is not positive.
    """
    if not (before.p50_ms > 0 and after.p50_ms > 0):
        raise ValueError(f"the medians are {before.p50_ms:g} and {after.p50_ms:g} ms, expected positive times")
    ratio = after.p50_ms / before.p50_ms
    deviation = math.hypot(_relative_error(before), _relative_error(after))
    error = math.exp(min(NormalDist().inv_cdf(1 - _tail(rows)) * deviation, LARGEST_POWER))
    return Interval(ratio, ratio / error, ratio * error)


def change_of(ratio: Interval) -> Change:
    """In words; no difference is seen while the bounds hold 1."""
    if not ratio.excludes(1.0):
        return Change.SAME
    return Change.FASTER if ratio.median < 1 else Change.SLOWER


def _check_alike(before: Measured, after: Measured) -> None:
    first, second = before.result, after.result
    for each in (before, after):
        if len(each.result.rows) > MOST_ROWS:
            raise InvalidRequest(
                f"{told(each.name, NAME_CHARS)} has {len(each.result.rows)} rows, at most {MOST_ROWS} are compared; "
                "pass the result of one benchmark"
            )
    models = [(each.subject.model, each.subject.base_sha256) for each in (first, second)]
    if models[0] != models[1]:
        words = [f"{told(model)} on base {told(sha256[:HASH_CHARS])}" for model, sha256 in models]
        raise InvalidRequest(f"the results are of different models: {words[0]}, and {words[1]}; compare one model")
    if first.boundary is not second.boundary:
        raise InvalidRequest(
            f"the results have different boundaries: {first.boundary.value}, and {second.boundary.value}; "
            f"measure one of them again with --boundary {first.boundary.value}"
        )


def _key(row: RowResult) -> Key:
    return row.slug, row.batch


def _by_row(observations: Sequence[Observation]) -> dict[Key, list[Observation]]:
    """The samples of each row that belong to a result."""
    found: dict[Key, list[Observation]] = {}
    for one in observations:
        if one.counts:
            found.setdefault((one.row, one.batch), []).append(one)
    return found


def _compared(
    row: RowResult, other: RowResult, before: Sequence[Observation], after: Sequence[Observation], *, rows: int
) -> ComparedRow:
    """`before` and `after` are the samples of this row; `rows` are compared in all."""
    first, second = _spreads(row, other)
    ratio, source = None, Source.NOTHING
    if first is not None and second is not None and first.p50_ms > 0 and second.p50_ms > 0:
        on_gpu = row.device is not None and other.device is not None
        before_ms, after_ms = (_runs(each, on_gpu=on_gpu) for each in (before, after))
        if all(len(times_ms) and times_ms.min() > 0 for times_ms in (before_ms, after_ms)):
            ratio, source = medians_ratio(before_ms, after_ms, rows), Source.RUNS
        else:
            ratio, source = spreads_ratio(first, second, rows), Source.SPREAD
    return ComparedRow(
        slug=row.slug,
        title=row.title,
        batch=row.batch,
        before_ms=None if first is None else first.p50_ms,
        after_ms=None if second is None else second.p50_ms,
        ratio=ratio,
        source=source,
        change=Change.UNKNOWN if ratio is None else change_of(ratio),
    )


def _spreads(row: RowResult, other: RowResult) -> tuple[Spread | None, Spread | None]:
    """The GPU's times if both have them, else the host's."""
    first, second = (row.device, other.device) if row.device and other.device else (row.host, other.host)
    return None if row.failed else first, None if other.failed else second


def _runs(samples: Sequence[Observation], *, on_gpu: bool) -> Numbers:
    """The times of a row; empty if one of them is not of the asked kind."""
    times_ms = [one.device_ms if on_gpu else one.host_ms for one in samples]
    return np.asarray([] if None in times_ms else times_ms, np.float64)


def _medians(numbers: Numbers, rng: np.random.Generator) -> Numbers:
    """Medians of resampled numbers."""
    at_once = max(min(MOST_PICKS // len(numbers), RESAMPLES), 1)
    medians: list[Numbers] = []
    for begin in range(0, RESAMPLES, at_once):
        picks = rng.integers(0, len(numbers), (min(at_once, RESAMPLES - begin), len(numbers)))
        medians.append(np.median(numbers[picks], axis=1))
    return np.concatenate(medians)


def _tail(rows: int) -> float:
    return (1 - CONFIDENCE) / 2 / rows


def _relative_error(spread: Spread) -> float:
    deviation_ms = max(spread.p90_ms - spread.p50_ms, 0.0) / NORMAL_90
    return MEDIAN_ERROR * deviation_ms / math.sqrt(max(spread.n, 1)) / spread.p50_ms


def _warnings(before: Result, after: Result, pairs: Sequence[tuple[RowResult, RowResult]]) -> list[str]:
    """What is not the same on both sides, and what disturbed one of them."""
    lines = []
    for name, first, second in (
        ("device", before.device, after.device),
        ("guidance", before.guidance_scale, after.guidance_scale),
        ("size", before.size, after.size),
        ("precision", before.subject.precision, after.subject.precision),
        ("base line", before.base_line, after.base_line),
    ):
        if first != second:
            lines.append(f"{name}: {told(first, NAME_CHARS)}, then {told(second, NAME_CHARS)}")
    for row, other in pairs:
        work, then = ((each.steps, each.feedback_steps, each.block_forwards) for each in (row, other))
        if work != then:
            lines.append(f"{row.title}, batch {row.batch}: {_work(row)}, then {_work(other)}")
    for which, result in (("first", before), ("second", after)):
        lines += [f"the {which} result is noisy: {reason}" for reason in result.noise.reasons]
        if not result.finished:
            lines.append(f"the {which} result was interrupted")
    return lines


def _shared_changes(rows: Sequence[ComparedRow], base_line: str) -> list[str]:
    """A base line that changed says that the machine did, or a library that all rows share."""
    return [
        f"the base line itself is {row.change.value} at batch {row.batch}, so the machine may have changed; "
        "compare ratios to the base line within each result"
        for row in rows
        if row.slug == base_line and row.change in (Change.FASTER, Change.SLOWER)
    ]


def _work(row: RowResult) -> str:
    return f"{row.steps} steps, {row.feedback_steps} with feedback, {row.block_forwards} block forwards"


def _rows_of(measured: Measured) -> str:
    names = [f"{row.slug} at batch {row.batch}" for row in measured.result.rows]
    return told(", ".join(names), 2 * NAME_CHARS) if names else "none"
