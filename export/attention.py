"""Attentions in an exported graph: finds them, folds their scale into the query's Linear, pads their heads."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.convenience import replace_all_uses_with

HEAD_STEP = 16
"""FP8 attention of TensorRT wants head sizes that are multiples of this."""
ROUNDED = 0.01
"""How far rounding to bfloat16, twice, may take a scale from what it was."""
LAYOUT = frozenset(("Reshape", "Transpose"))

Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Linear:
    """A Linear as the exporter writes it: a matrix product, and the sum with a bias if there is one."""

    product: Any
    bias: Any | None

    @property
    def output(self) -> Any:
        return (self.bias or self.product).outputs[0]


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(query key^T + mask) value: two products around a Softmax.

    `name` is the path of the query's Linear without its last part, `transformer_blocks.8.attn1`.
    """

    name: str
    query: Linear
    scores: Any
    softmax: Any
    mixed: Any


def attentions(graph: Any) -> Iterator[Attention]:
    """The attentions whose query comes out of a Linear with nothing but layout and a scale between, in graph order."""
    for softmax in list(graph):
        mixed = _only_use(softmax.outputs[0]) if softmax.op_type == "Softmax" else None
        scores = softmax.inputs[0].producer() if mixed is not None else None
        if scores is not None and scores.op_type == "Add":  # a mask
            products = [value.producer() for value in scores.inputs]
            scores = next((node for node in products if node is not None and node.op_type == "MatMul"), None)
        if mixed is None or scores is None or {mixed.op_type, scores.op_type} != {"MatMul"}:
            continue
        if mixed.inputs[0] is not softmax.outputs[0] or _only_use(scores.outputs[0]) is None:
            continue
        found = _linear_behind(_unscaled(scores.inputs[0]))
        if found is not None:
            linear, _ = found
            name = linear.product.name.rpartition(".")[0]
            if name:
                yield Attention(name, linear, scores, softmax, mixed)


def name_attentions(model: Any) -> int:
    """Call the products and the Softmax of every attention after it: `NAME.scores`, `NAME.softmax`, `NAME.mixed`.

    Comes after `name_linears`. A second attention of one name keeps the exporter's names.
    """
    seen: set[str] = set()
    for attention in attentions(model.graph):
        if attention.name not in seen:
            seen.add(attention.name)
            for part in ("scores", "softmax", "mixed"):
                getattr(attention, part).name = f"{attention.name}.{part}"
    return len(seen)


def is_folded(attention: Attention) -> bool:
    """Whether no scale is left between the operands and the first product."""
    return all(_scalar_of(value) is None for value in attention.scores.inputs)


def fold_attention_scales(model: Any) -> int:
    """Multiply 1/sqrt(d) into weight and bias of the query's Linear, in float32, instead of at every run.

    The exporter writes the scale of an attention as two products with its square root, one on the query and one on the
    key. An attention keeps them if another node sees what is to be scaled. Returns the number of folded attentions.
    """
    count = 0
    for attention in attentions(model.graph):
        operands = [(value, _scalar_of(value)) for value in attention.scores.inputs]
        scaled = [(value, scalar) for value, scalar in operands if scalar is not None]
        if not scaled or any(_only_use(value) is None for value, _ in scaled):
            continue
        factor = np.float32(_factor([scalar for _, scalar in scaled], attention.scores.inputs[0].shape))
        for value, _ in scaled:
            replace_all_uses_with(value, _unscaled(value))
            model.graph.remove(value.producer(), safe=True)
        _edit_linear(model.graph, attention.query, partial(np.multiply, factor))
        count += 1
    return count


def _factor(scalars: Sequence[float], query: Any) -> float:
    """What the scalars are together: 1/sqrt(d) itself where they are that, which the exporter rounded to the dtype."""
    product = float(np.prod(scalars, dtype=np.float64))
    size = query[-1] if query is not None else None
    exact = size**-0.5 if isinstance(size, int) else product
    return exact if abs(product / exact - 1) < ROUNDED else product


