"""The solver table: its numpy recurrence beside diffusers' own schedulers, and refusals by name."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_discrete
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.solver import COLUMNS, DDIM, DEFAULT_SCHEDULER, DPM, EULER, table_from_scheduler
from ilf_trt.errors import UnsupportedScheduler

Config = dict[str, object]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver is deprecated:FutureWarning"),
    # diffusers calls np.array on a tensor, and torch's __array__ has no `copy`, which numpy 2 asks for.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

SHAPE = (2, 4, 3, 3)
STEPS = (1, 2, 3, 6, 14, 15, 50)
SHIPPED_STEPS = (10, 20, 50)
# Both relative to max |x|. diffusers rounds levels and steps to float32; the worst measured is 5.8e-6 (order 3).
SHIPPED_LIMIT = 1e-5
# With float64 steps only the levels are float32; the worst measured is 7.8e-7 (log_linear, where torch's exp differs).
FLOAT64_LIMIT = 2e-6
# float32 times near 1000 have a spacing of 6e-5; only Euler has fractional ones.
TIME_LIMIT = 2e-4

TORCH_FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
SCHEDULES: tuple[Config, ...] = (
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.03, 1000).tolist()},
    {"num_train_timesteps": 240},
)
SOLVERS: tuple[Config, ...] = tuple(
    {"solver_order": order, "solver_type": kind, "algorithm_type": algorithm, "final_sigmas_type": final}
    for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    for algorithm, final in (("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min"))
)


def dpm_cases() -> Iterator[Config]:
    for solver, prediction in product(SOLVERS, PREDICTIONS):
        yield {**solver, "prediction_type": prediction}
    for solver in SOLVERS:
        yield {**solver, "lower_order_final": False}
        yield {**solver, "lower_order_final": False, "euler_at_final": True}
        for ramp in RAMPS:
            yield {**solver, ramp: True, "euler_at_final": True}
    for schedule, spacing in product(SCHEDULES, SPACINGS):
        yield {**schedule, "timestep_spacing": spacing, "steps_offset": 1}
        yield {**schedule, "timestep_spacing": spacing, "lambda_min_clipped": -3.0}
        yield {**schedule, "timestep_spacing": spacing, "prediction_type": "sample", "rescale_betas_zero_snr": True}
    for schedule, ramp in product(SCHEDULES, RAMPS):
        yield {**schedule, ramp: True}
        yield {**schedule, ramp: True, "sigma_min": 0.1, "sigma_max": 20.0}
    yield {"use_karras_sigmas": True, "use_lu_lambdas": True}
    yield {"use_exponential_sigmas": True, "use_lu_lambdas": True}


def ddim_cases() -> Iterator[Config]:
    for spacing, prediction, one in product(SPACINGS, PREDICTIONS, (True, False)):
        yield {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": one}
    for schedule, spacing in product(SCHEDULES, SPACINGS):
        yield {**schedule, "timestep_spacing": spacing, "steps_offset": 1}
        for prediction in PREDICTIONS[1:]:
            shared = {**schedule, "timestep_spacing": spacing, "prediction_type": prediction}
            yield {**shared, "rescale_betas_zero_snr": True}
    yield {"rescale_betas_zero_snr": True}


def euler_cases() -> Iterator[Config]:
    for spacing, prediction in product(SPACINGS, PREDICTIONS):
        shared: Config = {"timestep_spacing": spacing, "prediction_type": prediction}
        yield {**shared, "final_sigmas_type": "sigma_min"}
        yield {**shared, "interpolation_type": "log_linear"}
        yield {**shared, "interpolation_type": "log_linear", "use_karras_sigmas": True}
        yield {**shared, "final_sigmas_type": "sigma_min", "use_exponential_sigmas": True}
        yield {**shared, "rescale_betas_zero_snr": True}
    for schedule, spacing in product(SCHEDULES, SPACINGS):
        yield {**schedule, "timestep_spacing": spacing, "steps_offset": 1}
        for ramp in RAMPS[:2]:
            yield {**schedule, "timestep_spacing": spacing, ramp: True}
    for ramp in RAMPS[:2]:
        yield {ramp: True, "sigma_min": 0.1, "sigma_max": 20.0}


CASES: list[Config] = [
    *({"_class_name": DPM, **case} for case in dpm_cases()),
    *({"_class_name": DDIM, "clip_sample": False, **case} for case in ddim_cases()),
    *({"_class_name": EULER, **case} for case in euler_cases()),
]


def case_id(config: Config) -> str:
    return "-".join("trained" if isinstance(value, list) else f"{value}" for value in config.values())


def float32_is_enough(config: Config) -> bool:
    """Not for zero SNR, which starts at level 4096, nor dpmsolver of order 3: 2.6e-5 and 1.1e-5 at 50 steps."""
    noise_order_3 = config.get("algorithm_type") == "dpmsolver" and config["solver_order"] == 3
    return not (config.get("rescale_betas_zero_snr") or noise_order_3)


class Float64Torch:
    """torch, but its float32 is float64: a scheduler's step that upcasts to torch.float32 then keeps every digit."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def root(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x.double()).to(x.dtype)


