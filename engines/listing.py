"""Lists the kernels of an engine, with the precision in which each one runs.

There are two sources. TensorRT's inspector needs a GPU. A TensorRT-RTX plan contains its program as text (a header,
typed tensors, statements), so no GPU is needed. That text is not a documented format; a plan without it gives no
kernels, and no error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

TYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "f32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "f16": "fp16",
    "bf16": "bf16",
    "bfloat": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "e4m3": "fp8",
}
ATTENTION_OPERANDS = 3  # query, key, value
IDLE = frozenset({"wait", "signal", "shape_call", "memset", "assert", "label"})

BLOCKS = (b"header {\n", b"descriptors {\n", b"main {\n")
BLOCK_END = b"\n}\n"

_TENSOR = re.compile(r'dims=\{(?P<dims>[^}]*)\}.*? name="(?P<name>[^"]*)".*? type=(?P<type>\w+)')
_STATEMENT = re.compile(r'^  (?P<kind>\w+)=\{ name=(?P<name>"[^"]*"|\S+)(?P<rest>.*)$', re.M)
_INPUTS = re.compile(r" (?:input_args|input)=\{(?P<names>[^}]*)\}")
_QUOTED = re.compile(r'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_SCRATCH = re.compile(rb"region = \{ name=\S+ size=(\d+) [^\n]*type=user place=accelerator")
_GENERIC = b"accelerators={*}"
_TACTIC = re.compile(r"gemm_(?P<a>bf16|f16|f32|e4m3)_?(?P<b>bf16|f16|f32|e4m3)_")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel launch: `kind` is matmul, attention, convolution or other; `precision` is that of its operands.

    `layers` are the nodes of the graph that the kernel covers, as far as the engine lists them. If the operands differ,
    `precision` joins all their types: `fp16+fp8`.
    """

    name: str
    kind: str
    precision: str
    layers: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The layers with a name of the model; without any, all layers; without layers, the kernel's name."""
        linears = tuple(name for name in self.layers if "." in name and not name.endswith("quantize"))
        return linears or self.layers or (self.name,)


def kernels_of_plan(plan: bytes | mmap) -> tuple[Kernel, ...]:
    """The kernels in the text of a serialized TensorRT-RTX engine; empty without such a text."""
    return tuple(kernel for _, tensors, main in _programs(plan) for kernel in _kernels(tensors, main))


def scratch_of_plan(plan: bytes | mmap) -> int:
    """Bytes of scratch memory of a TensorRT-RTX engine at its largest shapes; 0 without a program text."""
    return max((sum(map(int, _SCRATCH.findall(header))) for header, _, _ in _programs(plan)), default=0)


def kernels_of_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in the JSON of TensorRT's engine inspector, for an engine with detailed profiling verbosity.

    The list is empty for any other text: a missing list must not discard an engine that took an hour to build.
    """
    try:
        layers = json.loads(text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(_kernel_of_layer(layer) for layer in layers if isinstance(layer, dict))


def _programs(plan: bytes | mmap) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Header, tensors and statements of each program for a GPU.

    Programs for any GPU (`*`) are skipped: they only describe what a fused kernel replaces. The search is plain `find`,
    because a plan is mostly weights, and a regular expression over half a gigabyte takes a minute.
    """
    at = plan.find(BLOCKS[0])
    while at >= 0:
        blocks = []
        for name in BLOCKS:
            if plan[at : at + len(name)] != name:
                break
            end = plan.find(BLOCK_END, at)
            if end < 0:
                return
            blocks.append(plan[at + len(name) : end])
            at = end + len(BLOCK_END)
        if len(blocks) == len(BLOCKS) and _GENERIC not in blocks[0]:
            yield blocks[0], blocks[1], blocks[2]
        at = plan.find(BLOCKS[0], at)


def _kernels(descriptors: bytes, main: bytes) -> Iterator[Kernel]:
    tensors = {
        match["name"]: (match["dims"].split(), match["type"])
        for match in _TENSOR.finditer(descriptors.decode(errors="replace"))
    }
    for statement in _STATEMENT.finditer(main.decode(errors="replace")):
        if statement["kind"] in IDLE:
            continue
        name, rest = statement["name"].strip('"'), statement["rest"]
        inputs = [value for match in _INPUTS.finditer(rest) for value in _QUOTED.findall(match["names"])]
        operands = [tensors[value] for value in inputs if value in tensors]
        layers = name.split("+") if statement["kind"] == "fully_connected" else _LAYER.findall(rest)
        generated = "" if statement["name"].startswith('"') else name  # a layer's name has quotes
        kind = _kind(f"{statement['kind']} {generated}")
        yield Kernel(name, kind, _precision(kind, operands), tuple(dict.fromkeys(layers)))


def _kernel_of_layer(layer: Mapping[str, Any]) -> Kernel:
    name = str(layer.get("Name", ""))
    tactic = str(layer.get("TacticName", ""))
    operands = []
    for tensor in layer.get("Inputs", ()):
        formats = str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))
        types = [word for word in re.findall(r"\w+", formats.lower()) if word in TYPES]
        operands += [([str(dim) for dim in tensor.get("Dimensions", ())], types[-1])] if types else []
    if not operands and (match := _TACTIC.search(tactic)):  # for dynamic shapes the inspector may list no formats
        operands = [([], match["a"]), ([], match["b"])]
    layers = _LAYER.findall(str(layer.get("Metadata", ""))) or name.split("+")
    kind = _kind(f"{layer.get('LayerType', '')} {tactic or name}")
    return Kernel(name, kind, _precision(kind, operands), tuple(dict.fromkeys(layers)))


def _kind(words: str) -> str:
    """The kind from the library's names, not the graph's: a node named attention may be only one of its products."""
    if re.search(r"mha|attention", words, re.I):
        return "attention"
    if (
        re.search(r"fully_connected|gemm|MatrixMultiply|MatMul|__myl_Fc|xmma", words, re.I)
        and "conv" not in words.lower()
    ):
        return "matmul"
    return "convolution" if re.search(r"conv|corrltn", words, re.I) and "convert" not in words.lower() else "other"


def _precision(kind: str, operands: list[tuple[list[str], str]]) -> str:
    """The types of the operands that are matrices; a bias or a scale does not decide the precision of a product.

    Nor does the mask of an attention, the smallest of four operands.
    """
    if kind == "attention" and len(operands) == ATTENTION_OPERANDS + 1:
        operands = sorted(operands, key=lambda operand: -_extents(operand[0]))[:ATTENTION_OPERANDS]
    matrices = [kind for dims, kind in operands if _extents(dims) > 1]
    return "+".join(sorted({TYPES[kind] for kind in matrices or [k for _, k in operands] if kind in TYPES}))


def _extents(dims: list[str]) -> int:
    """The number of dims of more than one element."""
    return sum(dim != "1" for dim in dims)