def pad_heads(model: Any, names: Collection[str]) -> int:
    """Pad the heads of the attentions `names` with zeros to a multiple of 16 values; returns how many were padded.

    The zeros stand in weight and bias of the query's, key's and value's Linear, and in the rows of the output's, so
    that no node is added and every result stays as it is. Comes after `fold_attention_scales`: the exporter's scale is
    that of the unpadded head. An attention whose operands are not Linears of this graph stays as it is.
    """
    count = 0
    for attention in attentions(model.graph):
        query = attention.scores.inputs[0]
        size = query.shape[-1] if query.shape is not None else None
        if attention.name not in names or not isinstance(size, int) or not size % HEAD_STEP or not is_folded(attention):
            continue
        operands = ((query, -1), (attention.scores.inputs[1], -2), (attention.mixed.inputs[1], -1))
        found = [*(_side_before(value, axis, size) for value, axis in operands), _side_after(attention.mixed)]
        sides = [side for side in found if side is not None and side.is_plain(size)]
        if len(sides) == len(found):
            for side in sides:
                side.pad(model.graph, size, ceil(size / HEAD_STEP) * HEAD_STEP)
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Side:
    """A Linear beside an attention: it makes the heads, or takes them in its rows.

    `joined` are the values with all heads in the last axis, `split` those with an axis of one head, from the end.
    """

    linear: Linear
    takes: bool
    joined: tuple[Any, ...]
    split: tuple[tuple[Any, int], ...]

    def pad(self, graph: Any, size: int, padded: int) -> None:
        """Put zeros behind every head, in the Linear and in the shapes of the values around it."""
        axis = 0 if self.takes else -1

        def with_zeros(array: NDArray[np.float32]) -> NDArray[np.float32]:
            split = np.moveaxis(array, axis, -1)
            heads = split.reshape(*split.shape[:-1], -1, size)
            wide = np.pad(heads, [(0, 0)] * (heads.ndim - 1) + [(0, padded - size)])
            return np.moveaxis(wide.reshape(*split.shape[:-1], -1), -1, axis)

        _edit_linear(graph, self.linear, with_zeros)
        for value in self.joined:
            _set_size(graph, value, -1, value.shape[-1] // size * padded)
        for value, place in self.split:
            _set_size(graph, value, place, padded)

    def is_plain(self, size: int) -> bool:
        """Whether the sizes that `pad` changes are known where it needs them, and stand in constants of one number."""
        joined = (isinstance(value.shape[-1], int) and not value.shape[-1] % size for value in self.joined)
        places = (*((value, -1) for value in self.joined), *self.split)
        return all(joined) and all(_can_set_size(value, axis) for value, axis in places)


def _side_before(operand: Any, axis: int, size: int) -> _Side | None:
    """The Linear that makes an operand, if the `size` values of a head at `axis` can be followed back to it."""
    found = _linear_behind(operand, shapes=True)
    if found is None:
        return None
    linear, layout = found
    split: list[tuple[Any, int]] = []
    place: int | None = axis
    for node in reversed(layout):
        value = node.outputs[0]
        if place is None or value.shape is None or not _agree([value.shape[place]], [size]):
            return None
        split.append((value, place))
        if node is layout[0]:
            whole = node.op_type == "Reshape" and place == -1 and len(value.shape) > len(linear.output.shape)
            joined = dict.fromkeys((linear.product.outputs[0], linear.output))
            return _Side(linear, False, tuple(joined), tuple(split)) if whole else None
        place = _axis_before(node, place)
    return None


def _side_after(mixed: Any) -> _Side | None:
    """The Linear that takes mixed values: a Transpose that keeps a head last, a Reshape that joins, a product."""
    swap = _only_use(mixed.outputs[0])
    if swap is None or swap.op_type != "Transpose" or _axis_before(swap, -1) != -1:
        return None
    join = _only_use(swap.outputs[0])
    product = _only_use(join.outputs[0]) if join is not None and join.op_type == "Reshape" else None
    if join is None or product is None or product.op_type != "MatMul" or product.inputs[1].const_value is None:
        return None
    return _Side(Linear(product, None), True, (join.outputs[0],), ((mixed.outputs[0], -1), (swap.outputs[0], -1)))


def _axis_before(node: Any, axis: int) -> int | None:
    """Where an axis of the output of a Transpose or a Reshape lies in its input, both from the end; None if nowhere."""
    old, new = node.inputs[0].shape, node.outputs[0].shape
    if node.op_type == "Transpose":
        return int(node.attributes["perm"].as_ints()[axis]) - len(new)
    return axis if -axis <= len(old) and _agree(old[axis:], new[axis:]) else None


def _agree(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two shapes are the same, as far as the exporter tells: it leaves out sizes that a graph computes."""
    return all(
        one == other
        for one, other in zip(sizes, others, strict=True)
        if isinstance(one, int) and isinstance(other, int)
    )


def _set_size(graph: Any, value: Any, axis: int, size: int) -> None:
    """Give a value another size at an axis: in its own shape, and in the constant that a Reshape makes it by."""
    if isinstance(value.shape[axis], int):
        value.shape = ir.Shape([*value.shape[:axis], size, *value.shape[axis:][1:]])
    node = value.producer()
    if node.op_type != "Reshape":
        return
    target = node.inputs[1]
    if target.const_value is not None:
        _replace_constant(graph, node, 1, lambda array: _with_size(array, axis, size))
    elif target.producer().op_type == "Concat" and target.producer().inputs[axis].const_value is not None:
        pieces = list(target.producer().inputs)
        join = ir.node("Concat", pieces, {"axis": 0}, name=f"{node.name}.shape")
        join.outputs[0].name = join.name
        graph.insert_before(node, join)
        _replace_constant(graph, join, len(pieces) + axis, lambda array: np.full_like(array, size))
        node.replace_input_with(1, join.outputs[0])


def _can_set_size(value: Any, axis: int) -> bool:
    """Whether `_set_size` knows where the size comes from: no Reshape, a whole constant, or one number of a Concat."""
    node = value.producer()
    if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
        return True
    join = node.inputs[1].producer()
    if join is None or join.op_type != "Concat" or len(join.inputs) < -axis:
        return False
    constant = join.inputs[axis].const_value
    return constant is None or constant.size == 1


def _with_size(array: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    changed = array.copy()
    changed[axis] = size if changed[axis] > 0 else changed[axis]  # -1 follows by itself
    return changed


def _only_use(value: Any, *, shapes: bool = False) -> Any | None:
    """The one node that takes a value; None if there are more, or if the value leaves the graph."""
    uses = [use for use in value.uses() if not (shapes and use.node.op_type == "Shape")]
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _scalar_of(value: Any) -> float | None:
    """The constant that a value was multiplied by, if its producer does just that."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    constants = [given.const_value for given in node.inputs]
    return next((float(c.numpy().item()) for c in constants if c is not None and c.size == 1), None)


def _unscaled(value: Any) -> Any:
    """What `_scalar_of` found multiplied; any other value is its own."""
    if _scalar_of(value) is None:
        return value
    first, second = value.producer().inputs
    return second if first.const_value is not None else first


def _linear_behind(value: Any, *, shapes: bool = False) -> tuple[Linear, tuple[Any, ...]] | None:
    """The Linear that makes a value, and the layout between; None if there is other work or if others see it.

    `shapes` lets nodes through that only ask for a shape.
    """
    layout: list[Any] = []
    node = value.producer()
    while node is not None and node.op_type in LAYOUT:
        if _only_use(node.outputs[0], shapes=shapes) is None:
            return None
        layout.insert(0, node)
        node = node.inputs[0].producer()
    if node is None or _only_use(node.outputs[0]) is None:
        return None
    linear = Linear(node, None)
    if node.op_type == "Add":
        terms = sorted(node.inputs, key=lambda term: term.const_value is not None)
        product = terms[0].producer()
        if terms[1].const_value is None or product is None or _only_use(terms[0]) is None:
            return None
        linear = Linear(product, node)
    if linear.product.op_type != "MatMul" or linear.product.inputs[1].const_value is None:
        return None
    return linear, tuple(layout)


def _edit_linear(graph: Any, linear: Linear, change: Change) -> None:
    """Change weight (in, out) and bias (out,) in float32; other users of the same tensors keep theirs."""
    for node in filter(None, (linear.product, linear.bias)):
        (index,) = (i for i, value in enumerate(node.inputs) if value.const_value is not None)
        _replace_constant(graph, node, index, lambda array: change(array.astype(np.float32)))


def _replace_constant(graph: Any, node: Any, index: int, change: Change) -> None:
    """Another constant input for one node, of the same dtype."""
    old = node.inputs[index]
    array = change(old.const_value.numpy()).astype(old.const_value.dtype.numpy())
    alone = len(old.uses()) == 1 and not old.is_graph_output()
    name = old.name if alone else f"{node.name}.{old.name}"
    new = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(old.const_value.dtype),
    )
    node.replace_input_with(index, new)
    if alone and old.name in graph.initializers:
        del graph.initializers[old.name]
    graph.initializers[name] = new
