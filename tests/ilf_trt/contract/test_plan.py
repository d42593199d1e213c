"""The step plan: the paper's block forwards, the times after feedback by hand, the patterns, JSON and refusals."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.contract.plan import (
    SCHEDULERS,
    Ratio,
    Rule,
    StepPlan,
    cached_block_forwards,
    feedback_steps,
    make_plan,
    read_scheduler,
)
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import IlfError, InvalidRequest, UnsupportedScheduler

DPM = SCHEDULERS["dpmsolver++"]
LOOP = Loop(8, 19)
M, N = 12, 28
# Ten linspace steps of DPM-Solver++ over 1000 training times; every gap is 100, but for 599 -> 500.
TIMES = (999, 899, 799, 699, 599, 500, 400, 300, 200, 100)
# t_post is computed in double precision from whole numbers.
EXACT = 1e-9


def plan_of(steps: int = 10, loop: Loop = LOOP, blocks: int = N, scheduler: Any = DPM, **options: Any) -> StepPlan:
    return make_plan(scheduler, steps, blocks=blocks, loop=loop, **options)


def chosen(pattern: str, steps: int = 10) -> list[int]:
    flags = feedback_steps(pattern, steps)
    assert len(flags) == steps
    return [index for index, flag in enumerate(flags) if flag]


# --- the paper's cost


@pytest.mark.parametrize(
    ("blocks", "steps", "loop", "feedback", "cost"),
    [
        (28, 20, (8, 19), "none", 560),
        (28, 12, (8, 19), "none", 336),
        (28, 10, (8, 19), "outer:2", 332),
        (28, 12, (0, 5), "all", 420),
        (28, 12, (11, 16), "all", 420),
        (28, 12, (22, 27), "all", 420),
        (28, 12, (0, 11), "outer:2", 388),
        (28, 12, (8, 19), "outer:2", 388),
        (28, 12, (16, 27), "0,1,10,11", 388),
        (28, 10, (0, 4), "outer:2", 304),
        (28, 20, (10, 14), "outer:2", 584),
        (28, 40, (23, 27), "outer:2", 1144),
        (12, 20, (3, 7), "none", 240),
        (12, 12, (3, 7), "none", 144),
        (12, 10, (3, 7), "outer:2", 144),
        (12, 9, (3, 7), "none", 108),
        (12, 6, (3, 7), "all", 108),
        (1, 3, (0, 0), "all", 9),
    ],
)
def test_block_forwards_are_the_paper_s(
    blocks: int, steps: int, loop: tuple[int, int], feedback: str, cost: int
) -> None:
    plan = plan_of(steps, Loop(*loop), blocks, feedback=feedback)
    assert plan.block_forwards == cost
    assert abs(plan.equal_steps * plan.blocks - cost) <= plan.blocks / 2
    assert len(plan.steps) == steps


@pytest.mark.parametrize(
    ("blocks", "steps", "cached", "every", "cost"),
    [(28, 20, 18, 3, 326), (12, 20, 8, 3, 136), (28, 20, 18, 1, 560), (28, 20, 0, 3, 560), (28, 2, 28, 2, 28)],
)
def test_block_forwards_of_the_cache_are_the_paper_s(
    blocks: int, steps: int, cached: int, every: int, cost: int
) -> None:
    assert sum(cached_block_forwards(blocks, steps, cached=cached, every=every)) == cost


def test_the_cache_is_filled_on_the_first_step() -> None:
    assert cached_block_forwards(28, 7, cached=18, every=3) == (28, 10, 10, 28, 10, 10, 28)


def test_a_feedback_step_costs_a_loop_and_a_block_more() -> None:
    costs = {step.feedback: step.block_forwards for step in plan_of().steps}
    assert costs == {False: N, True: N + M + 1}


# --- the time after feedback


def test_the_times_are_the_scheduler_s() -> None:
    assert tuple(step.t for step in plan_of().steps) == TIMES


@pytest.mark.parametrize(
    ("rule", "ratio", "expected"),
    [
        (Rule.NONE, Ratio.LOOP_TO_MODEL, {0: 999, 4: 599, 9: 100}),
        (Rule.NONE, Ratio.MODEL_TO_LOOP, {0: 999, 4: 599, 9: 100}),
        (Rule.UNIFORM, Ratio.LOOP_TO_MODEL, {0: 949, 1: 849, 4: 549.5, 5: 450, 9: 50}),
        (Rule.UNIFORM, Ratio.MODEL_TO_LOOP, {0: 949, 1: 849, 4: 549.5, 5: 450, 9: 50}),
        (Rule.RESCALE, Ratio.LOOP_TO_MODEL, {0: 999 - 300 / 7, 4: 599 - 297 / 7, 9: 100 - 300 / 7}),
        (Rule.RESCALE, Ratio.MODEL_TO_LOOP, {0: 999 - 700 / 3, 4: 368, 7: 300 - 700 / 3, 8: 0, 9: 0}),
        (
            Rule.ANNEAL,
            Ratio.LOOP_TO_MODEL,
            {0: 999 - 300 / 7, 1: 899 - 269.7 / 7, 4: 599 - 297 / 7 * 0.599, 7: 300 - 90 / 7, 8: 190, 9: 90},
        ),
        (
            Rule.ANNEAL,
            Ratio.MODEL_TO_LOOP,
            {0: 999 - 700 / 3, 1: 899 - 629.3 / 3, 4: 599 - 231 * 0.599, 8: 200 - 140 / 3, 9: 100 - 70 / 3},
        ),
    ],
)
def test_t_post_by_hand(rule: Rule, ratio: Ratio, expected: dict[int, float]) -> None:
    steps = plan_of(feedback="all", rule=rule, ratio=ratio).steps
    assert {i: steps[i].t_post for i in expected} == pytest.approx(expected, abs=EXACT)


def test_the_ratios_are_the_loop_s_share_and_its_inverse() -> None:
    assert Ratio.LOOP_TO_MODEL.of(LOOP, N) == pytest.approx(12 / 28)
    assert Ratio.MODEL_TO_LOOP.of(LOOP, N) == pytest.approx(28 / 12)


def test_the_last_step_s_distance_goes_to_time_zero() -> None:
    for steps in (1, 2, 7):
        last = plan_of(steps, feedback="all", rule=Rule.UNIFORM).steps[-1]
        assert last.t_post == last.t / 2


def test_anneal_starts_as_rescale_even_when_it_is_the_only_step() -> None:
    options: dict[str, Any] = {"feedback": "all", "ratio": Ratio.LOOP_TO_MODEL}
    (annealed,), (rescaled,) = (plan_of(1, rule=rule, **options).steps for rule in (Rule.ANNEAL, Rule.RESCALE))
    assert annealed.t_post == rescaled.t_post == pytest.approx(999 - 999 * 12 / 28)


def test_anneal_scales_the_second_step_even_when_the_first_has_no_feedback() -> None:
    step = plan_of(feedback="1", rule=Rule.ANNEAL).steps[1]
    assert step.t_post == pytest.approx(899 - 269.7 / 7, abs=EXACT)


def test_anneal_never_goes_below_time_zero() -> None:
    steps = plan_of(200, feedback="all", rule=Rule.ANNEAL).steps
    assert steps[-1].t < 10  # less than the floor of the rule
    assert steps[-1].t_post == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("ratio", Ratio)
def test_t_post_stays_between_time_zero_and_t(scheduler: str, rule: Rule, ratio: Ratio) -> None:
    for steps in (1, 2, 10, 50):
        plan = plan_of(steps, scheduler=SCHEDULERS[scheduler], feedback="all", rule=rule, ratio=ratio)
        assert all(0 <= step.t_post <= step.t <= 999 for step in plan.steps)


@pytest.mark.parametrize("ratio", [1 / 3, 3.0])
def test_the_gap_follows_the_scheduler_s_own_spacing(ratio: float) -> None:
    loop = Loop(0, 3) if ratio < 1 else Loop(0, 11)
    name = Ratio.LOOP_TO_MODEL if ratio < 1 else Ratio.MODEL_TO_LOOP
    blocks = 12 if ratio < 1 else 36
    config = {**DPM, "use_karras_sigmas": True}  # strides of many sizes
    steps = plan_of(8, loop, blocks, config, feedback="all", rule=Rule.RESCALE, ratio=name).steps
    gaps = [a.t - b.t for a, b in pairwise(steps)]
    assert len(set(gaps)) > 3
    wanted = [max(step.t - gap * ratio, 0) for step, gap in zip(steps[:-1], gaps, strict=True)]
    assert [step.t_post for step in steps[:-1]] == pytest.approx(wanted, abs=1e-6)


def test_a_step_without_feedback_keeps_its_time() -> None:
    for rule in Rule:
        plan = plan_of(feedback="outer:2", rule=rule, ratio=Ratio.MODEL_TO_LOOP)
        assert all(step.t_post == step.t for step in plan.steps if not step.feedback)


def test_the_default_is_anneal_by_the_loop_s_share_on_the_outer_steps() -> None:
    assert plan_of() == plan_of(feedback="outer:2", rule=Rule.ANNEAL, ratio=Ratio.LOOP_TO_MODEL)


def test_times_are_every_time_once_from_high_to_low() -> None:
    plan = plan_of(feedback="0,9", rule=Rule.UNIFORM)
    assert plan.times == (999, 949, 899, 799, 699, 599, 500, 400, 300, 200, 100, 50)


def test_a_t_post_that_meets_another_step_s_time_is_one_time() -> None:
    plan = plan_of(feedback="all", rule=Rule.RESCALE, loop=Loop(0, 3), blocks=4)  # a ratio of 1: on to the next time
    assert plan.times == (*TIMES, 0)


# --- which steps


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("all", list(range(10))),
        ("none", []),
        ("alternate", [0, 2, 4, 6, 8]),
        ("first:1", [0]),
        ("first:3", [0, 1, 2]),
        ("first:0", []),
        ("last:2", [8, 9]),
        ("last:0", []),
        ("outer:2", [0, 1, 8, 9]),
        ("outer:0", []),
        ("inner:2", [2, 3, 4, 5, 6, 7]),
        ("inner:0", list(range(10))),
        ("0,1,8,9", [0, 1, 8, 9]),
        ("9, 0", [0, 9]),
        ("4", [4]),
        ("4,4", [4]),
    ],
)
def test_patterns_of_ten_steps(pattern: str, steps: list[int]) -> None:
    assert chosen(pattern) == steps


@pytest.mark.parametrize("pattern", ["first:99", "last:99", "outer:99", "outer:2", "first:3"])
def test_a_pattern_longer_than_the_plan_takes_every_step(pattern: str) -> None:
    assert chosen(pattern, 3) == [0, 1, 2]


def test_outer_and_inner_are_complements() -> None:
    for count in range(7):
        pairs = zip(feedback_steps(f"outer:{count}", 10), feedback_steps(f"inner:{count}", 10), strict=True)
        assert all(a != b for a, b in pairs)


@pytest.mark.parametrize("pattern", ["", "some", "first", "first:", "outer:-1", "outer:1.5", "-1", "1,", ",", "1;2"])
def test_an_unknown_pattern_is_refused_with_the_known_ones(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="unknown; give all, none, alternate, first:K"):
        feedback_steps(pattern, 10)


@pytest.mark.parametrize("pattern", ["all:3", "none:1", "alternate:2", "All", "first:2:3"])
def test_a_pattern_with_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="is unknown"):
        feedback_steps(pattern, 10)


def test_a_step_that_does_not_exist_is_refused_by_number() -> None:
    with pytest.raises(InvalidRequest, match="feedback step 10 does not exist; 10 steps are 0 to 9"):
        plan_of(feedback="0,10")


def test_the_last_steps_are_the_last_even_when_the_scheduler_makes_fewer_than_asked() -> None:
    config = {**DPM, "timestep_spacing": "trailing", "lambda_min_clipped": -3.0}
    plan = plan_of(10, scheduler=config, feedback="last:1")
    assert len(plan.steps) < 10
    assert [step.feedback for step in plan.steps][-2:] == [False, True]


# --- refusals


@pytest.mark.parametrize("loop", [Loop(0, N), Loop(19, 8), Loop(-1, 3), Loop(N, N)], ids=str)
def test_a_loop_that_does_not_fit_is_refused(loop: Loop) -> None:
    with pytest.raises(InvalidRequest, match=f"{loop.begin}:{loop.end} does not fit a model of 28 blocks"):
        plan_of(loop=loop)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_does_not_fit_is_refused(steps: int) -> None:
    with pytest.raises(IlfError, match=f"steps is {steps}.*1 to num_train_timesteps"):
        plan_of(steps)


@pytest.mark.parametrize("config", [{}, {"_class_name": "DDPMScheduler"}, {"_class_name": None}], ids=str)
def test_an_unknown_scheduler_is_refused_with_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedScheduler, match="DPMSolverMultistepScheduler or DDIMScheduler or EulerDiscrete"):
        plan_of(scheduler=config)


@pytest.mark.parametrize(("cached", "every"), [(-1, 2), (29, 2), (18, 0), (18, -3)])
def test_a_cache_that_does_not_fit_is_refused(cached: int, every: int) -> None:
    with pytest.raises(InvalidRequest, match=f"cache of {cached} blocks every {every} steps does not fit"):
        cached_block_forwards(28, 20, cached=cached, every=every)


# --- as JSON


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("feedback", ["none", "outer:2", "1,3"])
def test_a_plan_comes_back_from_json_unchanged(scheduler: str, feedback: str) -> None:
    for rule in Rule:
        plan = plan_of(7, scheduler=SCHEDULERS[scheduler], feedback=feedback, rule=rule, ratio=Ratio.MODEL_TO_LOOP)
        assert StepPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


def test_json_holds_the_cost() -> None:
    assert plan_of().as_json()["block_forwards"] == 332


@pytest.mark.parametrize("field", ["blocks", "loop", "feedback", "rule", "ratio", "initial_scale", "steps"])
def test_a_plan_that_lacks_a_field_is_refused_by_name(field: str) -> None:
    data = plan_of().as_json()
    del data[field]
    with pytest.raises(InvalidRequest, match=f"step plan: has a field missing or wrong.*{field}"):
        StepPlan.from_json(data)


@pytest.mark.parametrize("field", ["t", "t_post", "feedback", "block_forwards", "solver"])
def test_a_step_that_lacks_a_field_is_refused_by_name(field: str) -> None:
    data = plan_of().as_json()
    del data["steps"][3][field]
    with pytest.raises(InvalidRequest, match=f"step plan: has a field missing or wrong.*{field}"):
        StepPlan.from_json(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "sideways"),
        ("ratio", "m"),
        ("loop", [1]),
        ("loop", None),
        ("loop", [1, float("inf")]),
        ("blocks", "many"),
        ("blocks", None),
        ("blocks", float("inf")),
        ("initial_scale", None),
        ("initial_scale", float("nan")),
        ("steps", None),
        ("steps", []),
        ("steps", [1]),
        ("steps", {}),
    ],
)
def test_a_plan_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match="step plan"):
        StepPlan.from_json({**plan_of().as_json(), field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("t", None),
        ("t", "late"),
        ("t", float("nan")),
        ("t_post", float("inf")),
        ("feedback", "false"),
        ("feedback", None),
        ("block_forwards", float("inf")),
        ("solver", [1.0] * 5),
        ("solver", [1.0] * 7),
        ("solver", [1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]),
        ("solver", None),
        ("solver", "123456x"),
    ],
)
def test_a_step_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    data = plan_of().as_json()
    data["steps"][3][field] = value
    with pytest.raises(InvalidRequest, match="step plan"):
        StepPlan.from_json(data)


@pytest.mark.parametrize("data", [[], 1, "plan", None], ids=repr)
def test_json_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(InvalidRequest, match="step plan"):
        StepPlan.from_json(data)


# --- scheduler names


def test_a_short_name_gives_a_fresh_config() -> None:
    read_scheduler("ddim")["clip_sample"] = True
    assert read_scheduler("ddim") == {"_class_name": "DDIMScheduler", "clip_sample": False}


def test_a_file_gives_its_config(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(DPM))
    assert read_scheduler(str(path)) == DPM


@pytest.mark.parametrize("text", ["", "{", "[]", "1", None], ids=repr)
def test_a_file_that_holds_no_config_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnsupportedScheduler, match=r"scheduler_config\.json"):
        read_scheduler(str(path))
