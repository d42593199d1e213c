"""Which bundles have attention in FP8, and for which targets its heads are padded."""

import pytest

from ilf_trt.assembly.options import FUSED_TOKENS, BuildOptions
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library


@pytest.mark.parametrize(
    ("given", "precision", "tokens", "wanted"),
    [
        (None, Precision.FP8, FUSED_TOKENS, True),
        (None, Precision.FP8, FUSED_TOKENS - 1, False),
        (None, Precision.FP16, FUSED_TOKENS, False),
        (True, Precision.FP8, FUSED_TOKENS - 1, True),
        (False, Precision.FP8, FUSED_TOKENS, False),
    ],
)
def test_attention_is_in_fp8_by_default_in_an_fp8_bundle_with_enough_tokens(
    given: bool | None, precision: Precision, tokens: int, wanted: bool
) -> None:
    assert BuildOptions(precision=precision, fp8_attention=given).has_fp8_attention(tokens) is wanted


def test_heads_are_padded_for_tensorrt_and_where_no_target_is_known() -> None:
    libraries = (None, EngineOptions(Library.TENSORRT), EngineOptions(Library.TENSORRT_RTX, (Architecture(8, 9),)))
    assert [BuildOptions(engines=engines).pads_heads for engines in libraries] == [True, True, False]
