"""Writes the tables of README.md anew from the committed CSVs, between their markers.

python benchmarks/tables.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import read_rows

README = Path(__file__).parent.parent / "README.md"
Row = dict[str, str]


def latency() -> str:
    """Ratios and differences, a section for each model."""
    lines = [
        "| model | what runs | steps | block forwards | faster than eager 20 (spread) | against one graph | "
        "difference from eager | Fréchet distance | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in read_rows("cpu-latency"):
        cells = [row[name] for name in ("model", "row", "steps", "block_forwards")]
        low, middle, high = (float(row[name]) for name in ("faster_min", "faster_than_eager_20", "faster_max"))
        cells += [f"{middle:.2f}x ({low:.2f} to {high:.2f})", f"{float(row['cost_against_one_graph']):.3f}"]
        cells += [row[name] or "–" for name in ("relative_difference", "frechet", "accuracy")]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def process() -> str:
    """What a serving process costs besides its engines."""
    lines = [
        "| model | Python a step beyond the engines | `import ilf_trt.runtime` | peak memory |",
        "|---|---|---|---|",
    ]
    for row in read_rows("cpu-process"):
        overhead, seconds, memory = (row[name] for name in ("overhead_us_per_step", "import_s", "serving_peak_mib"))
        lines += [f"| {row['model']} | {overhead} µs | {seconds} s | {memory} MiB |"]
    return "\n".join(lines)


def quality() -> str:
    """Distance and accuracy of the demo under every plan, all noise seeds."""
    plans: dict[str, list[Row]] = {}
    for row in read_rows("quality-demo"):
        plans.setdefault(row["plan"], []).append(row)
    lines = [
        "| plan | block forwards | Fréchet distance, mean (each seed) | accuracy, mean |",
        "|---|---|---|---|",
    ]
    for name, rows in plans.items():
        distances = [float(row["frechet"]) for row in rows]
        accuracy = np.mean([float(row["accuracy"]) for row in rows])
        lines.append(
            f"| {name} | {rows[0]['block_forwards']} | "
            f"{np.mean(distances):.3f} ({' '.join(f'{d:.3f}' for d in distances)}) | {accuracy:.3f} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"cpu-latency": latency, "cpu-process": process, "quality-demo": quality}


def main() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        marked = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda match, table=table: match[1] + table() + "\n" + match[2], text)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for table {name}, expected 1")
    README.write_text(text)


if __name__ == "__main__":
    main()
