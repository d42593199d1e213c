"""Builds for a GPU whose text encoder and decoder take the precision of the target, and fall back where that fails."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from rich.console import Console

from ilf_trt import attach, leaves, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.commands.build_view import print_build
from ilf_trt.contract.arrays import write_npz
from ilf_trt.contract.bundle import REFERENCE_FILE, Bundle
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import DECODE, TEXT
from ilf_trt.contract.reference_cases import TEXT_EMBEDDED
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.errors import InvalidRequest, NonFinite, ParityError
from ilf_trt.export.rounding import write_rounded
from ilf_trt.runtime import verify
from tests import small_pipelines

TENSORRT = EngineOptions(Library.TENSORRT)
HOPPER, TURING = Architecture(9, 0), Architecture(7, 5)
HUGE = 1e6  # times the weights of a layer: past float16's 65504
EXACT = 0.01  # of 255; no decoder in float16 is as close, measured 0.2
Build = Callable[..., BuildResult]


class NoEngines:
    """A compiler on a machine with one GPU, that writes no engine."""

    gpus = (HOPPER,)

    def compile(self, folder: Path, manifest: Manifest, *tell: object) -> Any:
        return SimpleNamespace(manifest=manifest, reports=(), reused=())


@pytest.fixture(scope="module", autouse=True)
def _no_engines() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, "open_compiler", lambda *_: NoEngines())
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt of one block in its pipeline, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("source")
    small_pipelines.pixart_pipeline(folder / "pipeline")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=small_pipelines.CHANNELS,
        out_channels=2 * small_pipelines.CHANNELS,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=small_pipelines.TEXT_WIDTH,
        use_additional_conditions=False,
    )
    small_pipelines.spread(transformer).save_pretrained(folder / "pipeline" / "transformer")
    save_ilf(attach(transformer, (0, 0)), folder / "checkpoint", base="../pipeline/transformer")
    return folder


@pytest.fixture(scope="module")
def build_for_gpu(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds with a target; all of them share a build cache, so that each exports only what no other did."""

    def builds(**options: Any) -> BuildResult:
        given = BuildOptions(
            pipeline=source / "pipeline",
            engines=TENSORRT,
            batch=BatchRange(1, 1, 1),
            steps=2,
            feedback="none",
            text_tokens=6,
            cache=source / "cache",
        )
        output = tmp_path_factory.mktemp("built") / "gpu.ilf"
        return build(str(source / "checkpoint"), output, BuildOptions(**{**as_given(given), **options}))

    return builds


def as_given(options: BuildOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in BuildOptions.__slots__}


@pytest.fixture(scope="module")
def gpu_build(build_for_gpu: Build) -> BuildResult:
    """Precisions as the target has them."""
    return build_for_gpu()


@pytest.fixture
def overflowing_vae(source: Path) -> Iterator[None]:
    """The decoder passes float16's 65504 inside; the next norm divides by that again, so float32 is finite."""
    vae = small_pipelines.vae()
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(HUGE)
    vae.save_pretrained(source / "pipeline" / "vae")
    yield
    small_pipelines.vae().save_pretrained(source / "pipeline" / "vae")


def precisions(result: BuildResult) -> tuple[Precision, Precision]:
    """Of the bundle on the disk: text encoder, decoder."""
    manifest = Bundle.open(result.bundle.path).manifest
    assert manifest.text is not None
    assert manifest.decoder is not None
    return manifest.text.precision, manifest.decoder.precision


def test_a_build_for_a_gpu_takes_bf16_text_and_an_fp16_decoder(gpu_build: BuildResult) -> None:
    assert precisions(gpu_build) == (Precision.BF16, Precision.FP16)


def test_each_part_is_held_to_the_limit_of_its_own_precision(gpu_build: BuildResult) -> None:
    rows = {row.what: row for row in gpu_build.differences}
    assert rows[TEXT].limit == Precision.BF16.parity_limit
    assert rows[DECODE].limit == verify.ROUGH_SHADES / 255
    assert Precision.FP32.parity_limit < rows[TEXT].relative < Precision.BF16.parity_limit


