"""What text encoder and decoder run in when nobody says, and what a GPU cannot run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.assembly.options import BuildOptions, PipelinePart
from ilf_trt.commands.flags import PipelineFlags
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.errors import InvalidRequest

TURING, AMPERE, ADA, HOPPER = Architecture(7, 5), Architecture(8, 0), Architecture(8, 9), Architecture(9, 0)
TENSORRT = EngineOptions(Library.TENSORRT)
FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16


def rtx(*gpus: Architecture) -> EngineOptions:
    return EngineOptions(Library.TENSORRT_RTX, gpus)


@pytest.mark.parametrize(
    ("engines", "at_hand", "text", "decoder"),
    [
        (None, (), FP32, FP32),
        (TENSORRT, (HOPPER,), BF16, FP16),
        (TENSORRT, (TURING,), FP32, FP16),
        (rtx(ADA), (), BF16, FP16),
        (rtx(AMPERE), (), BF16, FP16),
        (rtx(TURING), (), FP32, FP16),
        (rtx(TURING, ADA), (), FP32, FP16),
    ],
    ids=["no target", "H100", "T4", "sm89", "sm80", "sm75", "sm75 and sm89"],
)
def test_the_target_decides_what_the_parts_run_in(
    engines: EngineOptions | None, at_hand: tuple[Architecture, ...], text: Precision, decoder: Precision
) -> None:
    options = BuildOptions(engines=engines)
    settled = options.settled(at_hand)
    assert (settled.text_precision, settled.decoder_precision) == (text, decoder)
    assert all(options.is_default(part) and not settled.is_default(part) for part in PipelinePart)


@pytest.mark.parametrize("engines", [None, TENSORRT, rtx(TURING)])
@pytest.mark.parametrize(
    "given", [{"text_precision": FP32, "decoder_precision": FP32}, {"decoder_precision": FP16}, {}], ids=str
)
def test_a_given_precision_stays(engines: EngineOptions | None, given: dict[str, Any]) -> None:
    options = BuildOptions(engines=engines, **given)
    settled = options.settled((TURING,))
    assert {name: getattr(settled, name) for name in given} == given
    assert [options.is_default(part) for part in PipelinePart] == [
        "text_precision" not in given,
        "decoder_precision" not in given,
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_precision": BF16}, "sm75 has no bf16 units for the text part.*--text-precision fp32"),
        ({"decoder_precision": BF16}, "sm75 has no bf16 units for the decoder part.*--decoder-precision fp16"),
    ],
)
def test_a_given_bf16_is_refused_for_an_old_gpu(given: dict[str, Any], message: str) -> None:
    options = BuildOptions(engines=rtx(ADA, TURING), **given)
    with pytest.raises(InvalidRequest, match=message):
        options.settled((ADA, TURING))
    assert options.settled((ADA,)).text_precision is BF16


def test_a_text_encoder_for_a_gpu_that_rtx_cannot_build_it_for_is_refused_at_once(tmp_path: Path) -> None:
    options = BuildOptions(engines=rtx(ADA, TURING), pipeline=tmp_path)
    with pytest.raises(InvalidRequest, match="no FP32 products for sm75, and T5 overflows fp16; pass --without text"):
        options.settled((ADA, TURING))
    without = replace(options, without=(PipelinePart.TEXT,))
    assert without.settled((ADA, TURING)).text_precision is FP32
    assert replace(options, engines=TENSORRT).settled((TURING,)).text_precision is FP32


def test_the_command_line_leaves_the_choice_to_the_target() -> None:
    given = PipelineFlags().options()
    assert (given["text_precision"], given["decoder_precision"]) == (None, None)
