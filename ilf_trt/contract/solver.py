"""The solver table: a diffusers scheduler config as one row of recurrence coefficients a step, without torch.

With x_k the latent as the model sees it and out_k the model's raw output, a deterministic linear scheduler is

    m_k     = c_x[k] * x_k + c_out[k] * out_k
    x_{k+1} = a[k] * x_k + b_0[k] * m_k + b_1[k] * m_{k-1} + b_2[k] * m_{k-2}

where m_k is the predicted x0 (dpmsolver: noise), and the last result is in the scheduler's own units. Letters as in
DPM-Solver++ (arXiv 2211.01095): x_t = alpha * x0 + sigma * noise, h a step in log(alpha / sigma). A level is
sigma / alpha, which diffusers calls sigma. Shapes: S steps, T training times.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import UnsupportedScheduler

COLUMNS = ("c_x", "c_out", "a", "b_0", "b_1", "b_2")
DPM, DDIM, EULER = CLASSES = ("DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler")
DEFAULT_SCHEDULER: dict[str, object] = {
    "_class_name": DPM,
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}
DDIM_DEFAULTS: dict[str, object] = {"timestep_spacing": "leading", "clip_sample": True}
LOWER_ORDER_BELOW = 15  # diffusers ends with orders 2 and 1 only where a trajectory has fewer steps than this
KARRAS_RHO = 7.0
MOST_TIMES, MOST_STEPS = 10_000, 1000
RAMPS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas")
ZERO_SNR_PRODUCT = np.float32(2**-24)  # diffusers' stand-in for a last product of 0, to keep the level finite
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SolverTable:
    """One trajectory. S is `steps`, except where diffusers makes fewer: trailing spacing with lambda_min_clipped."""

    times: tuple[
        float, ...
    ]  # S, as the diffusers scheduler.timesteps: falling, where ramps may repeat all but the first
    initial_scale: float  # unit-variance noise -> first x
    coefficients: Float64  # (S, 6), columns are COLUMNS


def _one_of(*choices: object, of: tuple[str, ...] = CLASSES) -> Any:
    """An option of the classes `of` that takes a few values, the default first."""
    supported = " or ".join(map(repr, choices))
    return field(default=choices[0], metadata={"of": of, "supported": supported, "allows": choices.__contains__})


def _number(default: float | None, low: float, high: float = math.inf, of: tuple[str, ...] = CLASSES) -> Any:
    """An option of the classes `of` that takes numbers in [low, high], only whole ones where `low` is an int."""

    def allows(value: Any) -> bool:
        return value is default or (type(value) in (int, type(low)) and low <= value <= high)

    supported = f"{type(low).__name__} from {low} to {high}"
    return field(default=default, metadata={"of": of, "supported": supported, "allows": allows})


@dataclass(frozen=True, slots=True)
class _Options:
    """Options under diffusers' names, with the defaults of DPMSolverMultistepScheduler."""

    scheduler: str
    num_train_timesteps: int = _number(1000, 2, MOST_TIMES)
    beta_start: float = _number(0.0001, 0.0, 1.0)
    beta_end: float = _number(0.02, 0.0, 1.0)
    beta_schedule: str = _one_of("linear", "scaled_linear", "squaredcos_cap_v2")
    trained_betas: Sequence[float] | None = field(default=None, metadata={"of": CLASSES, "allows": lambda _: True})
    rescale_betas_zero_snr: bool = _one_of(False, True, None)
    prediction_type: str = _one_of("epsilon", "v_prediction", "sample")
    timestep_spacing: str = _one_of("linspace", "leading", "trailing")
    steps_offset: int = _number(0, 0, MOST_TIMES)
    final_sigmas_type: str = _one_of("zero", "sigma_min", of=(DPM, EULER))
    use_karras_sigmas: bool = _one_of(False, True, None, of=(DPM, EULER))
    use_exponential_sigmas: bool = _one_of(False, True, None, of=(DPM, EULER))
    use_beta_sigmas: bool = _one_of(False, None, of=(DPM, EULER))
    sigma_min: float | None = _number(None, 1e-10, of=(DPM, EULER))
    sigma_max: float | None = _number(None, 1e-10, of=(DPM, EULER))
    use_lu_lambdas: bool = _one_of(False, True, None, of=(DPM,))
    use_flow_sigmas: bool = _one_of(False, None, of=(DPM,))
    use_dynamic_shifting: bool = _one_of(False, None, of=(DPM,))
    lambda_min_clipped: float = _number(-math.inf, -math.inf, of=(DPM,))
    solver_order: int = _one_of(2, 1, 3, of=(DPM,))
    algorithm_type: str = _one_of("dpmsolver++", "dpmsolver", of=(DPM,))
    solver_type: str = _one_of("midpoint", "heun", of=(DPM,))
    lower_order_final: bool = _one_of(True, False, None, of=(DPM,))
    euler_at_final: bool = _one_of(False, True, None, of=(DPM,))
    thresholding: bool = _one_of(False, None, of=(DPM, DDIM))
    clip_sample: bool = _one_of(False, None, of=(DDIM,))
    set_alpha_to_one: bool = _one_of(True, False, None, of=(DDIM,))
    interpolation_type: str = _one_of("linear", "log_linear", of=(EULER,))
    timestep_type: str = _one_of("discrete", of=(EULER,))


