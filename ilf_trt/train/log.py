"""What a training leaves to look at: JSON lines, TensorBoard where it is installed, and grids of samples."""

import json
import logging
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ilf_trt.contract.plan import make_plan
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import generate
from ilf_trt.train.losses import autocasting
from ilf_trt.train.recipe import Logging

LOG_FILE, TENSORBOARD_FOLDER, SAMPLES_FOLDER = "log.jsonl", "tensorboard", "samples"
PARTIAL = ".partial"
SMALLEST_PICTURE = 64
logger = logging.getLogger(__name__)


class TrainingLog:
    """A context: one line an entry, in `log.jsonl` and in TensorBoard; lines after `iteration` are dropped first."""

    def __init__(self, folder: Path, iteration: int) -> None:
        path = folder / LOG_FILE
        kept = [line for line in _lines(path) if json.loads(line)["iteration"] <= iteration]
        beside = folder / f".{LOG_FILE}{PARTIAL}"
        beside.write_text("".join(f"{line}\n" for line in kept))
        beside.replace(path)  # a process that dies here leaves the old log
        self._file = path.open("a")
        self._board: Any = None
        try:
            board = import_module("torch.utils.tensorboard")
        except ImportError:
            logger.info("tensorboard is not installed, the log is %s alone; pip install 'ilf-trt[train]'", path)
        else:
            self._board = board.SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=iteration + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, iteration: int, facts: dict[str, Any]) -> None:
        """Numbers, and lists of numbers that TensorBoard gets one by one."""
        self._file.write(json.dumps({"iteration": iteration, **facts}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in facts.items():
                values = (
                    {f"{name}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
                )
                for tag, number in values.items():
                    self._board.add_scalar(tag, number, iteration)
            self._board.flush()


class Sampler:
    """Grids of samples of a model of classes in pixels: the same labels and noise every time."""

    def __init__(self, folder: Path, settings: Logging, scheduler: dict[str, Any], labels: list[int]) -> None:
        self.folder, self.settings, self.scheduler = folder / SAMPLES_FOLDER, settings, scheduler
        self.labels = torch.tensor(labels)

    @staticmethod
    def serves(model: ILFModel) -> bool:
        """Whether pictures of this model can be shown without a VAE and without text."""
        return model.adapter.kind == "dit" and model.adapter.latent[0] in (1, 3)

    def write(self, model: ILFModel, iteration: int, autocast: torch.dtype | None) -> Path:
        """One PNG, as square as it goes."""
        plan = make_plan(self.scheduler, self.settings.steps, blocks=len(model.adapter.blocks), loop=model.loop)
        noise = torch.randn((len(self.labels), *model.adapter.latent), generator=torch.Generator().manual_seed(0))
        device = next(model.parameters()).device
        guidance = self.settings.guidance_scale
        with autocasting(device.type, autocast):
            pictures = generate(
                model,
                plan,
                self.scheduler,
                {"class_labels": self.labels},
                noise,
                guidance_scale=guidance,
                guidance=guidance != 1.0,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{iteration:08d}.png"
        _grid(pictures).save(path)
        return path


def _grid(pictures: Tensor) -> Image.Image:
    """(B, 1 or 3, H, W) in [-1, 1] -> one picture, small ones enlarged."""
    count, channels, height, width = pictures.shape
    columns = ceil(count**0.5)
    rows = ceil(count / columns)
    whole = np.zeros((rows * height, columns * width, channels), np.uint8)
    for index, picture in enumerate(((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()):
        top, left = index // columns * height, index % columns * width
        whole[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    scale = ceil(SMALLEST_PICTURE / height)
    image = Image.fromarray(whole[..., 0] if channels == 1 else whole)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a line that a dying process cut short is left out, a log of something else refused."""
    if not path.is_file():
        return []
    whole = path.read_text().split("\n")[:-1]
    for line in whole:
        try:
            json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{path} is no log of a training ({error!r}); remove it or pass another --output"
            ) from error
    return whole
