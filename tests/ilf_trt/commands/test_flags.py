"""The command line's flags about engines, and what they become."""

from pathlib import Path

import pytest

from ilf_trt.assembly.cache_folder import cache_folder
from ilf_trt.commands.flags import EngineFlags
from ilf_trt.contract.target import GIB, Architecture, EngineOptions, Library
from ilf_trt.errors import InvalidRequest

RTX = Library.TENSORRT_RTX


def test_without_a_target_there_are_no_engines() -> None:
    assert EngineFlags().options() is None


def test_flags_become_options() -> None:
    flags = EngineFlags(target=RTX, gpu="sm89, 12.0", builder_level=4, workspace=0.5, timing_cache=False)
    assert flags.options() == EngineOptions(
        RTX, (Architecture(8, 9), Architecture(12, 0)), 4, GIB // 2, any_gpu_of_architecture=False, timing_cache=False
    )
    assert EngineFlags(target=Library.TENSORRT, hardware_compat=True).options() == EngineOptions(
        Library.TENSORRT, any_gpu_of_architecture=True
    )


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (EngineFlags(gpu="sm89"), "--gpu"),
        (EngineFlags(builder_level=3), "--builder-level"),
        (EngineFlags(builder_level=0), "--builder-level"),
        (EngineFlags(workspace=1), "--workspace"),
        (EngineFlags(hardware_compat=True), "--hardware-compat"),
    ],
)
def test_a_flag_about_engines_needs_a_target(flags: EngineFlags, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is about engines: pass --target tensorrt"):
        flags.options()


@pytest.mark.parametrize("gpu", ["", "sm89,", ",sm89", "sm89;sm120", "hopper"])
def test_a_list_of_gpus_that_is_none_is_refused(gpu: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is not an architecture|say for which GPUs"):
        EngineFlags(target=RTX, gpu=gpu).options()


@pytest.mark.parametrize("workspace", [0.0, -1.0, float("nan"), float("inf")])
def test_a_workspace_that_is_no_size_is_refused(workspace: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^--workspace is .* GiB, it must be"):
        EngineFlags(target=RTX, gpu="sm89", workspace=workspace).options()


def test_options_are_checked_with_the_flags() -> None:
    with pytest.raises(InvalidRequest, match="leave --gpu out"):
        EngineFlags(target=Library.TENSORRT, gpu="sm90").options()


def test_the_cache_lies_where_it_is_told_or_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "ilf-trt"
    assert EngineFlags().cache_folder() == tmp_path / "ilf-trt"
    assert EngineFlags(cache_dir=tmp_path / "own").cache_folder() == tmp_path / "own"


def test_no_cache_is_no_folder(tmp_path: Path) -> None:
    assert EngineFlags(cache=False, cache_dir=tmp_path).cache_folder() is None
