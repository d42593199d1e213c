"""The scale of guidance has diffusers' meaning."""

import pytest

from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.errors import InvalidRequest


@pytest.mark.parametrize("scale", [-1e9, -1.0, 0, 0.5, 1])
def test_one_and_below_turns_guidance_off(scale: float) -> None:
    assert effective_scale(scale) == OFF


@pytest.mark.parametrize("scale", [1.0001, 4.5, 1e9])
def test_above_one_it_is_the_scale(scale: float) -> None:
    assert effective_scale(scale) == scale


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(InvalidRequest, match=r"guidance_scale is .*, it must be finite"):
        effective_scale(scale)
