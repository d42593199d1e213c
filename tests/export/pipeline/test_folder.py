"""Pipelines' folders: what is read of each kind, and the folders that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_256_BIN

from ilf_trt.errors import CheckpointError
from ilf_trt.export.pipeline.folder import PipelineFolder
from tests import small_pipelines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    small_pipelines.dit_pipeline(path / "dit")
    small_pipelines.pixart_pipeline(path / "alpha", levels=4)
    small_pipelines.pixart_pipeline(path / "sigma", sigma=True)
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "alpha", tmp_path / "copy"))


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dit_has_classes_and_no_text(made: Path) -> None:
    folder = PipelineFolder.open(made / "dit")
    assert (folder.kind, folder.cell, folder.text_tokens, folder.bins) == ("DiTPipeline", 2, None, {})
    assert (folder.has_text, folder.has_decoder) == (False, True)
    assert folder.class_names["Vulpes vulpes"] == folder.class_names["red fox"] == 2


def test_a_pixart_has_its_length_of_text_and_the_sizes_of_its_side(made: Path) -> None:
    alpha, sigma = (PipelineFolder.open(made / name) for name in ("alpha", "sigma"))
    assert (alpha.text_tokens, sigma.text_tokens) == (120, 300)
    assert (alpha.cell, alpha.bins["1.0"]) == (8, (256, 256))
    assert len(alpha.bins) > 20
    assert alpha.bins == {ratio: (int(h), int(w)) for ratio, (h, w) in ASPECT_RATIO_256_BIN.items()}
    assert sigma.bins == {}  # a latent of 8 cells is of no trained size
    assert alpha.has_text
    assert alpha.scheduler == made / "alpha" / "scheduler" / "scheduler_config.json"


def test_a_tokenizer_that_takes_less_sets_the_length(copy: Path) -> None:
    change(copy, "tokenizer/tokenizer_config.json", model_max_length=24)
    assert PipelineFolder.open(copy).text_tokens == 24


def test_parts_that_are_left_out_are_not_there(copy: Path) -> None:
    change(copy, "model_index.json", vae=[None, None], text_encoder=[None, None])
    folder = PipelineFolder.open(copy)
    assert (folder.has_text, folder.has_decoder, folder.cell) == (False, False, 8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline, supported are DiTPipeline, PixArtAlphaPipeline"),
        ({"tokenizer": [None, None]}, "has a text_encoder and no tokenizer"),
    ],
)
def test_other_pipelines_are_refused(copy: Path, changes: dict[str, Any], match: str) -> None:
    change(copy, "model_index.json", **changes)
    with pytest.raises(CheckpointError, match=match):
        PipelineFolder.open(copy)


@pytest.mark.parametrize("name", ["PixArt-alpha/PixArt-XL-2-1024-MS", "facebook/DiT-XL-2-256"])
def test_a_hub_id_is_refused_with_the_command_that_makes_a_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"hf download {name} --local-dir {name.partition('/')[2]} and give that"):
        PipelineFolder.open(name)


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("vae/config.json", {"block_out_channels": 3}, "block_out_channels is 3, expected 1 to 8 numbers"),
        ("vae/config.json", {"block_out_channels": [8] * 1000}, "block_out_channels is .*, expected 1 to 8 numbers"),
        ("model_index.json", {"id2label": {"0": 1}}, "id2label is no table of numbers and names"),
        ("model_index.json", {"_class_name": "x" * 1000}, "supported are DiTPipeline"),
    ],
)
def test_values_that_mean_nothing_are_refused(copy: Path, file: str, changes: dict[str, Any], match: str) -> None:
    change(copy, file, **changes)
    with pytest.raises(CheckpointError, match=match):
        PipelineFolder.open(copy)


@pytest.mark.parametrize(("most", "length"), [(10**30, 120), (1e30, 120), (24.0, 24), (-1, 120), ("x", 120)])
def test_a_limit_of_a_tokenizer_counts_if_it_is_a_number(copy: Path, most: object, length: int) -> None:
    change(copy, "tokenizer/tokenizer_config.json", model_max_length=most)
    assert PipelineFolder.open(copy).text_tokens == length


def test_a_scheduler_that_the_index_names_must_be_there(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing, model_index\.json names it"):
        PipelineFolder.open(copy)


def test_folders_that_are_no_pipelines_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a diffusers pipeline"):
        PipelineFolder.open(tmp_path)
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="vae is missing"):
        PipelineFolder.open(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        PipelineFolder.open(copy)
