"""Measures the largest magnitudes that enter the Linears and attentions of the blocks, along real trajectories."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ilf_trt.contract.arrays import read_conditions
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import AttentionAmax, Calibration
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import FEEDBACK, Role
from ilf_trt.contract.spec import Calibrator, ModelSpec
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import move_to, sample

SEED = 0
PICTURES = 16
PICTURES_AT_ONCE = 4

OPERANDS = ("query", "key", "value")

See = Callable[[str, Tensor], object]


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


def calibration_of_bundle(
    path: Path, model: ILFModel, spec: ModelSpec, exclude: tuple[str, ...], *, attention: bool = False
) -> Calibration:
    """The calibration that an FP8 bundle was built with, for the same Linears and attentions of another checkpoint.

    Scales that stay leave every graph as it was but the feedback block's own. Raises BundleError, InvalidRequest.
    """
    calibration = Bundle.open(path).manifest.fp8
    if calibration is None:
        raise InvalidRequest(f"--calibration {path} is no FP8 bundle; pass one, or an .npz with conditions")
    different = sorted(_chosen(model, spec, exclude, attention=attention).keys() ^ calibration.amax.keys())
    if different:
        raise InvalidRequest(
            f"--calibration {path} is for other Linears: only one of the two has {different[0]}; calibrate again, or "
            "pass the same --fp8-exclude"
        )
    if not attention:
        return replace(calibration, attentions={})
    if not calibration.attentions:
        raise InvalidRequest(
            f"--calibration {path} has no scales of attentions; pass --no-fp8-attention, or calibrate again"
        )
    excluded = [name for name in calibration.attentions if _matches(name, exclude)]
    if excluded:
        raise InvalidRequest(
            f"--calibration {path} has {excluded[0]} in FP8; calibrate again, or pass the same --fp8-exclude"
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
    attention: bool = False,
    calibrator: Calibrator = Calibrator.AUTO,
    device: str = "cpu",
) -> Calibration:
    """Sample every picture of `conditions` along `plan`, feedback and plain steps as they come, and watch the Linears.

    `model` is in float32. `attention` watches the attentions too. `exclude` drops Linears and attentions by shell
    pattern. Raises InvalidRequest if a pattern of `exclude` matches nothing, if `exclude` leaves no Linear, or if the
    plan never runs one; MissingDependency if Model Optimizer shall calibrate and is not installed.
    """
    linears = _chosen(model, spec, exclude, attention=attention)
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
        makers = quantizable(model, spec) if attention else {}
        largest = measure(partial(_watch, linears, makers, spec.block_path, sample_all))
    amax = {name: value for name, value in largest.items() if name in linears}
    unseen = sorted(linears.keys() - amax.keys())
    if unseen:
        raise InvalidRequest(
            f"{unseen[0]} never ran during calibration: the plan has no feedback; pass --feedback outer:1 or more"
        )
    attentions = _attentions_of(largest)
    _check_exclude(exclude, [*quantizable(model, spec), *attentions], spec)
    chosen = {name: ranges for name, ranges in attentions.items() if not _matches(name, exclude)}
    return Calibration(calibrator, pictures, amax, chosen)


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


def _chosen(model: ILFModel, spec: ModelSpec, exclude: tuple[str, ...], *, attention: bool) -> dict[str, nn.Linear]:
    linears = quantizable(model, spec)
    parents = {name.rpartition(".")[0] for name in linears} if attention else set()
    _check_exclude(exclude, [*linears, *parents], spec)
    chosen = {name: layer for name, layer in linears.items() if not _matches(name, exclude)}
    if not chosen:
        raise InvalidRequest("--fp8-exclude leaves no Linear to quantise; build with --precision fp16")
    return chosen


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_exclude(patterns: tuple[str, ...], names: Sequence[str], spec: ModelSpec) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidRequest(
                f"--fp8-exclude {pattern!r} matches no Linear; they are named as {names[0]}, "
                f"patterns as {spec.block_path}.0.* or *.to_out.0"
            )


def _attentions_of(largest: Mapping[str, float]) -> dict[str, AttentionAmax]:
    """The ranges of every attention that `_Attentions` has seen."""
    names = dict.fromkeys(key.partition(":")[0] for key in largest if ":" in key)
    return {name: AttentionAmax(*(largest[f"{name}:{part}"] for part in OPERANDS)) for name in names}


def _with_hooks(watch: Callable[[See], None]) -> dict[str, float]:
    amax: dict[str, float] = {}

    def see(name: str, value: Tensor) -> None:
        amax[name] = max(amax.get(name, 0.0), float(value.abs().max()))

    watch(see)
    return amax


def _with_modelopt(watch: Callable[[See], None]) -> dict[str, float]:
    """By Model Optimizer's own quantisers, which look on and quantise nothing."""
    try:
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
    except ImportError as error:
        raise MissingDependency(
            f"Model Optimizer cannot be loaded ({error}); pip install nvidia-modelopt, or pass --calibrator own"
        ) from error
    quantizers: dict[str, Any] = {}

    def see(name: str, value: Tensor) -> None:
        if name not in quantizers:
            facts = QuantizerAttributeConfig(num_bits=(4, 3), axis=None)
            quantizers[name] = TensorQuantizer(facts, if_quant=False, if_calib=True)
        quantizers[name](value)

    watch(see)
    return {name: float(quantizer._calibrator.compute_amax()) for name, quantizer in quantizers.items()}


def _watch(
    linears: Mapping[str, nn.Linear],
    makers: Mapping[str, nn.Linear],
    block_path: str,
    sample: Callable[[], None],
    see: See,
) -> None:
    """Show `see` every input of every Linear, and of every attention between `makers`, while `sample` runs."""

    def show(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(name, inputs[0])

    with ExitStack() as hooks:
        for name, layer in linears.items():
            hooks.callback(layer.register_forward_pre_hook(partial(show, name)).remove)
        if makers:
            attentions = hooks.enter_context(_Attentions(see, block_path))
            for name, layer in makers.items():
                hooks.callback(layer.register_forward_hook(partial(attentions.keep, name)).remove)
        sample()


class _Attentions(TorchFunctionMode):
    """Shows query times scale, key and value of every attention whose operands are the whole outputs of three Linears.

    Only a view of such an output counts: the exported graph then has nothing but layout between Linear and attention.
    The attention is called as the query's Linear is, without the last part.
    """

    def __init__(self, see: See, block_path: str) -> None:
        super().__init__()
        self._see = see
        self._block_path = block_path
        self._block = ""
        self._outputs: dict[str, Tensor] = {}

    def keep(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Remember a Linear's output until the next block, so that no other tensor takes its memory."""
        block = name.removeprefix(f"{self._block_path}.").partition(".")[0]
        if block != self._block:
            self._block = block
            self._outputs.clear()
        self._outputs[name] = output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._show(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _show(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> None:
        names = [self._maker_of(operand) for operand in (query, key, value)]
        if names[0] is None or None in names:
            return
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        for part, operand in zip(OPERANDS, (query * factor, key, value), strict=True):
            self._see(f"{names[0].rpartition('.')[0]}:{part}", operand)

    def _maker_of(self, operand: Tensor) -> str | None:
        """The Linear that made a tensor, if it is a view of the whole output."""
        memory = operand.untyped_storage().data_ptr()
        for name, output in self._outputs.items():
            if output.untyped_storage().data_ptr() == memory and output.numel() == operand.numel():
                return name
        return None
