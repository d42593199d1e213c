"""The demo: trains a small DiT on scikit-learn's real 8x8 digits, then its feedback block."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import Tensor

from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.errors import CheckpointError
from ilf_trt.model.base import BASE_FOLDER, base_scheduler
from ilf_trt.model.checkpoint import fingerprint, save_ilf
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.surgery import attach

from .batch_stream import Batch
from .checkpoints import Base
from .data.digits import CLASSES, digit_batches, digits_stream
from .folder_lock import locked
from .loop import RunSetup, facts_of
from .loop import train as train_feedback
from .losses import add_noise
from .recipe import Recipe

TRAINING_FOLDER = "training"
BASE_BATCH = 128
BASE_ITERATIONS = 10_000
BASE_LEARNING_RATE = 1.5e-3
WARMUP = 500


def new_base() -> DiTTransformer2DModel:
    """The untrained base: 12 blocks, width 64, 16 tokens, 10 classes and the null class; adaptive norms at zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        num_layers=12,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    start_from_zero(model)
    return model


def start_from_zero(model: DiTTransformer2DModel) -> None:
    """Set the adaptive norms and the head of an untrained DiT to zero, in place."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def new_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order over 1,000 linear betas."""
    return DPMSolverMultistepScheduler(num_train_timesteps=1000, solver_order=2, timestep_spacing="linspace")


def train(
    output: Path,
    *,
    seed: int,
    base_iterations: int | None = None,
    feedback_iterations: int | None = None,
    threads: int = 1,
    progress: Progress = no_progress,
) -> None:
    """Train base and feedback block into `output`. With 0 base iterations, train the feedback on the base in `output`.

    One torch thread takes sums in one order, so a seed gives the same weights again; more threads change the rounding.
    Raises CheckpointError if there is no base to keep, MissingDependency without scikit-learn.
    """
    if base_iterations == 0 and not (output / BASE_FOLDER).is_dir():
        raise CheckpointError(f"{output} holds no base to keep; leave out --base-iterations 0")
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, doing="trains in"), ExitStack() as restored:
        restored.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        if base_iterations != 0:
            train_base(output, seed=seed, iterations=base_iterations or BASE_ITERATIONS, progress=progress)
        changes = [] if feedback_iterations is None else [f"optimisation.iterations={feedback_iterations}"]
        train_demo_feedback(output, Recipe.read("demo", [f"seed={seed}", *changes]), progress=progress)


def train_base(output: Path, *, seed: int, iterations: int, progress: Progress = no_progress) -> None:
    """Train the base and write it as a diffusers folder: `transformer/` and `scheduler/` under `output`."""
    torch.manual_seed(seed)
    model = new_base().eval()
    scheduler = new_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, BASE_LEARNING_RATE, total_steps=iterations, pct_start=min(0.3, WARMUP / iterations)
    )
    batches = digit_batches(BASE_BATCH, seed)
    for iteration in range(1, iterations + 1):
        loss = _base_loss(model, next(batches), scheduler.alphas_cumprod)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        progress("base", iteration, iterations, f"loss {loss.item():.4f}")
    shutil.rmtree(output / TRAINING_FOLDER, ignore_errors=True)  # it belongs to the old base
    model.save_pretrained(output / BASE_FOLDER)
    scheduler.save_pretrained(output / "scheduler")


def _base_loss(model: DiTTransformer2DModel, batch: Batch, alphas_cumprod: Tensor) -> Tensor:
    size, times = len(batch.x0), len(alphas_cumprod)
    time = ((torch.arange(size) + torch.rand(1)) / size * times).long()  # stratified: a steadier gradient
    noise = torch.randn_like(batch.x0)
    return F.mse_loss(model(add_noise(batch.x0, noise, time, alphas_cumprod), time, **batch.conditions).sample, noise)


def train_demo_feedback(output: Path, recipe: Recipe, *, progress: Progress = no_progress) -> ILFModel:
    """Train the feedback block on the base under `output`, and write the ILF checkpoint to `output`.

    The training keeps its own files in `training/`, and resumes from them.
    """
    base = DiTTransformer2DModel.from_pretrained(output / BASE_FOLDER, use_safetensors=True, low_cpu_mem_usage=False)
    model = attach(base, recipe.model.loop, initialisation=recipe.model.initialisation)
    source = str((output / BASE_FOLDER).resolve())
    outcome = train_feedback(
        model,
        recipe,
        digits_stream(global_batch=recipe.optimisation.batch_size, seed=recipe.seed),
        RunSetup(
            output / TRAINING_FOLDER,
            Base(source, fingerprint(base)),
            base_scheduler(source),
            cpu=True,
            labels=tuple(range(CLASSES)),
        ),
        progress=progress,
    )
    save_ilf(model, output, base=BASE_FOLDER, training=facts_of(recipe, outcome))
    return model
