"""Graph `decode` beside diffusers' own decoders: kinds, sizes, precisions, tiles, and folders that are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray

from ilf_trt.contract.spec import DecoderSpec, Precision
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.export.pipeline.decoder import decoder_spec_of, export_decoder
from ilf_trt.runtime.picture.decoder import Decoder
from tests import small_pipelines

SHADE = 1.0  # of 255
ROUGH = 8.0  # in float16, through two levels of random weights; measured below 1


def saved(tmp_path: Path, kind: str = "kl") -> tuple[Any, Any]:
    """The decoder's folder as the build sees it, and the model."""
    if kind == "tiny":
        model = small_pipelines.spread(
            AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
                latent_channels=4,
            )
        )
    else:
        model = small_pipelines.vae()
    model.save_pretrained(tmp_path / "vae")
    return SimpleNamespace(path=tmp_path, cell=2), model


def latents(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def decoder(folder: Any, path: Path, **options: Any) -> tuple[DecoderSpec, Decoder]:
    given = {"sizes": [(8, 8)], "precision": Precision.FP32, "tile": None, **options}
    spec = decoder_spec_of(folder, **given)
    export_decoder(folder, spec, path / "decode.onnx")
    session = onnxruntime.InferenceSession(path / "decode.onnx")

    def run(tile: NDArray[np.float32]) -> NDArray[np.float32]:
        shades: NDArray[np.float32] = session.run(None, {"latents": np.ascontiguousarray(tile)})[0]
        return shades

    return spec, Decoder(run, spec)


@torch.inference_mode()
def reference(model: Any, given: NDArray[np.float32]) -> NDArray[np.uint8]:
    """As the pipelines decode, and turn what comes out into pixels."""
    picture = model.decode(torch.from_numpy(given) / model.config.scaling_factor, return_dict=False)[0]
    shades = (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    return shades.round().astype(np.uint8)


def apart(got: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> int:
    assert got.shape == wanted.shape
    return int(np.abs(got.astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_pictures_equal_those_of_diffusers(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, kind)
    _, decode = decoder(folder, tmp_path)
    given = latents(3, 4, 8, 8)
    wanted = reference(model, given)
    assert wanted.std() > SHADE
    assert apart(decode.decode(given), wanted) <= SHADE


def test_one_graph_decodes_every_size(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    spec, decode = decoder(folder, tmp_path, sizes=[(8, 8), (8, 12), (14, 6)])
    assert spec.size == ("H", "W")
    for size in ((8, 8), (8, 12), (14, 6)):
        given = latents(1, 4, *size)
        assert apart(decode.decode(given), reference(model, given)) <= SHADE


def test_a_side_that_all_sizes_share_stays_fixed(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    spec = decoder_spec_of(folder, sizes=[(8, 8), (8, 12)], precision=Precision.FP32, tile=None)
    assert spec.size == (8, "W")
    assert spec.graph.outputs[0].shape == (1, 16, "2W", 3)


def test_half_precision_is_close_and_keeps_its_norms_in_float32(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    _, decode = decoder(folder, tmp_path, precision=Precision.FP16)
    given = latents(1, 4, 8, 8)
    assert apart(decode.decode(given), reference(model, given)) <= ROUGH


def test_tiles_are_blended_as_diffusers_blends_them(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    spec, decode = decoder(folder, tmp_path, sizes=[(32, 32)], tile=16)
    assert (spec.size, spec.tile) == (("H", "W"), 8)
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size, model.tile_overlap_factor = 8, 16, 0.25
    for size in ((20, 20), (32, 20), (23, 32), (8, 20), (8, 7)):
        given = latents(1, 4, *size)
        assert apart(decode.decode(given), reference(model, given)) <= SHADE, size


def test_a_tile_as_large_as_the_picture_is_no_tile(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    spec = decoder_spec_of(folder, sizes=[(8, 8)], precision=Precision.FP32, tile=16)
    assert (spec.size, spec.tile) == ((8, 8), 0)


def test_a_tile_is_rounded_down_to_what_has_whole_quarters(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    spec = decoder_spec_of(folder, sizes=[(32, 32)], precision=Precision.FP32, tile=22)
    assert spec.tile == 8


def test_a_tile_that_is_too_small_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    with pytest.raises(InvalidRequest, match="--decoder-tile 14 is below 16 pixels"):
        decoder_spec_of(folder, sizes=[(32, 32)], precision=Precision.FP32, tile=14)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latent_channels": None}, "names no latent_channels"),
        ({"_class_name": "VQModel"}, "is a VQModel, supported are AutoencoderKL and AutoencoderTiny"),
        ({"latents_mean": [0.0] * 4}, "scales every channel by its own mean, which is not supported"),
    ],
)
def test_another_decoder_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    folder, _ = saved(tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=match):
        decoder_spec_of(folder, sizes=[(8, 8)], precision=Precision.FP32, tile=None)


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        decoder_spec_of(folder, sizes=[(8, 8)], precision=Precision.FP32, tile=None)
