"""What a build is asked for, in what order it goes, and what it says of itself; whole builds are in the other tests."""

from pathlib import Path

import pytest

from ilf_trt.assembly.conductor import BuildResult, build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.errors import BundleError, InvalidRequest

RTX = EngineOptions(Library.TENSORRT_RTX, (Architecture(8, 9),))
EXPORTS = tuple(f"export {name}" for name in GRAPHS)
ENGINES = tuple(f"engine {name}" for name in GRAPHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(strip_graphs=True), "--strip-graphs would leave nothing: pass a --target to build engines for"),
        (BuildOptions(fp8_exclude=("a",)), "--fp8-exclude and --calibration are for --precision fp8"),
        (
            BuildOptions(precision=Precision.FP16, calibration=Path("x.npz")),
            "--fp8-exclude and --calibration are for --precision fp8",
        ),
        (BuildOptions(fp8_attention=True), "--fp8-attention is for --precision fp8; leave it out"),
    ],
)
def test_options_that_contradict_one_another_are_refused_before_anything_is_loaded(
    options: BuildOptions, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build("no such checkpoint", tmp_path / "a.ilf", options)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_engine_options_that_contradict_one_another_are_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    stages: list[str] = []
    options = BuildOptions(engines=EngineOptions(Library.TENSORRT_RTX))
    with pytest.raises(InvalidRequest, match="say for which GPUs"):
        build("no such checkpoint", tmp_path / "a.ilf", options, progress=lambda stage, *_: stages.append(stage))
    assert stages == ["engine library"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (BuildOptions(), ("load checkpoint", "reference", *EXPORTS, "verify")),
        (BuildOptions(verify=False), ("load checkpoint", *EXPORTS)),
        (
            BuildOptions(precision=Precision.FP8, engines=RTX),
            ("engine library", "load checkpoint", "reference", "calibrate", *EXPORTS, "verify", *ENGINES),
        ),
        (
            BuildOptions(engines=RTX, strip_graphs=True, verify=False),
            ("engine library", "load checkpoint", *EXPORTS, *ENGINES),
        ),
    ],
    ids=["onnx", "not verified", "fp8 engines", "engines alone"],
)
def test_the_stages_are_those_that_the_options_ask_for(options: BuildOptions, stages: tuple[str, ...]) -> None:
    assert options.stages == stages


def test_each_stage_is_timed(dit_build: BuildResult) -> None:
    assert tuple(dit_build.stage_s) == BuildOptions().stages
    assert all(seconds > 0 for seconds in dit_build.stage_s.values())


def test_a_build_without_engines_has_no_reports(dit_build: BuildResult) -> None:
    assert (dit_build.reports, dit_build.reused) == ((), ())
    assert dit_build.bundle.manifest.engines == ()


def test_a_bundle_that_is_not_there_cannot_be_compiled(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        compile_bundle(tmp_path / "a.ilf", tmp_path / "b.ilf", RTX)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused_before_anything_is_built(dit_build: BuildResult, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    stages: list[str] = []
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        compile_bundle(
            dit_build.bundle.path, tmp_path / "thesis", RTX, force=True, progress=lambda what, *_: stages.append(what)
        )
    assert stages == ["engine library"]
