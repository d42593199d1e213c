"""The process that serves, on a GPU: times of both clocks, and the memory that it takes. The GPU is a stand-in."""

import json
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.bench.gpu_memory import GpuMemory
from ilf_trt.bench.runtime_process import RuntimeProcess
from tests.runtime.conftest import Compiled, Machine
from tests.runtime.conftest import compiled as compiled
from tests.runtime.conftest import machine as machine

LOAD = {"engine": None, "threads": 0, "steps": 3, "ilf_steps": 2, "feedback": None, "front": []}


def test_a_row_on_a_gpu_has_two_times_and_the_memory_of_its_process(
    dit_bundle: Path, machine: Machine, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = RuntimeProcess()
    monkeypatch.setattr(process, "_check_no_torch", lambda: None)  # this test's own process has it
    loaded = process.load({"bundle": str(compiled(dit_bundle)), "device": "cuda:0", **LOAD})
    asked: dict[str, Any] = {"batch": 2, "seed": 0, "guidance_scale": None, "prompts": [], "labels": [], "size": None}
    process.inputs({"boundary": "denoise", "path": str(tmp_path / "inputs.npz"), **asked})
    process.open({"slug": "ilf", "plan": json.loads(json.dumps(loaded["plans"]["ilf"]))})
    shot = process.shoot({"slug": "ilf"})
    assert 0 < shot["device_ms"] < shot["host_ms"]
    held_mib = machine.cuda.reserved_bytes() / (1 << 20)
    assert process.memory({})["peak_mib"] == pytest.approx(held_mib)
    assert set(process.profile({"slug": "ilf"})) == {"cond", "pre", "loop_body", "loop_feedback", "post", "host"}
    process._pipeline.close()


def test_memory_that_a_block_gives_back_counts_as_given_back() -> None:
    used = iter([100.0, 140.0, 150.0, 145.0])
    memory = GpuMemory(lambda: next(used))
    for _ in range(2):
        with memory.watch():
            pass
    assert memory.taken_mib == 35
