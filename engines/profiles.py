"""The smallest, best and largest shapes of an engine, from the ports and the bundle's batch."""

from ilf_trt.contract.ports import DECODE, PICTURES, ROWS, Graph, Port
from ilf_trt.contract.spec import BatchRange, DecoderSpec, ModelSpec

MAX_TIMES = 128

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profile_of(
    graph: Graph, batch: BatchRange, spec: ModelSpec, *, times: int, decoder: DecoderSpec | None = None
) -> Profile:
    """(min, opt, max) shape of every input whose shape varies; `times` counts the distinct times of the bundle's plan.

    Graph `cond` takes 1 to 128 times, enough for 64 steps that all get feedback; its best shape has `times`. Scratch
    memory grows with the largest number: 784 MiB for 1024 times of DiT-XL/2. Sides range over the bundle's sizes, and
    the default size is the best one; those of a decoder with tiles range from one cell to the whole tile. A batch with
    guidance has one row per picture, or two.
    """
    ends = _ends(batch, spec, times)
    if graph.name == DECODE and decoder is not None and decoder.tile:
        ends = tuple(
            {**sizes, "H": side, "W": side} for sizes, side in zip(ends, (1, *[decoder.tile] * 2), strict=True)
        )
    return {port.name: _range(port, ends) for port in graph.inputs if _varies(port, batch)}


def _varies(port: Port, batch: BatchRange) -> bool:
    constant = (PICTURES, ROWS) if batch.fixed else ()
    return any(isinstance(dim, str) and dim not in constant for dim in port.shape)


def _ends(batch: BatchRange, spec: ModelSpec, times: int) -> tuple[dict[str, int], ...]:
    """The smallest, best and largest size of every symbol."""
    heights, widths = zip(*spec.sizes, strict=True)
    least, most = (min(heights), min(widths)), (max(heights), max(widths))
    twice = 2 * batch.max
    return (
        {PICTURES: batch.min, ROWS: twice if batch.fixed else batch.min, "T": 1, **spec.sides(least)},
        {PICTURES: batch.opt, ROWS: 2 * batch.opt, "T": times, **spec.sides(spec.latent[1:])},
        {PICTURES: batch.max, ROWS: twice, "T": max(times, MAX_TIMES), **spec.sides(most)},
    )


def _range(port: Port, ends: tuple[dict[str, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    low, best, high = (port.resolve(sizes) for sizes in ends)
    return low, best, high
