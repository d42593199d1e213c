"""The stand-ins have no name, parameter or value that the real cuda.core, TensorRT-RTX and ONNX Runtime lack."""

import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cuda.core
import cuda.core.graph
import cuda.core.system
import cuda.core.utils
import fake_cuda
import fake_errors
import fake_gpu
import fake_onnxruntime
import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx
from cuda.bindings import driver
from cuda.core._utils import cuda_utils

REAL: dict[str, Any] = {
    "cuda.core": cuda.core,
    "cuda.core.graph": cuda.core.graph,
    "cuda.core.utils": cuda.core.utils,
    "cuda.core.system": cuda.core.system,
    "cuda.core._utils.cuda_utils": cuda_utils,
    "cuda.bindings.driver": driver,
}
FAKE = fake_cuda.modules()
RTX = fake_tensorrt.FakeTensorRT(fake_gpu.FakeCuda((), None), "0").as_module("tensorrt_rtx")


def public(thing: Any) -> list[str]:
    """Names without an underscore, and the protocols that cross a border."""
    return [name for name in vars(thing) if not name.startswith("_") or name in ("__dlpack__", "__cuda_stream__")]


def classes_of_core() -> Iterator[tuple[str, type, type]]:
    """(name, fake, real) of every class; a base class's names count as its subclasses'."""
    for module, real in REAL.items():
        for name, thing in vars(FAKE[module]).items():
            if isinstance(thing, type):
                yield f"{module}.{name}", thing, getattr(real, name)


CLASSES = {name: (fake, real) for name, fake, real in classes_of_core()}
FUNCTIONS = {
    f"{name}.{attribute}": (getattr(fake, attribute), getattr(real, attribute, None))
    for name, (fake, real) in CLASSES.items()
    for attribute in public(fake)
    if inspect.isroutine(getattr(fake, attribute))
}


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """(name, kind, whether it may be left out) of each."""
    found = inspect.signature(function).parameters.values()
    return [(each.name, each.kind, each.default is not each.empty) for each in found]


@pytest.mark.parametrize("module", REAL)
def test_the_modules_have_no_name_that_cuda_lacks(module: str) -> None:
    assert [name for name in public(FAKE[module]) if not hasattr(REAL[module], name)] == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_have_no_name_that_cudas_lack(name: str) -> None:
    fake, real = CLASSES[name]
    assert [each for each in public(fake) if not hasattr(real, each)] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_methods_take_what_cudas_take(name: str) -> None:
    fake, real = FUNCTIONS[name]
    assert parameters(fake) == parameters(real)


@pytest.mark.parametrize("name", [name for name, (fake, _) in CLASSES.items() if dataclasses.is_dataclass(fake)])
def test_the_options_have_cudas_fields_and_defaults(name: str) -> None:
    fake, real = CLASSES[name]
    fields = [field.name for field in dataclasses.fields(fake)]
    values = fake(), real()
    assert [getattr(values[0], each) for each in fields] == [getattr(values[1], each) for each in fields]
    real(**{each: getattr(values[0], each) for each in fields})


def test_the_errors_have_names_of_cuda() -> None:
    names = {f"CUDA_ERROR_{name}" for name in fake_errors.EXPLANATIONS} | fake_errors.STICKY
    assert [name for name in names if not hasattr(driver.CUresult, name)] == []


def test_a_capability_has_cudas_fields() -> None:
    assert fake_cuda.ComputeCapability._fields == cuda_utils.ComputeCapability._fields


def answer(call: Callable[[], Any]) -> Any:
    """What it returns, or the type and first words of what it raises."""
    try:
        return call()
    except Exception as error:
        words = re.sub(r"\S*__init__", "__init__", str(error)).split()
        return type(error).__name__, " ".join(words[:4])


def view_of_an_array(core: Any, stream: int | None) -> tuple[Any, ...]:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = core.utils.StridedMemoryView.from_any_interface(array, stream)
    return view.shape, view.strides, view.dtype, view.device_id, view.is_device_accessible, view.readonly


