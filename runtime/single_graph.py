"""Runs a single graph of a bundle, for tools and for verification."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import DECODE, Graph, Port
from ilf_trt.errors import InvalidRequest, PortMismatch

from .loading import Loading, part_of


def run_single_graph(
    manifest: Manifest, loading: Loading, name: str, arrays: Mapping[str, ArrayLike]
) -> dict[str, NDArray[Any]]:
    """Arrays by input port -> new arrays by output port, float32 for a bfloat16 port; no memory stays bound.

    Raises PortMismatch for a missing array or another shape, InvalidRequest for an unknown graph.
    """
    graph = next((each for each in manifest.graphs if each.name == name), None)
    if graph is None:
        names = ", ".join(each.name for each in manifest.graphs)
        raise InvalidRequest(f"the bundle has no graph {name!r}; it has {names}")
    inputs = {port.name: _port_array(name, port, arrays.get(port.name)) for port in graph.inputs}
    sizes = _sizes(manifest, graph, inputs)
    with loading.session(part_of(name)) as session, closing(session.new_call(graph, sizes)) as call:
        for port, array in inputs.items():
            call.inputs[port][...] = array
        call()
        return {port: array.copy() for port, array in call.outputs.items()}


def _port_array(graph: str, port: Port, array: ArrayLike | None) -> NDArray[Any]:
    if array is None:
        raise PortMismatch(f"{graph}: input {port.name!r} is missing; pass {port.dtype} {port.shape}")
    got = np.asarray(array, dtype=port.array_dtype)
    if len(got.shape) != len(port.shape) or any(
        isinstance(expected, int) and expected != size for expected, size in zip(port.shape, got.shape, strict=True)
    ):
        raise PortMismatch(f"{graph}: input {port.name!r} is {got.shape}, expected {port.shape}")
    return got


def _sizes(manifest: Manifest, graph: Graph, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The size of every symbol of a graph, from the shapes of its inputs."""
    sizes: dict[str, int] = {}
    for port in graph.inputs:
        for dim, size in zip(port.shape, arrays[port.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise PortMismatch(
                    f"{graph.name}: input {port.name!r} has {dim} = {size}, another input has {sizes[dim]}; "
                    "pass arrays of one size"
                )
    if graph.name == DECODE and manifest.decoder is not None:
        scale = manifest.decoder.scale
        sizes |= {f"{scale}{name}": side * scale for name, side in sizes.items()}
    return sizes
