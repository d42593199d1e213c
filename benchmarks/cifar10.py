"""CIFAR-10 in arrays, and the small class-conditional DiT that the study trains its feedback blocks on.

    python benchmarks/cifar10.py --data FOLDER --output build/cifar10/base
    python benchmarks/cifar10.py --data FOLDER --width 384 --patch 2 --iterations 100000   # the recipe's, for a GPU

FOLDER holds `train_<class>_*.webp` and `test_<class>_*.webp`: lossless mosaics of 32x32 tiles, 50 a row, row by row.
The base is DiT in diffusers' format, trained to predict the noise; what is kept is the mean of its weights over time.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ilf_trt.demo import NULL_SHARE, new_scheduler, start_from_zero
from ilf_trt.losses import noised

CLASSES, SIDE, HEAD_WIDTH = 10, 32, 32
BATCH = 128
LEARNING_RATE = 1e-3
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
    """Train the base and write `transformer/` and `scheduler/`; a training that was stopped goes on."""
    pixels, targets = (torch.from_numpy(array) for array in read(data, "train"))
    torch.manual_seed(seed)
    model = new_base(width, patch).eval().to(device)
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    state, facts = output / "state.safetensors", output / "state.json"
    first = 1
    if state.exists():
        first = json.loads(facts.read_text())["iteration"] + 1
        _restore(load_file(state), model, mean, optimizer)
    alphas = new_scheduler().alphas_cumprod
    forward = torch.compile(model) if compiled else model
    output.mkdir(parents=True, exist_ok=True)
    began, total = time.perf_counter(), 0.0
    for iteration in range(first, iterations + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(iteration, iterations)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        loss = _loss(forward, *_batch(pixels, targets, alphas, generator, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = min(0.5 ** (1 / MEAN_HALF_LIFE), iteration / (iteration + 10))
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - share)
        total += loss.item()
        if iteration % 50 == 0:
            row = {"iteration": iteration, "loss": total / 50, "seconds": round(time.perf_counter() - began, 1)}
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            total = 0.0
        if iteration % SAVE_EVERY == 0 or iteration == iterations:
            _save(output, model, mean, optimizer, iteration)


def _batch(
    pixels: Tensor, targets: Tensor, alphas: Tensor, generator: torch.Generator, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t and noise (B, 3, 32, 32), time and labels (B,), drawn on the CPU whatever the device."""
    chosen = torch.randint(0, len(pixels), (BATCH,), generator=generator)
    flipped = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
    dropped = torch.rand(BATCH, generator=generator) < NULL_SHARE
    start = torch.rand(1, generator=generator)
    time_ = ((torch.arange(BATCH) + start) / BATCH * len(alphas)).long()  # stratified: a steadier gradient
    noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    x0 = pixels[chosen].permute(0, 3, 1, 2) / 127.5 - 1
    x0 = torch.where(flipped, x0.flip(-1), x0)
    x_t = noised(x0, noise, time_, alphas)
    labels = torch.where(dropped, CLASSES, targets[chosen])
    return x_t.to(device), noise.to(device), time_.to(device), labels.to(device)


def _loss(forward: torch.nn.Module, x_t: Tensor, noise: Tensor, time_: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(x_t.device.type, torch.bfloat16):
        predicted = forward(x_t, time_, class_labels=labels, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise)


def _rate(iteration: int, iterations: int) -> float:
    """Warm-up, then constant, then a linear fall over the last third."""
    return min(1.0, iteration / WARMUP, 3 * (1 - iteration / (iterations + 1)))


def _save(
    output: Path, model: DiTTransformer2DModel, mean: dict[str, Tensor], optimizer: torch.optim.Optimizer, done: int
) -> None:
    kept = type(model).from_config(model.config)
    kept.load_state_dict({name: value.cpu() for name, value in mean.items()})
    kept.save_pretrained(output / "transformer")
    new_scheduler().save_pretrained(output / "scheduler")
    moments = {
        f"{kind}.{index}": values[kind]
        for index, values in optimizer.state_dict()["state"].items()
        for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    means = {f"mean.{name}": value for name, value in mean.items()}
    save_file({**moments, **weights, **means}, output / "state.partial")
    (output / "state.partial").replace(output / "state.safetensors")
    (output / "state.json").write_text(json.dumps({"iteration": done}))


def _restore(
    saved: dict[str, Tensor],
    model: DiTTransformer2DModel,
    mean: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    model.load_state_dict({name[6:]: value for name, value in saved.items() if name.startswith("model.")})
    mean.update({name[5:]: value for name, value in saved.items() if name.startswith("mean.")})
    table = optimizer.state_dict()
    for index in table["param_groups"][0]["params"]:
        table["state"][index] = {kind: saved[f"{kind}.{index}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(table)


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
