"""Strict documents: whatever bytes come in, plain and bounded data comes out, or one error."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.document import (
    DEEPEST,
    DocumentError,
    Size,
    as_type,
    canonical,
    parse_json,
    parse_toml,
    read_json,
    read_toml,
)
from ilf_trt.errors import MESSAGE_CHARS

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@dataclass(frozen=True, slots=True)
class Inner:
    sides: tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    share: float
    inners: tuple[Inner, ...]
    free: dict[str, Any]


GOOD = {"name": "x", "share": 1, "inners": [{"sides": [1, 2]}], "free": {"any": [None]}}


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), PLAIN))
def test_plain_data_comes_back(data: dict[str, Any]) -> None:
    assert parse_json(canonical(data)) == data


@pytest.mark.fuzz
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_an_object_or_one_error(content: bytes) -> None:
    for parse in (parse_json, lambda text: parse_toml(text.decode("latin-1"))):
        message = ""
        try:
            assert isinstance(parse(content), dict)
        except DocumentError as error:
            message = str(error)
        assert len(message) <= MESSAGE_CHARS
        assert message.isprintable()


def test_what_diffusers_and_transformers_write_is_taken_where_it_is_asked_for() -> None:
    text = '{"lambda_min_clipped": -Infinity, "model_max_length": 1000000000000000019884624838656}'
    assert parse_json(text, foreign=True) == {"lambda_min_clipped": -math.inf, "model_max_length": int(1e30)}
    with pytest.raises(DocumentError, match="holds -Infinity"):
        parse_json(text)
    for refused in ('{"a": NaN}', '{"a": 1, "a": 2}', f'{{"a": 1{"0" * 50}}}'):
        with pytest.raises(DocumentError):
            parse_json(refused, foreign=True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"b": {"a": 1, "a": 1}}', "twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": %s}' % ("9" * 5000), "5000 digits"),
        ('{"a": 99999999999999999999}', "64 bits"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('{"a": %s}' % ("[" * DEEPEST + "]" * DEEPEST), "nested"),
        ("[1]", "expected an object"),
        ('{"a": 1', "not readable JSON"),
        ("", "not readable JSON"),
    ],
)
def test_json_that_is_refused(text: str, word: str) -> None:
    with pytest.raises(DocumentError, match=word):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a = nan", "not finite"),
        ("a = inf", "not finite"),
        ("a = 1\na = 2", "not readable TOML"),
        (f"a = 0x{'f' * 400}", "64 bits"),
        (f"a = {'[' * 100_000}", "nested"),
        (f"a = {'9' * 5000}", "not readable TOML|64 bits"),
    ],
)
def test_toml_that_is_refused(text: str, word: str) -> None:
    with pytest.raises(DocumentError, match=word):
        parse_toml(text)


def test_a_document_becomes_a_type() -> None:
    assert as_type(GOOD, Outer) == Outer("x", 1.0, (Inner((1, 2)),), {"any": [None]})


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"inners": [{"sides": [1, 2], "extra": 1}]},
        {"inners": [{"sides": [1, 2, 3]}]},
        {"inners": [{"sides": [0, 2]}]},
        {"inners": [{"sides": [1.5, 2]}]},
        {"inners": [{"sides": [True, 2]}]},
        {"inners": [{"sides": [1 << 40, 2]}]},
        {"share": "1"},
        {"share": True},
        {"name": None},
    ],
)
def test_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match="field"):
        as_type({**GOOD, **change}, Outer)


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_only_regular_files_of_bounded_size(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 101)
    (tmp_path / "latin").write_bytes(b"\xff")
    for name in ("pipe", "large", "latin", "absent", ".", "nul\0"):
        with pytest.raises(DocumentError):
            read(tmp_path / name, most=100)


def test_a_number_is_written_one_way() -> None:
    assert canonical({"b": 0.1, "a": [1, True, None]}) == b'{"a":[1,true,null],"b":0.1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": math.nan})
    assert json.loads(canonical({"ü": "\x1b"})) == {"ü": "\x1b"}
