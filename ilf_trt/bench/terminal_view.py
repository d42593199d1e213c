"""A benchmark on a terminal of 100 columns: the table while it grows, and what there is to say when it is done."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ilf_trt.commands.terminal import cell
from ilf_trt.errors import shown
from ilf_trt.interrupts import check_interrupted

from .fairness import by_batch, is_ilf
from .result import Result, RowResult
from .sentences import (
    AGREEMENT_COLUMNS,
    NOTHING,
    agreement_cells,
    facts,
    fell_out_words,
    figure,
    headline,
    latency,
    noise_words,
    nonfinite_words,
    parts_of,
    ratio_words,
    row_notes,
    score_lines,
    share,
    verdict_words,
    whole,
)

COLUMNS = 100
LABEL = 10
TITLE = 36
NUMBER = 7
RATIO = 20
BAR = 44
MOST_LAYERS = 10
"""Layers outside of the asked precision that are named; the report has them all."""


def head_lines(result: Result) -> list[str]:
    """What is measured, where, and what is inside of a measured time, a line each."""
    lines = [Text(f"{name:<{LABEL}} {shown(text, COLUMNS - LABEL - 1)}") for name, text in facts(result)]
    for line in lines:
        line.truncate(COLUMNS, overflow="ellipsis")  # some characters are two columns wide
    return [line.plain for line in lines]


def rows_view(rows: Sequence[RowResult]) -> RenderableType:
    """A table for every batch, of at most 100 columns, and below it the rows that failed and why."""
    every = tuple(rows)
    views: list[RenderableType] = []
    for batch, of_batch in by_batch(every).items():
        views += [_batch_table(batch, of_batch), *(_line(title, words) for title, words in row_notes(of_batch)), ""]
    return Group(*views)


def outcome_view(result: Result) -> RenderableType:
    """What stands below the tables: where the time went, what is not as asked, agreement, noise, and the verdict."""
    views: list[RenderableType] = [_time_view(result), ""] if result.ilf_ms else []
    if any(row.agreement is not None for row in result.rows):
        views += [_agreement_table(result), ""]
    if any(row.scores for row in result.rows):
        views += [_score_table(result), ""]
    views.append(_line("not as asked", fell_out_words(result)))
    views += [cell(f"- {layer}") for layer in result.fell_out[:MOST_LAYERS]]
    if len(result.fell_out) > MOST_LAYERS:
        views.append(cell(f"- and {len(result.fell_out) - MOST_LAYERS} more"))
    views.append(_line("not finite", nonfinite_words(result)))
    views.append(_line("machine", noise_words(result.noise)))
    for batch in dict.fromkeys(row.batch for row in result.rows):
        if sentence := headline(result, batch):
            views.append(_line(f"batch {batch}", sentence))
    if not result.finished:
        views.append(_line("interrupted", "the numbers are those until then; go on with --resume"))
    views.append(_line("verdict", verdict_words(result.verdict), style="bold"))
    return Group(*views)


class LiveTable:
    """A table that grows on a terminal, with a bar below it; made by `live_table`."""

    def __init__(self, live: Live, console: Console) -> None:
        self._live = live
        self._rows: RenderableType = Group()
        self._bar = Progress(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=1, visible=False, detail="")
        self._what = ""

    def update(self, rows: Sequence[RowResult]) -> None:
        """Show these rows from now on."""
        self._rows = rows_view(rows)
        self._refresh()

    def tell(self, what: str, done: int, total: int, detail: str = "", /) -> None:
        """Move the bar, as `ilf_trt.contract.progress.Progress` does; raises an interrupt that was lost."""
        check_interrupted()
        if what != self._what:
            self._what = what
            self._bar.reset(self._task)
        self._bar.update(
            self._task, description=shown(what, TITLE), completed=done, total=total, detail=shown(detail), visible=True
        )
        self._refresh()

    def _refresh(self) -> None:
        self._live.update(Group(self._rows, self._bar), refresh=True)


@contextmanager
def live_table(console: Console) -> Iterator[LiveTable]:
    """A table on a terminal while a benchmark runs, gone when the block ends; nothing elsewhere.

    Only `update` and `tell` draw: a thread that draws between them would disturb what is measured.
    """
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveTable(live, console)


def plain_table(*columns: Column, title: str = "") -> Table:
    """A table without lines, a space between its columns."""
    return Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="dim",
    )


def number_column(header: str, width: int = NUMBER) -> Column:
    """A column of figures, at the right."""
    return Column(header, justify="right", width=width, vertical="bottom")


def _batch_table(batch: int, rows: tuple[RowResult, ...]) -> Table:
    table = plain_table(
        Column("row", width=TITLE, overflow="fold", vertical="bottom"),
        number_column("p50 ms"),
        number_column("p90 ms"),
        number_column("pictures\na second", 8),
        number_column("block\nforwards", 8),
        number_column("peak\nMiB", 7),
        number_column("times faster\n(95 %)", RATIO),
        title=f"batch {batch}",
    )
    for row in rows:
        table.add_row(
            cell(row.title),
            *latency(row),
            figure(None if row.failed else row.pictures_per_s),
            whole(row.block_forwards),
            whole(None if row.failed else row.peak_mib),
            ratio_words(row, rows),
            style="red" if row.failed else "bold" if is_ilf(row) else "",
        )
    return table


def _time_view(result: Result) -> Table:
    table = plain_table(
        Column("", width=TITLE, overflow="fold"),
        Column("", width=BAR),
        number_column("ms", 8),
        number_column("share", 8),
        title="where the time of the engines' ILF row went",
    )
    for name, part_ms, part in parts_of(result):
        table.add_row(cell(name), ProgressBar(1.0, part, width=BAR), figure(part_ms), share(part))
    return table


def _agreement_table(result: Result) -> Table:
    table = plain_table(
        Column("row", width=TITLE, overflow="fold", vertical="bottom"),
        number_column("batch", 5),
        *(number_column(name.replace(", ", ",\n"), 12) for name in AGREEMENT_COLUMNS),
        title="agreement from the same noise, PSNR; – was not asked for, or is equal to the bit",
    )
    for row in result.rows:
        if (known := row.agreement) is not None:
            table.add_row(cell(row.title), f"{row.batch}", *agreement_cells(known))
    return table


def _score_table(result: Result) -> Table:
    table = plain_table(
        Column("row", width=TITLE, overflow="fold", vertical="bottom"),
        number_column("batch", 5),
        Column("score", width=12, vertical="bottom"),
        number_column("mean", 8),
        number_column("from the base line\n(95 %)", 27),
        title="scores of the pictures by their prompts; more is better",
    )
    for title, *cells in score_lines(result.rows):
        table.add_row(cell(title), *map(cell, cells))
    return table


def _line(name: str, words: str, style: str = "") -> Text:
    line = cell(f"{name}: {words}" if words else f"{name}: {NOTHING}")
    line.stylize(style)
    return line
