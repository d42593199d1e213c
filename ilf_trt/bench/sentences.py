"""What a benchmark says in words and figures, the same on a terminal, in Markdown and on a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from .fairness import base_of, equal_cost_of, fair_ratio, is_withheld
from .result import Agreement, Noise, Result, RowResult, Verdict
from .row import Boundary
from .statistics import Interval, Spread

NOTHING = "–"
HASH_CHARS = 12
LARGEST, SMALLEST = 1e6, 1e-3
INSIDE = {
    Boundary.DENOISE: "noise and embedded conditions to latents",
    Boundary.END_TO_END: "the request to pixels, as far as the bundle has a text encoder and a decoder",
}
OUTSIDE = {
    Boundary.DENOISE: "start of the process, loading, text encoder, decoder",
    Boundary.END_TO_END: "start of the process, loading",
}
AGREEMENT_COLUMNS = ("eager, same plan", "eager, plain", "eager, 50 steps", "pixels, plain")
NOT_SHOWN = "no speed-up shown: its row of equal cost was not measured"


def figure(value: float | None) -> str:
    """A number with three to four digits that count: `12.34`, `1,234`, `1.23e+07`; a dash for None."""
    if value is None:
        return NOTHING
    size = abs(value)
    if not size:
        return "0"
    if size >= LARGEST or size < SMALLEST:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"


def whole(value: float | None) -> str:
    """A number without decimals: `1,234`, `1.2e+07`; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) < LARGEST else f"{value:.1e}"


def times(interval: Interval | None) -> str:
    """`2.07x (2.02–2.11)`; a dash for None."""
    if interval is None:
        return NOTHING
    return f"{_factor(interval.median)}x ({_factor(interval.low)}–{_factor(interval.high)})"


def share(value: float) -> str:
    """`12.3 %`, and a power of ten where that says nothing."""
    percent = value * 100
    return f"{percent:.1f} %" if 0.05 <= abs(percent) < 1e5 or percent == 0 else f"{percent:.1e} %"


def decibels(value: float | None) -> str:
    """`42.1 dB`; a dash for None."""
    return NOTHING if value is None else f"{value:.1f} dB" if abs(value) < 1000 else f"{value:.1e} dB"


def spread_of(row: RowResult) -> Spread | None:
    """The spread that ratios compare: of the GPU if there is one, else of the host; None for a failed row."""
    return None if row.failed else row.device or row.host


def latency(row: RowResult) -> tuple[str, str]:
    """The median and the 90th percentile in ms; dashes for a failed row."""
    spread = spread_of(row)
    return (NOTHING, NOTHING) if spread is None else (figure(spread.p50_ms), figure(spread.p90_ms))


def ratio_words(row: RowResult, rows: tuple[RowResult, ...]) -> str:
    """The cell of a ratio: `2.07x (2.02–2.11)`, `base line`, `failed`, or a dash if it may not be shown."""
    if row.failed:
        return "failed"
    if row.ratio is None and base_of(row.batch, rows) is row:
        return "base line"
    return times(fair_ratio(row, rows))


def row_notes(rows: tuple[RowResult, ...]) -> list[tuple[str, str]]:
    """Title and remark of every row that failed, or whose ratio may not be shown."""
    notes = [(row, f"failed: {row.failed}") for row in rows if row.failed]
    notes += [(row, NOT_SHOWN) for row in rows if is_withheld(row, rows)]
    return [(f"{row.title}, batch {row.batch}", words) for row, words in notes]


def facts(result: Result) -> list[tuple[str, str]]:
    """What was measured, where, and what is inside of a measured time: name and text."""
    subject, (height, width) = result.subject, result.size
    return [
        ("model", subject.model),
        ("bundle", f"{subject.bundle} ({subject.sha256[:HASH_CHARS]})"),
        ("precision", subject.precision),
        ("device", result.device),
        ("picture", f"{height}x{width} pixels, guidance {result.guidance_scale:g}"),
        ("boundary", f"{result.boundary.value}: {INSIDE[result.boundary]}"),
        ("outside", OUTSIDE[result.boundary]),
        ("time", "of the GPU by CUDA events" if any(row.device for row in result.rows) else "of the host"),
    ]


