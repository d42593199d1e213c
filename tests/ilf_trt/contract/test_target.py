"""Architectures, engine options that contradict one another, and which GPU runs which precision."""

from dataclasses import replace

import pytest

from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library, check_precision
from ilf_trt.errors import InvalidRequest

ADA = Architecture(8, 9)
RTX = EngineOptions(Library.TENSORRT_RTX, (ADA,))
TENSORRT = EngineOptions(Library.TENSORRT)


@pytest.mark.parametrize("text", ["sm89", "SM89", "sm_89", "89", "8.9", " sm89 ", "sm8.9"])
def test_an_architecture_is_read_however_it_is_written(text: str) -> None:
    assert Architecture.parse(text) == ADA


@pytest.mark.parametrize(
    ("text", "major", "minor"), [("sm75", 7, 5), ("sm120", 12, 0), ("12.1", 12, 1), ("103", 10, 3)]
)
def test_the_last_digit_is_the_minor_number(text: str, major: int, minor: int) -> None:
    architecture = Architecture.parse(text)
    assert architecture == Architecture(major, minor)
    assert Architecture.parse(str(architecture)) == architecture
    assert architecture.number == 10 * major + minor


@pytest.mark.parametrize(
    "text", ["", "sm", "8", "sm9", "ada", "sm1234", "8.9.0", "1.20", "sm-89", "sm90a", "compute_89", "8,9", "sm 89"]
)
def test_what_is_no_architecture_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Architecture.parse(text)
    assert str(caught.value) == f"GPU {text!r} is not an architecture; give sm89, sm120 …"


def test_architectures_are_ordered_by_their_numbers() -> None:
    assert sorted([Architecture(12, 0), Architecture(8, 9), Architecture(8, 6)])[0] == Architecture(8, 6)


def test_a_library_has_the_name_of_its_module() -> None:
    assert [library.module for library in Library] == ["tensorrt", "tensorrt_rtx"]


@pytest.mark.parametrize(
    "options",
    [
        RTX,
        TENSORRT,
        replace(TENSORRT, any_gpu_of_architecture=True, builder_level=0, workspace_bytes=1),
        replace(RTX, gpus=(ADA, Architecture(12, 0)), builder_level=5, timing_cache=False),
    ],
)
def test_options_that_go_together_are_accepted(options: EngineOptions) -> None:
    options.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(RTX, gpus=()), "--target tensorrt-rtx builds ahead of time; say for which GPUs: --gpu sm89,sm120"),
        (
            replace(TENSORRT, gpus=(ADA,)),
            "--target tensorrt builds for the GPU of this machine, it cannot build for sm89 elsewhere; "
            "leave --gpu out, or pass --target tensorrt-rtx",
        ),
        (
            replace(RTX, any_gpu_of_architecture=True),
            "--hardware-compat is for --target tensorrt; tensorrt-rtx runs on every GPU of --gpu",
        ),
        (replace(RTX, gpus=(ADA, ADA)), "--gpu names one architecture twice: sm89, sm89"),
        (replace(RTX, builder_level=6), "--builder-level is 6, it must be 0 to 5"),
        (replace(RTX, builder_level=-1), "--builder-level is -1, it must be 0 to 5"),
        (replace(RTX, workspace_bytes=0), "--workspace is 0 GiB, it must be positive"),
        (replace(RTX, workspace_bytes=-(1 << 29)), "--workspace is -0.5 GiB, it must be positive"),
    ],
    ids=lambda value: value.split(",")[0][:40] if isinstance(value, str) else "",
)
def test_options_that_contradict_one_another_are_refused(options: EngineOptions, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        options.check()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("precision", "first"),
    [(Precision.FP8, Architecture(8, 9)), (Precision.BF16, Architecture(8, 0))],
)
def test_a_precision_needs_a_gpu_that_has_it(precision: Precision, first: Architecture) -> None:
    check_precision(precision, (first, Architecture(12, 0)))
    for older in (Architecture(7, 5), Architecture(first.major, first.minor - 1)):
        with pytest.raises(InvalidRequest) as caught:
            check_precision(precision, (first, older))
        assert str(caught.value) == (
            f"{older} has no {precision} units, they begin with {first}; build --precision fp16"
        )


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_every_gpu_has_the_older_precisions(precision: Precision) -> None:
    check_precision(precision, (Architecture(7, 5),))
