"""Writes down what torch in float32 gives for every graph and one trajectory, so that `verify` runs anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilf_trt.contract.arrays import write_npz
from ilf_trt.contract.guidance import effective_scale
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.reference_cases import (
    NO_SCALES,
    REQUESTED,
    TRAJECTORY,
    TRAJECTORY_NOISE,
    Case,
    cases_of,
    no_feedback,
)
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.errors import NonFinite
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import move_to, sample

from .segments import Segment, constants_of

SEED = 0
SCALE_SHIFT = 0.1  # added to the learned scales, so that feedback shows in every block
CELL = 8  # pixels to a side of a latent's cell, in the sizes that the reference asks for
LARGE = 1 << 20


@torch.inference_mode()
def write_reference(
    path: Path,
    model: ILFModel,
    segments: dict[str, Segment],
    spec: ModelSpec,
    plan: StepPlan,
    scheduler: dict[str, Any],
    *,
    pictures: int,
    guidance_scale: float,
    precision: Precision,
    device: str = "cpu",
    of_parts: Mapping[str, NDArray[Any]],
) -> None:
    """Write the tensors of the reference cases as `path` (.npz). `segments` and `model` are in float32.

    `device` runs the trajectory; `of_parts` are the tensors of text encoder and decoder. Tensors past a million values
    are stored in the bundle's own dtype, whose rounding is far below its parity limit, unless they pass its range.
    The constants lie in the bundle already. Raises NonFinite if the model gives NaN or infinity in float32.
    """
    constants = constants_of(model, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        size = (spec.latent[1] * CELL, spec.latent[2] * CELL)
        conditions = spec.conditioning.example(
            pictures, size, guidance=spec.guidance, normal=lambda shape: torch.randn(shape).numpy()
        )
        noise = torch.randn(pictures, *spec.latent)
        rows = spec.conditioning.rows(conditions, guided=spec.guidance)
        inputs = constants | {name: torch.from_numpy(value) for name, value in rows.items()}
        tensors = _step(model, segments, plan, inputs, noise, guidance_scale)
    requested = {name: torch.from_numpy(value) for name, value in conditions.items()}
    tensors |= {f"{REQUESTED}{name}": value for name, value in requested.items()}
    tensors[TRAJECTORY_NOISE] = noise
    with move_to(model, device):
        tensors[TRAJECTORY] = sample(
            model, plan, scheduler, requested, noise, guidance_scale=guidance_scale, guidance=spec.guidance
        ).cpu()
    for name, array in of_parts.items():
        _check_finite(torch.from_numpy(array), f"the pipeline's {name!r}")
    dtype = precision.array_dtype
    arrays = {name: _array_of(tensor, dtype) for name, tensor in tensors.items() if name not in constants}
    write_npz(path, {**arrays, **of_parts})


def _step(
    model: ILFModel,
    segments: dict[str, Segment],
    plan: StepPlan,
    inputs: dict[str, Tensor],
    noise: Tensor,
    guidance_scale: float,
) -> dict[str, Tensor]:
    # not the first step: predicting the clean latent there multiplies a rounded output by a hundred, and has no history
    with_feedback = [step for step in plan.steps if step.feedback] or list(plan.steps)
    step = with_feedback[len(with_feedback) // 2]
    size, pictures = model.loop.size, torch.arange(len(noise), dtype=torch.int32)
    grid = model.adapter.grid_of(noise.shape)
    tensors = {
        "times": torch.tensor([step.t, step.t_post]),
        "latent": noise,
        "history_1": torch.randn_like(noise),
        "history_2": torch.randn_like(noise),
        "coefficients": torch.tensor([effective_scale(guidance_scale), *step.solver, 0.0]),
        "scales": model.feedback.scales.detach() + SCALE_SHIFT,
        NO_SCALES: torch.zeros(size),
        "positions": model.adapter.positions_of(grid).unflatten(1, grid)[0],
        "picture": pictures.repeat(2),
        "conditional": pictures,
        "unconditional": pictures + len(noise),
        **inputs,
    }
    spec = segments["cond"].spec
    per_time: set[str] = set()
    for case in cases_of(spec):
        _run(segments[case.graph], case, tensors, per_time)
        if case.graph == "pre":
            for stream in spec.streams:
                zeros = torch.zeros_like(tensors[stream.port_name("hidden")])
                tensors[no_feedback(stream.port_name("feedback"))] = zeros
    return tensors


def _run(segment: Segment, case: Case, tensors: dict[str, Tensor], per_time: set[str]) -> None:
    """Run one case on `tensors` and add what it gives; `per_time` names the tables with a row for each time."""
    inputs = []
    for port in segment.graph.inputs:
        tensor = tensors[case.inputs.get(port.name, port.name)]
        inputs.append(tensor[case.time] if port.name in per_time else tensor)
    outputs = segment(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for port, output in zip(segment.graph.outputs, outputs, strict=True):
        _check_finite(output, f"the model's {port.name!r} in graph {case.graph}")
        tensors[case.outputs.get(port.name, port.name)] = output
        if port.shape[0] == "T":
            per_time.add(port.name)


def _check_finite(tensor: Tensor, what: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise NonFinite(
            f"{what} holds NaN or infinity already in PyTorch in float32; its weights are damaged or too large, so "
            "check the checkpoint, its base and the pipeline"
        )


def _array_of(tensor: Tensor, dtype: str) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    if array.size <= LARGE or array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        smaller = array.astype(dtype)
    return smaller if np.isfinite(smaller).all() else array
