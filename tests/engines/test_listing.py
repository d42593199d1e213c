"""Kernels read out of a TensorRT-RTX plan's text and out of TensorRT's inspector, from short texts written by hand."""

import json
from typing import Any

import pytest

from ilf_trt.engines.listing import Kernel, kernels_of_inspector, kernels_of_plan, scratch_of_plan

TENSORS = """\
  tensor={ dims={ "B" 64 } name="x" offset=0 region="a" strides={ 64 1 } type=half }
  tensor={ const_payload_size=8192 dims={ 64 64 } name="w" offset=0 region=consts type=half }
  tensor={ const_payload_size=4096 dims={ 64 64 } name="w8" offset=1 region=consts type=fp8_e4m3 }
  tensor={ dims={ "B" 64 } name="x8" offset=0 region="b" strides={ 64 1 } type=fp8_e4m3 }
  tensor={ dims={ 32 "N" 72 } name="q8" offset=0 region="b" strides={ 72 1 1 } type=fp8_e4m3 }
  tensor={ dims={ "B" 1 1 120 } name="mask" offset=0 region="b" strides={ 120 1 1 1 } type=half }
  tensor={ const_payload_size=4 dims={ 1 } name="alpha" offset=2 region=consts type=float }
  tensor={ dims={ "B" 64 } name="wide" offset=0 region="c" strides={ 64 1 } type=float }
  tensor={ dims={ "B" 64 } name="brain" offset=0 region="c" strides={ 64 1 } type=bf16 }
  tensor={ dims={ 1 } name="shape" offset=0 region="d" type=int64 }"""


def plan(main: str, gpus: str = "sm89 ", regions: str = "") -> bytes:
    """A plan around the statements of one program."""
    text = (
        f"header {{\n{regions}  tf32=0\n  accelerators={{{gpus}}}\n}}\n"
        f"descriptors {{\n{TENSORS}\n}}\nmain {{\n label bb1: \n{main}\n}}\nshape_main {{\n}}\n"
    )
    return b"\x7fELF\x00" + text.encode() + b"\x00\xff"


def kernel_of(statement: str) -> Kernel:
    (kernel,) = kernels_of_plan(plan(f"  {statement}"))
    return kernel


def inspected(**layer: Any) -> Kernel:
    (kernel,) = kernels_of_inspector(json.dumps({"Layers": [layer], "Bindings": ["x"]}))
    return kernel


def tensor(kind: str, *dims: int) -> dict[str, Any]:
    return {"Name": "x", "Location": "Device", "Dimensions": list(dims or (2, 16, 64)), "Format/Datatype": kind}


# --- the text of a plan


def test_a_product_is_in_the_type_of_its_matrices() -> None:
    kernel = kernel_of('fully_connected={ name="blocks.0.to_q" output={"y" } input={"x" "w" "alpha" } stream=0 }')
    assert kernel == Kernel("blocks.0.to_q", "matmul", "fp16", ("blocks.0.to_q",))


def test_products_that_run_as_one_are_listed_by_all_their_names() -> None:
    kernel = kernel_of('fully_connected={ name="a.to_q+a.to_k+a.to_v" output={"y" } input={"x" "w" } stream=0 }')
    assert kernel.layers == ("a.to_q", "a.to_k", "a.to_v")


def test_a_product_of_fp8_operands_is_fp8() -> None:
    assert kernel_of('fully_connected={ name="a" output={"y" } input={"x8" "w8" "alpha" } }').precision == "fp8"


def test_operands_of_two_types_are_both_told() -> None:
    assert kernel_of('fully_connected={ name="a" output={"y" } input={"x" "w8" "alpha" } }').precision == "fp16+fp8"


@pytest.mark.parametrize(("operand", "precision"), [("wide", "fp32"), ("brain", "bf16"), ("alpha", "fp32")])
def test_an_operand_gives_its_type(operand: str, precision: str) -> None:
    assert kernel_of(f'fully_connected={{ name="a" output={{"y" }} input={{"{operand}" }} }}').precision == precision


def test_a_fused_product_is_found_by_its_generated_name() -> None:
    kernel = kernel_of(
        'runtime_fusion={ name=__myl_FcAddMul input_args={ "w" "x" "alpha" } output_args={ "y" } stream=0 '
        'layers="[ONNX Layer: blocks.0.ff][ONNX Layer: node_gelu][ONNX Layer: blocks.0.ff]" backbone=gemm }'
    )
    assert kernel == Kernel("__myl_FcAddMul", "matmul", "fp16", ("blocks.0.ff", "node_gelu"))


def test_a_fused_attention_is_found_by_its_generated_name() -> None:
    kernel = kernel_of(
        'function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0xbe9b args={ "x" "x" "x" "y" } input_args={ "x" "x" "x" } '
        'output_args={ "y" } layers="[ONNX Layer: node_Softmax_92][ONNX Layer: node_MatMul_91]" }'
    )
    assert (kernel.kind, kernel.precision, kernel.layers) == (
        "attention",
        "fp16",
        ("node_Softmax_92", "node_MatMul_91"),
    )


