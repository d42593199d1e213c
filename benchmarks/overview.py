"""Draws the plot of the README from the committed CSVs: quality over cost on two data sets, speed on two machines.

python -m benchmarks.overview
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from benchmarks.record import RESULTS, read_rows
from benchmarks.study.samplers import TUNED
from benchmarks.study.tables import part_of
from benchmarks.tables import machine

mpl.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, str]
OWN = ("ILF 10 outer:2 anneal m/n", "ILF 7 outer:2 anneal m/n")
GREY, ORANGE, BLUE, INK = "#6e7781", "#d4700a", "#0969da", "#1f2328"
LINES: tuple[tuple[str, str, Callable[[Row], bool]], ...] = (
    ("fewer plain steps", GREY, lambda row: row["sampler"].startswith("plain")),
    ("caching", ORANGE, lambda row: row["sampler"].startswith("cache ")),
    ("feedback (ILF)", BLUE, lambda row: row["training"] == TUNED and row["sampler"] in OWN),
)
DATA = {"digits": ("Digits 8x8", (0.0, 0.3)), "cifar10": ("CIFAR-10 32x32", (9.0, 17.0))}
FULL_COST = 240  # block forwards of 20 plain steps through 12 blocks
BARS = {
    "eager diffusers at equal cost": ("PyTorch, 12 plain steps", "#d0d7de"),
    "ONNX Runtime, one graph": ("ONNX Runtime, 20 plain steps", "#8c959f"),
    "ilf-trt plain at equal cost": ("ilf-trt, 12 plain steps", "#80b3ec"),
    "ilf-trt ILF": ("ilf-trt, 10 steps with feedback", BLUE),
}


def quality(axes: Axes, data: str) -> None:
    """Fréchet distance over cost: a dot is the mean over the seeds, its bar reaches from the best to the worst."""
    title, (low, high) = DATA[data]
    rows = part_of(data, "main")
    for name, colour, belongs in LINES:
        found: dict[int, list[float]] = {}
        for row in filter(belongs, rows):
            found.setdefault(int(row["block_forwards"]), []).append(float(row["frechet"]))
        costs = np.array([cost for cost in sorted(found) if cost <= FULL_COST])
        means = np.array([np.mean(found[cost]) for cost in costs])
        spread = [[abs(pick(found[c]) - mean) for c, mean in zip(costs, means, strict=True)] for pick in (min, max)]
        share = 100 * costs / FULL_COST
        axes.errorbar(share, means, spread, fmt="-o", ms=4.5, lw=1.6, capsize=2, color=colour, label=name)
        if name != "caching":
            steps = {int(row["block_forwards"]): row["steps"] for row in filter(belongs, rows)}
            for cost, x, mean in zip(costs, share, means, strict=True):
                if mean < high:
                    axes.annotate(
                        steps[int(cost)], (x, mean), (-5, -13), textcoords="offset points", ha="right", color=colour
                    )
        if means.min() > high:
            values = " and ".join(f"{mean:.0f}" for mean in reversed(means))
            axes.text(97, high - 0.04 * (high - low), f"caching is above: {values}", color=ORANGE, ha="right", va="top")
    measured = {row["seed"] for row in rows}
    samples = f"{int(rows[0]['samples']):,} samples, {len(measured)} noise seeds"
    axes.set_title(f"{title}, DiT of 12 blocks\n{samples}; numbers are solver steps", fontsize=9.5, color=INK)
    axes.set(xlabel="cost, % of 20 plain steps", ylim=(low, high), xlim=(35, 105))
    axes.grid(alpha=0.25)


def speed(axes: Axes) -> None:
    """Times faster than 20 plain steps in eager PyTorch, a group of bars for every machine and model."""
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(read_rows("cpu-latency"), key=lambda row: row["model"]):
        groups.setdefault(f"{row['model']}\n{machine(row)}", {})[row["row"]] = row
    height = 0.8 / len(BARS)
    for number, (name, (label, colour)) in enumerate(BARS.items()):
        rows = [group[name] for group in groups.values()]
        middle, least, most = (
            np.array([float(row[column]) for row in rows])
            for column in ("faster_than_eager_20", "faster_min", "faster_max")
        )
        places = np.arange(len(groups)) + (number - (len(BARS) - 1) / 2) * height
        spread = np.array([middle - least, most - middle])
        axes.barh(places, middle, height * 0.9, color=colour, label=label)
        axes.errorbar(middle, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_title(
        "Speed of one picture on two CPU cores; thin lines: slowest and fastest repeat", fontsize=9.5, color=INK
    )
    axes.set(xlabel="times faster than 20 plain steps in eager PyTorch")
    axes.grid(alpha=0.25, axis="x")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(8.6, 6.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    panels = upper.subplots(1, 2)
    for axes, data in zip(panels, DATA, strict=True):
        quality(axes, data)
    panels[0].set_ylabel("Fréchet distance (lower is better)")
    panels[0].legend(frameon=False, fontsize=8.5)
    speed(lower.subplots())
    path: Path = RESULTS / "overview.png"
    figure.savefig(path, dpi=190, metadata={"Software": ""})
    print(path)


if __name__ == "__main__":
    main()
