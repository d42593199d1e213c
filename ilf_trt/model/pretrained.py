"""A model of diffusers or transformers from a folder on this disk, held against its weights before it takes memory."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ilf_trt.errors import CheckpointError, shown, told

from .foreign import foreign
from .hub_folder import CONFIG, read_config, refuse_remote_code
from .shapes import no_larger
from .weights import Shape, Weights, listed

DIFFUSERS = "diffusion_pytorch_model"
MOST_BUFFER_BYTES = 1 << 30
SLACK = 64  # parameters that a module may make and throw away while it is made
VALUE_CHARS = 60
REGISTERED = ("block_out_channels",)
"""What AutoencoderTiny writes beside its own options."""
NEUTRAL = (None, False, "default")
"""What Transformer2DModel wrote for the options that DiT and PixArt do not have."""
OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The names of a VAE's attention until diffusers 0.14, and those of today; from_pretrained reads both."""


def load_diffusers(model_type: Any, folder: Path) -> Any:
    """The model in float32; raises CheckpointError as `diffusers_weights` does, and for what diffusers refuses."""
    weights = diffusers_weights(model_type, folder)
    with foreign(f"{folder} cannot be loaded as {model_type.__name__}", "copy the folder again"):
        model, info = model_type.from_pretrained(
            folder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
            variant=weights.variant,
            output_loading_info=True,
        )
    refuse_gaps(info, folder)
    return model


def diffusers_weights(model_type: Any, folder: Path) -> Weights:
    """The weights of a diffusers model: exactly those that its config.json asks for, none of them quantised.

    Takes no memory for them. Raises CheckpointError, also for remote code.
    """
    config = model_config(folder)
    weights = Weights.of(folder, DIFFUSERS)
    wanted = wanted_shapes(lambda: model_type(**options_of(model_type, config, folder)), folder, len(weights.tensors))
    _with_todays_names(weights, wanted).check(wanted)
    return weights


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model that can be read at all; raises CheckpointError."""
    refuse_remote_code(folder)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} holds no model: {CONFIG} is missing; give the folder that it is in")
    config = read_config(folder / CONFIG)
    quantisation = config.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation
        raise CheckpointError(
            f"{folder / CONFIG} has a quantization_config ({shown(str(method), VALUE_CHARS)}), quantised weights are "
            "not read; give the model in float32, float16 or bfloat16"
        )
    return config


def options_of(model_type: Any, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options that a class takes; raises CheckpointError for one that it does not know and that says something."""
    known = inspect.signature(model_type.__init__).parameters
    for name, value in config.items():
        if name not in (*known, *REGISTERED) and not name.startswith("_") and value not in NEUTRAL:
            raise CheckpointError(
                f"{folder / CONFIG}: {shown(name, VALUE_CHARS)} is {told(value)}, which "
                f"{model_type.__name__} does not know; upgrade diffusers, or give another model"
            )
    return {name: value for name, value in config.items() if name in known}


def wanted_shapes(make: Callable[[], nn.Module], folder: Path, tensors: int) -> dict[str, Shape]:
    """The shape of every tensor that the module of `make` keeps, made without memory and given up if it is far larger
    than the `tensors` at hand. Raises CheckpointError."""
    most = 2 * tensors + SLACK
    too_large = CheckpointError(
        f"{folder} lacks weights: its config.json asks for more than {most} tensors, far more than are there; give "
        "weights and config.json of one model"
    )
    with foreign(f"{folder / CONFIG} describes no model", "restore the file"), no_larger(most, too_large):
        module = make()
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        buffer_bytes = sum(buffer.nbytes for buffer in module.buffers())
    if buffer_bytes > MOST_BUFFER_BYTES:
        raise CheckpointError(
            f"{folder / CONFIG} asks for {buffer_bytes >> 20} MiB of tables, at most {MOST_BUFFER_BYTES >> 20} are "
            "made; correct sample_size and patch_size"
        )
    return shapes


def refuse_gaps(info: Mapping[str, Any], folder: Path, unused: Callable[[str], bool] = lambda name: False) -> None:
    """Raises CheckpointError for what `output_loading_info` says was not loaded as it stands."""
    gaps = {
        what: [each for name in names if not unused(each := str(name))]
        for what, names in info.items()
        if what.endswith(("_keys", "_msgs"))
    }
    for what, names in gaps.items():
        if names:
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')}: {listed(names)}; give weights of one model")


def _with_todays_names(weights: Weights, wanted: Mapping[str, Shape]) -> Weights:
    tensors = dict(weights.tensors)
    for name in weights.tensors:
        old = OLD_ATTENTION.fullmatch(name)
        if old is not None and name not in wanted:
            today = f"{old[1]}.{ATTENTION[old[2]]}.{old[3]}"
            if today in wanted and today not in tensors:
                tensors[today] = tensors.pop(name)
    return replace(weights, tensors=tensors)
