"""`report.html`: a benchmark as one page that needs no network, no script and no library."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .drawing import Point, Scale, axis, bar, deviation_strip, points, side_axis, time_bar
from .fairness import base_of, by_batch, equal_cost_of, fair_ratio, is_ilf, is_withheld
from .markup import Content, Markup, element, joined
from .observation import Observation
from .page_style import STYLE
from .result import Result, RowResult
from .sentences import (
    AGREEMENT_COLUMNS,
    NOT_SHOWN,
    NOTHING,
    agreement_cells,
    cold_rows,
    decibels,
    facts,
    fell_out_words,
    figure,
    flat,
    headline,
    is_comparable,
    latency,
    noise_words,
    nonfinite_words,
    parts_of,
    ratio_words,
    score_lines,
    share,
    spread_of,
    times,
    verdict_words,
    whole,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""How far a strip of runs reaches to both sides of the median, as a share of it."""
MOST_INSIDE = 0.98
"""The share of the runs that a strip has within its limits, at least."""
IN_TITLE = ("model", "precision", "device")
"""Facts that stand below the name of the bundle."""
ROOM = 1.05  # a scale ends behind the largest value


def report_html(
    result: Result,
    observations: Sequence[Observation] = (),
    environment: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> str:
    """The page; without observations it has no strips of runs, without pictures none of those.

    `environment` holds plain data by name, `pictures` a PNG by the slug of its row.
    """
    runs = _times_ms(observations)
    batches = by_batch(result.rows)
    sections = [
        _section("Results", _RESULTS, *(_results(batch, rows) for batch, rows in batches.items()), _cold(result)),
        _section(
            "How long a run takes", _RUNS[bool(runs)], *(_runs(batch, rows, runs) for batch, rows in batches.items())
        ),
        _section("Where the time went", "One generation of the engines' ILF row.", _parts(result))
        if result.ilf_ms
        else "",
        _quality(batches),
        _scores(result.rows),
        _pictures(result, pictures or {}),
        _section("What to know", "", _remarks(result)),
        _section("Environment", "", _list(flat(environment or {})), element("h3", "command"), _code(result.command)),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{result.subject.bundle}: ilf-trt bench"),
        element("style", Markup(STYLE)),
    )
    foot = element("footer", f"ilf-trt bench, schema {result.schema}, {result.started}")
    page = element("html", head, element("body", element("main", _top(result), *sections, foot)), lang="en")
    return f"<!doctype html>\n{page}\n"


_RESULTS = (
    "Median time of a run and the factor to the base line, paired turn by turn, with its 95 % interval. "
    "An ILF row has a factor only if the row beside it, of the same cost without feedback, was measured too."
)
_RUNS = {
    False: "Bar: median. Line: to the 90th percentile.",
    True: "Bar: median, and a line to the 90th percentile. Dots: every run as a distance from its row's median, the "
    "first run at the top and the last at the bottom, so a slope is a drift; the box holds the middle half of the "
    "runs; a ring at the edge lies further out.",
}


def _top(result: Result) -> Markup:
    good = {True: "good", False: "bad"}
    subject = result.subject
    chips = [
        element("span", verdict_words(result.verdict), class_=f"chip {good[is_comparable(result.verdict)]}"),
        element("span", f"machine {noise_words(result.noise)}", class_=f"chip {good[not result.noise.reasons]}"),
    ]
    if not result.finished:
        chips.append(element("span", "interrupted: the numbers are those until then", class_="chip bad"))
    return joined(
        element("div", "ilf-trt bench", class_="soft"),
        element("h1", subject.bundle),
        element("p", f"{subject.model} · {subject.precision} · {result.device}"),
        element("div", *chips, class_="chips"),
        *(_cards(result, batch) for batch in dict.fromkeys(row.batch for row in result.rows)),
        _list([(name, text) for name, text in facts(result) if name not in IN_TITLE]),
    )


def _cards(result: Result, batch: int) -> Markup:
    """The ILF row of the engines, its row of equal cost, and the base line; never the first without the second."""
    row, base = result.row("ilf", batch), base_of(batch, result.rows)
    if row is None or base is None:
        return Markup("")
    ratio, equal = fair_ratio(row, result.rows), equal_cost_of(row, result.rows)
    if ratio is None or equal is None:
        return element("p", headline(result, batch))
    cards = [_card("ilf", times(ratio), row.title)]
    if equal is not base:
        cards.append(_card("equal", times(equal.ratio), equal.title))
    cards.append(_card("base", f"{latency(base)[0]} ms", f"{base.title}: the base line"))
    return joined(
        element("h3", f"batch {batch}, times faster than the base line"), element("div", *cards, class_="cards")
    )


def _card(kind: str, words: str, title: str) -> Markup:
    number, _, bounds = words.partition(" (")
    inner = [element("b", number), element("span", title)]
    if bounds:
        inner.append(element("span", f"95 %: {bounds.rstrip(')')}", class_="soft"))
    return element("div", *inner, class_=f"card {kind}")


def _results(batch: int, rows: tuple[RowResult, ...]) -> Markup:
    columns = ("row", "steps", "block forwards", "p50 ms", "p90 ms", "pictures a second", "peak MiB", "times faster")
    lines = []
    for row in rows:
        about = element("small", f"{row.library}, {row.precision}")
        first = element("td", row.title, about)
        work = [_td(columns[1], f"{row.steps}"), _td(columns[2], whole(row.block_forwards))]
        if row.failed:
            reason = element("td", f"failed: {row.failed}", colspan="5", class_="wide")
            lines.append(element("tr", first, *work, reason, class_="failed"))
            continue
        values = (*latency(row), figure(row.pictures_per_s), whole(row.peak_mib))
        cells = [_td(name, value) for name, value in zip(columns[3:7], values, strict=True)]
        ratio = element("td", ratio_words(row, rows), class_="ratio", data_label=columns[7])
        lines.append(element("tr", first, *work, *cells, ratio, class_=_kind(row, rows)))
    withheld = [element("p", f"{row.title}: {NOT_SHOWN}", class_="soft") for row in rows if is_withheld(row, rows)]
    return joined(element("h3", f"batch {batch}"), _table(columns, lines), *withheld)


def _cold(result: Result) -> Markup:
    columns = ("row", "start of the process, s", "loading, s", "first run, s")
    lines = [
        element(
            "tr", element("td", title), *(_td(name, figure(s)) for name, s in zip(columns[1:], seconds, strict=True))
        )
        for title, seconds in cold_rows(result)
    ]
    cold = element("details", element("summary", "cold start of every row"), _table(columns, lines))
    return cold if lines else Markup("")


def _runs(batch: int, rows: tuple[RowResult, ...], runs: Mapping[tuple[str, int], Sequence[float]]) -> Markup:
    measured = [(row, spread) for row in rows if (spread := spread_of(row)) is not None]
    if not measured:
        return joined(element("h3", f"batch {batch}"), element("p", "No row of this batch was measured."))
    scale = Scale(0.0, ROOM * max(spread.p90_ms for _, spread in measured))
    strips = {row.slug: _deviations(runs[row.slug, batch]) for row, _ in measured if (row.slug, batch) in runs}
    limit = _limit(list(strips.values()))
    around = Scale(-limit, limit)
    cells: list[Content] = [element("div", class_="blank"), element("div", "ms", class_="head")]
    cells += [element("div", "from the row's median", class_="head blank")] if strips else []
    for row, spread in measured:
        kind = _kind(row, rows)
        cells.append(element("div", row.title, element("small", f"{figure(spread.p50_ms)} ms"), class_="name"))
        cells.append(element("div", time_bar(spread.p50_ms, spread.p90_ms, scale, kind)))
        if strips:
            strip = deviation_strip(strips[row.slug], around, kind) if row.slug in strips else NOTHING
            cells.append(element("div", strip))
    cells += [element("div", class_="blank"), element("div", axis(scale, [f"{tick:,g}" for tick in scale.ticks()]))]
    cells += [element("div", axis(around, [_percent(tick) for tick in around.ticks()]))] if strips else []
    return joined(element("h3", f"batch {batch}"), element("div", *cells, class_="runs seen" if strips else "runs"))


def _parts(result: Result) -> Markup:
    cells: list[Content] = []
    for name, part_ms, part in parts_of(result):
        cells += [element("div", name), element("div", bar(part, "ilf"))]
        cells += [
            element("div", f"{figure(part_ms)} ms", class_="number"),
            element("div", share(part), class_="number"),
        ]
    return element("div", *cells, class_="parts")


def _quality(batches: Mapping[int, tuple[RowResult, ...]]) -> Markup:
    known = {batch: [row for row in rows if row.agreement is not None] for batch, rows in batches.items()}
    if not any(known.values()):
        return Markup("")
    pieces: list[Markup] = []
    for batch, rows in known.items():
        if rows:
            pieces += [element("h3", f"batch {batch}"), _front(rows, batches[batch]), _agreement(rows)]
    about = (
        "PSNR of the latents to eager PyTorch from the same noise: under the same plan it is what the engines cost, to "
        "plain steps it also counts what fewer steps cost. – was not asked for, or is equal to the bit."
    )
    return _section("Quality over cost", about, *pieces)


def _front(rows: Sequence[RowResult], every: tuple[RowResult, ...]) -> Markup:
    """Rows as numbered points: time across, agreement with the longest plain trajectory up."""
    long = any(row.agreement and row.agreement.long_db is not None for row in rows)
    found: list[tuple[RowResult, float, float]] = []
    for row in rows:
        spread, known = spread_of(row), row.agreement
        if spread is None or known is None:
            continue
        value = known.long_db if long else known.plain_db
        if value is not None:
            found.append((row, spread.p50_ms, value))
    if not found:
        return Markup("")
    across = Scale(0.0, ROOM * max(p50_ms for _, p50_ms, _ in found))
    low, high = min(value for *_, value in found), max(value for *_, value in found)
    room = max((high - low) * 0.1, 0.5)
    up = Scale(low - room, high + room)
    marks = [Point(p50_ms, value, f"{n}", _kind(row, every)) for n, (row, p50_ms, value) in enumerate(found, 1)]
    legend = [element("li", f"{row.title}: {figure(p50_ms)} ms, {decibels(value)}") for row, p50_ms, value in found]
    reference = "50 plain steps" if long else "the plain steps"
    return joined(
        element("p", f"Up: PSNR to {reference} of eager PyTorch in dB. Across: median of a run in ms.", class_="soft"),
        element(
            "div",
            element("div", side_axis(up, [f"{tick:,g}" for tick in up.ticks()])),
            element("div", points(marks, across, up)),
            element("div"),
            element("div", axis(across, [f"{tick:,g}" for tick in across.ticks()])),
            class_="plot",
        ),
        element("ol", *legend, class_="legend"),
    )


def _agreement(rows: Sequence[RowResult]) -> Markup:
    columns = ("row", *AGREEMENT_COLUMNS, "not finite")
    lines = []
    for row in rows:
        if (known := row.agreement) is not None:
            cells = [*agreement_cells(known), share(known.nonfinite_share)]
            named = [_td(name, cell) for name, cell in zip(columns[1:], cells, strict=True)]
            lines.append(element("tr", element("td", row.title), *named))
    return _table(columns, lines)


def _scores(rows: Sequence[RowResult]) -> Markup:
    columns = ("row", "batch", "score", "mean", "from the base line (95 %)")
    lines = [
        element("tr", element("td", title), *(_td(name, text) for name, text in zip(columns[1:], cells, strict=True)))
        for title, *cells in score_lines(rows)
    ]
    if not lines:
        return Markup("")
    about = "Scores of the pictures by their prompts, more is better; the difference is paired, picture by picture."
    return _section("Scores", about, _table(columns, lines))


def _pictures(result: Result, pictures: Mapping[str, bytes]) -> Markup:
    figures = []
    for slug, png in pictures.items():
        row = next((row for row in result.rows if row.slug == slug), None)
        title = row.title if row else slug
        source = Markup(f"data:image/png;base64,{b64encode(png).decode()}")
        caption = [title, *([f", {whole(row.block_forwards)} block forwards"] if row else [])]
        kind = _kind(row, result.rows) if row else "other"
        picture = element("img", src=source, alt=f"picture of {title}")
        figures.append(element("figure", picture, element("figcaption", *caption), class_=kind))
    if not figures:
        return Markup("")
    return _section(
        "Pictures", "The same noise and the same condition in every row.", element("div", *figures, class_="pictures")
    )


def _remarks(result: Result) -> Markup:
    remarks = [
        ("verdict", verdict_words(result.verdict)),
        ("machine", noise_words(result.noise)),
        ("not as asked", fell_out_words(result)),
        ("not finite", nonfinite_words(result)),
    ]
    layers = [element("li", element("code", layer)) for layer in result.fell_out]
    named = element(
        "details", element("summary", "layers that do not run in the asked precision"), element("ul", *layers)
    )
    return joined(_list(remarks), named if layers else "")


def _section(title: str, about: str, *content: Content) -> Markup:
    return element("section", element("h2", title), element("p", about, class_="soft") if about else "", *content)


def _table(columns: Sequence[str], lines: Sequence[Markup]) -> Markup:
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in columns)))
    return element("table", head, element("tbody", *lines))


