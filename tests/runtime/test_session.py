"""The hot loop on a fake engine: what is bound, in which order it runs, and what it leaves alone."""

import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.manifest import Manifest, PictureFacts
from ilf_trt.contract.plan import Step, StepPlan, make_plan
from ilf_trt.contract.ports import Graph, Port, Role
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import BatchRange, Loop, ModelSpec, Positions, Precision
from ilf_trt.runtime.host import Host, HostTrajectory
from ilf_trt.runtime.route import route_of
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session
from ilf_trt.runtime.trajectory import Job, RunOptions

Array = NDArray[Any]

BLOCKS, LOOP = 4, Loop(1, 2)
LATENT = (4, 16, 16)
PICTURES = 3
CLASSES = 10
SCALES = (0.25, -0.5)
GUIDANCE_SCALE = 2.5
STEPS = 6
# What a fake network answers: a share of its latent, so that a whole trajectory is a recurrence that numpy can repeat.
ANSWER = np.float32(0.1)
# Timings, a list of 6 numbers and the interpreter's own small change; a latent is 12 KiB here, tokens are 96 KiB.
SMALL_CHANGE_BYTES = 8 << 10
# Float32 against float64 over six steps of a recurrence.
FLOAT32_ROUNDING = 1e-5


@dataclass
class Bound:
    """One launch: which graph, on which memory."""

    graph: str
    arrays: dict[str, Array]
    tape: list["Bound"]

    def __call__(self) -> None:
        self.tape.append(self)
        arrays = self.arrays
        if self.graph == "post":
            _, c_x, c_out, a, b_0, b_1, b_2, _ = arrays["coefficients"]
            prediction, following = arrays["prediction"], arrays["next_latent"]
            np.multiply(arrays["latent"], c_x + c_out * ANSWER, out=prediction)
            np.multiply(arrays["latent"], a, out=following)
            for weight, name in ((b_0, "prediction"), (b_1, "history_1"), (b_2, "history_2")):
                for row in range(len(following)):  # a row at a time, to allocate little
                    following[row] += weight * arrays[name][row]

    __hash__ = object.__hash__


@dataclass
class FakeEngine:
    """Records what is bound to it and what it runs."""

    graph: Graph
    tape: list[Bound]
    bound: list["weakref.ref[Bound]"] = field(default_factory=list)

    def bind(self, arrays: Mapping[str, Array]) -> Bound:
        ports = {port.name for port in (*self.graph.inputs, *self.graph.outputs)}
        launch = Bound(self.graph.name, {name: arrays[name] for name in ports}, self.tape)
        self.bound.append(weakref.ref(launch))
        return launch

    def close(self) -> None:
        pass


@dataclass
class FakeModel:
    """A manifest, its fake engines, the constants of its bundle, and the tape of everything that ran."""

    manifest: Manifest
    engines: dict[str, FakeEngine]
    constants: dict[str, Array]
    tape: list[Bound]

    @property
    def binds(self) -> int:
        return sum(len(engine.bound) for engine in self.engines.values())

    @property
    def alive(self) -> int:
        return sum(reference() is not None for engine in self.engines.values() for reference in engine.bound)

    def session(self) -> Session:
        return Host(self.engines, self.manifest, self.constants).session()

    def trajectory(self, plan: StepPlan | None = None, pictures: int = PICTURES) -> HostTrajectory:
        asked = job(plan or self.manifest.plan, pictures)
        return HostTrajectory(self.engines, self.constants, route_of(self.manifest, asked))


@pytest.fixture(params=["rows for each block", "shared rows", "text for each block"])
def fake(request: pytest.FixtureRequest) -> FakeModel:
    return fake_model(request.param)


