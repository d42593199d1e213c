"""Graph `text` beside transformers' T5, from one file or from shards, and the tokenizer that goes with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from ilf_trt.contract.spec import Precision, TextSpec
from ilf_trt.errors import CheckpointError
from ilf_trt.export.pipeline.folder import PipelineFolder
from ilf_trt.export.pipeline.t5 import T5Shape
from ilf_trt.export.pipeline.text_encoder import export_text, text_spec_of, write_tokenizer
from ilf_trt.export.rounding import emulate_bfloat16
from ilf_trt.runtime.text.tokenizer import Tokenizer
from tests import small_pipelines
from tests.small_tokenizer import PIECES

TOKENS = 150  # past the longest distance that has a bucket of its own
FLOAT32_LIMIT = 1e-5
BFLOAT16_LIMIT = 3e-2
PROMPTS = ["a red fox", "", "ein grüner Baum, 狐狸", "many words " * 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    small_pipelines.pixart_pipeline(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSpec, Path]:
    """The graph of `folder` in FP32."""
    return exported(folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def exported(folder: Path, tmp_path: Path, precision: Precision = Precision.FP32) -> tuple[TextSpec, Path]:
    opened = PipelineFolder.open(folder)
    spec = text_spec_of(opened, tokens=TOKENS, precision=precision)
    export_text(opened, spec, tmp_path / "text.onnx")
    return spec, tmp_path / "text.onnx"


def tokens(folder: Path, tmp_path: Path, spec: TextSpec) -> tuple[NDArray[Any], NDArray[Any]]:
    write_tokenizer(PipelineFolder.open(folder), tmp_path / "tokenizer.json")
    encoded = Tokenizer(tmp_path / "tokenizer.json", spec).encode(PROMPTS)
    return encoded.ids, encoded.mask


@torch.inference_mode()
def reference(folder: Path, ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    model = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    given = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    text: NDArray[Any] = model(given[0], attention_mask=given[1]).last_hidden_state.numpy()
    return text


def relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def run(path: Path, ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    text: NDArray[Any] = onnxruntime.InferenceSession(path).run(None, {"ids": ids, "ids_mask": mask})[0]
    return text


def test_text_equals_that_of_transformers(folder: Path, whole: tuple[TextSpec, Path], tmp_path: Path) -> None:
    spec, path = whole
    ids, mask = tokens(folder, tmp_path, spec)
    assert relative(run(path, ids, mask), reference(folder, ids, mask)) < FLOAT32_LIMIT
    for row in range(len(ids)):
        alone = run(path, ids[row : row + 1], mask[row : row + 1])
        assert relative(alone, reference(folder, ids[row : row + 1], mask[row : row + 1])) < FLOAT32_LIMIT


@pytest.mark.parametrize("activation", ["relu", "gated-silu"])
def test_other_activations_equal_those_of_transformers(copy: Path, tmp_path: Path, activation: str) -> None:
    shutil.rmtree(copy / "text_encoder")
    vocabulary = 3 + PIECES
    small_pipelines.text_encoder(vocabulary, feed_forward_proj=activation).save_pretrained(copy / "text_encoder")
    _, path = exported(copy, tmp_path)
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, TOKENS), np.int32)
    mask = np.ones((2, TOKENS), np.float32)
    assert relative(run(path, ids, mask), reference(copy, ids, mask)) < FLOAT32_LIMIT


def test_shards_give_the_same_graph_as_one_file(whole: tuple[TextSpec, Path], copy: Path, tmp_path: Path) -> None:
    encoder = copy / "text_encoder"
    state = load_file(encoder / "model.safetensors")
    names, where = sorted(state), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[number::3]}, encoder / file)
        where |= dict.fromkeys(names[number::3], file)
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, sharded = exported(copy, tmp_path)
    for suffix in ("", ".data"):
        assert Path(f"{whole[1]}{suffix}").read_bytes() == Path(f"{sharded}{suffix}").read_bytes()


def test_bfloat16_is_close_and_half_as_large(folder: Path, whole: tuple[TextSpec, Path], tmp_path: Path) -> None:
    import onnx_ir as ir

    spec, path = exported(folder, tmp_path, Precision.BF16)
    assert Path(f"{path}.data").stat().st_size < 0.8 * Path(f"{whole[1]}.data").stat().st_size
    ids, mask = tokens(folder, tmp_path, spec)
    model = ir.load(path)
    assert emulate_bfloat16(model) > 0
    ir.save(model, tmp_path / "emulated.onnx", external_data="emulated.onnx.data")
    assert relative(run(tmp_path / "emulated.onnx", ids, mask), reference(folder, ids, mask)) < BFLOAT16_LIMIT


def test_a_shard_that_is_missing_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        exported(copy, tmp_path)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(copy: Path, tmp_path: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({key: value for key, value in state.items() if key != name}, weights)
    with pytest.raises(CheckpointError, match=f"lacks weights .*: {name}"):
        exported(copy, tmp_path)
    save_file({**state, name: state[name][:-1].contiguous()}, weights)
    with pytest.raises(CheckpointError, match=f"{name} is .* its config.json says"):
        exported(copy, tmp_path)


def test_an_index_that_leaves_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    index = copy / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        exported(copy, tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "clip_text_model"}, "is a 'clip_text_model' text encoder, supported is 't5'"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj 'gated-tanh', supported are relu"),
    ],
)
def test_another_encoder_is_refused(copy: Path, changes: dict[str, str], match: str) -> None:
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=match):
        text_spec_of(PipelineFolder.open(copy), tokens=TOKENS, precision=Precision.FP32)


def test_a_tokenizer_that_is_missing_is_named(copy: Path, tmp_path: Path) -> None:
    for path in (copy / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be read"):
        write_tokenizer(PipelineFolder.open(copy), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("length", [1, 20, 300])
def test_distances_fall_into_the_buckets_of_transformers(length: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    shape = T5Shape(9, 8, 4, 8, 1, 2, 1e-6, 32, 128, "relu")
    places = torch.arange(length)
    wanted = T5Attention._relative_position_bucket(places[None, :] - places[:, None])
    assert torch.equal(shape.buckets(length).long(), wanted)
