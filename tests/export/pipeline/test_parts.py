"""What a build takes of a pipeline's folder, and what does not go together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ilf_trt import ILFModel, attach
from ilf_trt.assembly.options import BuildOptions, PipelinePart
from ilf_trt.commands.flags import sizes_of
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.pipeline.folder import PipelineFolder
from ilf_trt.export.pipeline.parts import PipelineParts, cells_of, text_tokens
from ilf_trt.model.base import load_backbone
from tests import small_pipelines


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineFolder, ILFModel]:
    folder = tmp_path_factory.mktemp("pipeline")
    small_pipelines.pixart_pipeline(folder)
    return PipelineFolder.open(folder), attach(load_backbone(str(folder)), (1, 2))


@pytest.fixture
def around(opened: tuple[PipelineFolder, ILFModel]) -> Callable[..., PipelineParts]:
    def made(**options: Any) -> PipelineParts:
        folder, model = opened
        return PipelineParts.of(model, BuildOptions(**options), folder)

    return made


def test_a_pipeline_brings_text_and_decoder(around: Callable[..., PipelineParts]) -> None:
    made = around()
    assert made.text is not None
    assert (made.text.tokens, made.text.channels) == (120, small_pipelines.TEXT_WIDTH)
    assert made.decoder is not None
    assert (made.decoder.scale, made.decoder.size) == (2, (8, 8))
    assert set(made.reference()) >= {"text_ids", "text_embedded", "decode_latents", "decode_shades"}


@pytest.mark.parametrize("stage", PipelinePart)
def test_either_part_can_be_left_out(around: Callable[..., PipelineParts], stage: PipelinePart) -> None:
    made = around(without=(stage,))
    assert (made.text is None, made.decoder is None) == (stage is PipelinePart.TEXT, stage is PipelinePart.DECODER)


def test_leaving_out_a_part_of_no_pipeline_is_refused(opened: tuple[PipelineFolder, ILFModel]) -> None:
    with pytest.raises(InvalidRequest, match="--without text is for a bundle that is built with --pipeline"):
        PipelineParts.of(opened[1], BuildOptions(without=(PipelinePart.TEXT,)), None)


def test_a_text_encoder_of_another_width_is_refused(opened: tuple[PipelineFolder, ILFModel], tmp_path: Path) -> None:
    small_pipelines.pixart_pipeline(tmp_path)
    small_pipelines.text_encoder(200, d_model=48).save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(InvalidRequest, match="text encoder gives 48 channels, the transformer takes 32"):
        PipelineParts.of(opened[1], BuildOptions(), PipelineFolder.open(tmp_path))


def test_the_length_of_a_text_is_as_asked_or_the_pipelines_or_300(opened: tuple[PipelineFolder, ILFModel]) -> None:
    assert text_tokens(BuildOptions(text_tokens=20), opened[0]) == 20
    assert text_tokens(BuildOptions(), opened[0]) == 120
    assert text_tokens(BuildOptions(), None) == 300


def test_sizes_are_in_pixels_and_become_cells(opened: tuple[PipelineFolder, ILFModel]) -> None:
    folder, model = opened
    assert cells_of(model, BuildOptions(), folder) == ((8, 8),)
    assert cells_of(model, BuildOptions(sizes=((16, 24), (32, 16))), folder) == ((8, 12), (16, 8))
    with pytest.raises(InvalidRequest, match=r"size 18x24 is not in steps of 4 pixels, .* the nearest below is 16x24"):
        cells_of(model, BuildOptions(sizes=((18, 24),)), folder)


def test_sizes_are_read_as_height_by_width() -> None:
    assert sizes_of("512x768, 768x512,512x768") == ((512, 768), (768, 512))
    for text in ("512", "512x", "0x512", "512*512", "-1x2", ""):
        with pytest.raises(InvalidRequest, match="is not HEIGHTxWIDTH in pixels"):
            sizes_of(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"text_precision": Precision.FP16}, "--text-precision is fp16, T5 takes only fp32 or bf16"),
        ({"decoder_precision": Precision.FP8}, "--decoder-precision is fp8"),
    ],
)
def test_precisions_that_do_not_serve_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        BuildOptions(**options).check()
