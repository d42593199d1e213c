"""Two results against one another."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilf_trt.bench.comparison import (
    Change,
    ComparedRow,
    Comparison,
    Measured,
    Source,
    change_of,
    compare,
    medians_ratio,
    read_measured,
    spreads_ratio,
)
from ilf_trt.bench.comparison_view import comparison_view
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.observation_log import OBSERVATIONS_FILE, read_observations
from ilf_trt.bench.result import Noise, Result
from ilf_trt.bench.row import Boundary
from ilf_trt.bench.statistics import Interval, spread
from ilf_trt.errors import InvalidRequest
from tests.ilf_trt.bench.synthetic import WORK, failed, observations, result, times_ms, with_row, written
from tests.ilf_trt.bench.test_fairness import printed

LEAST_COVERAGE = 0.9  # of 95 %: a bootstrap of few medians is a little too narrow


def changed(whole: Result, samples: list[Observation], slug: str, factor: float) -> Measured:
    """A result in which one row takes `factor` times as long."""
    runs = [replace(one, host_ms=one.host_ms * factor) if one.row == slug else one for one in samples]
    known = whole.row(slug, 1)
    assert known is not None
    own = [one.host_ms for one in runs if one.counts and one.row == slug]
    return Measured("b", with_row(whole, slug, host=spread(own)), tuple(runs))


def found(comparison: Comparison, slug: str) -> ComparedRow:
    (row,) = (row for row in comparison.rows if row.slug == slug)
    return row


@pytest.mark.parametrize(
    ("factor", "change"), [(0.9, Change.FASTER), (1.1, Change.SLOWER), (1.0, Change.SAME), (1.0005, Change.SAME)]
)
@pytest.mark.parametrize("with_runs", [True, False])
def test_a_row_is_faster_slower_or_shows_no_difference(factor: float, change: Change, *, with_runs: bool) -> None:
    samples = observations()
    before, after = Measured("a", result(), tuple(samples)), changed(result(), samples, "ilf", factor)
    if not with_runs:
        before, after = replace(before, observations=()), replace(after, observations=())
    comparison = compare(before, after)
    row = found(comparison, "ilf")
    assert row.change is change
    assert row.source is (Source.RUNS if with_runs else Source.SPREAD)
    assert row.ratio is not None
    assert row.ratio.median == pytest.approx(factor)
    assert row.ratio.low < factor < row.ratio.high
    assert found(comparison, "plain").change is Change.SAME
    lines = printed(comparison_view(comparison)).splitlines()
    (line,) = (line for line in lines if line.startswith("engines, ILF 10 steps "))
    assert line.rstrip().endswith(f" {change.value}")


def test_runs_of_one_side_alone_are_not_enough() -> None:
    comparison = compare(Measured("a", result(), tuple(observations())), Measured("b", result()))
    assert {row.source for row in comparison.rows} == {Source.SPREAD}
    text = printed(comparison_view(comparison)).replace("\n", " ")
    assert "bounds: p50 and p90 alone, since runs are missing, as if times were normal" in text


def test_warm_ups_and_other_batches_do_not_count() -> None:
    samples = tuple(observations(slugs=("ilf",)))
    others = tuple(replace(one, batch=8, host_ms=1.0) for one in samples)
    cold = tuple(replace(one, turn=-1, host_ms=1.0) for one in samples)
    one, other = (
        compare(Measured("a", result(), runs), Measured("b", result(), runs))
        for runs in (samples, samples + others + cold)
    )
    assert found(one, "ilf").ratio == found(other, "ilf").ratio


def test_the_times_of_the_gpu_are_compared_if_both_have_them() -> None:
    whole, samples = result(), observations()
    device = spread([3.0, 3.1, 3.2])
    runs = tuple(replace(one, device_ms=3.0 + 0.01 * (one.turn % 5)) for one in samples)
    on_gpu = Measured("a", with_row(whole, "ilf", device=device), runs)
    slow = replace(on_gpu, observations=tuple(replace(one, device_ms=2 * (one.device_ms or 0)) for one in runs))
    both = found(compare(on_gpu, slow), "ilf")
    assert both.before_ms == 3.1
    assert both.ratio is not None
    assert both.ratio.median == pytest.approx(2.0)
    row = found(compare(on_gpu, Measured("b", whole, tuple(samples))), "ilf")
    known = whole.row("ilf", 1)
    assert known is not None
    assert known.host is not None
    assert row.before_ms == row.after_ms == known.host.p50_ms


def test_bounds_hold_the_true_ratio_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        before, after = (rng.gamma(8.0, 1.0, 15) for _ in range(2))
        held += not medians_ratio(before, 2 * after).excludes(2.0)
    assert held / 200 >= LEAST_COVERAGE


def test_bounds_for_many_rows_are_wider() -> None:
    before, after = times_ms("ilf"), times_ms("ilf", seed=1)
    one, many = (medians_ratio(before, after, rows) for rows in (1, 20))
    assert many.low < one.low < one.high < many.high
    one, many = (spreads_ratio(spread(before), spread(after), rows) for rows in (1, 20))
    assert many.low < one.low < one.high < many.high


def test_bounds_from_quantiles_are_wider_than_those_of_skewed_runs() -> None:
    before, after = times_ms("ilf"), times_ms("ilf", seed=1)
    assert spreads_ratio(spread(before), spread(after)).width > medians_ratio(before, after).width


def test_many_runs_are_resampled_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = medians_ratio([1.0, 2.0, 4.0], [2.0, 3.0])
    monkeypatch.setattr("ilf_trt.bench.comparison.MOST_PICKS", 7)
    assert medians_ratio([1.0, 2.0, 4.0], [2.0, 3.0]).median == whole.median
    assert medians_ratio([5.0] * 9, [5.0] * 9) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("bounds", "change"),
    [((0.9, 1.0), Change.SAME), ((0.8, 0.99), Change.FASTER), ((1.01, 1.2), Change.SLOWER), ((1.0, 1.2), Change.SAME)],
)
def test_the_words_follow_the_bounds(bounds: tuple[float, float], change: Change) -> None:
    low, high = bounds
    assert change_of(Interval((low + high) / 2, low, high)) is change


def test_a_failed_row_is_not_compared() -> None:
    row = found(compare(Measured("a", result()), Measured("b", failed(result(), "ilf", "no memory"))), "ilf")
    assert (row.ratio, row.after_ms, row.change) == (None, None, Change.UNKNOWN)
    assert row.before_ms is not None


def test_only_rows_of_both_are_compared() -> None:
    comparison = compare(Measured("a", result(1, 4)), Measured("b", result(4, 8)))
    assert {row.batch for row in comparison.rows} == {4}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(result(), subject=replace(result().subject, model="DiT")), "are of different models: 'PixArt"),
        (replace(result(), subject=replace(result().subject, base_sha256="00")), "are of different models"),
        (replace(result(), boundary=Boundary.END_TO_END), "have different boundaries: denoise, and end-to-end"),
        (result(2), "no row is in both results"),
        (replace(result(), rows=()), "no row is in both results"),
        (replace(result(), rows=result().rows[:1] * 1025), "'b' has 1025 rows, at most 1024 are compared"),
    ],
)
def test_results_that_are_not_alike_are_refused_in_one_line(other: Result, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        compare(Measured("a", result()), Measured("b", other))
    assert "\n" not in str(caught.value)


class Counted(tuple[Observation, ...]):
    """Samples that count how often somebody goes through them."""

    passes = 0

    def __iter__(self) -> Iterator[Observation]:
        self.passes += 1
        return super().__iter__()


def test_each_row_is_compared_by_the_samples_of_its_batch_which_are_read_once() -> None:
    samples = Counted([*observations(1), *observations(4)])
    slower = [replace(one, host_ms=one.host_ms * (2 if one.batch == 4 else 1)) for one in samples]
    samples.passes = 0
    comparison = compare(Measured("a", result(1, 4), samples), Measured("b", result(1, 4), tuple(slower)))
    ratios = {(row.slug, row.batch): row.ratio.median for row in comparison.rows if row.ratio is not None}
    assert ratios == {(slug, batch): pytest.approx({1: 1, 4: 2}[batch]) for slug in WORK for batch in (1, 4)}
    assert {row.source for row in comparison.rows} == {Source.RUNS}
    assert samples.passes == 1


def test_what_differs_is_said() -> None:
    other = replace(
        with_row(result(), "ilf", steps=7, block_forwards=100),
        device="Intel",
        guidance_scale=1.0,
        size=(256, 128),
        noise=Noise(0.2, 0.9, 0.9, ("load",)),
        finished=False,
    )
    warnings = compare(Measured("a", result()), Measured("b", other)).warnings
    for words in ("device: 'AMD EPYC", "guidance: 4.5, then 1.0", "size: (128, 128), then (256, 128)"):
        assert any(words in line for line in warnings), words
    assert "engines, ILF 10 steps, batch 1: 10 steps, 2 with feedback, 128 block forwards, then 7 steps" in "\n".join(
        warnings
    )
    assert "the second result is noisy: load" in warnings
    assert "the second result was interrupted" in warnings
    assert compare(Measured("a", result()), Measured("b", result())).warnings == ()


def test_a_base_line_that_changed_is_a_warning() -> None:
    samples = observations()
    comparison = compare(Measured("a", result(), tuple(samples)), changed(result(), samples, "eager", 1.2))
    (line,) = comparison.warnings
    assert line.startswith("the base line itself is slower at batch 1")


def test_a_folder_and_a_file_are_read_with_the_runs_beside_them(tmp_path: Path) -> None:
    samples = observations()
    folder = written(result(), samples, tmp_path / "with")
    for path in (folder, folder / "result.json"):
        measured = read_measured(path)
        assert measured.result == result()
        assert measured.observations == tuple(samples)
    assert read_measured(written(result(), None, tmp_path / "without")).observations == ()


def test_a_last_line_without_its_end_is_left_out(tmp_path: Path) -> None:
    samples = observations(slugs=("ilf",))
    place = written(result(), samples, tmp_path) / OBSERVATIONS_FILE
    place.write_bytes(place.read_bytes()[:-9])
    assert read_observations(place) == tuple(samples[:-1])


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", '{"row": 1}', "\x00", '{"row": "a", "batch": 1, "turn": 0, "at_s": 0, "host_ms": NaN}']
)
def test_a_line_that_is_no_sample_is_refused_in_one_line(tmp_path: Path, line: str) -> None:
    place = written(result(), observations(slugs=("ilf",)), tmp_path) / OBSERVATIONS_FILE
    place.write_text(f"{place.read_text()}{line}\n")
    with pytest.raises(InvalidRequest, match="line 43 is no observation") as caught:
        read_measured(tmp_path)
    assert "\n" not in str(caught.value)


def test_observations_that_are_no_file_are_refused(tmp_path: Path) -> None:
    (written(result(), None, tmp_path) / OBSERVATIONS_FILE).mkdir()
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_measured(tmp_path)
