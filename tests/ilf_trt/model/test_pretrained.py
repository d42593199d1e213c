"""Folders of strangers: code that is never run, weights that are never misread, configs that take no memory."""

import builtins
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ilf_trt.contract.spec import Precision
from ilf_trt.errors import CheckpointError, IlfError
from ilf_trt.export.pipeline.decoder import decoder_spec_of
from ilf_trt.export.pipeline.folder import PipelineFolder
from ilf_trt.export.pipeline.text_encoder import text_spec_of, write_tokenizer
from ilf_trt.model.base import load_backbone
from ilf_trt.model.t5_folder import t5_weights
from ilf_trt.train.data.text import Text
from ilf_trt.train.data.vae import Vae
from tests import hub_shapes

SECONDS = 1.0  # for a refusal, with some room for a busy machine
MIB = 1 << 20
MOST_GROWTH = 64 * MIB
PARTS = ("transformer", "text_encoder", "vae")
CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass Mine: pass\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's shape, the text encoder in one file."""
    folder = hub_shapes.pixart_repository(tmp_path_factory.mktemp("pixart"))
    encoder, state = folder / "text_encoder", {}
    for path in sorted(encoder.glob("*.safetensors")):
        state |= load_file(path)
        path.unlink()
    (encoder / "model.safetensors.index.json").unlink()
    save_file(state, encoder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def load(folder: Path, part: str) -> list[Callable[[], object]]:
    """Every way in which a part is loaded."""
    opened = lambda: PipelineFolder.open(folder)  # noqa: E731
    if part == "transformer":
        return [lambda: load_backbone(str(folder)), opened]
    if part == "vae":
        sizes = {"sizes": [(8, 8)], "precision": Precision.FP32, "tile": None}
        return [lambda: Vae.load(str(folder)), lambda: decoder_spec_of(opened(), **sizes)]  # type: ignore[arg-type]
    text = lambda: Text.load(str(folder), tokens=4, dtype=torch.float32)  # noqa: E731
    if part == "text_encoder":
        return [text, lambda: text_spec_of(opened(), tokens=4, precision=Precision.FP32)]
    return [text, lambda: write_tokenizer(opened(), folder / "tokenizer.json")]


def refuse(folder: Path, part: str, message: str, kind: type[IlfError] = CheckpointError) -> None:
    for way in load(folder, part)[: 1 if part == "transformer" else None]:
        with pytest.raises(kind, match=message) as refused:
            way()
        assert str(refused.value).isprintable()


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"


def change_weights(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- remote code


@pytest.fixture
def answered_yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the terminal is asked; it answers yes."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    return asked


@pytest.mark.parametrize(
    ("part", "config", "entry"),
    [
        ("tokenizer", "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
        ("tokenizer", "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}),
        ("text_encoder", "config.json", {"auto_map": {"AutoModel": "mine.Mine"}}),
        ("transformer", "config.json", {"auto_map": {"AutoModel": "mine.Mine"}}),
        ("vae", "config.json", {"auto_map": {"AutoModel": "mine.Mine"}}),
        ("vae", "config.json", {"trust_remote_code": True}),
        ("text_encoder", "config.json", {"custom_pipelines": {"x": {"impl": "mine.Mine"}}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_code_of_a_folder_is_neither_run_nor_asked_about(
    copy: Path, part: str, config: str, entry: dict[str, Any], answered_yes: list[str], tmp_path: Path
) -> None:
    mark, path = tmp_path / "ran", copy / part / config
    (copy / part / "mine.py").write_text(CODE.format(mark=str(mark)))
    path.write_text(json.dumps(json.loads(path.read_text()) | entry if path.exists() else entry))
    refuse(copy, part, f"{config} has {next(iter(dict(reversed(entry.items()))))}: it names Python code of its own")
    assert (mark.exists(), answered_yes) == (False, [])


@pytest.mark.parametrize("library", ["mine", "pipeline_mine"])
def test_a_pipeline_that_brings_a_library_is_refused(copy: Path, library: str) -> None:
    change(copy / "model_index.json", vae=[library, "Mine"])
    with pytest.raises(CheckpointError, match=rf"is a {library}\.Mine: Python code of its own, which is never run"):
        PipelineFolder.open(copy)


def test_a_lora_beside_the_weights_is_refused(copy: Path) -> None:
    (copy / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model"}')
    refuse(copy, "text_encoder", "a LoRA beside the weights is not applied")


# --- weights that would be misread


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_numbers_of_another_kind_are_refused(copy: Path, part: str, dtype: torch.dtype) -> None:
    def quantise(tensors: dict[str, Any]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
        tensors[name] = tensors[name].to(dtype)

    change_weights(weights_of(copy, part), quantise)
    refuse(copy, part, r"is (I8|F8_E4M3|F64), weights are read in float32, float16 and bfloat16 alone")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["SCB", "scale_weight", "lora_A.weight", "scaled_fp8"])
def test_a_tensor_without_a_place_is_refused_by_name(copy: Path, part: str, name: str) -> None:
    change_weights(weights_of(copy, part), lambda tensors: tensors.update({f"block.0.{name}": torch.ones(2)}))
    refuse(copy, part, rf"holds weights that its config\.json has no place for: block\.0\.{name}")


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused_by_name(copy: Path, part: str) -> None:
    path = weights_of(copy, part)
    name = sorted(load_file(path))[-1]
    change_weights(path, lambda tensors: tensors.update({name: torch.zeros(3, 7)}))
    refuse(copy, part, rf"{name} is \(3, 7\), its config\.json says")
    change_weights(path, lambda tensors: tensors.pop(name))
    refuse(copy, part, rf"lacks weights that its config\.json asks for: .*{name}")


@pytest.mark.parametrize("part", PARTS)
def test_a_config_that_says_how_it_is_quantised_is_refused(copy: Path, part: str) -> None:
    change(copy / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refuse(copy, part, r"has a quantization_config \(bitsandbytes\), quantised weights are not read")


def test_micro_conditions_that_the_weights_lack_are_refused_by_name(copy: Path) -> None:
    change_weights(
        weights_of(copy, "transformer"),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "resolution" in name or "aspect" in name],
    )
    refuse(copy, "transformer", r"lacks weights .*: adaln_single\.emb\.aspect_ratio_embedder")


def test_the_other_half_of_a_whole_t5_is_left_out(copy: Path) -> None:
    path = weights_of(copy, "text_encoder")
    wanted = Text.load(str(copy), tokens=4, dtype=torch.float32).encode(["a red fox"])[0]
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(4, 4)}
    change_weights(path, lambda tensors: tensors.update(extra))
    assert torch.equal(Text.load(str(copy), tokens=4, dtype=torch.float32).encode(["a red fox"])[0], wanted)


def test_both_names_of_the_embedding_must_hold_one_tensor(copy: Path) -> None:
    path = weights_of(copy, "text_encoder")
    change_weights(path, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}))
    assert len(t5_weights(copy / "text_encoder").tensors) == len(load_file(path))
    change_weights(path, lambda t: t["encoder.embed_tokens.weight"][-1, -1].add_(1))
    refuse(copy, "text_encoder", r"shared\.weight and encoder\.embed_tokens\.weight differ")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": "../secret.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": "model-9.safetensors"}, r"model-9\.safetensors is missing, .* names it"),
        ({"a": "one.safetensors"}, "shards and index differ in a, "),
        ({"a": "one.safetensors", "b": "two.safetensors"}, r"is in one\.safetensors and in two\.safetensors"),
        ({}, "holds no weight_map"),
        (["one.safetensors"], "holds no weight_map"),
    ],
    ids=str,
)
def test_shards_and_their_index_agree(copy: Path, where: Any, message: str) -> None:
    folder = copy / "text_encoder"
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shutil.copyfile(folder / "one.safetensors", folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    refuse(copy, "text_encoder", message)


# --- configs and files that would cost much


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_layers": 10_000}, "lacks weights: its config.json asks for more than"),
        ("text_encoder", {"num_layers": 10_000}, "lacks weights: its config.json asks for more than"),
        ("vae", {"layers_per_block": 10_000}, "lacks weights: its config.json asks for more than"),
        ("transformer", {"num_attention_heads": 40}, "its config.json says"),
        ("transformer", {"num_attention_heads": 1 << 20}, "MiB of tables"),
        ("text_encoder", {"d_ff": 1 << 20}, "its config.json says"),
        ("transformer", {"sample_size": 1 << 20}, "MiB of tables, at most 1024 are made; correct sample_size"),
        ("transformer", {"patch_size": 0}, "config.json describes no model: ZeroDivisionError"),
        ("transformer", {"activation_fn": "nonsense"}, "config.json describes no model"),
        ("transformer", {"num_layers": "four"}, "config.json describes no model"),
        ("transformer", {"norm_num_groups": None, "cross_attention_dim": None}, "config.json"),
        ("text_encoder", {"dense_act_fn": "nonsense"}, "dense_act_fn|config.json describes no model"),
        ("vae", {"act_fn": "nonsense"}, "config.json describes no model"),
        ("vae", {"block_out_channels": [0, 0, 0, 0]}, "config.json"),
        ("vae", {"down_block_types": ["Nonsense"] * 4}, "config.json describes no model"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_at_once(
    copy: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    change(copy / part / "config.json", **changes)
    process = psutil.Process()
    for way in load(copy, part)[: 1 if part == "transformer" else None]:
        begin, before = time.process_time(), process.memory_info().rss
        with pytest.raises(IlfError, match=message):
            way()
        assert time.process_time() - begin < SECONDS
        assert process.memory_info().rss - before < MOST_GROWTH


@pytest.mark.parametrize(
    ("part", "file"),
    [
        *((part, "config.json") for part in PARTS),
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "spiece.model"),
        ("tokenizer", "tokenizer_config.json"),
    ],
)
@pytest.mark.parametrize("what", ["pipe", "link to nothing"])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(copy: Path, part: str, file: str, what: str) -> None:
    path = copy / part / file
    path.unlink()
    os.mkfifo(path) if what == "pipe" else path.symlink_to(path.with_name("gone"))
    refuse(copy, part, f"{file} is no regular file, or a link to nothing")


def test_a_vae_without_weights_is_refused_in_one_line(copy: Path) -> None:
    weights_of(copy, "vae").unlink()
    refuse(copy, "vae", r"diffusion_pytorch_model\.safetensors is missing")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (64).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [9999999], "data_offsets": [0, 4]}}'.ljust(64),
        (68).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}'.ljust(68),
        (31).to_bytes(8, "little") + b'{"a": 1, "a": {"dtype": "F32"}}',
    ],
    ids=["empty", "ones", "a terabyte", "list", "nothing", "too large", "negative", "twice"],
)
def test_a_header_that_lies_is_refused(copy: Path, header: bytes) -> None:
    weights_of(copy, "transformer").write_bytes(header)
    refuse(copy, "transformer", r"damaged|cut short|lacks weights")


# --- whatever it is, it is an error of this package

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(-1, 64), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def scratch(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("scratch") / "pixart"))


