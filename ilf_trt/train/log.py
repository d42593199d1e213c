"""The log of a training: JSON lines, TensorBoard if it is installed, and grids of samples."""

import json
import logging
import os
import re
from importlib import import_module
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.ports import Role
from ilf_trt.errors import InvalidRequest, NonFinite, one_line
from ilf_trt.files import read_bytes, whole_file
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import sample

from .losses import autocasting
from .recipe import Logging

LOG_FILE, TENSORBOARD_FOLDER, SAMPLES_FOLDER = "log.jsonl", "tensorboard", "samples"
SMALLEST_PICTURE = 64
PIXEL_CHANNELS = (1, 3)
LINE = re.compile(r'\{"iteration": ([0-9]{1,15})[,}]')
MOST_LOG_BYTES = 1 << 30
logger = logging.getLogger(__name__)


class TrainingLog:
    """A context that writes entries to `log.jsonl`, one line each, and to TensorBoard.

    First it drops the lines after `iteration`. Raises InvalidRequest if `log.jsonl` is no log of a training.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        path = folder / LOG_FILE
        lines = [line for at, line in _read_lines(path) if at <= iteration]
        with whole_file(path) as draft:
            draft.write_text("".join(f"{line}\n" for line in lines))
        self._file = path.open("a")
        self._board: Any = None
        try:
            board = import_module("torch.utils.tensorboard")
        except ImportError:
            logger.info("tensorboard is not installed, so the log is only %s; pip install 'ilf-trt[train]'", path)
        else:
            self._board = board.SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=iteration + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, iteration: int, facts: dict[str, Any]) -> None:
        """Write numbers, and lists of numbers; TensorBoard gets one tag for each number of a list.

        JSON has no NaN and no infinity, such as the gradient of a skipped step in float16: the line holds null.
        """
        finite = {name: _finite(value) for name, value in facts.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in facts.items():
                for tag, number in _tags(name, value):
                    self._board.add_scalar(tag, number, iteration)
            self._board.flush()


class Sampler:
    """Grids of samples of a model of classes in pixels: the same labels and the same noise every time."""

    def __init__(self, folder: Path, settings: Logging, scheduler: dict[str, Any], labels: list[int]) -> None:
        self.folder, self.settings, self.scheduler = folder / SAMPLES_FOLDER, settings, scheduler
        self.labels = torch.tensor(labels)

    @staticmethod
    def serves(model: ILFModel) -> bool:
        """Whether the model makes pictures without a VAE and without text."""
        ports = model.adapter.conditioning(1).positive
        return all(port.role is Role.LABEL for port in ports) and model.adapter.latent[0] in PIXEL_CHANNELS

    def write(self, model: ILFModel, iteration: int, autocast: torch.dtype | None) -> Path | None:
        """Write one grid as PNG, as square as possible, and return its path.

        If a sample holds NaN or infinity, warn and write nothing: the training itself may be sound.
        """
        plan = make_plan(self.scheduler, self.settings.steps, blocks=len(model.adapter.blocks), loop=model.loop)
        noise = torch.randn((len(self.labels), *model.adapter.latent), generator=torch.Generator().manual_seed(0))
        device = next(model.parameters()).device
        try:
            with autocasting(device.type, autocast):
                pictures = sample(
                    model,
                    plan,
                    self.scheduler,
                    {port.name: self.labels for port in model.adapter.conditioning(1).positive},
                    noise,
                    guidance_scale=self.settings.guidance_scale,
                )
        except NonFinite as error:
            logger.warning("no sample grid at iteration %d: %s", iteration, error)
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{iteration:08d}.png"
        with whole_file(path) as draft:
            _grid(pictures).save(draft, "PNG")
        return path


def _grid(pictures: Tensor) -> Image.Image:
    """(B, 1 or 3, H, W) in [-1, 1] -> one image; small pictures are enlarged."""
    count, channels, height, width = pictures.shape
    columns = ceil(count**0.5)
    rows = ceil(count / columns)
    grid = np.zeros((rows * height, columns * width, channels), np.uint8)
    for index, picture in enumerate(((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()):
        top, left = index // columns * height, index % columns * width
        grid[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    scale = ceil(SMALLEST_PICTURE / height)
    image = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _tags(name: str, value: Any) -> list[tuple[str, Any]]:
    return (
        [(f"{name}/{index}", number) for index, number in enumerate(value)]
        if isinstance(value, list)
        else [(name, value)]
    )


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """The whole lines of a log with their iterations, which is all that is read of a line.

    A killed process may have cut the last line short; it is left out.
    """
    if not os.path.lexists(path):
        return []
    try:
        *lines, _ = read_bytes(path, most=MOST_LOG_BYTES).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{path} is no log of a training ({one_line(error)}); remove it or pass another --output"
        ) from error
    entries = []
    for number, line in enumerate(lines, 1):
        match = LINE.match(line)
        if match is None:
            raise InvalidRequest(
                f"{path} is no log of a training (line {number} has no iteration); remove it or pass another --output"
            )
        entries.append((int(match[1]), line))
    return entries