def table_from_scheduler(config: Mapping[str, object], steps: int) -> SolverTable:
    """The table for the content of a scheduler_config.json, in which absent keys mean diffusers' defaults.

    Raises UnsupportedScheduler, naming the option, for what is not linear, not deterministic or not known.
    """
    options = _options_from_config(config)
    most = min(options.num_train_timesteps, MOST_STEPS)
    if not 1 <= steps <= most:
        supported = f"1 to num_train_timesteps ({options.num_train_timesteps}), and at most {MOST_STEPS}"
        raise _refusal(options.scheduler, "steps", steps, supported)
    with np.errstate(divide="ignore", invalid="ignore"):
        times, begin, end = _path(options, steps)
        coefficients = _coefficients(options, begin, end)
    broken = np.flatnonzero(~np.isfinite(coefficients).all(axis=1))
    if broken.size and np.isinf(begin[broken[0]]):
        wanted = "'v_prediction' or 'sample' where rescale_betas_zero_snr leaves no signal at the first time"
        raise _refusal(options.scheduler, "prediction_type", options.prediction_type, wanted)
    if broken.size:
        wanted = f"noise levels that differ, unlike around step {broken[0]}, as fewer steps or other spacings have"
        raise _refusal(options.scheduler, f"timestep_spacing of {steps} steps", options.timestep_spacing, wanted)
    initial_scale = 1.0
    if options.scheduler == EULER:
        leading = options.timestep_spacing == "leading"
        initial_scale = math.hypot(max(begin.max(), end.max()), leading) / math.hypot(begin[0], 1)
        coefficients[-1, 2:] *= math.hypot(end[-1], 1)
    coefficients.setflags(write=False)
    return SolverTable(tuple(times.tolist()), initial_scale, coefficients)


def _options_from_config(config: Mapping[str, object]) -> _Options:
    scheduler = config.get("_class_name")
    if not isinstance(scheduler, str) or scheduler not in CLASSES:
        raise _refusal("scheduler config", "_class_name", scheduler, " or ".join(CLASSES))
    known = {one.name: one.metadata for one in fields(_Options) if scheduler in one.metadata.get("of", ())}
    given = {name: config[name] for name in known if name in config}
    values: dict[str, Any] = DDIM_DEFAULTS | given if scheduler == DDIM else given
    for name, value in values.items():
        if not known[name]["allows"](value):
            option = name if name in given else f"{name} (by default)"
            raise _refusal(scheduler, option, value, known[name]["supported"])
    options = _Options(scheduler, **values)
    betas, count = options.trained_betas, options.num_train_timesteps
    numbers = isinstance(betas, Sequence | np.ndarray) and all(isinstance(beta, int | float) for beta in betas)
    if betas is not None and not (numbers and len(betas) == count):
        raise _refusal(scheduler, "trained_betas", betas, f"None or num_train_timesteps ({count}) numbers")
    if options.use_karras_sigmas and options.use_exponential_sigmas:
        raise _refusal(scheduler, "use_exponential_sigmas", True, "False where use_karras_sigmas is True")
    if options.algorithm_type == "dpmsolver" and options.final_sigmas_type == "zero":
        raise _refusal(scheduler, "final_sigmas_type", "zero", "'sigma_min' where algorithm_type is 'dpmsolver'")
    return options


def _refusal(scheduler: str, option: str, value: object, supported: str) -> UnsupportedScheduler:
    got = f"{scheduler}: {option} is {reprlib.repr(value)}"
    return UnsupportedScheduler(f"{got}; supported: {supported}; change it to that")


