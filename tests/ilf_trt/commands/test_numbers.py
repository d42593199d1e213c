"""Numbers on the command line: what a person would write is read to the bit, everything else is refused."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cyclopts import App, CycloptsError
from hypothesis import example, given
from hypothesis import strategies as st

from ilf_trt.commands.flags import MaxMemory, bytes_of
from ilf_trt.commands.numbers import OptionalReal, OptionalWhole, Real, Whole, real_number, whole_number
from ilf_trt.contract.target import GIB
from tests.conftest import Run

MESSAGE_CHARS = 100
MOST_DIGITS = 20
WHOLE_CHARACTERS = set("+-0123456789")
REAL_CHARACTERS = WHOLE_CHARACTERS | set(".eE")
LIKE_NUMBERS = st.text("0123456789+-._eExX, ٣५１²½∞nanif\n\x00\x1b", max_size=30)


def whole(text: str) -> int:
    return whole_number(int, [SimpleNamespace(value=text)])


def real(text: str) -> float:
    return real_number(float, [SimpleNamespace(value=text)])


READERS: tuple[tuple[Any, Any, set[str]], ...] = ((whole, int, WHOLE_CHARACTERS), (real, float, REAL_CHARACTERS))


def refusal(call: Any, text: str) -> str:
    with pytest.raises(ValueError, match="number; give one such as") as caught:
        call(text)
    return str(caught.value)


@pytest.mark.fuzz
@given(st.integers(-(10**MOST_DIGITS) + 1, 10**MOST_DIGITS - 1), st.sampled_from(["", "+", "0"]))
def test_a_whole_number_is_read_as_it_is_written(number: int, prefix: str) -> None:
    assert whole(str(number)) == number
    if 0 <= number < 10 ** (MOST_DIGITS - 1):
        assert whole(f"{prefix}{number}") == number


@pytest.mark.fuzz
@given(st.floats(allow_nan=False, allow_infinity=False))
@example(-0.0)
@example(5e-324)
@example(1.7976931348623157e308)
def test_a_finite_number_is_read_to_the_bit(number: float) -> None:
    assert math.copysign(1, real(repr(number))) == math.copysign(1, number)
    assert real(repr(number)) == number
    assert real(repr(number).upper()) == number


@pytest.mark.fuzz
@given(st.one_of(st.text(), LIKE_NUMBERS))
def test_any_text_is_a_number_of_plain_digits_or_refused_in_one_short_line(text: str) -> None:
    for read, python, characters in READERS:
        value, message = None, ""
        try:
            value = read(text)
        except ValueError as error:
            message = str(error)
        assert len(message) <= MESSAGE_CHARS
        assert message.isprintable()
        if value is not None:
            assert set(text) <= characters
            assert value == python(text)
            assert math.isfinite(value)


@pytest.mark.fuzz
@given(st.integers(0, 10**18), st.sampled_from([".0", ".5", "e3", "E0", "_000", ",000", " ", "\n", "L", "٣", "%"]))
def test_a_whole_number_has_nothing_after_it(number: int, ending: str) -> None:
    refusal(whole, f"{number}{ending}")


@pytest.mark.parametrize(
    "text", ["", "-", "+-1", "--1", "0x10", "1_000", "1e3", "10.5", "٣", "²", "½", "True", "9" * 21]
)
def test_what_is_no_whole_number_is_named(text: str) -> None:
    assert refusal(whole, text).startswith("'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "e3",
        "1e",
        "1.5.2",
        "1,5",
        "1_0",
        "0x1p3",
        "nan",
        "-inf",
        "Infinity",
        "1e309",
        "-1e999",
        "٣.٥",
        "9" * 400,
    ],
)
def test_what_is_no_finite_number_is_named(text: str) -> None:
    assert refusal(real, text).startswith("'")


@pytest.mark.fuzz
@given(st.sampled_from("123456789"), st.integers(310, 6000))
def test_a_number_of_thousands_of_digits_is_refused_and_shortened(digit: str, digits: int) -> None:
    assert len(refusal(whole, digit * digits)) <= MESSAGE_CHARS
    assert len(refusal(real, digit * digits)) <= MESSAGE_CHARS


@pytest.mark.parametrize("text", ["\x1b[31m1", "1\n2", "\x00", "\u202e1"])
def test_a_refusal_repeats_no_control_character(text: str) -> None:
    assert refusal(whole, text).isprintable()
    assert refusal(real, text).isprintable()


def command(
    *, whole: Whole = 1, wholes: OptionalWhole = None, real: Real = 1.0, reals: OptionalReal = None
) -> tuple[int, int | None, float, float | None]:
    return whole, wholes, real, reals


def limited(*, memory: MaxMemory = None) -> float | None:
    return memory


def call(run: Any, *tokens: str) -> Any:
    app = App()
    app.default(run)
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def test_flags_without_a_value_keep_their_defaults() -> None:
    assert call(command) == (1, None, 1.0, None)


def test_flags_read_every_kind_of_number() -> None:
    assert call(command, "--whole", "-7", "--wholes=+8", "--real", "-1.5", "--reals", "2e-3") == (-7, 8, -1.5, 2e-3)


@pytest.mark.parametrize("flag", ["--whole", "--wholes", "--real", "--reals"])
@pytest.mark.parametrize("text", ["nan", "1_0", "many", ""])
def test_a_flag_with_another_value_is_named(flag: str, text: str) -> None:
    with pytest.raises(CycloptsError, match=rf"{flag}.*number; give one such as"):
        call(command, f"{flag}={text}")


@pytest.mark.parametrize("text", ["0", "-1", "-0.0", "nan", "inf", "1e400", "much", "1e-400"])
def test_a_limit_of_memory_is_finite_and_above_zero(text: str) -> None:
    with pytest.raises(CycloptsError, match="--memory"):
        call(limited, f"--memory={text}")


@pytest.mark.fuzz
@given(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False))
@example(5e-324)
@example(1.7976931348623157e308)
def test_every_limit_of_memory_is_a_number_of_bytes(gib: float) -> None:
    size_bytes = bytes_of(call(limited, f"--memory={gib!r}"))
    assert 1 <= size_bytes < 1 << 63
    assert size_bytes == math.ceil(gib * GIB) if gib < 1e9 else size_bytes >= 10**9 * GIB


def test_generate_refuses_what_needs_more_than_its_limit_of_memory(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    begin = ("generate", dit_bundle, "--latents-out", tmp_path / "a.npy", "--labels")
    command = (*begin, 1, "--max-memory")
    run(*command, "1e-9").refused("more than the limit of 2;", "pass a larger max_memory")
    run(*command, "0").refused("--max-memory")
    run(*command, "nan").refused("--max-memory", "not a finite number")
    assert list(tmp_path.iterdir()) == []
    assert run(*command, "0.5").code == 0
    size_bytes = sum(path.stat().st_size for path in dit_bundle.rglob("*"))
    many = ",".join(["0-9"] * 5000)
    run(*begin, many, "--max-memory", 2 * size_bytes / GIB).refused("50000 pictures", "pass a larger max_memory")
