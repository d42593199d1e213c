"""A load for a terminal, at most 100 columns wide."""

from textwrap import wrap

from rich.console import Console
from rich.table import Table

from ilf_trt.commands.terminal import cell, say

from .load_result import LoadResult
from .statistics import Spread

COLUMNS = 100


def print_load(result: LoadResult, console: Console) -> None:
    """What was sent, what came of it, and the latency with its parts."""
    say(*load_lines(result), console=console)
    if result.latency is not None:
        console.print(load_table(result))


def load_lines(result: LoadResult) -> list[str]:
    """What was sent, what came of it, and what to know before a number is used."""
    lines = [
        f"closed loop, {_many(result.clients, 'client')}"
        if result.rate is None or result.offered_per_s is None
        else f"open stream of requests, {_per_s(result.rate)} intended, {_per_s(result.offered_per_s)} due, "
        f"at most {result.clients} under way",
        f"{result.answered} of {_many(result.requests, 'request')} answered in {result.duration_s:.1f} s: "
        f"{_per_s(result.answered_per_s)}, {_per_s(result.pictures_per_s)} pictures; "
        f"{_many(result.warm_ups, 'warm-up')} before",
    ]
    if result.failures:
        kinds = ", ".join(f"{kind} {count}" for kind, count in result.failures.items())
        lines.append(f"{result.failed} failed: {kinds}")
    if result.unanswered:
        lines.append(
            f"{result.unanswered} still waited at the end: latencies below leave them out, so they are too low"
        )
    if not result.finished:
        lines.append("stopped before its end")
    return [part for line in lines for part in wrap(line, COLUMNS)]


def load_table(result: LoadResult) -> Table:
    """The latency of answers and its three parts, in ms."""
    table = Table("ms", "p50", "p90", "p99", "least", "most")
    for column in table.columns[1:]:
        column.justify = "right"
    parts = {
        "latency, from the intended start": result.latency,
        "  wait in the client": result.client_queue,
        "  wait at the target": result.target_queue,
        "  the target's own work": result.service,
    }
    for name, times in parts.items():
        if times is not None:
            table.add_row(cell(name), *map(_ms, _values(times)))
    return table


def _values(times: Spread) -> tuple[float, ...]:
    return times.p50_ms, times.p90_ms, times.p99_ms, times.least_ms, times.most_ms


def _per_s(value: float) -> str:
    return f"{value:.4g}/s" if value < 1000 else f"{value:.0f}/s"


def _ms(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
