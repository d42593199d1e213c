"""A pipeline's image decoder as graph `decode`: from the transformer's latents to shades, one picture at a time."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import Dim

from ilf_trt.contract.spec import DecoderSpec, Precision
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.export.graph import OPSET, quiet
from ilf_trt.export.passes import check_operators, share_equal, strip_metadata
from ilf_trt.model.checkpoint import read_json_object
from ilf_trt.model.foreign import load_whole, refuse_foreign_code

from .folder import PipelineFolder

KINDS = ("AutoencoderKL", "AutoencoderTiny")
TRACED_SIDES = (6, 10)  # cells; no two alike, or the exporter takes height and width for one
MOST_CELLS = 1 << 12
FEWEST_CELLS, QUARTERS = 8, 4  # to a side of a tile, and what it is a multiple of


def decoder_spec_of(
    folder: PipelineFolder, *, sizes: Sequence[tuple[int, int]], precision: Precision, tile: int | None
) -> DecoderSpec:
    """The dimensions of the decoder for latents of `sizes` (H, W) in cells; `tile` is the side of a tile in pixels.

    Raises CheckpointError for a folder without a decoder that is known, InvalidRequest for a tile below 8 cells.
    """
    config = _config(folder)
    channels = int(config["latent_channels"])
    heights, widths = ({size[axis] for size in sizes} for axis in (0, 1))
    if tile is not None and tile // folder.cell < max(*heights, *widths):
        side = tile // folder.cell // QUARTERS * QUARTERS  # neighbours share a quarter of it, in whole cells
        if side < FEWEST_CELLS:
            raise InvalidRequest(
                f"--decoder-tile {tile} is below {FEWEST_CELLS * folder.cell} pixels; give at least that"
            )
        return DecoderSpec(channels, folder.cell, ("H", "W"), side, precision)
    height = "H" if len(heights) > 1 else heights.pop()
    width = "W" if len(widths) > 1 else widths.pop()
    return DecoderSpec(channels, folder.cell, (height, width), 0, precision)


def export_decoder(folder: PipelineFolder, spec: DecoderSpec, path: Path) -> None:
    """Write the graph as `path`, its weights beside it as `path`.data.

    In halves the group norms stay in float32. A VAE whose activations pass float16's 65504, as SDXL's, needs fp32 or
    bf16: `verify` finds it. Raises CheckpointError for weights that are missing or damaged.
    """
    module = _Decode(_load_vae(folder), spec).eval()
    sides = {"H": TRACED_SIDES[0], "W": TRACED_SIDES[1]}
    latents = torch.zeros(spec.graph.inputs[0].resolve(sides))
    shapes = {
        axis: Dim(side, min=2, max=MOST_CELLS) for axis, side in enumerate(spec.size, start=2) if isinstance(side, str)
    }
    with quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            (latents,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[port.name for port in spec.graph.inputs],
            output_names=[port.name for port in spec.graph.outputs],
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    strip_metadata(program.model)
    check_operators(program.model)
    share_equal(program.model)
    program.model.graph.name = spec.graph.name
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


class _Decode(nn.Module):
    """latents (1, C, h, w) as the transformer leaves them -> shades (1, H, W, 3)."""

    def __init__(self, vae: Any, spec: DecoderSpec) -> None:
        super().__init__()
        config = vae.config
        self.dtype = getattr(torch, spec.precision.dtype)
        self.scaling = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.before = nn.Identity() if getattr(vae, "post_quant_conv", None) is None else vae.post_quant_conv
        self.decoder = vae.decoder
        self.to(self.dtype)
        if self.dtype is not torch.float32:
            _widen_norms(self)

    def forward(self, latents: Tensor) -> Tensor:
        given = (latents / self.scaling + self.shift).to(self.dtype)
        picture: Tensor = self.decoder(self.before(given)).float()
        return (picture * 127.5 + 127.5).permute(0, 2, 3, 1)


class _WideNorm(nn.Module):
    """A group norm that runs in float32 between halves."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.epsilon = norm.num_groups, norm.eps
        self.weight, self.bias = (None if p is None else nn.Parameter(p.float()) for p in (norm.weight, norm.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.group_norm(hidden.float(), self.groups, self.weight, self.bias, self.epsilon).to(hidden.dtype)


def _widen_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, _WideNorm(child))
        else:
            _widen_norms(child)


def _config(folder: PipelineFolder) -> dict[str, Any]:
    refuse_foreign_code(folder.path / "vae")
    config = read_json_object(folder.path / "vae" / "config.json")
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise CheckpointError(
            f"{folder.path / 'vae'} is a {kind}, supported are {' and '.join(KINDS)}; leave it out by --without decoder"
        )
    if not isinstance(config.get("latent_channels"), int):
        raise CheckpointError(f"{folder.path / 'vae'}: config.json names no latent_channels; copy it again")
    if config.get("latents_mean") is not None:
        raise CheckpointError(
            f"{folder.path / 'vae'} scales every channel by its own mean, which is not supported; leave it out by "
            "--without decoder"
        )
    return config


def _load_vae(folder: PipelineFolder) -> Any:
    source = folder.path / "vae"
    kind = getattr(diffusers, str(_config(folder)["_class_name"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_whole(partial(kind.from_pretrained, source, use_safetensors=True), str(source))
            return model.float().eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} cannot be loaded: {reason}; copy it again") from error
