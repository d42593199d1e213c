"""What accelerate's launcher and environment may ask of a training: the recipe decides the weights, they the devices.

accelerate reads its settings from the environment, where `accelerate launch` writes those of its flags and of its
configuration file. A setting that would change the weights must agree with the recipe, or is refused by name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ilf_trt.errors import InvalidRequest, one_line, shown

from .recipe import Recipe

OFF = frozenset({"", "0", "n", "no", "f", "false", "off", "none"})
PREFIX = "ACCELERATE_"
LAUNCH = "start it with `accelerate launch --multi_gpu --num_processes N`"
VALUE_CHARS = 60


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that is refused unless it is off, or agrees with the recipe: its name, and what to do instead."""

    name: str
    instead: str


CLIP, COMPILE = "set optimisation.clip in the recipe", "set compute.compile=true in the recipe"
PRECISION, ACCUMULATE = "set compute.precision in the recipe", "set optimisation.accumulate in the recipe"
REFUSED = (
    Setting("MIXED_PRECISION", PRECISION),
    Setting("FP8_BACKEND", PRECISION),
    Setting("DOWNCAST_BF16", PRECISION),
    Setting("GRADIENT_ACCUMULATION_STEPS", ACCUMULATE),
    Setting("GRADIENT_CLIPPING", CLIP),
    Setting("DYNAMO_BACKEND", COMPILE),
    Setting("USE_FSDP", LAUNCH),
    Setting("USE_DEEPSPEED", LAUNCH),
    Setting("USE_MEGATRON_LM", LAUNCH),
    Setting("USE_PARALLELISM_CONFIG", LAUNCH),
    Setting("USE_SAGEMAKER", LAUNCH),
)


def start_accelerator(recipe: Recipe, *, cpu: bool) -> Accelerator:
    """This process's place among its processes; raises InvalidRequest for a setting of accelerate that is refused."""
    check_settings(recipe, os.environ, cpu=cpu)  # accelerate itself reads them there
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[parallel])
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise InvalidRequest(f"accelerate cannot start: {one_line(error)}; correct its settings") from error


def check_settings(recipe: Recipe, environment: Mapping[str, str], *, cpu: bool) -> None:
    """Raises InvalidRequest for the first setting of accelerate that the training would not follow."""
    agreeing = {
        "MIXED_PRECISION": {recipe.compute.precision.value},
        "GRADIENT_ACCUMULATION_STEPS": {"1", str(recipe.optimisation.accumulate)},
        "GRADIENT_CLIPPING": {str(recipe.optimisation.clip)},
    }
    for setting in REFUSED:
        value = environment.get(f"{PREFIX}{setting.name}", "")
        if value.lower() not in OFF | agreeing.get(setting.name, set()):
            _refuse(f"{PREFIX}{setting.name}", value, setting.instead)
    device = environment.get(f"{PREFIX}TORCH_DEVICE", "")
    if device and not (_usable(device) and (not cpu or torch.device(device).type == "cpu")):
        _refuse(f"{PREFIX}TORCH_DEVICE", device, "unset it, and choose devices with CUDA_VISIBLE_DEVICES or --cpu")


def _usable(device: str) -> bool:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        return False
    return True


def _refuse(name: str, value: Any, instead: str) -> None:
    raise InvalidRequest(f"accelerate's setting {name} is {shown(value, VALUE_CHARS)!r}, not followed here; {instead}")
