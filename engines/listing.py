"""What an engine runs: its kernels, with the precision that each really got.

Two sources. TensorRT's inspector needs a GPU. A TensorRT-RTX plan carries its program as text (a header, typed tensors,
statements), so it can be read where no GPU is; that text is not a documented format, and a plan without it gives no
kernels instead of an error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

TYPES = {
    "float": "fp32",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "FP32": "fp32",
    "Float": "fp32",
    "FP16": "fp16",
    "Half": "fp16",
    "BF16": "bf16",
    "BFloat16": "bf16",
    "FP8": "fp8",
}
IDLE = frozenset({"wait", "signal", "shape_call", "memset", "assert", "label"})

_PROGRAM = re.compile(
    rb"\n  accelerators=\{(?P<gpus>[^}*]*)\}\n\}\ndescriptors \{\n(?P<tensors>.*?)\n\}"
    rb"\nmain \{\n(?P<main>.*?)\n\}\nshape_main \{",
    re.S,
)
_TENSOR = re.compile(r'dims=\{(?P<dims>[^}]*)\}.*? name="(?P<name>[^"]*)".*? type=(?P<type>\w+)')
_STATEMENT = re.compile(r'^  (?P<kind>\w+)=\{ name=(?P<name>"[^"]*"|\S+)(?P<rest>.*)$', re.M)
_INPUTS = re.compile(r" (?:input_args|input)=\{(?P<names>[^}]*)\}")
_QUOTED = re.compile(r'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_HEADER = re.compile(rb"header \{\n(?P<lines>.*?)\n  accelerators=\{[^}*]*\}\n\}\n", re.S)
_SCRATCH = re.compile(rb"region = \{ name=\S+ size=(\d+) [^\n]*type=user place=accelerator")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: `kind` is matmul, attention, convolution or other; `precision` what its operands are in.

    `layers` are the graph's nodes that it covers, as far as the engine tells. A kernel whose operands differ lists all
    their types, `fp16+fp8`.
    """

    name: str
    kind: str
    precision: str
    layers: tuple[str, ...]

    @property
    def named(self) -> tuple[str, ...]:
        """The layers that bear a name of the model, else all, else the kernel's own name."""
        linears = tuple(name for name in self.layers if "." in name and not name.endswith("quantize"))
        return linears or self.layers or (self.name,)


def kernels_of_plan(plan: bytes | mmap) -> tuple[Kernel, ...]:
    """The kernels of a serialized TensorRT-RTX engine, read from its text; empty when it has none."""
    return tuple(kernel for program in _PROGRAM.finditer(plan) for kernel in _kernels(program))


def scratch_of_plan(plan: bytes | mmap) -> int:
    """Bytes of device memory that a TensorRT-RTX engine plans at its largest shapes; 0 when it has no text."""
    programs = (_SCRATCH.findall(header["lines"]) for header in _HEADER.finditer(plan))
    return max((sum(map(int, sizes)) for sizes in programs), default=0)


def kernels_of_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in the JSON of TensorRT's engine inspector, built with detailed profiling verbosity."""
    layers = json.loads(text).get("Layers", [])
    return tuple(_inspected(layer) for layer in layers if isinstance(layer, dict))


def _kernels(program: re.Match[bytes]) -> Iterator[Kernel]:
    tensors = {
        found["name"]: (found["dims"].split(), found["type"])
        for found in _TENSOR.finditer(program["tensors"].decode(errors="replace"))
    }
    for statement in _STATEMENT.finditer(program["main"].decode(errors="replace")):
        if statement["kind"] in IDLE:
            continue
        name, rest = statement["name"].strip('"'), statement["rest"]
        inputs = [value for found in _INPUTS.finditer(rest) for value in _QUOTED.findall(found["names"])]
        operands = [tensors[value] for value in inputs if value in tensors]
        layers = name.split("+") if statement["kind"] == "fully_connected" else _LAYER.findall(rest)
        yield Kernel(name, _kind(f"{statement['kind']} {name}"), _precision(operands), tuple(dict.fromkeys(layers)))


def _inspected(layer: Mapping[str, Any]) -> Kernel:
    name = str(layer.get("Name", ""))
    words = " ".join(str(layer.get(key, "")) for key in ("LayerType", "Name", "TacticName"))
    operands = []
    for tensor in layer.get("Inputs", ()):
        formats = str(tensor.get("Format/Datatype", tensor.get("Format", "")))
        types = [word for word in re.findall(r"\w+", formats) if word in TYPES]
        operands += [([str(dim) for dim in tensor.get("Dimensions", ())], types[-1])] if types else []
    layers = _LAYER.findall(str(layer.get("Metadata", ""))) or name.split("+")
    return Kernel(name, _kind(words), _precision(operands), tuple(dict.fromkeys(layers)))


def _kind(words: str) -> str:
    if re.search(r"mha|attention", words, re.I):
        return "attention"
    if (
        re.search(r"fully_connected|gemm|MatrixMultiply|MatMul|__myl_Fc|xmma", words, re.I)
        and "conv" not in words.lower()
    ):
        return "matmul"
    return "convolution" if re.search(r"conv", words, re.I) and "convert" not in words.lower() else "other"


def _precision(operands: list[tuple[list[str], str]]) -> str:
    """Of the operands that are matrices; a bias or a scale says nothing of what a product runs in."""
    matrices = [kind for dims, kind in operands if sum(dim != "1" for dim in dims) > 1]
    return "+".join(sorted({TYPES[kind] for kind in matrices or [k for _, k in operands] if kind in TYPES}))
