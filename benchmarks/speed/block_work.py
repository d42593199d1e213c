"""The work of one block pass, read from diffusers' own block on torch's meta device: products, attentions, the rest.

Nothing is computed and no weight is allocated; shapes come from the model's configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rivals.full_size_models import LOOP, MODELS, TINY, TINY_LOOP, make_backbone
from benchmarks.speed.hoisting import meta_tensor
from ilf_trt import ILFModel, attach
from ilf_trt.contract.ports import ROWS
from ilf_trt.export.attention import HEAD_STEP

GUIDED_ROWS = 2  # one picture with guidance
MIDDLE_BLOCK = 1  # any block but the first: diffusers may treat that one specially
NO_KERNEL = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::alias",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
)


@dataclass(frozen=True, slots=True)
class Product:
    """A Linear: (rows, inputs) by (inputs, outputs). `source` is the same number for Linears of the same input.

    `input_head` and `output_head` are the size of the heads of an attention that the inputs or outputs are, 0 for none.
    """

    rows: int
    inputs: int
    outputs: int
    source: int
    input_head: int = 0
    output_head: int = 0

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    def bytes_moved(self, operand_bytes: int, result_bytes: int) -> float:
        operands = self.rows * self.inputs + self.inputs * self.outputs
        return float(operands * operand_bytes + self.rows * self.outputs * result_bytes)

    @property
    def filled(self) -> "Product":
        """The same Linear with its heads filled up with zeros."""
        inputs, outputs = filled(self.inputs, self.input_head), filled(self.outputs, self.output_head)
        heads = (filled(head, head) for head in (self.input_head, self.output_head))
        return Product(self.rows, inputs, outputs, self.source, *heads)


@dataclass(frozen=True, slots=True)
class Attention:
    """A fused attention: queries (R, H, N, d), keys and values (R, H, L, d)."""

    rows: int
    heads: int
    queries: int
    keys: int
    head_size: int
    masked: bool

    def flop(self, head_size: int | None = None) -> float:
        """Operations of both products with heads of `head_size`, by default the useful ones."""
        return 4.0 * self.rows * self.heads * self.queries * self.keys * (head_size or self.head_size)

    def bytes_moved(self, operand_bytes: int, result_bytes: int) -> float:
        tokens = self.rows * self.heads * self.head_size
        return float(tokens * (self.queries + 2 * self.keys) * operand_bytes + tokens * self.queries * result_bytes)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A kernel of eager torch that is neither a Linear nor an attention; `bytes_moved` is what it reads and writes."""

    name: str
    bytes_moved: float
    output_elements: int


@dataclass(frozen=True, slots=True)
class BlockWork:
    """One block pass in eager torch in float16: each entry is a kernel. `token_elements` is R * N * D."""

    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    rest: tuple[Elementwise, ...]
    token_elements: int

    @property
    def kernels(self) -> int:
        return len(self.products) + len(self.attentions) + len(self.rest)

    @property
    def engine_products(self) -> tuple[Product, ...]:
        """The products of an engine: `cond` has those of a row per picture; Linears of one input are merged."""
        merged: dict[int, Product] = {}
        for product in self.products:
            if product.rows <= GUIDED_ROWS:
                continue
            other = merged.get(product.source)
            outputs = product.outputs + (other.outputs if other else 0)
            merged[product.source] = replace(product, outputs=outputs)
        return tuple(merged.values())

    @property
    def filled(self) -> "BlockWork":
        """The same work with heads filled up with zeros, as in a graph of FP8 attention for TensorRT."""
        attentions = tuple(replace(each, head_size=filled(each.head_size, each.head_size)) for each in self.attentions)
        return replace(self, products=tuple(each.filled for each in self.products), attentions=attentions)

    @property
    def fused_elements(self) -> int:
        """Elements that fused norms and residuals read and write at least.

        A norm with its modulation reads the tokens and writes them. A residual with its gate reads two and writes one.
        """
        full = [kernel.name for kernel in self.rest if kernel.output_elements == self.token_elements]
        norms, residuals = full.count("aten::native_layer_norm"), full.count("residual")
        return (2 * norms + 3 * residuals) * self.token_elements

    @property
    def activation_elements(self) -> int:
        """Elements that the feed-forward's activation writes."""
        return sum(kernel.output_elements for kernel in self.rest if kernel.name == "aten::gelu")


def filled(width: int, head_size: int) -> int:
    """A width of whole heads, each filled up to a multiple of `HEAD_STEP`; of no heads (`head_size` 0), as it is."""
    return width // head_size * ceil(head_size / HEAD_STEP) * HEAD_STEP if head_size else width


