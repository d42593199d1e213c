"""`result.json`: what is written is read back, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.bench.result import RESULT_FILE, SCHEMA, Agreement, ColdStart, RowResult, read_result
from ilf_trt.bench.row import Side
from ilf_trt.bench.statistics import Interval, Spread
from ilf_trt.errors import InvalidRequest
from tests.ilf_trt.bench.synthetic import result, written

REAL = st.floats(allow_nan=False, allow_infinity=False, width=32)
COUNT = st.integers(0, 1 << 20)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
SPREAD = st.builds(Spread, REAL, REAL, REAL, REAL, REAL, COUNT)
ROW = st.builds(
    RowResult,
    slug=TEXT,
    title=TEXT,
    batch=COUNT,
    side=st.sampled_from(Side),
    library=TEXT,
    precision=TEXT,
    steps=COUNT,
    feedback_steps=COUNT,
    block_forwards=COUNT,
    warm_ups=COUNT,
    host=st.none() | SPREAD,
    device=st.none() | SPREAD,
    ratio=st.none() | st.builds(Interval, REAL, REAL, REAL),
    pictures_per_s=st.none() | REAL,
    peak_mib=st.none() | REAL,
    cold=st.none() | st.builds(ColdStart, REAL, REAL, REAL),
    agreement=st.none()
    | st.builds(Agreement, st.none() | REAL, st.none() | REAL, st.none() | REAL, st.none() | REAL, REAL),
    failed=TEXT,
)


def changed(folder: Path, **fields: Any) -> Path:
    """A result whose JSON has other fields."""
    place = written(result(), None, folder) / RESULT_FILE
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))
    return place


@given(st.lists(ROW, max_size=4))
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[RowResult]) -> None:
    whole = replace(result(), rows=tuple(rows))
    assert read_result(written(whole, None, tmp_path)) == whole


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA + 1, f"has schema {SCHEMA + 1}, this ilf-trt reads {SCHEMA}; update ilf-trt"),
        (0, "expected 1; measure again"),
        ("1", "expected 1; measure again"),
        (None, "expected 1; measure again"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, schema: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_result(changed(tmp_path, schema=schema))


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": "x"},
        {"rows": [{}]},
        {"boundary": "elsewhere"},
        {"size": [1, 2, 3]},
        {"device": 4},
        {"device\n\x1b[2J": 4},
        {"ilf_ms": {"pre": "long"}},
        {"noise": None},
    ],
)
def test_a_field_of_another_type_is_refused_in_one_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="is no result of ilf-trt bench") as caught:
        read_result(changed(tmp_path, **fields))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 10_000, '{"a": 1, "a": 2}', '{"schema": NaN}', '{"schema": 1e999}', "\ufeff{}", "\x00"],
)
def test_json_that_nobody_would_write_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_result(tmp_path)
    assert str(caught.value).isprintable()


def test_a_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"pass its result\.json"):
        read_result(tmp_path / "nothing")
