"""The driver that a release of CUDA needs, and the extras that a message names."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from cuda.bindings.driver import CUresult as Driver
from cuda.bindings.runtime import cudaError_t as Runtime

from ilf_trt.contract.driver import (
    CUDA_12,
    CUDA_13,
    CUDA_EXTRAS,
    RELEASES,
    CudaRelease,
    check_driver,
    driver_advice,
    extra_to_install,
    installed_release,
)
from ilf_trt.errors import DeviceError

EXTRAS = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Installs cuda-bindings of the parameter's version; None uninstalls them."""

    def version(name: str) -> str:
        assert name == "cuda-bindings"
        if request.param is None:
            raise PackageNotFoundError(name)
        return str(request.param)

    monkeypatch.setattr("ilf_trt.contract.driver.version", version)


@pytest.mark.parametrize(
    ("bindings", "release"),
    [("12.9.6", CUDA_12), ("13.5.0", CUDA_13), (None, CUDA_13), ("14.0.0", CUDA_13)],
    indirect=["bindings"],
)
def test_the_release_is_that_of_the_installed_bindings(bindings: None, release: CudaRelease) -> None:
    assert installed_release() is release


@pytest.mark.parametrize(
    ("bindings", "extra"), [("12.9.10", "tensorrt-cu12"), ("13.2.0", "tensorrt")], indirect=["bindings"]
)
def test_a_missing_library_is_named_for_the_installed_release(bindings: None, extra: str) -> None:
    assert extra_to_install("tensorrt") == f"'ilf-trt[{extra}]'"


@pytest.mark.parametrize("bindings", ["13.5.0"], indirect=True)
@pytest.mark.parametrize(
    ("driver", "cuda"),
    [((580, 65, 6), 13), ((580, 65, 6), 0), ((610, 1), 14), ((), 13), ((), 0), ((535, 104, 5), 13)],
    ids=["just new enough", "CUDA unknown", "newer", "driver unknown", "all unknown", "forward compatibility"],
)
def test_a_driver_that_is_new_enough_is_accepted(bindings: None, driver: tuple[int, ...], cuda: int) -> None:
    check_driver("device 'cuda:0'", driver, cuda)


@pytest.mark.parametrize(
    ("bindings", "driver", "cuda", "message"),
    [
        (
            "13.5.0",
            (535, 104, 5),
            12,
            "x: driver 535.104.5 is too old for CUDA 13; update the driver to 580.65.6 or later, or use CUDA 12: pip "
            "install 'ilf-trt[tensorrt-cu12]' in a new environment",
        ),
        (
            "13.5.0",
            (580, 65, 5),
            0,
            "x: driver 580.65.5 is too old for CUDA 13; update the driver to 580.65.6 or later, or use CUDA 12: pip "
            "install 'ilf-trt[tensorrt-cu12]' in a new environment",
        ),
        (
            "13.5.0",
            (),
            12,
            "x: driver for CUDA 12 is too old for CUDA 13; update the driver to 580.65.6 or later, or use CUDA 12: pip "
            "install 'ilf-trt[tensorrt-cu12]' in a new environment",
        ),
        (
            "13.5.0",
            (470, 57, 2),
            11,
            "x: driver 470.57.2 is too old for CUDA 13; update the driver to 580.65.6 or later",
        ),
        (
            "12.9.6",
            (470, 57, 2),
            11,
            "x: driver 470.57.2 is too old for CUDA 12; update the driver to 525.60.13 or later",
        ),
    ],
    indirect=["bindings"],
    ids=["of CUDA 12", "a patch too old", "version unknown", "for neither", "for CUDA 12"],
)
def test_a_driver_that_is_too_old_is_refused_with_what_to_install(
    bindings: None, driver: tuple[int, ...], cuda: int, message: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        check_driver("x", driver, cuda, "tensorrt")
    assert str(caught.value) == message


@pytest.mark.parametrize("bindings", ["13.5.0"], indirect=True)
def test_a_caller_of_no_library_gets_the_extras_of_all(bindings: None) -> None:
    with pytest.raises(
        DeviceError, match=r"'ilf-trt\[tensorrt-cu12\]' or .*rtx-cu12\]' or 'ilf-trt\[onnxruntime-cuda12\]' in a new"
    ):
        check_driver("device 'cuda:0'", (535, 104, 5), 12)


REFUSALS = {
    "CUDA": Driver.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE.name,
    "CUDA's runtime": Runtime.cudaErrorInsufficientDriver.name,
    "its compatibility": Runtime.cudaErrorCompatNotSupportedOnDevice.name,
    "its words": "CUDA driver version is insufficient for CUDA runtime version",
    "TensorRT": f"CUDA initialization failure with error: {Runtime.cudaErrorInsufficientDriver.value}",
}
MISMATCHES = {
    "CUDA": Driver.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.name,
    "CUDA's runtime": Runtime.cudaErrorSystemDriverMismatch.name,
    "TensorRT": f"CUDA initialization failure with error: {Runtime.cudaErrorSystemDriverMismatch.value}",
}


@pytest.mark.parametrize("bindings", ["13.5.0"], indirect=True)
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_cuda_says_about_an_old_driver_is_known(bindings: None, refusal: str) -> None:
    assert driver_advice(f"{refusal}: and why", "tensorrt-rtx") == (
        "update the driver to 580.65.6 or later, or use CUDA 12: pip install 'ilf-trt[tensorrt-rtx-cu12]' in a new "
        "environment"
    )


@pytest.mark.parametrize("bindings", ["12.9.6"], indirect=True)
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_with_cuda_12_only_the_driver_helps(bindings: None, refusal: str) -> None:
    assert driver_advice(refusal) == "update the driver to 525.60.13 or later"


@pytest.mark.parametrize("bindings", ["13.5.0"], indirect=True)
@pytest.mark.parametrize("refusal", MISMATCHES.values(), ids=MISMATCHES)
def test_a_driver_of_two_versions_needs_a_restart_or_other_packages(bindings: None, refusal: str) -> None:
    advice = driver_advice(refusal, "tensorrt")
    assert advice.startswith("if the driver was updated, start the machine again; if not, update the driver")
    assert "'ilf-trt[tensorrt-cu12]'" in advice


@pytest.mark.parametrize("error", ["", "CUDA_ERROR_NO_DEVICE: no device", "CUDA_ERROR_OUT_OF_MEMORY", "error: 350"])
def test_other_errors_get_no_advice(error: str) -> None:
    assert driver_advice(error) == ""


@pytest.mark.parametrize("release", RELEASES, ids=str)
@pytest.mark.parametrize("extra", CUDA_EXTRAS)
def test_each_named_extra_brings_bindings_of_its_release(release: CudaRelease, extra: str) -> None:
    """Straight, or through the extra with cuda-core."""
    lines = EXTRAS[release.extras[extra]]
    if extra != "cuda":
        assert f"ilf-trt[{release.extras['cuda']}]" in lines
    (bound,) = (line for line in EXTRAS[release.extras["cuda"]] if line.startswith("cuda-bindings"))
    assert re.fullmatch(rf"cuda-bindings>={release.major}\.[\d.]+,<{release.major + 1}", bound)
