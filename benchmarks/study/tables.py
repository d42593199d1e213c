"""The tables of the study from its CSVs: every sampler of a part with its cost, and its numbers over the seeds."""

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.record import read_rows
from benchmarks.study.samplers import TUNED, samplers

Row = dict[str, str]
COLUMNS = ("accuracy", "precision", "recall", "density", "coverage", "psnr_db", "feature_distance")
ANSWER_DATA = (("digits", 3), ("cifar10", 2))  # and the decimals of their distances
HEADS = {"psnr_db": "PSNR to 50 steps, dB", "feature_distance": "features apart"}


def study(data: str, part: str) -> str:
    """Rows by cost, then in the order of the samplers; Fréchet distances of every seed, the other numbers as means."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(part_of(data, part), key=lambda row: int(row["seed"])):
        groups.setdefault((row["sampler"], row["training"]), []).append(row)
    if not groups:
        return "Not measured."
    shown = [
        name for name in COLUMNS if any(_number(row[name]) is not None for rows in groups.values() for row in rows)
    ]
    heads = " | ".join(HEADS.get(name, name) for name in shown)
    lines = [
        f"| sampler | training | block forwards | Fréchet distance, mean (each seed) | {heads} |",
        "|---|---|---|---|" + "---|" * len(shown),
    ]
    places = {(sampler.name, sampler.training): place for place, sampler in enumerate(samplers())}
    ordered = sorted(groups.items(), key=lambda group: (-int(group[1][0]["block_forwards"]), places[group[0]]))
    for (sampler, training), rows in ordered:
        if len({row["weights"] for row in rows}) > 1:
            raise SystemExit(
                f"quality-{data}.csv has rows of {sampler} ({training or 'no training'}) from several weights, which "
                "have no mean; remove the rows of all but one of them"
            )
        cells = [sampler, training or "–", rows[0]["block_forwards"], distances(rows)]
        cells += [_mean(row[name] for row in rows) for name in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def part_of(data: str, part: str) -> list[Row]:
    """The rows of a part's samplers; a row may belong to several parts."""
    wanted = {(sampler.name, sampler.training) for sampler in samplers() if sampler.part == part}
    return [row for row in read_rows(f"quality-{data}") if (row["sampler"], row["training"]) in wanted]


ANSWER = (
    ("plain 50", ""),
    ("plain 20", ""),
    ("cache-dit 20", ""),
    ("cache 20", ""),
    ("plain 12", ""),
    ("ILF 10 outer:2 anneal m/n", TUNED),
    ("plain 9", ""),
    ("ILF 7 outer:2 anneal m/n", TUNED),
    ("cache 14", ""),
)


def answer() -> str:
    """The study's main question on both data sets: the mean of every sampler, its best and its worst seed."""
    lines = [
        "| sampler | block forwards | digits, mean (best to worst seed) | CIFAR-10, mean (best to worst seed) |",
        "|---|---|---|---|",
    ]
    parts = [part_of(data, "main") for data, _ in ANSWER_DATA]
    for sampler, training in ANSWER:
        cells = []
        for rows, (_, digits) in zip(parts, ANSWER_DATA, strict=True):
            rows = [row for row in rows if (row["sampler"], row["training"]) == (sampler, training)]
            found = [float(row["frechet"]) for row in rows]
            mean, best, worst = (f"{value:.{digits}f}" for value in (np.mean(found), min(found), max(found)))
            cells.append(f"{mean} ({best} to {worst})")
        lines.append(f"| {' | '.join([sampler, rows[0]['block_forwards'], *cells])} |")
    return "\n".join(lines)


def emoji() -> str:
    """The text-to-image demo: distances and shares over the seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows("quality-emoji"):
        groups.setdefault((row["guidance_scale"], row["sampler"]), []).append(row)
    lines = [
        "| guidance | sampler | block forwards | Fréchet distance, mean (each seed) | nearest is its own "
        "| among five nearest |",
        "|---|---|---|---|---|---|",
    ]
    for (scale, sampler), rows in groups.items():
        shares = [_mean(row[name] for row in rows) for name in ("own", "near")]
        lines.append(f"| {' | '.join([scale, sampler, rows[0]['block_forwards'], distances(rows), *shares])} |")
    return "\n".join(lines)


def shrinkage(data: str) -> str:
    """For every time, the share of the noise that each model predicts, in percent, and sigma / alpha."""
    rows = read_rows(f"shrinkage-{data}")
    if not rows:
        return "Not measured."
    columns = dict.fromkeys((row["what"], row["training"]) for row in rows)
    heads = [f"{what}, {training}" if training else what for what, training in columns]
    lines = [f"| t | sigma / alpha | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for t in dict.fromkeys(row["t"] for row in rows):
        at_t = {(row["what"], row["training"]): row for row in rows if row["t"] == t}
        cells = [f"{100 * float(at_t[column]['share']):.2f}" for column in columns]
        lines.append(f"| {t} | {float(next(iter(at_t.values()))['sigma_over_alpha']):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def distances(rows: list[Row]) -> str:
    """`0.111 (0.122 0.109 0.101)`, or the one number of a single seed."""
    values = [float(row["frechet"]) for row in rows]
    seeds = f" ({' '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{seeds}"


def _mean(values: Iterable[str]) -> str:
    numbers = [number for number in map(_number, values) if number is not None]
    return f"{np.mean(numbers):.3f}" if numbers else "–"


def _number(text: str) -> float | None:
    return None if text in ("", "nan") else float(text)


PARTS = ("main", "scaled", "controls", "guided", "rules", "patterns", "trainings", "early", "duration")
STUDY: dict[str, Callable[[], str]] = {
    f"study-{data}-{part}": lambda data=data, part=part: study(data, part)  # type: ignore[misc]
    for data in ("digits", "digits-4-rounds", "cifar10", "cifar10-other-base")
    for part in PARTS
}
STUDY["study-answer"] = lambda: answer()
STUDY["study-emoji"] = lambda: emoji()
STUDY["study-cifar10-shrinkage"] = lambda: shrinkage("cifar10")