def _td(name: str, text: str) -> Markup:
    return element("td", text, data_label=name)


def _list(lines: Sequence[tuple[str, str]]) -> Markup:
    pairs = [piece for name, text in lines for piece in (element("dt", name), element("dd", text))]
    return element("dl", *pairs) if pairs else element("p", "Nothing was written.", class_="soft")


def _code(text: str) -> Markup:
    return element("pre", element("code", text))


def _kind(row: RowResult, rows: Sequence[RowResult]) -> str:
    """The colour of a row: ILF, its row of equal cost, the base line, or any other."""
    if is_ilf(row):
        return "ilf"
    if any(is_ilf(other) and equal_cost_of(other, rows) is row for other in rows):
        return "equal"
    return "base" if base_of(row.batch, rows) is row else "other"


def _times_ms(observations: Sequence[Observation]) -> dict[tuple[str, int], list[float]]:
    runs: dict[tuple[str, int], list[float]] = {}
    for one in sorted((one for one in observations if one.counts), key=lambda one: one.turn):
        runs.setdefault((one.row, one.batch), []).append(one.best_ms)
    return runs


def _deviations(times_ms: Sequence[float]) -> list[float]:
    """Distances from the median as a share of it."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        shares = np.asarray(times_ms, np.float64) / np.median(times_ms) - 1
    return list(np.nan_to_num(shares))


def _limit(strips: Sequence[Sequence[float]]) -> float:
    sizes = [abs(value) for strip in strips for value in strip]
    inside = float(np.quantile(sizes, MOST_INSIDE)) if sizes else 0.0
    return next((limit for limit in LIMITS if limit >= inside), LIMITS[-1])


def _percent(tick: float) -> str:
    return f"{tick * 100:+.3g} %" if abs(tick) > 1e-9 else "0"
