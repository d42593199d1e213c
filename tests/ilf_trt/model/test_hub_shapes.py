"""Folders, caches and ids in the shapes of the hub: every loader takes them, or says what to do."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilf_trt import attach, load_ilf, save_ilf
from ilf_trt.errors import CheckpointError, UnsupportedBackbone
from ilf_trt.model.base import base_config, base_scheduler, load_backbone
from ilf_trt.model.checkpoint import fingerprint, read_checkpoint
from ilf_trt.train.data.text import Text
from ilf_trt.train.data.vae import Vae
from tests import hub_shapes, small_pipelines
from tests.conftest import Run

ID = "PixArt-alpha/PixArt-XL-2-1024-MS"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_shapes.dit_repository(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_shapes.pixart_repository(tmp_path_factory.mktemp("pixart"))


@pytest.fixture
def copy(pixart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pixart, tmp_path / "copy"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the tests run with HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def command_of(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    """The Python code of the command that a message gives."""
    found = re.search(r'run there once: python -c "(.*)"$', str(error.value))
    assert found is not None, error.value
    return found[1]


# --- a repository that is pickled


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    dit: Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a folder's long name " * 8) / "dit"
    folder = Path(shutil.copytree(dit, deep)) / part
    with pytest.raises(CheckpointError, match="has no safetensors, and pickles are not read") as refused:
        Vae.load(str(folder)) if part == "vae" else load_backbone(str(folder.parent))
    monkeypatch.chdir(folder)
    exec(command_of(refused), {})
    if part == "vae":
        wanted = hub_shapes.vae().state_dict()
        got = Vae.load(str(folder.parent)).model.state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    else:
        assert fingerprint(load_backbone(str(folder.parent))) == fingerprint(hub_shapes.transformer(hub_shapes.DIT))


def test_pickled_shards_and_variants_are_converted_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy / "text_encoder"
    wanted = Text.load(str(copy), tokens=4, dtype=torch.float32).model.state_dict()
    for number, path in enumerate(sorted(folder.glob("*.safetensors")), start=1):
        torch.save(load_file(path), folder / f"pytorch_model-{number:05d}-of-00002.bin")
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        Text.load(str(copy), tokens=4, dtype=torch.float32)
    monkeypatch.chdir(folder)
    exec(command_of(refused), {})
    got = Text.load(str(copy), tokens=4, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


# --- a transformer under its former name


def test_a_transformer_under_its_former_name_is_found_by_its_norm(pixart: Path) -> None:
    backbone = load_backbone(str(pixart))
    assert type(backbone).__name__ == "PixArtTransformer2DModel"
    assert fingerprint(backbone) == fingerprint(hub_shapes.transformer(hub_shapes.PIXART))
    kind, options = base_config(str(pixart))
    assert kind == "pixart"
    assert options["patch_size"] == hub_shapes.PIXART["patch_size"]


def test_another_transformer_of_that_name_is_refused(copy: Path) -> None:
    change(copy / "transformer" / "config.json", norm_type="layer_norm")
    with pytest.raises(UnsupportedBackbone, match="no adapter for Transformer2DModel"):
        load_backbone(str(copy))


@pytest.mark.parametrize("option", ["double_self_attention", "only_cross_attention", "a_new_one"])
def test_an_option_that_the_class_of_today_does_not_have_must_say_nothing(copy: Path, option: str) -> None:
    change(copy / "transformer" / "config.json", **{option: True})
    with pytest.raises(CheckpointError, match=f"{option} is True, which PixArtTransformer2DModel does not know"):
        load_backbone(str(copy))


def test_a_dry_run_takes_the_base(pixart: Path, run: Run) -> None:
    settings = (f"model.base={pixart}", "model.loop=1:1", "model.text_tokens=4", "loss.kind=none")
    ran = run("train", "--config", "demo", "--dry-run", *(part for each in settings for part in ("--set", each)))
    assert ran.code == 0, ran.err
    assert "M frozen" in ran.out


# --- variants


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_read_if_there_is_nothing_else_and_said(
    copy: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.float16 if variant == "fp16" else torch.bfloat16
    halves = {name: tensor.to(dtype) for name, tensor in load_file(copy / WEIGHTS).items()}
    (copy / WEIGHTS).unlink()
    save_file(halves, copy / WEIGHTS.replace(".safetensors", f".{variant}.safetensors"), {"format": "pt"})
    folder = copy / "text_encoder"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").unlink()
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / path.name.replace("model-", f"model.{variant}-"))
    where = {name: file.replace("model-", f"model.{variant}-") for name, file in index["weight_map"].items()}
    (folder / f"model.safetensors.index.{variant}.json").write_text(json.dumps({**index, "weight_map": where}))
    with caplog.at_level(logging.WARNING):
        loaded = load_backbone(str(copy)).state_dict()
        Text.load(str(copy), tokens=4, dtype=torch.float32)
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in halves.items())
    for part in ("transformer", "text_encoder"):
        assert f"{copy / part}: its {variant} weights are read" in caplog.text


def test_a_folder_without_weights_names_the_file(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is missing, and no shards"):
        load_backbone(str(copy))


# --- the hub's cache


def test_a_hub_id_and_its_snapshot_are_one_base(pixart: Path, cache: Path) -> None:
    change_me = cache.parent / "v_prediction"
    shutil.copytree(pixart, change_me)
    change(change_me / SCHEDULER, prediction_type="v_prediction")
    snapshot = hub_shapes.in_cache(change_me, cache, ID)
    wanted = fingerprint(hub_shapes.transformer(hub_shapes.PIXART))
    for source in (ID, str(snapshot), str(snapshot / "transformer")):
        assert fingerprint(load_backbone(source)) == wanted
        assert base_scheduler(source)["prediction_type"] == "v_prediction"
        assert base_config(source)[0] == "pixart"


def test_encoders_and_words_are_found_by_hub_id(pixart: Path, cache: Path) -> None:
    hub_shapes.in_cache(pixart, cache, ID)
    text = Text.load(ID, tokens=40, dtype=torch.float32)
    embedded, mask = text.encode(["a red fox"])
    assert embedded.shape == (1, 40, small_pipelines.TEXT_WIDTH)
    assert 2 < int(mask.sum()) < 40
    assert Vae.load(ID).scale == 0.18215


def test_a_checkpoint_whose_base_is_a_hub_id_loads_with_the_base_s_scheduler(
    pixart: Path, cache: Path, tmp_path: Path
) -> None:
    hub_shapes.in_cache(pixart, cache, ID)
    save_ilf(attach(load_backbone(ID), (1, 1)), tmp_path / "ilf", base=ID)
    assert load_ilf(tmp_path / "ilf").adapter.kind == "pixart"
    assert read_checkpoint(tmp_path / "ilf").scheduler_config()["timestep_spacing"] == "linspace"


def test_half_a_snapshot_has_no_default_scheduler(pixart: Path, cache: Path) -> None:
    snapshot = hub_shapes.in_cache(pixart, cache, ID)
    shutil.rmtree(snapshot / "scheduler")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing, model_index\.json names it"):
        base_scheduler(ID)
    (snapshot / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"without its model_index\.json; hf download PixArt-alpha/"):
        base_scheduler(ID)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("{"), "is not readable JSON"),
        (lambda path: path.write_text('{"beta_start": NaN}'), "holds NaN"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text"),
        (lambda path: (path.unlink(), path.symlink_to("nothing")), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: path.unlink(), r"is missing, model_index\.json names it"),
    ],
    ids=["cut", "NaN", "bytes", "link to nothing", "folder", "missing"],
)
def test_a_scheduler_that_cannot_be_read_is_never_replaced(copy: Path, damage: Any, message: str) -> None:
    damage(copy / SCHEDULER)
    for source in (copy, copy / "transformer"):
        with pytest.raises(CheckpointError, match=message):
            base_scheduler(str(source))


@pytest.mark.parametrize("source", ["a" * 10_000, "x/" + "y" * 10_000, "a\nb/c", "../up", "o/n/m", "\x00"])
def test_a_source_that_is_no_name_is_one_short_line(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder") as refused:
        load_backbone(source)
    assert len(str(refused.value)) <= 400
    assert str(refused.value).isprintable()
