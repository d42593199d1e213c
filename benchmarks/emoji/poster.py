"""The picture of the README: the same prompts and noise under three plans, readable on a white and on a dark page.

    python -m benchmarks.emoji.poster

It draws from the bundle of `demo-emoji` and writes `docs/gallery/side-by-side.png`.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.emoji.gallery import PLANS
from benchmarks.record import ROOT
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.runtime import Pipeline

SEED = 9  # of every picture
PROMPTS = (
    "grinning face",
    "red heart",
    "purple heart",
    "red apple",
    "tangerine",
    "cookie",
    "avocado",
    "cactus",
    "frog",
    "cherry blossom",
)
TILE, GAP, MARGIN = 128, 12, 40  # pixels of a file that a page shows at half its size
LABELS, HEADS = 310, 72
BAR, RADIUS = 12, 28
TRANSPARENT = 255  # number of a colour
CARD, BORDER, INK, FAINT, PLAIN, FEEDBACK = "#ffffff", "#d0d7de", "#1f2328", "#656d76", "#afb8c1", "#0969da"

Row = tuple[str, int, list[Image.Image]]


def rows_of(pipeline: Pipeline) -> list[Row]:
    """Title, block forwards and pictures of every plan."""
    rows = []
    for title, steps, feedback in PLANS:
        plan = pipeline.plan(steps, feedback=feedback)
        pixels = pipeline.generate(list(PROMPTS), seed=[SEED] * len(PROMPTS), plan=plan).pixels
        rows.append((title, plan.block_forwards, [Image.fromarray(picture) for picture in pixels]))
    return rows


def poster(rows: list[Row]) -> Image.Image:
    """A white card with round corners: a row for each plan, a bar for its cost, a column for each prompt."""
    width = 2 * MARGIN + LABELS + len(PROMPTS) * (TILE + GAP) - GAP
    height = 2 * MARGIN + HEADS + len(rows) * (TILE + GAP) - GAP
    card = Image.new("RGB", (width, height), CARD)
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((1, 1, width - 2, height - 2), RADIUS, CARD, BORDER, 2)
    title, text, head = (ImageFont.load_default(size) for size in (27, 22, 21))
    for column, prompt in enumerate(PROMPTS):
        centre = MARGIN + LABELS + column * (TILE + GAP) + TILE // 2
        place = (centre, MARGIN + HEADS - 16)
        draw.multiline_text(place, prompt.replace(" ", "\n"), FAINT, head, "md", align="center")
    most = max(cost for _, cost, _ in rows)
    for row, (name, cost, pictures) in enumerate(rows):
        top = MARGIN + HEADS + row * (TILE + GAP)
        colour = FEEDBACK if "feedback" in name else PLAIN
        draw.text((MARGIN, top + 22), name, FEEDBACK if "feedback" in name else INK, title, "lt")
        draw.text((MARGIN, top + 60), f"{cost} block forwards", FAINT, text, "lt")
        length = round((LABELS - 40) * cost / most)
        draw.rounded_rectangle((MARGIN, top + 94, MARGIN + length, top + 94 + BAR), BAR // 2, colour)
        for column, picture in enumerate(pictures):
            left = MARGIN + LABELS + column * (TILE + GAP)
            card.paste(picture.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
    return _without_corners(card)


def _without_corners(card: Image.Image) -> Image.Image:
    """256 colours, the last of them transparent outside of the round corners: a fifth of the bytes."""
    inside = Image.new("L", card.size, 0)
    ImageDraw.Draw(inside).rounded_rectangle((1, 1, card.width - 2, card.height - 2), RADIUS, 255)
    outside = inside.point(lambda value: 255 - value)
    small = card.quantize(TRANSPARENT, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = small.getpalette() or []
    small.putpalette([*palette[: 3 * TRANSPARENT], 255, 255, 255])
    small.paste(TRANSPARENT, mask=outside)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "cache", help="where bundles are kept")
    options = parser.parse_args()
    with Pipeline.load(bundle_of("demo-emoji", options.cache)) as pipeline:
        card = poster(rows_of(pipeline))
    path = ROOT / "docs" / "gallery" / "side-by-side.png"
    card.save(path, compress_level=9, transparency=TRANSPARENT)
    print(path)


if __name__ == "__main__":
    main()
