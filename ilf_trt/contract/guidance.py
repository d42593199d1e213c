"""The scale of classifier-free guidance, with the meaning that diffusers gives it."""

from math import isfinite

from ilf_trt.errors import InvalidRequest

OFF = 1.0


def effective_scale(guidance_scale: float) -> float:
    """The scale that the solver takes: 1, the conditional prediction alone, for every scale of 1 and below.

    diffusers' pipelines guide where `guidance_scale > 1`. Raises InvalidRequest for a scale that is not finite.
    """
    if not isfinite(guidance_scale):
        raise InvalidRequest(f"guidance_scale is {guidance_scale}, it must be finite")
    return max(OFF, float(guidance_scale))
