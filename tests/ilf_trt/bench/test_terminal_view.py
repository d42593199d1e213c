"""The tables of a benchmark on a terminal."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from ilf_trt.bench.comparison import Measured, compare
from ilf_trt.bench.comparison_view import comparison_view
from ilf_trt.bench.result import Noise, Result, Verdict
from ilf_trt.bench.sentences import figure, share, whole
from ilf_trt.bench.terminal_view import COLUMNS, MOST_LAYERS, head_lines, live_table, outcome_view, rows_view
from tests.ilf_trt.bench.synthetic import failed, result, row, with_row
from tests.ilf_trt.bench.test_fairness import printed

HOSTILE = "\x1b]0;title\x07\x1b[2J[bold red]x[/][link=http://a]\u202e\n[/nothing]"


def named(whole: Result, name: str) -> Result:
    """The result with one text in every place that others fill."""
    rows = tuple(replace(each, title=name, library=name, precision=name) for each in whole.rows)
    subject = replace(whole.subject, bundle=name, model=name, precision=name, sha256=name)
    noise, verdict = replace(whole.noise, reasons=(name, name)), Verdict(comparable=False, differs=(name,))
    parts = {f"{name}{index}": ms for index, ms in enumerate(whole.ilf_ms.values())}
    changed = replace(whole, rows=rows, subject=subject, noise=noise, verdict=verdict, ilf_ms=parts)
    return replace(changed, device=name, command=name, started=name, fell_out=(name, name))


def everything(whole: Result) -> str:
    comparison = compare(Measured(whole.device, whole), Measured(whole.device, replace(whole, device="other")))
    views = (rows_view(whole.rows), outcome_view(whole), comparison_view(comparison))
    return "\n".join([*head_lines(whole), *map(printed, views)])


def test_a_table_fits_100_columns_and_gives_every_row_one_line() -> None:
    text = printed(rows_view(result(1, 4).rows))
    assert max(map(len, text.splitlines())) <= COLUMNS
    for each in result().rows:
        assert sum(line.startswith(f"{each.title} ") for line in text.splitlines()) == 2, each.title


@given(st.one_of(st.text(max_size=300), st.just("x" * 5000), st.just("漢" * 400), st.just(HOSTILE)))
def test_nothing_is_wider_than_100_columns_or_moves_the_cursor(name: str) -> None:
    text = everything(failed(named(result(1), name), "plain", name))
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= COLUMNS
    assert text.replace("\n", "").isprintable()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_of_any_size_is_short(value: float) -> None:
    assert len(figure(value)) <= 10
    assert len(whole(value)) <= 9
    assert len(share(value / 100)) <= 11


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.500"),
        (12.345, "12.35"),
        (123.44, "123.4"),
        (1234.5, "1,234"),
        (2e7, "2.00e+07"),
        (None, "–"),
    ],
)
def test_a_figure_has_the_digits_that_count(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_a_failed_row_shows_its_reason_and_no_number() -> None:
    whole = failed(result(), "compile", "g++ was not found")
    lines = printed(rows_view(whole.rows)).splitlines()
    (line,) = (line for line in lines if line.startswith("torch.compile, 20 steps "))
    assert line.split()[-6:] == ["–", "–", "–", "240", "–", "failed"]
    assert "torch.compile, 20 steps, batch 1: failed: g++ was not found" in lines


def test_the_gpus_times_stand_in_the_table_if_there_are_any() -> None:
    known = row("ilf")
    assert known.host is not None
    on_gpu = replace(known, device=replace(known.host, p50_ms=77.7))
    assert "77.70" in printed(rows_view([on_gpu]))
    assert head_lines(replace(result(), rows=(on_gpu,)))[-1].endswith("of the GPU by CUDA events")


def test_the_outcome_names_what_is_not_as_asked() -> None:
    layers = tuple(f"layer {index}" for index in range(MOST_LAYERS + 3))
    whole = replace(
        result(),
        fell_out=layers,
        finished=False,
        noise=Noise(0.2, 0.9, 0.8, ("the base line scatters by 20 %",)),
        verdict=Verdict(comparable=False, differs=("precision: fp16 and fp32", "boundary")),
    )
    known = whole.row("ilf", 1)
    assert known is not None
    assert known.agreement is not None
    text = printed(outcome_view(with_row(whole, "ilf", agreement=replace(known.agreement, nonfinite_share=0.125))))
    for line in (
        "not as asked: 13 layers",
        "- layer 9",
        "- and 3 more",
        "not finite: engines, ILF 10 steps, batch 1: 12.5 %",
        "verdict: not comparable: precision: fp16 and fp32; boundary",
        "interrupted: the numbers are those until then; go on with --resume",
    ):
        assert line in text.splitlines()
    assert "machine: noisy: the base line scatters by 20 %" in text
    assert "- layer 10" not in text


def test_the_parts_of_the_time_add_up_to_all_of_it() -> None:
    lines = printed(outcome_view(result())).splitlines()
    names = list(result().ilf_ms)
    shares = [float(line.split()[-2]) for line in lines if line.split()[:1] and line.split()[0] in names]
    assert len(shares) == len(names)
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(names))


def test_a_growing_table_draws_only_when_it_is_told() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=40, color_system=None)
    with live_table(console) as table:
        before = len(file.getvalue())
        table.tell("turns", 1, 10, "±3 % of ±2 %")
        table.update([row("eager")])
        table.update([row("eager"), row("plain")])
        drawn = file.getvalue()[before:]
    assert drawn.count("eager PyTorch, 20 steps") == 2
    assert drawn.count("engines, 20 steps") == 1
    assert "1/10" in drawn


def test_a_pipe_gets_no_growing_table() -> None:
    file = io.StringIO()
    with live_table(Console(file=file, width=100)) as table:
        table.tell("turns", 1, 10)
        table.update([row("eager")])
    assert file.getvalue() == ""