def fake_model(kind: str) -> FakeModel:
    shared, hoisted = kind == "shared rows", kind == "text for each block"
    text = Port("text_tokens", ("R", 5, 32), "float32", Role.CONTEXT)
    pairs = Port("text_pairs", ("R", 2, 5, 32), "float32", Role.CONTEXT)
    weight = Port("feedback.attn2.to_k.weight", (32, 32), "float32", Role.WEIGHT)
    spec = ModelSpec(
        kind="fake",
        block_path="blocks",
        blocks=BLOCKS,
        width=32,
        patch=1,
        latent=LATENT,
        sizes=(LATENT[1:],),
        positions=Positions(8, 1.0),
        side_streams=(),
        modulation_rows=6,
        head_rows=2,
        loop=LOOP,
        guidance=True,
        shares_modulation=shared or hoisted,
        train_timesteps=1000,
        conditioning=Conditioning.of_labels(CLASSES),
        context=(text,) if shared else (),
        per_block=(pairs,) if hoisted else (),
        constants=(weight,) if hoisted else (),
        wide_residual=False,
    )
    graphs = graphs_of(spec, Precision.FP32)
    manifest = Manifest(
        spec=spec,
        precision=Precision.FP32,
        batch=BatchRange(1, 4, 16),
        graphs=graphs,
        scales=SCALES,
        plan=make_plan(DEFAULT_SCHEDULER, STEPS, blocks=BLOCKS, loop=LOOP, feedback="0,1,4"),
        scheduler=dict(DEFAULT_SCHEDULER),
        guidance_scale=GUIDANCE_SCALE,
        clean_captions=False,
        base_sha256="",
        base_rounded_sha256={},
        base_differs=False,
        tools={},
        fp8=None,
        text=None,
        decoder=None,
        picture=PictureFacts(1, {}, {}),
        engines=(),
        files={},
    )
    tape: list[Bound] = []
    constants = {weight.name: np.ones((32, 32), np.float32)} if hoisted else {}
    return FakeModel(manifest, {graph.name: FakeEngine(graph, tape) for graph in graphs}, constants, tape)


def job(plan: StepPlan, pictures: int) -> Job:
    return Job(plan, pictures, LATENT[1:], guided=True)


def noise(pictures: int = PICTURES) -> Array:
    return np.random.default_rng(0).standard_normal((pictures, *LATENT), np.float32)


def run(trajectory: HostTrajectory, start: Array | None = None) -> Array:
    start = noise() if start is None else start
    labels = np.concatenate([np.arange(len(start), dtype=np.int32), np.full(len(start), CLASSES, np.int32)])
    return trajectory.run(start, {"class_labels": labels}, GUIDANCE_SCALE, RunOptions())[0]


def steps_of(tape: list[Bound]) -> list[list[Bound]]:
    """The tape after `cond`, cut after every `post`."""
    steps: list[list[Bound]] = [[]]
    for bound in tape[1:]:
        steps[-1].append(bound)
        if bound.graph == "post":
            steps.append([])
    assert steps.pop() == []
    return steps


def at(array: Array) -> int:
    return int(array.ctypes.data)


def test_cond_runs_once_and_before_everything(fake: FakeModel) -> None:
    run(fake.trajectory())
    assert [index for index, bound in enumerate(fake.tape) if bound.graph == "cond"] == [0]


def test_plain_and_feedback_steps_run_their_graphs_in_order(fake: FakeModel) -> None:
    run(fake.trajectory())
    plain = ["pre", "loop_body", "post"]
    fed = ["pre", "loop_body", "loop_feedback", "loop_body", "post"]
    wanted = [fed if step.feedback else plain for step in fake.manifest.plan.steps]
    assert [[bound.graph for bound in step] for step in steps_of(fake.tape)] == wanted


def test_running_again_binds_nothing(fake: FakeModel) -> None:
    trajectory = fake.trajectory()
    before = fake.binds
    run(trajectory)
    run(trajectory)
    assert fake.binds == before == len(fake.tape) // 2


def test_a_run_allocates_no_more_than_its_result(fake: FakeModel) -> None:
    trajectory, start = fake.trajectory(), noise()
    run(trajectory, start)
    fake.tape.clear()
    tracemalloc.start()
    try:
        result = run(trajectory, start)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < result.nbytes + SMALL_CHANGE_BYTES


def test_every_bound_array_has_the_shape_and_dtype_of_its_port(fake: FakeModel) -> None:
    trajectory = fake.trajectory()
    run(trajectory)
    sizes = {"B": PICTURES, "R": 2 * PICTURES, "T": len(fake.manifest.plan.times)}
    for bound in fake.tape:
        graph = fake.engines[bound.graph].graph
        for port in (*graph.inputs, *graph.outputs):
            array = bound.arrays[port.name]
            assert (array.shape, array.dtype) == (port.resolve(sizes), port.dtype), f"{bound.graph} {port.name}"
            assert array.flags.c_contiguous


def test_the_latent_of_a_step_is_where_the_step_before_wrote_it(fake: FakeModel) -> None:
    run(fake.trajectory())
    for before, step in pairwise(steps_of(fake.tape)):
        assert at(step[0].arrays["latent"]) == at(step[-1].arrays["latent"]) == at(before[-1].arrays["next_latent"])


