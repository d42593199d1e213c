"""An ONNX file of a stranger: only listed operators, only its own weights, only the ports of the manifest."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.held_file import HeldFile
from ilf_trt.contract.operators import EXPORTED, OPERATORS
from ilf_trt.errors import BundleError, PortMismatch
from ilf_trt.runtime.onnx_file import OnnxFile
from ilf_trt.runtime.pipeline import Pipeline

FORBIDDEN = ("Loop", "If", "Scan", "RandomNormal", "SequenceMap", "StringConcat", "Constant", "ConstantOfShape")


def changed(bundle: Bundle, graph: str, change: Callable[[Any], object]) -> OnnxFile:
    border = next(each for each in bundle.manifest.graphs if each.name == graph)
    file = OnnxFile.of_bundle(bundle, border)
    model = onnx.load_from_string(file.model)
    change(model)
    file = replace(file, model=model.SerializeToString())
    file.check(border, {})
    return file


def initializer(model: Any) -> Any:
    return next(each for each in model.graph.initializer if each.external_data)


def entry(model: Any, key: str, value: str) -> None:
    for each in initializer(model).external_data:
        if each.key == key:
            each.value = value


@pytest.mark.parametrize("which", ["dit_bundle", "pixart_bundle"])
def test_a_whole_bundle_passes(which: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(which))
    for graph in bundle.manifest.graphs:
        file = OnnxFile.of_bundle(bundle, graph)
        assert {node.op_type for node in onnx.load_from_string(file.model).graph.node} <= EXPORTED


def test_no_operator_of_the_list_decides_how_often_something_runs() -> None:
    assert not OPERATORS & set(FORBIDDEN)


@pytest.mark.parametrize("operator", FORBIDDEN)
def test_another_operator_is_refused(operator: str, dit_bundle: Path) -> None:
    def add(model: Any) -> None:
        model.graph.node.add(op_type=operator, output=["new"])

    with pytest.raises(BundleError, match=f"operator {operator}, which ilf-trt does not write"):
        changed(Bundle.open(dit_bundle), "pre", add)


CHANGES: dict[str, Callable[[Any], object]] = {
    "another file": lambda model: entry(model, "location", "post.onnx.data"),
    "a path": lambda model: entry(model, "location", "../graphs/pre.onnx.data"),
    "past the end": lambda model: entry(model, "offset", "999999999"),
    "before the start": lambda model: entry(model, "offset", "-64"),
    "a long number": lambda model: entry(model, "offset", "9" * 5000),
    "too short": lambda model: entry(model, "length", "4"),
    "no number": lambda model: entry(model, "length", "many"),
    "a huge tensor": lambda model: initializer(model).dims.append(1 << 40),
    "a domain": lambda model: model.graph.node.add(op_type="Add", domain="com.microsoft"),
    "a graph in a node": lambda model: model.graph.node[0].attribute.add(name="body", type=5).g.node.add(op_type="Add"),
    "a function": lambda model: model.functions.add(name="f"),
    "sparse weights": lambda model: model.graph.sparse_initializer.add(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_exporter_does_not_write_is_refused(change: str, dit_bundle: Path) -> None:
    with pytest.raises(BundleError, match="do not use this bundle"):
        changed(Bundle.open(dit_bundle), "pre", CHANGES[change])


PORTS: dict[str, Callable[[Any], object]] = {
    "a side": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 100_000),
    "a dtype": lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 10),
    "a name": lambda model: setattr(model.graph.output[0], "name", "other"),
    "a port more": lambda model: model.graph.input.add(name="more"),
    "a fixed batch": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 7),
}


@pytest.mark.parametrize("change", PORTS)
def test_other_ports_than_the_manifests_are_refused(change: str, dit_bundle: Path) -> None:
    with pytest.raises(PortMismatch, match=r"^pre: (in|out)put .* is not what the manifest says"):
        changed(Bundle.open(dit_bundle), "pre", PORTS[change])


def test_bytes_that_are_no_onnx_are_refused(dit_bundle: Path) -> None:
    bundle = Bundle.open(dit_bundle)
    with pytest.raises(BundleError, match="is no ONNX file"):
        replace(OnnxFile.of_bundle(bundle, bundle.manifest.graphs[0]), model=b"\xff" * 99).check(
            bundle.manifest.graphs[0], {}
        )


def test_a_loaded_bundle_serves_on_whatever_happens_to_its_files(dit_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ilf"
    copy.mkdir()
    Bundle.open(dit_bundle).copy(copy)
    (copy / "manifest.json").write_bytes((dit_bundle / "manifest.json").read_bytes())
    with Pipeline.load(copy, threads=1, sessions=1) as pipeline:
        wanted = pipeline.generate(class_labels=[3], seed=7).latents
        for path in copy.rglob("*.data"):
            path.write_bytes(b"\x11" * path.stat().st_size)
            os.truncate(path, 0)
        np.testing.assert_array_equal(pipeline.generate(class_labels=[3], seed=7).latents, wanted)


def test_a_held_file_notices_a_change_in_place_and_not_a_rename(tmp_path: Path) -> None:
    from ilf_trt.contract.bundle import sha256_of

    path = tmp_path / "file"
    path.write_bytes(b"old" * 100)
    held = HeldFile(path, sha256=sha256_of(path), size_bytes=300)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(path)
    assert held.read() == b"old" * 100
    held = HeldFile(path, sha256=sha256_of(path), size_bytes=3)
    path.write_bytes(b"bad")
    with pytest.raises(BundleError, match="has sha256"):
        held.read()
    path.write_bytes(b"longer")
    with pytest.raises(BundleError, match="was written over while it was in use"):
        held.map()


def test_a_sparse_file_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="almost all holes"):
        HeldFile(tmp_path / "sparse", sha256="0" * 64, size_bytes=1 << 40)


@pytest.mark.parametrize("most", [1, 1000, 100_000])
def test_a_job_past_the_limit_is_refused_before_it_takes_memory(most: int, dit_bundle: Path) -> None:
    with pytest.raises((BundleError, ValueError), match="max_memory"):
        Pipeline.load(dit_bundle, threads=1, max_memory=most)
