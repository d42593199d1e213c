"""The extras of the package: no two owners of one module, and one release of CUDA in an environment."""

import re
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ONNX_RUNTIME = {"onnxruntime", "onnxruntime-gpu"}
"""Both install the module `onnxruntime`, and pip lets one overwrite the other."""
FOR_CUDA = ["onnxruntime-cuda", "onnxruntime-cuda12"]
CUDA_12 = ["cuda12", "tensorrt-cu12", "tensorrt-rtx-cu12", "onnxruntime-cuda12"]
CUDA_13 = ["cuda", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]


def required(*extras: str) -> list[Requirement]:
    """What pip installs for the package with these extras, itself left out."""
    found: list[Requirement] = [Requirement(line) for line in PROJECT["dependencies"]]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == PROJECT["name"]:
                waiting += requirement.extras
            else:
                found.append(requirement)
    return found


def names(*extras: str) -> set[str]:
    return {requirement.name for requirement in required(*extras)}


def bindings(*extras: str) -> SpecifierSet:
    bound = SpecifierSet()
    for requirement in required(*extras):
        if requirement.name == "cuda-bindings":
            bound &= requirement.specifier
    return bound


def test_the_package_alone_brings_no_onnx_runtime_so_an_upgrade_cannot_overwrite_one() -> None:
    assert names() & ONNX_RUNTIME == set()


def test_one_extra_brings_onnx_runtime_for_the_cpu_and_two_for_cuda() -> None:
    named = {extra: {Requirement(line).name for line in lines} & ONNX_RUNTIME for extra, lines in EXTRAS.items()}
    assert {extra: found for extra, found in named.items() if found} == {
        "cpu": {"onnxruntime"},
        **{extra: {"onnxruntime-gpu"} for extra in FOR_CUDA},
    }


@pytest.mark.parametrize("extra", FOR_CUDA)
def test_onnx_runtime_for_cuda_goes_with_every_extra_but_those_of_the_cpu(extra: str) -> None:
    clashing = {other for other in EXTRAS if names(extra, other) >= ONNX_RUNTIME}
    assert clashing == {"cpu", "dev"}


@pytest.mark.parametrize("extras", list(combinations(sorted(set(EXTRAS) - {"cpu", "dev"}), 2)), ids="+".join)
def test_no_two_extras_bring_two_owners_of_onnx_runtime(extras: tuple[str, str]) -> None:
    assert len(names(*extras) & ONNX_RUNTIME) < 2


@pytest.mark.parametrize("first", CUDA_12)
@pytest.mark.parametrize("second", CUDA_13)
def test_pip_refuses_extras_of_two_releases_of_cuda(first: str, second: str) -> None:
    """So `tensorrt-cu12` and `tensorrt-cu13`, which share the module `tensorrt`, never meet."""
    bound = bindings(first, second)
    versions = (f"{major}.{minor}.{patch}" for major in (11, 12, 13, 14) for minor in range(12) for patch in range(12))
    assert [version for version in versions if version in bound] == []


@pytest.mark.parametrize("extra", [*CUDA_12, *CUDA_13])
def test_each_extra_of_cuda_takes_bindings_with_nvml(extra: str) -> None:
    bound = bindings(extra)
    without_nvml = ["12.8.0", "12.9.5", "13.0.3", "13.1.1"]
    with_nvml = ["12.9.6", "12.9.10"] if extra in CUDA_12 else ["13.2.0", "13.5.0"]
    assert [version for version in (*without_nvml, *with_nvml) if version in bound] == with_nvml


@pytest.mark.parametrize("extra", [*CUDA_12, *CUDA_13])
def test_no_extra_brings_packages_of_another_release_of_cuda(extra: str) -> None:
    other = "13" if extra in CUDA_12 else "12"
    assert [name for name in names(extra) if re.search(rf"cu(da)?{other}$", name)] == []
