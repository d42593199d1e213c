"""The result of a load is the sum of its parts, is read back strictly, and fits a terminal."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ilf_trt.bench.load import Load, LoadRun, Sample, Served
from ilf_trt.bench.load_result import LOAD_FILE, SCHEMA, LoadResult, read_load
from ilf_trt.bench.load_view import COLUMNS, print_load
from ilf_trt.errors import InvalidRequest

STREAM = Load.of(4, 2.0, max_seconds=10.0, seed=9)
ANSWERS = tuple(Sample(n, n * 1.0, n * 1.0 + 0.25, n * 1.0 + 2.0, Served(1500.0, 3)) for n in range(5))
FAILED = (Sample(5, 5.0, 5.0, 5.1, failure="TimedOut"), Sample(6, 6.0, 6.0, 6.1, failure="NonFinite"))
RUN = LoadRun((*ANSWERS, *FAILED, Sample(7, 7.0, 7.0, 8.0, failure="TimedOut")), 12, 8, 10.0, 12.5, finished=True)


def test_every_request_is_answered_failed_or_unanswered() -> None:
    result = LoadResult.of(STREAM, RUN)
    assert result.failures == {"NonFinite": 1, "TimedOut": 2}
    assert (result.answered, result.failed, result.unanswered) == (5, 3, 12)
    assert result.requests == result.answered + result.failed + result.unanswered
    assert result.offered_per_s == result.requests / 10.0
    assert result.answered_per_s == 5 / 12.5
    assert (result.pictures, result.pictures_per_s) == (15, 15 / 12.5)
    assert result.warm_ups == 8


def test_the_parts_of_equal_answers_add_up_to_their_latency() -> None:
    result = LoadResult.of(STREAM, RUN)
    parts = (result.client_queue, result.target_queue, result.service)
    assert all(part is not None and part.n == 5 for part in parts)
    assert [part.p99_ms for part in parts if part] == pytest.approx([250.0, 250.0, 1500.0])
    assert result.latency is not None
    assert result.latency.p50_ms == pytest.approx(2000.0)


def test_a_target_that_does_not_tell_its_work_has_neither_work_nor_queue() -> None:
    result = LoadResult.of(Load.of(1, requests=1), LoadRun((Sample(0, 0.0, 0.0, 1.0),), 0, 0, 1.0, 1.0, finished=True))
    assert (result.service, result.target_queue, result.offered_per_s) == (None, None, None)
    assert result.latency is not None
    assert result.pictures == 1


def test_without_answers_there_is_no_latency() -> None:
    result = LoadResult.of(STREAM, LoadRun(FAILED, 0, 0, 10.0, 6.1, finished=False))
    assert (result.latency, result.answered_per_s, result.failed) == (None, 0.0, 2)
    assert LoadResult.of(STREAM, LoadRun((), 0, 0, 0.0, 0.0, finished=False)).offered_per_s == 0.0


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = LoadResult.of(STREAM, RUN)
    (tmp_path / LOAD_FILE).write_text(json.dumps(result.as_json(), allow_nan=False))
    assert read_load(tmp_path) == read_load(tmp_path / LOAD_FILE) == result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": SCHEMA + 1}, "update ilf-trt"),
        ({"schema": 0}, "measure again"),
        ({"schema": None}, "measure again"),
        ({"answered": "5"}, "is no load"),
        ({"unknown": 1}, "is no load"),
        ({"answered": 6}, "add up"),
    ],
)
def test_another_document_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    place = tmp_path / LOAD_FILE
    place.write_text(json.dumps({**LoadResult.of(STREAM, RUN).as_json(), **change}))
    with pytest.raises(InvalidRequest, match=words) as refused:
        read_load(tmp_path)
    assert "\n" not in str(refused.value)


def shown(result: LoadResult) -> str:
    console = Console(width=COLUMNS, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_load(result, console)
    return console.export_text()


def test_a_stream_fits_a_terminal_with_all_it_has_to_say() -> None:
    text = shown(LoadResult.of(STREAM, RUN))
    assert max(map(len, text.splitlines())) <= COLUMNS
    for words in ("2/s intended", "5 of 20 requests answered", "NonFinite 1, TimedOut 2", "12 still waited"):
        assert words in text
    (latency,) = (line for line in text.splitlines() if "intended start" in line)
    assert latency.count("2000.0") == 5


def test_a_closed_loop_that_was_stopped_says_so() -> None:
    text = shown(LoadResult.of(Load.of(1, requests=9), LoadRun((), 0, 1, 0.0, 0.0, finished=False)))
    assert "closed loop, 1 client\n" in text
    assert "1 warm-up before" in text
    assert "stopped before its end" in text
    assert "latency" not in text
