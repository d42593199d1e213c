"""Pictures from the same noise: 20 plain steps, plain steps at equal cost, and feedback.

    python -m benchmarks.emoji.gallery

The command uses the bundles of the packaged checkpoints. It writes `docs/gallery.md` and the pictures in
`docs/gallery/`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import ROOT
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.runtime import Pipeline

SEED = 7
GAP, TILE = 2, 64
PLANS = (("20 plain steps", 20, "none"), ("12 plain steps", 12, "none"), ("10 steps with feedback", 10, "outer:2"))
PROMPTS = (
    "smiling cat",
    "dog face",
    "grinning face",
    "crying face",
    "red heart",
    "sunflower",
    "green apple",
    "pizza",
    "strawberry",
    "fish",
    "bird",
    "soccer ball",
)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """The pictures of one model: the request, and a note for the reader."""

    model: str
    title: str
    request: dict[str, Any]
    names: tuple[str, ...]
    note: str


EXHIBITS = (
    Exhibit(
        "demo-emoji",
        "Emoji from prompts",
        {"prompt": list(PROMPTS)},
        PROMPTS,
        "The model is a PixArt of 12 blocks of width 96, with a small text encoder, for 32x32 pixels. It trained on "
        "one CPU core. It knows about 590 emoji by name, confuses some, and knows nothing else. Guidance is 4.",
    ),
    Exhibit(
        "demo",
        "Digits from classes",
        {"class_labels": list(range(10))},
        tuple(map(str, range(10))),
        "The model is a DiT of 12 blocks of width 64. It trained on real 8x8 digits. Guidance is 1.5.",
    ),
)


def strip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """pixels (B, H, W, C) -> one row of pictures, each 64 pixels high, enlarged without smoothing."""
    zoom = max(1, TILE // pixels.shape[1])
    tiles = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    if tiles.shape[3] == 1:
        tiles = tiles.repeat(3, axis=3)
    padded = np.pad(tiles, ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def draw(exhibit: Exhibit, folder: Path, cache: Path) -> list[str]:
    """Draw one model's pictures into `folder`, and return its lines of the document."""
    lines = [f"## {exhibit.title}", "", exhibit.note, "", f"From left to right: {', '.join(exhibit.names)}.", ""]
    lines += ["| plan | block forwards | pictures |", "|---|---|---|"]
    with Pipeline.load(bundle_of(exhibit.model, cache)) as pipeline:
        for title, steps, feedback in PLANS:
            plan = pipeline.plan(steps, feedback=feedback)
            result = pipeline.generate(seed=SEED, plan=plan, **exhibit.request)
            name = f"{exhibit.model}-{steps}-{feedback.replace(':', '-')}.png"
            Image.fromarray(strip(result.pixels)).save(folder / name)
            lines.append(f"| {title} | {plan.block_forwards} | ![{title}](gallery/{name}) |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "cache", help="folder of the bundles")
    options = parser.parse_args()
    folder = ROOT / "docs" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "This document is for people who want to see what feedback does to pictures.",
        "",
        "![Ten prompts under three plans](gallery/side-by-side.png)",
        "",
        "`python -m benchmarks.emoji.poster` draws these ten prompts, which the model knows well, with seed 9.",
        "The tables below show easier and harder requests.",
        "",
        "Every table shows three plans with the same requests and the same noise (seed 7): 20 plain steps, plain steps",
        "at the cost of feedback, and 10 steps with feedback on the first two and the last two.",
        "`python -m benchmarks.emoji.gallery` draws this document again. [study.md](study.md) has the numbers.",
        "",
    ]
    for exhibit in EXHIBITS:
        lines += draw(exhibit, folder, options.cache)
    (ROOT / "docs" / "gallery.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