def cold_rows(result: Result) -> list[tuple[str, tuple[float, float, float]]]:
    """Title, and the seconds of the process, the files and the first run, of every row that started cold."""
    return [
        (f"{row.title}, batch {row.batch}", (row.cold.process_s, row.cold.load_s, row.cold.first_s))
        for row in result.rows
        if row.cold is not None and not row.failed
    ]


def agreement_cells(known: Agreement) -> tuple[str, str, str, str]:
    """The cells of `AGREEMENT_COLUMNS`."""
    return (
        decibels(known.own_plan_db),
        decibels(known.plain_db),
        decibels(known.long_db),
        decibels(known.pixels_db),
    )


def score_lines(rows: Sequence[RowResult]) -> list[tuple[str, str, str, str, str]]:
    """Row, batch, score, mean, and mean difference from the base line with its 95 % bounds."""
    lines = []
    for row in rows:
        for score in row.scores:
            difference = NOTHING
            if score.difference is not None and score.low is not None and score.high is not None:
                difference = f"{score.difference:+.3f} ({score.low:+.3f} to {score.high:+.3f})"
            lines.append((row.title, f"{row.batch}", score.name, f"{score.mean:.3f}", difference))
    return lines


def headline(result: Result, batch: int) -> str:
    """One sentence on the engines' ILF row, always with its row of equal cost; empty if ILF was not measured."""
    row = result.row("ilf", batch)
    base = base_of(batch, result.rows)
    if row is None or base is None or row.failed or row.ratio is None:
        return ""
    ratio, equal = fair_ratio(row, result.rows), equal_cost_of(row, result.rows)
    if ratio is None or equal is None:
        return f"{row.title}: {NOT_SHOWN}"
    if equal is base:
        return f"{row.title}: {times(ratio)} against {equal.title}"
    return f"{row.title}: {times(ratio)}; {equal.title}: {times(equal.ratio)}; both against {base.title}"


def verdict_words(verdict: Verdict) -> str:
    """`comparable: …`, or what differs."""
    if verdict.comparable and not verdict.differs:
        return "comparable: steps, guidance, noise, precision and boundary are the same on both sides"
    return f"not comparable: {'; '.join(verdict.differs) or 'no reason was written'}"


def is_comparable(verdict: Verdict) -> bool:
    """Whether nothing differs."""
    return verdict.comparable and not verdict.differs


def noise_words(noise: Noise) -> str:
    """Whether the machine was quiet, with the measures of it."""
    measures = (
        f"the middle half of the base line's runs lies within {share(noise.base_spread)} of its median, "
        f"load per core {noise.load_before:.2f} before and {noise.load_after:.2f} after"
    )
    return f"noisy: {'; '.join(noise.reasons)} ({measures})" if noise.reasons else f"quiet: {measures}"


def parts_of(result: Result) -> list[tuple[str, float, float]]:
    """Name, ms and share of every part of an ILF generation that took time, in their order."""
    total = sum(max(ms, 0.0) for ms in result.ilf_ms.values())
    return [(name, ms, max(ms, 0.0) / total if total else 0.0) for name, ms in result.ilf_ms.items()]


def nonfinite(result: Result) -> list[tuple[str, float]]:
    """Title and share of the rows with values that are not finite."""
    return [
        (f"{row.title}, batch {row.batch}", row.agreement.nonfinite_share)
        for row in result.rows
        if row.agreement is not None and row.agreement.nonfinite_share
    ]


def nonfinite_words(result: Result) -> str:
    """Which rows have values that are not finite, if anybody looked."""
    if not any(row.agreement is not None for row in result.rows):
        return "not looked for"
    return "; ".join(f"{title}: {share(value)}" for title, value in nonfinite(result)) or "none"


def fell_out_words(result: Result) -> str:
    """How many layers do not run in the asked precision."""
    count = len(result.fell_out)
    return f"{count} layer{'s' * (count != 1)}" if count else "none"


def flat(environment: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested facts as names with dots and texts: `gpu.driver`."""
    lines: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            lines += flat(value, f"{before}{name}.")
        elif isinstance(value, list | tuple):
            lines.append((f"{before}{name}", ", ".join(map(str, value))))
        else:
            lines.append((f"{before}{name}", NOTHING if value is None else str(value)))
    return lines


def _factor(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