def _coefficients(options: _Options, begin: Float64, end: Float64) -> Float64:
    """(S, 6). DDIM, and Euler in model units, are the first order of DPM-Solver++."""
    alpha, alpha_end = 1 / np.sqrt(1 + begin**2), 1 / np.sqrt(1 + end**2)
    sigma, sigma_end = 1 / np.sqrt(1 + begin**-2), 1 / np.sqrt(1 + end**-2)  # so that an infinite level gives 1
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    h = np.log(begin) - np.log(end)
    if options.algorithm_type == "dpmsolver++":
        conversions = {"epsilon": (1 / alpha, -begin), "sample": (zero, one), "v_prediction": (alpha, -sigma)}
        exponent, scale, a = -h, alpha_end, sigma_end / sigma
    else:
        conversions = {"epsilon": (zero, one), "sample": (1 / sigma, -1 / begin), "v_prediction": (sigma, alpha)}
        exponent, scale, a = h, sigma_end, alpha_end / alpha
    growth = np.expm1(exponent)
    value, slope = -scale * growth, -scale * (growth / exponent - 1)
    curve = -scale * ((growth - exponent) / exponent**2 - 0.5)
    newer, older = np.zeros_like(h), np.zeros_like(h)  # weights of m_k - m_{k-1} and of m_{k-1} - m_{k-2}
    for k, order in enumerate(_orders(options, len(h))):
        if order == 2:
            newer[k] = (value[k] / 2 if options.solver_type == "midpoint" else slope[k]) * h[k] / h[k - 1]
        elif order == 3:
            bend = (slope[k] * h[k - 1] + curve[k] * h[k]) / (h[k - 1] + h[k - 2])
            newer[k], older[k] = (slope[k] + bend) * h[k] / h[k - 1], -bend * h[k] / h[k - 2]
    return np.column_stack((*conversions[options.prediction_type], a, value + newer, older - newer, 0 - older))


def _orders(options: _Options, count: int) -> list[int]:
    """The order of each step: the first lack history, and diffusers lowers the last."""
    if options.scheduler != DPM:
        return [1] * count
    lower = options.lower_order_final and count < LOWER_ORDER_BELOW
    orders = [min(options.solver_order, k + 1, 2 if lower and k == count - 2 else 3) for k in range(count)]
    if lower or options.euler_at_final or options.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def _path(options: _Options, steps: int) -> tuple[Float32, Float64, Float64]:
    """(S,) each: times, and the levels where the steps begin and where they end."""
    levels = _training_levels(options)
    times = _spaced_times(options, steps, levels)
    visited = np.interp(times, np.arange(len(levels)), levels)
    if options.interpolation_type == "log_linear":
        # One level more than steps: the last step ends at the smallest training level, whatever final_sigmas_type is.
        visited = np.exp(_torch_linspace(np.log(levels[-1]), np.log(levels[0]), steps + 1)).astype(np.float64)
    ramp = next((name for name in RAMPS if getattr(options, name)), None)
    if ramp is not None:
        visited = _ramped_levels(options, levels[::-1] if options.scheduler == DPM else visited, steps)
        times = _times_of_levels(options, visited, levels)
        same = int((times == times[0]).sum())
        if same > 1:  # diffusers then starts at the second step, and leaves its table at the last: its issue 12771
            wanted = f"False with {options.beta_schedule} betas up to level {visited[0]:.3g}"
            reason = f"the first {same} of {steps} steps have the same time"
            raise _refusal(options.scheduler, ramp, True, f"{wanted}: {reason}")
    if times.min(initial=math.inf) < 0 or not times.size:
        wanted = "times from 0 on, as other numbers of steps and other spacings have"
        raise _refusal(options.scheduler, f"timestep_spacing of {steps} steps", options.timestep_spacing, wanted)
    if options.scheduler == DDIM:
        return times, *_ddim_levels(options, steps, times.astype(np.int64), levels.astype(np.float64))
    last = 0.0 if options.final_sigmas_type == "zero" else levels[0]
    visited = np.append(visited, last)[: len(times) + 1].astype(np.float32).astype(np.float64)
    return times, visited[:-1], visited[1:]


