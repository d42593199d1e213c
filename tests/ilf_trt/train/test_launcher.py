"""accelerate's settings agree with the recipe, choose devices, or are refused by name; none changes the weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.launcher import OFF, PREFIX, REFUSED, check_settings
from tests.small_training import assert_same_training, run_training, small_recipe

SETTING = re.compile(r"\bACCELERATE_([A-Z0-9_]+)")
HONOURED = (
    "USE_CPU",  # as --cpu
    "TORCH_DEVICE",
    "CPU_AFFINITY",
    "DEBUG_MODE",
    "DEBUG_RDV_FILE",
    "LOG_LEVEL",
    "ENABLE_RICH",
    "NUM_PROCESSES",
    "BYPASS_DEVICE_MAP",
    "IN_TPU_POD",
    "INIT_INCLUDE_BUFFERS",
)
"""Settings that choose devices, the start of processes and the log, and leave the weights alone."""
ONLY_WITH = {
    "DEEPSPEED_": "USE_DEEPSPEED",
    "CONFIG_DS_FIELDS": "USE_DEEPSPEED",
    "ALLOW_CP_STANDALONE": "USE_PARALLELISM_CONFIG",
    "SAGEMAKER_DISTRIBUTED_TYPE": "USE_SAGEMAKER",
    "FP8_": "FP8_BACKEND",
    "DYNAMO_": "DYNAMO_BACKEND",
}
"""The beginnings of settings that accelerate reads only with another one, which is refused."""


def settings_without_a_rule(names: Iterable[str]) -> list[str]:
    """Those names of accelerate's settings that this file does not know; a new version of accelerate may have some."""
    known = {setting.name for setting in REFUSED} | set(HONOURED)
    return sorted(
        name
        for name in {name.removeprefix(PREFIX) for name in names}
        if name not in known and not name.startswith(tuple(ONLY_WITH))
    )


def test_every_setting_that_accelerate_reads_has_a_rule() -> None:
    folder = Path(accelerate.__file__).parent
    names = {name for path in folder.rglob("*.py") for name in SETTING.findall(path.read_text())}
    assert len(names) > 10
    assert settings_without_a_rule(name for name in names if not name.endswith("_")) == []


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: setting.name)
def test_a_setting_that_would_change_the_weights_is_refused_by_name(setting: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{PREFIX}{setting.name} is '77', not followed here; "):
        check_settings(small_recipe(), {f"{PREFIX}{setting.name}": "77"}, cpu=True)


@pytest.mark.fuzz
@given(setting=st.sampled_from(REFUSED), value=st.sampled_from(sorted(OFF)))
def test_a_setting_that_is_off_is_none(setting: Any, value: str) -> None:
    check_settings(small_recipe(), {f"{PREFIX}{setting.name}": value}, cpu=True)


def test_settings_that_agree_with_the_recipe_are_followed() -> None:
    recipe = small_recipe(compute={"precision": "bf16"}, optimisation={"accumulate": 2, "clip": 1.0})
    agreeing = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "2", "GRADIENT_CLIPPING": "1.0"}
    check_settings(recipe, {f"{PREFIX}{name}": value for name, value in agreeing.items()}, cpu=True)
    with pytest.raises(InvalidRequest, match=r"set compute\.precision in the recipe"):
        check_settings(recipe, {f"{PREFIX}MIXED_PRECISION": "fp16"}, cpu=True)


@pytest.mark.parametrize("name", [name for name in HONOURED if name != "TORCH_DEVICE"])
def test_a_setting_of_devices_and_logs_is_let_through(name: str) -> None:
    check_settings(small_recipe(), {f"{PREFIX}{name}": "1"}, cpu=True)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "xla"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(InvalidRequest, match="ACCELERATE_TORCH_DEVICE"):
        check_settings(small_recipe(), {f"{PREFIX}TORCH_DEVICE": device}, cpu=False)


def test_a_training_refuses_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InvalidRequest, match="ACCELERATE_MIXED_PRECISION is 'fp16', not followed here"):
        run_training(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_agree_change_no_bit(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    run_training(tmp_path)
    assert_same_training(tmp_path, whole)
