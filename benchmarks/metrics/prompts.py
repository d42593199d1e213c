"""Prompt lists in the formats of their official repositories, and the pictures of their prompts.

This repository has no prompts: download a list from its `url`.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ilf_trt.errors import InvalidRequest

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Prompt(NamedTuple):
    """A text, and its id, which names its pictures."""

    id: str
    text: str


class Pictured(NamedTuple):
    """A prompt and its pictures; every prompt of a list has the same number of pictures."""

    prompt: Prompt
    pictures: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class PromptList:
    """An official list: its address, its number of prompts (None means any number), and its reader."""

    name: str
    file: str
    url: str
    count: int | None
    read: Callable[[Path], Iterable[Prompt]]

    def load(self, path: Path) -> list[Prompt]:
        """Raises InvalidRequest if the file is missing, is not this list, or has another number of prompts."""
        try:
            prompts = list(self.read(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path} is not {self.file} ({error!r}); download {self.url}") from error
        if not prompts or (self.count is not None and len(prompts) != self.count):
            wanted = "at least 1" if self.count is None else str(self.count)
            raise InvalidRequest(f"{path} has {len(prompts)} prompts, {self.name} has {wanted}; download {self.url}")
        if twice := [name for name, times in Counter(prompt.id for prompt in prompts).items() if times > 1]:
            raise InvalidRequest(f"{path} has {len(twice)} ids more than once, the first is {twice[0]!r}")
        return prompts


def match_pictures(folder: Path, prompts: list[Prompt]) -> list[Pictured]:
    """The pictures of each prompt: `ID.png`, or `ID_0.png`, `ID_1.png` … for several pictures.

    Raises InvalidRequest for a prompt without a picture, a picture without a prompt, and prompts of unequal numbers.
    """
    by_id: dict[str, list[Path]] = {prompt.id: [] for prompt in prompts}
    extra = []
    for path in pictures_in(folder):
        before, _, number = path.stem.rpartition("_")
        name = path.stem if path.stem in by_id else before if number.isdecimal() else ""
        by_id.get(name, extra).append(path)
    missing = [name for name, paths in by_id.items() if not paths]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(prompts)} prompts have no picture, the first is {missing[0]}.png")
    if extra:
        faults.append(f"{len(extra)} pictures have no prompt, the first is {extra[0].name}")
    if faults:
        raise InvalidRequest(f"{folder}: {'; '.join(faults)}; name each picture by its prompt's id")
    count = len(by_id[prompts[0].id])
    if uneven := [name for name, paths in by_id.items() if len(paths) != count]:
        raise InvalidRequest(
            f"{folder}: {len(uneven)} prompts do not have {count} pictures as the first has, "
            f"{uneven[0]} has {len(by_id[uneven[0]])}; make the same number for each"
        )
    return [Pictured(prompt, tuple(by_id[prompt.id])) for prompt in prompts]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, without its subfolders, by name; raises InvalidRequest if there is none."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not paths:
        raise InvalidRequest(f"{folder} is no folder with pictures ({', '.join(PICTURES)})")
    return paths


def _numbered(texts: Iterable[str]) -> list[Prompt]:
    return [Prompt(f"{number:05d}", text) for number, text in enumerate(texts)]


def _read_lines(path: Path) -> list[Prompt]:
    return _numbered(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _read_image_reward(path: Path) -> list[Prompt]:
    return [Prompt(entry["id"], entry["prompt"]) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _read_mjhq(path: Path) -> list[Prompt]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [Prompt(name, entry["prompt"]) for name, entry in entries.items()]


def _read_parti(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8", newline="") as file:  # a prompt may begin with a quotation mark of its own
        return _numbered(row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_geneval(path: Path) -> list[Prompt]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return _numbered(json.loads(line)["prompt"] for line in lines if line.strip())


def _read_dpg_bench(path: Path) -> list[Prompt]:
    return [Prompt(file.stem, file.read_text(encoding="utf-8").strip()) for file in sorted(path.glob("*.txt"))]


LINES = PromptList("lines", "a text file with a prompt a line", "any such file", None, _read_lines)
IMAGE_REWARD = PromptList(
    "image-reward",
    "benchmark/benchmark-prompts.json",
    "https://github.com/THUDM/ImageReward/blob/main/benchmark/benchmark-prompts.json",
    100,
    _read_image_reward,
)
MJHQ_30K = PromptList(
    "mjhq-30k",
    "meta_data.json",
    "https://huggingface.co/datasets/playgroundai/MJHQ-30K/blob/main/meta_data.json",
    30_000,
    _read_mjhq,
)
PARTI = PromptList(
    "parti",
    "PartiPrompts.tsv",
    "https://github.com/google-research/parti/blob/main/PartiPrompts.tsv",
    1632,
    _read_parti,
)
GENEVAL = PromptList(
    "geneval",
    "prompts/evaluation_metadata.jsonl",
    "https://github.com/djghosh13/geneval/blob/main/prompts/evaluation_metadata.jsonl",
    553,
    _read_geneval,
)
DPG_BENCH = PromptList(
    "dpg-bench",
    "dpg_bench/prompts/, a folder of .txt",
    "https://github.com/TencentQQGYLab/ELLA/tree/main/dpg_bench/prompts",
    1065,
    _read_dpg_bench,
)
LISTS = {known.name: known for known in (LINES, IMAGE_REWARD, MJHQ_30K, PARTI, GENEVAL, DPG_BENCH)}
