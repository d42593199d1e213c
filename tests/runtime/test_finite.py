"""NaN and infinity never become a picture: every graph and step is named, and the next request is served."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.contract.arrays import is_finite
from ilf_trt.contract.bundle import Bundle, write_manifest
from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.contract.spec import DecoderSpec, Precision
from ilf_trt.errors import NonFinite
from ilf_trt.runtime.engine import Launch
from ilf_trt.runtime.finite import remedy
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from ilf_trt.runtime.picture.decoder import Decoder
from ilf_trt.runtime.picture.png import pixels_from_latents
from ilf_trt.runtime.pipeline import Pipeline
from ilf_trt.runtime.verify import verify

LABELS = {"class_labels": [3, 7]}


class Spoilt:
    """An engine that writes one NaN or infinity in its `at`-th run."""

    def __init__(self, engine: OnnxRuntimeEngine, at: int, value: float) -> None:
        self.engine, self.graph, self.left, self.value = engine, engine.graph, at, value

    def bind(self, arrays: Mapping[str, Any]) -> Launch:
        launch = self.engine.bind(arrays)
        output = arrays[self.graph.outputs[0].name]

        def spoil() -> None:
            launch()
            self.left -= 1
            if self.left <= 0:
                output.flat[output.size // 2] = self.value

        return spoil

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("graph", "run", "where"),
    [
        ("cond", 1, "before the first of"),
        ("pre", 3, "in step 3 of"),
        ("loop_body", 1, "in step 1 of"),
        ("loop_feedback", 2, "in step 2 of"),
        ("post", 1, "in step 1 of"),
    ],
)
def test_the_first_graph_and_step_are_named(dit_bundle: Path, graph: str, run: int, where: str, value: float) -> None:
    bundle = Bundle.open(dit_bundle)
    engines: dict[str, Any] = {
        each.name: OnnxRuntimeEngine(each, OnnxFile.of_bundle(bundle, each), threads=1)
        for each in bundle.manifest.graphs
    }
    spoilt = engines[graph] = Spoilt(engines[graph], run, value)
    with Pipeline.of(bundle, Host(engines, bundle.manifest, bundle.constants()), sessions=1) as pipeline:
        with pytest.raises(NonFinite, match=f"^graph {graph} gave NaN or infinity {where}.*; it runs in float32"):
            pipeline.generate(**LABELS)
        spoilt.left = 1 << 30
        assert is_finite(pipeline.generate(**LABELS).latents)


@pytest.fixture
def overflowing(dit_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose weights are far too large, as its manifest lists them."""
    folder = Path(shutil.copytree(dit_bundle, tmp_path / "large.ilf"))
    manifest = Bundle.open(folder).manifest
    weights = folder / "graphs" / "loop_body.onnx.data"
    np.full(weights.stat().st_size // 4, 1e30, np.float32).tofile(weights)
    write_manifest(folder, manifest)
    return folder


def test_weights_that_overflow_make_no_picture(overflowing: Path) -> None:
    with (
        Pipeline.load(overflowing, threads=1) as pipeline,
        pytest.raises(NonFinite, match=r"^graph loop_body gave NaN"),
    ):
        pipeline.generate(**LABELS)


def test_verify_names_the_graph(overflowing: Path) -> None:
    with pytest.raises(
        NonFinite, match=r"^graph loop_body gave NaN or infinity in 'features', the reference is finite"
    ):
        verify(overflowing)


@given(st.data())
def test_one_bad_number_is_seen_wherever_it_is(data: st.DataObject) -> None:
    array = np.full(data.draw(st.integers(1, 300)), data.draw(st.sampled_from([0, 3e38, -3e38])), np.float32)
    assert is_finite(array)
    array[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert not is_finite(array)
    assert is_finite(np.zeros(3, np.int32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_pixels_are_checked(value: float) -> None:
    with pytest.raises(NonFinite, match="no picture"):
        pixels_from_latents(np.full((1, 1, 2, 2), value, np.float32))


@pytest.mark.parametrize("tile", [0, 4])
def test_a_decoder_that_overflows_is_named(tile: int) -> None:
    spec = DecoderSpec(4, 2, (8, 8), tile, Precision.FP16)

    def run(latents: Any) -> Any:
        shades = np.zeros((1, latents.shape[2] * 2, latents.shape[3] * 2, 3), np.float32)
        shades[0, -1, -1, 0] = np.inf
        return shades

    with pytest.raises(NonFinite, match=f"^graph {DECODE} gave NaN or infinity.*--decoder-precision fp32"):
        Decoder(run, spec).decode(np.zeros((2, 4, 8, 8), np.float32))


@pytest.mark.parametrize("graph", [*GRAPHS, TEXT, DECODE])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("wide", [False, True])
def test_the_advice_is_a_higher_precision(graph: str, precision: Precision, wide: bool) -> None:
    advice = remedy(graph, precision, wide_residual=wide)
    assert ("float32 already" in advice) == (precision is Precision.FP32)
    assert f"{precision}" not in advice.replace("--residual fp32", "") or precision is Precision.FP32
    assert ("--residual" in advice) == (not wide and graph in GRAPHS and precision in (Precision.FP16, Precision.FP8))


def test_a_manifest_with_an_overflowing_scale_is_refused(dit_bundle: Path) -> None:
    manifest = Bundle.open(dit_bundle).manifest
    with pytest.raises(ValueError, match="too large for float32"):
        replace(manifest, scales=(1e39, 0.0)).check()
