"""The table of the smoke test from its CSV; this file loads no torch."""

from benchmarks.record import read_rows

SMOKE = "gpu-smoke"
HOLDS, NOT_TRIED = "holds", "not tried"
NEVER_TRIED = "Not tried: no GPU was at hand."

Row = dict[str, str]


def gpu_smoke(rows: list[Row] | None = None) -> str:
    """What became of each assumption on each GPU."""
    rows = read_rows(SMOKE) if rows is None else rows
    if not rows:
        return NEVER_TRIED
    lines = ["| GPU | assumption | outcome | facts | s |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["gpu"], row["assumption"], row["outcome"], row["facts"] or "–", row["seconds"])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    machines = dict.fromkeys((row["device"], row["versions"]) for row in rows)
    return "\n".join([*lines, "", *(f"Tried on {device}; {versions}." for device, versions in machines)])
