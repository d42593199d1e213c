"""The solver table: the numpy recurrence beside diffusers' own schedulers, and refusals by name."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ilf_trt.solver import DDIM, DPM, EULER

STEPS = (1, 2, 3, 6, 10, 14, 15, 20, 50)
SHAPE = (2, 4, 3, 3)

Float64 = NDArray[np.float64]
Config = dict[str, object]


def cases() -> Iterator[Config]:
    predictions = ("epsilon", "v_prediction", "sample")
    spacings = ("linspace", "leading", "trailing")
    ramps = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
    schedules = (
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.001, 0.03, 1000).tolist()},
        {"num_train_timesteps": 237},
    )
    solvers = [
        {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind, "final_sigmas_type": final}
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        for algorithm, final in (("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min"))
    ]
    for solver, prediction in product(solvers, predictions):
        yield {"_class_name": DPM, **solver, "prediction_type": prediction}
        yield {"_class_name": DPM, **solver, "prediction_type": prediction, "lower_order_final": False}
    for solver in solvers:
        yield {"_class_name": DPM, **solver, "euler_at_final": True, "lower_order_final": False}
        for ramp in ramps:
            yield {"_class_name": DPM, **solver, ramp: True}
    for schedule, spacing, offset in product(schedules, spacings, (0, 1)):
        yield {"_class_name": DPM, **schedule, "timestep_spacing": spacing, "steps_offset": offset}
        yield {
            "_class_name": DDIM,
            "clip_sample": False,
            **schedule,
            "timestep_spacing": spacing,
            "steps_offset": offset,
        }
        yield {"_class_name": EULER, **schedule, "timestep_spacing": spacing, "steps_offset": offset}
    for schedule, ramp in product(schedules, ramps):
        yield {"_class_name": DPM, **schedule, ramp: True}
        yield {"_class_name": EULER, **schedule, ramp: True}
    for spacing, prediction in product(spacings, predictions):
        shared = {"timestep_spacing": spacing, "prediction_type": prediction}
        yield {"_class_name": DDIM, "clip_sample": False, **shared}
        yield {"_class_name": DDIM, "clip_sample": False, **shared, "set_alpha_to_one": False}
        yield {"_class_name": EULER, **shared}
        yield {"_class_name": EULER, **shared, "final_sigmas_type": "sigma_min"}
        yield {"_class_name": EULER, **shared, "interpolation_type": "log_linear"}
        yield {"_class_name": EULER, **shared, "use_karras_sigmas": True, "interpolation_type": "log_linear"}
        yield {"_class_name": EULER, **shared, "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}
        yield {"_class_name": EULER, **shared, "rescale_betas_zero_snr": True}
        yield {"_class_name": DPM, **shared, "rescale_betas_zero_snr": True}
        if prediction != "epsilon":
            yield {"_class_name": DDIM, "clip_sample": False, **shared, "rescale_betas_zero_snr": True}
    for scheduler, ramp in product((DPM, EULER), ramps[:2]):
        yield {"_class_name": scheduler, ramp: True, "sigma_min": 0.1, "sigma_max": 20.0}
    for spacing, schedule in product(spacings, schedules):
        yield {"_class_name": DPM, "lambda_min_clipped": -3.0, "timestep_spacing": spacing, **schedule}
