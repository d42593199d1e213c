"""Small data on the disk: pictures whose colour says which they are, tar shards of them, a VAE and a text encoder."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ilf_trt.errors import BrokenSample
from ilf_trt.train.data.prepare import Preparation
from ilf_trt.train.data.sample import Condition, Sample
from tests.conftest import TEXT_CHANNELS, TEXT_TOKENS


def encoded(seed: int, side: int = 8, form: str = "PNG") -> bytes:
    """A picture file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_classes(folder: Path, counts: Mapping[str, int], side: int = 8) -> Path:
    """A subfolder for every class."""
    seed = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(encoded(seed, side))
            seed += 1
    return folder


def write_captions(folder: Path, count: int, side: int = 8) -> Path:
    """Pictures and metadata.jsonl."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(number, side))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"Picture number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Numbers:
    """A source of `size` samples whose x0 is their index; those in `broken` cannot be read."""

    condition, shape, null = Condition.LABEL, (1, 2, 2), None

    def __init__(self, size: int, broken: Sequence[int] = (), classes: int | None = None) -> None:
        self.size, self.broken, self.classes = size, broken, classes

    def __len__(self) -> int:
        return self.size

    def key(self, index: int) -> str:
        return f"n{index}"

    def read(self, index: int) -> Sample:
        if index in self.broken:
            raise BrokenSample(self.key(index), "is broken")
        x0 = torch.tensor([[[index, 0.0], [0.0, 0.0]]])
        return Sample(self.key(index), x0, (2, 2), label=index)


class Words:
    """Stands in for T5: a caption is embedded as its length, one token a word."""

    def __init__(self, tokens: int = TEXT_TOKENS, channels: int = TEXT_CHANNELS) -> None:
        self.tokens, self.channels, self.captions = tokens, channels, list[str]()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.captions += captions
        text = torch.zeros(len(captions), self.tokens, self.channels)
        mask = torch.zeros(len(captions), self.tokens, dtype=torch.int64)
        for row, caption in enumerate(captions):
            text[row] = len(caption)
            mask[row, : len(caption.split()) + 1] = 1
        return text, mask


class Halves:
    """Stands in for a VAE: 2x2 means of every channel, and their mean as a fourth."""

    def encode(self, pixels: Tensor, indices: Sequence[int]) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


def preparation(**changes: Any) -> Preparation:
    options: dict[str, Any] = {
        "settings": {"size": 8},
        "dtype": "fp32",
        "shard_size": 4,
        "batch": 3,
        "max_broken": 100,
        "workers": 1,
    }
    return Preparation(**{**options, **changes})


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKL, 4 channels, a factor of 2, with a shift."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    model.save_pretrained(folder)
    return folder


Pull = Callable[..., list[tuple[int, list[str]]]]


@pytest.fixture
def pull() -> Pull:
    """Iterations and keys of the first batches of a stream; its threads are ended."""

    def pulls(stream: Any, count: int, *, start: int = 1, rank: int = 0, world: int = 1) -> list[tuple[int, list[str]]]:
        batches: Iterator[Any] = stream.batches(start_iteration=start, rank=rank, world=world)
        items = [(iteration, list(keys)) for iteration, keys, _ in (next(batches) for _ in range(count))]
        batches.close()  # type: ignore[attr-defined]
        return items

    return pulls
