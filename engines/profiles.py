"""The shapes an engine is built for: smallest, best and largest, from the contract and the bundle's batch."""

from ilf_trt.contract import Batch, Graph, Port

MAX_TIMES = 128

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profile_of(graph: Graph, batch: Batch, *, times: int) -> Profile:
    """(min, opt, max) shape of every input that varies; `times` is the number of distinct times of the bundle's plan.

    `cond` takes 1 to 128 times, enough for 64 steps that all get feedback, and is tuned for the bundle's own; what it
    works in grows with the most, 784 MiB for 1024 times of DiT-XL/2.
    """
    return {port.name: _range(port, batch, times) for port in graph.inputs if _varies(port, batch)}


def _varies(port: Port, batch: Batch) -> bool:
    return any(isinstance(dim, str) and (dim == "T" or not batch.fixed) for dim in port.shape)


def _range(port: Port, batch: Batch, times: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    ends = ((batch.min, 1), (batch.opt, times), (batch.max, max(times, MAX_TIMES)))
    low, best, high = (port.resolve({"B": pictures, "2B": 2 * pictures, "T": count}) for pictures, count in ends)
    return low, best, high
