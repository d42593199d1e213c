"""The reference inside a bundle: what verify needs of it, and what verify finds by it."""

import dataclasses
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from ilf_trt import load_ilf
from ilf_trt.contract.bundle import REFERENCE_FILE, Bundle, write_manifest
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.reference_cases import AT_T, AT_T_POST, TRAJECTORY, TRAJECTORY_NOISE, cases_of
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import ParityError
from ilf_trt.export.reference import write_reference
from ilf_trt.export.segments import segments_of
from ilf_trt.runtime.verify import check, verify
from tests.manifests import change_manifest

FLOAT_BYTES = 4
# Weights are about 0.1 here, so that one of them moves every token far past the parity limit.
DISTURBANCE = 3.0
# A change that matters is thousands of times the parity limit.
VISIBLE = 1e-2


@pytest.fixture(params=["dit", "pixart"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle"))


def read(bundle: Bundle) -> dict[str, NDArray[Any]]:
    with np.load(bundle.path / REFERENCE_FILE, allow_pickle=False) as file:
        return dict(file)


def test_reference_holds_every_tensor_of_every_case_without_pickle(bundle: Bundle) -> None:
    reference = read(bundle) | bundle.constants()
    graphs = {graph.name: graph for graph in bundle.manifest.graphs}
    pictures = bundle.manifest.batch.min
    sizes = {"B": pictures, "R": 2 * pictures, "T": 2}
    for case in cases_of(bundle.manifest.spec):
        graph = graphs[case.graph]
        named = [(case.inputs.get(port.name, port.name), port) for port in graph.inputs]
        named += [(case.outputs.get(port.name, port.name), port) for port in graph.outputs]
        for name, port in named:
            shape, tensor = port.resolve(sizes), reference[name]
            assert tensor.shape[-len(shape) :] == shape, name
            assert tensor.dtype == port.dtype, name


def test_every_graph_has_a_case(bundle: Bundle) -> None:
    assert {case.graph for case in cases_of(bundle.manifest.spec)} == set(GRAPHS)


def test_reference_holds_the_trajectory_and_its_noise(bundle: Bundle) -> None:
    reference = read(bundle)
    shape = (bundle.manifest.batch.min, *bundle.manifest.spec.latent)
    assert reference[TRAJECTORY].shape == reference[TRAJECTORY_NOISE].shape == shape


def test_reference_is_finite(bundle: Bundle) -> None:
    for name, tensor in read(bundle).items():
        assert np.isfinite(tensor).all(), name


def test_reference_is_taken_at_the_middle_step_of_those_with_feedback(bundle: Bundle) -> None:
    times = read(bundle)["times"]
    fed = [(step.t, step.t_post) for step in bundle.manifest.plan.steps if step.feedback]
    assert fed[len(fed) // 2] == pytest.approx((times[AT_T], times[AT_T_POST]))
    assert fed[len(fed) // 2] != fed[0]
    assert times[AT_T] > times[AT_T_POST]


def test_reference_does_not_repeat_the_constants(dit_bundle: Path) -> None:
    bundle = Bundle.open(dit_bundle)
    assert bundle.constants()
    assert not bundle.constants().keys() & read(bundle).keys()


def test_reference_sees_feedback(bundle: Bundle) -> None:
    reference = read(bundle)
    plain, fed = reference["features"], reference["features_post"]
    assert np.abs(fed - plain).max() > VISIBLE * np.abs(plain).max()


def test_reference_written_again_is_the_same(dit_checkpoint: Path, dit_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(dit_bundle).manifest
    model = load_ilf(dit_checkpoint)
    torch.manual_seed(99)
    write_reference(
        tmp_path / REFERENCE_FILE,
        model,
        segments_of(model, manifest.spec, Precision.FP32),
        manifest.spec,
        manifest.plan,
        manifest.scheduler,
        pictures=manifest.batch.min,
        guidance_scale=manifest.guidance_scale,
        precision=Precision.FP32,
        of_parts={},
    )
    again, before = read(Bundle(tmp_path, manifest)), read(Bundle(dit_bundle, manifest))
    assert again.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(again[name], before[name], err_msg=name)


def disturb_largest_weight(graph: Path) -> None:
    """Change one value of the largest weight tensor in the graph's data file."""
    weights = [w for w in onnx.load(graph, load_external_data=False).graph.initializer if w.external_data]
    largest = max(weights, key=lambda weight: int(np.prod(weight.dims)))
    place = {entry.key: entry.value for entry in largest.external_data}
    assert largest.data_type == onnx.TensorProto.FLOAT
    with (graph.parent / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        (value,) = struct.unpack("<f", file.read(FLOAT_BYTES))
        file.seek(int(place["offset"]))
        file.write(struct.pack("<f", value + DISTURBANCE))


@pytest.mark.parametrize("graph", GRAPHS)
def test_one_changed_weight_is_caught_and_its_graph_named(bundle: Bundle, graph: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ilf"
    shutil.copytree(bundle.path, copy)
    disturb_largest_weight(copy / "graphs" / f"{graph}.onnx")
    write_manifest(copy, bundle.manifest)
    differences, precision = verify(copy)
    with pytest.raises(ParityError, match=f"^{graph} "):
        check(differences, precision.parity_limit)


def test_changed_scales_are_caught_by_the_trajectory(dit_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ilf"
    shutil.copytree(dit_bundle, copy)
    manifest = Bundle.open(copy).manifest
    write_manifest(copy, dataclasses.replace(manifest, scales=tuple(reversed(manifest.scales))))
    differences, precision = verify(copy)
    with pytest.raises(ParityError, match=f"^{TRAJECTORY} "):
        check(differences, precision.parity_limit)


def test_changed_time_after_feedback_is_caught_by_the_trajectory(dit_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ilf"
    shutil.copytree(dit_bundle, copy)

    def conditioned_at_t(data: dict[str, Any]) -> None:
        step = next(step for step in data["plan"]["steps"] if step["feedback"])
        step["t_post"] = step["t"]

    change_manifest(copy, conditioned_at_t)
    differences, precision = verify(copy)
    with pytest.raises(ParityError, match=f"^{TRAJECTORY} "):
        check(differences, precision.parity_limit)