def power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    return root(x) if exponent == 0.5 else torch.pow(x, exponent)


def shipped_scheduler(config: Config, steps: int) -> Any:
    scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def float64_scheduler(config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With diffusers' float32 levels, but correctly rounded, for float64 steps.

    torch's float32 square root misses the last digit of every sixth value on some CPUs (MKL on AMD), which zero SNR
    turns into 1e-4 of a level and truncation into another whole time.
    """
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sqrt", root)
        patch.setattr(torch.Tensor, "__pow__", power)
        scheduler = shipped_scheduler(config, steps)
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def worst_error(config: Config, steps: int, scheduler: Any, dtype: torch.dtype) -> float:
    """Largest max |difference| / max |x| of all states of one trajectory, the recurrence beside the scheduler."""
    table = table_from_scheduler(config, steps)
    assert table.coefficients.shape == (len(scheduler.timesteps), len(COLUMNS))
    random = np.random.default_rng(steps)
    noise, *outputs = random.standard_normal((len(table.times) + 1, *SHAPE)).astype(np.float32).astype(np.float64)
    x, history, errors = noise * table.initial_scale, [np.zeros(SHAPE)] * 3, []
    sample = torch.tensor(noise, dtype=dtype) * scheduler.init_noise_sigma
    for time, (c_x, c_out, a, *b), out in zip(scheduler.timesteps, table.coefficients, outputs, strict=True):
        errors.append(relative_error(x, scheduler.scale_model_input(sample, time)))
        sample = scheduler.step(torch.tensor(out, dtype=dtype), time, sample).prev_sample
        history = [c_x * x + c_out * out, *history[:2]]
        x = a * x + sum(weight * m for weight, m in zip(b, history, strict=True))
    return max(*errors, relative_error(x, sample))


def refused_for_its_start(config: Config, steps: int, scheduler: Any) -> bool:
    """Whether diffusers finds the first time twice; it then begins at the second step, and the table is refused."""
    times = scheduler.timesteps.tolist()
    if config["_class_name"] != DPM or times.count(times[0]) == 1:
        return False
    with pytest.raises(UnsupportedScheduler, match=f"the first {times.count(times[0])} of {steps} steps have the same"):
        table_from_scheduler(config, steps)
    return True


def relative_error(x: Any, expected: torch.Tensor) -> float:
    error = float(np.abs(x - expected.double().numpy()).max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


@pytest.mark.parametrize("config", [case for case in CASES if float32_is_enough(case)], ids=case_id)
def test_recurrence_is_the_scheduler_as_shipped(config: Config) -> None:
    for steps in SHIPPED_STEPS:
        scheduler = shipped_scheduler(config, steps)
        if refused_for_its_start(config, steps, scheduler):
            continue
        assert worst_error(config, steps, scheduler, torch.float32) <= SHIPPED_LIMIT, steps


@pytest.mark.skipif(not TORCH_FUSES, reason="torch.linspace rounds twice here: other last digits in diffusers' levels")
@pytest.mark.parametrize("config", CASES, ids=case_id)
def test_recurrence_and_times_are_the_scheduler_in_float64(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in STEPS:
        scheduler = float64_scheduler(config, steps, monkeypatch)
        if refused_for_its_start(config, steps, scheduler):
            continue
        times = table_from_scheduler(config, steps).times
        np.testing.assert_allclose(times, scheduler.timesteps.numpy(), rtol=0, atol=TIME_LIMIT, err_msg=f"{steps}")
        with monkeypatch.context() as patch:
            patch.setattr(scheduling_dpmsolver_multistep, "torch", Float64Torch())
            patch.setattr(scheduling_euler_discrete, "torch", Float64Torch())
            assert worst_error(config, steps, scheduler, torch.float64) <= FLOAT64_LIMIT, steps


def test_repeated_times_are_among_the_cases() -> None:
    config: Config = {"_class_name": DPM, "num_train_timesteps": 240, "use_karras_sigmas": True}
    assert config in CASES
    assert len(set(table_from_scheduler(config, 50).times)) < 50


def test_cosine_betas_with_karras_levels_end_outside_of_the_table_of_diffusers() -> None:
    config: Config = {"_class_name": DPM, "beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    scheduler, x = diffusers.DPMSolverMultistepScheduler.from_config(config), torch.ones(SHAPE)
    scheduler.set_timesteps(20)
    *times, last = scheduler.timesteps
    assert len({int(time) for time in scheduler.timesteps}) == 12
    for time in times:
        x = scheduler.step(x, time, x).prev_sample
    with pytest.raises(IndexError):
        scheduler.step(x, last, x)
    with pytest.raises(
        UnsupportedScheduler, match=r"use_karras_sigmas is True; .* the first 9 of 20 steps have the same"
    ):
        table_from_scheduler(config, 20)


@pytest.mark.fuzz
@given(
    schedule=st.sampled_from(SCHEDULES),
    ramp=st.sampled_from(RAMPS),
    steps=st.integers(2, 60),
    high=st.one_of(st.none(), st.floats(1.0, 500.0)),
)
def test_a_ramp_is_refused_where_diffusers_starts_late_and_nowhere_else(
    schedule: Config, ramp: str, steps: int, high: float | None
) -> None:
    config: Config = {"_class_name": DPM, **schedule, ramp: True, "sigma_max": high}
    scheduler = shipped_scheduler(config, steps)
    if not refused_for_its_start(config, steps, scheduler):
        assert len(table_from_scheduler(config, steps).times) == steps
        assert scheduler.index_for_timestep(scheduler.timesteps[0]) == 0


def test_default_scheduler_spells_out_the_defaults_of_diffusers() -> None:
    spelled, absent = (table_from_scheduler(config, 20) for config in (DEFAULT_SCHEDULER, {"_class_name": DPM}))
    assert spelled.times == absent.times
    np.testing.assert_array_equal(spelled.coefficients, absent.coefficients)


def test_private_keys_nulls_learned_variance_and_options_of_other_classes_change_nothing() -> None:
    ignored = {"_diffusers_version": "0.42.1", "trained_betas": None, "use_karras_sigmas": None, "clip_sample": True}
    extended = table_from_scheduler({**DEFAULT_SCHEDULER, **ignored, "variance_type": "learned_range"}, 20)
    plain = table_from_scheduler(DEFAULT_SCHEDULER, 20)
    np.testing.assert_array_equal(extended.coefficients, plain.coefficients)


REFUSED_OPTIONS: tuple[tuple[str, str, object], ...] = (
    (DDIM, "clip_sample", True),
    (DDIM, "thresholding", True),
    (DDIM, "set_alpha_to_one", "yes"),
    (DPM, "thresholding", True),
    (DPM, "algorithm_type", "sde-dpmsolver++"),
    (DPM, "algorithm_type", "sde-dpmsolver"),
    (DPM, "algorithm_type", "deis"),
    (DPM, "solver_type", "bh2"),
    (DPM, "solver_order", 4),
    (DPM, "prediction_type", "flow_prediction"),
    (DPM, "use_beta_sigmas", True),
    (DPM, "use_flow_sigmas", True),
    (DPM, "use_dynamic_shifting", True),
    (DPM, "final_sigmas_type", "one"),
    (DPM, "lambda_min_clipped", None),
    (DPM, "steps_offset", -1),
    (DPM, "num_train_timesteps", 1),
    (DPM, "beta_schedule", "sigmoid"),
    (DPM, "beta_end", 2.0),
    (DPM, "trained_betas", [0.1, 0.2]),
    (DPM, "trained_betas", ["0.1"] * 1000),
    (DPM, "trained_betas", [1.0] * 1000),
    (EULER, "use_beta_sigmas", True),
    (EULER, "timestep_type", "continuous"),
    (EULER, "interpolation_type", "cubic"),
    (EULER, "prediction_type", "original_sample"),
    (EULER, "timestep_spacing", "karras"),
    (EULER, "use_karras_sigmas", "true"),
)


@pytest.mark.parametrize(("scheduler", "option", "value"), REFUSED_OPTIONS)
def test_option_is_refused_by_name(scheduler: str, option: str, value: object) -> None:
    with pytest.raises(UnsupportedScheduler, match=rf"^{scheduler}: .*{option}.* is .*; supported: .*; change it"):
        table_from_scheduler({"_class_name": scheduler, "clip_sample": False, option: value}, 10)


@pytest.mark.parametrize("config", [{}, {"_class_name": None}, {"_class_name": "PNDMScheduler"}])
def test_other_class_is_refused_by_name(config: Config) -> None:
    with pytest.raises(UnsupportedScheduler, match=rf"_class_name is .*; supported: {DPM} or {DDIM} or {EULER}"):
        table_from_scheduler(config, 10)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(UnsupportedScheduler, match=rf"steps is {steps}; supported: 1 to num_train_timesteps \(1000\)"):
        table_from_scheduler(DEFAULT_SCHEDULER, steps)


def test_absent_clip_sample_of_ddim_is_refused_as_its_default() -> None:
    with pytest.raises(UnsupportedScheduler, match=r"clip_sample \(by default\) is True; supported: False"):
        table_from_scheduler({"_class_name": DDIM}, 10)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DPM, {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
        (DPM, {"algorithm_type": "dpmsolver"}, "final_sigmas_type is 'zero'"),
        (DDIM, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "prediction_type is 'epsilon'"),
        (DDIM, {"steps_offset": 200}, "steps_offset is 200"),
    ],
)
def test_options_that_exclude_each_other_are_refused(scheduler: str, options: Config, message: str) -> None:
    with pytest.raises(UnsupportedScheduler, match=f"{message}; supported: "):
        table_from_scheduler({"_class_name": scheduler, "clip_sample": False, **options}, 10)


def test_trailing_steps_to_which_diffusers_adds_time_minus_1_are_refused() -> None:
    config = {**DEFAULT_SCHEDULER, "timestep_spacing": "trailing"}
    assert shipped_scheduler(config, 61).timesteps[-1] == -1
    with pytest.raises(UnsupportedScheduler, match="timestep_spacing of 61 steps is 'trailing'"):
        table_from_scheduler(config, 61)


def test_equal_levels_for_which_diffusers_makes_nan_are_refused() -> None:
    config = {"_class_name": DPM, "use_karras_sigmas": True, "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    scheduler, x = shipped_scheduler(config, 20), torch.ones(SHAPE)
    for time in scheduler.timesteps:
        x = scheduler.step(torch.ones(SHAPE), time, x).prev_sample
    assert x.isnan().all()
    with pytest.raises(UnsupportedScheduler, match="noise levels that differ, unlike around step 19"):
        table_from_scheduler(config, 20)
