"""The comparison of two results on a terminal of 100 columns."""

from rich.console import Group, RenderableType
from rich.table import Column

from ilf_trt.commands.terminal import cell

from .comparison import Change, Comparison, Source
from .sentences import NOTHING, figure, times
from .terminal_view import RATIO, TITLE, number_column, plain_table

STYLES = {Change.FASTER: "green", Change.SLOWER: "red", Change.SAME: "", Change.UNKNOWN: "dim"}


def comparison_view(comparison: Comparison) -> RenderableType:
    """A table of at most 100 columns, what the intervals come from, and what is not the same in both results."""
    table = plain_table(
        Column("row", width=TITLE, overflow="fold", vertical="bottom"),
        number_column("batch", 5),
        number_column("first\nms"),
        number_column("second\nms"),
        number_column("second / first\n(95 %, all rows)", RATIO - 1),
        Column("", width=18, vertical="bottom"),
    )
    for row in comparison.rows:
        table.add_row(
            cell(row.title),
            f"{row.batch}",
            figure(row.before_ms),
            figure(row.after_ms),
            times(row.ratio),
            row.change.value,
            style=STYLES[row.change],
        )
    names = [
        cell(f"{which} {each.name}") for which, each in (("first ", comparison.before), ("second", comparison.after))
    ]
    return Group(*names, table, *map(cell, _remarks(comparison)))


def _remarks(comparison: Comparison) -> list[str]:
    sources = {row.source for row in comparison.rows}
    lines = [
        "below 1x the second is faster; no difference is seen while the 95 % bounds hold 1x",
        "the bounds know how runs scatter, not how one start differs from the next: measure again to be sure",
    ]
    if Source.RUNS in sources:
        lines.append("bounds: bootstrap over the runs in both observations.jsonl; they hold for all rows together")
    if Source.SPREAD in sources:
        spread = [f"{row.title}, batch {row.batch}" for row in comparison.rows if row.source is Source.SPREAD]
        which = f" of {'; '.join(spread)}" if Source.RUNS in sources else ""
        lines.append(f"bounds{which}: p50 and p90 alone, since runs are missing, as if times were normal")
    if not sources - {Source.NOTHING}:
        lines.append(f"{NOTHING}: no row was measured in both")
    return lines + [f"warning: {warning}" for warning in comparison.warnings]
