"""Measures the largest magnitude that enters every Linear of the blocks, along real trajectories."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt.contract.arrays import read_conditions
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import Calibration
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import FEEDBACK, Role
from ilf_trt.contract.spec import Calibrator, ModelSpec
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import move_to, sample

SEED = 0
PICTURES = 16
PICTURES_AT_ONCE = 4


def calibration_conditions(spec: ModelSpec, path: Path | None) -> dict[str, Tensor]:
    """Conditions from an .npz; for a model of classes, labels spread over all of them. Raises InvalidRequest."""
    if path is not None:
        arrays, _ = spec.conditioning.validate(read_conditions(path), guidance=spec.guidance)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    label, classes = spec.conditioning.port(Role.LABEL), spec.conditioning.classes
    if label is None or classes is None or len(spec.conditions) > 1:
        names = ", ".join(port.name for port in spec.conditions)
        raise InvalidRequest(f"fp8 needs real conditions to calibrate on; pass --calibration FILE.npz with {names}")
    return {label.name: torch.linspace(0, classes - 1, min(PICTURES, classes)).round().to(torch.int32)}


def calibration_of_bundle(path: Path, model: ILFModel, spec: ModelSpec, exclude: tuple[str, ...]) -> Calibration:
    """The calibration that an FP8 bundle was built with, for the same Linears of another checkpoint.

    Scales that stay leave every graph as it was but the feedback block's own. Raises BundleError, InvalidRequest.
    """
    calibration = Bundle.open(path).manifest.fp8
    if calibration is None:
        raise InvalidRequest(f"--calibration {path} is no FP8 bundle; pass one, or an .npz with conditions")
    different = sorted(_chosen(model, spec, exclude).keys() ^ calibration.amax.keys())
    if different:
        raise InvalidRequest(
            f"--calibration {path} is for other Linears: only one of the two has {different[0]}; calibrate again, or "
            "pass the same --fp8-exclude"
        )
    return calibration


def calibrate(
    model: ILFModel,
    plan: StepPlan,
    scheduler: Mapping[str, Any],
    spec: ModelSpec,
    conditions: Mapping[str, Tensor],
    *,
    guidance_scale: float,
    exclude: tuple[str, ...] = (),
    calibrator: Calibrator = Calibrator.AUTO,
    device: str = "cpu",
) -> Calibration:
    """Sample every picture of `conditions` along `plan`, feedback and plain steps as they come, and watch the Linears.

    `model` is in float32. `exclude` drops Linears by shell pattern. Raises InvalidRequest if a pattern of
    `exclude` matches no Linear, if `exclude` leaves none, or if the plan never runs one; MissingDependency if Model
    Optimizer shall calibrate and is not installed.
    """
    linears = _chosen(model, spec, exclude)
    pictures = len(next(iter(conditions.values())))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        noise = torch.randn(pictures, *spec.latent)

    def sample_all() -> None:
        for begin in range(0, pictures, PICTURES_AT_ONCE):
            part = slice(begin, begin + PICTURES_AT_ONCE)
            sample(
                model,
                plan,
                scheduler,
                {name: value[part] for name, value in conditions.items()},
                noise[part],
                guidance_scale=guidance_scale,
                guidance=spec.guidance,
            )

    if calibrator is Calibrator.AUTO:
        calibrator = Calibrator.MODELOPT if find_spec("modelopt") else Calibrator.OWN
    with move_to(model, device):
        measure = _with_modelopt if calibrator is Calibrator.MODELOPT else _with_hooks
        amax = measure(linears, sample_all)
    unseen = sorted(linears.keys() - amax.keys())
    if unseen:
        raise InvalidRequest(
            f"{unseen[0]} never ran during calibration: the plan has no feedback; pass --feedback outer:1 or more"
        )
    return Calibration(calibrator, pictures, amax)


def quantizable(model: ILFModel, spec: ModelSpec) -> dict[str, nn.Linear]:
    """The Linears that run at every pass of a block, by their name in the model; embedders and head are not among."""
    blocks = {f"{spec.block_path}.{index}": block for index, block in enumerate(model.adapter.blocks)}
    blocks[FEEDBACK] = model.feedback.block
    hoisted = {
        name.removesuffix(".weight")
        for name in model.adapter.hoisted_parameters(model.feedback.block, hoist_text=bool(spec.per_block))
    }
    return {
        f"{path}.{name}": layer
        for path, block in blocks.items()
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[0] in model.adapter.linears and name not in hoisted
    }


def _chosen(model: ILFModel, spec: ModelSpec, exclude: tuple[str, ...]) -> dict[str, nn.Linear]:
    linears = quantizable(model, spec)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise InvalidRequest(
                f"--fp8-exclude {pattern!r} matches no Linear; they are named as {next(iter(linears))}, "
                f"patterns as {spec.block_path}.0.* or *.to_out.0"
            )
    chosen = {name: layer for name, layer in linears.items() if not any(fnmatchcase(name, p) for p in exclude)}
    if not chosen:
        raise InvalidRequest("--fp8-exclude leaves no Linear to quantise; build with --precision fp16")
    return chosen


def _with_hooks(linears: Mapping[str, nn.Linear], sample: Callable[[], None]) -> dict[str, float]:
    amax: dict[str, float] = {}

    def see(name: str, value: Tensor) -> None:
        amax[name] = max(amax.get(name, 0.0), float(value.abs().max()))

    _watch(linears, see, sample)
    return amax


def _with_modelopt(linears: Mapping[str, nn.Linear], sample: Callable[[], None]) -> dict[str, float]:
    """By Model Optimizer's own quantisers, which look on and quantise nothing."""
    try:
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
    except ImportError as error:
        raise MissingDependency(
            f"Model Optimizer cannot be loaded ({error}); pip install nvidia-modelopt, or pass --calibrator own"
        ) from error
    quantizers = {
        name: TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=None), if_quant=False, if_calib=True)
        for name in linears
    }
    _watch(linears, lambda name, value: quantizers[name](value), sample)
    amax = {name: quantizer._calibrator.compute_amax() for name, quantizer in quantizers.items()}
    return {name: float(value) for name, value in amax.items() if value is not None}


def _watch(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor], object], sample: Callable[[], None]) -> None:
    """Show `see` every input of every Linear while `sample` runs."""

    def show(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(name, inputs[0])

    with ExitStack() as hooks:
        for name, layer in linears.items():
            hooks.callback(layer.register_forward_pre_hook(partial(show, name)).remove)
        sample()
