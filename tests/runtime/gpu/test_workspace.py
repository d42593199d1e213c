"""The memory of a session on a GPU: the scratch that its work needs, and nothing that stays. The GPU is a stand-in."""

from pathlib import Path

import pytest

from ilf_trt.errors import OutOfMemory
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu.cuda import Gpu
from ilf_trt.runtime.gpu.scratch import Scratch
from tests.runtime.conftest import SCRATCH_BYTES, Compiled, Machine
from tests.runtime.gpu.test_device import DEVICE, close_to, conditions, on_cpu

LARGEST = max(SCRATCH_BYTES.values())


def allocations(machine: Machine) -> list[int]:
    return [entry[1] for entry in machine.cuda.journal if entry[0] == "allocate"]


def test_a_session_has_one_scratch_of_what_its_shapes_need(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        most = pipeline.manifest.batch.max
        needed = {pictures: LARGEST * pictures // most for pictures in (1, 2, most)}
        for pictures in (1, 1, most, 2):
            before = len(allocations(machine))
            pipeline.generate(**conditions(pipeline, pictures))
            new = [size for size in allocations(machine)[before:] if size in needed.values()]
            assert new == ([needed[pictures]] if (pictures in (1, most) and before == 0) or pictures == most else new)
        got = [size for size in allocations(machine) if size in needed.values()]
        assert got == [needed[1], needed[most]]


def test_a_graph_is_captured_again_where_the_scratch_has_moved(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = {pictures: on_cpu(dit_bundle, pictures) for pictures in (1, 3)}
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        captured = []
        for pictures in (1, 1, 3, 3, 1, 1, 3):
            result = pipeline.generate(**conditions(pipeline, pictures))
            assert close_to(result.latents, wanted[pictures])
            captured.append(result.timings.captured)
        assert captured == [False, True, False, True, False, True, True]


def test_a_single_graph_works_where_the_scratch_has_moved(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        lent = next(iter(pipeline._loading.lend_each()))
        border = next(graph for graph in pipeline.manifest.graphs if graph.name == "loop_feedback")
        with lent as sessions, sessions("transformer") as session:
            small, large = (session.call(border, {"B": pictures, "R": 2 * pictures}) for pictures in (1, 8))
            for call in (small, large, small):
                for array in call.inputs.values():
                    array[:] = 0.5
                call()
            (got,), (other,) = small.outputs.values(), large.outputs.values()
            assert close_to(got, other[:2])


def test_scratch_that_cannot_grow_is_what_it_was(machine: Machine) -> None:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    scratch = Scratch(gpu, stream)
    assert (scratch.address, scratch.size_bytes) == (0, 0)
    scratch.reserve(1024)
    machine.cuda.fail("allocate")
    with pytest.raises(OutOfMemory):
        scratch.reserve(4096)
    assert scratch.size_bytes == 1024
    scratch.reserve(512)
    assert scratch.size_bytes == 1024
    scratch.close()
    stream.close()


def test_a_session_that_ran_out_of_memory_while_it_grew_goes_on(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 1)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        pipeline.generate(**conditions(pipeline, 1))
        machine.cuda.fail("allocate", after=1, times=9)  # the arena is there, the scratch is not
        with pytest.raises(OutOfMemory):
            pipeline.generate(**conditions(pipeline, 9))
        machine.cuda._faults.clear()
        assert close_to(pipeline.generate(**conditions(pipeline, 1)).latents, wanted)


def test_a_closed_pipeline_keeps_no_memory(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        assert machine.cuda.reserved_bytes()
    assert machine.cuda.reserved_bytes() == 0


def test_parts_that_take_turns_leave_each_other_all_memory(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, low_memory=True) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        assert machine.cuda.reserved_bytes() == 0


def test_the_used_memory_of_a_gpu_is_what_its_processes_hold(machine: Machine) -> None:
    gpu = Gpu.open(1)
    stream = gpu.stream()
    assert gpu.used_bytes() == 0
    memory = gpu.allocate(4096, stream)
    assert gpu.used_bytes() == 4096
    memory.close()
    stream.sync()
    assert gpu.used_bytes() == 4096
    gpu.trim()
    assert gpu.used_bytes() == 0
    stream.close()
