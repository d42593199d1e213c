"""The CPU benchmark makes its rows of a result of `ilf-trt bench`; nothing is measured here."""

from dataclasses import replace

import pytest

from benchmarks import tables
from benchmarks.speed.cpu import NAMES, ONE_GRAPH, latency_rows
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.result import Agreement, Noise, Result
from ilf_trt.bench.row import Rival, Side, rows_of
from ilf_trt.bench.statistics import ratio_interval, spread
from ilf_trt.contract.plan import SCHEDULERS, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import BenchmarkFailed
from tests.ilf_trt.bench import synthetic

TIMES_MS = {
    "eager": [100.0, 110.0, 90.0],
    "eager-equal": [60.0, 66.0, 54.0],
    "eager-ilf": [50.0, 55.0, 45.0],
    "onnx": [40.0, 44.0, 36.0],
    "one-graph": [20.0, 20.0, 20.0],
    "plain": [22.0, 20.0, 24.0],
    "equal": [12.0, 12.0, 12.0],
    "ilf": [10.0, 10.0, 15.0],
}
QUALITY = {(20, 240): {"frechet": 0.124, "accuracy": 0.9955}, (10, 144): {"frechet": 0.1, "accuracy": 0.995}}
TWENTY, TEN = ("eager", "onnx", "one-graph", "plain"), ("ilf", "eager-ilf")
COSTS = dict.fromkeys(TWENTY, (20, 0)) | dict.fromkeys(TEN, (10, 2))
"""Steps, and steps with feedback; all other rows have 12 plain ones."""


def measured(**changes: object) -> tuple[Result, list[Observation]]:
    """A result with the rows and times above, and its samples with a slow warm-up each."""
    rows = []
    for slug, times in TIMES_MS.items():
        steps, feedback = COSTS.get(slug, (12, 0))
        rows.append(
            replace(
                synthetic.row("ilf" if feedback else "plain"),
                slug=slug,
                title=f"title of {slug}",
                side=Side.RUNTIME if slug in ("plain", "equal", "ilf") else Side.TORCH,
                steps=steps,
                feedback_steps=feedback,
                block_forwards=steps * 12 + feedback * 12,
                warm_ups=3,
                host=spread(times),
                agreement=Agreement(own_plan_relative=1.21e-6),
            )
        )
    samples = [
        Observation(slug, 1, turn, 0.0, ms)
        for slug, times in TIMES_MS.items()
        for turn, ms in enumerate([9999.0, *times], -1)
    ]
    return synthetic.result(rows=tuple(rows), base_line="eager", **changes), samples


def test_rows_have_the_names_and_the_numbers_of_the_result() -> None:
    rows = {row["row"]: row for row in latency_rows("demo", *measured(), QUALITY)}
    assert list(rows) == list(NAMES.values())
    ilf = rows["ilf-trt ILF"]
    assert (ilf["model"], ilf["steps"], ilf["block_forwards"]) == ("demo", 10, 144)
    assert (ilf["batch"], ilf["warm_ups"], ilf["n"]) == (1, 3, 3)
    assert (ilf["median_ms"], ilf["min_ms"], ilf["max_ms"]) == (10.0, 10.0, 15.0)
    assert ilf["relative_difference"] == "1.2e-06"
    assert (ilf["frechet"], rows["ilf-trt plain"]["accuracy"], rows["ilf-trt plain at equal cost"]["frechet"]) == (
        0.1,
        0.9955,
        "",
    )


def test_ratios_are_taken_within_a_turn() -> None:
    rows = {row["row"]: row for row in latency_rows("demo", *measured(), {})}
    ilf, base = rows["ilf-trt ILF"], rows["eager diffusers"]
    assert [ilf[name] for name in ("faster_min", "faster_than_eager_20", "faster_max")] == [6.0, 10.0, 11.0]
    interval = ratio_interval(TIMES_MS["eager"], TIMES_MS["ilf"])
    assert (ilf["faster_low"], ilf["faster_high"]) == (round(interval.low, 3), round(interval.high, 3))
    assert [base[name] for name in ("faster_min", "faster_than_eager_20", "faster_max")] == [1.0, 1.0, 1.0]
    assert rows["ONNX Runtime, one graph"]["cost_against_one_graph"] == 1.0
    assert rows["ilf-trt plain"]["cost_against_one_graph"] == 1.1
    assert ilf["cost_against_one_graph"] == 0.5


def test_the_order_of_the_samples_does_not_matter() -> None:
    result, samples = measured()
    assert latency_rows("demo", result, samples[::-1], {}) == latency_rows("demo", result, samples, {})


def test_a_noisy_machine_stands_in_every_row() -> None:
    result, samples = measured(noise=Noise(0.2, 0.9, 0.9, ("it was hot", "other programs ran")))
    assert {row["noise"] for row in latency_rows("demo", result, samples, {})} == {"it was hot; other programs ran"}


def test_a_row_without_times_ends_the_benchmark_with_its_reason() -> None:
    result, samples = measured()
    with pytest.raises(BenchmarkFailed, match=r"demo: title of one-graph gave no times: no kernel"):
        latency_rows("demo", synthetic.failed(result, ONE_GRAPH, "no kernel"), samples, {})


def test_every_row_of_the_benchmark_has_a_name_and_the_tables_know_it() -> None:
    plain, equal, ilf = (
        make_plan(SCHEDULERS["dpmsolver++"], steps, blocks=12, loop=Loop(3, 7), feedback=feedback)
        for steps, feedback in ((20, "none"), (12, "none"), (10, "outer:2"))
    )
    slugs = [row.slug for row in rows_of(plain, equal, ilf, (Rival.EAGER, Rival.ONNX, Rival.ONE_GRAPH))]
    assert slugs == list(NAMES)
    assert set(tables.SUMMARY) <= set(NAMES.values())
