"""`report.md`: a benchmark as Markdown for a pull request."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ilf_trt.errors import shown

from .fairness import by_batch, is_ilf
from .result import Result, RowResult
from .sentences import (
    AGREEMENT_COLUMNS,
    agreement_cells,
    facts,
    fell_out_words,
    figure,
    flat,
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

TEXT_CHARS = 2000
SPECIAL = re.compile(r"([\\`*_\[\]|~#!$])")
COLUMNS = (
    *("row", "library", "precision", "steps", "block forwards", "p50 ms", "p90 ms", "pictures a second", "peak MiB"),
    "times faster (95 %)",
)


def report_md(result: Result, environment: Mapping[str, Any]) -> str:
    """The report; `environment` holds plain data by name, and its order stays."""
    lines = [
        f"## Benchmark of {plain(result.subject.bundle)}",
        "",
        f"**Verdict:** {plain(verdict_words(result.verdict))}",
    ]
    if not result.finished:
        lines += ["", "**Interrupted:** the numbers are those until then."]
    for batch in dict.fromkeys(row.batch for row in result.rows):
        if sentence := headline(result, batch):
            lines += ["", f"Batch {batch}: {plain(sentence)}."]
    lines += ["", *(f"- {name}: {plain(text)}" for name, text in facts(result))]
    for batch, rows in by_batch(result.rows).items():
        lines += ["", f"### Batch {batch}", "", *_rows(rows)]
        lines += [f"\n{plain(title)}: {plain(words)}" for title, words in row_notes(rows)]
    if result.ilf_ms:
        lines += ["", "### Where the time of the engines' ILF row went", ""]
        lines += _table(
            ("part", "ms", "share"),
            ((plain(name), figure(part_ms), share(part)) for name, part_ms, part in parts_of(result)),
        )
    if any(row.agreement is not None for row in result.rows):
        lines += ["", "### Agreement from the same noise", "", *_agreement(result.rows), ""]
        lines += ["PSNR to eager PyTorch; – was not asked for, or is equal to the bit."]
    if scores := score_lines(result.rows):
        columns = ("row", "batch", "score", "mean", "from the base line (95 %)")
        lines += ["", "### Scores of the pictures by their prompts", ""]
        lines += _table(columns, (tuple(map(plain, line)) for line in scores))
    lines += ["", "### What to know", ""]
    lines += [f"- machine {plain(noise_words(result.noise))}", f"- not as asked: {fell_out_words(result)}"]
    lines += [f"  - {plain(layer)}" for layer in result.fell_out]
    lines += [f"- not finite: {plain(nonfinite_words(result))}", "", "### Command", "", *_fenced(result.command)]
    lines += ["", "<details><summary>Environment</summary>", ""]
    lines += _table(("fact", "value"), ((plain(name), plain(text)) for name, text in flat(environment)))
    return "\n".join([*lines, "", "</details>", ""])


def plain(text: str) -> str:
    """Text of others that Markdown shows as it is: no markup, no HTML, no link, nobody is called by name."""
    line = SPECIAL.sub(r"\\\1", shown(text, TEXT_CHARS))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return line.replace("@", "@\u200b").replace("://", ":\u200b//").replace("www.", "www\u200b.")


def _rows(rows: tuple[RowResult, ...]) -> list[str]:
    cells = []
    for row in rows:
        rate, peak = (None, None) if row.failed else (row.pictures_per_s, row.peak_mib)
        title = plain(row.title)
        cells.append(
            (
                f"**{title}**" if is_ilf(row) else title,
                plain(row.library),
                plain(row.precision),
                f"{row.steps}",
                whole(row.block_forwards),
                *latency(row),
                figure(rate),
                whole(peak),
                ratio_words(row, rows),
            )
        )
    return _table(COLUMNS, cells)


def _agreement(rows: Sequence[RowResult]) -> list[str]:
    columns = ("row", "batch", *AGREEMENT_COLUMNS)
    known = ((row, row.agreement) for row in rows if row.agreement is not None)
    cells = [(plain(row.title), f"{row.batch}", *agreement_cells(agreement)) for row, agreement in known]
    return _table(columns, cells)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]


def _fenced(text: str) -> list[str]:
    """A block of code whose fence is longer than any in the text."""
    line = shown(text, TEXT_CHARS)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return [fence, line, fence]
