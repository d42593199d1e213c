"""Runs a single graph of a bundle, for tools and for verification."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import DECODE, Graph, Port
from ilf_trt.errors import InvalidRequest, PortMismatch, told

from .arguments import array_of
from .loading import Loading, part_of


def run_single_graph(
    manifest: Manifest, loading: Loading, name: str, arrays: Mapping[str, ArrayLike]
) -> dict[str, NDArray[Any]]:
    """Arrays by input port -> new arrays by output port, float32 for a bfloat16 port; no memory stays bound.

    Raises PortMismatch for a missing array or another shape, InvalidRequest for an unknown graph.
    """
    loading.check_open()
    graphs = {each.name: each for each in manifest.graphs}
    graph = graphs.get(name) if isinstance(name, str) else None
    if graph is None:
        raise InvalidRequest(f"the bundle has no graph {told(name)}; it has {', '.join(graphs)}")
    if not isinstance(arrays, Mapping):
        raise InvalidRequest(f"{name}: arrays is {told(arrays)}, expected arrays by the names of its inputs")
    inputs = {port.name: _port_array(name, port, arrays.get(port.name)) for port in graph.inputs}
    sizes = _sizes(manifest, graph, inputs)
    with (
        loading.lend() as sessions,
        sessions(part_of(name)) as session,
        closing(session.new_call(graph, sizes)) as call,
    ):
        for port, array in inputs.items():
            call.inputs[port][...] = array
        call()
        return {port: array.copy() for port, array in call.outputs.items()}


def _port_array(graph: str, port: Port, array: ArrayLike | None) -> NDArray[Any]:
    if array is None:
        raise PortMismatch(f"{graph}: input {port.name!r} is missing; pass {port.dtype} {port.shape}")
    given = array_of(f"{graph}: input {port.name!r}", array)
    if given.dtype.kind not in ("iub" if port.dtype.startswith("int") else "fiub"):
        raise PortMismatch(f"{graph}: input {port.name!r} is {given.dtype}, expected {port.dtype}")
    if given.ndim != len(port.shape) or any(
        isinstance(expected, int) and expected != size for expected, size in zip(port.shape, given.shape, strict=True)
    ):
        raise PortMismatch(f"{graph}: input {port.name!r} is {given.shape}, expected {port.shape}")
    if port.below is not None and given.size and not 0 <= given.min() <= given.max() < port.below:
        raise PortMismatch(f"{graph}: input {port.name!r} holds a number outside of 0 to {port.below - 1}")
    with np.errstate(over="ignore"):  # a float that the port cannot hold becomes an infinity
        return given.astype(port.array_dtype, copy=False)


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
