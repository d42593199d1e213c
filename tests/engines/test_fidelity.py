"""Every name of the engine library and of Polygraphy that the source uses exists, read without running it.

TensorRT itself is on no machine of CI. Its Python names were compared with TensorRT-RTX's by loading the bindings of
TensorRT 10.13.3 and 11.4.0 over empty libraries: `ONLY_RTX` are those that both of them lack.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx
from polygraphy.backend.trt import CreateConfig

ENGINES = Path(__file__).parents[2] / "engines"
MODULES = ("trt", "module")
OBJECTS = {
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
OF_THE_LIBRARY = ("builder.py", "library.py", "progress.py")
ONLY_RTX = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "IRuntimeCache",
    "IWeightsManager",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
    "Runtime.get_engine_validity",
}
CALLBACKS = {
    "phase_start": 4,
    "step_complete": 3,
    "phase_finish": 2,
}  # parameters with self, as TensorRT documents them


def sources() -> list[tuple[str, ast.Module]]:
    return [(path.name, ast.parse(path.read_text(), path)) for path in sorted(ENGINES.glob("*.py"))]


def chain_of(node: ast.AST) -> list[str]:
    """`a.b[0].c` -> [a, b, c]; nothing for what does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def names_used(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the library, `BuilderFlag.TF32` or `IBuilderConfig.clear_flag`; a prefix of one counts too."""
    for node in ast.walk(tree):
        chain = chain_of(node)
        if len(chain) > 1 and chain[0] in MODULES:
            yield ".".join(chain[1:])
        elif len(chain) > 1 and chain[0] in OBJECTS:
            yield f"{OBJECTS[chain[0]]}.{chain[1]}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            owner, name = node.args[:2]
            if (chain := chain_of(owner)) and chain[0] in MODULES and isinstance(name, ast.Constant):
                yield ".".join([*chain[1:], str(name.value)])


def names_of(file: str) -> set[str]:
    return {name for found, tree in sources() if found == file for name in names_used(tree)}


def missing(names: set[str]) -> set[str]:
    """Names that TensorRT-RTX has not."""

    def exists(name: str) -> bool:
        value: Any = tensorrt_rtx
        for part in name.split("."):
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True

    return {name for name in names if not exists(name)}


@pytest.mark.parametrize("file", OF_THE_LIBRARY)
def test_every_name_of_the_library_exists(file: str) -> None:
    assert names_of(file)
    assert missing(names_of(file)) == set()


def test_no_other_file_speaks_to_the_library() -> None:
    speaking = {
        name for name, tree in sources() for node in ast.walk(tree) if chain_of(node)[:1] in ([m] for m in MODULES)
    }
    assert speaking == set(OF_THE_LIBRARY)


def test_what_tensorrt_lacks_is_asked_of_tensorrt_rtx_alone() -> None:
    used = set().union(*map(names_of, OF_THE_LIBRARY))
    assert {name for name in used if name in ONLY_RTX or name.split(".")[0] in ONLY_RTX} == {
        "ComputeCapability",
        "ComputeCapability.__members__",
    }
    assert missing(ONLY_RTX) == set()


def test_the_monitor_takes_what_the_library_passes() -> None:
    (monitor,) = (
        node
        for name, tree in sources()
        if name == "progress.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    taken = {item.name: len(item.args.args) for item in monitor.body if isinstance(item, ast.FunctionDef)}
    assert {name: count for name, count in taken.items() if name != "__init__"} == CALLBACKS
    for name, count in CALLBACKS.items():
        signature = getattr(tensorrt_rtx.IProgressMonitor, name).__doc__.splitlines()[0]
        assert len(re.findall(r"\w+: ", signature)) == count, signature


def test_every_name_of_polygraphy_exists() -> None:
    imported = [
        (node.module, alias.name)
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polygraphy")
        for alias in node.names
    ]
    assert ("polygraphy.backend.trt", "engine_bytes_from_network") in imported
    assert [name for module, name in imported if not hasattr(import_module(module), name)] == []


def test_every_option_of_the_builder_is_one_that_polygraphy_takes() -> None:
    (tree,) = (tree for name, tree in sources() if name == "builder.py")
    given: set[str] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "options"
            and isinstance(node.value, ast.Dict)
        ):
            given |= {str(ast.literal_eval(key)) for key in node.value.keys if key}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "options":
            given.add(str(ast.literal_eval(node.slice)))
    shared_with_rtx = CreateConfig.__mro__[1]
    assert {"profiles", "progress_monitor", "memory_pool_limits", "hardware_compatibility_level"} <= given
    assert given <= inspect.signature(shared_with_rtx.__init__).parameters.keys()


@pytest.mark.parametrize(
    "text",
    ["trt.BuilderFlag.TF23", "config.clear_flags(1)", "hasattr(trt.BuilderFlag, 'TF23')", "network[1].num_layer"],
)
def test_a_typing_error_is_found(text: str) -> None:
    assert missing(set(names_used(ast.parse(text))))
