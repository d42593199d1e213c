"""The progress bar of every command, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ilf_trt.contract.progress import Progress as Tell
from ilf_trt.errors import shown
from ilf_trt.interrupts import check_interrupted


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on a terminal, gone when the block ends; gives what moves it, and raises an interrupt that was lost."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:<20}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would print an empty line
    ) as bar:
        task = bar.add_task("", total=1, visible=False, detail="")

        def tell(what: str, done: int, total: int, detail: str = "", /) -> None:
            check_interrupted()
            bar.update(task, description=shown(what), completed=done, total=total, detail=shown(detail), visible=True)

        yield tell
