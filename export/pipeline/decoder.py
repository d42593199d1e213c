"""A pipeline's image decoder as graph `decode`: from the transformer's latents to shades, one picture at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from ilf_trt.contract.spec import DecoderSpec, Precision
from ilf_trt.errors import CheckpointError, InvalidRequest, shown, told
from ilf_trt.export.graph import OPSET, quiet
from ilf_trt.export.passes import check_operators, share_equal, strip_metadata
from ilf_trt.model.pretrained import diffusers_weights, load_diffusers, model_config
from ilf_trt.model.weights import check_finite

from .folder import PipelineFolder

KINDS = ("AutoencoderKL", "AutoencoderTiny")
TRACED_SIDES = (6, 10)  # cells; no two alike, or the exporter takes height and width for one
MOST_CELLS = 1 << 12
LARGEST = 1e6  # factor of a latent
VALUE_CHARS = 60
FEWEST_CELLS, QUARTERS = 8, 4  # to a side of a tile, and what it is a multiple of


def decoder_spec_of(
    folder: PipelineFolder, *, sizes: Sequence[tuple[int, int]], precision: Precision, tile: int | None
) -> DecoderSpec:
    """The dimensions of the decoder for latents of `sizes` (H, W) in cells; `tile` is the side of a tile in pixels.

    Raises CheckpointError for a decoder that is not known or lacks weights, InvalidRequest for a tile below 8 cells.
    """
    kind, channels = _kind(folder), _channels(folder)
    diffusers_weights(kind, folder.path / "vae")
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
    module = _Decode(load_vae(folder), spec).eval()
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


def load_vae(folder: PipelineFolder) -> Any:
    """diffusers' own autoencoder, in float32; raises CheckpointError."""
    vae = load_diffusers(_kind(folder), folder.path / "vae")
    check_finite(vae.state_dict(), str(folder.path / "vae"))
    return vae


def _channels(folder: PipelineFolder) -> int:
    """The channels of a latent, from a config whose decoder is known; raises CheckpointError."""
    source = folder.path / "vae"
    config = model_config(source)
    if config.get("latents_mean") is not None:
        raise CheckpointError(
            f"{source} scales every channel by its own mean, which is not supported; leave it out by --without decoder"
        )
    for name, low in (("scaling_factor", 1e-6), ("shift_factor", -LARGEST)):
        value = config.get(name)
        if value is not None and not (type(value) in (int, float) and low <= value <= LARGEST):
            raise CheckpointError(f"{source}: {name} is {told(value)}; restore its config.json")
    channels = config.get("latent_channels")
    if type(channels) is not int:
        raise CheckpointError(f"{source}: config.json names no latent_channels; copy it again")
    return channels


def _kind(folder: PipelineFolder) -> Any:
    """The class of the autoencoder."""
    source = folder.path / "vae"
    name = model_config(source).get("_class_name")
    if name not in KINDS:
        raise CheckpointError(
            f"{source} is a {shown(str(name), VALUE_CHARS)}, supported are {' and '.join(KINDS)}; leave it out by "
            "--without decoder"
        )
    return getattr(diffusers, name)