def test_history_is_what_the_two_steps_before_predicted(fake: FakeModel) -> None:
    run(fake.trajectory())
    posts = [step[-1].arrays for step in steps_of(fake.tape)]
    for index in range(2, len(posts)):
        assert at(posts[index]["history_1"]) == at(posts[index - 1]["prediction"])
        assert at(posts[index]["history_2"]) == at(posts[index - 2]["prediction"])


def test_post_never_writes_over_what_it_reads(fake: FakeModel) -> None:
    run(fake.trajectory())
    for step in steps_of(fake.tape):
        arrays = step[-1].arrays
        read = [arrays[port.name] for port in fake.engines["post"].graph.inputs]
        for written in (arrays["next_latent"], arrays["prediction"]):
            assert not any(np.shares_memory(written, array) for array in read)


def test_the_second_pass_reads_the_first_ones_tokens_and_the_feedback_of_its_features(fake: FakeModel) -> None:
    run(fake.trajectory())
    for step in (step for step in steps_of(fake.tape) if len(step) == 5):
        pre, first, feedback, second, post = (bound.arrays for bound in step)
        assert at(pre["hidden"]) == at(first["hidden"]) == at(second["hidden"])
        assert at(feedback["features"]) == at(first["features"])
        assert at(second["feedback"]) == at(feedback["feedback"])
        assert at(post["features"]) == at(second["features"])
        assert not np.shares_memory(second["hidden"], second["features"])


def test_first_passes_have_zero_scales_and_zero_feedback_and_second_ones_the_learned(fake: FakeModel) -> None:
    run(fake.trajectory())
    for step in steps_of(fake.tape):
        passes = [bound.arrays for bound in step if bound.graph == "loop_body"]
        assert not passes[0]["scales"].any()
        assert not passes[0]["feedback"].any()
        for second in passes[1:]:
            np.testing.assert_array_equal(second["scales"], np.array(SCALES, np.float32))
            assert not np.shares_memory(second["feedback"], passes[0]["feedback"])


def test_rows_of_a_time_are_views_of_the_table_that_cond_wrote(fake: FakeModel) -> None:
    run(fake.trajectory())
    tables, times = fake.tape[0].arrays, list(fake.manifest.plan.times)
    varying = {port.name for port in fake.engines["cond"].graph.outputs if port.shape[0] == "T"}
    for step, bounds in zip(fake.manifest.plan.steps, steps_of(fake.tape), strict=True):
        passes = 0
        for bound in bounds:
            passes += bound.graph == "loop_body"
            later = bound.graph == "post" or (bound.graph == "loop_body" and passes == 2)
            row = times.index(step.t_post if later else step.t)
            for name in varying & bound.arrays.keys():
                assert at(bound.arrays[name]) == at(tables[name]) + row * tables[name].strides[0], (bound.graph, name)


def test_the_context_of_the_pictures_is_the_array_that_cond_wrote(fake: FakeModel) -> None:
    run(fake.trajectory())
    for bound in fake.tape[1:]:
        for name in ("text_tokens", f"text_pairs_{bound.graph}"):
            if name in bound.arrays:
                assert at(bound.arrays[name]) == at(fake.tape[0].arrays[name])


def test_constants_are_read_where_they_lie_and_by_cond_alone(fake: FakeModel) -> None:
    before = {name: array.copy() for name, array in fake.constants.items()}
    run(fake.trajectory())
    for name, array in fake.constants.items():
        assert fake.tape[0].arrays[name] is array
        assert not any(name in bound.arrays for bound in fake.tape[1:])
        np.testing.assert_array_equal(array, before[name])


def test_cond_gets_every_time_of_the_plan_and_the_conditions(fake: FakeModel) -> None:
    run(fake.trajectory())
    arrays = fake.tape[0].arrays
    np.testing.assert_array_equal(arrays["times"], np.array(fake.manifest.plan.times, np.float32))
    np.testing.assert_array_equal(arrays["class_labels"], [*range(PICTURES), *[CLASSES] * PICTURES])


def test_a_coefficient_row_is_guidance_and_the_steps_solver_numbers(fake: FakeModel) -> None:
    run(fake.trajectory())
    for step, bounds in zip(fake.manifest.plan.steps, steps_of(fake.tape), strict=True):
        wanted = np.array([GUIDANCE_SCALE, *step.solver, 0], np.float32)
        np.testing.assert_array_equal(bounds[-1].arrays["coefficients"], wanted)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7])
