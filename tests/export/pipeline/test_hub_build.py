"""A whole build from a repository in the shape of the hub: its base by id, its pipeline as a snapshot of links."""

from pathlib import Path

import numpy as np
import pytest

from ilf_trt import attach, save_ilf
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.spec import BatchRange
from ilf_trt.model.base import load_backbone
from ilf_trt.runtime import Pipeline
from tests import hub_shapes

ID = "PixArt-alpha/PixArt-XL-2-1024-MS"
SIZE = 128


@pytest.mark.slow
def test_a_bundle_is_built_and_verified_and_makes_a_picture_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_shapes.in_cache(hub_shapes.pixart_repository(tmp_path / "repository"), tmp_path / "hub", ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_ilf(attach(load_backbone(ID), (1, 1)), tmp_path / "checkpoint", base=ID)
    options = BuildOptions(pipeline=snapshot, sizes=((SIZE, SIZE),), batch=BatchRange(1, 1, 1), steps=2, text_tokens=12)
    built = build(str(tmp_path / "checkpoint"), tmp_path / "hub.ilf", options)
    assert built.bundle.manifest.scheduler["solver_order"] == 2
    assert built.bundle.manifest.text is not None
    with Pipeline.load(tmp_path / "hub.ilf") as pipe:
        pixels = pipe.generate("a red fox", binning=False).pixels
    assert pixels.shape == (1, SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 0
