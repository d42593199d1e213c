"""The ONNX Runtime engine: what it runs, what it refuses to load, and what it refuses to bind."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.ports import Graph, Port, Role
from ilf_trt.errors import EngineError, PortMismatch
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tests.small_graph import SMALL, write_small

PICTURES = 2

Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path)


@pytest.fixture
def engine(path: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(SMALL, OnnxFile.of_path(path), threads=1)


def arrays() -> Arrays:
    return {
        "x": np.arange(3 * PICTURES, dtype=np.float32).reshape(PICTURES, 3),
        "bias": np.array([10, 20, 30], np.float32),
        "y": np.zeros((PICTURES, 3), np.float32),
    }


def test_a_launch_writes_into_the_bound_output(engine: OnnxRuntimeEngine) -> None:
    memory = arrays()
    engine.bind(memory)()
    np.testing.assert_array_equal(memory["y"], memory["x"] + memory["bias"])


def test_a_launch_reads_its_inputs_again_each_time(engine: OnnxRuntimeEngine) -> None:
    memory = arrays()
    launch = engine.bind(memory)
    launch()
    memory["x"] += 100
    launch()
    np.testing.assert_array_equal(memory["y"], memory["x"] + memory["bias"])


def test_two_bindings_do_not_touch_each_others_memory(engine: OnnxRuntimeEngine) -> None:
    first, second = arrays(), arrays()
    second["x"] *= -1
    launches = [engine.bind(first), engine.bind(second)]
    for launch in launches:
        launch()
    np.testing.assert_array_equal(first["y"], first["x"] + first["bias"])
    np.testing.assert_array_equal(second["y"], second["x"] + second["bias"])


def test_a_launch_keeps_its_memory_alive(engine: OnnxRuntimeEngine) -> None:
    memory = arrays()
    y = memory["y"]
    launch = engine.bind(memory)
    memory.clear()
    scratch = [np.full((PICTURES, 3), 9, np.float32) for _ in range(100)]  # takes freed memory, if there is any
    launch()
    np.testing.assert_array_equal(y, [[10, 21, 32], [13, 24, 35]])
    assert all((array == 9).all() for array in scratch)


def test_a_row_of_a_table_is_read_in_place(engine: OnnxRuntimeEngine) -> None:
    memory, table = arrays(), np.arange(12, dtype=np.float32).reshape(4, 3)
    engine.bind({**memory, "bias": table[2]})()
    np.testing.assert_array_equal(memory["y"], memory["x"] + [6, 7, 8])


def test_more_arrays_than_ports_are_left_alone(engine: OnnxRuntimeEngine) -> None:
    memory, other = arrays(), np.zeros(3, np.float64)
    engine.bind({**memory, "other": other})()
    assert not other.any()


@pytest.mark.parametrize("name", ["x", "bias", "y"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4"])
def test_another_dtype_is_refused_by_the_ports_name(engine: OnnxRuntimeEngine, name: str, dtype: str) -> None:
    memory = arrays()
    with pytest.raises(PortMismatch, match=rf"small: {name} is .*, expected contiguous float32"):
        engine.bind({**memory, name: memory[name].astype(dtype)})


@pytest.mark.parametrize(
    "view", [lambda x: np.asfortranarray(x), lambda x: x.repeat(2, axis=1)[:, ::2], lambda x: x[:, ::-1]]
)
def test_memory_that_is_not_contiguous_is_refused(
    engine: OnnxRuntimeEngine, view: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    memory = arrays()
    with pytest.raises(PortMismatch, match=r"small: x is .*, expected contiguous float32"):
        engine.bind({**memory, "x": view(memory["x"])})


def test_a_run_that_fails_is_an_engine_error_in_one_line(engine: OnnxRuntimeEngine) -> None:
    launch = engine.bind({**arrays(), "bias": np.zeros(4, np.float32)})
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed in graph small: .+$") as caught:
        launch()
    assert "\n" not in str(caught.value)


def test_output_memory_of_another_size_is_an_error_and_not_written_past(engine: OnnxRuntimeEngine) -> None:
    memory = np.full((4, 3), 7, np.float32)
    launch = engine.bind({**arrays(), "y": memory[:1]})
    with pytest.raises(EngineError):
        launch()
    assert (memory == 7).all()


PORT_CHANGES = {
    "dtype of an input": replace(SMALL, inputs=(replace(SMALL.inputs[0], dtype="float16"), SMALL.inputs[1])),
    "dtype of an output": replace(SMALL, outputs=(replace(SMALL.outputs[0], dtype="int32"),)),
    "name of an input": replace(SMALL, inputs=(replace(SMALL.inputs[0], name="z"), SMALL.inputs[1])),
    "name of an output": replace(SMALL, outputs=(replace(SMALL.outputs[0], name="z"),)),
    "a port less": replace(SMALL, inputs=SMALL.inputs[:1]),
    "a port more": replace(SMALL, outputs=(*SMALL.outputs, Port("z", (1,), "float32", Role.TOKENS))),
    "an output among the inputs": Graph("small", (*SMALL.inputs, *SMALL.outputs), ()),
}


@pytest.mark.parametrize("change", PORT_CHANGES)
def test_a_border_that_the_graph_does_not_have_is_refused(change: str, path: Path) -> None:
    with pytest.raises(PortMismatch, match=r"^small: port '[xyz]|^small: port 'bias'"):
        OnnxRuntimeEngine(PORT_CHANGES[change], OnnxFile.of_path(path), threads=1)


@pytest.mark.parametrize("graph", ["pre", "cond"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".onnx", ".onnx.data"])
def test_a_truncated_file_is_an_engine_error_in_one_readable_line(
    dit_bundle: Path, tmp_path: Path, graph: str, kept: float, suffix: str
) -> None:
    bundle = Bundle.open(dit_bundle)
    shutil.copytree(dit_bundle / "graphs", tmp_path / "graphs")
    path = tmp_path / "graphs" / f"{graph}.onnx"
    damaged = path.with_suffix(suffix)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(kept * len(content))])
    border = next(one for one in bundle.manifest.graphs if one.name == graph)
    with pytest.raises(EngineError, match=r"^ONNX Runtime refused .*; build the bundle again$") as caught:
        OnnxRuntimeEngine(border, OnnxFile.of_path(path), threads=1)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(EngineError, match=r"text\.onnx"):
        OnnxRuntimeEngine(SMALL, OnnxFile.of_path(tmp_path / "text.onnx"), threads=1)


def test_close_may_be_called_twice(engine: OnnxRuntimeEngine) -> None:
    engine.close()
    engine.close()


def test_binding_a_closed_engine_is_an_engine_error(engine: OnnxRuntimeEngine) -> None:
    engine.close()
    with pytest.raises(EngineError, match="small"):
        engine.bind(arrays())