@pytest.mark.parametrize("order", [("q8", "q8", "mask", "q8"), ("mask", "q8", "q8", "q8")], ids=["third", "first"])
def test_the_mask_of_an_attention_does_not_decide_its_precision(order: tuple[str, ...]) -> None:
    names = " ".join(f'"{name}"' for name in order)
    kernel = kernel_of(f'function={{ name=_gemm_mha_v2 args={{ {names} "y" }} input_args={{ {names} }} }}')
    assert (kernel.kind, kernel.precision) == ("attention", "fp8")


def test_an_operand_of_an_attention_in_another_type_is_told() -> None:
    kernel = kernel_of('function={ name=_gemm_mha_v2 args={ "q8" "q8" "x" } input_args={ "q8" "q8" "x" } }')
    assert kernel.precision == "fp16+fp8"


def test_a_product_that_is_called_attention_is_a_product() -> None:
    name = "node_scaled_dot_product_attention"
    kernel = kernel_of(f'fully_connected={{ name="{name}" output={{"y" }} input={{"wide" "wide" }} }}')
    assert (kernel.kind, kernel.precision) == ("matmul", "fp32")


def test_a_convolution_is_found_by_its_statement() -> None:
    kernel = kernel_of(
        'corrltn={ name="patches" output={"y" } input={"x" "w" "alpha" } layers="[ONNX Layer: patches]" }'
    )
    assert (kernel.kind, kernel.layers) == ("convolution", ("patches",))


@pytest.mark.parametrize("name", ["__myl_CastMulAdd", "__myl_ReplConc", "__myl_ConvertAdd"])
def test_what_is_fused_of_small_steps_is_other(name: str) -> None:
    kernel = kernel_of(f'function={{ name={name} fqn={name}_0x1 args={{ "x" "y" }} input_args={{ "x" "wide" }} }}')
    assert (kernel.kind, kernel.precision) == ("other", "fp16+fp32")


def test_statements_that_launch_nothing_are_not_listed() -> None:
    statements = [f'  {kind}={{ name="a" stream=0 }}' for kind in ("wait", "signal", "shape_call", "memset", "assert")]
    assert kernels_of_plan(plan("\n".join(statements))) == ()


def test_kernels_come_in_the_order_they_run() -> None:
    statements = [f'  fully_connected={{ name="{name}" input={{"x" "w" }} }}' for name in "cab"]
    assert [kernel.name for kernel in kernels_of_plan(plan("\n".join(statements)))] == ["c", "a", "b"]


def test_the_programs_that_a_fused_kernel_stands_for_are_not_counted_again() -> None:
    main = '  fully_connected={ name="a" input={"x" "w" } }'
    region = "  region = { name=r size=4096 alignment=128 type=user place=accelerator }\n"
    both = plan(main, "sm89 sm120 ") + plan(main, "*", region)
    assert len(kernels_of_plan(both)) == 1
    assert scratch_of_plan(both) == 0


def test_several_programs_are_listed_one_after_the_other() -> None:
    programs = [plan(f'  fully_connected={{ name="{name}" input={{"x" "w" }} }}') for name in "ab"]
    assert [kernel.name for kernel in kernels_of_plan(b"".join(programs))] == ["a", "b"]


def test_scratch_is_what_the_largest_program_plans_on_the_gpu() -> None:
    def region(size: int, kind: str = "user", place: str = "accelerator") -> str:
        return f"  region = {{ name=r size={size} alignment=128 instance=0 type={kind} place={place} unified=false }}\n"

    small = plan("", regions=region(100))
    large = plan("", regions=region(1000) + region(24) + region(1 << 20, "system") + region(1 << 20, "user", "host"))
    assert scratch_of_plan(small + large) == 1024


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00" * 100,
        b"header {\n",
        b"header {\n  tf32=0\n}\n",
        b"header {\n}\ndescriptors {\n",
        b"header {\n}\ndescriptors {\n}\nmain {\n",
        b"header {\nheader {\n}\nmain {\n}\n",
        plan('  fully_connected={ name="a" input={"x" "w" } }').replace(b"main {", b"program {"),
    ],
)
def test_a_plan_without_its_text_gives_no_kernels(text: bytes) -> None:
    assert kernels_of_plan(text) == ()
    assert scratch_of_plan(text) == 0


def test_an_operand_that_is_not_described_leaves_the_precision_open() -> None:
    assert kernel_of('fully_connected={ name="a" output={"y" } input={"unheard" } }').precision == ""


# --- the inspector's JSON


