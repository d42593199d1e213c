"""Draws the study's figures from the committed CSVs: quality over cost, over training, over time and blocks.

python -m benchmarks.study.plots
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.record import RESULTS, read_rows
from benchmarks.study.samplers import NEAR, SMALL, TUNED
from benchmarks.study.tables import part_of

mpl.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, str]
MAX_CHANGE = 0.4
ILF_SAMPLERS = ("ILF 10 outer:2 anneal m/n", "ILF 7 outer:2 anneal m/n", "ILF 5 outer:2 anneal m/n")
DATA = ("digits", "cifar10")
LINES: tuple[tuple[str, str, Callable[[Row], bool]], ...] = (
    ("fewer steps", "tab:gray", lambda row: row["sampler"].startswith("plain")),
    ("caching (the paper's)", "tab:orange", lambda row: row["sampler"].startswith("cache ")),
    ("cache-dit", "tab:red", lambda row: row["sampler"].startswith("cache-dit")),
    ("ILF", "tab:blue", lambda row: row["training"] == TUNED and row["sampler"] in ILF_SAMPLERS),
    ("ILF on all steps, a near teacher", "tab:purple", lambda row: row["training"] == NEAR),
    ("ILF, a smaller learning rate", "tab:cyan", lambda row: row["training"] == SMALL),
    ("ILF, trained on intervals", "tab:green", lambda row: row["training"] == "interval"),
)


def cost(data: str) -> Path | None:
    """Figure 9: Fréchet distance over block forwards, with a dot for each seed and a line for the mean."""
    rows = part_of(data, "main")
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, colour, belongs in LINES:
        distances: dict[int, list[float]] = {}
        for row in filter(belongs, rows):
            distances.setdefault(int(row["block_forwards"]), []).append(float(row["frechet"]))
        if not distances:
            continue
        costs = sorted(distances)
        axes.plot(costs, [np.mean(distances[c]) for c in costs], "-o", ms=4, color=colour, label=name)
        dots = [(c, distance) for c in costs for distance in distances[c]]
        axes.plot(*zip(*dots, strict=True), ".", ms=3, color=colour)
    axes.set(xlabel="block forwards of a picture", ylabel="Fréchet distance", yscale="log", title=TITLES[data])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, f"cost-{data}")


def duration(data: str) -> Path | None:
    """Figure 8: Fréchet distance over the iterations of one training."""
    by_iteration: dict[int, list[Row]] = {}
    for row in part_of(data, "duration"):
        by_iteration.setdefault(int(row["training"].rpartition("/")[2]), []).append(row)
    if not by_iteration:
        return None
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    marks = sorted(by_iteration)
    means = [np.mean([float(row["frechet"]) for row in by_iteration[mark]]) for mark in marks]
    axes.plot(marks, means, "-o", ms=4)
    axes.set(xlabel="iterations of the feedback block", ylabel="Fréchet distance", title=TITLES[data])
    axes.grid(alpha=0.3)
    return _save(figure, f"duration-{data}")


def features(data: str) -> Path | None:
    """Figures 3 and 4: the change of every block's output from one step to the next."""
    runs: dict[str, list[Row]] = {}
    for row in read_rows(f"features-{data}"):
        runs.setdefault(row["run"], []).append(row)
    if not runs:
        return None
    figure, all_axes = plt.subplots(1, len(runs), figsize=(3 * len(runs), 3.4), layout="constrained", sharey=True)
    for axes, (name, rows) in zip(all_axes, runs.items(), strict=True):
        times = list(dict.fromkeys(row["t"] for row in rows))
        grid = np.array([float(row["change"]) for row in rows]).reshape(len(times), -1).T
        image = axes.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=MAX_CHANGE, cmap="viridis")
        axes.set(title=name, xlabel="t")
        shown = range(0, len(times), max(1, len(times) // 4))
        axes.set_xticks(list(shown), [f"{float(times[i]):.0f}" for i in shown])
    all_axes[0].set(ylabel="block")
    figure.colorbar(image, ax=all_axes, label="relative change from the step before")
    return _save(figure, f"features-{data}")


TITLES = {"digits": "Digits 8x8, DiT of 12 blocks", "cifar10": "CIFAR-10 32x32, DiT of 12 blocks"}


def _save(figure: plt.Figure, name: str) -> Path:
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return path


def main() -> None:
    for data in DATA:
        for draw in (cost, duration, features):
            print(draw(data) or f"{draw.__name__} of {data}: not measured")


if __name__ == "__main__":
    main()
