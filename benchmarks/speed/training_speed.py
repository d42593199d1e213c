"""The speed of the training engine against a plain loop of the same maths, and its memory by blocks.

    python -m benchmarks.speed.training_speed [--pairs 12] [--batch 8] [--threads 1]

Speed: the CIFAR-10 recipe's model with patches of 4 (12 blocks of width 384, 64 tokens), fast approximate distillation
in float32. `HandWritten` is a plain loop for this one model: diffusers' blocks, torch.optim, no framework. Engine and
loop alternate within one process, a step each. The ratio of a pair is the loop's time over the engine's, so 1.0 is the
throughput of the loop. `loss_difference` is the relative difference of both losses on the same rows, times and noise.

Memory: the same block in backbones of 12 and 24 blocks, with the loop over the last five blocks of both, so that the
gradient passes through the same blocks. A new process measures each: the growth of its peak memory over the loaded
model, and the bytes of optimizer and checkpoint (Linux, glibc).
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import Tensor, nn

from benchmarks.record import append_rows
from ilf_trt import ILFModel, attach
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Loop
from ilf_trt.process_memory import peak_mib
from ilf_trt.train.batch_stream import Batch, MemoryStream
from ilf_trt.train.checkpoints import Base
from ilf_trt.train.loop import RunSetup, Training
from ilf_trt.train.recipe import Recipe

ROWS, CLASSES, DROPOUT = 512, 10, 0.1
BLOCKS, DEEP, LOOP = 12, 24, (3, 7)
WARM_UPS, MEMORY_STEPS = 2, 3
MIB = 1 << 20


class HandWritten:
    """One model, one loss, one device."""

    def __init__(self, backbone: DiTTransformer2DModel, loop: tuple[int, int], rows: Batch, batch: int) -> None:
        self.backbone = backbone.requires_grad_(False).eval()
        self.begin, self.end = loop
        self.block = deepcopy(backbone.transformer_blocks[self.end]).requires_grad_(True)
        self.scales = nn.Parameter(torch.zeros(self.end - self.begin + 1))
        self.trained = [*self.block.parameters(), self.scales]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.block.parameters())}, {"params": [self.scales], "lr": 1e-3}],
            lr=1e-4,
            weight_decay=0.0,
        )
        self.pictures, self.labels = rows.x0, rows.conditions["class_labels"]
        self.alphas = DPMSolverMultistepScheduler().alphas_cumprod
        self.size = batch

    def step(self) -> Tensor:
        indices = torch.randint(0, len(self.pictures), (self.size,))
        labels = torch.where(torch.rand(self.size) < DROPOUT, CLASSES, self.labels[indices])
        noise = torch.randn(self.size, *self.pictures.shape[1:])
        loss = self.loss(self.pictures[indices], labels, torch.randint(0, len(self.alphas), (self.size,)), noise)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()

    def loss(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        blocks = self.backbone.transformer_blocks
        with torch.no_grad():
            half = t // 2
            teacher = self.backbone(self.add_noise(x0, noise, half), timestep=half, class_labels=labels).sample
            tokens = self.backbone.pos_embed(self.add_noise(x0, noise, t))
            for block in blocks[: self.begin]:
                tokens = block(tokens, timestep=t, class_labels=labels)
            features = tokens
            for block in blocks[self.begin : self.end + 1]:
                features = block(features, timestep=t, class_labels=labels)
        feedback = self.block(features, timestep=t, class_labels=labels)
        for scale, block in zip(self.scales, blocks[self.begin : self.end + 1], strict=True):
            tokens = block(tokens + scale * feedback, timestep=t, class_labels=labels)
        for block in blocks[self.end + 1 :]:
            tokens = block(tokens, timestep=t, class_labels=labels)
        student = self.head(tokens, t, labels)
        return F.mse_loss(student, noise) + F.mse_loss(student, teacher)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = self.alphas[t].reshape(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def head(self, tokens: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        model: Any = self.backbone
        condition = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=tokens.dtype)
        shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        tokens = model.proj_out_2(model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        side, patch = int(tokens.shape[1] ** 0.5), model.config.patch_size
        patches = tokens.reshape(-1, side, side, patch, patch, model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, model.out_channels, side * patch, side * patch)


def new_backbone(blocks: int = BLOCKS) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    config = {**Recipe.read("cifar10").model.config, "patch_size": 4, "num_layers": blocks}
    return DiTTransformer2DModel(**config)


def new_rows() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(ROWS, 3, 32, 32, generator=generator) * 2 - 1
    return Batch(x0, {"class_labels": torch.randint(0, CLASSES, (ROWS,), generator=generator)})


def new_engine(model: ILFModel, batch: int, folder: Path, loop: tuple[int, int] = LOOP) -> Training:
    changes = [f"optimisation.batch_size={batch}", "optimisation.warm_up=0", "compute.precision=fp32"]
    recipe = Recipe.read("cifar10", changes)
    recipe = replace(recipe, model=replace(recipe.model, loop=Loop(*loop)))
    stream = MemoryStream(new_rows(), global_batch=batch, seed=0)
    setup = RunSetup(folder, Base("nowhere", "0" * 64), DEFAULT_SCHEDULER, cpu=True)
    return Training(model, recipe, stream, setup)


def speed(pairs: int, batch: int, folder: Path) -> dict[str, Any]:
    backbone, rows = new_backbone(), new_rows()
    hand = HandWritten(backbone, LOOP, rows, batch)
    engine = new_engine(attach(backbone, LOOP), batch, folder)
    difference = _loss_difference(hand, engine, rows, batch)
    batches = engine.stream.batches(start_iteration=1, rank=0, world=1)
    times: dict[str, list[float]] = {"engine": [], "hand": []}
    for pair in range(WARM_UPS + pairs):
        order = ("engine", "hand") if pair % 2 else ("hand", "engine")
        for name in order:
            start_s = perf_counter()
            engine.step(batches) if name == "engine" else hand.step()
            times[name].append(1e3 * (perf_counter() - start_s))
    engine.close()
    engine_ms, hand_ms = times["engine"][WARM_UPS:], times["hand"][WARM_UPS:]
    ratios = sorted(h / e for e, h in zip(engine_ms, hand_ms, strict=True))
    return {
        "what": "speed",
        "blocks": BLOCKS,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "warm_ups": WARM_UPS,
        "n": pairs,
        "engine_step_p50_ms": f"{median(engine_ms):.1f}",
        "hand_written_step_p50_ms": f"{median(hand_ms):.1f}",
        "throughput_ratio_p50": f"{median(ratios):.3f}",
        "ratio_min": f"{ratios[0]:.3f}",
        "ratio_max": f"{ratios[-1]:.3f}",
        "loss_difference": f"{difference:.1e}",
    }


@torch.no_grad()
def _loss_difference(hand: HandWritten, engine: Training, rows: Batch, batch: int) -> float:
    noise = torch.randn(batch, 3, 32, 32)
    time, subset = torch.randint(0, 1000, (batch,)), rows.part(slice(0, batch), torch.device("cpu"))
    scales = torch.linspace(0.2, -0.2, len(hand.scales))
    for parameter in (hand.scales, engine.model.feedback.scales):
        parameter.copy_(scales)
    ours = engine.objective.total(engine.objective(subset, time, noise, torch.zeros(batch))).item()
    theirs = hand.loss(subset.x0, subset.conditions["class_labels"], time, noise).item()
    for parameter in (hand.scales, engine.model.feedback.scales):
        parameter.zero_()
    return abs(ours - theirs) / theirs


def memory(blocks: int, batch: int) -> dict[str, Any]:
    """Measure in a new process, because peak memory never falls."""
    command = [sys.executable, "-m", "benchmarks.speed.training_speed", "--one", str(blocks), str(batch)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return row


def _measure_memory(blocks: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    loop = (blocks - 5, blocks - 1)
    with tempfile.TemporaryDirectory() as folder:
        model = attach(new_backbone(blocks), loop)
        engine = new_engine(model, batch, Path(folder), loop)
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # free what the construction of the model left
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before_mib = psutil.Process().memory_info().rss / MIB
        batches: Iterator[Any] = engine.stream.batches(start_iteration=1, rank=0, world=1)
        for _ in range(MEMORY_STEPS):
            engine.step(batches)
        growth_mib = peak_mib() - before_mib
        engine.save()
        engine.close()
        state = [value for moments in engine.optimizer.state.values() for value in moments.values()]
        checkpoint = sum(path.stat().st_size for path in Path(folder).rglob("steps/*/*") if path.is_file())
    return {
        "what": f"memory, {blocks} blocks",
        "blocks": blocks,
        "batch": batch,
        "threads": 1,
        "n": MEMORY_STEPS,
        "backbone_mib": f"{sum(p.numel() for p in model.backbone.parameters()) * 4 / MIB:.1f}",
        "trained_mib": f"{sum(p.numel() for p in model.feedback.parameters()) * 4 / MIB:.1f}",
        "optimizer_mib": f"{sum(x.numel() * x.element_size() for x in state) / MIB:.1f}",
        "checkpoint_mib": f"{checkpoint / MIB:.1f}",
        "peak_growth_mib": f"{growth_mib:.0f}",
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_measure_memory(*map(int, sys.argv[2:]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [speed(options.pairs, options.batch, Path(folder))]
    rows += [memory(blocks, options.batch) for blocks in (BLOCKS, DEEP)]
    columns = dict.fromkeys(name for row in rows for name in row)
    complete = [{name: row.get(name, "") for name in columns} for row in rows]
    command = (
        f"python -m benchmarks.speed.training_speed --pairs {options.pairs} --batch {options.batch} "
        f"--threads {options.threads}"
    )
    print(append_rows("training", command, complete, key=("what",)), *rows, sep="\n")


if __name__ == "__main__":
    main()
