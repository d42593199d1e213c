"""The training data of the text-to-image demo: pictures of emoji and their captions.

FOLDER is the unpacked npm package `emoji-datasource-google` (pictures: Noto Emoji, Apache-2.0; package: MIT):

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")
SUBCATEGORIES = ("sky & weather",)  # of the places
SEPARATORS = str.maketrans(dict.fromkeys("_-:,()“”", " "))


@dataclass(frozen=True, slots=True)
class Emoji:
    """The captions of one picture: its name, its other names, and its kind, all in lower case."""

    name: str
    others: tuple[str, ...]
    kind: str

    def caption(self, draw: np.random.Generator) -> str:
        """A caption for training: the name, some of its words, another name, or the name with its kind."""
        chance = draw.random()
        if chance < 0.5:
            return self.name
        if chance < 0.75:
            return str(draw.choice(self.others)) if self.others else self.name
        words = self.name.split()
        if chance < 0.9 and len(words) > 1:
            count = int(draw.integers(1, len(words)))
            indices = sorted(draw.choice(len(words), count, replace=False))
            return " ".join(words[index] for index in indices)
        return f"{self.name} {self.kind}"


def read(folder: Path) -> tuple[NDArray[np.uint8], list[Emoji]]:
    """Pictures (N, 32, 32, 3) on white, and their captions: faces, animals, plants, food, games and the sky."""
    table = json.loads((folder / "emoji.json").read_text())
    rows = [row for row in table if row["category"] in CATEGORIES or row["subcategory"] in SUBCATEGORIES]
    rows = [row for row in rows if row["has_img_google"]]
    pictures = np.stack([_picture(folder / "img" / "google" / "64" / row["image"]) for row in rows])
    return pictures, [_emoji(row) for row in rows]


def texts(emoji: Sequence[Emoji]) -> Iterator[str]:
    """Every possible caption once, except parts of names."""
    for one in emoji:
        yield from dict.fromkeys((one.name, *one.others, f"{one.name} {one.kind}"))


def _picture(path: Path) -> NDArray[np.uint8]:
    image = Image.open(path).convert("RGBA")
    sheet = Image.new("RGBA", image.size, "white")
    sheet.alpha_composite(image)
    return np.asarray(sheet.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def _emoji(row: dict[str, Any]) -> Emoji:
    name = _plain(row["name"])
    others = tuple(other for other in map(_plain, row["short_names"]) if other != name)
    return Emoji(name, others, _plain(row["subcategory"]))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(SEPARATORS).split())
