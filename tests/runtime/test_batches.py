"""Companions in a batch change no bit of a picture on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.contract.spec import BatchRange
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.batches import RunBatch, run_batches
from tests.conftest import CLASSES, TEXT_CHANNELS, TEXT_TOKENS

MOST = 8


@pytest.fixture(params=["dit_build", "pixart_build"])
def bundle(request: pytest.FixtureRequest) -> Path:
    result: BuildResult = request.getfixturevalue(request.param)
    return result.bundle.path


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def pipeline(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=request.param) as loaded:
        yield loaded


def conditions(pipeline: Pipeline, few: slice) -> dict[str, Any]:
    """Those of some of MOST pictures, of which no two are alike."""
    rng = np.random.default_rng(1)
    text = (MOST, TEXT_TOKENS, TEXT_CHANNELS)
    values: dict[str, Any] = {
        "class_labels": np.arange(MOST) * 3 % CLASSES,
        "text": rng.standard_normal(text, np.float32),
        "text_mask": (np.arange(TEXT_TOKENS) < TEXT_TOKENS - np.arange(MOST)[:, None] % 3).astype(np.float32),
        "negative_text": rng.standard_normal(text, np.float32),
        "negative_text_mask": np.ones((MOST, TEXT_TOKENS), np.float32),
    }
    return {port.name: values[port.name][few] for port in pipeline.manifest.spec.conditions if port.name in values}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_picture_is_the_same_to_the_bit_alone_and_among_others(pipeline: Pipeline, guidance_scale: float) -> None:
    def make(begin: int, end: int) -> Any:
        given = conditions(pipeline, slice(begin, end))
        seeds = list(range(begin, end))
        return pipeline.generate(seed=seeds, steps=3, guidance_scale=guidance_scale, **given).latents

    alone = np.concatenate([make(index, index + 1) for index in range(MOST)])
    assert len({row.tobytes() for row in alone}) == MOST
    for pictures in (2, 3, MOST):
        np.testing.assert_array_equal(make(0, pictures), alone[:pictures], err_msg=f"a batch of {pictures}")


def test_a_short_run_is_padded_with_its_last_picture() -> None:
    first, last = run_batches(5, BatchRange(3, 3, 3))
    assert (first, last) == (RunBatch(0, 3, 3), RunBatch(3, 5, 3))
    np.testing.assert_array_equal(last.take(np.arange(5)), [3, 4, 4])
