"""When a speed-up may be shown: that of ILF never without the row of equal cost."""

from collections.abc import Sequence

from .result import RowResult
from .statistics import Interval

ILF, EQUAL = "ilf", "equal"
"""A word in the slug of an ILF row, and the word in its place in the slug of its row of equal cost."""


def is_ilf(row: RowResult) -> bool:
    """Whether the row ran feedback."""
    return row.feedback_steps > 0


def equal_cost_of(row: RowResult, rows: Sequence[RowResult]) -> RowResult | None:
    """The row of equal cost of an ILF row, at the same batch: `eager-equal` for `eager-ilf`; None without one.

    It ran without feedback, and its block forwards differ by less than those of one plain step.
    """
    slug = "-".join(EQUAL if word == ILF else word for word in row.slug.split("-"))
    for other in rows:
        if (other.slug, other.batch) == (slug, row.batch) and not is_ilf(other) and _costs_the_same(row, other):
            return other
    return None


def base_of(batch: int, rows: Sequence[RowResult]) -> RowResult | None:
    """The base line of a batch: its first row that measured something."""
    return next((row for row in rows if row.batch == batch and row.host is not None and not row.failed), None)


def fair_ratio(row: RowResult, rows: Sequence[RowResult]) -> Interval | None:
    """The ratio of a row, if it may be shown: that of ILF needs a row of equal cost that measured something."""
    if row.failed or not is_ilf(row):
        return None if row.failed else row.ratio
    equal = equal_cost_of(row, rows)
    return row.ratio if equal is not None and equal.host is not None and not equal.failed else None


def is_withheld(row: RowResult, rows: Sequence[RowResult]) -> bool:
    """Whether a row has a ratio that may not be shown."""
    return not row.failed and row.ratio is not None and fair_ratio(row, rows) is None


def by_batch(rows: Sequence[RowResult]) -> dict[int, tuple[RowResult, ...]]:
    """The rows of every batch, in their order."""
    return {
        batch: tuple(row for row in rows if row.batch == batch) for batch in dict.fromkeys(row.batch for row in rows)
    }


def _costs_the_same(row: RowResult, other: RowResult) -> bool:
    return other.steps > 0 and abs(row.block_forwards - other.block_forwards) < other.block_forwards / other.steps