def loads_or_refuses(way: Callable[[], object]) -> None:
    message, begin = "", time.process_time()
    try:
        way()
    except IlfError as error:
        message = str(error)
    assert message.isprintable()
    assert time.process_time() - begin < SECONDS


@pytest.mark.fuzz
@given(part=st.sampled_from(PARTS), data=st.data())
def test_any_value_in_a_config_loads_or_is_refused(made: Path, scratch: Path, part: str, data: st.DataObject) -> None:
    place, config = scratch / part / "config.json", json.loads((made / part / "config.json").read_text())
    name = data.draw(st.sampled_from(sorted(config)))
    place.write_text(json.dumps(config | {name: data.draw(VALUES)}))
    for way in load(scratch, part):
        loads_or_refuses(way)
    shutil.copyfile(made / part / "config.json", place)


@pytest.mark.fuzz
@given(part=st.sampled_from(PARTS), at=st.integers(0, 400), byte=st.binary(min_size=1, max_size=4))
def test_any_bytes_in_a_header_load_or_are_refused(made: Path, scratch: Path, part: str, at: int, byte: bytes) -> None:
    path = weights_of(scratch, part)
    content = bytearray(weights_of(made, part).read_bytes())
    content[at : at + len(byte)] = byte
    path.write_bytes(content)
    loads_or_refuses(load(scratch, part)[0])
    shutil.copyfile(weights_of(made, part), path)
