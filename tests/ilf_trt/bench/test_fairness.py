"""A speed-up of ILF is never shown without its row of equal cost."""

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from ilf_trt.bench.fairness import base_of, equal_cost_of, fair_ratio, is_withheld
from ilf_trt.bench.report_html import report_html
from ilf_trt.bench.report_md import report_md
from ilf_trt.bench.result import Result
from ilf_trt.bench.sentences import headline, times
from ilf_trt.bench.terminal_view import outcome_view, rows_view
from tests.ilf_trt.bench.synthetic import failed, result, row


def printed(view: RenderableType) -> str:
    console = Console(width=100, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def without(whole: Result, slug: str) -> Result:
    return replace(whole, rows=tuple(each for each in whole.rows if each.slug != slug))


def ratio_of(whole: Result, slug: str) -> str:
    known = whole.row(slug, 1)
    assert known is not None
    assert known.ratio is not None
    return times(known.ratio)


def views(whole: Result) -> dict[str, str]:
    terminal = printed(rows_view(whole.rows)) + printed(outcome_view(whole))
    return {"terminal": terminal, "md": report_md(whole, {}), "html": report_html(whole)}


def test_an_ilf_row_is_matched_with_the_row_of_its_own_library() -> None:
    rows = result().rows
    matches = {row.slug: equal_cost_of(row, rows) for row in rows if row.feedback_steps}
    assert {slug: match and match.slug for slug, match in matches.items()} == {
        "eager-ilf": "eager-equal",
        "ilf": "equal",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 4},
        {"feedback_steps": 1},
        {"block_forwards": 160, "steps": 13},
        {"steps": 0},
    ],
)
def test_a_row_of_another_batch_or_cost_is_no_row_of_equal_cost(changes: dict[str, int]) -> None:
    assert equal_cost_of(row("ilf"), [row("equal")]) is not None
    assert equal_cost_of(row("ilf"), [replace(row("equal"), **changes)]) is None


def test_every_view_shows_both_ratios() -> None:
    whole = result()
    for view, text in views(whole).items():
        for slug in ("ilf", "equal", "eager-ilf", "eager-equal"):
            assert ratio_of(whole, slug) in text, (view, slug)


@pytest.mark.parametrize(
    "whole", [without(result(), "equal"), failed(result(), "equal", "no memory")], ids=["gone", "failed"]
)
def test_without_its_row_of_equal_cost_ilf_has_no_ratio_in_any_view(whole: Result) -> None:
    ilf = whole.row("ilf", 1)
    assert ilf is not None
    assert ilf.ratio is not None
    assert fair_ratio(ilf, whole.rows) is None
    assert is_withheld(ilf, whole.rows)
    for view, text in views(whole).items():
        assert ratio_of(whole, "ilf") not in text, view
        assert f"{ilf.ratio.median:.2f}x" not in text, view
        assert "no speed-up shown: its row of equal cost was not measured" in text.replace("\n", " "), view
        assert ratio_of(whole, "plain") in text, view


def test_the_base_line_is_the_first_row_of_the_batch_that_works() -> None:
    whole = failed(result(1, 4), "eager", "no memory")
    found = [base_of(batch, whole.rows) for batch in (1, 4, 2)]
    assert [each and (each.slug, each.batch) for each in found] == [("eager-equal", 1), ("eager-equal", 4), None]


def test_ilf_may_be_compared_with_a_base_line_that_is_its_row_of_equal_cost() -> None:
    equal, ilf = replace(row("equal"), ratio=None), row("ilf")
    whole = replace(result(), rows=(equal, ilf), base_line="equal")
    assert fair_ratio(ilf, whole.rows) == ilf.ratio
    assert headline(whole, 1) == f"{ilf.title}: {times(ilf.ratio)} against {equal.title}"
