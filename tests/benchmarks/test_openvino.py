"""OpenVINO as a rival: without it one line says what to install; with it the engine runs a graph in bound memory."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rivals.openvino_engine import OpenVinoEngine
from benchmarks.speed import openvino as benchmark
from benchmarks.speed.openvino import (
    BF16,
    DIFFUSERS,
    F32,
    ILF,
    LABELS,
    ONNX_RUNTIME,
    OPENVINO,
    PLAIN,
    Row,
    csv_rows,
    relative_differences,
    take_turns,
    workers_of,
)
from ilf_trt.contract.plan import SCHEDULERS, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import EngineError, MissingDependency, PortMismatch
from tests.small_graph import SMALL, write_small

BASE, RIVAL, OWN = (
    Row(ONNX_RUNTIME, PLAIN, F32, 2),
    Row(OPENVINO, PLAIN, F32, 2),
    Row(OPENVINO, DIFFUSERS, F32, 2),
)


def test_without_openvino_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r"^openvino is not installed; pip install openvino$"):
        OpenVinoEngine(SMALL, tmp_path / "none.onnx", threads=1)
    monkeypatch.setattr(sys, "argv", ["openvino"])
    with pytest.raises(SystemExit, match=r"^openvino is not installed; pip install openvino$"):
        benchmark.main()


def test_a_row_is_held_against_onnx_runtime_with_its_steps_and_threads() -> None:
    assert RIVAL.base_line == OWN.base_line == BASE.base_line == BASE
    assert Row(OPENVINO, ILF, "bf16", 1).base_line == Row(ONNX_RUNTIME, ILF, F32, 1)


def test_every_turn_runs_every_row_once_and_turns_go_on_for_the_least_time() -> None:
    order: list[Row] = []

    def run_of(row: Row, ms: float) -> Callable[[], float]:
        def run() -> float:
            order.append(row)
            return ms

        return run

    assert take_turns({BASE: run_of(BASE, 2.0), RIVAL: run_of(RIVAL, 1.0)}, 3, 0.0) == {
        BASE: [2.0] * 3,
        RIVAL: [1.0] * 3,
    }
    assert order == [BASE, RIVAL] * 3
    assert len(take_turns({BASE: lambda: 1.0}, 1, 0.001)[BASE]) > 1


def test_latents_are_compared_with_those_of_the_base_line() -> None:
    latents = {BASE: np.array([1, -2], np.float32), RIVAL: np.array([1, -2.5], np.float32)}
    assert relative_differences(latents) == {BASE: 0.0, RIVAL: 0.25}


def test_every_base_line_has_a_process(tmp_path: Path) -> None:
    for model in LABELS:
        rows = {row for worker in workers_of(model, tmp_path, (F32, BF16)) for row in worker.rows.values()}
        assert {row.base_line for row in rows} <= rows
        assert {row.precision for row in rows if row.library == OPENVINO} == {F32, BF16}


def test_the_ratio_is_that_of_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "versions", lambda _: {"onnxruntime": "1.32.0", "openvino": "2026.4.1"})
    plans = {
        PLAIN: make_plan(SCHEDULERS["dpmsolver++"], 20, blocks=12, loop=Loop(3, 7), feedback="none"),
        ILF: make_plan(SCHEDULERS["dpmsolver++"], 10, blocks=12, loop=Loop(3, 7), feedback="outer:2"),
    }
    times_ms = {BASE: [10.0, 20.0, 40.0], RIVAL: [5.0, 10.0, 20.0], OWN: [20.0, 40.0, 80.0]}
    base, rival, own = csv_rows("demo", plans, times_ms, {BASE: 0.0, RIVAL: 1.21e-6, OWN: 2e-2})
    assert (base["faster_than_onnxruntime"], rival["faster_than_onnxruntime"]) == (1.0, 2.0)
    assert (rival["faster_low"], rival["faster_high"]) == (2.0, 2.0)
    assert own["faster_than_onnxruntime"] == 0.5
    assert (own["steps"], own["block_forwards"], rival["relative_difference"]) == (20, 240, "1.2e-06")
    assert (base["library_version"], rival["library_version"]) == ("1.32.0", "2026.4.1")


@pytest.fixture
def engine(tmp_path: Path) -> OpenVinoEngine:
    pytest.importorskip("openvino")
    return OpenVinoEngine(SMALL, write_small(tmp_path), threads=1)


def memory(pictures: int) -> dict[str, Any]:
    x = np.arange(3 * pictures, dtype=np.float32).reshape(pictures, 3)
    return {"x": x, "bias": np.array([10, 20, 30], np.float32), "y": np.zeros((pictures, 3), np.float32)}


def test_each_launch_reads_and_writes_its_own_arrays(engine: OpenVinoEngine) -> None:
    first, second = memory(2), memory(5)
    launches = [engine.bind(first), engine.bind(second)]
    for _ in range(2):
        first["x"] += 1
        for launch in launches:
            launch()
        np.testing.assert_array_equal(first["y"], first["x"] + first["bias"])
        np.testing.assert_array_equal(second["y"], second["x"] + second["bias"])


def test_it_refuses_arrays_that_it_would_copy_and_bindings_after_its_end(engine: OpenVinoEngine) -> None:
    arrays = memory(2)
    with pytest.raises(PortMismatch, match="x is strided float32, expected contiguous float32"):
        engine.bind(arrays | {"x": np.zeros((2, 6), np.float32)[:, ::2]})
    with pytest.raises(PortMismatch, match="y is contiguous float64"):
        engine.bind(arrays | {"y": np.zeros((2, 3))})
    engine.close()
    with pytest.raises(EngineError, match="small: the engine is closed"):
        engine.bind(arrays)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "small.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"OpenVINO refused .*small\.onnx"):
        OpenVinoEngine(SMALL, tmp_path / "small.onnx", threads=1)