def test_the_build_says_what_each_part_runs_in(gpu_build: BuildResult) -> None:
    console = Console(width=200)
    with console.capture() as captured:
        print_build(gpu_build, console)
    assert "precision: pixart fp32, text encoder bf16, decoder fp16" in captured.get()


def test_a_bf16_text_encoder_is_not_compiled_for_an_old_gpu(
    gpu_build: BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_bundle(gpu_build.bundle.path, tmp_path / "hopper.ilf", TENSORRT).bundle.manifest.text
    monkeypatch.setattr(NoEngines, "gpus", (TURING,))
    # the precision lies in the graphs, so nothing can be chosen here
    with pytest.raises(InvalidRequest, match=r"sm75 has no bf16 units for the text part.*--text-precision fp32"):
        compile_bundle(gpu_build.bundle.path, tmp_path / "turing.ilf", TENSORRT)


def test_the_cpu_checks_a_bf16_text_encoder_beside_an_fp16_decoder(gpu_build: BuildResult, tmp_path: Path) -> None:
    restated = Bundle.open(write_rounded(gpu_build.bundle.path, tmp_path / "rounded", gpu_build.bundle.manifest))
    assert restated.manifest.text is not None
    assert restated.manifest.decoder is not None
    assert (restated.manifest.text.precision, restated.manifest.decoder.precision) == (Precision.FP32, Precision.FP16)


def test_a_text_encoder_that_was_too_large_for_a_reference_is_not_restated(
    gpu_build: BuildResult, tmp_path: Path
) -> None:
    copy, manifest = tmp_path / "copy.ilf", gpu_build.bundle.manifest
    gpu_build.bundle.copy(copy)
    kept = {name: array for name, array in gpu_build.bundle.arrays(REFERENCE_FILE).items() if name != TEXT_EMBEDDED}
    write_npz(copy / REFERENCE_FILE, kept)
    restated = write_rounded(copy, tmp_path / "rounded", manifest)
    rows, _ = verify.verify(restated, built=manifest)
    assert Bundle.open(restated).manifest.text is None
    assert {TEXT, DECODE} & {row.what for row in rows} == {DECODE}


@pytest.mark.usefixtures("gpu_build", "overflowing_vae")
def test_a_decoder_that_overflows_falls_back_to_fp32_with_a_warning(
    build_for_gpu: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = build_for_gpu()
    assert precisions(result) == (Precision.BF16, Precision.FP32)
    assert {row.what: row.limit for row in result.differences}[DECODE] == verify.EXACT_SHADES / 255
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "graph decode gave NaN or infinity in 'shades', the reference is finite; fp16 is only the default of "
        "--decoder-precision, so it is built in fp32"
    )
    assert list(result.stage_s)[-2:] == ["export decode in fp32", "verify with decode in fp32"]


@pytest.mark.usefixtures("gpu_build", "overflowing_vae")
def test_a_decoder_that_overflows_in_the_precision_that_was_asked_for_is_refused(build_for_gpu: Build) -> None:
    with pytest.raises(NonFinite, match=r"graph decode gave NaN or infinity.*--decoder-precision fp32"):
        build_for_gpu(decoder_precision=Precision.FP16)


@pytest.mark.usefixtures("gpu_build")
def test_a_decoder_past_its_limit_falls_back_too_and_names_the_difference(
    build_for_gpu: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ROUGH_SHADES", EXACT)
    with caplog.at_level(logging.WARNING):
        result = build_for_gpu()
    assert precisions(result) == (Precision.BF16, Precision.FP32)
    assert "decode differs from the reference by" in caplog.text
    assert "the limit is 4e-05; fp16 is only the default of --decoder-precision, so it is built in fp32" in caplog.text
    with pytest.raises(ParityError, match="the most exact is --decoder-precision fp32"):
        build_for_gpu(decoder_precision=Precision.FP16)
