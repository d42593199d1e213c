"""A trajectory on a GPU: the CPU's numbers, and what it does not do on the way. The GPU is a stand-in that computes."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import DeviceLost, EngineError, InvalidRequest, NonFinite, OutOfMemory
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.session import KEPT_TRAJECTORIES
from tests.conftest import CLASSES, TEXT_CHANNELS, TEXT_TOKENS
from tests.runtime.conftest import SCRATCH_BYTES, Compiled, Machine

DEVICE = "cuda:0"
# One ONNX Runtime on one machine: the same products in the same order.
SAME = 1e-6
RUNS_OF_A_STEP = {False: 3, True: 5}
TIMEOUT_S = 60


def conditions(pipeline: Pipeline, pictures: int, seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    text = (pictures, TEXT_TOKENS, TEXT_CHANNELS)
    values = {
        "class_labels": rng.integers(0, CLASSES, pictures).astype(np.int32),
        "text": rng.standard_normal(text, np.float32),
        "negative_text": rng.standard_normal(text, np.float32),
        "text_mask": np.ones(text[:2], np.float32),
        "negative_text_mask": np.ones(text[:2], np.float32),
        "resolution": rng.uniform(64, 512, (pictures, 2)).astype(np.float32),
        "aspect_ratio": rng.uniform(0.5, 2, (pictures, 1)).astype(np.float32),
    }
    return {port.name: values[port.name] for port in pipeline.manifest.spec.conditions}


def on_cpu(bundle: Path, pictures: int, **options: Any) -> NDArray[np.float32]:
    seed = options.pop("asked", 1)
    with Pipeline.load(bundle, threads=1) as pipeline:
        return pipeline.generate(**conditions(pipeline, pictures, seed), **options).latents


def close_to(got: Any, wanted: NDArray[np.float32]) -> bool:
    return float(np.abs(np.asarray(got) - wanted).max()) <= SAME * float(np.abs(wanted).max())


@pytest.mark.parametrize("which", ["dit", "pixart", "whole_loop"])
@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx", "onnxruntime"])
def test_a_trajectory_is_the_cpus(
    which: str, engine: str, request: pytest.FixtureRequest, machine: Machine, compiled: Compiled
) -> None:
    built: BuildResult = request.getfixturevalue(f"{which}_build")
    bundle = built.bundle.path if engine == "onnxruntime" else compiled(built.bundle.path, engine)
    pictures = 1 if which == "whole_loop" else 3
    with Pipeline.load(bundle, device=DEVICE) as pipeline:
        for seed in (7, 8, 9):  # enqueued, captured, and replayed with other numbers
            options = {"seed": seed, "guidance_scale": 1.0 + seed / 4}
            result = pipeline.generate(**conditions(pipeline, pictures, seed), **options)
            assert close_to(result.latents, on_cpu(built.bundle.path, pictures, asked=seed, **options))
            assert result.timings.captured == (engine != "onnxruntime" and seed > 7)


def test_a_replaced_plan_and_another_batch_are_the_cpus(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        plans = [pipeline.plan(4, feedback="none"), pipeline.plan(3, feedback="all"), pipeline.plan(5, feedback="0,2")]
        for _ in range(2):
            for pictures, plan in zip((1, 5, 2), plans, strict=True):
                got = pipeline.generate(plan=plan, **conditions(pipeline, pictures)).latents
                assert close_to(got, on_cpu(dit_bundle, pictures, plan=plan))


def test_a_picture_that_overflowed_leaves_nothing_to_the_next(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        for _ in range(2):
            with pytest.raises(NonFinite, match="guidance_scale 3e\\+38; pass a smaller guidance_scale"):
                pipeline.generate(guidance_scale=3e38, **conditions(pipeline, 2))
            assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, wanted)


def test_a_generation_is_a_copy_a_launch_a_copy_and_one_wait(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        with machine.cuda.during() as counted:
            pipeline.generate(**conditions(pipeline, 2))
        assert (counted.copies, counted.launches, counted.syncs) == (2, 1, 1)
        assert (counted.allocations, counted.frees, counted.captures, counted.engine_runs) == (0, 0, 0, 0)


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime"])
def test_runs_that_are_enqueued_wait_and_allocate_no_more(
    engine: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, engine=engine) as pipeline:
        for profile in (False, True):
            pipeline.generate(**conditions(pipeline, 2), profile=profile)
        with machine.cuda.during() as counted:
            pipeline.generate(**conditions(pipeline, 2), profile=True)
        assert (counted.syncs, counted.launches) == (1, 0)
        assert (counted.allocations, counted.frees, counted.captures) == (0, 0, 0)


def test_the_graph_holds_every_run_in_order_and_nothing_between_the_steps(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        (labels,) = machine.cuda.captured
        wanted = ["cond"]
        for step in pipeline.manifest.plan.steps:
            wanted += ["pre", "loop_body", *(["loop_feedback", "loop_body"] if step.feedback else []), "post"]
        runs = [label[1] for label in labels if label[0] == "engine"]
        assert runs == wanted
        first_step = labels.index(("engine", "pre"))
        assert {label[0] for label in labels[first_step:]} == {"engine"}


def test_all_work_of_a_session_is_on_one_stream(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        before = set(machine.cuda.streams_used)
        for _ in range(2):
            pipeline.generate(**conditions(pipeline, 2))
        assert len(machine.cuda.streams_used - before) == 1


def test_sessions_share_weights_and_have_memory_of_their_own(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = [on_cpu(dit_bundle, 2, asked=seed, seed=seed) for seed in range(4)]
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=3) as pipeline, ThreadPoolExecutor(3) as threads:
        pipeline.warm_up(2)
        loaded = len(machine.tensorrt.deserialized)

        def generate(seed: int) -> Any:
            return pipeline.generate(seed=seed, **conditions(pipeline, 2, seed)).latents

        got = list(threads.map(generate, [0, 1, 2, 3] * 3, timeout=TIMEOUT_S))
        assert len(machine.tensorrt.deserialized) == loaded == len(SCRATCH_BYTES)
    assert all(close_to(each, wanted[index % 4]) for index, each in enumerate(got))


def test_a_thread_that_never_saw_the_gpu_makes_a_session_and_runs_a_graph(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        with ThreadPoolExecutor(1) as thread:
            assert close_to(
                thread.submit(lambda: pipeline.generate(**conditions(pipeline, 2)).latents).result(), wanted
            )
        with ThreadPoolExecutor(1) as thread:
            border = next(graph for graph in pipeline.manifest.graphs if graph.name == "loop_feedback")
            sizes = {"B": 2, "R": 4}
            arrays = {port.name: np.ones(port.resolve(sizes), port.dtype) for port in border.inputs}
            (feedback,) = thread.submit(pipeline.run, "loop_feedback", arrays).result().values()
    with Pipeline.load(dit_bundle, threads=1) as cpu:
        assert close_to(feedback, cpu.run("loop_feedback", arrays)["feedback"])


def test_warm_up_leaves_nothing_to_bind_or_capture(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=2) as pipeline:
        pipeline.warm_up(3)
        assert machine.cuda.captures == 2
        with machine.cuda.during() as counted:
            assert pipeline.generate(**conditions(pipeline, 3)).timings.captured
        assert (counted.allocations, counted.captures) == (0, 0)


def test_the_oldest_trajectories_go(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        for pictures in range(1, KEPT_TRAJECTORIES + 3):
            pipeline.generate(plan=pipeline.plan(1, feedback="none"), **conditions(pipeline, pictures))
        assert len(machine.cuda.graphs) == KEPT_TRAJECTORIES


def test_a_profile_times_every_graph_and_step(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        timings = pipeline.generate(**conditions(pipeline, 2), profile=True).timings
        assert list(timings.graph_ms) == list(SCRATCH_BYTES)
        assert all(milliseconds > 0 for milliseconds in (*timings.graph_ms.values(), *timings.step_ms))
        assert timings.device_ms is not None
        assert sum(timings.step_ms) < sum(timings.graph_ms.values()) <= timings.device_ms
        assert not timings.captured
        assert pipeline.generate(**conditions(pipeline, 2)).timings.captured


def test_without_a_profile_only_the_whole_is_timed(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        timings = pipeline.generate(**conditions(pipeline, 2)).timings
        assert (timings.graph_ms, timings.step_ms) == ({}, ())
        assert timings.device_ms is not None
        assert timings.launch_us is not None
        assert 0 < timings.device_ms < timings.total_ms
        assert 0 < timings.launch_us < timings.total_ms * 1e3
        assert timings.steps == len(pipeline.manifest.plan.steps)
        assert timings.overhead_us_per_step > 0


def test_every_run_and_every_launch_is_a_range_of_a_profiler(
    dit_bundle: Path, machine: Machine, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    class Annotate:
        def __init__(self, name: str, domain: str) -> None:
            self.name = f"{domain}: {name}"

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Annotate))
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        asked = {"plan": pipeline.plan(2, feedback="0"), **conditions(pipeline, 1)}
        pipeline.generate(**asked, profile=True)
        runs = ["cond", *(f"step 0 {name}" for name in ("pre", "loop_body", "loop_feedback", "loop_body", "post"))]
        assert entered[:7] == [f"ilf-trt: {name}" for name in (*runs, "step 1 pre")]
        pipeline.generate(**asked)
        assert entered[-1] == "ilf-trt: trajectory of 2 steps"


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler"])
def test_latents_come_and_go_on_the_gpu(scheduler: str, dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        plan = pipeline.plan(4)
        if scheduler == "euler":
            euler = {**DEFAULT_SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
            spec = pipeline.manifest.spec
            plan = make_plan(euler, 4, blocks=spec.blocks, loop=spec.loop, feedback="outer:1")
            assert plan.initial_scale != 1
        noise = pipeline.generate(**conditions(pipeline, 2), on_device=True).latents
        as_array = pipeline.generate(**conditions(pipeline, 2)).latents
        assert noise.shape == as_array.shape
        assert noise.__dlpack_device__() == (2, 0)
        for _ in range(2):
            got = pipeline.generate(latents=noise, plan=plan, **conditions(pipeline, 2)).latents
            assert close_to(got, on_cpu(dit_bundle, 2, latents=as_array, plan=plan))
        noise.close()


def test_foreign_latents_of_another_shape_or_dtype_are_refused(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        noise = pipeline.generate(**conditions(pipeline, 2), on_device=True).latents
        with pytest.raises(InvalidRequest, match=r"float32 \(2, 1, 8, 8\), expected float32 \(3, 1, 8, 8\)"):
            pipeline.generate(latents=noise, **conditions(pipeline, 3))
        noise.close()


def test_latents_that_are_not_contiguous_are_refused(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        noise = pipeline.generate(**conditions(pipeline, 2), on_device=True).latents
        columns = (64, 64, 1, 8)
        view = sys.modules["cuda.core.utils"].StridedMemoryView
        turned = view.from_buffer(noise._owner._memory.core, noise.shape, columns, dtype=noise.dtype)
        with pytest.raises(InvalidRequest, match=r"not contiguous; pass latents\.contiguous\(\)"):
            pipeline.generate(latents=turned, **conditions(pipeline, 2))
        noise.close()


def test_two_gpus_run_apart_and_take_only_their_own_latents(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    bundle, wanted = compiled(dit_bundle), on_cpu(dit_bundle, 2)
    with Pipeline.load(bundle, device="cuda:0") as first, Pipeline.load(bundle, device="cuda:1") as second:
        for _ in range(2):
            for pipeline in (first, second):
                assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, wanted)
        noise = first.generate(**conditions(first, 2), on_device=True).latents
        with pytest.raises(InvalidRequest, match="latents are on cuda:0, the pipeline is on cuda:1; move them"):
            second.generate(latents=noise, **conditions(second, 2))
        noise.close()


def test_latents_on_a_gpu_are_refused_by_a_pipeline_on_the_cpu(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with (
        Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline,
        Pipeline.load(dit_bundle, threads=1) as cpu,
    ):
        noise = pipeline.generate(**conditions(pipeline, 2), on_device=True).latents
        with pytest.raises(InvalidRequest, match="latents are on a GPU, the pipeline on the CPU"):
            cpu.generate(latents=noise, **conditions(cpu, 2))
        noise.close()


def test_a_closed_pipeline_holds_nothing_and_says_so(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    pipeline = Pipeline.load(compiled(dit_bundle), device=DEVICE)
    asked = conditions(pipeline, 2)
    pipeline.generate(**asked)
    pipeline.close()
    pipeline.close()
    assert machine.cuda.live() == []
    with pytest.raises(InvalidRequest, match="this pipeline is closed"):
        pipeline.generate(**asked)


# --- failures


@pytest.mark.parametrize("call", ["create_stream", "allocate", "pinned", "create_event", "fill"])
@pytest.mark.parametrize("after", range(3))
def test_memory_that_is_not_there_is_said_and_the_pipeline_works_on(
    call: str, after: int, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        machine.cuda.fail(call, after=after)
        with suppress(OutOfMemory):
            pipeline.generate(**conditions(pipeline, 2))
        for _ in range(2):
            assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, wanted)


def test_trajectories_that_wait_for_reuse_go_before_memory_runs_out(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        pipeline.generate(**conditions(pipeline, 1))
        machine.cuda.fail("allocate")
        assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, on_cpu(dit_bundle, 2))
        assert len(machine.cuda.graphs) == 1


@pytest.mark.parametrize("call", ["copy", "sync", "launch", "record"])
def test_an_error_that_passes_leaves_the_pipeline_usable(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        machine.cuda.fail(call)
        with pytest.raises(OutOfMemory):
            pipeline.generate(**conditions(pipeline, 2))
        assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, wanted)


@pytest.mark.parametrize("call", ["copy", "launch", "sync"])
def test_a_generation_that_fails_frees_the_latents_that_it_would_have_left(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 2))
        before = machine.cuda.live()
        machine.cuda.fail(call)
        with pytest.raises(OutOfMemory):
            pipeline.generate(**conditions(pipeline, 2), on_device=True)
        assert machine.cuda.live() == before


def test_a_generation_that_fails_is_done_with_the_latents_that_it_was_given(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    bundle = compiled(dit_bundle)
    with Pipeline.load(bundle, device=DEVICE) as other, Pipeline.load(bundle, device=DEVICE) as pipeline:
        noise = other.generate(**conditions(other, 2), on_device=True).latents
        pipeline.generate(**conditions(pipeline, 2))
        machine.cuda.fail("launch")
        with pytest.raises(OutOfMemory):
            pipeline.generate(**conditions(pipeline, 2), latents=noise)
        noise.close()
        pipeline.generate(**conditions(pipeline, 2))


@pytest.mark.parametrize("call", ["sync", "copy", "launch"])
def test_an_error_that_outlasts_the_call_says_that_the_process_is_lost(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    pipeline = Pipeline.load(compiled(dit_bundle), device=DEVICE)
    pipeline.generate(**conditions(pipeline, 2))
    machine.cuda.fail(call, "CUDA_ERROR_ILLEGAL_ADDRESS")
    for _ in range(2):
        with pytest.raises(DeviceLost, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*start it again"):
            pipeline.generate(**conditions(pipeline, 2))
    pipeline.close()
    machine.cuda._live.clear()  # nothing can be freed on a GPU that is lost


def test_a_gpu_that_is_lost_in_a_capture_is_no_mere_warning(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    pipeline = Pipeline.load(compiled(dit_bundle), device=DEVICE)
    machine.cuda.fail("begin_building", "CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLost):
        pipeline.generate(**conditions(pipeline, 2))
    pipeline.close()
    machine.cuda._live.clear()


@pytest.mark.parametrize("call", ["execute_async_v3", "set_tensor_address"])
def test_a_run_that_the_library_refuses_is_an_engine_error_in_its_words(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    wanted = on_cpu(dit_bundle, 2)
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        machine.tensorrt.refuse(call)
        with pytest.raises(EngineError, match="compile the bundle again"):
            pipeline.generate(**conditions(pipeline, 2))
        assert close_to(pipeline.generate(**conditions(pipeline, 2)).latents, wanted)


@pytest.mark.parametrize("call", ["set_input_shape", "create_execution_context"])
def test_a_binding_that_the_library_refuses_is_an_engine_error_and_frees_what_it_had(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        pipeline.generate(**conditions(pipeline, 1))
        before = machine.cuda.live()
        machine.tensorrt.refuse(call)
        with pytest.raises(EngineError):
            pipeline.generate(**conditions(pipeline, 2))
        assert machine.cuda.live() == before


def test_a_plan_with_more_times_than_the_engine_takes_is_refused(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        plan = pipeline.plan(70, feedback="all")
        with pytest.raises(InvalidRequest, match=r"times have shape \(\d+,\), the engine takes \(1,\) to \(128,\)"):
            pipeline.generate(plan=plan, **conditions(pipeline, 1))


def test_latents_that_stay_on_the_gpu_are_not_split(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        before = len(machine.cuda.journal)
        with pytest.raises(InvalidRequest, match="17 pictures are more than a run's 16, and latents on a GPU are not"):
            pipeline.generate(**conditions(pipeline, 17), on_device=True)
        assert len(machine.cuda.journal) == before


def test_more_pictures_than_the_batch_run_in_turns(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE) as pipeline:
        asked = conditions(pipeline, 19)
        together = pipeline.generate(seed=list(range(19)), **asked).latents
        last = {name: value[16:] for name, value in asked.items()}
        alone = pipeline.generate(seed=[16, 17, 18], **last).latents
    assert np.abs(together[16:] - alone).max() < 1e-5
