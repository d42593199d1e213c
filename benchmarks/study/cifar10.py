"""CIFAR-10 in arrays, and the small class-conditional DiT that the study trains its feedback blocks on.

    python -m benchmarks.study.cifar10 --data FOLDER --output build/cifar10/base
    python -m benchmarks.study.cifar10 --data FOLDER --width 384 --patch 2 --iterations 100000   # for a GPU

FOLDER holds `train_<class>_*.webp` and `test_<class>_*.webp`: lossless mosaics of 32x32 tiles, 50 a row, row by row.
The base is a DiT in diffusers' format, trained to predict the noise. The command writes the running mean of its
weights, in float16. It wrote `benchmarks/bases/cifar10`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.study.arithmetic import arithmetic_on
from benchmarks.study.base_training import Course, train_base
from ilf_trt.train.data.digits import NULL_SHARE
from ilf_trt.train.demo import new_scheduler, start_from_zero
from ilf_trt.train.losses import add_noise

CLASSES, SIDE, HEAD_WIDTH = 10, 32, 32
BATCH = 128
WARMUP = 300
MEAN_HALF_LIFE = 200  # iterations of the weights' running mean
SAVE_EVERY = 250


def read(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures (N, 32, 32, 3) and labels (N,) of `train` or `test`, class by class."""
    pictures, labels = [], []
    for path in sorted(folder.glob(f"{split}_*.webp")):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
        tiles = sheet.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
        count = int(path.stem.rstrip("b").rpartition("_")[2])
        pictures.append(tiles[:count])
        labels.append(np.full(count, int(path.stem.split("_")[1])))
    if not pictures:
        raise SystemExit(f"{folder} holds no {split}_*.webp; give the folder of the mosaics")
    return np.concatenate(pictures), np.concatenate(labels)


def pictures_of(tiles: Tensor) -> Tensor:
    """Tiles uint8 (N, H, W, C) -> pictures (N, C, H, W) in [-1, 1]."""
    return tiles.permute(0, 3, 1, 2) / 127.5 - 1


def new_base(width: int, patch: int) -> DiTTransformer2DModel:
    """The untrained base: 12 blocks of `width`, patches of `patch` pixels; adaptive norms and the head from zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        in_channels=3,
        out_channels=3,
        num_layers=12,
        sample_size=SIDE,
        patch_size=patch,
        num_embeds_ada_norm=CLASSES,
    )
    start_from_zero(model)
    return model


def train(
    data: Path, output: Path, *, width: int, patch: int, iterations: int, seed: int, compiled: bool, device: str
) -> None:
    """Train the base and write `transformer/` and `scheduler/`; resumes a stopped training."""
    pixels, targets = (torch.from_numpy(array) for array in read(data, "train"))
    torch.manual_seed(seed)
    model = new_base(width, patch).eval().to(device)
    alphas = new_scheduler().alphas_cumprod
    forward = torch.compile(model) if compiled else model

    def loss_of(iteration: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        return _loss(forward, *_batch(pixels, targets, alphas, generator, device))

    def write(mean: dict[str, Tensor]) -> None:
        base = type(model).from_config(model.config)
        base.load_state_dict({name: value.cpu() for name, value in mean.items()})
        base.half().save_pretrained(output / "transformer")
        new_scheduler().save_pretrained(output / "scheduler")

    with arithmetic_on(device):
        train_base(model, loss_of, output, Course(iterations, WARMUP, MEAN_HALF_LIFE, SAVE_EVERY), write)


def _batch(
    pixels: Tensor, targets: Tensor, alphas: Tensor, generator: torch.Generator, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t and noise (B, 3, 32, 32), time and labels (B,); the CPU draws them for every device."""
    indices = torch.randint(0, len(pixels), (BATCH,), generator=generator)
    flipped = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
    dropped = torch.rand(BATCH, generator=generator) < NULL_SHARE
    start = torch.rand(1, generator=generator)
    time_ = ((torch.arange(BATCH) + start) / BATCH * len(alphas)).long()  # stratified: a steadier gradient
    noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    x0 = pictures_of(pixels[indices])
    x0 = torch.where(flipped, x0.flip(-1), x0)
    x_t = add_noise(x0, noise, time_, alphas)
    labels = torch.where(dropped, CLASSES, targets[indices])
    return x_t.to(device), noise.to(device), time_.to(device), labels.to(device)


def _loss(forward: torch.nn.Module, x_t: Tensor, noise: Tensor, time_: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(x_t.device.type, torch.bfloat16):
        predicted = forward(x_t, time_, class_labels=labels, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the mosaics")
    parser.add_argument("--output", type=Path, default=Path("build/cifar10/base"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.data,
        options.output,
        width=options.width,
        patch=options.patch,
        iterations=options.iterations,
        seed=options.seed,
        compiled=not options.eager,
        device=options.device,
    )


if __name__ == "__main__":
    main()