def make_meta_model(name: str) -> ILFModel:
    """A model of `full_size_models` without weights, in float16."""
    with torch.device("meta"):
        return attach(make_backbone(name).half(), TINY_LOOP if name in TINY else LOOP)


def trace_block(name: str, model: ILFModel | None = None) -> BlockWork:
    """The work of one plain block of a model of `full_size_models`, at batch 1 with guidance."""
    model = model or make_meta_model(name)
    adapter = model.adapter
    latents = torch.zeros(GUIDED_ROWS, *adapter.latent, device="meta", dtype=torch.float16)
    ports = adapter.conditioning((MODELS | TINY)[name]["text_tokens"] or 1).row_ports(ROWS)
    call = adapter.call({port.name: _half(meta_tensor(port, {ROWS: GUIDED_ROWS})) for port in ports})
    block = adapter.blocks[MIDDLE_BLOCK]
    recorder = _Recorder()
    hooks = [block.register_forward_pre_hook(recorder.begin), block.register_forward_hook(recorder.end)]
    try:
        with torch.no_grad(), recorder.functions, recorder.kernels:
            model.backbone(latents, timestep=torch.zeros(GUIDED_ROWS, device="meta"), **call)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.work()


class _Recorder:
    """What runs between `begin` and `end`."""

    def __init__(self) -> None:
        self.active = False
        self.products: list[Product] = []
        self.attentions: list[Attention] = []
        self.rest: list[Elementwise] = []
        self.token_elements = 0
        self.functions, self.kernels = _Functions(self), _Kernels(self)
        self._sources: list[Tensor] = []  # kept, so that an id names one tensor
        self._outputs: list[Tensor] = []  # of each product
        self._heads: list[Tensor] = []  # the output of each attention

    def begin(self, _block: Any, inputs: tuple[Tensor, ...]) -> None:
        self.active = True
        self.token_elements = inputs[0].numel()

    def end(self, *_: Any) -> None:
        self.active = False

    def work(self) -> BlockWork:
        return BlockWork(tuple(self.products), tuple(self.attentions), tuple(self.rest), self.token_elements)

    def add_product(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Record a Linear; gives its empty output."""
        if all(source is not tokens for source in self._sources):
            self._sources.append(tokens)
        source = next(index for index, source in enumerate(self._sources) if source is tokens)
        outputs, inputs = weight.shape
        heads = (a.head_size for a, out in zip(self.attentions, self._heads, strict=True) if _is_view(tokens, out))
        self.products.append(Product(tokens.numel() // inputs, inputs, outputs, source, next(heads, 0)))
        self._outputs.append(tokens.new_empty(*tokens.shape[:-1], outputs))
        return self._outputs[-1]

    def add_attention(self, query: Tensor, key: Tensor, value: Tensor, *, masked: bool) -> Tensor:
        """Record an attention; gives its empty output, in the layout of the fused kernels."""
        rows, heads, queries, head_size = query.shape
        self.attentions.append(Attention(rows, heads, queries, key.shape[2], head_size, masked))
        for index, output in enumerate(self._outputs):
            if any(_is_view(operand, output) for operand in (query, key, value)):
                self.products[index] = replace(self.products[index], output_head=head_size)
        self._heads.append(query.new_empty(rows, queries, heads, head_size).transpose(1, 2))
        return self._heads[-1]


class _Functions(TorchFunctionMode):
    """Records Linears and attentions, and answers with empty results."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not self._recorder.active:
            return func(*args, **(kwargs or {}))
        if func is F.linear:
            return self._recorder.add_product(args[0], args[1])
        if func is F.scaled_dot_product_attention:
            return self._recorder.add_attention(*args[:3], masked=(kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Records every other operation that computes."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if self._recorder.active and not func.is_view and not name.startswith(NO_KERNEL):
            inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            first = next(value for value in torch.utils._pytree.tree_leaves(output) if isinstance(value, Tensor))
            moved = sum(map(_stored_bytes, inputs)) + _stored_bytes(first)
            full = [value for value in inputs if value.numel() == self._recorder.token_elements]
            if name == "aten::add" and len(full) > 1:
                name = "residual"
            self._recorder.rest.append(Elementwise(name, moved, first.numel()))
        return output


def _is_view(tensor: Tensor, other: Tensor) -> bool:
    """Whether both tensors are views of the same memory."""
    return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def _stored_bytes(tensor: Tensor) -> float:
    """The bytes of a tensor, an expanded dimension once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return float(elements * tensor.element_size())


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
