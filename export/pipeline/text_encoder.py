"""A pipeline's text encoder as graph `text`, its weights brought over one at a time; and its tokenizer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ilf_trt.contract.bundle import weights_file
from ilf_trt.contract.document import DocumentError
from ilf_trt.contract.ports import PICTURES
from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.contract.tokenizer_file import check_tokenizer_folder, read_tokenizer
from ilf_trt.errors import CheckpointError, MissingDependency, shown
from ilf_trt.export.graph import OPSET, TRACED_PICTURES, quiet
from ilf_trt.export.passes import check_operators, strip_metadata
from ilf_trt.model.checkpoint import read_json_object
from ilf_trt.model.foreign import refuse_foreign_code

from .folder import PipelineFolder
from .t5 import T5Encoder, T5Shape

MOST_PROMPTS = 1 << 16
ALIGNMENT = 256  # of every tensor in the file, so that it can be mapped
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
DECODER = ("decoder.", "lm_head.")  # of a whole T5, which has no part in embedding text
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under either name, or under both


def text_spec_of(folder: PipelineFolder, *, tokens: int, precision: Precision) -> TextSpec:
    """The dimensions of the text encoder, from its config alone; raises CheckpointError, InvalidRequest."""
    shape = _shape(folder)
    return TextSpec(tokens, shape.vocab_size, shape.d_model, precision)


def export_text(folder: PipelineFolder, spec: TextSpec, path: Path) -> None:
    """Write the graph as `path`, its weights beside it as `path`.data.

    The graph is made without weights; they are then read from their shards, cast and written one by one, so that no
    more than one of them is in memory. Raises CheckpointError for weights that are missing or of another shape.
    """
    shape, shards = _shape(folder), _Shards.of(folder.path / "text_encoder")
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
            tensor = shape.buckets(spec.tokens) if name == "buckets" else _laid_out(shards.read(name), name).to(dtype)
            if tuple(tensor.shape) != tuple(value.shape):
                found, wanted = tuple(tensor.shape), tuple(value.shape)
                raise CheckpointError(f"{shards.folder}: {name} is {found}, its config says {wanted}; copy it again")
            value.const_value = _write_tensor(tensor, file, path, name)
    shards.check_used({*weights, *EMBEDDINGS})
    ir.save(model, path)


def write_tokenizer(folder: PipelineFolder, path: Path) -> None:
    """Save the tokenizer that transformers makes of the folder, as `tokenizer.json`.

    Raises CheckpointError when the folder holds none, MissingDependency without transformers.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(f"a text encoder needs {error.name}; pip install 'ilf-trt[pipeline]'") from error
    source = folder.path / "tokenizer"
    refuse_foreign_code(source)
    try:
        check_tokenizer_folder(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < 2:
            raise ValueError("it has no words")
        tokenizer.backend_tokenizer.save(str(path))
        read_tokenizer(path)
    except DocumentError as error:
        raise CheckpointError(f"{error}; ilf-trt reads a T5's tokenizer; copy that of the text encoder") from error
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source} holds no tokenizer that can be read ({reason}); copy its tokenizer.json or spiece.model there"
        ) from error


def _weightless(shape: T5Shape, tokens: int, dtype: torch.dtype) -> T5Encoder:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return T5Encoder(shape, tokens).eval()
    finally:
        torch.set_default_dtype(before)


def _shape(folder: PipelineFolder) -> T5Shape:
    source = folder.path / "text_encoder"
    refuse_foreign_code(source)
    return T5Shape.of(read_json_object(source / "config.json"), str(source))


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


@dataclass(frozen=True, slots=True)
class _Shards:
    """Which safetensors file holds a tensor; each is opened for one tensor at a time, so that none stays mapped."""

    folder: Path
    paths: dict[str, Path]

    @classmethod
    def of(cls, folder: Path) -> "_Shards":
        paths: dict[str, Path] = {}
        for path in _shard_paths(folder):
            with _open_shard(path) as shard:
                for name in shard.keys():  # noqa: SIM118
                    dtype = shard.get_slice(name).get_dtype()
                    if dtype not in FLOATS:
                        raise CheckpointError(
                            f"{path}: {shown(name, 80)} is {dtype}, expected {', '.join(FLOATS)}; use weights that are "
                            "not quantised"
                        )
                    paths[name] = path
        return cls(folder, paths)

    def check_used(self, names: set[str]) -> None:
        """Raise CheckpointError for a tensor of an encoder that is not among `names`: it would be left out."""
        unused = sorted(name for name in self.paths.keys() - names if not name.startswith(DECODER))
        if unused:
            raise CheckpointError(
                f"{self.folder} holds {shown(unused[0], 80)}, which a T5 encoder does not have; use weights that are "
                "neither quantised nor adapted"
            )

    def read(self, name: str) -> Tensor:
        for alias in EMBEDDINGS if name in EMBEDDINGS else (name,):
            if alias in self.paths:
                with _open_shard(self.paths[alias]) as shard:
                    tensor: Tensor = shard.get_tensor(alias)
                    return tensor
        raise CheckpointError(f"{self.folder} lacks {name}; copy all of its shards again")


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); copy it again") from error


def _shard_paths(folder: Path) -> Iterator[Path]:
    if not (folder / INDEX).is_file():
        yield folder / WEIGHTS
        return
    names = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder / INDEX} holds no weight_map; copy it again")
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names {name!r}, outside the folder; do not use it")
        yield folder / name
