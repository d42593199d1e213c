"""Writes down what torch in float32 gives for every graph and one trajectory, so that `verify` runs anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilf_trt.contract.conditions import row_conditions
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import Port
from ilf_trt.contract.reference_cases import ASKED, CASES, TRAJECTORY, TRAJECTORY_NOISE
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.export.segments import Segment, constants_of
from ilf_trt.model import sampling as reference
from ilf_trt.model.ilf_model import ILFModel

SEED = 0
PROBE_SCALE = 0.1
LARGE = 1 << 20


@torch.inference_mode()
def write_golden(
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
    beside: Mapping[str, NDArray[Any]],
) -> None:
    """Write the probe's tensors as `path` (.npz). `segments` and `model` are in float32; `device` runs the trajectory.

    `beside` are the tensors of what stands around the model.

    Tensors past a million values are stored in the bundle's own dtype, whose rounding is far below its parity limit,
    but for a wide residual, whose values may pass it. The constants lie in the bundle already.
    """
    constants = constants_of(model, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        conditions = _conditions(spec, pictures)
        noise = torch.randn(pictures, *spec.latent)
        asked = {name: value.numpy() for name, value in conditions.items()}
        rows = row_conditions(spec, asked, guided=spec.guidance)
        given = {name: torch.from_numpy(value) for name, value in rows.items()}
        tensors = _step(model, segments, plan, given | constants, noise, guidance_scale)
    tensors |= {f"{ASKED}{name}": value for name, value in conditions.items()}
    tensors[TRAJECTORY_NOISE] = noise
    with reference.placed(model, device):
        tensors[TRAJECTORY] = reference.generate(
            model, plan, scheduler, conditions, noise, guidance_scale=guidance_scale, guidance=spec.guidance
        ).cpu()
    dtype = Precision.FP32.dtype if spec.wide_residual else precision.array_dtype
    kept = {name: _stored(tensor, dtype) for name, tensor in tensors.items() if name not in constants}
    np.savez(path, allow_pickle=False, **kept, **beside)


def _step(
    model: ILFModel,
    segments: dict[str, Segment],
    plan: StepPlan,
    conditions: dict[str, Tensor],
    noise: Tensor,
    guidance_scale: float,
) -> dict[str, Tensor]:
    # not the first step: predicting the clean latent there multiplies a rounded output by a hundred, and has no history
    fed = [step for step in plan.steps if step.feedback] or list(plan.steps)
    step = fed[len(fed) // 2]
    size, pictures = model.loop.size, torch.arange(len(noise), dtype=torch.int32)
    places = model.adapter.positions_of(model.adapter.grid_of(noise.shape))
    tensors = {
        "times": torch.tensor([step.t, step.t_post]),
        "latent": noise,
        "history_1": torch.randn_like(noise),
        "history_2": torch.randn_like(noise),
        "coefficients": torch.tensor([guidance_scale, *step.solver, 0.0]),
        "scales": model.feedback.scales.detach() + PROBE_SCALE,
        "no_scales": torch.zeros(size),
        "positions": places.unflatten(1, model.adapter.grid_of(noise.shape))[0],
        "picture": pictures.repeat(2),
        "conditional": pictures,
        "unconditional": pictures + len(noise),
        **conditions,
    }
    per_time: set[str] = set()
    for case in CASES:
        segment = segments[case.graph]
        if case.graph == "loop_body":
            tensors.setdefault("no_feedback", torch.zeros_like(tensors["hidden"]))
        inputs = []
        for port in segment.graph.inputs:
            tensor = tensors[case.inputs.get(port.name, port.name)]
            inputs.append(tensor[case.time] if port.name in per_time else tensor)
        outputs = segment(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for port, output in zip(segment.graph.outputs, outputs, strict=True):
            tensors[case.outputs.get(port.name, port.name)] = output
            if port.shape[0] == "T":
                per_time.add(port.name)
    return tensors


def _conditions(spec: ModelSpec, pictures: int) -> dict[str, Tensor]:
    return {port.name: _condition(port, spec, pictures) for port in spec.conditions}


def _condition(port: Port, spec: ModelSpec, pictures: int) -> Tensor:
    shape = port.resolve({"B": pictures})
    if port.below is not None:
        return (torch.arange(pictures) % port.below).to(torch.int32)
    if port.name.endswith("mask"):
        return (torch.arange(shape[1]) < max(shape[1] // 2, 1)).float().repeat(pictures, 1)
    if port.name == "resolution":
        return torch.tensor(spec.latent[1:]).float().mul(8).repeat(pictures, 1)
    if port.name == "aspect_ratio":
        return torch.ones(shape)
    return torch.randn(shape)


def _stored(tensor: Tensor, dtype: str) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array.astype(dtype) if array.size > LARGE and array.dtype == np.float32 else array