def _ddim_levels(options: _Options, steps: int, times: NDArray[np.int64], levels: Float64) -> tuple[Float64, Float64]:
    """(S,) each. A step ends one even stride below its time, wherever the next one begins."""
    if times[0] >= len(levels):
        raise _refusal(DDIM, "steps_offset", options.steps_offset, f"a first time below {len(levels)}, not {times[0]}")
    times_end = times - len(levels) // steps
    return levels[times], np.where(times_end < 0, 0 if options.set_alpha_to_one else levels[0], levels[times_end])


def _spaced_times(options: _Options, steps: int, levels: Float32) -> Float32:
    """(S,). DPM-Solver spaces one time more than it uses; only Euler keeps fractions."""
    last = len(levels) - int(np.searchsorted(-np.log(levels[::-1]), options.lambda_min_clipped))
    count = steps + 1 if options.scheduler == DPM else steps
    if options.timestep_spacing == "linspace":
        times: NDArray[Any] = np.linspace(0, last - 1, count)[::-1][:steps]
    elif options.timestep_spacing == "leading":
        times = np.arange(count)[::-1][:steps] * (last // count) + float(options.steps_offset)
    else:
        times = np.arange(last, 0, -len(levels) / steps).round() - 1
    return (times if options.scheduler == EULER else times.round()).astype(np.float32)


def _ramped_levels(options: _Options, levels: Float32 | Float64, steps: int) -> Float64:
    """(S,): Karras, Lu or exponential levels between the ends of `levels`, which fall."""
    ramp = np.linspace(0, 1, steps)
    high = float(levels[0]) if options.sigma_max is None else options.sigma_max
    low = float(levels[-1]) if options.sigma_min is None else options.sigma_min
    if options.use_karras_sigmas:
        high, low = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        return np.asarray((high + ramp * (low - high)) ** KARRAS_RHO, dtype=np.float64)
    if options.use_lu_lambdas:
        high, low = float(np.log(levels[0])), float(np.log(levels[-1]))
        return np.exp(high + ramp * (low - high))
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def _times_of_levels(options: _Options, visited: Float64, levels: Float32) -> Float32:
    """(S,), linear in the logarithm of the level; DPM-Solver's times are whole."""
    logs, log = np.log(levels), np.log(np.maximum(visited, 1e-10))
    below: NDArray[np.int64] = (
        np.where(log[:, None] >= logs, np.arange(len(logs)), 0).max(axis=1).clip(max=len(logs) - 2)
    )
    part: Float64 = np.clip((logs[below] - log) / (logs[below] - logs[below + 1]), 0, 1)
    times = (1 - part) * below + part * (below + 1)
    if options.scheduler == DPM:
        rounds = options.use_karras_sigmas or options.use_lu_lambdas
        times = times.round() if rounds and options.beta_schedule != "squaredcos_cap_v2" else np.trunc(times)
    return times.astype(np.float32)


def _training_levels(options: _Options) -> Float32:
    """(T,). In float32 as diffusers, whose rounding moves the level of time 0 by 1e-4 of itself."""
    count = options.num_train_timesteps
    if options.trained_betas is not None:
        betas = np.array(options.trained_betas, dtype=np.float32)
    elif options.beta_schedule == "linear":
        betas = _torch_linspace(options.beta_start, options.beta_end, count)
    elif options.beta_schedule == "scaled_linear":
        betas = _torch_linspace(options.beta_start**0.5, options.beta_end**0.5, count) ** 2
    else:
        cosines = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = np.array([min(1 - after / before, 0.999) for before, after in pairwise(cosines)], dtype=np.float32)
    products = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)  # torch's CPU kernel accumulates in float64
    if options.rescale_betas_zero_snr:
        roots = np.sqrt(products)
        products = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        betas = 1 - np.append(products[0], products[1:] / products[:-1])
        products = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
        products[-1] = 0 if options.scheduler == DDIM else ZERO_SNR_PRODUCT
    levels: Float32 = np.sqrt((1 - products) / products)
    if not (levels > 0).all() or (np.isinf(levels).any() and options.scheduler != DDIM):
        raise _refusal(options.scheduler, "beta_start, beta_end or trained_betas", betas, "betas between 0 and 1")
    return levels


def _torch_linspace(start: float, end: float, count: int) -> Float32:
    """torch.linspace to the bit (AVX2): fused multiply-adds from the nearer end. numpy's ends 2e-6 off."""
    first, last, index = np.float64(np.float32(start)), np.float64(np.float32(end)), np.arange(count)
    step = np.float64(np.float32(last - first) / np.float32(count - 1))
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)