ANSWERS: dict[str, Callable[[Any], Any]] = {
    "a stream of a handle": lambda core: int(core.Stream.from_handle(4096).handle),
    "its protocol": lambda core: core.Stream.from_handle(4096).__cuda_stream__(),
    "equal streams": lambda core: core.Stream.from_handle(4096) == core.Stream.from_handle(4096),
    "a stream by hand": lambda core: core.Stream(),
    "an event by hand": lambda core: core.Event(),
    "a buffer by hand": lambda core: core.Buffer(),
    "a builder by hand": lambda core: core.graph.GraphBuilder(),
    "a graph by hand": lambda core: core.graph.Graph(),
    "a buffer of a handle": lambda core: (core.Buffer.from_handle(4096, 8).handle, core.Buffer.from_handle(1, 8).size),
    "its owner": lambda core: core.Buffer.from_handle(4096, 8, owner="me").owner,
    "a copy without stream": lambda core: core.Buffer.from_handle(4096, 8).copy_from(
        core.Buffer.from_handle(8192, 8), stream=None
    ),
    "a copy on a number": lambda core: core.Buffer.from_handle(4096, 8).copy_from(
        core.Buffer.from_handle(8192, 8), stream=4096
    ),
    "an unknown option": lambda core: core.EventOptions(enable_timing=True),
    "a view of an array": lambda core: view_of_an_array(core, -1),
    "a view without stream": lambda core: view_of_an_array(core, None),
    "a view of nothing": lambda core: core.utils.StridedMemoryView.from_any_interface(3, -1),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_where_no_driver_is_asked_the_answers_are_cudas(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer(lambda: ANSWERS[what](cuda.core))
    fake_cuda.install(monkeypatch)
    assert answer(lambda: ANSWERS[what](FAKE["cuda.core"])) == wanted


@pytest.mark.parametrize("what", ["Device(0)", "Device.get_all_devices()", "system.get_user_mode_driver_version()"])
def test_without_a_driver_the_answers_are_cudas(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(core: Any) -> Any:
        calls = {
            "Device(0)": lambda: core.Device(0),
            "Device.get_all_devices()": core.Device.get_all_devices,
            "system.get_user_mode_driver_version()": core.system.get_user_mode_driver_version,
        }
        return answer(calls[what])

    wanted = ask(cuda.core)
    if wanted[0] != "DynamicLibNotFoundError":
        pytest.skip("this machine has a driver")
    fake_cuda.install(monkeypatch, driver=None)
    assert ask(FAKE["cuda.core"]) == wanted


# --- TensorRT-RTX


def rtx_classes() -> dict[str, type]:
    return {name: thing for name, thing in vars(RTX).items() if isinstance(thing, type)}


def test_the_library_has_no_name_that_rtx_lacks() -> None:
    assert [name for name in public(RTX) if not hasattr(tensorrt_rtx, name)] == []


def names_of(kind: type) -> set[str]:
    """Its public names, its bases' and what it gives its instances."""
    named = {name for each in kind.__mro__[:-1] for name in vars(each)}
    given = {
        target
        for each in kind.__mro__[:-1]
        if "__init__" in vars(each)
        for target in re.findall(r"self\.(\w+)\b[^=\n]*= ", inspect.getsource(each.__init__))
    }
    return {name for name in named | given if not name.startswith("_")}


@pytest.mark.parametrize("name", [name for name, kind in rtx_classes().items() if not issubclass(kind, enum.Enum)])
def test_the_librarys_classes_have_no_name_that_rtxs_lack(name: str) -> None:
    real = getattr(tensorrt_rtx, name)
    assert sorted(each for each in names_of(rtx_classes()[name]) if not hasattr(real, each)) == []


@pytest.mark.parametrize("name", [name for name, kind in rtx_classes().items() if issubclass(kind, enum.Enum)])
def test_the_librarys_enums_have_rtxs_values(name: str) -> None:
    real = getattr(tensorrt_rtx, name).__members__
    assert {each.name: each.value for each in rtx_classes()[name]}.items() <= {
        key: int(value) for key, value in real.items()
    }.items()


def test_a_loggers_severities_are_rtxs() -> None:
    real = tensorrt_rtx.ILogger.Severity.__members__
    assert {each.name: each.value for each in fake_tensorrt.Severity} == {
        key: int(value) for key, value in real.items()
    }


def overloads(text: str, name: str) -> list[list[str]]:
    """The parameter names of each signature in a docstring of pybind11."""
    lines = [line for line in text.splitlines() if re.match(rf"(\d+\. )?{name}\(self", line)]
    return [re.findall(r"(?:\(|, )(\w+): ", line) for line in lines]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (kind, name)
        for kind, thing in rtx_classes().items()
        if not issubclass(thing, enum.Enum)
        for name in sorted(names_of(thing))
        if inspect.isfunction(getattr(thing, name, None))
    ],
)
def test_the_librarys_methods_take_what_rtxs_take(kind: str, method: str) -> None:
    fake = getattr(rtx_classes()[kind], method)
    text = getattr(getattr(tensorrt_rtx, kind), method).__doc__
    assert list(inspect.signature(fake).parameters) in overloads(text, method)


def test_a_real_logger_must_be_constructed_too() -> None:
    class Careless(tensorrt_rtx.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"ILogger.__init__"):
        Careless()


# --- ONNX Runtime


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_onnxruntime.CudaBinding.bind_input, onnxruntime.IOBinding.bind_input),
        (fake_onnxruntime.CudaBinding.bind_output, onnxruntime.IOBinding.bind_output),
        (fake_onnxruntime.CudaSession.run_with_iobinding, onnxruntime.InferenceSession.run_with_iobinding),
        (fake_onnxruntime.FakeOnnxRuntime.session, onnxruntime.InferenceSession.__init__),
    ],
    ids=["bind_input", "bind_output", "run_with_iobinding", "InferenceSession"],
)
def test_sessions_take_what_onnx_runtimes_take(fake: Any, real: Any) -> None:
    assert parameters(fake) == parameters(real)