def test_the_result_is_the_recurrence_of_the_plan(fake: FakeModel, steps: int) -> None:
    scheduler = {**DEFAULT_SCHEDULER, "solver_order": 3}
    plan = make_plan(scheduler, steps, blocks=BLOCKS, loop=LOOP, feedback="none")
    x = noise().astype(np.float64) * plan.initial_scale
    history = [np.zeros_like(x), np.zeros_like(x)]
    for step in plan.steps:
        c_x, c_out, a, b_0, b_1, b_2 = step.solver
        m = (c_x + c_out * ANSWER) * x
        x = a * x + b_0 * m + b_1 * history[0] + b_2 * history[1]
        history = [m, history[0]]
    for _ in range(2):
        got = run(fake.trajectory(plan))
        np.testing.assert_allclose(got, x, rtol=0, atol=FLOAT32_ROUNDING * np.abs(x).max())


def test_the_noise_is_scaled_to_the_schedulers_first_latent(fake: FakeModel) -> None:
    hold = Step(t=999.0, t_post=999.0, feedback=False, block_forwards=BLOCKS, solver=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0))
    plan = replace(fake.manifest.plan, initial_scale=14.5, steps=(hold,))
    np.testing.assert_array_equal(run(fake.trajectory(plan)), noise() * np.float32(14.5))


def test_history_of_a_run_before_is_forgotten(fake: FakeModel) -> None:
    used, fresh = fake.trajectory(), fake.trajectory()
    run(used, 1e6 * noise())
    np.testing.assert_array_equal(run(used), run(fresh))


def test_noise_of_the_caller_is_not_written_to(fake: FakeModel) -> None:
    start = noise()
    run(fake.trajectory(), start)
    np.testing.assert_array_equal(start, noise())


def test_a_result_is_not_memory_of_the_session(fake: FakeModel) -> None:
    trajectory = fake.trajectory()
    result = run(trajectory)
    kept = result.copy()
    run(trajectory, 5 * noise())
    np.testing.assert_array_equal(result, kept)
    assert not any(np.shares_memory(result, array) for bound in fake.tape for array in bound.arrays.values())


def test_timings_name_every_graph_and_step_and_add_up(fake: FakeModel) -> None:
    labels = {"class_labels": np.zeros(2 * PICTURES, np.int32)}
    _, timings = fake.trajectory().run(noise(), labels, GUIDANCE_SCALE, RunOptions())
    assert tuple(timings.graph_ms) == tuple(fake.engines)
    assert len(timings.step_ms) == STEPS
    assert all(value > 0 for value in (*timings.graph_ms.values(), *timings.step_ms))
    assert sum(timings.step_ms) + timings.graph_ms["cond"] == pytest.approx(sum(timings.graph_ms.values()))
    assert sum(timings.graph_ms.values()) <= timings.total_ms


def test_a_session_gives_the_same_trajectory_for_the_same_plan_and_number(fake: FakeModel) -> None:
    session = fake.session()
    first = session.trajectory(job(fake.manifest.plan, 2))
    equal_plan = StepPlan.from_json(fake.manifest.plan.as_json())
    assert session.trajectory(job(equal_plan, 2)) is first
    assert session.trajectory(job(fake.manifest.plan, 3)) is not first


def test_a_session_keeps_the_last_trajectories_and_frees_the_others(fake: FakeModel) -> None:
    session = fake.session()
    each = 1 + sum(5 if step.feedback else 3 for step in fake.manifest.plan.steps)
    for pictures in range(1, 2 * KEPT_TRAJECTORIES + 1):
        session.trajectory(job(fake.manifest.plan, pictures))
        assert fake.alive == each * min(pictures, KEPT_TRAJECTORIES)


def test_a_session_drops_the_trajectory_that_was_asked_for_longest_ago(fake: FakeModel) -> None:
    session = fake.session()
    kept = [session.trajectory(job(fake.manifest.plan, pictures)) for pictures in range(1, KEPT_TRAJECTORIES + 1)]
    assert session.trajectory(job(fake.manifest.plan, 1)) is kept[0]
    session.trajectory(job(fake.manifest.plan, KEPT_TRAJECTORIES + 1))
    assert session.trajectory(job(fake.manifest.plan, 1)) is kept[0]
    assert session.trajectory(job(fake.manifest.plan, 2)) is not kept[1]


def test_two_sessions_share_engines_and_constants_and_no_other_memory(fake: FakeModel) -> None:
    for session in (fake.session() for _ in range(2)):
        run(session.trajectory(job(fake.manifest.plan, PICTURES)))
    half = len(fake.tape) // 2
    first, second = fake.tape[:half], fake.tape[half:]
    addresses = [{at(array) for bound in tape for array in bound.arrays.values()} for tape in (first, second)]
    assert addresses[0] & addresses[1] == {at(array) for array in fake.constants.values()}
