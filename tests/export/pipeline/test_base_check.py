"""A pipeline's folder goes with a checkpoint if its transformer is the checkpoint's base."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ilf_trt import attach, save_ilf
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.export.bundle import Source
from ilf_trt.model.base import load_backbone
from ilf_trt.model.checkpoint import fingerprint
from tests import small_pipelines
from tests.conftest import small_dit, write_checkpoint

LOOP = (1, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of alpha with a checkpoint of its transformer, and the same as Sigma."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("alpha", "sigma"):
        small_pipelines.pixart_pipeline(folder / name, sigma=name == "sigma")
    save_ilf(attach(load_backbone(str(folder / "alpha")), LOOP), folder / "checkpoint", base="../alpha/transformer")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "alpha", tmp_path / "pipeline"))


def opened(made: Path, pipeline: Path, **options: Any) -> Source:
    return Source.open(str(made / "checkpoint"), BuildOptions(pipeline=pipeline, **options))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tune(pipeline: Path) -> None:
    """Other weights in the pipeline's transformer, as after a fused LoRA."""
    transformer = load_backbone(str(pipeline))
    with torch.no_grad():
        transformer.transformer_blocks[1].attn1.to_q.weight.mul_(1.1)
    transformer.save_pretrained(pipeline / "transformer")


def drop_transformer(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "transformer")
    change(pipeline / "model_index.json", transformer=[None, None])


def test_the_pipeline_of_the_base_is_taken_and_the_source_says_of_which_base(made: Path, copy: Path) -> None:
    source = opened(made, made / "alpha")
    assert source.base_sha256 == opened(made, copy).base_sha256 == fingerprint(source.model.backbone)
    half = load_backbone(str(copy)).half()
    assert source.base_rounded_sha256["float16"] == fingerprint(half, torch.float16)
    assert source.model.trained_on is None


def test_a_pipeline_that_was_saved_in_half_is_the_bases(made: Path, copy: Path) -> None:
    load_backbone(str(copy)).half().save_pretrained(copy / "transformer")
    assert opened(made, copy).model.trained_on is None


def test_a_fine_tuned_pipeline_is_a_named_choice(made: Path, copy: Path) -> None:
    tune(copy)
    with pytest.raises(
        InvalidRequest, match=r"is not the checkpoint's base: .*to_q.weight has other values; .*differs"
    ):
        opened(made, copy)
    source = opened(made, copy, base_differs=True)
    assert fingerprint(source.model.backbone) == fingerprint(load_backbone(str(copy))) == source.base_sha256
    assert source.model.trained_on == opened(made, made / "alpha").base_sha256


def test_a_given_base_must_be_the_pipelines_too(made: Path, copy: Path) -> None:
    tune(copy)
    own = str(made / "alpha" / "transformer")
    with pytest.raises(InvalidRequest, match="has other values"):
        opened(made, copy, base=own)
    with pytest.raises(CheckpointError, match="--base-differs"):
        opened(made, made / "alpha", base=str(copy / "transformer"))
    fine = opened(made, made / "alpha", base=str(copy / "transformer"), base_differs=True)
    assert fine.base_sha256 == fingerprint(load_backbone(str(copy)))


@pytest.mark.parametrize("base_differs", [False, True])
def test_another_architecture_is_refused_by_name(made: Path, copy: Path, base_differs: bool) -> None:
    change(copy / "transformer" / "config.json", num_attention_heads=4, attention_head_dim=12)
    error = CheckpointError if base_differs else InvalidRequest  # the pipeline's is the base itself, or beside it
    with pytest.raises(error, match=r"its attention_head_dim is 12|its num_attention_heads is 4"):
        opened(made, copy, base_differs=base_differs)


def test_a_pipeline_of_another_kind_is_refused(made: Path, tmp_path: Path) -> None:
    small_pipelines.dit_pipeline(tmp_path / "dit")
    with pytest.raises(InvalidRequest, match="is a DiTPipeline, the checkpoint is a pixart, which runs in PixArtAlpha"):
        opened(made, tmp_path / "dit")
    dit = write_checkpoint(tmp_path / "checkpoint", small_dit(num_layers=3))
    with pytest.raises(
        InvalidRequest, match="is a PixArtAlphaPipeline, the checkpoint is a dit, which runs in DiTPipe"
    ):
        Source.open(str(dit), BuildOptions(pipeline=made / "alpha"))


def test_without_a_transformer_the_class_decides_and_a_warning_is_given(
    made: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drop_transformer(copy)
    with caplog.at_level(logging.WARNING):
        opened(made, copy)
    assert "has no transformer: nothing says that its parts are those of the checkpoint's base" in caplog.text


@pytest.mark.parametrize(
    ("sized", "sigma", "match"),
    [
        (True, True, "the model takes resolution and aspect ratio, PixArtSigmaPipeline gives neither"),
        (
            False,
            False,
            "PixArtAlphaPipeline gives a model of 128 cells resolution and aspect ratio, this one takes nei",
        ),
    ],
    ids=["sized model in Sigma", "unsized model in alpha"],
)
def test_a_class_that_gives_other_conditions_is_refused(
    made: Path, tmp_path: Path, sized: bool, sigma: bool, match: str
) -> None:
    pipeline = Path(shutil.copytree(made / ("sigma" if sigma else "alpha"), tmp_path / "pipeline"))
    transformer = load_backbone(str(pipeline))
    config = {**transformer.config, "sample_size": 128, "patch_size": 8, "use_additional_conditions": sized}
    config |= {"num_attention_heads": 3, "cross_attention_dim": 72}
    save_ilf(attach(type(transformer).from_config(config), LOOP), tmp_path / "checkpoint")
    drop_transformer(pipeline)
    with pytest.raises(InvalidRequest, match=match):
        Source.open(str(tmp_path / "checkpoint"), BuildOptions(pipeline=pipeline))
