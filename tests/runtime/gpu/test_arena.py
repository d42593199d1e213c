"""Where the tensors of a trajectory lie: apart, aligned, and what the host writes first."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest

from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.contract.ports import ITEM_BYTES
from ilf_trt.runtime.gpu.arena import Arena, arena_of
from ilf_trt.runtime.gpu.cuda import ALIGNMENT
from ilf_trt.runtime.route import LATENTS, PREDICTIONS, Route, route_of
from ilf_trt.runtime.trajectory import Job


@pytest.fixture(params=["dit", "pixart", "whole_loop"])
def route(request: pytest.FixtureRequest) -> Route:
    built: BuildResult = request.getfixturevalue(f"{request.param}_build")
    manifest = built.bundle.manifest
    return route_of(manifest, Job(manifest.plan, 1, manifest.spec.latent[1:], guided=True))


def ends(arena: Arena) -> list[tuple[int, int]]:
    places = [(slot.offset, slot.offset + slot.size_bytes) for slot in arena.slots.values()]
    places += [
        (slot.dense, slot.dense + slot.row_bytes * slot.rows) for slot in arena.slots.values() if slot.dense is not None
    ]
    return sorted(places)


def test_no_two_tensors_overlap_and_all_fit(route: Route) -> None:
    arena = arena_of(route)
    assert set(arena.slots) == set(route.tensors)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends(arena)))
    assert ends(arena)[-1][1] <= arena.size_bytes


def test_every_tensor_and_every_row_is_aligned(route: Route) -> None:
    for slot in arena_of(route).slots.values():
        assert slot.offset % ALIGNMENT == 0
        assert slot.rows == 1 or slot.pitch % ALIGNMENT == 0
        assert (slot.dense or 0) % ALIGNMENT == 0


def test_a_slot_holds_its_tensor(route: Route) -> None:
    for name, slot in arena_of(route).slots.items():
        tensor = route.tensors[name]
        assert slot.row_bytes * slot.rows == prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        assert slot.size_bytes >= slot.row_bytes * slot.rows


def test_what_the_host_writes_comes_first_and_is_all_that_it_writes(route: Route) -> None:
    arena = arena_of(route)
    inputs = {name for name, slot in arena.slots.items() if slot.offset < arena.input_bytes}
    assert inputs == set(route.inputs)
    assert not inputs & route.fixed.keys()


def test_the_predictions_are_the_zeros(route: Route) -> None:
    arena = arena_of(route)
    begin, size = arena.zeros
    assert {name for name, slot in arena.slots.items() if begin <= slot.offset < begin + size} == {*PREDICTIONS}


def test_only_tables_whose_rows_are_not_aligned_are_written_elsewhere_first(route: Route) -> None:
    for name, slot in arena_of(route).slots.items():
        table = route.tensors[name].by_row and name not in route.inputs
        assert (slot.dense is not None) == (table and slot.row_bytes % ALIGNMENT != 0)


def test_the_start_and_the_result_are_latents(route: Route) -> None:
    assert LATENTS[0] in route.inputs
    assert route.result in LATENTS


def test_bytes_of_every_dtype_of_a_port_are_known() -> None:
    assert ITEM_BYTES == {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}
