"""A pipeline's text encoder as graph `text`, its weights brought over one at a time; and its tokenizer."""

from pathlib import Path
from typing import IO, Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ilf_trt.contract.bundle import weights_file
from ilf_trt.contract.ports import PICTURES
from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.contract.tokenizer_file import read_tokenizer
from ilf_trt.errors import CheckpointError
from ilf_trt.export.graph import OPSET, TRACED_PICTURES, quiet
from ilf_trt.export.passes import check_operators, strip_metadata
from ilf_trt.model.foreign import foreign
from ilf_trt.model.pretrained import model_config
from ilf_trt.model.t5_folder import EMBEDDINGS, load_tokenizer, t5_weights
from ilf_trt.model.weights import Weights, check_finite

from .folder import PipelineFolder
from .t5 import T5Encoder, T5Shape

MOST_PROMPTS = 1 << 16
ALIGNMENT = 256  # of every tensor in the file, so that it can be mapped


def text_spec_of(folder: PipelineFolder, *, tokens: int, precision: Precision) -> TextSpec:
    """The dimensions of the text encoder, whose weights are not read but must be there.

    Raises CheckpointError, MissingDependency.
    """
    shape = _shape(folder)
    t5_weights(folder.path / "text_encoder")
    return TextSpec(tokens, shape.vocab_size, shape.d_model, precision)


def export_text(folder: PipelineFolder, spec: TextSpec, path: Path) -> None:
    """Write the graph as `path`, its weights beside it as `path`.data.

    The graph is made without weights; they are then read from their shards, cast and written one by one, so that no
    more than one of them is in memory. Raises CheckpointError for weights that are missing or of another shape.
    """
    shape, shards = _shape(folder), t5_weights(folder.path / "text_encoder")
    dtype = getattr(torch, spec.precision.dtype)
    with quiet(), FakeTensorMode(), torch.no_grad():
        module = _weightless(shape, spec.tokens, dtype)
        given = (
            torch.ones(TRACED_PICTURES, spec.tokens, dtype=torch.int32),
            torch.ones(TRACED_PICTURES, spec.tokens, dtype=torch.float32),
        )
        prompts = Dim(PICTURES, min=1, max=MOST_PROMPTS)
        program: Any = torch.onnx.export(
            module,
            given,
            dynamo=True,
            opset_version=OPSET,
            input_names=[port.name for port in spec.graph.inputs],
            output_names=[port.name for port in spec.graph.outputs],
            dynamic_shapes=({0: prompts}, {0: prompts}),
            optimize=False,
            verbose=False,
        )
        model = program.model
        weights = list(model.graph.initializers)
        for name in weights:
            model.graph.initializers[name].const_value = None  # not there: the optimizer takes it for an input
        optimize_ir(model)
    strip_metadata(model)
    check_operators(model)
    model.graph.name = spec.graph.name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = weights_file(path)
    with data.open("wb") as file:
        for name in weights:
            value = model.graph.initializers[name]
            tensor = shape.buckets(spec.tokens) if name == "buckets" else _laid_out(_read(shards, name), name).to(dtype)
            if tuple(tensor.shape) != tuple(value.shape):
                found, wanted = tuple(tensor.shape), tuple(value.shape)
                raise CheckpointError(f"{shards.folder}: {name} is {found}, its config says {wanted}; copy it again")
            value.const_value = _write_tensor(tensor, file, path, name)
    ir.save(model, path)


def write_tokenizer(folder: PipelineFolder, path: Path) -> None:
    """Save the tokenizer that transformers makes of the folder, as `tokenizer.json`.

    Raises CheckpointError when the folder holds none, MissingDependency without transformers.
    """
    source = folder.path / "tokenizer"
    tokenizer = load_tokenizer(source)
    with foreign(f"{source} holds no fast tokenizer", "copy its tokenizer.json there"):
        tokenizer.backend_tokenizer.save(str(path))
        read_tokenizer(path)


def _weightless(shape: T5Shape, tokens: int, dtype: torch.dtype) -> T5Encoder:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return T5Encoder(shape, tokens).eval()
    finally:
        torch.set_default_dtype(before)


def _shape(folder: PipelineFolder) -> T5Shape:
    source = folder.path / "text_encoder"
    return T5Shape.of(model_config(source), str(source))


def _laid_out(tensor: Tensor, name: str) -> Tensor:
    """transformers keeps a Linear's weight as (out, in); embeddings and norms are as they are."""
    return tensor.T if tensor.ndim == 2 and name not in EMBEDDINGS and "relative_attention_bias" not in name else tensor


def _write_tensor(tensor: Tensor, file: IO[bytes], path: Path, name: str) -> Any:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    file.write(raw.data)
    return ir.ExternalTensor(
        location=weights_file(path).name,
        offset=offset,
        length=raw.nbytes,
        dtype={
            torch.float32: ir.DataType.FLOAT,
            torch.bfloat16: ir.DataType.BFLOAT16,
            torch.int32: ir.DataType.INT32,
        }[tensor.dtype],
        shape=ir.Shape(tensor.shape),
        name=name,
        base_dir=path.parent,
    )


def _read(weights: Weights, name: str) -> Tensor:
    """One tensor; its file is opened for it alone, so that none stays mapped."""
    if name not in weights.tensors:
        (name,) = (alias for alias in EMBEDDINGS if alias in weights.tensors and name in EMBEDDINGS)
    file = weights.tensors[name].file
    with foreign(f"{file} cannot be read", "copy it again"), safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
    check_finite({name: tensor}, str(file))
    return tensor
