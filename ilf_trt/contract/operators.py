"""The ONNX operators that a bundle's graph may have: those whose work follows from the shapes of their inputs.

There is no loop, no branch, no function, no text, no sequence and no operator of another domain among them.
"""

EXPORTED = frozenset(
    (
        "Add",
        "Cast",
        "Concat",
        "Conv",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Einsum",
        "Expand",
        "Gather",
        "Gelu",
        "Gemm",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "ReduceMean",
        "Relu",
        "Reshape",
        "Resize",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    )
)
"""What DiT, PixArt, T5 and the decoders become."""

OF_OTHER_BACKBONES = frozenset(
    (
        "Abs",
        "AveragePool",
        "Clip",
        "ConvTranspose",
        "DepthToSpace",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Flatten",
        "Greater",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Less",
        "Log",
        "LogSoftmax",
        "Max",
        "Min",
        "Mish",
        "Neg",
        "Not",
        "Pad",
        "ReduceL2",
        "ReduceMax",
        "ReduceMin",
        "ReduceSum",
        "ReduceSumSquare",
        "Sign",
        "Softplus",
        "SpaceToDepth",
        "Split",
        "Sum",
        "Where",
    )
)
"""Elementwise functions, reductions and layouts that an adapter of others may need."""

OPERATORS = EXPORTED | OF_OTHER_BACKBONES
DOMAINS = ("", "ai.onnx")


def is_listed(domain: str, operator: str) -> bool:
    """Whether a graph may have an operator of a domain."""
    return domain in DOMAINS and operator in OPERATORS