def test_sessions_have_no_name_that_onnx_runtimes_lack() -> None:
    used = {"name", "bound"}
    for fake, real in (
        (fake_onnxruntime.CudaSession, onnxruntime.InferenceSession),
        (fake_onnxruntime.CudaBinding, onnxruntime.IOBinding),
    ):
        assert [name for name in public(fake) if name not in used and not hasattr(real, name)] == []


@pytest.mark.parametrize(
    ("fake", "real", "kinds"),
    [
        (fake_onnxruntime.FakeOnnxRuntime.register, onnxruntime.register_execution_provider_library, ["str", "str"]),
        (fake_onnxruntime.FakeOnnxRuntime.devices, onnxruntime.get_ep_devices, []),
        (
            fake_onnxruntime.PlugInOptions.add_provider_for_devices,
            onnxruntime.SessionOptions.add_provider_for_devices,
            ["Sequence", "Mapping"],
        ),
    ],
    ids=["register", "get_ep_devices", "add_provider_for_devices"],
)
def test_the_plug_ins_calls_take_what_onnx_runtimes_take(fake: Any, real: Any, kinds: list[str]) -> None:
    """pybind names the arguments of these arg0 and arg1; the types are all that can be compared."""
    (taken,) = re.findall(r"^\w+\((.*)\) -> ", real.__doc__, re.MULTILINE)
    real_kinds = re.findall(r"arg\d: (?:[a-z_.]*\.)?(\w+)", taken)
    assert (real_kinds, len(parameters(fake)) - 1) == (kinds, len(kinds))


def test_the_plug_ins_devices_have_no_name_that_onnx_runtimes_lack() -> None:
    fields = [one.name for one in dataclasses.fields(fake_onnxruntime.EpDevice)]
    assert [name for name in fields if not hasattr(onnxruntime.OrtEpDevice, name)] == []


def test_every_fake_module_is_compared() -> None:
    empty = {name for name, module in FAKE.items() if not public_things(module)}
    assert set(FAKE) - empty == set(REAL)


def public_things(module: ModuleType) -> list[str]:
    return [name for name in public(module) if not isinstance(getattr(module, name), ModuleType)]
