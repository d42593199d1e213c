"""One graph of a bundle alone, once, for tools and for the verification."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import DECODE, Graph, Port
from ilf_trt.errors import InvalidRequest, PortMismatch
from ilf_trt.runtime.loading import GRAPHS_OF, Stages


def run_alone(
    manifest: Manifest, stages: Stages, graph: str, arrays: Mapping[str, ArrayLike]
) -> dict[str, NDArray[Any]]:
    """Arrays by input port -> new arrays by output port; bfloat16 as float32.

    Raises PortMismatch for a missing array or a wrong shape, InvalidRequest for an unknown graph.
    """
    border = next((each for each in manifest.graphs if each.name == graph), None)
    if border is None:
        names = ", ".join(each.name for each in manifest.graphs)
        raise InvalidRequest(f"the bundle has no graph {graph!r}; it has {names}")
    given = {port.name: _as_port(graph, port, arrays.get(port.name)) for port in border.inputs}
    sizes = _sizes(manifest, border, given)
    outputs = {port.name: np.zeros(port.resolve(sizes), port.array_dtype) for port in border.outputs}
    stage = next(name for name, graphs in GRAPHS_OF.items() if graph in graphs)
    with stages.session(stage) as (place, _):
        place.run(border, given, outputs)
    return outputs


def _as_port(graph: str, port: Port, array: ArrayLike | None) -> NDArray[Any]:
    if array is None:
        raise PortMismatch(f"{graph}: input {port.name!r} is missing, it is {port.dtype} {port.shape}")
    found = np.ascontiguousarray(array, dtype=port.array_dtype)
    if len(found.shape) != len(port.shape) or any(
        isinstance(want, int) and want != got for want, got in zip(port.shape, found.shape, strict=True)
    ):
        raise PortMismatch(f"{graph}: input {port.name!r} is {found.shape}, expected {port.shape}")
    return found


def _sizes(manifest: Manifest, graph: Graph, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """What every symbol of a graph stands for, by what the inputs have."""
    sizes: dict[str, int] = {}
    for port in graph.inputs:
        for dim, size in zip(port.shape, arrays[port.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise PortMismatch(f"{graph.name}: input {port.name!r} has {dim} = {size}, others have {sizes[dim]}")
    if graph.name == DECODE and manifest.decoder is not None:
        scale = manifest.decoder.scale
        sizes |= {f"{scale}{name}": side * scale for name, side in sizes.items()}
    return sizes