def test_a_gemm_is_in_the_type_of_its_input() -> None:
    kernel = inspected(
        Name="blocks.0.ff.net.2_myl0_42",
        LayerType="gemm",
        Inputs=[tensor("Half")],
        Outputs=[tensor("Half")],
        TacticName="sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16",
        StreamId=0,
        Metadata="[ONNX Layer: blocks.0.ff.net.2][ONNX Layer: node_linear_5]",
    )
    assert kernel == Kernel("blocks.0.ff.net.2_myl0_42", "matmul", "fp16", ("blocks.0.ff.net.2", "node_linear_5"))


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32 format", "fp32"),
        ("Row major linear FP16 format (kLINEAR)", "fp16"),
        ("Thirty-two wide channel vectorized row major FP16 format (kCHW32)", "fp16"),
        ("Half(1024,64:8,1)", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format", "bf16"),
        ("FP8", "fp8"),
        ("Int8", ""),
        ("N/A due to dynamic shapes", ""),
    ],
)
def test_a_format_tells_its_type(text: str, precision: str) -> None:
    assert inspected(Name="a", LayerType="gemm", Inputs=[tensor(text)]).precision == precision


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "fp16"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "bf16"),
        ("sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n_tilesize64x64x64", "fp8"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x16", "fp32"),
        ("cutlass_tensorop_gemm_f16_f16_256x128", "fp16"),
        ("__myl_FcAdd_0xf2543c36", ""),
        ("", ""),
    ],
)
def test_where_no_format_is_told_the_tactic_tells_the_type(tactic: str, precision: str) -> None:
    kernel = inspected(
        Name="a", LayerType="gemm", Inputs=[tensor("N/A due to dynamic shapes", -1, 64)], TacticName=tactic
    )
    assert (kernel.kind, kernel.precision) == ("matmul", precision)


def test_a_fused_attention_is_found_by_its_tactic() -> None:
    kernel = inspected(
        Name="_gemm_mha_v2_myl0_6",
        LayerType="kgen",
        Inputs=[tensor("Half")] * 3,
        TacticName="_gemm_mha_v2_0xbe9b459f86cb4240",
        Metadata="[ONNX Layer: node_Softmax_92]\x1f[ONNX Layer: node_MatMul_91]",
    )
    assert (kernel.kind, kernel.precision, kernel.layers) == (
        "attention",
        "fp16",
        ("node_Softmax_92", "node_MatMul_91"),
    )


@pytest.mark.parametrize("name", ["node_scaled_dot_product_attention_myl0_9", "/layers_6/mha/attn/key/MatMul_myl0_44"])
def test_a_gemm_that_is_called_attention_is_a_product(name: str) -> None:
    tactic = "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n"
    assert inspected(Name=name, LayerType="gemm", Inputs=[tensor("Float")], TacticName=tactic).kind == "matmul"


@pytest.mark.parametrize(
    ("layer_type", "tactic", "kind"),
    [
        ("CaskConvolution", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc", "convolution"),
        ("CaskGemmMatrixMultiply", "sm80_xmma_gemm_f16f16", "matmul"),
        ("MatrixMultiply", "", "matmul"),
        ("kgen", "__myl_FcAddMul_0x12", "matmul"),
        ("kgen", "__myl_CastMeanSubMul_0x12", "other"),
        ("kgen", "fmha_v2_flash_attention_fp16_64_128_S_72_sm90", "attention"),
        ("Reformat", "", "other"),
        ("NoOp", "", "other"),
    ],
)
def test_a_layer_is_told_by_its_type_and_tactic(layer_type: str, tactic: str, kind: str) -> None:
    assert inspected(Name="a", LayerType=layer_type, Inputs=[tensor("Half")], TacticName=tactic).kind == kind


def test_without_metadata_the_name_tells_the_layers() -> None:
    assert inspected(Name="a.to_q+a.to_k", LayerType="gemm").layers == ("a.to_q", "a.to_k")


def test_a_row_of_a_bias_says_nothing_of_a_product() -> None:
    inputs = [tensor("FP8", 2, 16, 64), tensor("Float", 1, 1, 64)]
    assert inspected(Name="a", LayerType="gemm", Inputs=inputs).precision == "fp8"


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null", "{}", '{"Layers": ["only", "names"]}', '{"Layers": []}'])
def test_an_inspector_without_layers_gives_no_kernels(text: str) -> None:
    assert kernels_of_inspector(text) == ()


# --- what a kernel is called


@pytest.mark.parametrize(
    ("layers", "labels"),
    [
        (("blocks.0.ff", "node_gelu"), ("blocks.0.ff",)),
        (("node_MatMul_91", "node_Softmax_92"), ("node_MatMul_91", "node_Softmax_92")),
        (("blocks.0.ff.input_quantize", "node_Softmax_92"), ("blocks.0.ff.input_quantize", "node_Softmax_92")),
        ((), ("__myl_Add",)),
    ],
)
def test_a_kernel_has_the_models_layers_as_labels_if_there_are_any(
    layers: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    assert Kernel("__myl_Add", "other", "fp16", layers).labels == labels
